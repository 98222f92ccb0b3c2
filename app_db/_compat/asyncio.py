"""Tasks that are not cut in the middle: whoever waits for one outlasts cancellations, those of an ending event loop too."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from typing import Any, TypeVar

R = TypeVar("R")


def begin_unseen(coroutine: Coroutine[Any, Any, R], *, context: Context | None = None) -> asyncio.Task[R]:
    """Begin a task of the running loop that only its starter can cancel, who has to hold it, and to `outlast` it."""
    # Not by the loop's factory: an eager task would begin here, which may be inside a greenlet that is not its own.
    task = asyncio.Task(coroutine, loop=asyncio.get_running_loop(), context=context)
    asyncio._unregister_task(task)  # an ending loop cancels all tasks that it finds; the one that waits for this stays known
    return task


async def outlast(task: asyncio.Task[Any], *, patience: float | None = None) -> asyncio.CancelledError | None:
    """Wait until a task is done, although the waiting one is cancelled meanwhile; return that cancellation.

    With `patience`, wait for at most so many seconds from the first cancellation: the task may not be done then.
    """
    loop = asyncio.get_running_loop()
    cancelled = give_up = left = None
    try:
        with _shield_of_anyio():
            while not task.done() and (left is None or left > 0):
                try:
                    await asyncio.wait((task,), timeout=left)
                except asyncio.CancelledError as error:  # again and again, perhaps
                    cancelled = error
                    give_up = give_up or (None if patience is None else loop.time() + patience)
                left = None if give_up is None else give_up - loop.time()
        return cancelled
    finally:
        del task, cancelled  # an error would hold this frame, and this frame the error


def _shield_of_anyio() -> AbstractContextManager[Any]:
    """Keep a cancelled scope of anyio from cancelling again and again, each time the loop comes around."""
    anyio = sys.modules.get("anyio")
    return nullcontext() if anyio is None else anyio.CancelScope(shield=True)
