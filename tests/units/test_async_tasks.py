"""Units of work and the tasks of an event loop: who may use which, and what each way to start something sees."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import transaction as zope
from sqlalchemy import text

from app_db.errors import ForeignUnitOfWork, InvalidUse, NoUnitOfWork, UnitOfWorkEnded
from harness.applications import Boom
from harness.coroutines import DRIVERS, AwaitedDatabases, opened_awaited, url_for
from harness.items import Item, database_name
from harness.servers import PostgresServer


@pytest.fixture(params=DRIVERS)
def databases(request: pytest.FixtureRequest) -> Iterator[AwaitedDatabases]:
    with opened_awaited(url_for(request.param, request), request.param) as databases:
        yield databases


@pytest.fixture
def one(postgres_url: str) -> Iterator[AwaitedDatabases]:
    """One driver's, where drivers make no difference."""
    with opened_awaited(postgres_url, "asyncpg") as databases:
        yield databases


async def see(databases: AwaitedDatabases) -> str:
    """What some code sees of units of work: "the unit", "refused", "ended" or "none"."""
    try:
        databases.container.unit()
        await databases.say("SELECT 1")
    except ForeignUnitOfWork:
        return "refused"
    except UnitOfWorkEnded:
        return "ended"
    except NoUnitOfWork:
        return "none"
    return "the unit"


def see_blocking(databases: AwaitedDatabases) -> str:
    try:
        databases.container.unit()
        databases.session().execute(text("SELECT 1"))
    except ForeignUnitOfWork:
        return "refused"
    except UnitOfWorkEnded:
        return "ended"
    except NoUnitOfWork:
        return "none"
    return "the unit"


# ---- what each way to start something sees ----------------------------------------------------------------------------


async def test_an_awaited_coroutine_sees_its_callers_unit(databases: AwaitedDatabases) -> None:
    assert await see(databases) == "none"
    async with databases.container.transaction():
        assert await see(databases) == "the unit"
    assert await see(databases) == "none"


async def test_create_task_is_refused_by_name(databases: AwaitedDatabases) -> None:
    async def child() -> None:
        for use in (databases.awaited_session, databases.container.unit, databases.session):
            with pytest.raises(ForeignUnitOfWork, match="task 'the child'") as refused:
                use()
            assert refused.value.owner == "task 'the parent'"
            assert refused.value.user == "task 'the child'"
        with pytest.raises(ForeignUnitOfWork, match="task 'the parent'"):
            await session.execute(text("SELECT 1"))
        with pytest.raises(ForeignUnitOfWork):
            session.add(Item(name="theirs"))

    current: Any = asyncio.current_task()
    current.set_name("the parent")
    async with databases.container.transaction():
        session = databases.awaited_session()
        await databases.write("a")
        await asyncio.create_task(child(), name="the child")
        await databases.write("b")
    assert databases.items() == ["a", "b"]


async def test_gather_is_refused(one: AwaitedDatabases) -> None:
    async with one.container.transaction():
        assert list(await asyncio.gather(see(one), see(one))) == ["refused"] * 2
        assert await see(one) == "the unit"


async def test_a_task_group_is_refused(one: AwaitedDatabases) -> None:
    async with one.container.transaction():
        async with asyncio.TaskGroup() as group:
            task = group.create_task(see(one))
        assert task.result() == "refused"
        assert await see(one) == "the unit"


async def test_shield_is_refused(one: AwaitedDatabases) -> None:
    async with one.container.transaction():
        assert await asyncio.shield(see(one)) == "refused"


async def test_wait_for_sees_the_unit_since_python_312(one: AwaitedDatabases) -> None:
    """Before that it starts a task."""
    async with one.container.transaction():
        expected = "the unit" if sys.version_info >= (3, 12) else "refused"
        assert await asyncio.wait_for(see(one), 5) == expected


async def test_timeout_sees_the_unit(databases: AwaitedDatabases) -> None:
    async with databases.container.transaction():
        async with asyncio.timeout(5):
            assert await see(databases) == "the unit"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), databases.container.transaction():
            await databases.write("a")
            await asyncio.sleep(5)
    assert await see(databases) == "none"
    assert databases.in_use() == 0
    assert databases.items() == []


async def test_to_thread_sees_the_unit(databases: AwaitedDatabases) -> None:
    async with databases.container.transaction():
        session = databases.session()
        assert await asyncio.to_thread(see_blocking, databases) == "the unit"
        assert await asyncio.to_thread(databases.session) is session
    assert await asyncio.to_thread(see_blocking, databases) == "none"


async def test_run_in_executor_sees_none(one: AwaitedDatabases) -> None:
    async with one.container.transaction():
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, see_blocking, one) == "none"
        context = contextvars.copy_context()
        assert await loop.run_in_executor(None, context.run, see_blocking, one) == "the unit"


async def test_callbacks_of_the_loop_are_refused(one: AwaitedDatabases) -> None:
    """They run in a copy of the context, and in no task."""
    seen: list[str] = []
    async with one.container.transaction():
        asyncio.get_running_loop().call_soon(lambda: seen.append(see_blocking(one)))
        await asyncio.sleep(0.01)
    assert seen == ["refused"]


async def test_an_async_generator_sees_the_unit_of_whoever_iterates(databases: AwaitedDatabases) -> None:
    async def seen() -> AsyncIterator[str]:
        yield await see(databases)
        yield await see(databases)

    async with databases.container.transaction():
        assert [what async for what in seen()] == ["the unit"] * 2
    generator: Any = seen()
    assert await anext(generator) == "none"
    async with databases.container.transaction():
        assert await anext(generator) == "the unit"
    await generator.aclose()


async def test_an_async_context_manager_may_hold_the_unit(databases: AwaitedDatabases) -> None:
    @asynccontextmanager
    async def unit(number: int) -> AsyncIterator[None]:
        async with databases.container.transaction():
            await databases.write(f"first {number}")
            yield
            await databases.write(f"last {number}")

    async with unit(1):
        await databases.write("inside")
    assert await see(databases) == "none"
    with pytest.raises(Boom):
        async with unit(2):
            raise Boom
    assert databases.items() == ["first 1", "inside", "last 1"]


async def test_anyios_task_group_is_refused(one: AwaitedDatabases) -> None:
    seen = []

    async def child() -> None:
        seen.append(await see(one))

    async with one.container.transaction():
        async with anyio.create_task_group() as group:
            group.start_soon(child)
        seen.append(await see(one))
    assert seen == ["refused", "the unit"]


async def test_anyios_threads_see_the_unit_and_so_does_the_loop_from_there(one: AwaitedDatabases) -> None:
    async with one.container.transaction():
        assert await anyio.to_thread.run_sync(see_blocking, one) == "the unit"
        assert await anyio.to_thread.run_sync(lambda: anyio.from_thread.run(see, one)) == "refused"  # a task of its own
    assert await see(one) == "none"


async def test_anyios_cancel_scope_sees_the_unit(one: AwaitedDatabases) -> None:
    with anyio.move_on_after(0.05) as scope:
        async with one.container.transaction():
            assert await see(one) == "the unit"
            await one.write("a")
            await anyio.sleep(5)
    assert scope.cancelled_caught
    assert await see(one) == "none"
    assert one.items() == []


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks before Python 3.12")
async def test_an_eager_task_is_a_task_like_others(databases: AwaitedDatabases) -> None:
    loop: Any = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]

    async def own() -> str:
        async with databases.container.transaction():
            await databases.write("own")
            async with databases.container.transaction(propagation="nested"):
                await databases.write("nested")
        return await see(databases)

    async def at_once() -> str:
        with pytest.raises(ForeignUnitOfWork):
            databases.container.unit()
        return "refused"

    async with databases.container.transaction():
        seen = asyncio.create_task(at_once())
        assert seen.done()
        assert list(await asyncio.gather(see(databases), see(databases))) == ["refused"] * 2
        assert await see(databases) == "the unit"
    assert await asyncio.create_task(own()) == "none"
    assert await see(databases) == "none"
    assert databases.items() == ["nested", "own"]


async def test_greenlet_spawn_sees_the_unit(one: AwaitedDatabases) -> None:
    """So `session.run_sync()` works as ever."""
    async with one.container.transaction():
        session = one.awaited_session()

        def blocking(sync_session: Any) -> None:
            assert one.container.unit().transaction is not None
            sync_session.add(Item(name="a"))
            sync_session.flush()
            with one.container.transaction(propagation="nested"):
                sync_session.add(Item(name="b"))

        await session.run_sync(blocking)
    assert one.items() == ["a", "b"]


# ---- units of their own -----------------------------------------------------------------------------------------------


async def test_a_task_that_inherited_an_open_unit_may_not_begin_one_of_its_own_without_a_word(one: AwaitedDatabases) -> None:
    async def child(name: str) -> None:
        with pytest.raises(ForeignUnitOfWork, match=r"(?s)Await the coroutine.*requires_new.*unit\.adopt"):
            async with one.container.transaction():
                await one.write(name)
        async with one.container.transaction(propagation="requires_new"):
            await one.write(name)
        assert await see(one) == "refused"

    with pytest.raises(Boom):
        async with one.container.transaction():
            await one.write("parent")
            async with asyncio.TaskGroup() as group:
                for number in range(3):
                    group.create_task(child(f"child {number}"))
            await one.write("parent again")
            raise Boom
    assert one.items() == ["child 0", "child 1", "child 2"]


async def test_a_child_that_outlives_its_parents_unit_is_told_so(databases: AwaitedDatabases) -> None:
    go_on = asyncio.Event()

    async def child() -> None:
        await go_on.wait()
        assert await see(databases) == "ended"
        with pytest.raises(UnitOfWorkEnded):
            session.add(Item(name="late"))
        with pytest.raises(UnitOfWorkEnded):
            await session.execute(text("SELECT 1"))
        async with databases.container.transaction():
            await databases.write("own")

    async with databases.container.transaction():
        session = databases.awaited_session()
        await databases.write("a")
        outliving = asyncio.create_task(child())
        await asyncio.sleep(0)
    go_on.set()
    await outliving
    assert databases.items() == ["a", "own"]


async def test_what_was_set_in_a_hook_is_set_in_its_block(one: AwaitedDatabases) -> None:
    """A unit ends in a task of its own, which nobody should notice."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    async def hook() -> None:
        assert variable.get() == "by the block"
        variable.set("by the hook")

    async with one.container.transaction() as unit:
        variable.set("by the block")
        unit.before_commit(hook)
    assert variable.get() == "by the hook"


async def test_a_context_is_free_of_units_that_ended(databases: AwaitedDatabases) -> None:
    manager = databases.container.transaction_manager()
    for ending in (None, Boom):
        try:
            async with databases.container.transaction():
                async with databases.container.transaction(propagation="requires_new"):
                    pass
                async with databases.container.transaction(propagation="nested"):
                    await databases.write(f"{ending}")
                if ending is not None:
                    raise ending
        except Boom:
            pass
        assert manager._current.get() is None
    assert not any(type(value).__name__ == "AwaitedTransaction" for value in contextvars.copy_context().values())


# ---- blocks that end elsewhere ----------------------------------------------------------------------------------------


async def test_a_block_that_ends_in_another_task_is_aborted_and_says_so(databases: AwaitedDatabases) -> None:
    block = databases.container.transaction()
    await block.__aenter__()
    await databases.write("a")

    async def leave() -> None:
        with pytest.raises(ForeignUnitOfWork):
            await block.__aexit__(None, None, None)

    await asyncio.create_task(leave())
    assert databases.in_use() == 0
    async with databases.container.transaction():
        await databases.write("next")
    assert databases.items() == ["next"]


async def test_an_async_generator_that_is_left_early_ends_its_unit(databases: AwaitedDatabases) -> None:
    """asyncio closes it in a task of its own."""

    async def numbers() -> AsyncIterator[int]:
        async with databases.container.transaction():
            await databases.write("abandoned")
            yield 1

    async for _ in numbers():
        break
    gc.collect()
    for _ in range(100):
        if not databases.in_use():
            break
        await asyncio.sleep(0.01)
    assert databases.in_use() == 0
    async with databases.container.transaction():
        await databases.write("next")
    assert databases.items() == ["next"]


async def test_an_async_generator_that_is_closed_ends_its_unit(databases: AwaitedDatabases) -> None:
    async def numbers() -> AsyncIterator[int]:
        async with databases.container.transaction():
            await databases.write("closed")
            yield 1

    generator: Any = numbers()
    assert await anext(generator) == 1
    await generator.aclose()
    assert databases.in_use() == 0
    assert await see(databases) == "none"
    assert databases.items() == []


def test_a_generator_left_to_the_end_of_its_loop_ends_its_unit(postgres: PostgresServer, postgres_url: str) -> None:
    with opened_awaited(postgres_url, "asyncpg") as databases:
        kept: list[Any] = []

        async def numbers() -> AsyncIterator[int]:
            async with databases.container.transaction():
                await databases.write("abandoned")
                yield 1

        async def main() -> None:
            generator = numbers()
            kept.append(generator)
            assert await anext(generator) == 1

        async def ended() -> None:
            await main()

        async def dispose() -> None:
            await databases.awaited_engine().dispose()

        with asyncio.Runner() as runner:
            runner.run(ended())
            runner.get_loop().run_until_complete(runner.get_loop().shutdown_asyncgens())
            assert postgres.open_transactions(database_name(postgres_url), within=1.0) == []
            runner.run(dispose())
        assert databases.items() == []


async def test_a_coroutine_that_is_closed_ends_its_unit(postgres: PostgresServer, postgres_url: str) -> None:
    """It can't wait for that, so the connection is closed instead of being rolled back."""
    async with opened_awaited(postgres_url, "asyncpg") as databases:

        async def work() -> None:
            async with databases.container.transaction():
                await databases.write("closed")
                await asyncio.sleep(60)

        loop = asyncio.get_running_loop()
        steps = work()

        def step() -> None:  # outside of any task, as a framework may drive a coroutine
            steps.send(None)

        task = loop.create_task(work())
        await asyncio.sleep(0.2)
        coroutine: Any = task.get_coro()
        steps.close()
        coroutine.close()
        for _ in range(100):
            if not databases.in_use():
                break
            await asyncio.sleep(0.01)
        assert databases.in_use() == 0
        task.cancel()
        await asyncio.wait((task,))
        assert postgres.open_transactions(database_name(postgres_url), within=1.0) == []
        assert databases.items() == []


# ---- adopting ---------------------------------------------------------------------------------------------------------


async def test_a_fixture_may_hand_its_unit_to_the_test(databases: AwaitedDatabases) -> None:
    """As a fixture that is set up in one task, for a test in another, and ends in a third."""
    block = databases.container.transaction()

    async def set_up() -> Any:
        unit = await block.__aenter__()
        await databases.write("fixture")
        return unit

    async def test(unit: Any) -> None:
        assert await see(databases) == "none"
        unit.adopt()
        await databases.write("test")
        assert await see(databases) == "the unit"
        async with databases.container.transaction(propagation="nested"):
            await databases.write("nested")

    async def tear_down(unit: Any) -> None:
        unit.adopt()
        await block.__aexit__(None, None, None)
        assert await see(databases) == "none"

    unit = await asyncio.create_task(set_up())
    await asyncio.create_task(test(unit))
    await asyncio.create_task(tear_down(unit))
    with pytest.raises(UnitOfWorkEnded):
        unit.adopt()
    assert databases.items() == ["fixture", "nested", "test"]


async def test_whoever_lost_its_unit_to_another_task_is_refused(one: AwaitedDatabases) -> None:
    async with one.container.transaction() as unit:
        await one.write("a")

        async def borrow() -> None:
            unit.adopt()
            await one.write("b")

        await asyncio.create_task(borrow(), name="the new owner")
        with pytest.raises(ForeignUnitOfWork, match="the new owner"):
            await one.write("c")
        unit.adopt()
        await one.write("d")
    assert one.items() == ["a", "b", "d"]


def test_a_unit_of_another_manager_cannot_be_adopted(sqlite_url: str) -> None:
    with (
        opened_awaited(sqlite_url, "aiosqlite", manager=zope.TransactionManager(explicit=True)) as databases,
        databases.container.transaction() as unit,
        pytest.raises(InvalidUse, match="no other manager"),
    ):
        unit.adopt()


def test_a_unit_begun_before_the_loop_has_no_sessions_for_coroutines_in_it(one: AwaitedDatabases) -> None:
    async def main() -> str:
        one.add("in the loop")
        return await asyncio.create_task(see(one))

    with one.container.transaction():
        assert asyncio.run(main()) == "refused"
        one.add("after the loop")
    assert one.items() == ["after the loop", "in the loop"]


async def test_finishing_does_not_queue_behind_the_applications_own_threads(postgres_url: str) -> None:
    """They may be waiting for what the unit that ends holds."""
    async with opened_awaited(postgres_url, "asyncpg", each={"pool": {"size": 50}}) as databases:
        databases.put("a")
        waiting = threading.Semaphore(0)

        def update() -> None:
            with databases.container.transaction():
                waiting.release()
                databases.session().execute(text("UPDATE item SET amount = amount + 1"))

        async with asyncio.timeout(20):
            async with databases.container.transaction():
                databases.session().execute(text("UPDATE item SET amount = amount + 1"))
                loop = asyncio.get_running_loop()
                updates = [loop.run_in_executor(None, contextvars.Context().run, update) for _ in range(40)]
                await loop.run_in_executor(ThreadPoolExecutor(1), waiting.acquire)
                await asyncio.sleep(0.3)
            await asyncio.gather(*updates)
        assert databases.amount("a") == 41
