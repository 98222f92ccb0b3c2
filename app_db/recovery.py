"""Bring the branches that a crash left prepared to what was decided about their units.

It is safe at any time and from any host, beside units that are committing and beside other recoveries: before a branch is
rolled back, the abort is written wherever its committer may write the commit, and whoever is first wins.

The order matters. What stands in the logs is read first, then the databases are asked for prepared branches: a decision whose
branches are not prepared by then has been carried out. Whether a log is there at all is asked last: a committer makes the log
before it prepares anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from app_db.decision_places import DecisionPlaces
from app_db.decisions import Decision, DecisionLog, Verdict
from app_db.preparing import InDoubtBranch, Prepares, Settling, prepares_of
from app_db.settings import DatabaseSettings
from app_db.xids import Xid

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
        stands = self._decisions(settlement.unreachable)
        settlement.units = self._found(settlement.unreachable)
        own = self._own_log(settlement.unreachable)
        for unit in settlement.units:
            unit.is_under_way = unit.unit not in dead and _is_young(unit, grace)
            if own is not None and not unit.unit.startswith(own):
                unit.reason = "its decision is in another log. Run this with the APP_DB_DECISION_LOG that it ran with"
            elif dry_run or not unit.is_under_way:
                self._decide(unit, settlement.unreachable, dry_run)
            if unit.is_under_way:
                unit.reason = f"it was prepared less than {grace:g} s ago, and is left to its committer"
            elif unit.verdict is not None and not dry_run:
                self._carry_out(unit, unit.verdict)
        if own is not None:
            settlement.forgotten = self._forget(self._spent(stands, own, settlement), dry_run)
        return settlement

    # -- finding

    def _decisions(self, unreachable: dict[str, str]) -> dict[DecisionLog, list[Decision]]:
        found: dict[DecisionLog, list[Decision]] = {}
        for place in self._places.all():
            with _noting(place.place, unreachable):
                if self._places.is_made(place):
                    found[place] = place.decisions()
        return found

    def _found(self, unreachable: dict[str, str] | None = None) -> list[UnitInDoubt]:
        """Return what is prepared, and note what can't be asked. Without a place to note it, that is an error."""
        branches: dict[Xid, BranchInDoubt] = {}
        application = self._settings().application
        for name in self._places.two_phase():
            with _noting(name, unreachable), self._connected(name) as (connection, prepares):
                for found in prepares.in_doubt(connection):
                    if found.xid.application == application:
                        _note_branch(branches, found, name)
        units: dict[str, UnitInDoubt] = {}
        for xid, branch in branches.items():
            units.setdefault(xid.unit, UnitInDoubt(xid.unit, xid.begun_at)).branches.append(branch)
        return _by_age(units.values())

    def _own_log(self, unreachable: dict[str, str]) -> str | None:
        """Return what the ids of all units begin with whose decision may be in these settings' log; None if nobody can say."""
        configured = self._places.configured
        if configured.place not in unreachable:
            with _noting(configured.place, unreachable):
                return configured.id if self._places.is_made(configured) else _NO_LOG
        return None

    @contextmanager
    def _connected(self, name: str) -> Generator[tuple[Connection, Prepares]]:
        prepares = prepares_of(self._places.driver(name))
        if prepares is None:
            raise LookupError(f"app_db does not know how {self._places.driver(name)} prepares")
        with self._places.engine(name).connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT"), prepares

    # -- deciding

    def _decide(self, unit: UnitInDoubt, unreachable: dict[str, str], dry_run: bool) -> None:
        """Find out how the unit ends; where nothing stands, decide that it is rolled back."""
        verdicts, silent = self._verdicts(unit, unreachable)
        if Verdict.COMMIT not in verdicts and not silent and not dry_run:
            verdicts, silent = self._fence(unit)
        if Verdict.COMMIT in verdicts:
            unit.verdict = Verdict.COMMIT
        elif silent:
            unit.reason = f"it may have been decided to commit it: {'; '.join(silent)}"
        else:
            unit.verdict = Verdict.ABORT

    def _verdicts(self, unit: UnitInDoubt, unreachable: dict[str, str]) -> tuple[list[Verdict | None], list[str]]:
        """Return what stands in each place, and the places that don't say."""
        verdicts: list[Verdict | None] = []
        silent: list[str] = []
        for place in self._places.all():
            missing = self._places.missing_file(place)
            if missing is not None:
                silent.append(f"{place.place} is not on this host, or not in this directory ({missing})")
            elif place.place in unreachable:
                silent.append(f"{place.place} can't be reached")
            else:
                try:
                    verdicts.append(place.find(unit.unit))
                except Exception as error:
                    log.warning("%s could not be asked about %s", place.place, unit.unit, exc_info=True)
                    silent.append(f"{place.place} can't be read ({_short(error)})")
        return verdicts, silent

    def _fence(self, unit: UnitInDoubt) -> tuple[list[Verdict | None], list[str]]:
        """Write the abort in each place where the committer may still write its decision, and return what stands there."""
        verdicts: list[Verdict | None] = []
        silent: list[str] = []
        names = sorted({_name_of(branch.xid) for branch in unit.branches})
        for place in self._places.all():
            try:
                if self._places.may_be_decided_in(place):
                    verdicts.append(place.decide(unit.unit, Verdict.ABORT, names))
            except Exception as error:
                log.warning("%s could not be aborted in %s", unit.unit, place.place, exc_info=True)
                silent.append(f"nothing could be written in {place.place}, where its committer may be at work ({_short(error)})")
        return verdicts, silent

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
            with self._connected(name) as (connection, prepares):
                while (came_to := prepares.settle(connection, branch.xid, commit=commit)) is Settling.HELD:
                    if time.monotonic() > until:
                        break
                    time.sleep(0.05)
        except Exception as error:
            log.warning("%s of %r could not be settled", branch.xid, name, exc_info=True)
            branch.state, branch.reason = BranchState.FAILED, _short(error)
        else:
            branch.state, branch.reason = _STATES[came_to, verdict], ""

    # -- forgetting

    def _spent(self, stands: dict[DecisionLog, list[Decision]], own: str, settlement: Settlement) -> dict[DecisionLog, list[str]]:
        """Return the decisions about units of this application that nobody will ask for any more."""
        prepared = {unit.unit for unit in settlement.units if not unit.is_settled}
        asked = set(self._places.two_phase()) - set(settlement.unreachable)
        return {
            place: [
                decision.unit
                for decision in decisions
                # Others may keep theirs in the same table, and nobody here knows what is prepared in their databases.
                if decision.unit.startswith(own) and decision.unit not in prepared and _is_spent(decision, asked)
            ]
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


_NO_LOG = "-"
"""What no unit's id begins with."""

_STATES = {
    (Settling.DONE, Verdict.COMMIT): BranchState.COMMITTED,
    (Settling.DONE, Verdict.ABORT): BranchState.ROLLED_BACK,
    (Settling.MISSING, Verdict.COMMIT): BranchState.GONE,
    (Settling.MISSING, Verdict.ABORT): BranchState.GONE,
    (Settling.HELD, Verdict.COMMIT): BranchState.HELD,
    (Settling.HELD, Verdict.ABORT): BranchState.HELD,
}


def _note_branch(branches: dict[Xid, BranchInDoubt], found: InDoubtBranch, name: str) -> None:
    """Note a branch that the database of a connection lists, once for all connections that lead there."""
    branch = branches.setdefault(found.xid, BranchInDoubt(found.xid, [], found.prepared_at, found.owner))
    # Its own connection comes first: another one may have another user, who must not settle it.
    branch.connections.insert(0 if name == _name_of(found.xid) else len(branch.connections), name)


def _name_of(xid: Xid) -> str:
    """Return the connection by whose name a branch goes; a unit's second one on the same connection is `writer.2`."""
    return xid.connection.partition(".")[0]


def _is_young(unit: UnitInDoubt, grace: float) -> bool:
    last = max(branch.prepared_at or unit.begun_at for branch in unit.branches)
    return grace > 0 and time.time() - last < grace


def _is_spent(decision: Decision, asked: set[str]) -> bool:
    """Return whether nobody will ask for a decision any more, of whose branches none is prepared on the connections `asked`."""
    age = time.time() - decision.decided_at
    if decision.verdict is Verdict.ABORT:
        return age > KEEP_ABORTS  # where nothing stands, the branches are rolled back as well
    return age > KEEP_COMMITS and set(decision.branches) <= asked


@contextmanager
def _noting(subject: str, unreachable: dict[str, str] | None) -> Generator[None]:
    """Note what can't be asked, and go on."""
    try:
        yield
    except Exception as error:
        if unreachable is None:
            raise
        log.warning("%s can't be asked by recovery", subject, exc_info=True)
        unreachable[subject] = _short(error)


def _short(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


class _Container(Protocol):
    def settings(self) -> DatabaseSettings: ...
    def decision_places(self) -> DecisionPlaces: ...


def build_recovery(container: _Container) -> Recovery:
    """Return the recovery of a container's connections, with the settings as they stand now."""
    return Recovery(container.settings, container.decision_places())
