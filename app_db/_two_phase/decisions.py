"""The durable record of whether a unit of work commits, kept so that no crash can lose it.

A log keeps at most one decision for a unit. The process that commits the unit writes `commit` once every branch is prepared. A
recovery writes `abort` before it rolls a branch back. The first decision stands, and both processes carry it out.

Each unit is decided in one log, and its id begins with the id of that log. A unit may get its id before its log is known. If
another log then decides it, the first log gets the decision MOVED before any branch is prepared.

A unit without a decision has not committed. So a decision to commit may be removed only when no branch of the unit is prepared
any more, and a decision to abort only when no committing process can ask for it any more.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from operator import attrgetter
from typing import Any

from sqlalchemy import Column, Double, MetaData, String, Table, Text
from sqlalchemy.exc import DBAPIError, IntegrityError

from app_db._databases.database import Rows
from app_db._two_phase.xids import check_connection_name, check_log_id, check_unit_id, log_id_for


class Verdict(StrEnum):
    """What becomes of a unit of work."""

    COMMIT = "commit"
    ABORT = "abort"
    MOVED = "moved"
    """Another log decides."""


@dataclass(frozen=True)
class Decision:
    """A decision about one unit of work. Values of the wrong form raise ValueError, so all of them are safe in SQL."""

    unit: str
    verdict: Verdict
    branches: tuple[str, ...]
    """The connections of the unit's prepared branches. Where `verdict` is MOVED, the id of the deciding log comes first."""
    decided_at: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        check_unit_id(self.unit)
        if self.verdict is Verdict.MOVED:
            check_log_id(self.moved_to)
        for connection in self.connections:
            check_connection_name(connection)

    @property
    def moved_to(self) -> str:
        """The id of the log that decides instead; empty unless `verdict` is MOVED."""
        return self.branches[0] if self.verdict is Verdict.MOVED and self.branches else ""

    @property
    def connections(self) -> tuple[str, ...]:
        """The connections of the unit's prepared branches."""
        return self.branches[1:] if self.verdict is Verdict.MOVED else self.branches

    def as_row(self) -> str:
        """Return the values of the decision's row, in SQL."""
        return f"'{self.unit}', '{self.verdict}', '{','.join(self.branches)}', {self.decided_at!r}"


# ---- the SQL of all logs ------------------------------------------------------------------------------------------------


TABLE = "app_db_decisions"
INSERT = f"INSERT INTO {TABLE} (unit, verdict, branches, decided_at)"
SELECT = f"SELECT unit, verdict, branches, decided_at FROM {TABLE}"  # noqa: S608  # constants

_ID_ROW = "log"
"""The key of the row with the id of the log. Ids of units are longer."""

SELECT_ID = f"SELECT branches FROM {TABLE} WHERE unit = '{_ID_ROW}'"  # noqa: S608  # constants

_BATCH = 500
"""How many decisions one statement removes."""


@cache
def decisions_table() -> Table:
    """Return the table of decisions."""
    from sqlalchemy.dialects import mysql  # imported here because it takes longer than all modules of app_db

    # By default MySQL ignores case when it compares text, and its default engine may be one without transactions.
    return Table(
        TABLE,
        MetaData(),
        Column(
            "unit",
            String(32).with_variant(mysql.VARCHAR(32, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"),
            primary_key=True,
        ),
        Column("verdict", String(8), nullable=False),
        Column("branches", Text, nullable=False),
        Column("decided_at", Double, nullable=False),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )


def insert_id(log: str) -> str:
    """Return the statement that writes the row with the log's id."""
    return f"{INSERT} VALUES ('{_ID_ROW}', 'id', '{check_log_id(log)}', {time.time()!r})"


class DecisionLog(ABC):
    """A store of decisions, at most one for each unit, in a table. Threads and processes may share it.

    Subclasses say how a statement is executed.
    """

    place: str
    """Where the log is, for messages."""

    _attempts = 5

    def __init__(self, application: str) -> None:
        self._application = application

    @property
    def id(self) -> str:
        """The application's id of the log, which never changes. Creates the log if needed, durably."""
        return log_id_for(self._application, self.ensure())

    def id_if_made(self) -> str | None:
        """Return the id of the log, or None if the log does not exist. Creates nothing."""
        found = self._read(SELECT_ID)
        return log_id_for(self._application, check_log_id(found[0][0])) if found else None

    @abstractmethod
    def ensure(self) -> str:
        """Create the table and the row with the log's id unless they exist. Return the content of that row."""

    def decide(self, unit: str, verdict: Verdict, branches: Sequence[str]) -> Verdict:
        """Write a verdict in a transaction of its own, unless the unit has one. Return the verdict that stands, which is durable.

        After an error it is not known whether the verdict was written. It is safe to call this again.
        """
        decision = Decision(unit, verdict, tuple(branches))
        self.ensure()
        return self._decide(decision)

    def find(self, unit: str) -> Verdict | None:
        """Return the verdict about a unit, or None."""
        found = self.decision(unit)
        return None if found is None else found.verdict

    def decision(self, unit: str) -> Decision | None:
        """Return the decision about a unit, or None."""
        rows = self._read(f"{SELECT} WHERE unit = '{check_unit_id(unit)}'")
        return self._decision_of(rows[0]) if rows else None

    def decisions(self) -> list[Decision]:
        """Return all decisions, oldest first."""
        rows = self._read(f"{SELECT} WHERE unit <> '{_ID_ROW}'")
        return sorted(map(self._decision_of, rows), key=attrgetter("decided_at", "unit"))

    def forget(self, units: Collection[str]) -> None:
        """Remove the decisions about `units`. After a crash they may be there again."""
        ordered = sorted(map(check_unit_id, units))  # two processes that remove the same rows in one order don't deadlock
        for start in range(0, len(ordered), _BATCH):
            listed = ", ".join(f"'{unit}'" for unit in ordered[start : start + _BATCH])
            self._write(f"DELETE FROM {TABLE} WHERE unit IN ({listed})")  # noqa: S608  # checked

    def _decide(self, decision: Decision) -> Verdict:
        for attempt in range(1, self._attempts + 1):
            try:
                self._write(self._insert(decision))
                return decision.verdict
            except DBAPIError as error:
                refused = isinstance(error, IntegrityError)
                standing = self.find(decision.unit) if refused else None
                if standing is not None:
                    return standing
                # The decision that was in the way is gone again, or ours was lost with its connection or rolled back. Writing
                # it again is safe, because the first decision stands.
                if attempt == self._attempts or not (refused or error.connection_invalidated or self._is_victim(error)):
                    raise
        raise AssertionError("unreachable")

    def _insert(self, decision: Decision) -> str:
        """Return the statement that writes a decision. The table refuses a second one about the same unit."""
        return f"{INSERT} VALUES ({decision.as_row()})"

    def _decision_of(self, row: Sequence[Any]) -> Decision:
        unit, verdict, branches, decided_at = row
        return Decision(unit, Verdict(verdict), tuple(filter(None, branches.split(","))), decided_at)

    def _is_victim(self, error: DBAPIError) -> bool:
        """Return whether the database rolled the transaction back in favour of another one, as after a deadlock."""
        return False

    @abstractmethod
    def _write(self, statement: str) -> None:
        """Execute one statement and commit it. Raise IntegrityError if the unit has a decision."""

    @abstractmethod
    def _read(self, statement: str) -> Rows:
        """Return the rows of one statement; none if there is no table."""
