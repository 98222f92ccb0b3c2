"""Notices that this process has used a connection outside of the isolation, or that a process of its own has ended."""

from __future__ import annotations

import sys

from sqlalchemy import event
from sqlalchemy.pool import Pool

if sys.platform != "win32":
    from resource import RUSAGE_CHILDREN, getrusage


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
    if sys.platform == "win32":
        return checkouts.outside
    children = getrusage(RUSAGE_CHILDREN)
    return checkouts.outside, children.ru_utime, children.ru_stime, children.ru_minflt
