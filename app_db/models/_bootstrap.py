"""Making the tables and filling them for the first time: once, however often and by however many it is asked for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app_db._databases.containers import Container
from app_db.errors import InvalidUse
from app_db.models._reflection import connections_in
from app_db.models._schema import create_all, create_bootstrap_table, steps, writable

_ATTEMPTS = 10
"""Whoever comes second waits for the first one, and SQLite and MariaDB give up waiting after a while."""


class _DoneBefore(Exception):
    """Ends the unit of work of whoever comes second."""


def bootstrap(
    container: Container, callback: Callable[[], object] | None = None, *, on: str | None = None, step: str = "bootstrap"
) -> bool:
    """Make the tables, and call `callback` in a unit of work, once: return whether that was now.

    That it was called stands in the table `app_db_bootstrap` of the connection `on`, and commits with what it wrote, or not at
    all. So it may be repeated until it succeeds, and of processes that do it at the same time one does it and the others wait.
    `on` is the writer, or the only writable connection that has tables; `step` tells several callbacks apart.
    """
    if inspect.iscoroutinefunction(callback):
        raise InvalidUse("bootstrap() was given a coroutine function", "Use `await container.async_bootstrap(...)`")
    create_all(container)
    if callback is None:
        return False
    place = _place(container, on)

    def seed() -> None:
        _claim(container.providers[f"{place}_session"](), step)
        callback()

    try:
        container.transaction(propagation="requires_new", attempts=_ATTEMPTS).run(seed)
    except _DoneBefore:
        return False
    return True


async def async_bootstrap(
    container: Container, callback: Callable[[], Awaitable[object]], *, on: str | None = None, step: str = "bootstrap"
) -> bool:
    """Do what `bootstrap` does with a coroutine function. The tables are made in a thread, by the drivers of threads."""
    if not inspect.iscoroutinefunction(callback):
        raise InvalidUse("async_bootstrap() was given no coroutine function", "Use `container.bootstrap(...)`")
    await asyncio.to_thread(create_all, container)
    place = await asyncio.to_thread(_place, container, on)

    async def seed() -> None:
        await container.providers[f"{place}_async_session"]().run_sync(_claim, step)
        await callback()

    try:
        await container.transaction(propagation="requires_new", attempts=_ATTEMPTS).run(seed)
    except _DoneBefore:
        return False
    return True


def _claim(session: Session, step: str) -> None:
    """Write that a step is done, first of all, so that another process waits here until this one has committed or not."""
    done = steps()
    if session.scalar(select(done.c.step).where(done.c.step == step)) is not None:
        raise _DoneBefore
    try:
        session.execute(insert(done).values(step=step))
    except IntegrityError:
        raise _DoneBefore from None


def _place(container: Container, on: str | None) -> str:
    """Return the connection that remembers what was done, with a table for that."""
    place = _usual_place(container) if on is None else on
    writable(container, [place])
    if not container.settings().connection(place).transactional:
        raise InvalidUse(
            f"The connection {place!r} can't remember a bootstrap, because it commits by itself, whatever becomes of the unit",
            "Name another one with `on`",
        )
    create_bootstrap_table(container, place)
    return place


def _usual_place(container: Container) -> str:
    if "writer" in connections_in(container):
        return "writer"
    candidates = [name for name in writable(container, ()) if container.settings().connection(name).transactional]
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(map(repr, candidates)) or "none that has tables"
    raise InvalidUse(f"It is not clear which connection is to remember the bootstrap: {listed}", "Name it with `on`")
