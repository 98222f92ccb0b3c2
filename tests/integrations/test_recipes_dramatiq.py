"""docs/how-to/dramatiq.md: an actor's unit commits before Dramatiq acknowledges its message, with a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from sqlalchemy import event

from harness.recipes import Recipe, Worker, executed, refusing

NewUrl = Callable[[], str]

QUICK = """
from dramatiq.middleware import Retries

shop.broker.heartbeat_timeout = 1000  # milliseconds
shop.broker.maintenance_chance = 1_000_000  # with every command
"""
"""A worker sees after a second that another one is dead."""


@contextmanager
def working(recipe: Recipe) -> Iterator[RedisBroker]:
    """Work in threads of this process, for the length of the block."""
    broker: RedisBroker = recipe["broker"]
    recipe["place_order"].options |= {"min_backoff": 1, "max_backoff": 1}  # milliseconds
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
    worker.start()
    try:
        yield broker
    finally:
        worker.stop()
        broker.client.close()
        broker.client.connection_pool.disconnect()


def wait_for(broker: RedisBroker) -> None:
    """Wait until all messages are acknowledged."""
    broker.join("default", interval=20, timeout=30_000)


def dead(broker: RedisBroker) -> int:
    """How many messages have failed for good."""
    client: Any = broker.client
    return int(client.zcard("dramatiq:default.XQ"))


def test_a_message_that_is_acknowledged_has_committed_and_one_that_failed_has_not(new_postgres_url: NewUrl, broker: str) -> None:
    with executed("dramatiq", new_postgres_url(), broker) as recipe, working(recipe) as dramatiqs:
        for sku in ("A-1", "TAKEN", "A-2"):
            recipe["place_order"].send(sku)
        wait_for(dramatiqs)
        assert (recipe.skus(), dead(dramatiqs)) == (["A-1", "A-2"], 1), "the COMMIT of TAKEN fails, each of four times"


def test_a_message_that_is_tried_again_leaves_one_row(new_postgres_url: NewUrl, broker: str) -> None:
    with (
        executed("dramatiq", new_postgres_url(), broker) as recipe,
        refusing("A-1", RuntimeError("boom")) as seen,
        working(recipe) as dramatiqs,
    ):
        recipe["place_order"].send("A-1")
        wait_for(dramatiqs)
        assert (seen.tries, recipe.skus(), dead(dramatiqs)) == (2, ["A-1"], 0)


def test_a_message_is_acknowledged_after_the_commit(new_postgres_url: NewUrl, broker: str) -> None:
    committing, go_on = threading.Event(), threading.Event()

    def at_commit(connection: object) -> None:
        committing.set()
        assert go_on.wait(20)

    with executed("dramatiq", new_postgres_url(), broker) as recipe, working(recipe) as dramatiqs:
        event.listen(recipe.container.connection("writer").engine(), "commit", at_commit)
        recipe["place_order"].send("A-1")
        assert committing.wait(20)
        client: Any = dramatiqs.client
        unacknowledged = [key for key in client.keys("dramatiq:__acks__.*") if client.scard(key)]
        assert (len(unacknowledged), recipe.skus()) == (1, [])
        go_on.set()
        wait_for(dramatiqs)
        assert recipe.skus() == ["A-1"]


@pytest.mark.exhaustive
def test_an_actor_that_is_called_takes_part_in_its_callers_unit(new_postgres_url: NewUrl, broker: str) -> None:
    with executed("dramatiq", new_postgres_url(), broker) as recipe:
        with pytest.raises(RuntimeError, match="boom"), recipe.container.transaction():
            recipe["place_order"]("A-1")
            raise RuntimeError("boom")
        assert recipe.skus() == []


AWAITED = """
from dramatiq.middleware import AsyncIO
from sqlalchemy.ext.asyncio import AsyncSession

broker.add_middleware(AsyncIO())

@dramatiq.actor(max_retries=0)
@transactional
async def place_awaited(sku: str, session: AsyncSession = Provide[Container.writer.async_session]) -> None:
    await session.merge(Order(sku=sku))

@dramatiq.actor
async def shut_down() -> None:
    await container.shutdown_resources()

container.wire(modules=[__name__])
"""


@pytest.mark.exhaustive
def test_a_coroutine_function_works_in_the_same_way(new_postgres_url: NewUrl, broker: str) -> None:
    with executed("dramatiq", new_postgres_url(), broker) as recipe:
        exec(AWAITED, vars(recipe.module))
        with working(recipe) as dramatiqs:
            for sku in ("A-1", "TAKEN", "A-2"):
                recipe["place_awaited"].send(sku)
            wait_for(dramatiqs)
            assert (recipe.skus(), dead(dramatiqs)) == (["A-1", "A-2"], 1)
            recipe["shut_down"].send()
            wait_for(dramatiqs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sku", ["killed before the commit", "killed after the commit"])
def test_a_message_whose_worker_was_killed_is_delivered_again_and_leaves_one_row(
    sku: str, new_postgres_url: NewUrl, broker: str
) -> None:
    command = ("dramatiq", "worker", "--processes", "1", "--threads", "2")
    with executed("dramatiq", new_postgres_url(), broker) as recipe:
        for each in (sku, "A-1"):
            recipe["place_order"].send(each)
        with Worker(recipe, *command, more=QUICK) as first:
            first.wait()
        assert (sku in recipe.skus()) is ("after" in sku)
        with Worker(recipe, *command, more=QUICK) as second:
            wait_for(recipe["broker"])
            second.stop()
        assert recipe.skus() == ["A-1", sku], second.log()
        recipe["broker"].client.connection_pool.disconnect()
