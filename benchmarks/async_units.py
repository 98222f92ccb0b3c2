"""Units of work of coroutines: app_db beside `async with async_sessionmaker.begin()`, in one event loop."""

from __future__ import annotations

import asyncio
import gc
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import heading, report
from schema import Row, Shop, bare_async_engine, prepared
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from units import postgres_url

from app_db import DatabaseSettings

if TYPE_CHECKING:
    from app_db import DatabaseContainer

CALLS = 150
ROUNDS = 21
FLOOR = 1.10

Unit = Callable[[], Awaitable[object]]


def run() -> None:
    """Print the table."""
    heading("Units of work of coroutines", "units/s")
    with tempfile.TemporaryDirectory() as directory:
        _measure("SQLite, aiosqlite", f"sqlite+aiosqlite:///{Path(directory) / 'shop.db'}")
    with postgres_url() as url:
        for driver in ("psycopg", "asyncpg"):
            _measure(f"PostgreSQL, {driver}", url.replace("+psycopg", f"+{driver}"))


def _measure(name: str, url: str) -> None:
    with prepared(url):  # the table, and a row
        asyncio.run(_compare_all(name, url))


async def _compare_all(name: str, url: str) -> None:
    container = Shop(settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": url}}))
    engine = bare_async_engine(url)
    bare = async_sessionmaker(engine)
    await _compare(f"{name}: SELECT by key", *_select(container, bare))
    await _compare(f"{name}: INSERT", *_insert(container, bare))
    await container.shutdown_resources()
    await engine.dispose()


def _select(container: DatabaseContainer, bare: async_sessionmaker[AsyncSession]) -> tuple[Unit, Unit]:
    async def ours() -> None:
        async with container.transaction():
            await container.writer_async_session().get(Row, 1)

    async def plain() -> None:
        async with bare.begin() as session:
            await session.get(Row, 1)

    return ours, plain


def _insert(container: DatabaseContainer, bare: async_sessionmaker[AsyncSession]) -> tuple[Unit, Unit]:
    async def ours() -> None:
        async with container.transaction():
            container.writer_async_session().add(Row(text="written"))

    async def plain() -> None:
        async with bare.begin() as session:
            session.add(Row(text="written"))

    return ours, plain


async def _compare(what: str, ours: Unit, bare: Unit) -> None:
    """Do what `measuring.compare` does, with coroutines: both in turns, and the median of the neighbours' ratios."""
    pairs: list[tuple[float, float]] = []
    for number in range(ROUNDS + 1):
        if number % 2:
            plain = await _seconds(bare)
            pairs.append((await _seconds(ours), plain))
        else:
            pairs.append((await _seconds(ours), await _seconds(bare)))
    del pairs[0]  # the warming up
    rates = [1 / statistics.median(seconds) for seconds in zip(*pairs, strict=True)]
    ratio = statistics.median(one / other for one, other in pairs)
    report(what, ours=f"{rates[0]:,.0f}", bare=f"{rates[1]:,.0f}", ratio=ratio, at_most=FLOOR)


async def _seconds(unit: Unit) -> float:
    gc.collect()
    began = time.perf_counter()
    for _ in range(CALLS):
        await unit()
    return (time.perf_counter() - began) / CALLS
