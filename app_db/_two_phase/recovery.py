"""Bring the branches that a crash left prepared to what was decided about their units.

It is safe at any time and from any host, beside units that are committing and beside other recoveries: before a branch is
rolled back, the abort is written where its committer writes the commit, and whoever is first wins. That is the log with whose
id the unit's begins, or the one to which that log says it has moved. A unit of a log that isn't known here is left alone: it
is another host's, or another deployment's, whose recovery knows the log.

The order matters. What stands in the logs is read first, then the databases are asked for prepared branches: a decision whose
branches are not prepared by then has been carried out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from app_db._databases.containers import Container
from app_db._databases.prepare_verbs import Prepared, PrepareVerbs, Settling
from app_db._two_phase.decision_places import DecisionPlaces
from app_db._two_phase.decisions import Decision, DecisionLog, Verdict
from app_db._two_phase.xids import Xid, log_of
from app_db._wording import in_one_line
from app_db.settings import DatabaseSettings

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

log = logging.getLogger("app_db")

GRACE = 10.0
"""Seconds for which a prepared branch is left to its committer. Without, recovery would abort units that are under way."""

KEEP_COMMITS = 3600.0
"""Seconds for which a decision is kept although no branch needs it: its committer may still ask what became of it."""

KEEP_ABORTS = 7 * 24 * 3600.0
"""The same for an abort, by which a committer that was suspended for days learns that it came too late."""

_HELD_FOR = 0.5
"""Seconds for which recovery tries again to settle a branch that somebody else has in hand: most often another recovery."""


# ---- what was found -----------------------------------------------------------------------------------------------------


class BranchState(StrEnum):
    """What became of a branch."""

    PREPARED = "prepared"
    """It is prepared, and nothing was tried."""
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    GONE = "settled by somebody else"
    HELD = "held by somebody else"
    """The connection that prepared it is open, or somebody is settling it."""
    FAILED = "not settled"
    """The database refused, or could not be reached."""


_SETTLED = frozenset({BranchState.COMMITTED, BranchState.ROLLED_BACK, BranchState.GONE})


@dataclass
class BranchInDoubt:
    """A branch that was found prepared, and what became of it."""

    xid: Xid
    connections: list[str]
    """Those whose databases list it; the one that is tried first comes first."""
    prepared_at: float | None = None
    """Seconds since the epoch, where the database tells."""
    owner: str | None = None
    """The database user that prepared it, where the database tells."""
    state: BranchState = BranchState.PREPARED
    reason: str = ""
    """Why it was not settled."""

    @property
    def connection(self) -> str:
        """The connection to whose database it belongs."""
        return self.connections[0]

    @property
    def is_settled(self) -> bool:
        """Whether it is not prepared any more."""
        return self.state in _SETTLED


@dataclass
class UnitInDoubt:
    """A unit of work of which branches were found prepared."""

    unit: str
    begun_at: float
    """Seconds since the epoch, by the clock of the host that it ran on."""
    branches: list[BranchInDoubt] = field(default_factory=list)
    verdict: Verdict | None = None
    """How it ends. In a dry run: how it would end."""
    reason: str = ""
    """Why it was left."""
    is_under_way: bool = False
    """Whether it is so young that its committer is taken to be at work."""

    @property
    def log(self) -> str:
        """The id of the log that knows how it ends."""
        return log_of(self.unit)

    @property
    def connections(self) -> list[str]:
        """The connections whose branches were found."""
        return sorted({_name_of(branch.xid) for branch in self.branches})

    @property
    def is_settled(self) -> bool:
        """Whether none of the branches is prepared any more."""
        return all(branch.is_settled for branch in self.branches)


@dataclass
class Settlement:
    """What a recovery found and did."""

    units: list[UnitInDoubt] = field(default_factory=list)
    """Oldest first."""
    unreachable: dict[str, str] = field(default_factory=dict)
    """Connections and logs that could not be asked, and why."""
    forgotten: int = 0
    """How many decisions were forgotten. In a dry run: how many would be."""

    @property
    def left(self) -> bool:
        """Whether something is, or may be, left to settle that nobody is at work on."""
        return bool(self.unreachable) or not all(unit.is_settled or unit.is_under_way for unit in self.units)

    @property
    def under_way(self) -> set[str]:
        """The units that were left to their committers."""
        return {unit.unit for unit in self.units if unit.is_under_way}

    def followed_by(self, later: Settlement) -> Settlement:
        """Return both as one: what was not settled is what it is later, or has been settled by somebody else."""
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
    """Finds the branches of this application that are in doubt, and settles them: `container.recovery()`."""

    def __init__(self, settings: Callable[[], DatabaseSettings], places: DecisionPlaces) -> None:
        self._settings = settings
        self._places = places

    def in_doubt(self) -> list[UnitInDoubt]:
        """Return the units of which branches are prepared now, those that are committing at this moment included.

        Raises what a database raises that can't be asked: an empty list means that there are none.
        """
        return self._found()

    def settle(self, *, grace: float = GRACE, dry_run: bool = False) -> Settlement:
        """Commit or roll back what is in doubt. What can't be settled is left as it is, and part of what is returned.

        A unit that was prepared less than `grace` seconds ago is left to its committer; if that doesn't end it, this waits, for
        10 s at most, until it is old enough. `dry_run` waits for nobody, changes nothing, and says what would be done.
        """
        began = time.monotonic()
        if not self._places.two_phase():
            return Settlement()
        settlement = self._settle_once(grace, set(), dry_run)
        pause, watched = 0.05, 0.0
        while settlement.under_way and not dry_run and watched < min(grace, GRACE):
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
            watched = time.monotonic() - began
            # By its own clock, for the database's may be another: after this long, nobody is at work on what is still there.
            dead = settlement.under_way if watched >= grace else set[str]()
            settlement = settlement.followed_by(self._settle_once(grace, dead, dry_run))
        return settlement

    def _settle_once(self, grace: float, dead: set[str], dry_run: bool) -> Settlement:
        settlement = Settlement()
        logs = self._logs(settlement.unreachable)
        stands = self._decisions(logs, settlement.unreachable)
        settlement.units = self._found(settlement.unreachable)
        for unit in settlement.units:
            unit.is_under_way = unit.unit not in dead and _is_young(unit, grace)
            if dry_run or not unit.is_under_way:
                unit.verdict = self._verdict(unit, unit.log, logs, dry_run)
            if unit.is_under_way:
                unit.reason = f"it was prepared less than {grace:g} s ago, and is left to its committer"
            elif unit.verdict is not None and not dry_run:
                self._carry_out(unit, unit.verdict)
        settlement.forgotten = self._forget(self._spent(stands, settlement), dry_run)
        return settlement

    # -- finding

    def _logs(self, unreachable: dict[str, str]) -> dict[str, DecisionLog]:
        """Return the logs that are there, by their ids."""
        found: dict[str, DecisionLog] = {}
        for place in self._places.all():
            with _noting(place.place, unreachable):
                log_id = place.id_if_made()
                if log_id is not None:
                    found.setdefault(log_id, place)
        return found

    def _decisions(self, logs: dict[str, DecisionLog], unreachable: dict[str, str]) -> dict[DecisionLog, list[Decision]]:
        """Return what stands about units of this application."""
        found: dict[DecisionLog, list[Decision]] = {}
        for place in logs.values():
            with _noting(place.place, unreachable):
                # Others may keep theirs in the same log, and nobody here knows what is prepared in their databases.
                found[place] = [decision for decision in place.decisions() if log_of(decision.unit) in logs]
        return found

    def _found(self, unreachable: dict[str, str] | None = None) -> list[UnitInDoubt]:
        """Return what is prepared, and note what can't be asked. Without a place to note it, that is an error."""
        branches: dict[Xid, BranchInDoubt] = {}
        application = self._settings().application
        for name in self._places.two_phase():
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
        verbs = self._places.prepare_verbs(name)
        if verbs is None:
            raise LookupError(f"app_db does not know how {self._places.driver(name)} prepares")
        with self._places.engine(name).connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT"), verbs

    # -- deciding

    def _verdict(self, unit: UnitInDoubt, log_id: str, logs: dict[str, DecisionLog], dry_run: bool) -> Verdict | None:
        """Find out how a unit ends, and where nothing stands, decide that it is rolled back. If neither can be, note why."""
        place = logs.get(log_id)
        if place is None:
            unit.reason = _UNKNOWN_LOG
            return None
        try:
            decision = place.decision(unit.unit)
            if decision is None:
                verdict = Verdict.ABORT if dry_run else place.decide(unit.unit, Verdict.ABORT, unit.connections)
                return self._verdict(unit, log_id, logs, dry_run) if verdict is Verdict.MOVED else verdict
            if decision.verdict is Verdict.MOVED:
                return self._verdict(unit, decision.moved_to, logs, dry_run)
            return decision.verdict
        except Exception as error:
            log.warning("It can't be found out in %s how %s ends", place.place, unit.unit, exc_info=True)
            unit.reason = (
                f"it may have been decided to commit it, or its committer may be doing so at this moment, in {place.place} "
                f"({in_one_line(error)})"
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
        until = time.monotonic() + _HELD_FOR
        try:
            with self._connected(name) as (connection, verbs):
                while (came_to := verbs.settle(connection, str(branch.xid), commit=commit)) is Settling.HELD:
                    if time.monotonic() > until:
                        break
                    time.sleep(0.05)
        except Exception as error:
            log.warning("%s of %r could not be settled", branch.xid, name, exc_info=True)
            branch.state, branch.reason = BranchState.FAILED, in_one_line(error)
        else:
            branch.state, branch.reason = _STATES[came_to, verdict], ""

    # -- forgetting

    def _spent(self, stands: dict[DecisionLog, list[Decision]], settlement: Settlement) -> dict[DecisionLog, list[str]]:
        """Return the decisions that nobody will ask for any more."""
        prepared = {unit.unit for unit in settlement.units if not unit.is_settled}
        asked = set(self._places.two_phase()) - set(settlement.unreachable)
        return {
            place: [decision.unit for decision in decisions if decision.unit not in prepared and _is_spent(decision, asked)]
            for place, decisions in stands.items()
        }

    def _forget(self, spent: dict[DecisionLog, list[str]], dry_run: bool) -> int:
        forgotten: set[str] = set()
        for place, units in spent.items():
            try:
                if not dry_run:
                    place.forget(units)
                forgotten.update(units)
            except Exception:
                log.warning("Decisions in %s could not be forgotten", place.place, exc_info=True)
        return len(forgotten)


_UNKNOWN_LOG = (
    "its decision is in another log, or one that can't be reached. Run this where the unit ran, with the settings and in the "
    "directory that it ran with"
)

_STATES = {
    (Settling.DONE, Verdict.COMMIT): BranchState.COMMITTED,
    (Settling.DONE, Verdict.ABORT): BranchState.ROLLED_BACK,
    (Settling.MISSING, Verdict.COMMIT): BranchState.GONE,
    (Settling.MISSING, Verdict.ABORT): BranchState.GONE,
    (Settling.HELD, Verdict.COMMIT): BranchState.HELD,
    (Settling.HELD, Verdict.ABORT): BranchState.HELD,
}


def _note_branch(branches: dict[Xid, BranchInDoubt], xid: Xid, found: Prepared, name: str) -> None:
    """Note a branch that the database of a connection lists, once for all connections that lead there."""
    branch = branches.setdefault(xid, BranchInDoubt(xid, [], found.prepared_at, found.owner))
    # Its own connection comes first: another one may have another user, who must not settle it.
    branch.connections.insert(0 if name == _name_of(xid) else len(branch.connections), name)


def _name_of(xid: Xid) -> str:
    """Return the connection by whose name a branch goes; a unit's second one on the same connection is `writer.2`."""
    return xid.connection.partition(".")[0]


def _is_young(unit: UnitInDoubt, grace: float) -> bool:
    last = max(branch.prepared_at or unit.begun_at for branch in unit.branches)
    return grace > 0 and time.time() - last < grace


def _is_spent(decision: Decision, asked: set[str]) -> bool:
    """Return whether nobody will ask for a decision any more, of whose branches none is prepared on the connections `asked`."""
    # Whoever finds nothing rolls back, so that an abort is for the committer alone: as is where the unit was to be decided,
    # before anything is prepared.
    is_kept = KEEP_COMMITS if decision.verdict is Verdict.COMMIT else KEEP_ABORTS
    has_been_asked = decision.verdict is Verdict.ABORT or set(decision.connections) <= asked
    return time.time() - decision.decided_at > is_kept and has_been_asked


@contextmanager
def _noting(subject: str, unreachable: dict[str, str] | None) -> Generator[None]:
    """Note what can't be asked, and go on."""
    try:
        yield
    except Exception as error:
        if unreachable is None:
            raise
        log.warning("%s can't be asked by recovery", subject, exc_info=True)
        unreachable[subject] = in_one_line(error)


def build_recovery(container: Container, places: DecisionPlaces) -> Recovery:
    """Return the recovery of a container's connections, with the settings as they stand now."""
    return Recovery(container.settings, places)
