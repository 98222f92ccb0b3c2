"""The clock for time limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

_own = getattr(time, "clock_gettime", None)

monotonic: Callable[[], float] = partial(time.monotonic) if _own is None else partial(_own, time.CLOCK_MONOTONIC)
"""Return the seconds since some moment, also in tests that make time stand still or jump.

freezegun replaces `time.monotonic` wherever it finds it, so that a wait for a lock would never end, and a unit would be late at
once. It leaves this function alone. On Windows, which has no `clock_gettime`, so do tests that freeze time after app_db's import.
"""
