"""An engine of the application's own is configuration enough: `Connection(engine=…)`, and an override of `writer_engine`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import providers
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import StaticPool

from app_db import Connection, Container, DatabaseContainer
from app_db.errors import ConnectionNotConfigured, InvalidUse, NothingConfigured, SettingsError
from app_db.testing import isolated

SECRET = "s3cr3t-pa55"


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def engine(sqlite_url: str) -> Engine:
    return create_engine(sqlite_url)


def container_with(**connections: Any) -> Any:
    declared = {name: Connection(engine=engine) if engine is not None else Connection() for name, engine in connections.items()}
    make: Any = type(DatabaseContainer)
    return make("Shop", (DatabaseContainer,), declared)()


def use(container: Any, name: str = "writer") -> None:
    with container.transaction():
        getattr(container, f"{name}_session")().execute(text("CREATE TABLE t (n INTEGER)"))
        getattr(container, f"{name}_session")().execute(text("INSERT INTO t VALUES (42)"))
    with container.transaction(read_only=True):
        assert getattr(container, f"{name}_session")().scalar(text("SELECT n FROM t")) == 42


def test_an_engine_that_overrides_works_without_settings(engine: Engine) -> None:
    container: Any = Container()
    container.writer_engine.override(engine)
    use(container)
    assert container.writer_engine() is engine
    assert container.reader_session is not None
    with container.transaction():
        assert container.session().scalar(text("SELECT n FROM t")) == 42


def test_an_engine_in_the_declaration_works_without_settings(engine: Engine) -> None:
    container = container_with(writer=engine)
    use(container)
    assert container.writer_engine() is engine
    assert container.settings().connection("writer").sqlalchemy_url().database == engine.url.database


def test_an_engine_in_memory_works(tmp_path: Path) -> None:
    use(container_with(writer=create_engine("sqlite://", poolclass=StaticPool)))


def test_an_async_engine_works_without_settings(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url.replace("sqlite:", "sqlite+aiosqlite:"))
    container = container_with(writer=engine)

    async def work() -> None:
        async with container.transaction():
            await container.writer_async_session().execute(text("CREATE TABLE t (n INTEGER)"))
            await container.writer_async_session().execute(text("INSERT INTO t VALUES (42)"))
        assert container.writer_async_engine() is engine
        await container.shutdown_resources()
        await engine.dispose()

    asyncio.run(work())


def test_two_engines_commit_together(new_postgres_url: Callable[[], str]) -> None:
    """Two-phase commit is a setting, so that two engines alone can't commit together, and are refused."""
    engines = {name: create_engine(new_postgres_url()) for name in ("writer", "warehouse")}
    container = container_with(**engines)
    with pytest.raises(Exception, match="'warehouse', 'writer', which can't commit together"), container.transaction():
        container.writer_session().execute(text("CREATE TABLE t (n INTEGER)"))
        container.warehouse_session().execute(text("CREATE TABLE t (n INTEGER)"))
    for engine in engines.values():
        engine.dispose()


def test_the_other_connections_come_from_the_environment(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__LOG__URL", f"sqlite:///{tmp_path}/log.db")
    container = container_with(writer=engine, log=None)
    use(container)
    use(container, "log")
    assert str(container.log_engine().url).endswith("log.db")


def test_copies_have_the_engine_itself(engine: Engine) -> None:
    container = container_with(writer=engine)
    assert deepcopy(container).writer_engine() is engine
    nested: Any = providers.deepcopy(container)
    assert nested.writer_engine() is engine


def test_an_override_counts_before_the_declaration(engine: Engine, tmp_path: Path) -> None:
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    container = container_with(writer=engine)
    with container.writer_engine.override(other):
        assert container.writer_engine() is other
    assert container.writer_engine() is engine


def test_an_isolated_test_rolls_back(engine: Engine) -> None:
    container = container_with(writer=engine)
    use(container)
    with isolated(container), container.transaction():
        container.writer_session().execute(text("DELETE FROM t"))
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM t")) == 1


# ---- what is wrong -------------------------------------------------------------------------------------------------------


def test_an_engine_for_another_database_than_the_settings_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "APP_DB_CONNECTIONS__WRITER__URL"
    monkeypatch.setenv(variable, f"postgresql://shop:{SECRET}@db/shop")
    container = container_with(writer=create_engine(f"postgresql+psycopg://shop:{SECRET}@db/other"))
    with pytest.raises(SettingsError) as caught:
        container.settings()
    assert caught.value.message == (
        "The database settings have a problem:\n"
        f"  {variable}: names postgresql+psycopg://shop:***@db/shop, but Connection(engine=…) of 'writer' was given an engine "
        "for postgresql+psycopg://shop:***@db/other. Remove one of them. In a test, override the engine"
    )


def test_an_override_in_a_test_may_lead_elsewhere(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", f"postgresql://shop:{SECRET}@db/shop")
    container: Any = Container()
    with container.writer_engine.override(engine):
        use(container)


def test_without_any_engine_the_error_is_as_before() -> None:
    with pytest.raises(NothingConfigured):
        container_with(writer=None).settings()


def test_a_connection_without_engine_and_settings_is_named(engine: Engine) -> None:
    container = container_with(writer=engine, log=None)
    with pytest.raises(ConnectionNotConfigured, match="APP_DB_CONNECTIONS__LOG__URL"):
        container.log_engine()


def test_what_is_no_engine_is_refused_at_once() -> None:
    with pytest.raises(InvalidUse, match=r"Connection\(engine='sqlite://'\) is given no engine.*create_engine"):
        Connection(engine="sqlite://")  # type: ignore[arg-type]  # it is none
