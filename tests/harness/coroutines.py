"""What the tests of coroutines share: databases that coroutines reach by way of a driver, and a loop for each test.

async with opened_awaited(url, "asyncpg") as databases:
    async with databases.container.transaction():
        await databases.write("A-1")
    assert databases.items() == ["A-1"]

A test that is a coroutine function runs on a loop of its own: see conftest.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from app_db import Transaction, UnitOfWork
from harness.applications import Application, checked_out
from harness.items import BACKEND_ID, Databases, Item

T = TypeVar("T")

DRIVERS = ("asyncpg", "psycopg", "aiosqlite")
"""The drivers for coroutines that the tests go through. The first two are PostgreSQL's."""


def with_driver(url: str, driver: str) -> str:
    """The same database by way of another driver."""
    made = make_url(url)
    return made.set(drivername=f"{made.get_backend_name()}+{driver}").render_as_string(hide_password=False)


class Awaited(Application):
    """An application that coroutines use, and which blocking code may use too.

    As an asynchronous context manager it also sees, at its end, that no connection of the loop is in use, and disposes the
    loop's engines.
    """

    @asynccontextmanager
    async def supervised(self) -> AsyncGenerator[Self]:
        """What `async with` does, for one of several loops."""
        try:
            yield self
            assert self.in_use() == 0, "a connection was not returned to its pool"
        finally:
            disposal = self.container.shutdown_resources()
            if disposal is not None:
                await disposal

    async def __aenter__(self) -> Self:
        self._supervised = self.supervised()
        return await self._supervised.__aenter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self:
            await self._supervised.__aexit__(kind, error, trace)

    def in_a_loop(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on a loop of its own."""

        async def supervised() -> T:
            async with self.supervised():
                return await main()

        return asyncio.run(supervised())

    def awaited_session(self, connection: str = "writer") -> AsyncSession:
        session: AsyncSession = getattr(self.container, f"{connection}_async_session")()
        return session

    def awaited_engine(self, connection: str = "writer") -> AsyncEngine:
        engine: AsyncEngine = getattr(self.container, f"{connection}_async_engine")()
        return engine

    def in_use(self) -> int:
        """How many connections are in use now, of coroutines of this loop and of blocking code."""
        return self.checked_out() + sum(checked_out(self.awaited_engine(name).sync_engine for name in self.connections))


class AwaitedDatabases(Awaited, Databases):
    """Databases whose items coroutines write."""

    def block(self, **options: Any) -> AbstractAsyncContextManager[UnitOfWork]:
        """A block of the application's, to be entered with `async with`."""
        return self.unit(**options)

    def entered(self, block: Transaction) -> AbstractAsyncContextManager[UnitOfWork]:
        return block

    def hook(self, function: Callable[..., Coroutine[Any, Any, object]]) -> Callable[..., object]:
        """What is registered as a hook in order to run a coroutine function."""
        return function

    def unit_session(self, connection: str = "writer") -> Any:
        """The session of the unit that is under way."""
        return self.awaited_session(connection)

    async def write(self, name: str, connection: str = "writer") -> None:
        """Write an item, which the database then knows of."""
        session = self.awaited_session(connection)
        session.add(Item(name=name))
        await session.flush()

    async def say(self, statement: str, connection: str = "writer", **parameters: object) -> Any:
        """Execute a statement, and return the first value of the first row if there is one."""
        result: Any = await self.awaited_session(connection).execute(text(statement), parameters)
        return result.scalar() if result.returns_rows else None

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def awaited_backend_id(self, connection: str = "writer") -> int | None:
        """The number by which the server knows the connection of the session; None for a database without a server."""
        name = self.awaited_session(connection).get_bind().dialect.name
        return None if name not in BACKEND_ID else int(await self.say(BACKEND_ID[name], connection))


class InThreads(Databases):
    """Databases of threads, with the verbs of AwaitedDatabases: what is tested of both is written once, as a coroutine function.

    No loop runs in such a test, and nothing in it waits.
    """

    def block(self, **options: Any) -> AbstractAsyncContextManager[UnitOfWork]:
        return self.entered(self.unit(**options))

    @asynccontextmanager
    async def entered(self, block: Transaction) -> AsyncGenerator[UnitOfWork]:
        with block as unit:
            yield unit

    def hook(self, function: Callable[..., Coroutine[Any, Any, object]]) -> Callable[..., object]:
        return lambda *args: driven(function(*args))

    def unit_session(self, connection: str = "writer") -> Any:
        return self.session(connection)

    async def write(self, name: str, connection: str = "writer") -> None:
        self.add(name, connection)

    async def say(self, statement: str, connection: str = "writer") -> Any:
        result: Any = self.session(connection).execute(text(statement))
        return result.scalar() if result.returns_rows else None

    async def awaited_backend_id(self, connection: str = "writer") -> int | None:
        return self.backend_id(connection)

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # there is no loop


def driven(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing, without a loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast("T", done.value)
    raise AssertionError("it waits for something")


Either = AwaitedDatabases | InThreads


def opened_either(urls: Mapping[str, str], kind: str, **options: Any) -> Either:
    """Databases that coroutines reach if `kind` is a driver of theirs, and threads otherwise."""
    return opened_awaited(urls, kind, **options) if kind in DRIVERS else InThreads(urls, **options)


def opened_awaited(url: str | Mapping[str, str], driver: str | None = None, **options: Any) -> AwaitedDatabases:
    """Databases that coroutines reach by way of a driver."""
    urls = {"writer": url} if isinstance(url, str) else url
    return AwaitedDatabases(
        {name: with_driver(it, driver) if driver and fits(driver, it) else it for name, it in urls.items()}, **options
    )


def fits(driver: str, url: str) -> bool:
    """Whether a driver is for the database of a URL."""
    return (make_url(url).get_backend_name() == "sqlite") == (driver == "aiosqlite")


def url_for(kind: str, request: pytest.FixtureRequest) -> str:
    """The URL of an empty database: of a kind, or one that a driver reaches."""
    fixtures = {"aiosqlite": "sqlite_url", "sqlite": "sqlite_url", "mariadb": "mariadb_url"}
    url: str = request.getfixturevalue(fixtures.get(kind, "postgres_url"))
    return url


PATIENCE = 0.12
"""Seconds the loop may be late all the same. What is looked for takes longer."""


class Lag:
    """How late the event loop was, at most, while a block ran: how long somebody kept it from going on.

    async with Lag() as lag:
        ...
    assert lag.worst < PATIENCE

    The time for which a thread of this process was ready to go on and waited for a processor is no fault of the loop's.
    """

    worst = 0.0
    _pause = 0.002

    async def __aenter__(self) -> Self:
        self._watching = asyncio.create_task(self._watch())
        await asyncio.sleep(0.01)
        self.worst = 0.0
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(2 * self._pause)  # or the last one would go unnoticed
        self._watching.cancel()

    async def _watch(self) -> None:
        while True:
            before, waited = time.monotonic(), _waits_for_a_processor()
            await asyncio.sleep(self._pause)
            late = time.monotonic() - before - self._pause
            if late > self.worst:
                excused = max((now - waited.get(thread, 0) for thread, now in _waits_for_a_processor().items()), default=0)
                self.worst = max(self.worst, late - excused / 1e9)


def _waits_for_a_processor() -> dict[str, int]:
    """The nanoseconds that each thread of this process has waited for a processor so far, where the system counts them."""
    waits: dict[str, int] = {}
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it has just ended
            waits[thread.parent.name] = int(thread.read_text().split()[1])
    return waits


SLOW_COMMIT = (
    "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$",
    "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION dawdle()",
)
"""On PostgreSQL: makes every COMMIT after an INSERT take half a second for each row."""


def make_commits_slow(databases: Databases, connection: str = "writer") -> None:
    for statement in SLOW_COMMIT:
        databases.rival(statement, connection)
