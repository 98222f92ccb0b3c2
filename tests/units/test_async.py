"""Units of work of coroutines: what they commit, their options, hooks and savepoints, and what fails in them."""

from __future__ import annotations

import asyncio
import gc
import random
import sqlite3
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import transaction as zope
from dependency_injector.wiring import Provide
from sqlalchemy import exc, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from app_db import Container, UnitOfWork, transactional
from app_db.errors import (
    AwaitRequired,
    HookFailed,
    InvalidUse,
    NotAtomic,
    NoUnitOfWork,
    OutcomeUnknown,
    ReadOnlyViolation,
    SessionIsManaged,
    TransactionLost,
    UnitOfWorkDoomed,
    UnitOfWorkEnded,
    UnitOfWorkTimeout,
)
from harness.applications import Boom
from harness.choosing import mostly
from harness.coroutines import DRIVERS, PATIENCE, AwaitedDatabases, Lag, make_commits_slow, opened_awaited, url_for
from harness.items import LONG, Item, database_name
from harness.servers import PostgresServer

POSTGRESQL = ("asyncpg", "psycopg")


@pytest.fixture(params=mostly(DRIVERS, exhaustive="psycopg"))
def databases(request: pytest.FixtureRequest) -> Iterator[AwaitedDatabases]:
    with opened_awaited(url_for(request.param, request), request.param, each={"pool": {"size": 5}}) as databases:
        yield databases


@pytest.fixture(params=mostly(POSTGRESQL, exhaustive="psycopg"))
def on_postgresql(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[AwaitedDatabases]:
    with opened_awaited(postgres_url, request.param, each={"pool": {"size": 5}}) as databases:
        yield databases


# ---- many at once -----------------------------------------------------------------------------------------------------

TASKS = 500


class Tasks:
    """Tasks that all work in units of their own, half of which raise, and note what they saw."""

    def __init__(self, databases: AwaitedDatabases) -> None:
        self.databases = databases
        self.holders: dict[int, int] = {}
        self.wrong: list[str] = []

    async def unit(self, number: int) -> None:
        async with self.databases.container.transaction():
            session = self.databases.awaited_session()
            # As long as it is held, no other session has its id; as long as it is noted, nobody else may have it.
            if (holder := self.holders.setdefault(id(session.sync_session), number)) != number:
                self.wrong.append(f"{number} was given the session of {holder}")
            if session.new or session.in_transaction() or len(session.sync_session.identity_map):
                self.wrong.append(f"{number} was given a session that was not empty")
            await self.databases.write(f"{number:03}")
            await asyncio.sleep(random.uniform(0, 0.002))
            mine = (await session.scalars(select(Item.name).where(Item.name == f"{number:03}"))).all()
            if mine != [f"{number:03}"] or self.databases.awaited_session() is not session:
                self.wrong.append(f"{number} did not find its own work")
            del self.holders[id(session.sync_session)]
            if number % 2:
                raise Boom


@pytest.mark.representative("asyncpg")
@pytest.mark.parametrize("driver", DRIVERS)
def test_500_tasks_write_exactly_what_their_units_commit(
    request: pytest.FixtureRequest, postgres: PostgresServer, driver: str
) -> None:
    url = url_for(driver, request)
    with opened_awaited(url, driver, each={"pool": {"size": 10, "max_overflow": 10, "timeout": 60}}) as databases:
        tasks = Tasks(databases)

        async def main() -> list[BaseException | None]:
            outcomes = await asyncio.gather(*(tasks.unit(number) for number in range(TASKS)), return_exceptions=True)
            assert databases.in_use() == 0
            if driver != "aiosqlite":
                assert postgres.open_transactions(database_name(url)) == []
            return outcomes

        outcomes = databases.in_a_loop(main)
        assert tasks.wrong == []
        assert [type(outcome) for outcome in outcomes] == [type(None), Boom] * (TASKS // 2)
        assert databases.items() == [f"{number:03}" for number in range(0, TASKS, 2)]


# ---- what is provided -------------------------------------------------------------------------------------------------


async def test_the_providers_have_flat_and_nested_names(databases: AwaitedDatabases) -> None:
    container: Any = databases.container
    for kind in ("async_engine", "async_sessionmaker", "async_scoped_session", "async_session"):
        assert getattr(container, f"writer_{kind}") is getattr(container.writer, kind)
    async with container.transaction():
        session = container.writer_async_session()
        assert isinstance(session, AsyncSession)
        assert container.writer_async_session() is session
        assert container.writer_async_scoped_session()() is session
        await container.writer_async_scoped_session().execute(text("SELECT 1"))
        assert session.in_transaction()


def test_every_loop_has_an_engine_of_its_own_which_is_made_when_it_is_needed(databases: AwaitedDatabases) -> None:
    engines: list[Any] = []

    async def main() -> None:
        async with databases.container.transaction():
            pass
        container: Any = databases.container
        assert not container.writer_async_engine.is_built
        async with databases.container.transaction():
            await databases.write(f"{len(engines)}")
        engines.append(databases.awaited_engine())
        assert databases.awaited_engine() is engines[-1]

    databases.in_a_loop(main)
    databases.in_a_loop(main)
    assert engines[0] is not engines[1]
    assert databases.items() == ["0", "1"]


def test_a_loop_that_ended_without_disposing_its_engine_is_no_obstacle(databases: AwaitedDatabases) -> None:
    async def main() -> None:
        async with databases.container.transaction():
            await databases.say("SELECT 1")
        await databases.awaited_engine().dispose()  # or its driver complains, and rightly

    asyncio.run(main())
    databases.in_a_loop(main)


async def test_outside_of_a_unit_there_is_no_session(databases: AwaitedDatabases) -> None:
    with pytest.raises(NoUnitOfWork):
        databases.awaited_session()
    async with databases.container.transaction():
        session = databases.awaited_session()
        await databases.write("a")
    with pytest.raises(NoUnitOfWork):
        databases.awaited_session()
    with pytest.raises(UnitOfWorkEnded):
        await session.execute(text("SELECT 1"))
    with pytest.raises(UnitOfWorkEnded):
        session.add(Item(name="late"))
    assert databases.items() == ["a"]


async def test_what_a_unit_does_itself_its_session_refuses(databases: AwaitedDatabases) -> None:
    async with databases.container.transaction():
        session = databases.awaited_session()
        await databases.write("a")
        for method in (session.commit, session.rollback, session.close, session.reset, session.invalidate):
            with pytest.raises(SessionIsManaged):
                await method()
        with pytest.raises(SessionIsManaged):
            async with session.begin():
                pass
        with pytest.raises(SessionIsManaged):
            await session.execute(text("COMMIT"))
        await databases.write("b")
    assert databases.items() == ["a", "b"]


# ---- @transactional ---------------------------------------------------------------------------------------------------


@transactional
async def place(name: str, session: AsyncSession = Provide[Container.writer_async_session]) -> str:
    """Place an order."""
    session.add(Item(name=name))
    await session.flush()
    if name == "bad":
        raise Boom
    return name


@transactional(read_only=True)
async def count(session: AsyncSession = Provide[Container.writer_async_session]) -> int:
    return int(await session.scalar(text("SELECT count(*) FROM item")) or 0)


class Service:
    @transactional
    async def place_two(self, first: str, second: str) -> None:
        await place(first)
        await place(second)


def test_a_decorated_coroutine_function_runs_in_a_unit(databases: AwaitedDatabases) -> None:
    container = Container(settings=databases.settings)
    container.wire(modules=[sys.modules[__name__]])

    async def main() -> None:
        assert await place("a") == "a"
        with pytest.raises(Boom):
            await place("bad")
        await Service().place_two("b", "c")
        with pytest.raises(Boom):
            await Service().place_two("d", "bad")
        assert await asyncio.gather(*(place(f"e{number}") for number in range(3))) == ["e0", "e1", "e2"]
        assert await count() == 6
        assert container.writer_async_engine().pool.checkedout() == 0
        disposal: Any = container.shutdown_resources()
        await disposal

    try:
        assert asyncio.iscoroutinefunction(place)
        assert (place.__name__, place.__doc__) == ("place", "Place an order.")
        asyncio.run(main())
    finally:
        container.unwire()
    assert databases.items() == ["a", "b", "c", "e0", "e1", "e2"]


async def test_a_coroutine_function_can_be_run_in_attempts(databases: AwaitedDatabases, ran: list[Any]) -> None:
    async def work(name: str) -> str:
        ran.append(name)
        await databases.write(name)
        if len(ran) < 3:
            raise exc.DBAPIError("", None, Boom("lost"), connection_invalidated=True)
        return name

    run = databases.container.transaction(attempts=3, backoff=0.001).run
    assert await run(work, "a") == "a"
    assert ran == ["a", "a", "a"]
    assert databases.items() == ["a"]


# ---- options ----------------------------------------------------------------------------------------------------------


async def test_a_read_only_unit_refuses_to_write(databases: AwaitedDatabases) -> None:
    databases.put("a")
    async with databases.container.transaction(read_only=True):
        assert await databases.say("SELECT count(*) FROM item") == 1
        with pytest.raises(ReadOnlyViolation):
            await databases.say("INSERT INTO item (name, amount) VALUES ('b', 0)")
    with pytest.raises(ReadOnlyViolation):
        async with databases.container.transaction(read_only=True):
            databases.awaited_session().add(Item(name="c"))
    async with databases.container.transaction():
        await databases.write("d")
    assert databases.items() == ["a", "d"]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_read_only_connection_is_guarded_by_its_database(request: pytest.FixtureRequest, driver: str) -> None:
    url = url_for(driver, request)
    async with opened_awaited({"writer": url, "reader": url}, driver, settings={"reader": {"read_only": True}}) as databases:
        if driver != "aiosqlite":
            databases.rival(
                "CREATE FUNCTION sneak() RETURNS int LANGUAGE sql AS $$INSERT INTO item (name, amount) VALUES ('s', 0); "
                "SELECT 1$$"
            )
        async with databases.container.transaction():
            await databases.write("a")
            assert await databases.say("SELECT count(*) FROM item", "reader") == 0
            with pytest.raises(ReadOnlyViolation):
                await databases.say("DELETE FROM item", "reader")
        if driver != "aiosqlite":
            with pytest.raises(ReadOnlyViolation):
                async with databases.container.transaction():
                    await databases.say("SELECT sneak()", "reader")
        assert databases.items() == ["a"]


# ---- attempts ---------------------------------------------------------------------------------------------------------


async def test_serialization_failures_are_tried_again(on_postgresql: AwaitedDatabases) -> None:
    """Ten units add one to the same amount. Without another attempt most of them would fail."""
    on_postgresql.put("a")
    attempts: list[int] = []

    async def add_one(number: int) -> None:
        attempts.append(number)
        item = await on_postgresql.awaited_session().get_one(Item, "a")
        await asyncio.sleep(0.01)
        item.amount += 1

    run = on_postgresql.container.transaction
    await asyncio.gather(
        *(run(isolation="repeatable read", attempts=30, backoff=0.01).run(add_one, number) for number in range(10))
    )
    assert on_postgresql.amount("a") == 10
    assert len(attempts) > 10


async def test_a_commit_that_fails_to_serialize_is_tried_again(on_postgresql: AwaitedDatabases, ran: list[Any]) -> None:
    on_postgresql.put("a", "b")

    async def work() -> None:
        ran.append(1)
        await on_postgresql.say("SELECT sum(amount) FROM item")
        await on_postgresql.say("UPDATE item SET amount = amount + 1 WHERE name = 'a'")
        if len(ran) == 1:
            with on_postgresql.outside().execution_options(isolation_level="SERIALIZABLE").begin() as rival:
                rival.execute(text("SELECT sum(amount) FROM item"))
                rival.execute(text("UPDATE item SET amount = 7 WHERE name = 'b'"))

    await on_postgresql.container.transaction(isolation="serializable", attempts=3, backoff=0.001).run(work)
    assert len(ran) == 2
    assert (on_postgresql.amount("a"), on_postgresql.amount("b")) == (1, 7)


async def test_the_pause_between_attempts_does_not_keep_the_loop(databases: AwaitedDatabases, ran: list[Any]) -> None:
    async def work() -> None:
        ran.append(1)
        if len(ran) < 4:
            raise exc.DBAPIError("", None, Boom("lost"), connection_invalidated=True)

    random.seed(2)
    async with Lag() as lag:
        await databases.container.transaction(attempts=4, backoff=0.2).run(work)
    assert lag.worst < PATIENCE


@pytest.mark.exhaustive
def test_a_locked_file_is_tried_again(sqlite_url: str, ran: list[Any]) -> None:
    with opened_awaited(sqlite_url, "aiosqlite", each={"connect_args": {"timeout": 0.05}}) as databases:
        rival = sqlite3.connect(databases.outside().url.database or "", isolation_level=None)

        async def work() -> None:
            ran.append(1)
            if len(ran) == 2:
                rival.execute("ROLLBACK")
            await databases.write("a")

        async def main() -> None:
            rival.execute("BEGIN IMMEDIATE")
            await databases.container.transaction(attempts=3, backoff=0.001).run(work)

        try:
            databases.in_a_loop(main)
        finally:
            rival.close()
        assert len(ran) == 2
        assert databases.items() == ["a"]


# ---- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_may_be_functions_and_coroutine_functions(databases: AwaitedDatabases, ran: list[Any]) -> None:
    async def note(what: str) -> None:
        await asyncio.sleep(0.001)
        ran.append(what)

    def register(unit: UnitOfWork) -> None:
        for kind in ("before_commit", "on_commit", "on_abort"):
            getattr(unit, kind)(note, f"{kind} awaited")
            getattr(unit, kind)(ran.append, f"{kind} called")
            getattr(unit, kind)(lambda kind=kind: note(f"{kind} returned"))

    async def main() -> None:
        async with databases.container.transaction() as unit:
            register(unit)
            await databases.write("a")
        assert ran == [f"{kind} {how}" for kind in ("before_commit", "on_commit") for how in ("awaited", "called", "returned")]
        ran.clear()
        with pytest.raises(Boom):
            async with databases.container.transaction() as unit:
                register(unit)
                raise Boom
        assert ran == [f"on_abort {how}" for how in ("awaited", "called", "returned")]

    databases.in_a_loop(main)
    assert databases.items() == ["a"]


async def test_a_hook_may_use_what_depends_on_its_task(databases: AwaitedDatabases, ran: list[Any]) -> None:
    async def use() -> None:
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(5)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
        await asyncio.wait_for(asyncio.sleep(0), 5)
        await asyncio.to_thread(ran.append, "in a thread")

    async with databases.container.transaction() as unit:
        unit.before_commit(use)
        unit.on_commit(use)
        await databases.write("a")
    assert ran == ["in a thread"] * 2


# ---- what fails -------------------------------------------------------------------------------------------------------


async def test_a_statement_error_that_is_swallowed_loses_the_transaction(on_postgresql: AwaitedDatabases) -> None:
    """PostgreSQL would answer COMMIT with a silent ROLLBACK."""
    with pytest.raises(TransactionLost, match="'writer'"):
        async with on_postgresql.container.transaction():
            await on_postgresql.write("a")
            with pytest.raises(exc.DBAPIError):
                await on_postgresql.say("SELECT nothing_of_the_kind")
    async with on_postgresql.container.transaction():
        await on_postgresql.write("b")
    assert on_postgresql.items() == ["b"]


async def test_a_flush_error_that_is_swallowed_loses_the_transaction(databases: AwaitedDatabases) -> None:
    databases.put("taken")
    with pytest.raises(TransactionLost):
        async with databases.container.transaction():
            await databases.write("a")
            with pytest.raises(exc.IntegrityError):
                await databases.write("taken")
    async with databases.container.transaction():
        await databases.write("b")
    assert databases.items() == ["b", "taken"]


async def test_a_statement_error_that_sqlite_survives_loses_nothing(sqlite_url: str) -> None:
    async with opened_awaited(sqlite_url, "aiosqlite") as databases:
        async with databases.container.transaction():
            await databases.write("a")
            with pytest.raises(exc.DBAPIError):
                await databases.say("SELECT nothing_of_the_kind")
        assert databases.items() == ["a"]


async def test_a_transaction_that_was_ended_below_is_noticed(on_postgresql: AwaitedDatabases) -> None:
    """By whoever speaks to the driver itself."""
    with pytest.raises(TransactionLost):
        async with on_postgresql.container.transaction():
            await on_postgresql.write("a")
            raw = await (await on_postgresql.awaited_session().connection()).get_raw_connection()
            driver: Any = raw.driver_connection
            await driver.execute("ROLLBACK")
    assert on_postgresql.items() == []


async def test_a_killed_backend_aborts_its_unit_and_the_next_works(
    on_postgresql: AwaitedDatabases, postgres: PostgresServer
) -> None:
    for _ in range(2):
        with pytest.raises(exc.DBAPIError) as killed:
            async with on_postgresql.container.transaction():
                await on_postgresql.write("a")
                postgres.execute("SELECT pg_terminate_backend(%s)", [await on_postgresql.awaited_backend_id()])
                await on_postgresql.write("b")
        assert killed.value.connection_invalidated
    with pytest.raises(OutcomeUnknown):
        async with on_postgresql.container.transaction():
            await on_postgresql.write("a")
            postgres.execute("SELECT pg_terminate_backend(%s)", [await on_postgresql.awaited_backend_id()])
    async with on_postgresql.container.transaction():
        await on_postgresql.write("c")
    assert on_postgresql.items() == ["c"]


async def test_a_full_pool_makes_the_unit_fail_and_the_next_works(on_postgresql: AwaitedDatabases, postgres_url: str) -> None:
    pool = {"size": 1, "max_overflow": 0, "timeout": 0.2}
    async with opened_awaited(postgres_url, "asyncpg", each={"pool": pool}) as databases:

        async def second() -> None:
            async with databases.container.transaction(propagation="requires_new"):
                await databases.write("second")

        async with databases.container.transaction():
            await databases.write("first")
            with pytest.raises(exc.TimeoutError):
                async with databases.container.transaction(propagation="requires_new"):
                    await databases.write("third")
            waiting = asyncio.create_task(second())
            await asyncio.sleep(0.05)
        await waiting
        assert databases.items() == ["first", "second"]


def test_engines_that_are_replaced_under_way_leave_nothing_behind(
    on_postgresql: AwaitedDatabases, postgres: PostgresServer, postgres_url: str
) -> None:
    engines: list[Any] = []

    async def unit(number: int) -> None:
        async with on_postgresql.container.transaction():
            await on_postgresql.write(f"{number:03}")
            await asyncio.sleep(0.01)
            await on_postgresql.say("SELECT 1")

    async def main() -> None:
        units = asyncio.gather(*(unit(number) for number in range(100)))
        while not units.done():
            engines.append(on_postgresql.awaited_engine())
            on_postgresql.container.reset_singletons()
            await asyncio.sleep(0.02)
        await units
        assert {engine.pool.checkedout() for engine in engines} == {0}

    on_postgresql.in_a_loop(main)
    assert len(engines) > 2
    assert on_postgresql.items() == [f"{number:03}" for number in range(100)]
    give_up = time.monotonic() + 5
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
    while (left := postgres.execute(query, [database_name(postgres_url)])[0][0]) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert left == 0


# ---- the wrong colour -------------------------------------------------------------------------------------------------


async def test_a_plain_with_has_no_sessions_for_coroutines(databases: AwaitedDatabases) -> None:
    with databases.container.transaction():
        with pytest.raises(AwaitRequired, match=r"'writer' async session.*`async with container\.transaction\(\)"):
            databases.awaited_session()
        databases.add("a")
    assert databases.items() == ["a"]


async def test_a_session_of_the_makers_own_is_refused_in_a_plain_with(databases: AwaitedDatabases) -> None:
    container: Any = databases.container
    with container.transaction():
        session = container.writer_async_scoped_session().session_factory()
        with pytest.raises(AwaitRequired):
            await session.execute(text("SELECT 1"))
        databases.add("a")
    async with container.transaction():
        session = container.writer_async_scoped_session().session_factory()
        await session.execute(text("INSERT INTO item (name, amount) VALUES ('b', 0)"))
    assert databases.items() == ["a", "b"]


ENDINGS = {
    "commit": lambda manager, unit: manager.commit(),
    "abort": lambda manager, unit: manager.abort(),
    "savepoint": lambda manager, unit: manager.savepoint(),
    "transaction.commit": lambda manager, unit: unit.transaction.commit(),
    "transaction.abort": lambda manager, unit: unit.transaction.abort(),
    "transaction.savepoint": lambda manager, unit: unit.transaction.savepoint(),
    "unit.savepoint": lambda manager, unit: unit.savepoint(),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_what_has_to_be_awaited_is_refused_outside_of_the_bridge(databases: AwaitedDatabases, ending: str) -> None:
    async with databases.container.transaction() as unit:
        await databases.write("a")
        with pytest.raises(AwaitRequired, match=r"has to be awaited.*`async with container\.transaction\(\)`"):
            ENDINGS[ending](databases.container.transaction_manager(), unit)
        await databases.write("b")
    assert databases.items() == ["a", "b"]


@pytest.mark.parametrize("options", [{"propagation": "nested"}, {"timeout": 5.0}], ids=["nested", "timeout"])
@pytest.mark.parametrize("used", ["before", "inside", "never"])
async def test_a_plain_with_inside_a_unit_of_coroutines(databases: AwaitedDatabases, options: dict[str, Any], used: str) -> None:
    """It would have to wait for the sessions that coroutines use there, or use inside."""
    async with databases.container.transaction():
        if used == "before":
            await databases.write("a")
        with pytest.raises(AwaitRequired, match="`async with "), databases.container.transaction(**options):
            pytest.fail("entered")
        await databases.write("b")
        async with databases.container.transaction(**options):
            await databases.write("c")
    assert databases.items() == (["a", "b", "c"] if used == "before" else ["b", "c"])


async def test_a_plain_with_that_waits_for_nothing_is_a_part_of_the_unit(databases: AwaitedDatabases) -> None:
    async with databases.container.transaction():
        await databases.write("a")
        with databases.container.transaction():
            await databases.write("b")
        with databases.container.transaction(propagation="mandatory") as unit:
            unit.on_commit(databases.items)
            await databases.write("c")
    with pytest.raises(UnitOfWorkDoomed):
        async with databases.container.transaction():
            await databases.write("d")
            with pytest.raises(Boom), databases.container.transaction():
                raise Boom
    assert databases.items() == ["a", "b", "c"]


async def test_a_savepoint_that_was_taken_before_coroutines_wrote_is_not_rolled_back_outside_of_the_bridge(
    databases: AwaitedDatabases,
) -> None:
    async with databases.container.transaction() as unit:
        savepoint = unit.savepoint()
        await databases.write("a")
        with pytest.raises(AwaitRequired):
            savepoint.rollback()
        await databases.write("b")
    assert databases.items() == ["a", "b"]


async def test_a_coroutine_hook_needs_a_unit_of_coroutines(databases: AwaitedDatabases, ran: list[Any]) -> None:
    async def hook() -> None:
        ran.append("ran")

    with databases.container.transaction() as unit:
        for register in (unit.before_commit, unit.on_commit, unit.on_abort):
            with pytest.raises(AwaitRequired, match="`async with`"):
                register(hook)
        databases.add("a")
    assert ran == []
    assert databases.items() == ["a"]


def test_a_hook_that_turns_out_to_return_a_coroutine_aborts_a_plain_unit(databases: AwaitedDatabases, ran: list[Any]) -> None:
    """Which can't be known before it is called."""

    async def hook() -> None:
        ran.append("ran")

    with pytest.raises(AwaitRequired, match="async with"), databases.container.transaction() as unit:
        unit.before_commit(lambda: hook())
        databases.add("a")
    with pytest.raises(HookFailed, match="async with"), databases.container.transaction() as unit:
        unit.on_commit(lambda: hook())
        databases.add("b")
    assert ran == []
    assert databases.items() == ["b"]


def test_tasks_cannot_share_zopes_transaction(sqlite_url: str, ran: list[Any]) -> None:
    manager = zope.ThreadTransactionManager()
    manager.explicit = True
    with opened_awaited(sqlite_url, "aiosqlite", manager=manager) as databases:

        async def main() -> None:
            with pytest.raises(InvalidUse, match="Give the container no other manager"):
                async with databases.container.transaction():
                    ran.append("entered")
            with databases.container.transaction():
                databases.add("a")
                with pytest.raises(InvalidUse):
                    async with databases.container.transaction(propagation="requires_new"):
                        ran.append("entered")
                with pytest.raises(AwaitRequired):
                    databases.awaited_session()
                databases.add("b")

        databases.in_a_loop(main)
        assert ran == []
        assert databases.items() == ["a", "b"]


# ---- the loop goes on -------------------------------------------------------------------------------------------------


@pytest.mark.representative("asyncpg")
async def test_a_slow_commit_keeps_nobody_else(on_postgresql: AwaitedDatabases) -> None:
    make_commits_slow(on_postgresql)
    async with on_postgresql.container.transaction():
        on_postgresql.add("warm")  # the engines are made
        await on_postgresql.say("SELECT 1")
    async with Lag() as lag:
        for write in (on_postgresql.write, asyncio.to_thread):
            began = time.monotonic()
            async with on_postgresql.container.transaction():
                await (write("a") if write == on_postgresql.write else asyncio.to_thread(on_postgresql.add, "b"))
            assert time.monotonic() - began > 0.5
    assert lag.worst < PATIENCE
    assert on_postgresql.items() == ["a", "b", "warm"]


SLOW = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.3); RETURN NEW; END $$"
SLOW_INSERT = "CREATE TRIGGER slow BEFORE INSERT ON item FOR EACH ROW EXECUTE FUNCTION slow()"


@pytest.mark.parametrize("ending", ["commits", "rolls back a savepoint"])
async def test_a_slow_flush_of_a_blocking_session_keeps_nobody_else(postgres_url: str, ending: str) -> None:
    async with opened_awaited(postgres_url, "asyncpg") as databases:
        databases.rival(SLOW)
        databases.rival(SLOW_INSERT)
        async with databases.container.transaction():
            databases.session().execute(text("SELECT 1"))
            async with Lag() as lag:
                databases.session().add(Item(name="a"))
                async with databases.container.transaction(propagation="nested"):  # flushes
                    databases.session().add(Item(name="b"))
                if ending != "commits":
                    with pytest.raises(Boom):
                        async with databases.container.transaction(propagation="nested"):
                            databases.session().add(Item(name="c"))
                            raise Boom
                databases.session().add(Item(name="d"))
            assert lag.worst < PATIENCE
            lagging = Lag()
            await lagging.__aenter__()
        await lagging.__aexit__()
        assert lagging.worst < PATIENCE
        assert databases.items() == ["a", "b", "d"]


@pytest.mark.representative("commit", "roll_back_to")
@pytest.mark.parametrize(
    "method", ["commit", "roll_back", "flush", "has_lost_transaction", "savepoint", "roll_back_to", "release"]
)
async def test_whatever_waits_for_a_blocking_session_does_so_in_a_thread(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The slow part is the branch's own, whatever made it slow: a lock, the network."""
    from app_db._units.branches import Branch

    usual = getattr(Branch, method)

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return usual(*arguments)

    async with opened_awaited(sqlite_url, "aiosqlite") as databases:
        async with databases.container.transaction():
            databases.add("warm")
        monkeypatch.setattr(Branch, method, slowly)
        lag = Lag()
        await lag.__aenter__()
        with pytest.raises(Boom):
            async with databases.container.transaction():
                databases.add("gone")
                raise Boom
        async with databases.container.transaction():
            databases.add("a")
            async with databases.container.transaction(propagation="nested"):
                databases.add("b")
            with pytest.raises(Boom):
                async with databases.container.transaction(propagation="nested"):
                    databases.add("c")
                    raise Boom
        await lag.__aexit__()
        assert lag.worst < PATIENCE
        assert databases.items() == ["a", "b", "warm"]


def test_a_locked_file_keeps_nobody_else(sqlite_url: str) -> None:
    with opened_awaited(sqlite_url, "aiosqlite") as databases:
        rival = sqlite3.connect(databases.outside().url.database or "", isolation_level=None)

        async def main() -> None:
            async with databases.container.transaction():
                await databases.say("SELECT 1")
            rival.execute("BEGIN IMMEDIATE")
            asyncio.get_running_loop().call_later(0.5, rival.execute, "ROLLBACK")
            async with Lag() as lag, databases.container.transaction():
                await databases.write("a")
            assert lag.worst < PATIENCE

        try:
            databases.in_a_loop(main)
        finally:
            rival.close()
        assert databases.items() == ["a"]


# ---- sessions of both kinds -------------------------------------------------------------------------------------------


async def test_a_blocking_function_in_a_thread_joins_its_callers_unit(databases: AwaitedDatabases) -> None:
    def blocking(name: str) -> None:
        with databases.container.transaction():
            databases.add(name)

    async with databases.container.transaction():
        await asyncio.to_thread(blocking, "a")
        assert databases.items() == []
    assert databases.items() == ["a"]
    with pytest.raises(Boom):
        async with databases.container.transaction():
            await asyncio.to_thread(blocking, "b")
            raise Boom
    assert databases.items() == ["a"]


@pytest.fixture(params=mostly(DRIVERS, exhaustive="psycopg"))
def two(request: pytest.FixtureRequest) -> Iterator[AwaitedDatabases]:
    """A writer for coroutines, and a log for blocking code."""
    new = request.getfixturevalue("new_sqlite_url" if request.param == "aiosqlite" else "new_postgres_url")
    with opened_awaited({"writer": new(), "log": new()}, request.param) as databases:
        yield databases


async def test_sessions_of_both_kinds_end_together(two: AwaitedDatabases) -> None:
    async with two.container.transaction():
        await two.write("a")
        await asyncio.to_thread(two.add, "a", "log")
        two.session("log").add(Item(name="b"))
        two.awaited_session().add(Item(name="b"))
    with pytest.raises(Boom):
        async with two.container.transaction():
            await two.write("c")
            two.add("c", "log")
            raise Boom
    async with two.container.transaction():
        with pytest.raises(Boom):
            async with two.container.transaction(propagation="nested"):
                await two.write("d")
                two.add("d", "log")
                raise Boom
        async with two.container.transaction(propagation="nested"):
            await two.write("e")
            two.add("e", "log")
    assert two.items() == two.items("log") == ["a", "b", "e"]


async def test_a_time_limit_is_for_sessions_of_both_kinds(two: AwaitedDatabases) -> None:
    long = LONG[two.outside().dialect.name]
    with pytest.raises(UnitOfWorkTimeout):
        async with two.container.transaction():
            await two.write("a")
            two.add("a", "log")
            async with two.container.transaction(timeout=0.2):
                await asyncio.to_thread(two.session("log").execute, text(long))
    async with two.container.transaction():
        await two.write("b")
        two.add("b", "log")
    assert two.items() == two.items("log") == ["b"]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_two_written_databases_are_refused_when_all_or_nothing_is_wanted(
    request: pytest.FixtureRequest, driver: str
) -> None:
    new = request.getfixturevalue("new_sqlite_url" if driver == "aiosqlite" else "new_postgres_url")
    async with opened_awaited({"writer": new(), "log": new()}, driver, atomicity="strict") as databases:
        with pytest.raises(NotAtomic, match=r"'log', 'writer'"):
            async with databases.container.transaction():
                await databases.write("a")
                databases.add("a", "log")
        with pytest.raises(NotAtomic, match=r"'log', 'writer'"):
            async with databases.container.transaction():
                await databases.write("a")
                await databases.write("a", "log")
        assert databases.items() == databases.items("log") == []


async def test_one_connection_written_in_both_ways_is_two_transactions_and_the_error_says_so(postgres_url: str) -> None:
    async with opened_awaited(postgres_url, "asyncpg", atomicity="strict") as databases:
        with pytest.raises(NotAtomic, match=r"'writer', 'writer \(async\)'.*two transactions") as refused:
            async with databases.container.transaction():
                await databases.write("a")
                databases.add("b")
        assert refused.value.connections == ("writer", "writer (async)")
        assert databases.items() == []


# ---- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("databases", ["psycopg"], indirect=True)
@pytest.mark.parametrize("ending", ["commits", "raises", "nested", "is cancelled"])
def test_a_unit_leaves_no_garbage_that_sqlalchemy_would_not(databases: AwaitedDatabases, ending: str) -> None:
    """What only the collector can free grows with the units of a server that is busy."""
    engine_made: list[Any] = []
    reached = asyncio.Event()
    databases.put("taken")

    async def bare(number: int) -> None:
        async with AsyncSession(databases.awaited_engine()) as session, session.begin():
            session.add(Item(name=f"bare {number}"))
            await session.flush()

    async def unit(number: int) -> None:
        async with databases.container.transaction():
            await databases.write(f"unit {number}")
            if ending == "raises":
                raise Boom
            if ending == "nested":
                async with databases.container.transaction(propagation="nested"):
                    await databases.write(f"nested {number}")
            if ending == "is cancelled":
                reached.set()
                await asyncio.sleep(60)

    async def garbage_of(work: Any, number: int) -> int:
        gc.collect()
        for repetition in range(10):
            task = asyncio.create_task(work(10 * number + repetition))
            if ending == "is cancelled" and work is unit:
                await reached.wait()
                reached.clear()
                task.cancel()
            await asyncio.wait((task,))
            task.exception() if not task.cancelled() else None
            del task
        return gc.collect()

    async def main() -> tuple[int, int]:
        engine_made.append(databases.awaited_engine())
        for number in (0, 1):
            bare_garbage = await garbage_of(bare, number)
            units_garbage = await garbage_of(unit, number)
        return bare_garbage, units_garbage

    gc.disable()
    try:
        bare_garbage, units_garbage = databases.in_a_loop(main)
    finally:
        gc.enable()
    assert units_garbage <= bare_garbage + 10
