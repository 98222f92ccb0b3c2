"""docs/how-to/arq.md: a job's unit commits before arq hears that the job is done, with a real Redis."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from arq.connections import ArqRedis, RedisSettings, create_pool
from arq.constants import in_progress_key_prefix, job_key_prefix, result_key_prefix
from arq.jobs import Job
from arq.worker import Retry, create_worker
from redis import Redis
from sqlalchemy import event

from harness.recipes import Recipe, Worker, executed, refusing

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated close")  # arq's worker does, with redis-py 5

NewUrl = Callable[[], str]


async def connected(broker: str, work: Callable[[ArqRedis], Awaitable[None]]) -> None:
    """Do something with a Redis."""
    redis = await create_pool(RedisSettings.from_dsn(broker))
    try:
        await work(redis)
    finally:
        await redis.aclose(close_connection_pool=True)


async def enqueue(redis: ArqRedis, *skus: str) -> list[Job]:
    jobs = [await redis.enqueue_job("place_order", sku, _job_id=sku) for sku in skus]
    return [job for job in jobs if job is not None]


async def outcome(job: Job) -> str:
    """Return the error of a job's result, or nothing."""
    info = await job.result_info()
    assert info is not None
    return "" if info.success else type(info.result).__name__


async def work(recipe: Recipe, **options: Any) -> None:
    """Work as `arq --burst` does, until nothing is left."""
    worker = create_worker(recipe["WorkerSettings"], burst=True, poll_delay=0.02, handle_signals=False, **options)
    try:
        await worker.async_run()
        assert recipe.awaited_in_use() == 0
    finally:
        await worker.close()


def test_a_job_that_is_done_has_committed_and_one_that_failed_has_not(new_postgres_url: NewUrl, broker: str) -> None:
    async def run(recipe: Recipe, redis: ArqRedis) -> None:
        jobs = await enqueue(redis, "A-1", "TAKEN", "boom", "A-2")
        await work(recipe)
        assert [await outcome(job) for job in jobs] == ["", "IntegrityError", "RuntimeError", ""]

    with executed("arq", new_postgres_url(), broker) as recipe:
        with refusing("boom", RuntimeError("boom")):
            asyncio.run(connected(broker, partial(run, recipe)))
        assert recipe.skus() == ["A-1", "A-2"]


def test_a_job_that_is_tried_again_leaves_one_row(new_postgres_url: NewUrl, broker: str) -> None:
    async def run(recipe: Recipe, redis: ArqRedis) -> None:
        (job,) = await enqueue(redis, "A-1")
        await work(recipe)
        info = await job.result_info()
        assert info is not None
        assert (info.success, info.job_try) == (True, 2)

    with executed("arq", new_postgres_url(), broker) as recipe:
        with refusing("A-1", Retry()) as seen:
            asyncio.run(connected(broker, partial(run, recipe)))
        assert (seen.tries, recipe.skus()) == (2, ["A-1"])


def test_the_result_is_stored_after_the_commit(new_postgres_url: NewUrl, broker: str) -> None:
    """While COMMIT waits for another transaction, arq has no result, and the job is in progress."""
    committing, go_on = threading.Event(), threading.Event()

    def at_commit(connection: object) -> None:
        committing.set()
        assert go_on.wait(20)

    async def run(recipe: Recipe, redis: ArqRedis) -> None:
        (job,) = await enqueue(redis, "A-1")
        working = asyncio.create_task(work(recipe))
        event.listen(recipe.container.connection("writer").async_engine().sync_engine, "commit", at_commit)
        looked: list[object] = []

        def look() -> None:
            committing.wait(20)
            with Redis.from_url(broker) as plain:
                looked.extend(plain.exists(f"{prefix}{job.job_id}") for prefix in (job_key_prefix, result_key_prefix))
            looked.append(recipe.skus())
            go_on.set()

        await asyncio.gather(working, asyncio.to_thread(look))
        assert looked == [1, 0, []], "the job is there, and neither its result nor its row"
        assert await outcome(job) == ""

    with executed("arq", new_postgres_url(), broker) as recipe:
        asyncio.run(connected(broker, partial(run, recipe)))
        assert recipe.skus() == ["A-1"]


@pytest.mark.exhaustive
def test_a_job_whose_worker_is_stopped_by_a_signal_aborts_and_runs_again(new_postgres_url: NewUrl, broker: str) -> None:
    async def enqueue_one(redis: ArqRedis) -> None:
        await enqueue(redis, "A-1")

    with executed("arq", new_postgres_url(), broker) as recipe:
        asyncio.run(connected(broker, enqueue_one))
        with recipe.plain.connect() as rival:
            rival.exec_driver_sql("LOCK TABLE orders")  # the job waits for it in `merge`
            with Worker(recipe, "arq", "worker.WorkerSettings") as first:
                recipe.wait_until_something_waits()
                first.stop()
            assert recipe.in_use() == 1, "that of the rival"
            rival.rollback()
        assert recipe.skus() == []
        with Worker(recipe, "arq", "worker.WorkerSettings", "--burst") as second:
            assert second.wait() == 0, second.log()
        assert recipe.skus() == ["A-1"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("sku", ["killed before the commit", "killed after the commit"])
def test_a_job_whose_worker_was_killed_runs_again_and_leaves_one_row(sku: str, new_postgres_url: NewUrl, broker: str) -> None:
    async def enqueue_all(redis: ArqRedis) -> None:
        await enqueue(redis, sku, "A-1")

    async def forget_the_dead_worker(redis: ArqRedis) -> None:
        """Do what time does, some minutes later."""
        assert await redis.delete(f"{in_progress_key_prefix}{sku}", f"{in_progress_key_prefix}A-1")

    with executed("arq", new_postgres_url(), broker) as recipe:
        asyncio.run(connected(broker, enqueue_all))
        command = ("arq", "worker.WorkerSettings", "--burst")
        with Worker(recipe, *command) as first:
            assert first.wait() == -9, first.log()
        assert (sku in recipe.skus()) is ("after" in sku)
        asyncio.run(connected(broker, forget_the_dead_worker))
        with Worker(recipe, *command) as second:
            assert second.wait() == 0, second.log()
        assert recipe.skus() == ["A-1", sku]
