"""Interruptions by a timer's signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Alarm(Exception):
    """What a signal handler raises, which is no BaseException: SQLAlchemy closes the connection after those by itself."""


def ring(number: int, frame: FrameType | None) -> None:
    """Handle a signal as Celery's soft time limit does."""
    raise Alarm


@contextmanager
def alarm(seconds: float, handler: Callable[[int, FrameType | None], None] = ring) -> Iterator[None]:
    """Send the main thread a signal after so many seconds. The usual handler raises Alarm there."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
