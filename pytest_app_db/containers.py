"""The container of the project's application, with the databases and tables that the tests use."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar, cast

import pytest

from pytest_app_db.lasting import is_on
from pytest_app_db.options import is_worker, urls_given

if TYPE_CHECKING:
    from app_db import DatabaseContainer

PASTE = """\
The fixtures of app_db need the container of your application. Put this into conftest.py:

    import pytest
    from shop import container  # wherever yours is

    @pytest.fixture(scope="session")
    def app_db_container():
        return container
"""


@pytest.fixture(scope="session")
def app_db_container() -> DatabaseContainer:
    """The container of the application. The project overrides this fixture to return it."""
    pytest.fail(PASTE, pytrace=False)


T = TypeVar("T")
_FixtureDef: TypeAlias = "pytest.FixtureDef[object]"

_prepared = pytest.StashKey[list[Any]]()
"""The containers that have their databases. A fixture may return what an outer fixture of the same name has made."""


def containers_of(config: pytest.Config) -> list[Any]:
    """Return the containers that fixtures have returned, while these last."""
    return config.stash.setdefault(_prepared, [])


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: _FixtureDef, request: pytest.FixtureRequest) -> Generator[None, object, object]:
    """Give the container its databases as soon as a fixture has returned it. End the session if the tables can't be made here."""
    value, problem = None, ""
    try:
        value = yield
    except Exception as error:
        problem = _message(error) if fixturedef.argname == "app_db_tables" and fixturedef.func.__module__ == __name__ else ""
        if not problem:
            raise
    if problem:  # not in the `except`, or pytest would show the error twice
        _give_up(problem, request.config)
    if fixturedef.argname == "app_db_container":
        prepare(_require_container(value), request.config, fixturedef.addfinalizer)
    return value


def _message(error: Exception) -> str:
    """Return the message of an error of app_db, and nothing for others."""
    from app_db import AppDbError

    return str(error) if isinstance(error, AppDbError) else ""


def _give_up(problem: str, config: pytest.Config) -> NoReturn:
    """End the session with one error. A worker can't end it: there, each test fails that needs the databases."""
    if is_worker(config):
        pytest.fail(problem, pytrace=False)
    pytest.exit(f"app_db: {problem}", returncode=pytest.ExitCode.USAGE_ERROR)


def _require_container(value: object) -> DatabaseContainer:
    if not hasattr(value, "session_of"):
        pytest.fail(
            f"The fixture app_db_container returned {type(value).__name__}, which is no container of app_db. If it is the "
            "container of your application, return the database container in it: `return container.db`, for example.",
            pytrace=False,
        )
    return cast("DatabaseContainer", value)


def prepare(container: DatabaseContainer, config: pytest.Config, at_end: Callable[[Callable[[], object]], object]) -> None:
    """Give a container the databases of the run, unless it has them. `at_end` takes what gives it its own back."""
    prepared = containers_of(config)
    if any(container is other for other in prepared):
        return
    prepared.append(container)
    at_end(lambda: prepared.remove(container))
    from pytest_app_db.cases import answer

    answer(config)
    urls = urls_given(config)
    if urls:
        from app_db.testing import overridden

        _enter(overridden(container, urls), config, at_end)
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is not None and config.getini("app_db_worker_databases"):
        from app_db.testing import worker_databases

        _enter(worker_databases(container, worker), config, at_end)
    elif is_on(config, "create") or is_on(config, "reuse"):
        from app_db.testing import made_databases

        _enter(made_databases(container), config, at_end)


def _enter(block: AbstractContextManager[T], config: pytest.Config, at_end: Callable[[Callable[[], object]], object]) -> T:
    """Enter a block, and leave it at the end. If it can't be entered, the session ends with one error."""
    from app_db import AppDbError

    try:
        given = block.__enter__()
    except AppDbError as error:
        _give_up(str(error), config)
    at_end(lambda: block.__exit__(None, None, None))
    return given


@pytest.fixture(scope="session")
def app_db_tables(app_db_container: DatabaseContainer) -> Generator[frozenset[str]]:
    """Create the tables of the models for the session. A project whose tables come from migrations overrides this fixture.

    Its value is the frozenset of connections whose tables it made. Rows that a test commits there
    outside its isolation are deleted from tables that were empty.
    """
    from app_db.testing import made_tables

    with made_tables(app_db_container) as made:
        yield made
