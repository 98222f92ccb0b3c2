"""Whoever is cancelled, at whatever moment: a unit of work is wholly there or wholly not, and nothing of it is left open."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from sqlalchemy import text

from app_db.errors import NoUnitOfWork, UnitOfWorkDoomed
from harness.applications import Boom
from harness.choosing import mostly
from harness.coroutines import DRIVERS, AwaitedDatabases, make_commits_slow, opened_awaited, url_for
from harness.items import database_name
from harness.servers import PostgresServer
from harness.versions import STRANDS_CONNECTIONS, waits_in_tasks

TASKS = 500
LONG = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3000000) SELECT count(*) FROM n"
"""A statement of SQLite that takes about a second."""
POOL = {"size": 10, "max_overflow": 10, "timeout": 60}

pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning")] if STRANDS_CONNECTIONS else []


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """See that what is stranded is collected here, and not in a test that minds."""
    yield
    if STRANDS_CONNECTIONS:
        gc.collect()


@pytest.fixture(params=mostly(["asyncpg", "psycopg"], exhaustive="psycopg"))
def slow(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[AwaitedDatabases]:
    """A database whose commits take half a second for each row."""
    with opened_awaited(postgres_url, request.param) as databases:
        make_commits_slow(databases)
        yield databases


@pytest.mark.exhaustive
@pytest.mark.parametrize("driver", DRIVERS)
def test_500_tasks_a_third_of_which_are_cancelled_are_wholly_there_or_wholly_not(
    request: pytest.FixtureRequest, postgres: PostgresServer, driver: str
) -> None:
    url = url_for(driver, request)
    with opened_awaited(url, driver, each={"pool": POOL}) as databases:
        committed: set[int] = set()

        async def unit(number: int) -> None:
            async with databases.container.transaction() as unit:
                unit.on_commit(committed.add, number)
                for part in "abc":
                    await databases.write(f"{number:03}{part}")
                if number % 2:
                    raise Boom

        async def main() -> list[Any]:
            tasks = [asyncio.create_task(unit(number)) for number in range(TASKS)]
            victims = set(random.sample(range(TASKS), TASKS // 3))
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0.002)
                under_way = [number for number in victims if not tasks[number].done()]
                for number in random.sample(under_way, min(len(under_way), 2)):
                    tasks[number].cancel()
                    victims.discard(number)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert databases.in_use() == 0
            if driver != "aiosqlite":
                assert postgres.open_transactions(database_name(url), within=2.0) == []
            return outcomes

        outcomes = databases.in_a_loop(main)
        assert {type(outcome) for outcome in outcomes} == {type(None), Boom, asyncio.CancelledError}
        assert committed >= {number for number, outcome in enumerate(outcomes) if outcome is None}
        assert databases.items() == sorted(f"{number:03}{part}" for number in committed for part in "abc")


async def test_cancelled_moments_of_a_unit_over_two_databases(
    postgres: PostgresServer, new_postgres_url: Callable[[], str]
) -> None:
    """Once the first database is told to commit, the second one is, too."""
    urls = {"writer": new_postgres_url(), "log": new_postgres_url()}
    async with opened_awaited(urls, "asyncpg", each={"pool": POOL}) as databases:

        async def unit(number: int) -> None:
            async with databases.container.transaction():
                await databases.write(f"{number:03}")
                await databases.write(f"{number:03}", "log")

        began = time.monotonic()
        for number in range(10):
            await unit(number)
        usual = (time.monotonic() - began) / 10
        for number in range(10, 110):
            task = asyncio.create_task(unit(number))
            await asyncio.sleep(random.uniform(0, usual))
            task.cancel()
            await asyncio.wait((task,))
        assert databases.in_use() == 0
        for url in urls.values():
            assert postgres.open_transactions(database_name(url), within=2.0) == []
        assert databases.items() == databases.items("log")
        assert len(databases.items()) >= 10


async def test_sessions_of_both_kinds_are_wholly_there_or_wholly_not(
    postgres: PostgresServer, new_postgres_url: Callable[[], str]
) -> None:
    urls = {"writer": new_postgres_url(), "log": new_postgres_url()}
    async with opened_awaited(urls, "psycopg", each={"pool": POOL}) as databases:

        async def unit(number: int) -> None:
            async with databases.container.transaction():
                await databases.write(f"{number:03}")
                await asyncio.to_thread(databases.add, f"{number:03}", "log")

        await unit(0)
        tasks = [asyncio.create_task(unit(number)) for number in range(1, 60)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.005)
            random.choice(tasks).cancel()
        give_up = time.monotonic() + 5
        while databases.in_use() and time.monotonic() < give_up:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.01)  # a thread that still worked for a unit that was cancelled
        for url in urls.values():
            assert postgres.open_transactions(database_name(url), within=2.0) == []
        assert databases.items() == databases.items("log")


# ---- in the middle of a commit ----------------------------------------------------------------------------------------


async def test_a_cancelled_commit_is_finished_first(slow: AwaitedDatabases) -> None:
    hooks: list[str] = []

    async def unit() -> None:
        async with slow.container.transaction() as unit:
            unit.on_commit(hooks.append, "committed")
            await slow.write("a")

    task = asyncio.create_task(unit())
    await asyncio.sleep(0.25)
    began = time.monotonic()
    for _ in range(3):  # however often
        task.cancel()
        await asyncio.sleep(0.02)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began > 0.1
    assert slow.items() == ["a"]
    assert slow.in_use() == 0
    assert hooks == ["committed"]


async def test_a_timeout_in_a_commit_is_raised_after_it(slow: AwaitedDatabases) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit, slow.container.transaction():
            await slow.write("a")
            limit.reschedule(asyncio.get_running_loop().time() + 0.2)  # the commit takes longer
    assert slow.items() == ["a"]
    current: Any = asyncio.current_task()
    assert current.cancelling() == 0
    async with asyncio.timeout(5):
        await asyncio.sleep(0)


async def test_wait_for_waits_for_the_commit(slow: AwaitedDatabases) -> None:
    async def unit() -> None:
        async with slow.container.transaction():
            await slow.write("a")

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(unit(), 0.2)
    assert slow.items() == ["a"]


async def test_a_task_group_that_fails_waits_for_the_commits_of_its_tasks(slow: AwaitedDatabases) -> None:
    async def unit() -> None:
        async with slow.container.transaction():
            await slow.write("a")

    async def fail() -> None:
        await asyncio.sleep(0.2)
        raise Boom

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(unit())
            group.create_task(fail())
    assert slow.items() == ["a"]
    assert slow.in_use() == 0


def test_a_loop_that_ends_waits_for_the_commits_under_way(slow: AwaitedDatabases) -> None:
    """asyncio.run() cancels all tasks it finds, and so would the one that commits for another."""
    tasks = []
    committed: list[str] = []

    async def unit() -> None:
        async with slow.container.transaction() as unit:
            unit.on_commit(committed.append, "a")
            await slow.write("a")

    async def main() -> str:
        async with slow.container.transaction():
            await slow.say("SELECT 1")
        tasks.append(asyncio.create_task(unit()))
        await asyncio.sleep(0.2)
        return slow.awaited_engine().driver

    async def dispose() -> None:
        disposal: Any = slow.container.shutdown_resources()
        await disposal

    loop = asyncio.new_event_loop()
    try:
        driver = loop.run_until_complete(main())
        asyncio.runners._cancel_all_tasks(loop)  # type: ignore[attr-defined]  # what asyncio.run() ends with
        assert tasks[0].cancelled()
        loop.run_until_complete(dispose())
    finally:
        loop.close()
    assert slow.items() == committed
    assert committed == ([] if waits_in_tasks(driver) else ["a"])  # such a driver is cut short beneath the commit


async def test_a_cancelled_commit_that_fails_says_why(slow: AwaitedDatabases) -> None:
    slow.rival("ALTER TABLE item ADD COLUMN other TEXT REFERENCES item DEFERRABLE INITIALLY DEFERRED")
    is_committing = asyncio.Event()

    async def linger() -> None:
        is_committing.set()
        await asyncio.sleep(0.3)

    async def unit() -> None:
        async with slow.container.transaction() as unit:
            unit.before_commit(linger)
            await slow.say("INSERT INTO item (name, amount, other) VALUES ('a', 0, 'nowhere')")

    task = asyncio.create_task(unit())
    await is_committing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    causes: list[str] = []
    error: BaseException | None = cancelled.value
    while error is not None:
        causes.append(type(error).__name__)
        error = error.__context__
    assert "IntegrityError" in causes
    assert slow.items() == []


async def test_a_cancelled_rollback_is_finished_first(postgres: PostgresServer, postgres_url: str) -> None:
    async with opened_awaited(postgres_url, "asyncpg") as databases:

        async def unit() -> None:
            async with databases.container.transaction() as unit:
                unit.on_abort(asyncio.sleep, 0.3)
                await databases.write("a")
                raise Boom

        task = asyncio.create_task(unit())
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        assert databases.in_use() == 0
        assert postgres.open_transactions(database_name(postgres_url)) == []
        assert databases.items() == []


# ---- in the middle of the rest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_cancelled_statement_aborts_its_unit(
    request: pytest.FixtureRequest, postgres: PostgresServer, driver: str
) -> None:
    url = url_for(driver, request) + ("?timeout=60" if driver == "aiosqlite" else "")  # its thread goes on for a while
    async with opened_awaited(url, driver, each={"pool": {"size": 1, "max_overflow": 0}}) as databases:
        long = LONG if driver == "aiosqlite" else "SELECT pg_sleep(10)"

        async def unit() -> None:
            async with databases.container.transaction():
                await databases.write("a")
                await databases.say(long)

        began = time.monotonic()
        task = asyncio.create_task(unit())
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert databases.in_use() == 0
        assert time.monotonic() - began < 5
        async with databases.container.transaction():
            await databases.write("next")
        assert databases.items() == ["next"]
        if driver != "aiosqlite":
            assert postgres.open_transactions(database_name(url), within=2.0) == []


async def test_a_cancelled_statement_of_sqlite_leaves_no_lock(request: pytest.FixtureRequest) -> None:
    async with opened_awaited(url_for("aiosqlite", request) + "?timeout=3", "aiosqlite") as databases:
        gc.disable()  # it would free the statement, and with it the lock
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2), databases.container.transaction():
                    await databases.write("lost")
                    await databases.say(LONG)
            async with databases.container.transaction():
                await databases.write("kept")
        finally:
            gc.enable()
        assert databases.items() == ["kept"]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_whoever_waits_for_a_connection_can_be_cancelled(request: pytest.FixtureRequest, driver: str) -> None:
    async with opened_awaited(url_for(driver, request), driver, each={"pool": {"size": 1, "max_overflow": 0}}) as databases:

        async def waits() -> None:
            async with databases.container.transaction(propagation="requires_new"):
                await databases.write("b")

        async with databases.container.transaction():
            await databases.write("a")
            task = asyncio.create_task(waits())
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with databases.container.transaction():
            await databases.write("c")
        assert databases.items() == ["a", "c"]


@pytest.mark.parametrize("options", [{"timeout": 0.5}, {"propagation": "nested"}], ids=["timeout", "nested"])
def test_a_part_that_is_cancelled_as_it_begins_leaves_nothing_in_the_unit(postgres_url: str, options: dict[str, Any]) -> None:
    with opened_awaited(postgres_url, "asyncpg") as databases:

        async def main() -> None:
            async with databases.container.transaction():
                await databases.write("a")
                current: Any = asyncio.current_task()
                asyncio.get_running_loop().call_soon(current.cancel)
                with pytest.raises(asyncio.CancelledError):
                    async with databases.container.transaction(**options):
                        pytest.fail("entered")
                current.uncancel()
                work: Any = databases.container.core.coordinator().get()
                assert not work.timed
                assert work.last_savepoint() is None
                await databases.write("b")

        if "timeout" in options:
            with pytest.raises(UnitOfWorkDoomed):  # as by any part that fails
                databases.in_a_loop(main)
            assert databases.items() == []
        else:
            databases.in_a_loop(main)
            assert databases.items() == ["a", "b"]


# ---- anyio ------------------------------------------------------------------------------------------------------------


async def test_a_cancelled_scope_of_anyio_waits_for_the_commit_and_does_not_spin(slow: AwaitedDatabases) -> None:
    """Without a shield anyio cancels anew each time the loop comes around: some 100 000 times in half a second."""
    hooks: list[str] = []
    rounds = 0
    loop: Any = asyncio.get_running_loop()
    run_once = loop._run_once

    def count() -> None:
        nonlocal rounds
        rounds += 1
        run_once()

    with anyio.CancelScope() as scope:
        async with slow.container.transaction() as unit:
            unit.on_commit(hooks.append, "committed")
            await slow.write("a")
            loop._run_once = count
            loop.call_later(0.1, scope.cancel)
        await anyio.sleep(5)
    del loop._run_once
    assert scope.cancelled_caught
    assert slow.items() == ["a"]
    assert slow.in_use() == 0
    assert hooks == ["committed"]
    assert rounds < 1000


async def test_a_scope_of_anyio_that_is_cancelled_before_the_end_aborts(slow: AwaitedDatabases) -> None:
    hooks: list[str] = []
    with anyio.CancelScope() as scope:
        async with slow.container.transaction() as unit:
            unit.on_abort(hooks.append, "aborted")
            await slow.write("a")
            scope.cancel()
            await anyio.sleep(5)
    assert scope.cancelled_caught
    assert slow.in_use() == 0
    with pytest.raises(NoUnitOfWork):
        slow.container.unit()
    assert hooks == ["aborted"]
    assert slow.items() == []


async def test_a_task_group_of_anyio_that_fails_waits_for_the_commits_of_its_tasks(slow: AwaitedDatabases) -> None:
    written = anyio.Event()

    async def unit() -> None:
        async with slow.container.transaction():
            await slow.write("a")
            written.set()

    async def fail() -> None:
        await written.wait()
        await anyio.sleep(0.1)  # the unit commits by now
        raise Boom

    with pytest.raises(ExceptionGroup):
        async with anyio.create_task_group() as group:
            group.start_soon(unit)
            group.start_soon(fail)
    assert slow.items() == ["a"]


async def test_hooks_are_not_cancelled_by_a_scope_of_anyio(slow: AwaitedDatabases) -> None:
    ran: list[str] = []
    scopes: list[anyio.CancelScope] = []

    async def hook() -> None:
        scopes[0].cancel()
        await anyio.sleep(0.05)
        async with slow.container.transaction():
            await slow.say("SELECT 1")
        ran.append("ran")

    with anyio.CancelScope() as scope:
        scopes.append(scope)
        async with slow.container.transaction() as unit:
            unit.on_commit(hook)
            await slow.write("a")
        await anyio.sleep(5)
    assert scope.cancelled_caught
    assert ran == ["ran"]
    assert slow.items() == ["a"]


# ---- hand-over --------------------------------------------------------------------------------------------------------


def test_a_thread_that_works_on_for_a_unit_that_was_cancelled_leaves_nothing_open(
    postgres: PostgresServer, postgres_url: str
) -> None:
    with opened_awaited(postgres_url, "asyncpg", each={"pool": POOL}) as databases:

        def work(session: Any) -> None:
            for _ in range(20):
                session.execute(text("SELECT pg_sleep(0.05)"))

        async def unit() -> None:
            async with databases.container.transaction():
                await databases.write("a")
                await asyncio.to_thread(work, databases.session())

        async def main() -> None:
            for _ in range(3):
                task = asyncio.create_task(unit())
                await asyncio.sleep(0.15)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        databases.in_a_loop(main)
        assert postgres.open_transactions(database_name(postgres_url), within=2.0) == []
        assert databases.items() == []
