"""Frames of the interpreter."""

from __future__ import annotations

import sys
from types import FrameType

frame_at = sys._getframe
"""Return the frame so many calls above the caller. It is documented, for CPython; functions of `inspect` are slower."""


def caller_of(frame: FrameType) -> str:
    """Return the name of the module that called the function of a frame; an empty text if nothing did, as in a greenlet."""
    return "" if frame.f_back is None else str(frame.f_back.f_globals.get("__name__", ""))
