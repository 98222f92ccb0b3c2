"""Recovery: commit or roll back the branches that a crash left prepared, as it was decided about their units.

It is safe to run at any time and from any host, while units commit and while other recoveries run. Before it rolls a branch back,
it writes `abort` into the log in which the committing process (the committer) writes `commit`, and the first decision stands.
The id of a unit begins with the id of that log, unless the log says that the unit has moved to another one. A unit of an unknown
log is left alone: it belongs to another host or deployment, whose recovery knows the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from app_db._compat.clocks import monotonic
from app_db._databases.containers import Container
from app_db._databases.prepare_verbs import Prepared, PrepareVerbs, Settling
from app_db._databases.telling import described
from app_db._two_phase.decision_logs import DecisionLogs
from app_db._two_phase.decisions import Decision, DecisionLog, Verdict
from app_db._two_phase.xids import Xid, log_of
from app_db.settings import DatabaseSettings

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

log = logging.getLogger("app_db")

OnUnit = Callable[[int, int], None]
"""Is told how many units are done, and how many there are."""

GRACE = 10.0
"""Seconds for which a prepared branch is left to its committer. Without it, recovery would abort units that are committing."""

KEEP_COMMITS = 3600.0
"""Seconds for which a decision to commit is kept although no branch needs it: its committer may still ask for it."""

KEEP_ABORTS = 7 * 24 * 3600.0
"""The same for a decision to abort. A committer that was suspended for days learns from it that it came too late."""

_HELD_FOR = 0.5
"""Seconds for which recovery retries a branch that is held elsewhere, most often by another recovery."""


# ---- what was found -----------------------------------------------------------------------------------------------------


class BranchState(StrEnum):
    """What became of a branch."""

    PREPARED = "prepared"
    """Prepared; recovery has not tried to settle it."""
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    GONE = "settled by another process"
    HELD = "held by another connection"
    """The connection that prepared it is open, or another process is settling it."""
    FAILED = "not settled"
    """The database refused, or could not be reached."""


_SETTLED = frozenset({BranchState.COMMITTED, BranchState.ROLLED_BACK, BranchState.GONE})


@dataclass
class BranchInDoubt:
    """A branch that was found prepared, and what became of it."""

    xid: Xid
    connections: list[str]
    """The connections whose databases list it, in the order in which they are tried."""
    prepared_at: float | None = None
    """Seconds since the epoch; None if the database does not say."""
    owner: str | None = None
    """The database user that prepared it; None if the database does not say."""
    state: BranchState = BranchState.PREPARED
    reason: str = ""
    """Why it was not settled."""

    @property
    def connection(self) -> str:
        """The connection to whose database it belongs."""
        return self.connections[0]

    @property
    def is_settled(self) -> bool:
        """Whether it is no longer prepared."""
        return self.state in _SETTLED


@dataclass
class UnitInDoubt:
    """A unit of work with prepared branches."""

    unit: str
    begun_at: float
    """Seconds since the epoch, by the clock of the host that it ran on."""
    branches: list[BranchInDoubt] = field(default_factory=list)
    verdict: Verdict | None = None
    """How it ends; in a dry run, how it would end."""
    reason: str = ""
    """Why it was left alone."""
    is_under_way: bool = False
    """Whether it is so young that its committer may still be running."""

    @property
    def log(self) -> str:
        """The id of the log with which its own id begins."""
        return log_of(self.unit)

    @property
    def connections(self) -> list[str]:
        """The connections of its prepared branches."""
        return sorted({branch.xid.connection_name for branch in self.branches})

    @property
    def is_settled(self) -> bool:
        """Whether no branch is prepared any more."""
        return all(branch.is_settled for branch in self.branches)


@dataclass
class Settlement:
    """What a recovery found and did."""

    units: list[UnitInDoubt] = field(default_factory=list)
    """Oldest first."""
    unreachable: dict[str, str] = field(default_factory=dict)
    """Connections and logs that could not be reached, and why."""
    forgotten: int = 0
    """How many decisions were removed; in a dry run, how many would be."""

    @property
    def left(self) -> bool:
        """Whether something is, or may be, left to settle, apart from units that are under way."""
        return bool(self.unreachable) or not all(unit.is_settled or unit.is_under_way for unit in self.units)

    @property
    def under_way(self) -> set[str]:
        """The units that were left to their committers."""
        return {unit.unit for unit in self.units if unit.is_under_way}

    def followed_by(self, later: Settlement) -> Settlement:
        """Return both as one. A unit that `later` does not list any more was settled by another process."""
        known = {unit.unit for unit in self.units}
        units = {unit.unit: unit for unit in self.units if not unit.is_under_way}
        if not later.unreachable:
            for branch in (branch for unit in units.values() for branch in unit.branches if not branch.is_settled):
                branch.state = BranchState.GONE
        units |= {unit.unit: unit for unit in later.units if unit.unit in known or not unit.is_under_way}
        return Settlement(_by_age(units.values()), later.unreachable, self.forgotten + later.forgotten)


def _by_age(units: Iterable[UnitInDoubt]) -> list[UnitInDoubt]:
    return sorted(units, key=lambda unit: (unit.begun_at, unit.unit))


# ---- recovery -----------------------------------------------------------------------------------------------------------


class Recovery:
    """Finds and settles the branches of this application that are in doubt: `container.recovery()`."""

    def __init__(self, settings: Callable[[], DatabaseSettings], decision_logs: DecisionLogs) -> None:
        self._settings = settings
        self._logs = decision_logs

    def in_doubt(self) -> list[UnitInDoubt]:
        """Return the units that have prepared branches now. Units that are committing at this moment are among them.

        A database that can't be reached is an error, so an empty list means that there are none.
        """
        return self._in_doubt()

    def settle(self, *, grace: float = GRACE, dry_run: bool = False, on_unit: OnUnit | None = None) -> Settlement:
        """Commit or roll back all branches that are in doubt. Return what was found and done, and what was left.

        A unit that was prepared less than `grace` seconds ago is left to its committer. If the committer does not end it, this
        waits until the unit is old enough, for at most 10 s. `dry_run` changes nothing and does not wait. `on_unit`
        is called after each unit, with how many are done and how many there are.
        """
        began = monotonic()
        if not self._logs.two_phase():
            return Settlement()
        settlement = self._settle_once(grace, set(), dry_run, on_unit)
        pause, watched = 0.05, 0.0
        while settlement.under_way and not dry_run and watched < min(grace, GRACE):
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
            watched = monotonic() - began
            # By the clock of this host, because that of the database may differ: after so long, the committer is dead.
            dead = settlement.under_way if watched >= grace else set[str]()
            before = len(settlement.units) - len(settlement.under_way)
            settlement = settlement.followed_by(self._settle_once(grace, dead, dry_run, on_unit, before))
        return settlement

    def _settle_once(self, grace: float, dead: set[str], dry_run: bool, on_unit: OnUnit | None, before: int = 0) -> Settlement:
        """Do all steps of a recovery once: read the logs, find prepared branches, find out or decide how each unit ends, carry
        that out, and remove decisions that are no longer needed.

        The logs are read before the databases are asked. A decision that was read, and whose branches are not prepared
        afterwards, has been carried out. `before` is how many units earlier rounds have done.
        """
        settlement = Settlement()
        logs = self._existing_logs(settlement.unreachable)
        decisions = self._decisions(logs, settlement.unreachable)
        settlement.units = self._in_doubt(settlement.unreachable)
        total = before + len(settlement.units)
        for unit in settlement.units:
            unit.is_under_way = unit.unit not in dead and _is_young(unit, grace)
            if dry_run or not unit.is_under_way:
                unit.verdict = self._verdict(unit, unit.log, logs, dry_run)
            if unit.is_under_way:
                unit.reason = f"it was prepared less than {grace:g} s ago, and is left to its committer"
            elif unit.verdict is not None and not dry_run:
                self._carry_out(unit, unit.verdict)
            before += not unit.is_under_way
            if on_unit is not None:
                on_unit(before, total)
        settlement.forgotten = self._forget(decisions, settlement, dry_run)
        return settlement

    # -- finding

    def _existing_logs(self, unreachable: dict[str, str]) -> dict[str, DecisionLog]:
        """Return the logs that exist, by id."""
        found: dict[str, DecisionLog] = {}
        for decision_log in self._logs.all():
            with _noting(decision_log.place, unreachable):
                log_id = decision_log.id_if_made()
                if log_id is not None:
                    found.setdefault(log_id, decision_log)
        return found

    def _decisions(self, logs: dict[str, DecisionLog], unreachable: dict[str, str]) -> dict[DecisionLog, list[Decision]]:
        """Return the decisions about units of this application."""
        found: dict[DecisionLog, list[Decision]] = {}
        for decision_log in logs.values():
            with _noting(decision_log.place, unreachable):
                # Another application may use the same log. What is prepared in its databases is not known here.
                found[decision_log] = [decision for decision in decision_log.decisions() if log_of(decision.unit) in logs]
        return found

    def _in_doubt(self, unreachable: dict[str, str] | None = None) -> list[UnitInDoubt]:
        """Return the units that have prepared branches. A database that can't be reached is noted in `unreachable`, if given."""
        branches: dict[Xid, BranchInDoubt] = {}
        application = self._settings().application
        for name in self._logs.two_phase():
            with _noting(name, unreachable), self._connected(name) as (connection, verbs):
                for found in verbs.prepared(connection):
                    xid = Xid.parse(found.xid)
                    if xid is not None and xid.application == application:
                        _note_branch(branches, xid, found, name)
        units: dict[str, UnitInDoubt] = {}
        for xid, branch in branches.items():
            units.setdefault(xid.unit, UnitInDoubt(xid.unit, xid.begun_at)).branches.append(branch)
        return _by_age(units.values())

    @contextmanager
    def _connected(self, name: str) -> Generator[tuple[Connection, PrepareVerbs]]:
        verbs = self._logs.prepare_verbs(name)
        if verbs is None:
            raise LookupError(f"app_db does not know how {self._logs.driver(name)} prepares")
        with self._logs.engine(name).connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT"), verbs

    # -- deciding

    def _verdict(self, unit: UnitInDoubt, log_id: str, logs: dict[str, DecisionLog], dry_run: bool) -> Verdict | None:
        """Return the verdict about a unit. If there is none, decide that it aborts. If that fails, note why and return None."""
        decision_log = logs.get(log_id)
        if decision_log is None:
            unit.reason = _UNKNOWN_LOG
            return None
        try:
            decision = decision_log.decision(unit.unit)
            if decision is None:
                verdict = Verdict.ABORT if dry_run else decision_log.decide(unit.unit, Verdict.ABORT, unit.connections)
                return self._verdict(unit, log_id, logs, dry_run) if verdict is Verdict.MOVED else verdict
            if decision.verdict is Verdict.MOVED:
                return self._verdict(unit, decision.moved_to, logs, dry_run)
            return decision.verdict
        except Exception as error:
            log.warning("%s can't be asked how %s ends", decision_log.place, unit.unit, exc_info=True)
            unit.reason = (
                "it may have been decided to commit it, or its committer may be doing so at this moment, in "
                f"{decision_log.place} ({described(error)})"
            )
            return None

    # -- carrying out

    def _carry_out(self, unit: UnitInDoubt, verdict: Verdict) -> None:
        for branch in unit.branches:
            for name in branch.connections:
                self._settle_branch(branch, name, verdict)
                if branch.is_settled:
                    break

    def _settle_branch(self, branch: BranchInDoubt, name: str, verdict: Verdict) -> None:
        commit = verdict is Verdict.COMMIT
        until = monotonic() + _HELD_FOR
        try:
            with self._connected(name) as (connection, verbs):
                while (settling := verbs.settle(connection, str(branch.xid), commit=commit)) is Settling.HELD:
                    if monotonic() > until:
                        break
                    time.sleep(0.05)
        except Exception as error:
            log.warning("%s of %r could not be settled", branch.xid, name, exc_info=True)
            branch.state, branch.reason = BranchState.FAILED, described(error)
        else:
            settled = BranchState.COMMITTED if commit else BranchState.ROLLED_BACK
            branch.state, branch.reason = _UNSETTLED.get(settling, settled), ""

    # -- forgetting

    def _forget(self, found: dict[DecisionLog, list[Decision]], settlement: Settlement, dry_run: bool) -> int:
        """Remove the decisions that no process will ask for any more. Return their number."""
        forgotten: set[str] = set()
        prepared = {unit.unit for unit in settlement.units if not unit.is_settled}
        asked = set(self._logs.two_phase()) - set(settlement.unreachable)
        for decision_log, decisions in found.items():
            units = [decision.unit for decision in decisions if decision.unit not in prepared and _is_spent(decision, asked)]
            try:
                if not dry_run:
                    decision_log.forget(units)
                forgotten.update(units)
            except Exception:
                log.warning("Decisions in %s could not be removed", decision_log.place, exc_info=True)
        return len(forgotten)


_UNKNOWN_LOG = (
    "its decision is in another log, or one that can't be reached. Run this where the unit ran, with the settings and in the "
    "directory that it ran with"
)

_UNSETTLED = {Settling.MISSING: BranchState.GONE, Settling.HELD: BranchState.HELD}


def _note_branch(branches: dict[Xid, BranchInDoubt], xid: Xid, found: Prepared, name: str) -> None:
    """Note a branch that the database of a connection lists. Several connections may lead to the same database."""
    branch = branches.setdefault(xid, BranchInDoubt(xid, [], found.prepared_at, found.owner))
    # Its own connection comes first: another connection may have another user, who must not settle it.
    branch.connections.insert(0 if name == xid.connection_name else len(branch.connections), name)


def _is_young(unit: UnitInDoubt, grace: float) -> bool:
    last = max(branch.prepared_at or unit.begun_at for branch in unit.branches)
    return grace > 0 and time.time() - last < grace


def _is_spent(decision: Decision, asked: set[str]) -> bool:
    """Return whether no process will ask for a decision any more, if no branch of it is prepared on the connections `asked`."""
    # Without a decision a unit is rolled back, so only the committer needs a decision to abort.
    is_kept = KEEP_COMMITS if decision.verdict is Verdict.COMMIT else KEEP_ABORTS
    has_been_asked = decision.verdict is Verdict.ABORT or set(decision.connections) <= asked
    return time.time() - decision.decided_at > is_kept and has_been_asked


@contextmanager
def _noting(subject: str, unreachable: dict[str, str] | None) -> Generator[None]:
    """Note in `unreachable` that the block failed, and go on. Raise the error if `unreachable` is None."""
    try:
        yield
    except Exception as error:
        if unreachable is None:
            raise
        log.warning("Recovery can't reach %s", subject, exc_info=True)
        unreachable[subject] = described(error)


def build_recovery(container: Container, decision_logs: DecisionLogs) -> Recovery:
    """Return the recovery of a container's connections, with its present settings."""
    return Recovery(container.settings, decision_logs)
