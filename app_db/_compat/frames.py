"""Frames of the interpreter."""

from __future__ import annotations

import sys

frame_at = sys._getframe
"""Return the frame so many calls above the caller. Python documents it, for CPython; `inspect` has nothing as cheap."""
