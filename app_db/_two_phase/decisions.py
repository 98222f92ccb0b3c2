"""Where the decision about a unit of work is written, so that no crash can lose it.

A decision stands under its unit's id, and whoever writes first wins: the committer, who writes commit once every branch is
prepared, or a recovery, which writes abort before it rolls anything back. Both obey what stands.

A unit is decided in one log, and in no other: its id begins with that log's. A unit that had to be named before its log was
known, and is decided in another one, has MOVED: the log that it begins with says so, from before anything is prepared.

A unit about which nothing stands has not committed. So a decision to commit may be forgotten only when no branch of the unit is
prepared any more, and one to abort only when no committer can come to ask.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from app_db._two_phase.xids import check_connection_name, check_log_id, check_unit_id


class Verdict(StrEnum):
    """What becomes of a unit of work."""

    COMMIT = "commit"
    ABORT = "abort"
    MOVED = "moved"
    """It is decided in another log."""


@dataclass(frozen=True)
class Decision:
    """What stands about one unit of work. What has the wrong form raises ValueError, so that all of it is harmless in SQL."""

    unit: str
    verdict: Verdict
    branches: tuple[str, ...]
    """The connections of its prepared branches. If it has moved, the id of the log that decides comes before them."""
    decided_at: float

    def __post_init__(self) -> None:
        check_unit_id(self.unit)
        if self.verdict is Verdict.MOVED:
            check_log_id(self.moved_to)
        for connection in self.connections:
            check_connection_name(connection)

    @property
    def moved_to(self) -> str:
        """The id of the log that decides instead, or nothing."""
        return self.branches[0] if self.verdict is Verdict.MOVED and self.branches else ""

    @property
    def connections(self) -> tuple[str, ...]:
        """The connections of its prepared branches."""
        return self.branches[1:] if self.verdict is Verdict.MOVED else self.branches


class DecisionLog(Protocol):
    """Keeps decisions, one for each unit. Threads and processes may share it."""

    @property
    def place(self) -> str:
        """Where the log is, as people are told."""
        ...

    @property
    def id(self) -> str:
        """The application's id of the log, which stays; asking for it makes the log. It is durable by then."""
        ...

    def id_if_made(self) -> str | None:
        """Return the id of a log that is there. Looking makes nothing."""
        ...

    def decide(self, unit: str, verdict: Verdict, branches: Sequence[str]) -> Verdict:
        """Write a verdict unless one stands; return the one that stands. It is durable by then.

        After an error it is not known whether the verdict stands. Asking again is safe.
        """
        ...

    def find(self, unit: str) -> Verdict | None:
        """Return the verdict that stands about a unit, if there is one."""
        ...

    def decision(self, unit: str) -> Decision | None:
        """Return all that stands about a unit, if something does."""
        ...

    def decisions(self) -> list[Decision]:
        """Return all decisions that stand, oldest first."""
        ...

    def forget(self, units: Collection[str]) -> None:
        """Remove what stands about `units`. A crash may bring it back."""
        ...


def made(unit: str, verdict: Verdict, branches: Iterable[str]) -> Decision:
    return Decision(unit, verdict, tuple(branches), time.time())


def by_age(decision: Decision) -> tuple[float, str]:
    return decision.decided_at, decision.unit


def batches(units: Collection[str], size: int) -> Iterator[list[str]]:
    ordered = sorted(map(check_unit_id, units))  # two that forget the same rows then meet in the same order, and don't deadlock
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
