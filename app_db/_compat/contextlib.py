"""contextlib's ExitStack and AsyncExitStack: which stack enters or leaves is read from frames."""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack
from types import CodeType, FrameType

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
