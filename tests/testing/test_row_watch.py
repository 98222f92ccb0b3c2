"""Rows that tests commit past their isolation: which test is told, and that tests that commit none pay nothing."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, insert, text, update
from sqlalchemy.pool import NullPool

from app_db.testing import RowCounts, RowWatch, isolated
from app_db.testing import _row_watch as module
from harness.applications import Application, Base, Item, running

RARELY = module._RARELY
ROW = "the table 'items' of 'writer' has 1 row more than before, committed outside the isolation"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


@pytest.fixture
def app(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    monkeypatch.setattr(module, "_RARELY", 1000.0)
    monkeypatch.setattr("app_db.testing._row_counts.metadata_of", lambda name: Base.metadata)
    with running(writer=f"sqlite:///{place}") as application:
        yield application


def commit_a_row(place: Path, name: str) -> None:
    """Commit a row by a connection of the driver, as other libraries and processes do."""
    connection = sqlite3.connect(place)
    connection.execute("INSERT INTO items (name) VALUES (?)", (name,))
    connection.commit()
    connection.close()


def run(app: Application, watch: RowWatch, test: str, body: Callable[[], object]) -> list[str]:
    """What is told of a test."""
    watch.before_test(test)
    with isolated(app.container):
        body()
    return watch.after_test()


def work(app: Application) -> None:
    with app.unit():
        app.add("isolated")


def test_tests_that_use_isolated_connections_only_cost_no_query(app: Application) -> None:
    sent: list[str] = []

    @event.listens_for(app.engine(), "connect")
    def trace(connection: sqlite3.Connection, record: object) -> None:
        connection.set_trace_callback(sent.append)

    watch = RowWatch(app.container)
    for number in range(20):
        assert run(app, watch, f"test {number}", lambda: work(app)) == []
    assert sum("count(*)" in statement for statement in sent) == 1, "the rows that were there before"


def test_all_tables_of_a_database_are_counted_by_one_query(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = MetaData()
    for name in ("items", "parts", "sales"):
        Table(name, metadata, Column("id", Integer, primary_key=True))
    metadata.create_all(app.plain_engine())
    monkeypatch.setattr("app_db.testing._row_counts.metadata_of", lambda name: metadata)
    sent: list[str] = []

    @event.listens_for(app.engine(), "connect")
    def trace(connection: sqlite3.Connection, record: object) -> None:
        connection.set_trace_callback(sent.append)

    RowCounts(app.container)
    assert [statement.count("count(*)") for statement in sent if "count(*)" in statement] == [3]


def test_a_test_that_commits_by_an_engine_of_its_own_is_told_at_once(app: Application, place: Path) -> None:
    def body() -> None:
        engine = create_engine(f"sqlite:///{place}", poolclass=NullPool)
        with engine.begin() as connection:
            connection.execute(insert(Item).values(name="kept"))

    watch = RowWatch(app.container)
    assert run(app, watch, "first", lambda: None) == []
    assert run(app, watch, "second", body) == [ROW]
    assert run(app, watch, "third", lambda: None) == []


def test_a_test_whose_process_commits_is_told_at_once(app: Application, place: Path) -> None:
    program = (
        f"import sqlite3; c = sqlite3.connect({str(place)!r}); c.execute(\"INSERT INTO items (name) VALUES ('a')\"); c.commit()"
    )
    watch = RowWatch(app.container)
    assert run(app, watch, "first", lambda: subprocess.run([sys.executable, "-c", program], check=True)) == [ROW]


def test_what_nothing_has_seen_is_told_from_time_to_time_with_all_tests_since(
    app: Application, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = RowWatch(app.container)
    assert run(app, watch, "first", lambda: None) == []
    assert run(app, watch, "second", lambda: commit_a_row(place, "kept")) == []
    monkeypatch.setattr(module, "_RARELY", 0.0)
    (told,) = run(app, watch, "third", lambda: None)
    assert told == f"{ROW}, by this test or one before it after which rows were not counted: second, first"
    assert run(app, watch, "fourth", lambda: None) == []


def test_rows_are_counted_every_half_second(app: Application, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.4, 100.6, 100.6])
    monkeypatch.setattr(module, "_RARELY", RARELY)
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    watch = RowWatch(app.container)
    assert run(app, watch, "first", lambda: commit_a_row(place, "kept")) == []
    assert run(app, watch, "second", lambda: None) == [
        f"{ROW}, by this test or one before it after which rows were not counted: first"
    ]


def test_a_row_that_a_test_updates_is_not_noticed(app: Application, place: Path) -> None:
    def body() -> None:
        engine = create_engine(f"sqlite:///{place}", poolclass=NullPool)
        with engine.begin() as connection:
            connection.execute(update(Item).values(name="other"))

    commit_a_row(place, "kept")
    watch = RowWatch(app.container)
    assert run(app, watch, "only", body) == []
    assert app.names() == ["other"]


def test_what_the_last_tests_have_committed_is_told_at_the_end(app: Application, place: Path) -> None:
    watch = RowWatch(app.container)
    assert watch.at_end() == []
    assert run(app, watch, "only", lambda: commit_a_row(place, "kept")) == []
    assert watch.at_end() == [ROW]


def test_rows_of_fixtures_and_of_tests_without_isolation_are_nobodys_fault(app: Application) -> None:
    watch = RowWatch(app.container)
    assert run(app, watch, "first", lambda: None) == []
    work(app)
    assert run(app, watch, "second", lambda: None) == []
    with app.unit():
        app.session().execute(text("DELETE FROM items"))
    assert watch.at_end() == []


def test_rows_that_tests_share_are_nobodys_fault_either(app: Application, place: Path) -> None:
    watch = RowWatch(app.container)
    assert run(app, watch, "first", lambda: None) == []
    watch.pause()
    commit_a_row(place, "shared")
    assert run(app, watch, "second", lambda: None) == []
    assert watch.at_end() == []


def test_what_was_committed_before_them_is_told_with_the_next_test(app: Application, place: Path) -> None:
    watch = RowWatch(app.container)
    assert run(app, watch, "first", lambda: None) == []
    assert run(app, watch, "second", lambda: commit_a_row(place, "kept")) == []
    watch.pause()
    commit_a_row(place, "shared")
    assert run(app, watch, "third", lambda: None) == [
        f"{ROW}, by one of the tests before this one after which rows were not counted: second, first"
    ]
    assert watch.at_end() == []


def test_a_test_that_is_not_isolated_is_named_too(app: Application, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = RowWatch(app.container)
    assert run(app, watch, "first", lambda: None) == []
    watch.note_other("by itself")
    commit_a_row(place, "kept")
    monkeypatch.setattr(module, "_RARELY", 0.0)
    (told,) = run(app, watch, "third", lambda: None)
    assert told.endswith(": by itself, first")
