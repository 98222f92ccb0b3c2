"""Frames of the interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

frame_at = sys._getframe
"""Return the frame so many calls above the caller. It is documented, for CPython; functions of `inspect` are slower."""


def caller_of(frame: FrameType) -> str:
    """Return the name of the module that called the function of a frame; an empty text if nothing did, as in a greenlet."""
    return "" if frame.f_back is None else str(frame.f_back.f_globals.get("__name__", ""))


def frames_of_waiting_greenlets() -> Iterator[FrameType]:
    """Yield the frame in which each greenlet waits that waits for the calling one to end: the stack goes on there."""
    if "greenlet" not in sys.modules:
        return
    from greenlet import getcurrent  # type: ignore[import-untyped]

    waiting = getcurrent().parent
    while waiting is not None:
        if waiting.gr_frame is not None:
            yield waiting.gr_frame
        waiting = waiting.parent


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those above it. Above the first frame of a greenlet, the stack goes on where a coroutine waits for it."""
    waiting = frames_of_waiting_greenlets()
    while frame is not None:
        yield frame
        frame = frame.f_back or next(waiting, None)
