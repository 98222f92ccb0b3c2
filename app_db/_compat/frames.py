"""Frames of the interpreter."""

from __future__ import annotations

import sys

frame_at = sys._getframe
"""Return the frame so many calls above the caller. It is documented, for CPython; functions of `inspect` are slower."""
