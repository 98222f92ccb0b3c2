"""A database is one file: DuckDB, whose file is written here, works without a change anywhere else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dependency_injector.wiring import Provide
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import app_db._databases
from app_db import DatabaseSettings, UnitOfWork, container_of, retryable, transactional
from app_db._databases import registry
from app_db.errors import CannotIsolate, InvalidUse, ReadOnlyViolation
from app_db.testing import isolated, worker_databases

FILE = '''
from contextlib import suppress
from pathlib import Path

from app_db._databases.database import Database


class DuckDB(Database):
    """DuckDB, in the process: optimistic concurrency, and no savepoints."""

    waits_for_answers = False
    has_savepoints = False
    creates_databases = True

    def roll_back(self, dbapi_connection):
        with suppress(Exception):  # where no transaction is open, DuckDB raises
            dbapi_connection.rollback()

    def is_transient(self, error):
        return type(error).__name__ == "TransactionException" and "onflict" in str(error)

    def name_for_worker(self, database, worker):
        return f"{database}.{worker}"

    def has_database(self, connected, database):
        return Path(database).exists()

    def create_database(self, connected, database):
        """Do nothing: the first connection makes the file."""

    def drop_database(self, connected, database):
        Path(database).unlink(missing_ok=True)


DATABASE = DuckDB()
'''


@pytest.fixture(autouse=True)
def fourth_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the file into the package, as if it stood beside the others."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "duckdb.py").write_text(FILE)
    monkeypatch.setattr(app_db._databases, "__path__", [*app_db._databases.__path__, str(package)])
    forget()
    yield
    sys.modules.pop("app_db._databases.duckdb", None)
    vars(app_db._databases).pop("duckdb", None)
    forget()


def forget() -> None:
    registry.database_of.cache_clear()
    registry._databases.cache_clear()


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Any]:
    file = tmp_path / "shop.duckdb"
    engine = create_engine(f"duckdb:///{file}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE items (name VARCHAR PRIMARY KEY, count INTEGER)"))
    engine.dispose()
    settings = DatabaseSettings(
        connections={"writer": {"url": f"duckdb:///{file}"}, "reader": {"mirror": "writer", "read_only": True}}, _env_file=None
    )
    made = container_of("writer", "reader")(settings=settings)
    yield made
    made.unwire()
    made.shutdown_resources()


def add(container: Any, name: str) -> None:
    container.writer_session().execute(text("INSERT INTO items VALUES (:name, 0)"), {"name": name})


def names(container: Any) -> list[str]:
    with container.transaction():
        return sorted(container.reader_session().scalars(text("SELECT name FROM items")))


def test_it_is_found_by_its_file() -> None:
    assert type(registry.database_of("duckdb")).__name__ == "DuckDB"


def test_a_unit_commits_or_rolls_back(container: Any) -> None:
    with container.transaction():
        add(container, "a")
    with pytest.raises(LookupError), container.transaction():
        add(container, "b")
        raise LookupError
    assert names(container) == ["a"]
    assert container.writer_engine().pool.checkedout() == 0


@transactional
def place(name: str, session: Session = Provide["writer_session"]) -> None:
    session.execute(text("INSERT INTO items VALUES (:name, 0)"), {"name": name})


def test_a_function_gets_its_session(container: Any) -> None:
    container.wire(modules=[__name__])
    place("a")
    assert names(container) == ["a"]


def test_its_reader_refuses_writes(container: Any) -> None:
    with pytest.raises(ReadOnlyViolation), container.transaction():
        container.reader_session().execute(text("INSERT INTO items VALUES ('a', 0)"))
    with pytest.raises(ReadOnlyViolation), container.transaction(read_only=True):
        add(container, "a")
    assert names(container) == []


def test_its_conflicts_are_retried(container: Any) -> None:
    """Two transactions that change one row at a time: DuckDB refuses the later one, and its file says that this may pass."""
    with container.transaction():
        add(container, "a")
    refused: list[BaseException] = []
    tries = 0
    count = text("UPDATE items SET count = count + 1 WHERE name = 'a'")

    def meanwhile() -> None:
        with container.transaction():
            container.writer_session().execute(count)

    def work() -> None:
        nonlocal tries
        tries += 1
        session = container.writer_session()
        session.execute(text("SELECT count FROM items")).all()  # the snapshot
        if tries == 1:
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()
        try:
            session.execute(count)
        except DBAPIError as error:
            refused.append(error)
            raise

    container.transaction(attempts=3).run(work)
    assert tries == 2
    assert [retryable(error) for error in refused] == [True]
    with container.transaction():
        assert container.reader_session().scalar(text("SELECT count FROM items")) == 2


def test_what_it_cannot_do_is_one_clear_error(container: Any) -> None:
    with pytest.raises(InvalidUse, match="The database of 'writer' has no savepoints"), container.transaction() as unit:
        add(container, "a")
        unit.savepoint()
    refusal = r"A database without savepoints \(duckdb\) can't be isolated on 'writer'"
    with pytest.raises(CannotIsolate, match=refusal), isolated(container):
        raise AssertionError("it began")
    assert names(container) == []


REFUSED = "The database of 'writer' has no savepoints"


def by_unit(container: Any, unit: UnitOfWork) -> None:
    unit.savepoint()


def by_block(container: Any, unit: UnitOfWork) -> None:
    with container.transaction(propagation="nested", timeout=0.001):
        raise AssertionError("it began")


def by_session(container: Any, unit: UnitOfWork) -> None:
    container.writer_session().begin_nested()


def by_routing_session(container: Any, unit: UnitOfWork) -> None:
    session = container.session()
    with session.using("writer"), session.begin_nested():
        session.execute(text("SELECT 1"))
        raise AssertionError("it began")


@pytest.mark.parametrize("ask", [by_unit, by_block, by_session, by_routing_session])
def test_a_savepoint_is_refused_by_name_and_leaves_nothing_open(container: Any, ask: Callable[[Any, UnitOfWork], None]) -> None:
    with container.transaction() as unit:
        add(container, "a")
        with pytest.raises(InvalidUse, match=REFUSED):
            ask(container, unit)
        assert not unit.is_doomed
        assert not container.writer_session().in_nested_transaction()
        assert not container.session().in_nested_transaction()
        add(container, "b")
    assert names(container) == ["a", "b"]
    assert container.writer_engine().pool.checkedout() == 0


def test_the_databases_that_have_savepoints_take_none_either(container: Any, sqlite_url: str) -> None:
    settings = container.settings()
    both: Any = container_of("archive", "writer")(
        settings=settings.with_connections({**settings.connections, "archive": {"url": sqlite_url}})
    )
    with both.transaction() as unit:
        both.archive_session().execute(text("CREATE TABLE items (name VARCHAR)"))
        both.writer_session().execute(text("SELECT 1"))
        for ask in (by_unit, by_block):
            with pytest.raises(InvalidUse, match=REFUSED):
                ask(both, unit)
            assert not both.archive_session().in_nested_transaction()
    both.shutdown_resources()


def test_a_connection_that_is_first_used_in_a_nested_unit_needs_no_savepoint(container: Any) -> None:
    with container.transaction():
        container.writer_session()
        with pytest.raises(LookupError), container.transaction(propagation="nested"):
            add(container, "a")
            raise LookupError
        with container.transaction(propagation="nested"):
            add(container, "b")
    assert names(container) == ["b"]


async def by_awaited_block(container: Any) -> None:
    async with container.transaction(propagation="nested"):
        raise AssertionError("it began")


async def by_awaited_session(container: Any) -> None:
    async with container.writer_async_session().begin_nested():
        raise AssertionError("it began")


@pytest.mark.parametrize("ask", [by_awaited_block, by_awaited_session])
async def test_an_awaited_savepoint_is_refused_by_name_and_leaves_nothing_open(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Any], Awaitable[None]]
) -> None:
    """DuckDB has no driver for coroutines. So this is SQLite, of which app_db is told that it has no savepoints."""
    monkeypatch.setattr(registry.database_of("sqlite"), "has_savepoints", False)
    container: Any = container_of("writer")(
        settings=DatabaseSettings(connections={"writer": {"url": sqlite_url}}, _env_file=None)
    )
    try:
        async with container.transaction():
            await container.writer_async_session().execute(text("CREATE TABLE items (name VARCHAR)"))
        async with container.transaction():
            session = container.writer_async_session()
            await session.execute(text("INSERT INTO items VALUES ('a')"))
            with pytest.raises(InvalidUse, match=REFUSED):
                await ask(container)
            assert not session.in_nested_transaction()
            await session.execute(text("INSERT INTO items VALUES ('b')"))
        async with container.transaction():
            found = await container.writer_async_session().scalars(text("SELECT name FROM items ORDER BY name"))
            assert [*found] == ["a", "b"]
        assert container.writer_async_engine().pool.checkedout() == 0
    finally:
        await container.shutdown_resources()


def test_a_worker_of_tests_gets_a_database_of_its_own(container: Any, tmp_path: Path) -> None:
    with worker_databases(container, "gw1"):
        with container.transaction():
            container.writer_session().execute(text("CREATE TABLE own (name VARCHAR)"))
        assert (tmp_path / "shop.duckdb.gw1").exists()
    assert not (tmp_path / "shop.duckdb.gw1").exists()
    assert names(container) == []
