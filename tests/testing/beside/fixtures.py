"""The fixtures of the project, and what repeats its tests."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy import URL, func, select, text

from app_db import DatabaseContainer, DatabaseSettings
from app_db.migrations import upgrade
from app_db.testing import overridden
from testing.beside import store

MIGRATIONS = Path(__file__).parent / "migrations"

# A machine under load is slow, and no example is kept for the next run.
hypothesis.settings.register_profile("beside", deadline=None, database=None, max_examples=20)
hypothesis.settings.load_profile("beside")


# ---- the databases --------------------------------------------------------------------------------------------------------


def url_of(host: str, port: int | str, user: str, dbname: str, password: str | None) -> str:
    url = URL.create("postgresql+psycopg", user, password, host, int(port), dbname)
    return url.render_as_string(hide_password=False)


def migrate(*, host: str, port: int, user: str, dbname: str, password: str | None, **options: object) -> None:
    """Fill the template from which pytest-postgresql makes its databases."""
    with overridden(store.container, {"writer": url_of(host, port, user, dbname, password)}):
        upgrade(store.container, connections=["writer"], directory=MIGRATIONS)


server = factories.postgresql_noproc(load=[migrate])
own_database = factories.postgresql("server")
"""A database of the test's own, made by pytest-postgresql, and a connection to it."""


@pytest.fixture(scope="session")
def app_db_container(server: NoopExecutor, tmp_path_factory: pytest.TempPathFactory) -> Generator[DatabaseContainer]:
    """The container, with a database that pytest-postgresql makes for the session, in each worker."""
    place: dict[str, Any] = {"host": server.host, "port": server.port, "user": server.user, "password": server.password}
    name = f"{server.dbname}_session"
    settings = DatabaseSettings(
        _env_file=None,
        atomicity="best_effort",
        connections={
            "writer": {"url": url_of(**place, dbname=name)},
            "warehouse": {"url": f"sqlite:///{tmp_path_factory.mktemp('warehouse') / 'facts.db'}"},
        },
    )
    with (
        DatabaseJanitor(**place, dbname=name, template_dbname=server.template_dbname),
        overridden(store.container, settings),
    ):
        yield store.container


@pytest.fixture(scope="session")
def app_db_tables(app_db_container: DatabaseContainer) -> Generator[None]:
    """Migrate, and see at the end that the tests have left nothing."""
    upgrade(app_db_container, directory=MIGRATIONS)
    yield
    for model, name in ((store.Order, "writer"), (store.Sale, "warehouse")):
        with app_db_container.connection(name).container.engine().connect() as connection:
            assert connection.scalar(select(func.count()).select_from(model)) == 0, f"rows were left in {name}"
            if name == "writer":
                assert connection.scalar(text("SELECT count(*) FROM pg_prepared_xacts")) == 0


# ---- repetitions ----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeat", type=int, default=1, help="run each test so many times, unless it is marked `once`")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    times = metafunc.config.getoption("repeat")
    if times > 1 and metafunc.definition.get_closest_marker("once") is None:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(times))
