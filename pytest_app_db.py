"""The pytest plugin of app_db: fixtures over `app_db.testing`. It does nothing for a project that doesn't use them.

It is a module beside the package, because pytest imports a plugin and the plugin's package when it
starts. In the package, it would make every project that has app_db installed wait for SQLAlchemy.
Coverage begins to measure later, and would miss what the package does when it is imported. So this
module imports pytest and the standard library only, and app_db when a fixture is used.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import pytest

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from app_db import DatabaseContainer
    from app_db.testing import CapturedHooks, Isolation

__all__ = [
    "app_db_async_session",
    "app_db_container",
    "app_db_hooks",
    "app_db_isolation",
    "app_db_session",
    "app_db_tables",
]

MARKER = "app_db(connections=None, isolation=True): isolate the test, or some of its connections; with isolation=False, don't"

_MARKER_TAKES = "@pytest.mark.app_db takes connections=[...] and isolation=False:"

PASTE = """\
The fixtures of app_db need the container of your application. Put this into conftest.py:

    import pytest
    from shop import container  # wherever yours is

    @pytest.fixture(scope="session")
    def app_db_container():
        return container
"""

# ---- options ------------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("app_db", "databases of app_db")
    group.addoption(
        "--app-db-url",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="use another database for the connection NAME of the fixture app_db_container (repeatable)",
    )
    parser.addini("app_db_urls", "databases of connections, NAME=URL a line; --app-db-url wins", type="linelist", default=[])
    parser.addini("app_db_row_counts", "report rows that a test has committed outside its isolation", type="bool", default=True)
    parser.addini("app_db_worker_databases", "give each worker of pytest-xdist databases of its own", type="bool", default=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    _urls(config)


def _urls(config: pytest.Config) -> dict[str, str]:
    """Return the URLs that were given, by connection. An error shows none of them, because it may hold a password."""
    given: dict[str, str] = {}
    configured, on_command_line = config.getini("app_db_urls"), config.getoption("app_db_url")
    for origin, texts in (("app_db_urls", configured or ()), ("--app-db-url", on_command_line or ())):
        for text in texts:
            name, equals, url = text.partition("=")
            if not (equals and url.strip() and re.fullmatch(r"[a-z]\w*", name.strip())):
                raise pytest.UsageError(
                    f"{origin} takes NAME=URL, for example writer=sqlite:///test.db, and was given something else"
                )
            given[name.strip()] = url.strip()
    return given


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"app_db: {name}={_masked(url)}" for name, url in _urls(config).items()]


def _masked(url: str) -> str:
    from app_db import AppDbError, ConnectionSettings

    try:
        return ConnectionSettings(url=url).masked_url
    except AppDbError:
        return "***"


# ---- the marker ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marked:
    """The arguments of a test's marker."""

    connections: Collection[str] | None = None
    isolation: bool = True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    problems: list[str] = []
    for item in items:
        mark = item.get_closest_marker("app_db")
        if mark is not None:
            found = [f"{item.nodeid}: {problem}" for problem in _problems_of(mark)]
            problems += found
            if found or mark.kwargs.get("isolation", True):
                _isolate_first(item)
    if problems and not _is_worker(config):  # a worker can't end the session, but each of these tests fails
        raise pytest.UsageError("\n".join([_MARKER_TAKES, *problems]))


def _isolate_first(item: Any) -> None:  # pytest has no public type for items with fixtures
    """Add the isolation to a test's fixtures: before its own, which may write, and after those it shares with other tests.

    An autouse fixture would do this too, at a cost for every test of every project.
    """
    names = [name for name in getattr(item, "fixturenames", ()) if name != "app_db_isolation"]
    definitions = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    own = (at for at, name in enumerate(names) if name in definitions and definitions[name][-1].scope == "function")
    names.insert(next(own, len(names)), "app_db_isolation")
    item.fixturenames = names


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _problems_of(mark: pytest.Mark) -> Iterable[str]:
    if mark.args:
        yield f"{mark.args!r} was given without a name"
    for name in mark.kwargs.keys() - {"connections", "isolation"}:
        yield f"there is no argument {name!r}"
    connections, isolation = mark.kwargs.get("connections"), mark.kwargs.get("isolation", True)
    if connections is not None and (isinstance(connections, str) or not all(isinstance(name, str) for name in connections)):
        yield f"connections={connections!r} is no list of names"
    if not isinstance(isolation, bool):
        yield f"isolation={isolation!r} is neither True nor False"


def _marked(request: pytest.FixtureRequest) -> Marked:
    mark = request.node.get_closest_marker("app_db")
    if mark is None:
        return Marked()
    problems = [f"{request.node.nodeid}: {problem}" for problem in _problems_of(mark)]
    if problems:
        pytest.fail("\n".join([_MARKER_TAKES, *problems]), pytrace=False)
    return Marked(**mark.kwargs)


# ---- the container --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def app_db_container() -> DatabaseContainer:
    """The container of the application. The project overrides this fixture to return it."""
    pytest.fail(PASTE, pytrace=False)


_FixtureDef: TypeAlias = "pytest.FixtureDef[object]"

_prepared = pytest.StashKey[list[object]]()
"""The containers that have their databases. A fixture may return what an outer fixture of the same name has made."""


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: _FixtureDef, request: pytest.FixtureRequest) -> Generator[None, object, object]:
    """Give the container its databases as soon as a fixture has returned it."""
    value = yield
    if fixturedef.argname == "app_db_container":
        _prepare(value, fixturedef, request.config)
    return value


def _prepare(value: object, fixturedef: _FixtureDef, config: pytest.Config) -> None:
    if not hasattr(value, "session_of"):
        pytest.fail(
            f"The fixture app_db_container returned {type(value).__name__}, which is no container of app_db. If it is the "
            "container of your application, return the database container in it: `return container.db`, for example.",
            pytrace=False,
        )
    container = cast("DatabaseContainer", value)
    prepared = config.stash.setdefault(_prepared, [])
    if any(container is other for other in prepared):
        return
    prepared.append(container)
    fixturedef.addfinalizer(lambda: prepared.remove(container))
    urls = _urls(config)
    if urls:
        from app_db.testing import overridden

        _enter(overridden(container, urls), fixturedef, config)
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is not None and config.getini("app_db_worker_databases"):
        from app_db.testing import worker_databases

        _enter(worker_databases(container, worker), fixturedef, config)


def _enter(block: AbstractContextManager[object], fixturedef: _FixtureDef, config: pytest.Config) -> None:
    """Enter a block, and leave it when the fixture is torn down. If it can't be entered, the session ends with one error."""
    from app_db import AppDbError

    try:
        block.__enter__()
    except AppDbError as error:
        if _is_worker(config):
            pytest.fail(str(error), pytrace=False)
        pytest.exit(f"app_db: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    fixturedef.addfinalizer(lambda: block.__exit__(None, None, None))


@pytest.fixture(scope="session")
def app_db_tables(app_db_container: DatabaseContainer) -> Generator[frozenset[str]]:
    """Create the tables of the models for the session. A project whose tables come from migrations overrides this fixture.

    Its value is the frozenset of connections whose tables it made. Rows that a test commits there
    outside its isolation are deleted from tables that were empty.
    """
    from app_db.testing import made_tables

    with made_tables(app_db_container) as names:
        yield names


# ---- a test ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def app_db_isolation(
    request: pytest.FixtureRequest, app_db_container: DatabaseContainer, app_db_tables: object
) -> Generator[Isolation | None]:
    """Roll back what the test writes, in every database, although it commits. The test fails if it leaves something open."""
    marked = _marked(request)
    if not marked.isolation:
        yield None
        return
    from app_db.errors import IsolationBroken
    from app_db.testing import RowCounts, isolated

    rows = RowCounts(app_db_container, marked.connections) if request.config.getini("app_db_row_counts") else None
    isolation = isolated(app_db_container, marked.connections)
    yield isolation.__enter__()
    problems: list[str] = []
    try:
        isolation.__exit__(None, None, None)
    except IsolationBroken as broken:
        problems += broken.problems
    if rows is not None:
        problems += rows.differences(app_db_tables if isinstance(app_db_tables, frozenset) else ())
    if problems:
        pytest.fail(
            "\n".join([f"{request.node.nodeid} has left something behind:", *(f"  {each}" for each in problems)]), pytrace=False
        )


@pytest.fixture
def app_db_session(request: pytest.FixtureRequest, app_db_isolation: Isolation | None) -> Generator[Session]:
    """A session of the default connection, for the test itself to prepare and to check, outside units of work."""
    isolation = _require(app_db_isolation, request)
    session = isolation.session(_default(isolation))
    yield session
    session.close()


@pytest.fixture
def app_db_async_session(request: pytest.FixtureRequest, app_db_isolation: Isolation | None) -> Generator[AsyncSession]:
    """Such a session for tests that are coroutines."""
    isolation = _require(app_db_isolation, request)
    session = isolation.async_session(_default(isolation))
    yield session
    session.sync_session.close()  # without awaiting: the event loop may be closed, and there is nothing to send


def _require(isolation: Isolation | None, request: pytest.FixtureRequest) -> Isolation:
    if isolation is None:
        pytest.fail(f"{request.fixturename} needs an isolated test, and the marker says isolation=False", pytrace=False)
    return isolation


def _default(isolation: Isolation) -> str:
    """Return the default connection: the writer, or the first connection if there is no writer."""
    names = isolation.names
    return "writer" if "writer" in names or not names else names[0]


@pytest.fixture
def app_db_hooks(app_db_container: DatabaseContainer) -> Generator[CapturedHooks]:
    """The on-commit hooks of the test's units. They are collected and not run."""
    from app_db.testing import captured_hooks

    with captured_hooks(app_db_container) as hooks:
        yield hooks
