"""Databases of a test's own: copies of the prepared ones, for what an isolated test can't show."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import pytest

from pytest_app_db.lasting import HAS_COPIES, has_failed, keep, keeps_failed

if TYPE_CHECKING:
    from app_db import DatabaseContainer
    from app_db.testing import KeptTemplates

_templates = pytest.StashKey["list[KeptTemplates]"]()
"""The values of the fixture app_db_templates, while they last."""


@pytest.fixture(scope="session")
def app_db_templates(pytestconfig: pytest.Config, app_db_container: DatabaseContainer, app_db_tables: object) -> Generator[None]:
    """Keep what the copies of `app_db_fresh` are made from, until the session ends."""
    from app_db.testing import kept_templates

    kept: list[KeptTemplates] = pytestconfig.stash.setdefault(_templates, [])
    with kept_templates(app_db_container) as templates:
        kept.append(templates)
        yield
        kept.remove(templates)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Make the templates anew after a fixture that tests share has used a database, when it is set up or torn down."""
    if request.scope == "function":
        return (yield)
    setup, teardown = _watched(request.config), list[Callable[[], None]]()
    fixturedef.addfinalizer(lambda: _end(teardown))  # after the finalizers of the fixture itself
    try:
        return (yield)
    finally:
        _end(setup)
        fixturedef.addfinalizer(lambda: teardown.extend(_watched(request.config)))  # before them


def _watched(config: pytest.Config) -> list[Callable[[], None]]:
    return [templates.watched() for templates in config.stash.get(_templates, ())]


def _end(watched: list[Callable[[], None]]) -> None:
    for end in watched:
        end()


@pytest.fixture
def app_db_fresh(
    request: pytest.FixtureRequest, app_db_container: DatabaseContainer, app_db_templates: None
) -> Generator[DatabaseContainer]:
    """The container, with copies of its databases for this test. The test is not isolated: its commits stay in the copies."""
    from app_db import AppDbError
    from app_db.errors import IsolationBroken
    from app_db.testing import fresh_databases

    keeping = keeps_failed(request.config)
    copies, problem = fresh_databases(app_db_container, name="failed" if keeping else "fresh"), ""
    try:
        copies.__enter__()
    except AppDbError as error:
        problem = str(error)
    if problem:  # not in the `except`, or pytest would show the error twice
        pytest.fail(problem, pytrace=False)
    request.node.stash[HAS_COPIES] = True
    yield app_db_container
    if keeping and has_failed(request.node):
        keep(copies, request.node)
    try:
        copies.__exit__(None, None, None)
    except IsolationBroken as broken:
        problem = "\n".join([f"{request.node.nodeid} has left something behind:", *(f"  {each}" for each in broken.problems)])
    if problem:
        pytest.fail(problem, pytrace=False)
