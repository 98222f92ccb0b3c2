"""Private names of asyncio: the running loop, tasks that an ending loop does not cancel, and the sockets of transports."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import Context
from socket import SHUT_RDWR
from typing import Any, TypeVar

R = TypeVar("R")

running_loop: Callable[[], asyncio.AbstractEventLoop | None] = asyncio._get_running_loop
"""Return the event loop that runs in this thread, or None.

The public spelling raises where no loop runs, at five times the price. A function around this one would double the price.
"""


def begin_unseen(coroutine: Coroutine[object, object, R], *, context: Context | None = None) -> asyncio.Task[R]:
    """Begin a task of the running loop that only its starter can cancel, who has to hold it, and to `outlast` it."""
    # Not by the loop's factory: an eager task would begin here, which may be inside a greenlet that is not its own.
    task = asyncio.Task(coroutine, loop=asyncio.get_running_loop(), context=context)
    asyncio._unregister_task(task)  # an ending loop cancels all tasks that it finds; the one that waits for this stays known
    return task


async def outlast(task: asyncio.Task[R]) -> asyncio.CancelledError | None:
    """Wait until a task is done, although the waiting one is cancelled meanwhile; return that cancellation."""
    cancelled = None
    try:
        with _shield_of_anyio():
            while not task.done():
                try:
                    await asyncio.wait((task,))
                except asyncio.CancelledError as error:  # again and again, perhaps
                    cancelled = error
        return cancelled
    finally:
        del task, cancelled  # an error would hold this frame, and this frame the error


def _shield_of_anyio() -> AbstractContextManager[object]:
    """Keep a cancelled scope of anyio from cancelling again and again, each time the loop comes around."""
    anyio = sys.modules.get("anyio")
    return nullcontext() if anyio is None else anyio.CancelScope(shield=True)


def hang_up(transport: Any, close: Callable[[], object]) -> None:
    """Close the connection of a transport from any thread, whether its event loop is alive or closed.

    `close` is the driver's function for that, which may be called in the thread of the loop only. A closed loop can't close a
    socket, and asyncio has no public way to do so.
    """
    loop = getattr(transport, "_loop", None)
    if loop is not None and not loop.is_closed():
        with suppress(OSError):  # the server was faster
            transport.get_extra_info("socket").shutdown(SHUT_RDWR)
        with suppress(RuntimeError):  # the loop was closed just now
            loop.call_soon_threadsafe(close)
        return
    with suppress(RuntimeError):  # "Event loop is closed": but the transport knows now that it is closing, and `close` won't ask
        transport.abort()
    encrypted = getattr(transport, "_ssl_protocol", None)
    inner = transport if encrypted is None else encrypted._transport
    own_socket = getattr(inner, "_sock", None)
    if own_socket is not None:
        own_socket.close()
        inner._sock = None  # or the transport would complain when it is dropped
    close()
