"""Tasks of a Celery application that a real worker runs: `python -m celery -A harness.celery_tasks worker`.

Its broker and its databases are those of the environment. A test sends tasks by their names.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import Celery, shared_task
from celery.exceptions import Ignore, Reject
from dependency_injector import providers
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from app_db import container_of
from app_db.integrations.celery import install
from harness.applications import Boom, Item

CONNECTIONS = tuple(os.environ.get("SHOP_CONNECTIONS", "writer").split(","))

container = container_of(*CONNECTIONS)()


def log_resource() -> Iterator[None]:
    """Note in a file when a process begins to use the container, and when it ends."""
    for word in ("begun\n", "ended\n"):
        with Path(os.environ["SHOP_LOG"]).open("a") as log:
            log.write(word)
        if word == "begun\n":
            yield


if "SHOP_LOG" in os.environ:
    container.set_provider("log", providers.Resource(log_resource))
app = Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_BROKER"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_send_task_events=False,
    task_acks_late=os.environ.get("SHOP_ACKS", "late") == "late",
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
)
install(app, container)


def insert(name: str) -> None:
    """Add an item in each database, and send it."""
    for connection in CONNECTIONS:
        session = getattr(container, f"{connection}_session")()
        session.add(Item(name=name))
        session.flush()


@app.task
def add(name: str) -> str:
    insert(name)
    return name


@shared_task
def add_shared(name: str) -> str:
    insert(name)
    return name


@app.task
def fail(name: str) -> None:
    insert(name)
    raise Boom(name)


@app.task(bind=True)
def retry(self: Any, name: str) -> str:
    insert(name)
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return name


@app.task(bind=True, autoretry_for=(IntegrityError,), retry_kwargs={"countdown": 0})
def retry_commit(self: Any, name: str) -> str:
    """Fail at the first COMMIT, where the database has the item "taken" and checks that late."""
    insert(name if self.request.retries else "taken")
    return name


@app.task
def ignore(name: str) -> None:
    insert(name)
    raise Ignore


@app.task
def reject(name: str) -> None:
    insert(name)
    raise Reject(name, requeue=False)


@app.task
def add_then(name: str, then: str) -> str:
    """Send another task, which reads what this one has written."""
    insert(name)
    find.delay_on_commit(name, then)
    return name


@app.task
def fail_after(name: str, then: str) -> None:
    add_then.run(name, then)
    raise Boom(name)


@app.task
def find(name: str, then: str) -> str:
    container.connection("writer").session().query(Item).filter_by(name=name).one()
    insert(then)
    return then


@app.task
def add_by_two(name: str) -> str:
    """Call tasks as functions: they take part."""
    insert(name)
    add(f"{name}, part")
    return name


@app.task(unit=False)
def has_unit() -> bool:
    try:
        container.unit()
    except Exception:
        return False
    return True


@app.task(unit={"read_only": True})
def write_read_only(name: str) -> None:
    insert(name)


@app.task(soft_time_limit=1, time_limit=30)
def take_long(name: str) -> None:
    insert(name)
    container.connection("writer").session().execute(text("SELECT pg_sleep(20)"))


@app.task(soft_time_limit=1, time_limit=30, autoretry_for=(Exception,), retry_kwargs={"countdown": 0})
def commit_long(name: str) -> str:
    """Commit for longer than the limit, where a trigger of the database does that."""
    insert(name)
    return name


@app.task
def die_once(name: str, flag: str) -> str:
    """Kill the process that works, the first time."""
    insert(name)
    with container.transaction(propagation="requires_new"):
        first = container.connection("writer").session().query(Item).filter_by(name=flag).delete() == 1
    if first:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


@app.task(time_limit=1)
def hang_once(name: str, flag: str) -> str:
    insert(name)
    with container.transaction(propagation="requires_new"):
        first = container.connection("writer").session().query(Item).filter_by(name=flag).delete() == 1
    if first:
        time.sleep(100)
    return name


@app.task(unit=False)
def checked_out() -> int:
    """Return how many connections are in use in this process."""
    pools: list[Any] = [container.connection(name).engine().pool for name in CONNECTIONS]
    return sum(pool.checkedout() for pool in pools)
