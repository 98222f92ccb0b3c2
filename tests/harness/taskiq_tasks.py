"""Tasks of a taskiq broker that a real worker runs: `python -m taskiq worker harness.taskiq_tasks:broker`.

The broker and the database are those of the environment. A test sends tasks by their names.
"""

from __future__ import annotations

import os
from typing import Any

from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from app_db import Container
from app_db.errors import NoUnitOfWork
from app_db.integrations.taskiq import UnitOfWorkMiddleware, provided
from harness.applications import Boom, Item

container = Container()
url = os.environ["SHOP_BROKER"]
results: RedisAsyncResultBackend[Any] = RedisAsyncResultBackend(url)
broker = RedisStreamBroker(url).with_result_backend(results).with_middlewares(UnitOfWorkMiddleware(container))


@broker.task
async def add(name: str) -> str:
    container.writer.async_session().add(Item(name=name))
    return name


@broker.task
async def add_given(name: str, session: Any = provided(container.writer.async_session)) -> str:
    session.add(Item(name=name))
    return name


@broker.task
def add_sync(name: str) -> str:
    container.writer.session().add(Item(name=name))
    return name


@broker.task
async def fail(name: str) -> None:
    container.writer.async_session().add(Item(name=name))
    await container.writer.async_session().flush()
    raise Boom(name)


@broker.task
def fail_sync(name: str) -> None:
    container.writer.session().add(Item(name=name))
    raise Boom(name)


@broker.task
async def then(name: str) -> str:
    """Send another task after the commit."""
    container.writer.async_session().add(Item(name=name))
    container.unit().on_commit(add.kiq, f"{name}, then")
    return name


@broker.task
def without(name: str) -> str:
    """Look for a unit in a process pool, and begin one."""
    try:
        container.unit()
    except NoUnitOfWork:
        with container.transaction():
            container.writer.session().add(Item(name=name))
        return "NoUnitOfWork"
    return name
