"""Cases of unittest under pytest: IsolatedTestCase and made_tables use the databases of the run, and leave nothing there."""

from __future__ import annotations

import inspect
import sys
import unittest
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from pytest_app_db.containers import PASTE, prepare
from pytest_app_db.lasting import is_on, tell
from pytest_app_db.options import is_worker

if TYPE_CHECKING:
    from app_db import DatabaseContainer

_CASES_TAKE = "A unittest.TestCase can't use these as a function can:"

_ending = pytest.StashKey[ExitStack]()
"""What is ended with the session."""
_answers = pytest.StashKey[bool]()
"""Whether app_db.testing asks this plugin."""
_item = pytest.StashKey[Any]()
"""The test that runs."""
_done = pytest.StashKey[list[tuple[pytest.Module, object]]]()
"""What was done for the modules that are set up."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ending] = ExitStack()


# ---- what can't work ----------------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    problems: list[str] = []
    for item in items:
        case = _case_of(item)
        if case is None:
            continue
        found = [f"{item.nodeid}: {problem}" for problem in _problems_of(item, case)]
        problems += found
        if found and is_worker(config):  # a worker can't end the session, but each of these tests fails
            _first(item, "app_db_refused_case")
        elif _is_isolated(case):
            _first(item, "app_db_case")
    if problems and not is_worker(config):
        raise pytest.UsageError("\n".join([_CASES_TAKE, *problems]))


def _problems_of(item: pytest.Item, case: type[unittest.TestCase]) -> Iterable[str]:
    asked = [name for name in _arguments(item) if name.startswith("app_db_")]
    for name in asked:
        yield (
            f"unittest passes no fixtures, and the method takes {name}. Derive the class from app_db.testing.IsolatedTestCase "
            "and use self.isolation, or make the test a function"
        )
    mark = item.get_closest_marker("app_db")
    if mark is not None and _is_isolated(case) and (mark.args or mark.kwargs):
        given = ", ".join([*map(repr, mark.args), *(f"{name}={value!r}" for name, value in mark.kwargs.items())])
        yield (
            f"an IsolatedTestCase isolates its tests itself, so @pytest.mark.app_db({given}) changes nothing. Name its "
            "`connections` in the class, or derive it from unittest.TestCase"
        )


def _arguments(item: pytest.Item) -> Collection[str]:
    function = getattr(item, "function", None)
    return list(inspect.signature(function).parameters)[1:] if callable(function) else []


def _case_of(item: pytest.Item) -> type[unittest.TestCase] | None:
    found = getattr(item, "cls", None)
    return found if isinstance(found, type) and issubclass(found, unittest.TestCase) else None


def _is_isolated(case: type[unittest.TestCase]) -> bool:
    testing = sys.modules.get("app_db.testing")
    return testing is not None and issubclass(case, testing.IsolatedTestCase)


def _first(item: Any, fixture: str) -> None:  # pytest has no public type for items with fixtures
    """Add a fixture before all others: before the one that calls setUpModule, too."""
    item.fixturenames = [fixture, *(name for name in item.fixturenames if name != fixture)]


@pytest.fixture
def app_db_refused_case(request: pytest.FixtureRequest) -> None:
    """Fails the tests of cases that can't work, in a worker."""
    item = request.config.stash[_item]
    problems = [f"{item.nodeid}: {problem}" for case in [_case_of(item)] if case for problem in _problems_of(item, case)]
    pytest.fail("\n".join([_CASES_TAKE, *problems]), pytrace=False)


# ---- the databases of the run ---------------------------------------------------------------------------------------------


def pytest_collection_finish(session: pytest.Session) -> None:
    """Answer what app_db.testing asks, from the first test on."""
    if "app_db" in sys.modules:
        answer(session.config)


def answer(config: pytest.Config) -> None:
    """Answer what app_db.testing asks, until the session ends."""
    from app_db.testing import Runner, running_under

    if config.stash.get(_answers, False):
        return
    config.stash[_answers] = True
    runner = Runner(
        prepare=lambda container: _prepare(container, config),
        prepare_case=lambda container: _prepare_case(container, config),
        tell=lambda note: tell(config, note),
        create=is_on(config, "create"),
        reuse=is_on(config, "reuse"),
    )
    config.stash[_ending].enter_context(running_under(runner))


def _prepare(container: DatabaseContainer, config: pytest.Config) -> None:
    """Give a container the databases of the run until the session ends, unless a block has given it some."""
    from app_db.testing import is_overridden

    if not is_overridden(container):
        prepare(container, config, config.stash[_ending].callback)
    module = _module_of(config)
    if module is not None and _is_first(module, None, config):
        module.addfinalizer(unittest.doModuleCleanups)  # unittest calls it at the end of a module, and pytest does not


def _prepare_case(container: DatabaseContainer, config: pytest.Config) -> None:
    """Prepare the container of a case, and make the tables that are missing. They are dropped with the module."""
    from app_db.testing import made_tables

    _prepare(container, config)
    module = _module_of(config)
    if module is not None and _is_first(module, container, config):
        made = made_tables(container)
        made.__enter__()
        module.addfinalizer(lambda: made.__exit__(None, None, None))


def _module_of(config: pytest.Config) -> pytest.Module | None:
    item: pytest.Item | None = config.stash.get(_item, None)
    return None if item is None else item.getparent(pytest.Module)


def _is_first(module: pytest.Module, what: object, config: pytest.Config) -> bool:
    """Return whether something was not done for a module yet. It is done again when the module is set up again."""
    done = config.stash.setdefault(_done, [])
    if any(found[0] is module and found[1] is what for found in done):
        return False
    done.append((module, what))
    module.addfinalizer(lambda: done.remove((module, what)))
    return True


@pytest.fixture(scope="module")
def app_db_case(request: pytest.FixtureRequest) -> None:
    """Gives the container of an IsolatedTestCase its databases before setUpModule, and the tables of the project's fixtures."""
    config = request.config
    try:
        request.getfixturevalue("app_db_tables")
    except pytest.fail.Exception as failed:
        if failed.msg != PASTE:
            raise
        # The project has no fixture app_db_container: made_tables and setUp make the tables.
    container = getattr(_case_of(config.stash[_item]), "container", None)
    if container is not None:
        _prepare(container, config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[_item] = item


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_ending].close()
