"""What the tests of coroutines share: databases that coroutines reach by way of a driver, and a loop for each test.

with opened_awaited(url, "asyncpg") as databases:

    async def main() -> None:
        async with databases.container.transaction():
            await databases.write("A-1")

    databases.run(main)
    assert databases.items() == ["A-1"]
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.pool import QueuePool

from harness.items import BACKEND_ID, Databases, Item

T = TypeVar("T")

DRIVERS = ("asyncpg", "psycopg", "aiosqlite")
"""The drivers for coroutines that the tests go through. The first two are PostgreSQL's."""


class Boom(Exception):
    pass


def with_driver(url: str, driver: str) -> str:
    """The same database by way of another driver."""
    made = make_url(url)
    return made.set(drivername=f"{made.get_backend_name()}+{driver}").render_as_string(hide_password=False)


class AwaitedDatabases(Databases):
    """Databases whose items coroutines write, and which blocking code may write too."""

    def __init__(self, urls: Mapping[str, str], *, drivers: Mapping[str, str], **options: Any) -> None:
        given: dict[str, dict[str, Any]] = {name: dict(settings) for name, settings in (options.pop("settings", {})).items()}
        for name, driver in drivers.items():
            given.setdefault(name, {})["url"] = with_driver(urls[name], driver)
        super().__init__(urls, settings=given, **options)

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on a loop of its own, see that it leaves no connection in use, and dispose the loop's engines."""
        return asyncio.run(self.supervised(main))

    async def supervised(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `run` runs, for other ways to run a coroutine."""
        try:
            result = await main()
            assert self.in_use() == 0, "a connection was not returned to its pool"
            return result
        finally:
            disposal = self.container.shutdown_resources()
            if disposal is not None:
                await disposal

    # -- in a unit of work

    def awaited_session(self, connection: str = "writer") -> AsyncSession:
        session: AsyncSession = getattr(self.container, f"{connection}_async_session")()
        return session

    async def write(self, name: str, connection: str = "writer") -> None:
        """Write an item, which the database then knows of."""
        session = self.awaited_session(connection)
        session.add(Item(name=name))
        await session.flush()

    async def say(self, statement: str, connection: str = "writer", **parameters: object) -> Any:
        """Execute a statement, and return the first value of the first row if there is one."""
        result: Any = await self.awaited_session(connection).execute(text(statement), parameters)
        return result.scalar() if result.returns_rows else None

    async def awaited_backend_id(self, connection: str = "writer") -> int | None:
        """The number by which the server knows the connection of the session; None for a database without a server."""
        name = self.awaited_session(connection).get_bind().dialect.name
        return None if name not in BACKEND_ID else int(await self.say(BACKEND_ID[name], connection))

    # -- the running loop's engines

    def awaited_engine(self, connection: str = "writer") -> AsyncEngine:
        engine: AsyncEngine = getattr(self.container, f"{connection}_async_engine")()
        return engine

    def in_use(self) -> int:
        """How many connections are in use now, of coroutines of this loop and of blocking code."""
        pools = [self.awaited_engine(name).pool for name in self._outside]
        return self.checked_out() + sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool))


@contextmanager
def opened_awaited(url: str | Mapping[str, str], driver: str | None = None, **options: Any) -> Iterator[AwaitedDatabases]:
    """Open databases that coroutines reach by way of a driver."""
    urls = {"writer": url} if isinstance(url, str) else url
    drivers = {} if driver is None else {name: driver for name, it in urls.items() if fits(driver, it)}
    databases = AwaitedDatabases(urls, drivers=drivers, **options)
    try:
        yield databases
    finally:
        databases.close()


def fits(driver: str, url: str) -> bool:
    """Whether a driver is for the database of a URL."""
    return (make_url(url).get_backend_name() == "sqlite") == (driver == "aiosqlite")


def url_for(driver: str, request: pytest.FixtureRequest) -> str:
    """The URL of an empty database for a driver."""
    url: str = request.getfixturevalue("sqlite_url" if driver == "aiosqlite" else "postgres_url")
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
