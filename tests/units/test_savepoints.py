"""Savepoints across all the databases of a unit of work: `unit.savepoint()` and blocks with `propagation="nested"`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event, exc, text
from transaction.interfaces import InvalidSavepointRollbackError

from app_db.errors import UnitOfWorkDoomed
from harness.applications import Boom
from harness.choosing import mostly
from harness.coroutines import DRIVERS, Either, opened_either, url_for
from harness.items import Databases, Item, opened

CONNECTIONS = ("sqlite", "postgresql", "mariadb")


@pytest.fixture
def several(sqlite_url: str, postgres_url: str, mariadb_url: str) -> Iterator[Databases]:
    with opened({"sqlite": sqlite_url, "postgresql": postgres_url, "mariadb": mariadb_url}) as databases:
        yield databases


@pytest.fixture
def databases(database_url: str) -> Iterator[Databases]:
    with opened({"writer": database_url}) as databases:
        yield databases


@pytest.fixture(params=[*CONNECTIONS, *mostly(DRIVERS, exhaustive="psycopg")])
def either(request: pytest.FixtureRequest) -> Iterator[Either]:
    with opened_either({"writer": url_for(request.param, request)}, request.param) as databases:
        yield databases


def add_everywhere(databases: Databases, name: str) -> None:
    for connection in CONNECTIONS:
        databases.add(name, connection)


def committed_everywhere(databases: Databases) -> list[str]:
    """The items, the same in every database."""
    everywhere = [databases.items(connection) for connection in CONNECTIONS]
    assert everywhere[0] == everywhere[1] == everywhere[2]
    return everywhere[0]


# ---- several databases --------------------------------------------------------------------------------------------------


def test_a_savepoint_covers_all_databases(several: Databases) -> None:
    with several.container.transaction() as unit:
        add_everywhere(several, "before")
        savepoint = unit.savepoint()
        add_everywhere(several, "undone")
        savepoint.rollback()
        add_everywhere(several, "after")
    assert committed_everywhere(several) == ["after", "before"]


def test_a_savepoint_can_be_rolled_back_to_again_and_again(several: Databases) -> None:
    """With SQLAlchemy's own savepoints, zope's second rollback to the same one fails, and leaves the transaction failed."""
    with several.container.transaction() as unit:
        add_everywhere(several, "before")
        savepoint = unit.savepoint()
        for attempt in range(3):
            add_everywhere(several, f"attempt {attempt}")
            savepoint.rollback()
        add_everywhere(several, "after")
    assert committed_everywhere(several) == ["after", "before"]


def test_rolling_back_nothing_is_fine(several: Databases) -> None:
    with several.container.transaction() as unit:
        add_everywhere(several, "before")
        savepoint = unit.savepoint()
        savepoint.rollback()
        savepoint.rollback()
    assert committed_everywhere(several) == ["before"]


def test_savepoints_inside_savepoints(several: Databases) -> None:
    with several.container.transaction() as unit:
        outer = unit.savepoint()
        add_everywhere(several, "1")
        inner = unit.savepoint()
        add_everywhere(several, "2")
        inner.rollback()
        add_everywhere(several, "3")
        outer.rollback()
        with pytest.raises(InvalidSavepointRollbackError):
            inner.rollback()
        add_everywhere(several, "4")
    assert committed_everywhere(several) == ["4"]


def test_sessions_that_joined_after_the_savepoint_begin_anew(several: Databases) -> None:
    """Zope aborts what joined later; the session has to be usable afterwards, and to commit."""
    with several.container.transaction() as unit:
        several.add("before", "sqlite")
        savepoint = unit.savepoint()
        session = several.session("postgresql")
        add_everywhere(several, "undone")
        savepoint.rollback()
        assert several.session("postgresql") is session
        assert session.scalars(text("SELECT name FROM item")).all() == []
        add_everywhere(several, "after")
        savepoint.rollback()
        add_everywhere(several, "at last")
    assert several.items("sqlite") == ["at last", "before"]
    assert several.items("postgresql") == several.items("mariadb") == ["at last"]


def test_a_savepoint_older_than_the_first_session_undoes_all(several: Databases) -> None:
    with several.container.transaction() as unit:
        savepoint = unit.savepoint()
        add_everywhere(several, "undone")
        savepoint.rollback()
        assert several.checked_out() == 0
        add_everywhere(several, "after")
    assert committed_everywhere(several) == ["after"]


def test_a_nested_block_that_fails_is_undone_in_all_databases(several: Databases) -> None:
    transaction = several.container.transaction
    with transaction():
        add_everywhere(several, "outer")
        with pytest.raises(Boom), transaction(propagation="nested"):
            add_everywhere(several, "undone")
            raise Boom
        with transaction(propagation="nested"):
            add_everywhere(several, "kept")
            with pytest.raises(Boom), transaction(propagation="nested"):
                add_everywhere(several, "undone as well")
                raise Boom
        add_everywhere(several, "afterwards")
    assert committed_everywhere(several) == ["afterwards", "kept", "outer"]


def test_a_nested_block_that_was_kept_goes_with_the_outer_unit(several: Databases) -> None:
    transaction = several.container.transaction
    with pytest.raises(Boom), transaction():
        with transaction(propagation="nested"):
            add_everywhere(several, "kept for a while")
        raise Boom
    assert committed_everywhere(several) == []


def test_a_nested_block_in_a_nested_block_that_fails_is_undone_with_it(several: Databases) -> None:
    transaction = several.container.transaction
    with transaction():
        add_everywhere(several, "outer")
        with pytest.raises(Boom), transaction(propagation="nested"):
            with transaction(propagation="nested"):
                add_everywhere(several, "inner")
            raise Boom
    assert committed_everywhere(several) == ["outer"]


def test_a_nested_block_in_which_sessions_are_first_used(several: Databases) -> None:
    transaction = several.container.transaction
    with transaction():
        with pytest.raises(Boom), transaction(propagation="nested"):
            add_everywhere(several, "undone")
            raise Boom
        with transaction(propagation="nested"):
            add_everywhere(several, "kept")
    assert committed_everywhere(several) == ["kept"]


# ---- each database --------------------------------------------------------------------------------------------------------


async def test_nested_blocks_are_savepoints(either: Either) -> None:
    """Without one, PostgreSQL gives the whole transaction up after an error, and answers COMMIT with a rollback."""
    either.put("taken")
    async with either.block():
        await either.write("a")
        async with either.block(propagation="nested"):
            await either.write("b")
            with pytest.raises(Boom):
                async with either.block(propagation="nested"):
                    await either.write("c")
                    raise Boom
            await either.write("d")
        for name in ("a", "taken"):
            with pytest.raises(exc.IntegrityError):
                async with either.block(propagation="nested"):
                    await either.write(name)
        with pytest.raises(Boom):
            async with either.block(propagation="nested"):
                async with either.block(propagation="nested"):
                    await either.write("e")
                raise Boom
        await either.write("f")
    assert either.items() == ["a", "b", "d", "f", "taken"]


async def test_a_nested_block_older_than_the_first_statement(either: Either) -> None:
    async with either.block():
        with pytest.raises(Boom):
            async with either.block(propagation="nested"):
                await either.write("a")
                raise Boom
        await either.write("b")
    assert either.items() == ["b"]


def test_a_flush_that_fails_when_a_nested_block_ends_undoes_it(databases: Databases) -> None:
    databases.put("taken")
    transaction = databases.container.transaction
    with transaction():
        databases.add("outer")
        with pytest.raises(exc.IntegrityError), transaction(propagation="nested"):
            databases.session().add(Item(name="taken"))
        databases.add("afterwards")
    assert databases.items() == ["afterwards", "outer", "taken"]


def test_objects_have_their_old_values_after_a_rollback_to_a_savepoint(databases: Databases) -> None:
    with databases.container.transaction() as unit:
        item = Item(name="a", amount=1)
        databases.session().add(item)
        savepoint = unit.savepoint()
        item.amount = 2
        databases.session().flush()
        savepoint.rollback()
        assert item.amount == 1
        item.amount += 10
    assert databases.amount("a") == 11


def test_what_is_pending_when_a_savepoint_is_taken_is_kept(databases: Databases) -> None:
    with databases.container.transaction() as unit:
        databases.session().add(Item(name="pending"))
        savepoint = unit.savepoint()
        databases.session().add(Item(name="undone"))
        savepoint.rollback()
    assert databases.items() == ["pending"]


def test_500_nested_blocks_in_a_loop_leave_no_savepoint_behind(databases: Databases) -> None:
    open_now = most = 0

    def taken(*_: Any) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)

    def gone(*_: Any) -> None:
        nonlocal open_now
        open_now -= 1

    engine = databases.engine()
    event.listen(engine, "savepoint", taken)
    event.listen(engine, "release_savepoint", gone)
    event.listen(engine, "rollback_savepoint", gone)
    transaction = databases.container.transaction
    with transaction():
        databases.add("outer")
        for number in range(500):
            if number % 2:
                with transaction(propagation="nested"):
                    databases.session().execute(text("INSERT INTO item VALUES (:name, 0)"), {"name": f"{number:03}"})
            else:
                with pytest.raises(Boom), transaction(propagation="nested"):
                    databases.session().execute(text("INSERT INTO item VALUES (:name, 0)"), {"name": f"{number:03}"})
                    raise Boom
            assert databases.session().get_nested_transaction() is None
            assert open_now <= 1
    assert most <= 2
    assert databases.items() == [*(f"{number:03}" for number in range(1, 500, 2)), "outer"]


def test_the_sessions_own_savepoints_work_inside_and_around(databases: Databases) -> None:
    with databases.container.transaction() as unit:
        session = databases.session()
        with session.begin_nested():
            databases.add("kept")
        savepoint = unit.savepoint()
        with pytest.raises(Boom), session.begin_nested():
            databases.add("undone by the session")
            raise Boom
        with session.begin_nested():
            databases.add("undone by the unit")
        savepoint.rollback()
    assert databases.items() == ["kept"]


# ---- other connections and data managers ------------------------------------------------------------------------------


@pytest.fixture
def with_log(postgres_url: str, sqlite_url: str) -> Iterator[Databases]:
    with opened({"writer": postgres_url, "log": sqlite_url}, settings={"log": {"transactional": False}}) as databases:
        yield databases


def test_an_autonomous_connection_keeps_what_is_undone_elsewhere(with_log: Databases) -> None:
    transaction = with_log.container.transaction
    with transaction() as unit:
        with_log.add("before")
        with_log.add("before", "log")
        savepoint = unit.savepoint()
        with_log.add("undone")
        with_log.add("undone elsewhere", "log")
        savepoint.rollback()
        with pytest.raises(Boom), transaction(propagation="nested"):
            with_log.add("undone as well")
            with_log.add("undone elsewhere as well", "log")
            raise Boom
    assert with_log.items() == ["before"]
    assert with_log.items("log") == ["before", "undone elsewhere", "undone elsewhere as well"]


def test_an_autonomous_connection_that_joined_after_the_savepoint_keeps_its_writes(with_log: Databases) -> None:
    with with_log.container.transaction() as unit:
        with_log.add("before")
        savepoint = unit.savepoint()
        with_log.add("undone")
        with_log.add("first", "log")
        savepoint.rollback()
        with_log.add("second", "log")
    assert with_log.items() == ["before"]
    assert with_log.items("log") == ["first", "second"]


def test_an_autonomous_connection_used_first_in_a_unit_that_is_undone_keeps_its_writes(with_log: Databases) -> None:
    with with_log.container.transaction() as unit:
        savepoint = unit.savepoint()
        with_log.add("first", "log")
        with_log.add("undone")
        savepoint.rollback()
        with_log.add("second", "log")
        with_log.add("kept")
    assert with_log.items() == ["kept"]
    assert with_log.items("log") == ["first", "second"]


def test_a_data_manager_without_savepoints_is_in_the_way_only_of_a_rollback(databases: Databases) -> None:
    class WithoutSavepoints:
        ended = ""

        def sortKey(self) -> str:
            return "acme"

        def abort(self, transaction: Any) -> None:
            self.ended = "aborted"

        def tpc_finish(self, transaction: Any) -> None:
            self.ended = "committed"

        def nothing(self, transaction: Any) -> None: ...

        tpc_begin = commit = tpc_vote = tpc_abort = nothing

    transaction = databases.container.transaction
    kept, undone = WithoutSavepoints(), WithoutSavepoints()
    with transaction() as unit:
        unit.transaction.join(kept)
        unit.savepoint()
        with transaction(propagation="nested"):
            databases.add("a")
    assert kept.ended == "committed"
    assert databases.items() == ["a"]

    with pytest.raises(UnitOfWorkDoomed), transaction() as unit:
        unit.transaction.join(undone)
        databases.add("b")
        with pytest.raises(Boom), transaction(propagation="nested"):
            databases.add("c")
            raise Boom
    assert undone.ended == "aborted"
    assert databases.items() == ["a"]


def test_a_savepoint_that_cannot_be_rolled_back_ends_the_unit(databases: Databases) -> None:
    class WithoutSavepoints:
        def sortKey(self) -> str:
            return "acme"

        def nothing(self, transaction: Any) -> None: ...

        abort = tpc_begin = commit = tpc_vote = tpc_finish = tpc_abort = nothing

    transaction = databases.container.transaction
    with pytest.raises(UnitOfWorkDoomed), transaction() as unit:
        databases.add("a")
        unit.transaction.join(WithoutSavepoints())
        savepoint = unit.savepoint()
        databases.add("b")
        with pytest.raises(TypeError):
            savepoint.rollback()
    assert databases.items() == []
    with transaction():
        databases.add("c")
    assert databases.items() == ["c"]
