"""docs/how-to/work-after-commit.md: each queue's own way to send, as a hook, what is lost, and an outbox that loses nothing."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app_db.errors import HookFailed
from harness.paths import PYTHONPATH
from harness.recipes import Recipe, executed

NewUrl = Callable[[], str]


class Unit(Protocol):
    def on_commit(self, function: Callable[..., object], *args: object, **kwargs: object) -> None: ...


Way = tuple[Callable[[Unit], None], Callable[[], Awaitable[object]], Callable[[], int]]
"""What registers the hook, what closes the queue's connections, and how much the broker has."""


# ---- each queue's own way to send ------------------------------------------------------------------------------------------
# Celery and taskiq have tests of their own on Redis. Here they stand for the page's table.


async def celery(redis: Any, broker: str) -> Way:
    app = pytest.importorskip("celery").Celery("shop", broker="memory://")
    channel = app.connection().default_channel

    @app.task(name="place")  # type: ignore[untyped-decorator]
    def place(sku: str) -> None: ...

    async def close() -> None:
        channel.queue_purge("celery")
        app.close()

    return lambda unit: unit.on_commit(place.delay, "A-1"), close, lambda: channel._size("celery")


async def taskiq(redis: Any, broker: str) -> Way:
    from taskiq import InMemoryBroker

    queue, sent = InMemoryBroker(await_inplace=True), Sent()

    @queue.task(task_name="place")
    async def place(sku: str) -> None:
        sent(sku)

    return lambda unit: unit.on_commit(place.kiq, "A-1"), queue.shutdown, lambda: len(sent)


async def arq(redis: Any, broker: str) -> Way:
    from arq.connections import RedisSettings, create_pool

    pool = await create_pool(RedisSettings.from_dsn(broker))

    async def close() -> None:
        await pool.aclose(close_connection_pool=True)

    return lambda unit: unit.on_commit(pool.enqueue_job, "place", "A-1"), close, lambda: redis.zcard("arq:queue")


async def dramatiq(redis: Any, broker: str) -> Way:
    from dramatiq import Actor
    from dramatiq.brokers.redis import RedisBroker

    queue: Any = cast("Any", RedisBroker)(url=broker)
    place = cast("Any", Actor)(lambda sku: None, broker=queue, actor_name="place", queue_name="default", priority=0, options={})

    async def close() -> None:
        queue.client.connection_pool.disconnect()

    return lambda unit: unit.on_commit(place.send, "A-1"), close, lambda: redis.llen("dramatiq:default")


async def faststream(redis: Any, broker: str) -> Way:
    from faststream.redis import RedisBroker

    queue = RedisBroker(broker)
    await queue.connect()
    return lambda unit: unit.on_commit(queue.publish, "A-1", stream="orders"), queue.stop, lambda: redis.xlen("orders")


QUEUES: list[Any] = [celery, taskiq, arq, dramatiq, faststream]


@pytest.mark.representative("arq")
@pytest.mark.parametrize("queue", QUEUES, ids=[queue.__name__ for queue in QUEUES])
def test_a_queue_gets_it_after_the_commit_and_never_if_the_unit_aborts(queue: Any, new_postgres_url: NewUrl, broker: str) -> None:
    async def run(recipe: Recipe, plain: Any) -> None:
        register, close, sent = await queue(plain, broker)
        try:
            with pytest.raises(RuntimeError, match="boom"):
                async with recipe.container.transaction() as unit:
                    register(unit)
                    recipe.container.writer_async_session().add(recipe["Order"](sku="A-1"))
                    raise RuntimeError("boom")
            assert (sent(), recipe.skus()) == (0, [])
            async with recipe.container.transaction() as unit:
                register(unit)
                recipe.container.writer_async_session().add(recipe["Order"](sku="A-1"))
                assert (sent(), recipe.skus()) == (0, [])
            assert (sent(), recipe.skus()) == (1, ["A-1"])
        finally:
            await close()
            await recipe.container.shutdown_resources()

    with executed("work-after-commit", new_postgres_url(), blocks=3) as recipe, Redis.from_url(broker) as plain:
        asyncio.run(run(recipe, plain))


def test_if_the_broker_is_down_the_row_is_there_and_the_caller_is_told(new_postgres_url: NewUrl) -> None:
    def send(sku: str) -> None:
        Redis(port=1, retry=Retry(NoBackoff(), 0)).rpush("sent", sku)

    with executed("work-after-commit", new_postgres_url(), blocks=3) as recipe:
        vars(recipe.module)["send"] = send
        with pytest.raises(HookFailed):
            recipe["place_order"]("A-1")
        assert recipe.skus() == ["A-1"]
        with pytest.raises(HookFailed):
            recipe["place_order_safely"]("A-2")
        assert recipe.skus() == ["A-1", "A-2"]
        vars(recipe.module)["send"] = sent = Sent()
        recipe["send_outbox"]()
        assert sent == ["A-2"], "the outbox has it still"


class Sent(list[str]):
    __call__ = list.append


# ---- processes that die ----------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys
from redis import Redis
from sqlalchemy import event
from sqlalchemy.pool import Pool
import shop

_, broker, action, dies = sys.argv

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def send(sku):
    with Redis.from_url(broker) as redis:
        redis.rpush("sent", sku)
    if dies == "after the message":
        die()

shop.send = send
if dies == "after the commit":
    event.listen(Pool, "checkin", die)
if action == "send":
    shop.send_outbox()
else:
    vars(shop)[action]("A-1")
"""


@pytest.fixture
def run(new_postgres_url: NewUrl, broker: str, tmp_path: Path) -> Iterator[Callable[..., tuple[int, list[str], list[bytes]]]]:
    """Run a program with the page's code; return its exit code, the orders, and what was sent."""
    with executed("work-after-commit", new_postgres_url(), blocks=3) as recipe, Redis.from_url(broker) as redis:
        (tmp_path / "shop.py").write_text("\n".join(recipe.cells[:3]))
        (tmp_path / "program.py").write_text(PROGRAM)

        def run(action: str, dies: str = "") -> tuple[int, list[str], list[bytes]]:
            command = [sys.executable, "program.py", broker, action, dies]
            done = subprocess.run(command, env={"PYTHONPATH": PYTHONPATH}, timeout=60, check=False)
            sent: Any = redis.lrange("sent", 0, -1)
            return done.returncode, recipe.skus(), sent

        yield run


Run = Callable[..., tuple[int, list[str], list[bytes]]]
KILLED = -signal.SIGKILL


@pytest.mark.exhaustive
def test_a_hook_is_lost_if_the_process_dies_between_commit_and_hook(run: Run) -> None:
    assert run("place_order", "after the commit") == (KILLED, ["A-1"], [])
    assert run("send") == (0, ["A-1"], [])


@pytest.mark.exhaustive
def test_an_outbox_loses_nothing(run: Run) -> None:
    assert run("place_order_safely", "after the commit") == (KILLED, ["A-1"], [])
    assert run("send") == (0, ["A-1"], [b"A-1"])
    assert run("send") == (0, ["A-1"], [b"A-1"]), "and sends it once"


@pytest.mark.exhaustive
def test_an_outbox_sends_twice_if_the_process_dies_after_sending(run: Run) -> None:
    assert run("place_order_safely", "after the message") == (KILLED, ["A-1"], [b"A-1"])
    assert run("send") == (0, ["A-1"], [b"A-1", b"A-1"])
    assert run("send") == (0, ["A-1"], [b"A-1", b"A-1"])
