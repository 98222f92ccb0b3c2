"""A warning for units of work that are open for too long without a connection: those that have one are named with it."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

from app_db._compat.clocks import monotonic
from app_db._databases.holders import Warner, holder_logs

if TYPE_CHECKING:
    from app_db._units.work import Work

log = logging.getLogger("app_db")


_tellers: dict[int, HeldUnits] = {}
"""By the number of a unit that is logged: what logs it. A unit may have asked for sessions of several connections."""


class HeldUnits:
    """The open units that have asked for the session of a connection with HELD_WARNING."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._units: dict[int, tuple[weakref.ref[Work], float]] = {}
        self._told: dict[int, str] = {}
        self._warner = Warner(self, seconds)

    def note(self, work: Work) -> None:
        """Look after a unit until it ends."""
        self._units.setdefault(work.number, (weakref.ref(work), monotonic()))
        self._warner.ensure()

    def warn(self) -> bool:
        """Log each unit once that is open for too long, and again when it has ended. Return whether any is open."""
        now = monotonic()
        with_connection = {holder.unit for holders in list(holder_logs) for holder in holders.holders()}
        for number, (unit, since) in self._units.copy().items():
            work = unit()
            if work is None or not work.is_under_way():
                del self._units[number]
                if told := self._told.pop(number, None):
                    _tellers.pop(number, None)
                    log.warning("Ended after about %.1f s: %s", now - since, told, extra=_names(number))
            elif (
                now - since >= self._seconds
                and number not in self._told
                and number not in with_connection
                and _tellers.setdefault(number, self) is self
            ):
                begun = "" if work.begun_at is None else f", begun at {work.begun_at}"
                self._told[number] = f"unit {number} of {work.owner()}{begun}"
                log.warning("Open for %.1f s, without a connection: %s", now - since, self._told[number], extra=_names(number))
        return bool(self._units)


def _names(number: int) -> dict[str, object]:
    """Return what records of other warnings have, too, so that one format is good for all."""
    return {"connection": None, "unit": number}
