"""Whatever way an application writes by, the unit's end decides: all of it is there, or nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.orm import Session

from harness.applications import Application, Item, running

WritePath = Callable[[Session], object]

TABLE = Item.metadata.tables["items"]

# Each leaves the items "a" and "b" behind, where there was "seed".
WRITE_PATHS: dict[str, WritePath] = {
    "ORM add": lambda session: session.add_all([Item(name="a"), Item(name="b")]),
    "ORM bulk insert": lambda session: session.execute(insert(Item), [{"name": "a"}, {"name": "b"}]),
    "query update": lambda session: [
        session.query(Item).filter_by(name=f"seed {name}").update({"name": name}) for name in ("a", "b")
    ],
    "Core insert": lambda session: session.execute(insert(TABLE), [{"name": "a"}, {"name": "b"}]),
    "text": lambda session: session.execute(text("INSERT INTO items (name) VALUES ('a'), ('b')")),
    "the session's connection": lambda session: session.connection().execute(
        text("INSERT INTO items (name) VALUES (:name)"), [{"name": "a"}, {"name": "b"}]
    ),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Item(name="a"), Item(name="b")]),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Item.__mapper__, [{"name": "a"}, {"name": "b"}]),
    "a SELECT of a function that writes": lambda session: [session.scalar(select(func.add_item(name))) for name in ("a", "b")],
}


def written_by(write: WritePath, app: Application) -> set[str]:
    """What is to be there when `write` was committed, and before it."""
    seeds = ["seed a", "seed b"] if write is WRITE_PATHS["query update"] else []
    for seed in seeds:
        app.run(f"INSERT INTO items (name) VALUES ('{seed}')")
    if write is WRITE_PATHS["a SELECT of a function that writes"]:
        app.define_writing_function()
    return set(seeds)


@pytest.fixture(params=WRITE_PATHS.values(), ids=[name.replace(" ", "_") for name in WRITE_PATHS])
def write(request: pytest.FixtureRequest) -> WritePath:
    path: WritePath = request.param
    return path


def test_what_was_written_is_there_after_the_unit(write: WritePath, database_url: str) -> None:
    with running(writer=database_url) as app:
        written_by(write, app)
        with app.unit():
            write(app.session())
        assert app.names() == ["a", "b"]


def test_what_was_written_is_gone_when_the_unit_raised(write: WritePath, database_url: str) -> None:
    with running(writer=database_url) as app:
        before = written_by(write, app)
        with pytest.raises(ValueError, match="the application's own"), app.unit():
            write(app.session())
            app.session().flush()
            seen = set(app.session().scalars(select(Item.name)))
            raise ValueError("the application's own")
        assert seen == {"a", "b"}, "the write took place, so that there was something to undo"
        assert set(app.names()) == before
