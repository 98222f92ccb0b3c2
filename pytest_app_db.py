"""The plugin of app_db for pytest: fixtures over `app_db.testing`, and nothing that a project doesn't ask for.

It is a module of its own, beside the package, because pytest imports a plugin when it starts, and a plugin's package with it.
Inside the package it would have every project that has app_db installed wait for SQLAlchemy, those that don't test with
it included, and coverage, which begins to measure later, would miss what the package does when it is imported. So this
imports pytest and the standard library alone, and app_db when a fixture is used.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    """Return the URLs that were given, by connection. None of them is shown: it may hold a password."""
    given: dict[str, str] = {}
    configured, said = config.getini("app_db_urls"), config.getoption("app_db_url")
    for origin, texts in (("app_db_urls", configured or ()), ("--app-db-url", said or ())):
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
    """What the marker says about a test."""

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
    if problems and not _is_worker(config):  # which can't end the session; each of the tests fails
        raise pytest.UsageError("\n".join([_MARKER_TAKES, *problems]))


def _isolate_first(item: Any) -> None:
    """Have a test isolated before its other fixtures write anything, and after those that it shares with other tests.

    An autouse fixture would do this too, and cost every test of every project.
    """
    names = [name for name in getattr(item, "fixturenames", ()) if name != "app_db_isolation"]
    definitions = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    own = (at for at, name in enumerate(names) if name in definitions and definitions[name][-1].scope == "function")
    names.insert(next(own, len(names)), "app_db_isolation")
    item.fixturenames = names


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _problems_of(mark: pytest.Mark | None) -> Iterable[str]:
    if mark is None:
        return
    if mark.args:
        yield f"{mark.args!r} was given without a name"
    for name in mark.kwargs.keys() - {"connections", "isolation"}:
        yield f"there is no argument {name!r}"
    connections, isolation = mark.kwargs.get("connections"), mark.kwargs.get("isolation", True)
    if connections is not None and (isinstance(connections, str) or not all(isinstance(name, str) for name in connections)):
        yield f"connections={connections!r} is no list of names"
    if not isinstance(isolation, bool):
        yield f"isolation={isolation!r} is neither True nor False"


def _marked(request: pytest.FixtureRequest) -> Marked | None:
    mark = request.node.get_closest_marker("app_db")
    problems = [f"{request.node.nodeid}: {problem}" for problem in _problems_of(mark)]
    if problems:
        pytest.fail("\n".join([_MARKER_TAKES, *problems]), pytrace=False)
    return None if mark is None else Marked(**mark.kwargs)


# ---- the container --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def app_db_container() -> DatabaseContainer:
    """The container of the application under test, which the project gives by a fixture of this name."""
    pytest.fail(PASTE, pytrace=False)


_prepared = pytest.StashKey[list[Any]]()
"""The containers that have their databases by now: a fixture may return what another one of the same name has made."""


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Give the container its databases as soon as it is there, whoever's fixture made it."""
    value = yield
    if fixturedef.argname == "app_db_container":
        _prepare(value, fixturedef, request.config)
    return value


def _prepare(container: Any, fixturedef: pytest.FixtureDef[Any], config: pytest.Config) -> None:
    if not hasattr(container, "session_of"):
        pytest.fail(
            f"The fixture app_db_container gave {type(container).__name__}, which is no container of app_db. If it is the one of "
            "your application, return the one in it: `return container.db`, for example.",
            pytrace=False,
        )
    prepared = config.stash.setdefault(_prepared, [])
    if any(container is other for other in prepared):
        return
    prepared.append(container)
    fixturedef.addfinalizer(lambda: prepared.remove(container))
    urls = _urls(config)
    if urls:
        from app_db.testing import overridden

        _switch(overridden(container, urls), fixturedef, config)
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is not None and config.getini("app_db_worker_databases"):
        from app_db.testing import worker_databases

        _switch(worker_databases(container, worker), fixturedef, config)


def _switch(switch: AbstractContextManager[Any], fixturedef: pytest.FixtureDef[Any], config: pytest.Config) -> None:
    """Enter a block that is left when the fixture is torn down. What keeps it from being entered is said once."""
    from app_db import AppDbError

    try:
        switch.__enter__()
    except AppDbError as error:
        if _is_worker(config):
            pytest.fail(str(error), pytrace=False)
        pytest.exit(f"app_db: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    fixturedef.addfinalizer(lambda: switch.__exit__(None, None, None))


@pytest.fixture(scope="session")
def app_db_tables(app_db_container: DatabaseContainer) -> Generator[frozenset[str]]:
    """The tables of the models, made for the session. A project whose tables come from migrations has a fixture of this name.

    Its value is the frozenset of connections whose tables are the tests' own: what a test commits there in spite of its isolation
    is deleted, where there was nothing before.
    """
    from app_db.testing import made_tables

    with made_tables(app_db_container) as names:
        yield names


# ---- a test ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def app_db_isolation(
    request: pytest.FixtureRequest, app_db_container: DatabaseContainer, app_db_tables: object
) -> Generator[Isolation | None]:
    """What the test writes is rolled back, in every database, whoever commits it. What it leaves open fails it at its end."""
    marked = _marked(request) or Marked()
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
    """A session of the default connection for the test itself, to prepare and to check, outside units of work."""
    isolation = _require(app_db_isolation, request)
    session = isolation.session(_default(isolation))
    yield session
    session.close()


@pytest.fixture
def app_db_async_session(request: pytest.FixtureRequest, app_db_isolation: Isolation | None) -> Generator[AsyncSession]:
    """The same for tests that are coroutines."""
    isolation = _require(app_db_isolation, request)
    session = isolation.async_session(_default(isolation))
    yield session
    session.sync_session.close()  # which has nothing to say to the database, whose event loop may be closed by now


def _require(isolation: Isolation | None, request: pytest.FixtureRequest) -> Isolation:
    if isolation is None:
        pytest.fail(f"{request.fixturename} needs the isolation that the marker takes the test out of", pytrace=False)
    return isolation


def _default(isolation: Isolation) -> str:
    """Return the connection that is meant where none is named: the writer, or else the first one."""
    names = isolation.names
    return "writer" if "writer" in names or not names else names[0]


@pytest.fixture
def app_db_hooks(app_db_container: DatabaseContainer) -> Generator[CapturedHooks]:
    """The on-commit hooks of the test's units, which are noted and not run."""
    from app_db.testing import captured_hooks

    with captured_hooks(app_db_container) as hooks:
        yield hooks
