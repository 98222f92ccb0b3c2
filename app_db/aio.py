"""Run the synchronous core from coroutines: over SQLAlchemy's greenlet bridge, and to the end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

from sqlalchemy.util.concurrency import greenlet_spawn

from app_db.manager import acting_for

P = ParamSpec("P")
R = TypeVar("R")


async def to_the_end(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a synchronous function that ends a transaction, and may wait for coroutines, on behalf of the calling task.

    A cancellation of that task waits until the function is done, and is then raised, whatever came of it: a transaction that is
    left in the middle of its commit is neither there nor gone.
    """
    owner = asyncio.current_task()

    async def act() -> R:
        with acting_for(owner):
            return await greenlet_spawn(partial(function, *args, **kwargs))

    context = copy_context()
    task = asyncio.create_task(act(), context=context)
    asyncio._unregister_task(task)  # an ending loop cancels all tasks that it finds; the one that waits for this stays known
    cancelled = failure = None
    try:
        with _shield_of_anyio():
            while not task.done():
                try:
                    await asyncio.wait((task,))
                except asyncio.CancelledError as error:  # again and again, perhaps
                    cancelled = error
        _take_over(context)
        if cancelled is None:
            return task.result()
        if not task.cancelled() and (failure := task.exception()) is not None:
            cancelled.__context__ = failure  # both happened, and the cancellation is what the task has to end by
        raise cancelled
    finally:
        del task, cancelled, failure  # an error would hold this frame, and this frame the error


def _take_over(context: Context) -> None:
    """Take over what was set in the context of the task that acted."""
    for variable, value in context.items():
        if variable.get(None) is not value:
            variable.set(value)


def _shield_of_anyio() -> AbstractContextManager[Any]:
    """Keep a cancelled scope of anyio from cancelling again and again, each time the loop comes around."""
    anyio = sys.modules.get("anyio")
    return nullcontext() if anyio is None else anyio.CancelScope(shield=True)
