"""The isolation of tests: the marker, the fixtures of a test, and the sessions with which it prepares and checks."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import pytest

from pytest_app_db.isolated_only import ISOLATION, add_before_own, add_databases, refuse_earlier_rows
from pytest_app_db.lasting import HAS_COPIES, copies_to_keep, has_failed, keep, keeps_failed
from pytest_app_db.options import is_worker

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from app_db import DatabaseContainer
    from app_db.testing import CapturedHooks, Isolation, RowWatch

MARKER = (
    "app_db(connections=None, isolation=True, fresh=False): isolate the test, or some of its connections; with isolation=False, "
    "don't; with fresh=True, give it copies of the databases instead"
)

_MARKER_TAKES = "@pytest.mark.app_db takes connections=[...], isolation=False or fresh=True:"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    config.pluginmanager.register(_Isolating(config), "app_db_isolating")


# ---- the marker ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marked:
    """The arguments of a test's marker."""

    connections: Collection[str] | None = None
    isolation: bool = True
    fresh: bool = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    problems: list[str] = []
    for item in items:
        mark = item.get_closest_marker("app_db")
        if mark is not None:
            found = [f"{item.nodeid}: {problem}" for problem in _problems_of(mark)]
            problems += found
            add_databases(item, "app_db_container", "app_db_tables")
            if found or mark.kwargs.get("isolation", True):
                # An autouse fixture would do this too, at a cost for every test of every project.
                add_before_own(item, "app_db_fresh" if mark.kwargs.get("fresh") is True and not found else ISOLATION)
    if problems and not is_worker(config):  # a worker can't end the session, but each of these tests fails
        raise pytest.UsageError("\n".join([_MARKER_TAKES, *problems]))


def _problems_of(mark: pytest.Mark) -> Iterable[str]:
    if mark.args:
        yield f"{mark.args!r} was given without a name"
    for name in mark.kwargs.keys() - {"connections", "isolation", "fresh"}:
        yield f"there is no argument {name!r}"
    connections, isolation = mark.kwargs.get("connections"), mark.kwargs.get("isolation", True)
    if connections is not None and (isinstance(connections, str) or not all(isinstance(name, str) for name in connections)):
        yield f"connections={connections!r} is no list of names"
    if not isinstance(isolation, bool):
        yield f"isolation={isolation!r} is neither True nor False"
    fresh = mark.kwargs.get("fresh", False)
    if not isinstance(fresh, bool):
        yield f"fresh={fresh!r} is neither True nor False"
    elif fresh and (connections is not None or "isolation" in mark.kwargs):
        yield "with fresh=True all databases are copied and nothing is isolated, so there is nothing else to say"


def _marked(item: pytest.Item) -> Marked:
    mark = item.get_closest_marker("app_db")
    if mark is None:
        return Marked()
    problems = [f"{item.nodeid}: {problem}" for problem in _problems_of(mark)]
    if problems:
        pytest.fail("\n".join([_MARKER_TAKES, *problems]), pytrace=False)
    return Marked(**mark.kwargs)


# ---- a test ---------------------------------------------------------------------------------------------------------------


_watches: pytest.StashKey[dict[DatabaseContainer, RowWatch]] = pytest.StashKey()
"""The rows of each container whose tests are isolated, while `app_db_tables` lasts."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Don't take rows that tests share for rows that a test has left. Drivers and other libraries write them unseen."""
    config = request.config
    is_shared = request.scope != "function" and _watches in config.stash
    if is_shared:
        _pause(config)
    try:
        value = yield
    finally:
        if is_shared:  # before the finalizer of the fixture itself, which is there by now
            fixturedef.addfinalizer(lambda: _pause(config))
    if fixturedef.argname == "app_db_tables" and _watches not in config.stash:
        config.stash[_watches] = {}
        fixturedef.addfinalizer(lambda: _end_watching(config, value))
    return value


def _end_watching(config: pytest.Config, tables: object) -> None:
    """Fail if the last tests have committed rows."""
    watches = config.stash[_watches]
    del config.stash[_watches]
    problems = [problem for watch in watches.values() for problem in watch.at_end(_made(tables))]
    if problems:
        _fail("One of the last tests", problems)


def _pause(config: pytest.Config) -> None:
    for watch in config.stash.get(_watches, {}).values():
        watch.pause()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Note the tests that are not isolated."""
    if ISOLATION not in getattr(item, "fixturenames", ()):
        for watch in item.config.stash.get(_watches, {}).values():
            watch.note_other(item.nodeid)


def _made(tables: object) -> frozenset[str]:
    """Return the connections whose tables were made for the tests. A fixture of the project may return anything."""
    return tables if isinstance(tables, frozenset) else frozenset()


def _fail(subject: str, problems: Iterable[str]) -> NoReturn:
    lines = "".join(f"\n  {each}" for each in problems)
    pytest.fail(f"{subject} has left something behind:{lines}", pytrace=False)


class _Isolating:
    """The fixture that isolates a test.

    It knows the test from a hook. pytest makes the fixture `request` anew for each fixture that asks for it, which takes longer
    than the isolation of a test.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._counts_rows: bool = config.getini("app_db_row_counts")
        self._item: pytest.Item

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._item = item

    @pytest.fixture
    def app_db_isolation(self, app_db_container: DatabaseContainer, app_db_tables: object) -> Generator[Isolation | None]:
        """Roll back what the test writes, in every database, although it commits. The test fails if it leaves something open."""
        item = self._item
        marked = _marked(item)
        if not marked.isolation or marked.fresh or item.stash.get(HAS_COPIES, False):
            yield None
            return
        refuse_earlier_rows(item, app_db_tables)
        from app_db.errors import IsolationBroken
        from app_db.testing import RowWatch, isolated

        stack = ExitStack()
        copies = stack.enter_context(copies_to_keep(app_db_container)) if keeps_failed(item.config) else None
        rows = None
        if self._counts_rows and copies is None:
            watches = item.config.stash[_watches]
            rows = watches.get(app_db_container) or watches.setdefault(app_db_container, RowWatch(app_db_container))
            rows.before_test(item.nodeid)
        isolation = isolated(app_db_container, marked.connections)
        given = isolation.__enter__()
        yield given
        kept = copies is not None and has_failed(item)
        if copies is not None and kept:
            keep(copies, item, whole=given.keep_for_good())
        problems: list[str] = []
        try:
            isolation.__exit__(None, None, None)
        except IsolationBroken as broken:
            problems += broken.problems
        if rows is not None:
            problems += rows.after_test(_made(app_db_tables), marked.connections and given.names, suspect=bool(problems))
        stack.close()
        if kept:
            return  # the test has failed, and what it left is there to be looked at
        if problems:
            _fail(item.nodeid, problems)


@pytest.fixture
def app_db_session(
    request: pytest.FixtureRequest, app_db_container: DatabaseContainer, app_db_isolation: Isolation | None
) -> Session:
    """A session of the default connection, for the test itself to prepare and to check, outside units of work."""
    isolation = _require(app_db_isolation, request)
    return isolation.session(_default(isolation, app_db_container))


@pytest.fixture
def app_db_async_session(
    request: pytest.FixtureRequest, app_db_container: DatabaseContainer, app_db_isolation: Isolation | None
) -> AsyncSession:
    """Such a session for tests that are coroutines."""
    isolation = _require(app_db_isolation, request)
    return isolation.async_session(_default(isolation, app_db_container))


def _require(isolation: Isolation | None, request: pytest.FixtureRequest) -> Isolation:
    if isolation is None:
        marked = _marked(request.node)
        said = "the marker says fresh=True" if marked.fresh else "the marker says isolation=False"
        why = said if marked.fresh or not marked.isolation else "app_db_fresh gives this one copies of the databases instead"
        pytest.fail(f"{request.fixturename} needs an isolated test, and {why}", pytrace=False)
    return isolation


def _default(isolation: Isolation, container: DatabaseContainer) -> str:
    """Return the default connection: the writer, or the first one that the container declares if there is no writer."""
    names = [name for name in container.providers if name in isolation.names]
    return "writer" if "writer" in names or not names else names[0]


@pytest.fixture
def app_db_hooks(app_db_container: DatabaseContainer) -> Generator[CapturedHooks]:
    """The on-commit hooks of the test's units. They are collected and not run."""
    from app_db.testing import captured_hooks

    with captured_hooks(app_db_container) as hooks:
        yield hooks
