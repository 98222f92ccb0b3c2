"""Coroutines have a session that finds its database, too: the same one, awaited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import selectinload

from app_db import errors
from app_db.asyncio import AsyncRoutingSession
from harness.applications import Atomicity
from harness.coroutines import Awaited
from harness.routed import Fact, Item, Part, RoutedApplication

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


class AwaitedApplication(Awaited, RoutedApplication):
    """An application with a replica of its own, as coroutines use it."""

    @property
    def awaited(self) -> AsyncRoutingSession:
        """The session of the unit that is under way."""
        return self.container.async_session()

    def written(self) -> tuple[list[str], list[str]]:
        """What is committed in the writer and in the warehouse."""
        return self.names(), self.names("warehouse")


def awaiting(new_url: NewUrl, *, two_phase: bool = False, atomicity: Atomicity = "best_effort") -> AwaitedApplication:
    connections: dict[str, Any] = {name: {"url": new_url(), "two_phase": two_phase} for name in ("writer", "warehouse")}
    app = AwaitedApplication({**connections, "reader": {"url": new_url(), "read_only": True}}, atomicity)
    app.put("primary")
    app.put("replica", on="reader")
    return app


@pytest.fixture
def app(new_url: NewUrl) -> Iterator[AwaitedApplication]:
    with awaiting(new_url) as app:
        yield app


@pytest.fixture
def lite(new_sqlite_url: NewUrl) -> Iterator[AwaitedApplication]:
    """An application on SQLite."""
    with awaiting(new_sqlite_url) as app:
        yield app


async def test_statements_find_their_databases(app: AwaitedApplication) -> None:
    async with app.unit():
        session = app.awaited
        assert (await session.scalars(select(Item.name))).all() == ["replica"]
        assert (await session.scalars(text("SELECT name FROM items"))).all() == ["primary"]
        with session.using("writer"):
            assert (await session.scalars(select(Item.name))).all() == ["primary"]
        session.add_all([Item(name="a"), Fact(name="a")])
        assert set(await session.scalars(select(Item.name))) == {"a", "primary"}
        assert (await session.scalars(select(Fact.name))).all() == ["a"]
        (await session.get_one(Item, 1)).amount = 5
    async with app.unit():
        await app.awaited.execute(update(Item).where(Item.amount == 5).values(name="b"))
    async with app.unit(read_only=True):
        assert (await app.awaited.scalars(text("SELECT name FROM items"))).all() == ["replica"]
    assert app.written() == (["a", "b"], ["a"])


async def test_objects_load_what_they_refer_to(app: AwaitedApplication) -> None:
    async with app.unit():
        app.awaited.add(Item(name="a", parts=[Part(name="p"), Part(name="q")]))
    async with app.unit():
        session = app.awaited
        with session.using("writer"):
            item = (await session.scalars(select(Item).where(Item.name == "a"))).one()
            assert [part.name for part in await item.awaitable_attrs.parts] == ["p", "q"]
        session.expire(item)
        await session.execute(update(Part).values(name="r"))
        await session.refresh(item, ["parts"])
        assert await session.run_sync(lambda _: [part.name for part in item.parts]) == ["r", "r"]
        eager = select(Item).options(selectinload(Item.parts)).execution_options(populate_existing=True)
        assert [len(item.parts) for item in await session.scalars(eager.order_by(Item.id))] == [0, 2]
    assert app.written() == (["a", "primary"], [])


async def test_rows_are_streamed(app: AwaitedApplication) -> None:
    async with app.unit():
        await app.awaited.execute(insert(Fact), [{"name": f"{number:03}"} for number in range(50)])
    async with app.unit():
        result = await app.awaited.stream_scalars(select(Fact.name).order_by(Fact.name).execution_options(yield_per=10))
        assert [name async for name in result] == [f"{number:03}" for number in range(50)]
        assert [name async for name in await app.awaited.stream_scalars(select(Item.name))] == ["replica"]
    assert len(app.written()[1]) == 50


async def test_savepoints_undo_what_was_done_since(app: AwaitedApplication) -> None:
    async with app.unit():
        app.awaited.add(Item(name="a"))
        with pytest.raises(ValueError, match="own"):
            async with app.unit(propagation="nested"):
                app.awaited.add_all([Item(name="b"), Fact(name="b")])
                await app.awaited.flush()
                raise ValueError("the application's own")
        with pytest.raises(IntegrityError):
            async with app.awaited.begin_nested():
                app.awaited.add(Item(name="primary"))
        async with app.awaited.begin_nested():
            app.awaited.add_all([Item(name="c"), Fact(name="c")])
    assert app.written() == (["a", "c", "primary"], ["c"])


async def test_a_unit_that_raises_leaves_nothing(app: AwaitedApplication) -> None:
    with pytest.raises(ValueError, match="own"):
        async with app.unit():
            app.awaited.add_all([Item(name="b"), Fact(name="b")])
            await app.awaited.flush()
            raise ValueError("the application's own")
    with pytest.raises(errors.TransactionLost):
        async with app.unit():
            app.awaited.add(Item(name="primary"))
            with pytest.raises(IntegrityError):
                await app.awaited.flush()
    assert app.written() == (["primary"], [])


@pytest.mark.parametrize("new_url", ["psycopg", "asyncpg", "asyncmy"], indirect=True)
async def test_databases_that_can_prepare_commit_together(new_url: NewUrl) -> None:
    async with awaiting(new_url, two_phase=True, atomicity="strict") as app:
        async with app.unit():
            app.awaited.add_all([Item(name="a"), Fact(name="a")])
        assert app.written() == (["a", "primary"], ["a"])


async def test_databases_that_cannot_commit_together_are_refused(new_url: NewUrl) -> None:
    async with awaiting(new_url, atomicity="strict") as app:
        with pytest.raises(errors.NotAtomic):
            async with app.unit():
                app.awaited.add_all([Item(name="a"), Fact(name="a")])
        assert app.written() == (["primary"], [])


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
async def test_what_the_unit_does_the_session_refuses(method: str, lite: AwaitedApplication) -> None:
    async with lite.unit():
        lite.awaited.add(Item(name="a"))
        with pytest.raises(errors.SessionIsManaged):
            await getattr(lite.awaited, method)()
    assert lite.written() == (["a", "primary"], [])


async def test_another_task_is_refused(lite: AwaitedApplication) -> None:
    async with lite.unit():
        session = lite.awaited

        async def elsewhere() -> None:
            with pytest.raises(errors.ForeignUnitOfWork):
                await session.scalars(select(Item))
            with pytest.raises(errors.ForeignUnitOfWork):
                session.add(Item(name="b"))

        await asyncio.create_task(elsewhere())
    assert lite.written() == (["primary"], [])


async def test_a_plain_unit_has_no_session_for_coroutines(lite: AwaitedApplication) -> None:
    with lite.unit(), pytest.raises(errors.AwaitRequired):
        lite.awaited.add(Item(name="a"))
    with pytest.raises(errors.NoUnitOfWork):
        lite.awaited.add(Item(name="a"))
    assert lite.written() == (["primary"], [])


@pytest.mark.parametrize("new_url", ["psycopg"], indirect=True)
async def test_threads_of_a_coroutines_unit_use_the_session_of_threads(app: AwaitedApplication) -> None:
    flushed_by: list[int] = []

    def write() -> None:
        assert app.session.scalars(select(Fact.name)).all() == []
        app.session.add(Item(name="by a thread"))
        event.listen(app.session, "before_flush", lambda *_: flushed_by.append(threading.get_ident()))

    async with app.unit():
        await asyncio.to_thread(write)
    assert flushed_by
    assert threading.get_ident() not in flushed_by, "the event loop had to wait for a database"
    async with app.unit():
        await asyncio.to_thread(lambda: app.session.add(Fact(name="b")))
        with pytest.raises(ValueError, match="own"):
            async with app.unit(propagation="nested"):
                await asyncio.to_thread(lambda: app.session.add(Item(name="c")))
                await asyncio.to_thread(app.session.flush)
                raise ValueError("the application's own")
    assert app.written() == (["by a thread", "primary"], ["b"])


async def test_a_savepoint_has_to_be_awaited_even_if_nothing_was_sent_yet(lite: AwaitedApplication) -> None:
    async with lite.unit() as unit:
        lite.awaited.add(Item(name="a"))
        with pytest.raises(errors.AwaitRequired):
            unit.savepoint()
    assert lite.written() == (["a", "primary"], [])


async def test_a_cancelled_unit_leaves_nothing(app: AwaitedApplication) -> None:
    begun = asyncio.Event()

    async def work() -> None:
        async with app.unit():
            app.awaited.add(Item(name="a"))
            await app.awaited.flush()
            begun.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert app.written() == (["primary"], [])
