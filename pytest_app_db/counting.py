"""Statements that are counted: in a block of a test, and in a whole test by the marker."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_app_db.options import is_worker

if TYPE_CHECKING:
    from app_db import DatabaseContainer
    from app_db.testing import expecting

MARKER = (
    "app_db_statements(statements=None, at_most=None, select=None, insert=None, update=None, delete=None, other=None): "
    "fail if the test sends another number of statements"
)

_MARKER_TAKES = "@pytest.mark.app_db_statements takes statements= or at_most=, and select=, insert=, update=, delete= and other=:"

_ARGUMENTS = {"statements", "at_most", "select", "insert", "update", "delete", "other"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    problems: list[str] = []
    for item in items:
        mark = item.get_closest_marker("app_db_statements")
        if mark is not None:
            problems += [f"{item.nodeid}: {problem}" for problem in _problems_of(mark)]
            _ask_for_container(item)
    if problems and not is_worker(config):  # a worker can't end the session, but each of these tests fails
        raise pytest.UsageError("\n".join([_MARKER_TAKES, *problems]))


def _ask_for_container(item: Any) -> None:  # pytest has no public type for items with fixtures
    names = getattr(item, "fixturenames", None)
    if names is not None and "app_db_container" not in names:
        item.fixturenames = [*names, "app_db_container"]


def _problems_of(mark: pytest.Mark) -> Iterable[str]:
    from app_db.errors import InvalidUse
    from app_db.testing import StatementCounts

    unknown = mark.kwargs.keys() - _ARGUMENTS
    yield from (f"there is no argument {name!r}" for name in sorted(unknown))
    if len(mark.args) > 1 or (mark.args and "statements" in mark.kwargs):
        yield f"{mark.args!r} was given without a name"
    elif not unknown:
        try:
            if StatementCounts(*mark.args, **mark.kwargs).is_empty:
                yield "no number is given"
        except InvalidUse as error:
            yield error.message


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Count what a marked test sends. Its fixtures were set up before."""
    mark = item.get_closest_marker("app_db_statements")
    if mark is None:
        return (yield)
    from app_db.errors import InvalidUse, UnexpectedStatements
    from app_db.testing import expecting

    problems = [*_problems_of(mark)]
    if problems:
        pytest.fail("\n".join([_MARKER_TAKES, *(f"{item.nodeid}: {problem}" for problem in problems)]), pytrace=False)
    counting, problem = None, ""
    try:
        counting = expecting(getattr(item, "funcargs", {})["app_db_container"], *mark.args, **mark.kwargs)
    except InvalidUse as error:
        problem = f"@pytest.mark.app_db_statements: {error}"
    if counting is None:  # not in the `except`, or pytest would show the error twice
        pytest.fail(problem, pytrace=False)
    counting.__enter__()
    try:
        result = yield
    except BaseException as error:
        counting.__exit__(type(error), error, None)
        raise
    try:
        counting.__exit__(None, None, None)
    except UnexpectedStatements as error:
        problem = f"@pytest.mark.app_db_statements: {error}"
    if problem:
        pytest.fail(problem, pytrace=False)
    return result


@pytest.fixture
def app_db_expecting(app_db_container: DatabaseContainer) -> Callable[..., expecting]:
    """Return `app_db.testing.expecting` for the container.

    A test writes `with app_db_expecting(statements=3):`.
    """
    from functools import partial

    from app_db.testing import expecting

    return partial(expecting, app_db_container)
