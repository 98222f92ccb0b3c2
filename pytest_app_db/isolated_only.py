"""Finds what a test does to the databases before its isolation begins or without one, and refuses it if that is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from pytest_app_db.containers import containers_of

if TYPE_CHECKING:
    from app_db.testing import only_isolated

_FixtureDef: TypeAlias = "pytest.FixtureDef[object]"

ISOLATION = "app_db_isolation"

_MARK = "Mark the test with @pytest.mark.app_db"

_refused = pytest.StashKey[list[str]]()
"""What was refused in a test."""


# ---- options --------------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("app_db").addoption(
        "--app-db-isolated-only",
        action="store_true",
        default=False,
        help="a test that uses a database of the fixture app_db_container without isolation fails",
    )
    parser.addini("app_db_isolated_only", "as --app-db-isolated-only", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Watching(refuses=_refuses(config)), "app_db_watching")
    if _refuses(config):
        config.pluginmanager.register(_Refusing(), "app_db_refusing")


def pytest_report_header(config: pytest.Config) -> list[str]:
    return ["app_db: only isolated tests may use the databases"] if _refuses(config) else []


def _refuses(config: pytest.Config) -> bool:
    return bool(config.getoption("app_db_isolated_only") or config.getini("app_db_isolated_only"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each test ask for the container, whose use would not be noticed otherwise."""
    if _refuses(config):
        for item in items:
            add_databases(item, "app_db_container")


def add_before_own(item: Any, fixture: str) -> None:  # pytest has no public type for items with fixtures
    """Add a fixture to those of a test: before its own, and after those it shares with other tests."""
    _add(item, fixture, {"function"})


def add_databases(item: Any, *fixtures: str) -> None:
    """Add fixtures of the session to those of a test: before those of a package, module or class, which may use the databases."""
    for fixture in fixtures:
        _add(item, fixture, {"package", "module", "class", "function"})


def _add(item: Any, fixture: str, before: Collection[str]) -> None:
    """Add a fixture to those of a test, before the first one of these scopes."""
    if not hasattr(item, "fixturenames"):
        return
    names = [name for name in item.fixturenames if name != fixture]
    definitions = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    later = (at for at, name in enumerate(names) if name in definitions and definitions[name][-1].scope in before)
    names.insert(next(later, len(names)), fixture)
    item.fixturenames = names


# ---- watching a test ------------------------------------------------------------------------------------------------------


class _Watch:
    """Watches the own part of one test: its fixtures, itself, and its teardown. What it shares with others is not watched."""

    def __init__(self, item: Any, *, refuses: bool) -> None:
        self.item = item
        self.refuses = refuses
        self.blocks: list[only_isolated] = []
        self.fixtures: list[_FixtureDef] = []
        """Those that are being set up, each for the one before it."""
        self.is_torn_down = False
        self.isolation_has_begun = False

    def begin(self, containers: list[Any]) -> None:
        from app_db.testing import only_isolated

        mark = self.item.get_closest_marker("app_db")
        connections = mark.kwargs.get("connections") if mark is not None and not self.refuses else None
        for container in containers:
            block = only_isolated(container, connections, refuse=self.refuses, told=self._told)
            self.blocks.append(block.__enter__())
        self.item.addfinalizer(self._end)

    def _end(self) -> None:
        """End after the test's own fixtures are torn down, and before those that it shares are."""
        for block in reversed(self.blocks):
            block.end()

    def settle(self, error: BaseException | None = None) -> None:
        """Raise what was refused and then caught by the application; if `error` is raised anyway, add it as notes."""
        if self.refuses:
            for block in self.blocks:
                self.item.stash[_refused] += [use.message for use in block.uses]
                block.settle(error)

    def earlier_rows(self, own: Collection[str]) -> list[str]:
        """Return sentences about the rows that were committed since the test began, and about what may have done it."""
        self._end()
        changes = [each for block in self.blocks if block.rows is not None for each in block.rows.differences(own)]
        if not changes:
            return []
        uses = {
            f"{use.by} used {use.connection!r}{f' at {use.used_at}' if use.used_at else ''}": use
            for block in self.blocks
            for use in block.uses
        }
        return [*changes, *uses, *dict.fromkeys(use.advice for use in uses.values())]

    @contextmanager
    def paused(self) -> Generator[None]:
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(block.paused())
            yield

    def _told(self) -> tuple[str, str]:
        test = f"the test {self.item.nodeid}"
        if self.is_torn_down:
            return f"the teardown of {test}", ""
        if not self.fixtures:
            return test, ""
        fixture = self.fixtures[-1]
        later = ISOLATION in self.item.fixturenames and not self.isolation_has_begun
        if _is_set_up(fixture):
            return f"the setup of {test}", f"The isolation of this test begins after that. {_MARK}" if later else ""
        return (
            f"the fixture {fixture.argname!r}{_place_of(fixture)} of {test}",
            f"The isolation of this test begins after that fixture. {_order(fixture.argname)}" if later else "",
        )


def _order(fixture: str) -> str:
    return f"Name {ISOLATION} before {fixture!r}, or mark the test with @pytest.mark.app_db"


def _is_set_up(fixture: _FixtureDef) -> bool:
    """Return whether pytest has made the fixture to call `setup_method`, `setup_function` and the like. No test can name it."""
    return fixture.argname.startswith("_") and fixture.func.__module__.startswith("_pytest.")


def _place_of(fixture: _FixtureDef) -> str:
    code = getattr(inspect.unwrap(fixture.func), "__code__", None)
    if code is None:
        return ""
    path = Path(code.co_filename)
    with suppress(OSError, ValueError):  # the working directory was deleted, or is another one
        path = path.relative_to(Path.cwd())
    return f" ({path}:{code.co_firstlineno})"


class _Watching:
    """The hooks that watch tests."""

    def __init__(self, *, refuses: bool) -> None:
        self._refuses = refuses
        self._item: object = None
        self.watch: _Watch | None = None
        """What watches the test that runs."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: _FixtureDef, request: pytest.FixtureRequest) -> Generator[None, object, object]:
        if fixturedef.func.__module__.startswith("_pytest.") and not _is_set_up(fixturedef):
            return (yield)  # a parameter, `tmp_path`, `monkeypatch`: they use no database
        if request.scope != "function":
            if self.watch is None:
                return (yield)
            with self.watch.paused():
                return (yield)
        watch = self._watch_of(request.node, is_isolation=fixturedef.argname == ISOLATION)
        if watch is None:
            return (yield)
        watch.fixtures.append(fixturedef)
        try:
            return (yield from _settled(watch))
        finally:
            watch.fixtures.pop()
            watch.isolation_has_begun |= fixturedef.argname == ISOLATION

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        watch = self._watch_of(item)
        if watch is None:
            yield
        else:
            yield from _settled(watch)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        watch, self._item, self.watch = self.watch, None, None
        if watch is None or watch.item is not item:
            yield
            return
        watch.is_torn_down = True
        yield from _settled(watch)

    def _watch_of(self, item: Any, *, is_isolation: bool = False) -> _Watch | None:
        """Return what watches a test. It begins with the test's first own fixture, or with the test."""
        if item is self._item:
            return self.watch
        self._item, self.watch = item, None
        if self._refuses:
            item.stash[_refused] = []
        containers = containers_of(item.config)
        if containers and self._is_watched(item, is_isolation=is_isolation):
            self.watch = _Watch(item, refuses=self._refuses)
            self.watch.begin(containers)
        return self.watch

    def _is_watched(self, item: Any, *, is_isolation: bool) -> bool:
        mark = item.get_closest_marker("app_db")
        arguments = {} if mark is None else mark.kwargs
        if not arguments.get("isolation", True) or arguments.get("fresh", False):
            return False
        if self._refuses:
            return True
        return not is_isolation and ISOLATION in getattr(item, "fixturenames", ()) and item.config.getini("app_db_row_counts")


class _Refusing:
    """The hook that reports refusals."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Don't take a refusal for the failure that a test expects, unless its marker names the error."""
        report = yield
        refused = item.stash.get(_refused, [])
        if refused and report.skipped and hasattr(report, "wasxfail") and not _names_error(item):
            report.outcome = "failed"
            del report.wasxfail
            if refused[0] not in str(report.longrepr):  # `unittest.expectedFailure` has replaced the error
                report.longrepr = "\n".join(refused)
        return report


def _names_error(item: pytest.Item) -> bool:
    return any(mark.kwargs.get("raises") is not None for mark in item.iter_markers("xfail"))


def _settled(watch: _Watch) -> Generator[None, object, object]:
    """Do what a wrapper does around other hooks, and settle what was refused in them."""
    try:
        value = yield
    except BaseException as error:
        watch.settle(error)
        raise
    watch.settle()
    return value


def refuse_earlier_rows(item: pytest.Item, tables: object) -> None:
    """Fail the test if its fixtures have committed rows before its isolation begins."""
    watching: Any = item.config.pluginmanager.get_plugin("app_db_watching")
    watch: _Watch | None = watching.watch
    if watch is None or watch.refuses:
        return
    found = watch.earlier_rows(tables if isinstance(tables, frozenset) else ())
    if found:
        lines = "\n".join(f"  {each}" for each in found)
        pytest.fail(f"{item.nodeid}: rows were committed before its isolation began:\n{lines}", pytrace=False)
