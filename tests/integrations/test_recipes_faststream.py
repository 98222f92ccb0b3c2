"""docs/how-to/faststream.md: a handler's unit commits before FastStream acknowledges its message, with a real Redis."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Self

import pytest
from redis import Redis
from sqlalchemy import event

from harness.recipes import Recipe, Worker, executed, refusing

NewUrl = Callable[[], str]


class Group:
    """The consumer group, as another client sees it."""

    def __init__(self, broker: str) -> None:
        self._redis: Any = Redis.from_url(broker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._redis.close()

    def pending(self) -> int:
        """How many messages were delivered and not acknowledged."""
        return int(self._redis.xpending("orders", "shop")["pending"])

    def is_done(self) -> bool:
        """Whether all messages were delivered and acknowledged."""
        (group,) = self._redis.xinfo_groups("orders")
        return bool(group["lag"] == 0 and group["pending"] == 0)


async def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < give_up
        await asyncio.sleep(0.02)


def at_work(recipe: Recipe, work: Callable[[], Awaitable[None]]) -> None:
    """Do something while FastStream consumes, in this process."""

    async def run() -> None:
        await recipe["app"].start()
        try:
            await work()
            assert recipe.awaited_in_use() == 0
        finally:
            await recipe["app"].stop()

    asyncio.run(run())


async def publish(recipe: Recipe, *skus: str) -> None:
    for sku in skus:
        await recipe["broker"].publish(sku, stream="orders")


def test_a_message_that_is_acknowledged_has_committed_and_one_that_failed_has_not(new_postgres_url: NewUrl, broker: str) -> None:
    async def run(recipe: Recipe) -> None:
        await publish(recipe, "A-1", "TAKEN", "boom", "A-2")
        await until(lambda: recipe.skus() == ["A-1", "A-2"] and group.pending() == 2)

    with executed("faststream", new_postgres_url(), broker) as recipe, Group(broker) as group:
        with refusing("boom", RuntimeError("boom")):
            at_work(recipe, partial(run, recipe))
        assert (recipe.skus(), group.pending()) == (["A-1", "A-2"], 2)


def test_a_message_is_acknowledged_after_the_commit(new_postgres_url: NewUrl, broker: str) -> None:
    committing, go_on = threading.Event(), threading.Event()
    looked: list[object] = []

    def at_commit(connection: object) -> None:
        committing.set()
        assert go_on.wait(20)

    def look(recipe: Recipe) -> None:
        committing.wait(20)
        looked.extend([group.pending(), recipe.skus()])
        go_on.set()

    async def run(recipe: Recipe) -> None:
        event.listen(recipe.container.connection("writer").async_engine().sync_engine, "commit", at_commit)
        looking = asyncio.create_task(asyncio.to_thread(look, recipe))
        await publish(recipe, "A-1")
        await looking
        await until(group.is_done)

    with executed("faststream", new_postgres_url(), broker) as recipe, Group(broker) as group:
        at_work(recipe, partial(run, recipe))
        assert (looked, recipe.skus()) == ([1, []], ["A-1"])


@pytest.mark.exhaustive
def test_what_a_publisher_publishes_is_committed(new_postgres_url: NewUrl, broker: str) -> None:
    seen: list[object] = []
    heard = asyncio.Event()

    with executed("faststream", new_postgres_url(), broker) as recipe:
        app, container = recipe["broker"], recipe.container

        @app.subscriber("more")  # type: ignore[untyped-decorator]
        @app.publisher("placed")  # type: ignore[untyped-decorator]
        async def place_more(sku: str) -> str:
            async with container.transaction():
                container.writer_async_session().add(recipe["Order"](sku=sku))
            return sku

        @app.subscriber("placed")  # type: ignore[untyped-decorator]
        async def placed(sku: str) -> None:
            seen.append((sku, recipe.skus()))
            heard.set()

        async def publish_more() -> None:
            for sku in ("TAKEN", "A-1"):
                await app.publish(sku, channel="more")
            await asyncio.wait_for(heard.wait(), 30)

        at_work(recipe, publish_more)
    assert seen == [("A-1", ["A-1"])]


def test_a_message_that_failed_comes_again_and_leaves_one_row(new_postgres_url: NewUrl, broker: str) -> None:
    async def run(recipe: Recipe) -> None:
        await publish(recipe, "A-1")
        await until(group.is_done)

    with executed("faststream", new_postgres_url(), broker) as recipe, Group(broker) as group:
        quick(recipe)
        with refusing("A-1", RuntimeError("boom")) as seen:
            at_work(recipe, partial(run, recipe))
        assert (seen.tries, recipe.skus()) == (2, ["A-1"])


def quick(recipe: Recipe) -> None:
    """Have messages come again after 0.1 s instead of a minute."""
    for subscriber in recipe["broker"].subscribers:
        if subscriber.min_idle_time is not None:
            subscriber.min_idle_time = 100


QUICK = """
for subscriber in broker.subscribers:
    if subscriber.min_idle_time is not None:
        subscriber.min_idle_time = 100
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("sku", ["killed before the commit", "killed after the commit"])
def test_a_message_whose_worker_was_killed_comes_again_and_leaves_one_row(
    sku: str, new_postgres_url: NewUrl, broker: str
) -> None:
    command = ("faststream", "run", "worker:app")
    with executed("faststream", new_postgres_url(), broker) as recipe, Group(broker) as group:

        async def publish_all() -> None:
            await recipe["broker"].connect()
            await publish(recipe, sku, "A-1")
            await recipe["broker"].stop()

        with Worker(recipe, *command, more=QUICK) as first:
            asyncio.run(until(lambda: "started" in first.log()))
            asyncio.run(publish_all())
            assert first.wait() == -9, first.log()
        assert (sku in recipe.skus(), group.pending()) == ("after" in sku, 1)
        with Worker(recipe, *command, more=QUICK) as second:
            asyncio.run(until(group.is_done))
            second.stop()
        assert recipe.skus() == ["A-1", sku], second.log()
