"""Run the synchronous core from coroutines: over SQLAlchemy's greenlet bridge, and to the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from sqlalchemy.util.concurrency import greenlet_spawn

from app_db.manager import acting_for
from app_db.outlasting import begin_unseen, outlast

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
    task = begin_unseen(act(), context=context)
    cancelled = failure = None
    try:
        cancelled = await outlast(task)
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
