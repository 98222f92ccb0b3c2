"""Creates tables and fills them, once, however many processes ask for it."""

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
"""A second process waits for the first one, and SQLite and MariaDB stop waiting after a while."""


class _DoneBefore(Exception):
    """Ends a unit of work that would do a step again."""


def bootstrap(
    container: Container, callback: Callable[[], object] | None = None, *, on: str | None = None, step: str = "bootstrap"
) -> bool:
    """Create the tables, and call `callback` in a unit of work, once for each `step`. Return whether it was called now.

    The unit also writes the step to the table `app_db_bootstrap` of the connection `on`, so that
    both commit or neither. It may be repeated until it succeeds. If several processes do it at the
    same time, one calls the callback and the others wait. Without `on` it is the writer, or the
    only writable connection with tables. Raises InvalidUse for a coroutine function, and for a
    connection that can't store steps.
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
    """Do what `bootstrap` does with a coroutine function. The tables are created in a thread, by a driver for threads."""
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
    """Write the row of a step before the callback runs, so that another process waits here until this one has ended."""
    done = steps()
    if session.scalar(select(done.c.step).where(done.c.step == step)) is not None:
        raise _DoneBefore
    try:
        session.execute(insert(done).values(step=step))
    except IntegrityError:
        raise _DoneBefore from None


def _place(container: Container, on: str | None) -> str:
    """Return the connection that stores the steps, after creating the table for them."""
    place = _usual_place(container) if on is None else on
    writable(container, [place])
    if not container.settings().connection(place).transactional:
        raise InvalidUse(
            f"The connection {place!r} can't store bootstrap steps, because it commits by itself, even if the unit aborts",
            "Name another connection with `on`",
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
    raise InvalidUse(f"Several connections, or none, can store bootstrap steps: {listed}", "Name one with `on`")
