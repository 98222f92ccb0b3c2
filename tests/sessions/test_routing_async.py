"""Coroutines have a session that finds its database, too: the same one, awaited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import selectinload

from app_db import errors
from app_db.asyncio import AsyncRoutingSession
from harness.items import checked_out
from harness.routed import Fact, Item, Part, RoutedApplication, routed

NewUrl = Callable[[], str]

DRIVERS = {
    "aiosqlite": "new_sqlite_url",
    "psycopg": "new_postgres_url",
    "asyncpg": "new_postgres_url",
    "asyncmy": "new_mariadb_url",
}


@pytest.fixture(params=DRIVERS)
def new_url(request: pytest.FixtureRequest) -> NewUrl:
    """URLs of databases that coroutines reach by each driver."""
    new: NewUrl = request.getfixturevalue(DRIVERS[request.param])
    if request.param == "asyncpg":
        return lambda: new().replace("+psycopg", "+asyncpg")
    return new


class AsyncApplication:
    """An application, as coroutines use it."""

    def __init__(self, app: RoutedApplication) -> None:
        self.app = app

    @property
    def session(self) -> AsyncRoutingSession:
        return self.app.container.async_session()

    def unit(self, **options: Any) -> Any:
        return self.app.unit(**options)


Use = Callable[[AsyncApplication], Coroutine[Any, Any, None]]


@asynccontextmanager
async def awaited(app: RoutedApplication) -> AsyncIterator[AsyncApplication]:
    try:
        yield AsyncApplication(app)
        engines = [getattr(app.container, f"{name}_async_engine")().sync_engine for name in app.connections]
        assert sum(checked_out(engines)) == 0, "a connection was not returned to its pool"
    finally:
        await app.container.shutdown_resources()


def run(use: Use, new_url: NewUrl, *, two_phase: bool = False, **options: Any) -> tuple[list[str], list[str]]:
    """Let a coroutine use an application that has a replica of its own; return what is then in writer and warehouse."""
    replica = {"url": new_url(), "read_only": True}

    async def main(app: RoutedApplication) -> None:
        async with awaited(app) as application:
            await use(application)

    writable = {name: {"url": new_url(), "two_phase": two_phase} for name in ("writer", "warehouse")}
    with routed({**writable, "reader": replica}, **options) as app:
        app.put("primary")
        app.put("replica", on="reader")
        asyncio.run(main(app))
        return app.names(), app.names("warehouse")


def test_statements_find_their_databases(new_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        async with app.unit():
            session = app.session
            assert (await session.scalars(select(Item.name))).all() == ["replica"]
            assert (await session.scalars(text("SELECT name FROM items"))).all() == ["primary"]
            with session.using("writer"):
                assert (await session.scalars(select(Item.name))).all() == ["primary"]
            session.add_all([Item(name="a"), Fact(name="a")])
            assert set(await session.scalars(select(Item.name))) == {"a", "primary"}
            assert (await session.scalars(select(Fact.name))).all() == ["a"]
            (await session.get_one(Item, 1)).amount = 5
        async with app.unit():
            await app.session.execute(update(Item).where(Item.amount == 5).values(name="b"))
        async with app.unit(read_only=True):
            assert (await app.session.scalars(text("SELECT name FROM items"))).all() == ["replica"]

    assert run(use, new_url) == (["a", "b"], ["a"])


def test_objects_load_what_they_refer_to(new_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        async with app.unit():
            app.session.add(Item(name="a", parts=[Part(name="p"), Part(name="q")]))
        async with app.unit():
            session = app.session
            with session.using("writer"):
                item = (await session.scalars(select(Item).where(Item.name == "a"))).one()
                assert [part.name for part in await item.awaitable_attrs.parts] == ["p", "q"]
            session.expire(item)
            await session.execute(update(Part).values(name="r"))
            await session.refresh(item, ["parts"])
            assert await session.run_sync(lambda _: [part.name for part in item.parts]) == ["r", "r"]
            eager = select(Item).options(selectinload(Item.parts)).execution_options(populate_existing=True)
            assert [len(item.parts) for item in await session.scalars(eager.order_by(Item.id))] == [0, 2]

    assert run(use, new_url) == (["a", "primary"], [])


def test_rows_are_streamed(new_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        async with app.unit():
            await app.session.execute(insert(Fact), [{"name": f"{number:03}"} for number in range(50)])
        async with app.unit():
            result = await app.session.stream_scalars(select(Fact.name).order_by(Fact.name).execution_options(yield_per=10))
            assert [name async for name in result] == [f"{number:03}" for number in range(50)]
            assert [name async for name in await app.session.stream_scalars(select(Item.name))] == ["replica"]

    assert len(run(use, new_url)[1]) == 50


def test_savepoints_undo_what_was_done_since(new_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        async with app.unit():
            app.session.add(Item(name="a"))
            with pytest.raises(ValueError, match="own"):
                async with app.unit(propagation="nested"):
                    app.session.add_all([Item(name="b"), Fact(name="b")])
                    await app.session.flush()
                    raise ValueError("the application's own")
            with pytest.raises(IntegrityError):
                async with app.session.begin_nested():
                    app.session.add(Item(name="primary"))
            async with app.session.begin_nested():
                app.session.add_all([Item(name="c"), Fact(name="c")])

    assert run(use, new_url) == (["a", "c", "primary"], ["c"])


def test_a_unit_that_raises_leaves_nothing(new_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        with pytest.raises(ValueError, match="own"):
            async with app.unit():
                app.session.add_all([Item(name="b"), Fact(name="b")])
                await app.session.flush()
                raise ValueError("the application's own")
        with pytest.raises(errors.TransactionLost):
            async with app.unit():
                app.session.add(Item(name="primary"))
                with pytest.raises(IntegrityError):
                    await app.session.flush()

    assert run(use, new_url) == (["primary"], [])


@pytest.mark.parametrize("new_url", ["psycopg", "asyncpg", "asyncmy"], indirect=True)
def test_databases_that_can_prepare_commit_together(new_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        async with app.unit():
            app.session.add_all([Item(name="a"), Fact(name="a")])

    assert run(use, new_url, two_phase=True, atomicity="strict") == (["a", "primary"], ["a"])


def test_databases_that_cannot_commit_together_are_refused(new_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        with pytest.raises(errors.NotAtomic):
            async with app.unit():
                app.session.add_all([Item(name="a"), Fact(name="a")])

    assert run(use, new_url, atomicity="strict") == (["primary"], [])


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
def test_what_the_unit_does_the_session_refuses(method: str, new_sqlite_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        async with app.unit():
            app.session.add(Item(name="a"))
            with pytest.raises(errors.SessionIsManaged):
                await getattr(app.session, method)()

    assert run(use, new_sqlite_url) == (["a", "primary"], [])


def test_another_task_is_refused(new_sqlite_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        async with app.unit():
            session = app.session

            async def elsewhere() -> None:
                with pytest.raises(errors.ForeignUnitOfWork):
                    await session.scalars(select(Item))
                with pytest.raises(errors.ForeignUnitOfWork):
                    session.add(Item(name="b"))

            await asyncio.create_task(elsewhere())

    assert run(use, new_sqlite_url) == (["primary"], [])


def test_a_plain_unit_has_no_session_for_coroutines(new_sqlite_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        with app.unit(), pytest.raises(errors.AwaitRequired):
            app.session.add(Item(name="a"))
        with pytest.raises(errors.NoUnitOfWork):
            app.session.add(Item(name="a"))

    assert run(use, new_sqlite_url) == (["primary"], [])


def test_threads_of_a_coroutines_unit_use_the_session_of_threads(new_postgres_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        flushed_by: list[int] = []

        def write() -> None:
            assert app.app.session.scalars(select(Fact.name)).all() == []
            app.app.session.add(Item(name="by a thread"))
            event.listen(app.app.session, "before_flush", lambda *_: flushed_by.append(threading.get_ident()))

        async with app.unit():
            await asyncio.to_thread(write)
        assert flushed_by
        assert threading.get_ident() not in flushed_by, "the event loop had to wait for a database"
        async with app.unit():
            await asyncio.to_thread(write_more, app.app)
            with pytest.raises(ValueError, match="own"):
                async with app.unit(propagation="nested"):
                    await asyncio.to_thread(lambda: app.app.session.add(Item(name="c")))
                    await asyncio.to_thread(app.app.session.flush)
                    raise ValueError("the application's own")

    def write_more(app: RoutedApplication) -> None:
        app.session.add(Fact(name="b"))

    assert run(use, new_postgres_url) == (["by a thread", "primary"], ["b"])


def test_a_savepoint_has_to_be_awaited_even_if_nothing_was_sent_yet(new_sqlite_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        async with app.unit() as unit:
            app.session.add(Item(name="a"))
            with pytest.raises(errors.AwaitRequired):
                unit.savepoint()

    assert run(use, new_sqlite_url) == (["a", "primary"], [])


def test_a_cancelled_unit_leaves_nothing(new_url: NewUrl) -> None:
    async def use(app: AsyncApplication) -> None:
        begun = asyncio.Event()

        async def work() -> None:
            async with app.unit():
                app.session.add(Item(name="a"))
                await app.session.flush()
                begun.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(work())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert run(use, new_url) == (["primary"], [])
