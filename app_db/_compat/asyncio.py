"""Private names of asyncio: the running loop, tasks that an ending loop does not cancel, and the sockets of transports."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import Context
from socket import SHUT_RDWR
from typing import Any, TypeVar
from weakref import finalize

R = TypeVar("R")

running_loop: Callable[[], asyncio.AbstractEventLoop | None] = asyncio._get_running_loop
"""Return the event loop that runs in this thread, or None.

The public function raises an error if no loop runs, and takes five times as long. Wrapping this one would double its time.
"""


def begin_unseen(coroutine: Coroutine[object, object, R], *, context: Context | None = None) -> asyncio.Task[R]:
    """Start a task of the running loop that the end of the loop does not cancel. Keep it, and wait for it by `outlast`."""
    # Not by the loop's factory: an eager task would start here, perhaps inside the greenlet of another task.
    task = asyncio.Task(coroutine, loop=asyncio.get_running_loop(), context=context)
    asyncio._unregister_task(
        task
    )  # `asyncio.run()` cancels all registered tasks; the task that waits for this one stays registered
    return task


async def outlast(task: asyncio.Task[R]) -> asyncio.CancelledError | None:
    """Wait until a task is done, also if the waiting task is cancelled meanwhile. Return that cancellation."""
    cancelled = None
    try:
        with _shield_of_anyio():
            while not task.done():
                try:
                    await asyncio.wait((task,))
                except asyncio.CancelledError as error:  # perhaps several times
                    cancelled = error
        return cancelled
    finally:
        del task, cancelled  # the error and this frame would refer to each other


def _shield_of_anyio() -> AbstractContextManager[object]:
    """Keep a cancelled scope of anyio from cancelling again in each iteration of the loop."""
    anyio = sys.modules.get("anyio")
    return nullcontext() if anyio is None else anyio.CancelScope(shield=True)


async def pause(seconds: float) -> None:
    """Wait by the real clock. `asyncio.sleep` goes by the clock of the loop, which stands still in tests that freeze time."""
    await asyncio.get_running_loop().run_in_executor(None, time.sleep, seconds)


def descriptor_of(transport: asyncio.BaseTransport | None) -> int | None:
    """Return the file descriptor of a transport's socket, None if there is no transport or it is closed."""
    own = None if transport is None or transport.is_closing() else transport.get_extra_info("socket")
    return None if own is None or own.fileno() < 0 else own.fileno()


def hang_up(transport: Any, close: Callable[[], object]) -> None:
    """Close the connection of a transport from any thread, whether its event loop is alive or closed.

    `close` is the driver's function for that, and may only be called in the loop's thread. asyncio has no public way to close the
    socket after the loop was closed.
    """
    loop = getattr(transport, "_loop", None)
    if loop is None or loop.is_closed():
        _close_without_loop(transport, close)
    else:
        _ask_loop_to_close(loop, transport, close)


def _ask_loop_to_close(loop: asyncio.AbstractEventLoop, transport: Any, close: Callable[[], object]) -> None:
    with suppress(OSError):  # the server has closed it
        transport.get_extra_info("socket").shutdown(SHUT_RDWR)
    # A loop that is closed before it runs again drops what it was asked to call, and with it the last reference to `request`.
    request = _Request()
    dropped = finalize(request, _close_without_loop, transport, close)
    dropped.atexit = False  # the loop may still be running then

    def close_in_loop(request: _Request) -> None:
        close()  # the transport closes its socket in the loop's next turn, if there is one
        loop.call_soon(closed, request)

    def closed(_request: _Request) -> None:
        dropped.detach()

    with suppress(RuntimeError):  # the loop was closed just now
        loop.call_soon_threadsafe(close_in_loop, request)


class _Request:
    """What an event loop is asked to close."""


def _close_without_loop(transport: Any, close: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # "Event loop is closed"; but the transport is marked as closing, so `close` can be called
        transport.abort()
    encrypted = getattr(transport, "_ssl_protocol", None)
    inner = transport if encrypted is None else encrypted._transport
    own_socket = getattr(inner, "_sock", None)
    if own_socket is not None:
        own_socket.close()
        inner._sock = None  # or the transport warns when it is dropped
    close()
