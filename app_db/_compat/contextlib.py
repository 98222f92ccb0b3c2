"""contextlib's ExitStack and AsyncExitStack: which stack enters or leaves is read from frames."""

from __future__ import annotations

import dis
from contextlib import AsyncExitStack, ExitStack
from types import CodeType, FrameType, TracebackType

_ENTRIES: frozenset[CodeType] = frozenset(
    method.__code__ for method in (ExitStack.enter_context, AsyncExitStack.enter_context, AsyncExitStack.enter_async_context)
)
_EXITS: frozenset[CodeType] = frozenset(
    method.__code__ for method in (ExitStack.__exit__, ExitStack.close, AsyncExitStack.__aexit__, AsyncExitStack.aclose)
)


def is_entering(frame: FrameType) -> bool:
    """Return whether a stack enters a context manager in this frame."""
    return frame.f_code in _ENTRIES


def stack_of(frame: FrameType) -> object:
    """Return the stack whose method runs in this frame, or None."""
    return frame.f_locals.get("self")


def is_leaving(frame: FrameType, stack: object) -> bool:
    """Return whether `stack` leaves its context managers in this frame."""
    return frame.f_code in _EXITS and frame.f_locals.get("self") is stack


def is_about_to_leave(trace: TracebackType, stack: object) -> bool:
    """Return whether an `async with` statement was interrupted after it called `__aexit__`, and before it awaited the result.

    `stack` is a local variable there. The coroutine of its `__aexit__` has not started, so it has no frame in the traceback.
    """
    steps, at = trace.tb_frame.f_code.co_code, trace.tb_lasti
    if steps[at] != _GET_AWAITABLE:
        at += 2
        while steps[at : at + 1] == _CACHE:
            at += 2
    if steps[at : at + 2] != _AWAIT_EXIT:
        return False
    # Not before: `f_locals` keeps a copy of the variables in the frame, and so an exception that is one of them.
    return any(value is stack for value in trace.tb_frame.f_locals.values())


_GET_AWAITABLE = dis.opmap["GET_AWAITABLE"]
_AWAIT_EXIT = bytes((_GET_AWAITABLE, 2))
"""The documentation of `dis` says that it comes after a call to `__aexit__`."""
_CACHE = bytes((dis.opmap["CACHE"],))
