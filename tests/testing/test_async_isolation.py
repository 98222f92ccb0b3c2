"""Coroutines in an isolated test: the same promises, and one database session with the threads where the drivers can share it."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import Any

import anyio
import pytest
from sqlalchemy import select, text

from app_db.errors import CannotIsolate, IsolationBroken, IsolationTimeout
from app_db.testing import isolated
from harness.applications import Boom
from harness.choosing import mostly
from harness.coroutines import AwaitedDatabases, opened_awaited
from harness.items import Item

DRIVERS = ("psycopg", "aiosqlite", "asyncpg", "asyncmy")
SHARING = ("psycopg", "aiosqlite")
"""The drivers whose connection threads can use as well."""


def new_urls(request: pytest.FixtureRequest, driver: str) -> Callable[[], str]:
    server = {"aiosqlite": "sqlite", "asyncmy": "mariadb"}.get(driver, "postgres")
    found: Callable[[], str] = request.getfixturevalue(f"new_{server}_url")
    return found


@pytest.fixture(params=mostly(DRIVERS, exhaustive="psycopg"))
def databases(request: pytest.FixtureRequest) -> Iterator[AwaitedDatabases]:
    """A writer and a warehouse, by each driver for coroutines. At the end they have to be empty."""
    new_url = new_urls(request, request.param)
    with opened_awaited({"writer": new_url(), "warehouse": new_url()}, request.param) as opened:
        yield opened
        assert opened.items() == opened.items("warehouse") == []


@pytest.fixture(params=SHARING)
def shared(request: pytest.FixtureRequest) -> Iterator[AwaitedDatabases]:
    """The same, by the drivers whose connections threads can share."""
    new_url = new_urls(request, request.param)
    with opened_awaited({"writer": new_url(), "warehouse": new_url()}, request.param) as opened:
        yield opened
        assert opened.items() == opened.items("warehouse") == []


async def seen(databases: AwaitedDatabases, connection: str = "writer") -> list[str]:
    """What a later unit of coroutines reads."""
    async with databases.container.transaction():
        return sorted(await databases.awaited_session(connection).scalars(select(Item.name)))


def seen_by_threads(databases: AwaitedDatabases, connection: str = "writer") -> list[str]:
    with databases.container.transaction():
        return sorted(databases.session(connection).scalars(select(Item.name)))


@pytest.mark.representative("aiosqlite")
async def test_connections_may_be_made_while_a_statement_is_executed(shared: AwaitedDatabases) -> None:
    """The fact guarded: SQLAlchemy makes functions for each SQLite connection, and SQLite makes none during a statement."""
    counting = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000) SELECT count(*) FROM n"

    async def count(times: int) -> None:
        for _ in range(times):
            async with shared.container.transaction():
                assert await shared.say(counting) == 200000

    async def connect() -> None:
        async with shared.awaited_engine().connect():
            await asyncio.sleep(0)

    async with isolated(shared.container):
        await count(1)
        counter = asyncio.create_task(count(20))
        while not counter.done():
            await connect()
        await counter


# ---- units of coroutines -------------------------------------------------------------------------------------------------


async def test_what_a_unit_committed_later_units_see_and_it_is_gone_afterwards(databases: AwaitedDatabases) -> None:
    for _ in range(2):
        async with isolated(databases.container):
            async with databases.container.transaction():
                await databases.write("a")
                await databases.write("b", "warehouse")
            with pytest.raises(Boom):
                async with databases.container.transaction():
                    await databases.write("c")
                    raise Boom
            assert await seen(databases) == ["a"]
            assert await seen(databases, "warehouse") == ["b"]
            assert databases.items() == []
        assert databases.items() == databases.items("warehouse") == []


async def test_nested_units_and_units_of_their_own_inside_others(databases: AwaitedDatabases) -> None:
    async with isolated(databases.container):
        with pytest.raises(Boom):
            async with databases.container.transaction():
                assert await databases.awaited_session().scalar(text("SELECT count(*) FROM item")) == 0
                async with databases.container.transaction("requires_new"):
                    await databases.write("own")
                raise Boom
        async with databases.container.transaction():
            await databases.write("a")
            with pytest.raises(Boom):
                async with databases.container.transaction("nested"):
                    await databases.write("undone")
                    raise Boom
        assert await seen(databases) == ["a", "own"]


@pytest.mark.representative("aiosqlite")
async def test_tasks_take_turns_and_half_of_them_raise(databases: AwaitedDatabases) -> None:
    async def one(number: int) -> None:
        async with databases.container.transaction():
            await databases.write(f"{number:02}")
            await asyncio.sleep(0)
            await databases.write(f"{number:02}", "warehouse")
            if number % 2:
                raise Boom

    async with isolated(databases.container, patience=30):
        await asyncio.gather(*(one(number) for number in range(40)), return_exceptions=True)
        expected = [f"{number:02}" for number in range(0, 40, 2)]
        assert await seen(databases) == await seen(databases, "warehouse") == expected


async def test_cancelled_tasks_leave_all_or_nothing_and_give_their_turn_back(databases: AwaitedDatabases) -> None:
    async def one(number: int) -> None:
        async with databases.container.transaction():
            await databases.write(f"{number:02}")
            await databases.write(f"{number:02}", "warehouse")

    dice = random.Random(7)
    async with isolated(databases.container, patience=30):
        tasks = [asyncio.create_task(one(number)) for number in range(30)]
        for task in tasks:
            await asyncio.sleep(dice.uniform(0, 0.004))
            if dice.random() < 0.5:
                task.cancel()
        await asyncio.wait(tasks)
        assert await seen(databases) == await seen(databases, "warehouse")
        finished = {f"{number:02}" for number, task in enumerate(tasks) if not task.cancelled() and task.exception() is None}
        assert finished <= set(await seen(databases))


async def test_a_task_that_waits_in_vain_is_told_for_whom(databases: AwaitedDatabases) -> None:
    async def other() -> None:
        async with databases.container.transaction():
            await databases.write("never")

    async with isolated(databases.container, patience=0.2), databases.container.transaction():
        await databases.write("a")
        with pytest.raises(IsolationTimeout, match=r"the task '.*', which uses 'writer'"):
            await asyncio.create_task(other(), context=Context())  # that knows of no unit


async def test_its_async_session_prepares_and_checks(databases: AwaitedDatabases) -> None:
    async with isolated(databases.container) as isolation, isolation.async_session() as session:
        session.add(Item(name="prepared"))
        await session.commit()
        assert await seen(databases) == ["prepared"]
        async with databases.container.transaction():
            await databases.write("made")
        assert sorted(await session.scalars(select(Item.name))) == ["made", "prepared"]


async def test_its_async_session_waits_for_the_unit_of_another_task(databases: AwaitedDatabases) -> None:
    async def work() -> list[str]:
        return list(await session.scalars(select(Item.name)))

    async with isolated(databases.container) as isolation:
        session = isolation.async_session()
        async with databases.container.transaction():
            await databases.write("made")
            task = asyncio.create_task(work(), context=Context())  # that knows of no unit
            assert not (await asyncio.wait([task], timeout=0.1))[0]
        assert await task == ["made"]


async def test_results_are_streamed(databases: AwaitedDatabases) -> None:
    async with isolated(databases.container):
        async with databases.container.transaction():
            databases.awaited_session().add_all(Item(name=f"{number:02}") for number in range(30))
        async with databases.container.transaction():
            streamed = await databases.awaited_session().stream_scalars(select(Item.name).order_by(Item.name))
            assert [name async for name in streamed] == [f"{number:02}" for number in range(30)]


def test_an_isolation_around_the_loop_outlives_it(databases: AwaitedDatabases) -> None:
    """As a fixture has it whose test runs on a loop of its own: the loop is closed when the isolation ends."""

    async def main() -> None:
        async with databases.container.transaction():
            await databases.write("a")
        assert await seen(databases) == ["a"]

    with isolated(databases.container):
        asyncio.run(main())
    databases.container.shutdown_resources()


def test_an_isolation_ends_while_its_loop_runs_in_another_thread(databases: AwaitedDatabases) -> None:
    """As in a test that drives a web application by way of a client."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def write() -> None:
        async with databases.container.transaction():
            await databases.write("a")

    try:
        with isolated(databases.container):
            asyncio.run_coroutine_threadsafe(write(), loop).result(10)
            assert asyncio.run_coroutine_threadsafe(seen(databases), loop).result(10) == ["a"]
        assert databases.items() == []
    finally:
        asyncio.run_coroutine_threadsafe(_shut_down(databases), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _shut_down(databases: AwaitedDatabases) -> None:
    await databases.container.shutdown_resources()


@pytest.mark.parametrize("backend", ["asyncio"])
async def test_anyios_task_groups_and_scopes_are_as_good_as_any(databases: AwaitedDatabases, backend: str) -> None:
    async def one(name: str) -> None:
        with anyio.move_on_after(20):
            async with databases.container.transaction():
                await databases.write(name)

    async with isolated(databases.container):
        async with anyio.create_task_group() as group:
            for name in ("a", "b", "c"):
                group.start_soon(one, name)
        assert await seen(databases) == ["a", "b", "c"]


# ---- threads and coroutines ----------------------------------------------------------------------------------------------


async def test_a_thread_of_a_pool_works_for_one_unit_after_the_other(shared: AwaitedDatabases) -> None:
    """As the plain functions of a web framework do: the unit that the thread worked for may go on in another thread."""
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    def add(name: str, connection: str) -> None:
        shared.session(connection).add(Item(name=name))
        shared.session(connection).flush()

    async def unit(name: str) -> None:
        async with shared.container.transaction():
            await loop.run_in_executor(one, copy_context().run, add, name, "writer")
            begun.set()
            await asyncio.sleep(0.1)
            await loop.run_in_executor(others, copy_context().run, add, name, "warehouse")

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as others:
        async with isolated(shared.container, patience=2):
            first = asyncio.create_task(unit("a"))
            await begun.wait()
            await asyncio.gather(first, unit("b"))
            assert await seen(shared, "warehouse") == await seen(shared) == ["a", "b"]


async def test_threads_see_what_coroutines_committed_and_the_other_way_round(shared: AwaitedDatabases) -> None:
    async with isolated(shared.container) as isolation:
        async with shared.container.transaction():
            await shared.write("awaited")
        assert await asyncio.to_thread(seen_by_threads, shared) == ["awaited"]
        with isolation.session() as session:
            session.add(Item(name="prepared"))
            session.commit()
        with shared.container.transaction():
            shared.add("blocking")
        assert await seen(shared) == ["awaited", "blocking", "prepared"]


async def test_one_unit_with_both_kinds_of_session_commits_and_aborts_both(shared: AwaitedDatabases) -> None:
    async with isolated(shared.container):
        for name, outcome in (("kept", None), ("undone", Boom)):
            try:
                async with shared.container.transaction():
                    await shared.write(f"{name} awaited")
                    await asyncio.to_thread(shared.add, f"{name} blocking")
                    await shared.write(f"{name} awaited", "warehouse")
                    if outcome is not None:
                        raise outcome
            except Boom:
                pass
        assert await seen(shared) == ["kept awaited", "kept blocking"]
        assert await seen(shared, "warehouse") == ["kept awaited"]


async def test_statements_are_not_prepared_twice_under_one_name(request: pytest.FixtureRequest) -> None:
    """psycopg prepares what is executed for the sixth time, and each of its two connections counts its names from 0."""
    async with opened_awaited({"writer": new_urls(request, "psycopg")()}, "psycopg") as databases, isolated(databases.container):
        count = text("SELECT count(*) FROM item")
        for _ in range(2):
            async with databases.container.transaction():
                assert [await databases.awaited_session().scalar(count) for _ in range(12)] == [0] * 12
            with databases.container.transaction():
                assert [databases.session().scalar(count) for _ in range(12)] == [0] * 12


async def test_threads_and_tasks_use_the_one_connection_at_once_and_never_at_the_same_time(shared: AwaitedDatabases) -> None:
    async def awaited(number: int) -> None:
        async with shared.container.transaction():
            await shared.write(f"awaited {number:02}")

    def blocking(number: int) -> None:
        with shared.container.transaction():
            shared.add(f"blocking {number:02}")

    async with isolated(shared.container, patience=30):
        await asyncio.gather(
            *(awaited(number) for number in range(20)), *(asyncio.to_thread(blocking, number) for number in range(20))
        )
        assert len(await seen(shared)) == 40


@pytest.mark.parametrize("driver", ["asyncpg", "asyncmy"])
@pytest.mark.parametrize("first", ["coroutines", "threads"])
async def test_drivers_that_cannot_share_a_connection_are_not_mixed(
    driver: str, first: str, request: pytest.FixtureRequest
) -> None:
    """Two connections would not see each other's rows, and would wait for each other's locks for ever."""
    new_url = new_urls(request, driver)
    async with opened_awaited({"writer": new_url(), "warehouse": new_url()}, driver) as databases, isolated(databases.container):
        if first == "coroutines":
            assert await seen(databases) == []
            with pytest.raises(CannotIsolate, match=f"by .* and {driver}"):
                seen_by_threads(databases)
        else:
            assert seen_by_threads(databases) == []
            with pytest.raises(CannotIsolate, match=f"by .* and {driver}"):
                await seen(databases)
        assert seen_by_threads(databases, "warehouse") == []  # each database for itself


@pytest.mark.parametrize("driver", ["asyncpg", "asyncmy"])
def test_two_loops_are_not_mixed_where_a_connection_belongs_to_one(driver: str, request: pytest.FixtureRequest) -> None:
    with opened_awaited({"writer": new_urls(request, driver)()}, driver) as databases, isolated(databases.container):
        assert asyncio.run(seen(databases)) == []
        with pytest.raises(CannotIsolate, match="two event loops"):
            asyncio.run(seen(databases))


# ---- what is left --------------------------------------------------------------------------------------------------------


def test_a_unit_of_coroutines_left_open_is_reported(shared: AwaitedDatabases) -> None:
    async def main() -> None:
        with pytest.raises(IsolationBroken, match="still under way, in the task"):
            async with isolated(shared.container):
                await asyncio.create_task(leak())
        async with isolated(shared.container):
            assert await seen(shared) == []

    kept: list[Any] = []

    async def leak() -> None:
        unit = shared.container.transaction()
        await unit.__aenter__()
        await shared.write("a")
        kept.append(unit)

    shared.in_a_loop(main)


@pytest.mark.representative("asyncpg")
def test_fifty_isolations_leave_no_thread_and_no_connection(databases: AwaitedDatabases) -> None:
    async def once() -> None:
        async with isolated(databases.container):
            async with databases.container.transaction():
                await databases.write("a")
            assert await seen(databases) == ["a"]

    def count() -> tuple[int, int]:
        give_up = time.monotonic() + 5
        while any(thread.name.startswith("Thread-") for thread in threading.enumerate()) and time.monotonic() < give_up:
            time.sleep(0.01)  # aiosqlite's are told to stop, and not waited for
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # links that may be gone

    async def main() -> tuple[int, int]:
        await once()
        before = count()
        for _ in range(50):
            await once()
        after = count()
        assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
        return after

    databases.in_a_loop(main)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_eager_tasks_take_turns_too(databases: AwaitedDatabases) -> None:
    async def one(name: str) -> None:
        async with databases.container.transaction():
            await databases.write(name)

    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    async with isolated(databases.container):
        await asyncio.gather(one("a"), one("b"))
        assert await seen(databases) == ["a", "b"]


@pytest.mark.representative("aiosqlite")
@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_unit_that_is_cancelled_at_any_step_leaves_nothing_when_it_fails(
    driver: str, request: pytest.FixtureRequest
) -> None:
    """aiosqlite executes what was cancelled all the same, past what is said on the shared connection meanwhile."""
    async with opened_awaited({"writer": new_urls(request, driver)()}, driver) as databases:

        async def work(name: str) -> None:
            async with databases.container.transaction():
                await databases.say("INSERT INTO item VALUES (:name, 0)", name=name)
                raise Boom

        async with isolated(databases.container):
            for steps in range(40):
                task = asyncio.create_task(work(f"{steps:02}"))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises((asyncio.CancelledError, Boom)):
                    await task
                await asyncio.sleep(0.002)
                assert await seen(databases) == []


async def test_a_statement_that_is_cancelled_while_it_runs_leaves_nothing(request: pytest.FixtureRequest) -> None:
    """asyncmy would take the answer to it for that of the next one."""
    async with opened_awaited({"writer": new_urls(request, "asyncmy")()}, "asyncmy") as databases:

        async def work() -> None:
            async with databases.container.transaction():
                await databases.say("INSERT INTO item SELECT 'slow', SLEEP(0.2)")

        async with isolated(databases.container):
            task = asyncio.create_task(work())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await seen(databases) == []
