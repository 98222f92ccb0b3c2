"""docs/way-of-an-insert.md names the functions that an INSERT runs through, in the order in which it does."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from dependency_injector.wiring import Provide
from sqlalchemy import select
from sqlalchemy.orm import Session

import app_db
from app_db import transactional
from harness.applications import Application, Item, running

PACKAGE = Path(app_db.__file__).parent
PAGE = PACKAGE.parent / "docs" / "way-of-an-insert.md"

Call = tuple[str, str]
"""A file of the package, and the qualified name of a function in it."""


@pytest.fixture
def app(sqlite_url: str) -> Iterator[Application]:
    with running(writer=sqlite_url) as app:
        app.container.wire(modules=[__name__])
        yield app
        app.container.unwire()


@transactional
def place_order(name: str, session: Session = Provide["writer_session"]) -> None:
    session.add(Item(name=name))


@transactional
def count_orders(name: str, session: Session = Provide["writer_session"]) -> None:
    session.execute(select(Item.id).where(Item.name == name)).all()


@transactional
def do_nothing(name: str, session: Session = Provide["writer_session"]) -> None:
    pass


def traced(name: str, function: Callable[[str], None] = place_order) -> list[Call]:
    """Return the calls of functions of app_db by one unit of work."""
    calls: list[Call] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and PACKAGE in Path(code.co_filename).parents:
            calls.append((Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_qualname))

    sys.setprofile(note)
    try:
        function(name)
    finally:
        sys.setprofile(None)
    return calls


def listed() -> list[Call]:
    rows = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.<>]+)` \|", PAGE.read_text(), re.MULTILINE)
    return [(file, function) for file, function in rows]


def test_the_page_lists_the_calls_in_order(app: Application) -> None:
    place_order("warm")  # what is made once is made
    calls = iter(traced("a"))
    missing = [call for call in listed() if call not in calls]  # `in` goes on where the one before was found
    assert len(listed()) > 25
    assert missing == []
    assert sorted(app.names()) == ["a", "warm"]


def test_what_the_page_names_is_there() -> None:
    text = PAGE.read_text()
    for file in set(re.findall(r"`([\w/]+\.py)`", text)):
        assert (PACKAGE / file).exists(), file
    assert "class AtomicCommit" in (PACKAGE / "_units" / "commit.py").read_text()


@pytest.mark.parametrize(("function", "most"), [(place_order, 95), (count_orders, 80), (do_nothing, 40)])
def test_a_unit_calls_few_functions(app: Application, function: Callable[[str], None], most: int) -> None:
    """What a unit costs is the sum of many small calls, so their number is the measure that is the same on every machine."""
    function("warm")  # what is made once is made
    assert 0 < len(traced("a", function)) <= most
