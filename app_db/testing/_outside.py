"""Notices that this process has used a connection outside of the isolation, or that a process of its own has ended."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

_getrusage: Callable[[], Any] | None = None
try:
    from resource import RUSAGE_CHILDREN, getrusage
except ImportError:  # Windows
    pass
else:
    _getrusage = partial(getrusage, RUSAGE_CHILDREN)


class Checkouts:
    """How often connections were taken from pools."""

    def __init__(self) -> None:
        self._all = 0
        self._isolated = 0

    def watch(self) -> None:
        """Count the connections that any pool of this process gives."""
        if not event.contains(Pool, "checkout", self._note):
            event.listen(Pool, "checkout", self._note)

    def _note(self, *_: object) -> None:
        self._all += 1

    def note_isolated(self) -> None:
        """Note that the isolation itself has taken one, or has given one."""
        self._isolated += 1

    @property
    def outside(self) -> int:
        """How many were taken outside of the isolation."""
        return self._all - self._isolated


checkouts = Checkouts()


def activity() -> object:
    """Return something that differs from what it was if this process may have committed something outside of the isolation."""
    return checkouts.outside, _ended_processes()


def _ended_processes() -> object:
    """Return what the processes that this one has started and waited for have used together. Windows does not say."""
    if _getrusage is None:
        return None
    used = _getrusage()
    return used.ru_utime, used.ru_stime, used.ru_minflt
