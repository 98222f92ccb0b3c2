"""How many connections to servers a process can open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app_db import DatabaseSettings, container_of

POSTGRES = "postgresql://shop@db/shop"


def container_with(**connections: Any) -> Any:
    return container_of(*connections, "reader", "missing")(settings=DatabaseSettings(connections=connections))


@pytest.mark.parametrize(
    ("pool", "most"),
    [
        ({}, 15),
        ({"size": 3, "max_overflow": 0}, 3),
        ({"max_overflow": -1}, inf),
        ({"class": "null"}, inf),
        ({"class": "static"}, 1),
        ({"class": "sqlalchemy.pool:QueuePool", "size": 2, "max_overflow": 2}, 4),
        ({"class": "sqlalchemy.pool:SingletonThreadPool"}, inf),
    ],
)
def test_the_pool_says_how_many(pool: dict[str, Any], most: float) -> None:
    container = container_with(warehouse={"url": POSTGRES, "pool": pool})
    assert container.capacity(coroutines=False).connections == {"warehouse": most}
    assert container.capacity(threads=False).connections == {"warehouse": most}
    assert container.capacity().connections == {"warehouse": 2 * most}


def test_all_are_added_up() -> None:
    pool = {"size": 2, "max_overflow": 1}
    container = container_with(writer={"url": POSTGRES, "pool": pool}, log={"url": "sqlite:///log.db"})
    capacity = container.capacity()
    assert capacity.connections == {"writer": 6, "log": 0, "reader": 30}
    assert (capacity.total, capacity.for_workers(8)) == (36, 288)
    assert str(capacity) == "writer: 6\nlog: 0\nreader: 30\ntotal: 36"


def test_no_more_are_opened(new_postgres_url: Callable[[], str]) -> None:
    pool = {"size": 1, "max_overflow": 1, "timeout": 0.1}
    container = container_with(warehouse={"url": new_postgres_url(), "pool": pool})
    engine = container.warehouse_engine()
    opened = [engine.connect() for _ in range(2)]
    with pytest.raises(PoolTimeout):
        engine.connect()

    async def in_coroutines() -> int:
        awaited = container.warehouse_async_engine()
        opened = [await awaited.connect() for _ in range(2)]
        with pytest.raises(PoolTimeout):
            await awaited.connect()
        for connection in opened:
            await connection.close()
        await container.shutdown_resources()
        return len(opened)

    assert len(opened) + asyncio.run(in_coroutines()) == container.capacity().total
    for connection in opened:
        connection.close()
    container.shutdown_resources()
