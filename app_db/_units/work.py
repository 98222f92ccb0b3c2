"""What one unit of work did in its databases, and how that ends together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, cast
from weakref import ReferenceType, ref

from sqlalchemy.exc import PendingRollbackError
from transaction.interfaces import IRetryDataManager, ISavepointDataManager
from zope.interface import implementer

from app_db._databases.database import NEVER
from app_db._liveness import always
from app_db._two_phase.decision_places import DecisionPlaces
from app_db._two_phase.xids import Xid, new_unit_id
from app_db._units.branches import Branch, position
from app_db._units.commit import commit_branches, commit_one_by_one, commit_or_log, flush_for_good, unpreparable
from app_db._units.manager import retryable
from app_db._units.off_loop import BranchOffLoop
from app_db._units.overlays import OverlaidSession, Overlay
from app_db._units.savepoints import WorkSavepoint
from app_db.errors import (
    InvalidUse,
    NotAtomic,
    TransactionLost,
    UnitOfWorkDoomed,
    UnitOfWorkEnded,
    UnitOfWorkTimeout,
)

if TYPE_CHECKING:
    from sqlalchemy.pool import PoolProxiedConnection
    from transaction import Transaction

    from app_db._two_phase.decisions import DecisionLog
    from app_db._units.hooks import CapturedHooks, Hooks
    from app_db._units.interfaces import BranchConfig, UnitContext
    from app_db._units.owned_transactions import AwaitedTransaction

log = logging.getLogger("app_db")


@implementer(ISavepointDataManager, IRetryDataManager)
class Work:
    """What one unit of work did in the databases: its sessions and branches, and how they end together."""

    asynchronous = False
    """Whether it was begun by `async with`, so that its end can wait for coroutines."""
    read_only = False
    isolation: str | None = None
    timeout = NEVER
    deadline = NEVER
    timed = False
    """Whether the unit has a timeout."""
    hooks: Hooks | None = None
    liveness: Callable[[], object] = staticmethod(always)
    """Returns None when the block is gone that would have ended the unit."""
    outer: Transaction | None = None
    """The transaction of the unit that waits for this one to end."""
    finishing = False
    """Whether it is the unit that ends transactions now, so that sessions and connections let it."""
    flushing = False
    """Whether sessions are flushed for the last time, and may still begin."""
    decided = False
    """Whether it is certain that the unit commits, in all of its databases, even if this process stops now."""
    _doomed_by: BaseException | str | None = None
    _joined = False
    _committing = False
    ended = False
    """Whether it has committed."""
    _unit_id: str | None = None

    def __init__(self, transaction: Transaction, coordinator: UnitContext) -> None:
        self.transaction = transaction
        self.sessions: dict[str, Any] = {}
        """The sessions that were asked for, of threads and of coroutines."""
        self.connections: dict[str, Branch] = {}
        """The branches that have begun, or will, without a session."""
        self.branches: list[Branch] = []
        self.overlays: list[Overlay] = []
        self.savepoints: list[WorkSavepoint] = []
        self.errors_afterwards: list[Exception] = []
        self.interruption: BaseException | None = None
        self._named: dict[str, Branch] = {}
        self._checked_out: list[tuple[ReferenceType[PoolProxiedConnection], bool]] = []
        self.visitors: dict[str, Any] = {}
        """The thread that takes part in the unit without owning it, if one does."""
        self.rehearsal = coordinator.rehearsal
        """The test, if one is isolated, in which units only seem to commit."""
        self._coordinator = coordinator
        transaction.set_data(coordinator, self)

    def get(self) -> Work:
        """Return this: to zope.sqlalchemy it is the transaction that is under way. Raise if it has ended."""
        with suppress(KeyError):
            known: object = self.transaction.data(self._coordinator)
            if known is self and not self.ended:
                return self
        raise UnitOfWorkEnded("The unit of work")  # a thread waited for a connection while its unit was aborted, for example

    @property
    def manager(self) -> Any:
        """The transaction manager whose transaction this is."""
        return self._coordinator.manager

    @property
    def captures(self) -> list[CapturedHooks]:
        """Who takes the hooks that would run after a commit: the last of them, if there is one."""
        return self._coordinator.captures

    # -- what branches ask

    @property
    def places(self) -> DecisionPlaces:
        """Where the decision about the unit can be written."""
        return self._coordinator.places()

    def name_unit(self, decided_in: DecisionLog) -> str:
        """Return the unit's name. If it has none yet, it gets one that says in which log it is decided."""
        if self._unit_id is None:
            self._unit_id = new_unit_id(decided_in.id)
        return self._unit_id

    @property
    def unit_id(self) -> str:
        """The name of the unit in the decision log and in every xid of its branches."""
        return self._unit_id or self.name_unit(self.places.configured)

    def xid_for(self, branch: Branch) -> Xid:
        """Return the name by which a database is to know a branch of this unit."""
        numbered = (f"{branch.name}.{number}" for number in range(2, 10))  # several sessions may use one database
        for name in (branch.name, *numbered):
            holder = self._named.get(name)
            if holder is None or holder.finished:  # rolled back to a savepoint
                self._named[name] = branch
                return Xid(self._coordinator.application(), self.unit_id, name)
        raise InvalidUse(f"The unit of work has more than 9 sessions of the connection {branch.name!r}", "Let it use fewer")

    # -- what zope.sqlalchemy asks of a transaction

    def join(self, data_manager: Any) -> None:
        """Take part with a session's data manager."""
        session = data_manager.session
        branch = session.branch
        if branch is None:
            kind = BranchOffLoop if self.asynchronous and not session.config.asynchronous else Branch
            branch = session.branch = kind(self, session.config)
            self.add(branch)
        branch.join(data_manager)

    # -- what sessions ask

    def new_branch(self, config: BranchConfig, make_session: Callable[[], Any] | None = None) -> Branch:
        """Return a branch of the unit that has not begun."""
        kind = BranchOffLoop if self.asynchronous and not config.asynchronous else Branch
        return kind(self, config, make_session)

    def add(self, branch: Branch) -> None:
        """Take part with a branch that begins."""
        if not self._joined:
            self.transaction.join(self)
            self._joined = True
        if branch.config.asynchronous:
            cast("AwaitedTransaction", self.transaction).awaits = True
        self.branches.append(branch)

    def overlay(self, session: OverlaidSession, transaction: Any, *, asynchronous: bool) -> Overlay:
        """Take part with a session that uses the connections of the branches."""
        if not self._joined:
            self.transaction.join(self)
            self._joined = True
        if asynchronous:
            cast("AwaitedTransaction", self.transaction).awaits = True
        overlay = Overlay(session, transaction, blocks_loop=self.asynchronous and not asynchronous)
        self.overlays.append(overlay)
        return overlay

    def is_open(self, branch: Branch | None = None) -> bool:
        """Return whether a session may begin or go on here; once branches are being committed, only what is one of them may."""
        status = self.transaction.status
        if status == "Committing":
            return self._joined and not self.ended and (branch is not None or not self._committing)
        return status in ("Active", "Doomed")

    def owner(self) -> str:
        """Return who owns the unit, where its transaction knows."""
        return str(getattr(self.transaction, "owner", "another thread"))

    def is_under_way(self) -> bool:
        """Return whether this unit of work is under way anywhere."""
        try:
            return self.transaction.data(self._coordinator) is self and not self.ended
        except KeyError:
            return False

    @property
    def has_committed(self) -> bool:
        """Whether the unit has been committed, or certainly will be, whatever fails afterwards."""
        return self.ended or self.decided

    def limit(self, timeout: float) -> None:
        """Give the unit at most `timeout` seconds from now on, or what is left of the time that it has."""
        deadline = time.monotonic() + timeout
        if deadline < self.deadline:
            self.set_deadline(timeout, deadline)

    def set_deadline(self, timeout: float, deadline: float) -> None:
        """Give the unit until `deadline`."""
        self.note_deadline(timeout, deadline)
        for branch in self.branches:
            branch.apply_time_limit()

    def note_deadline(self, timeout: float, deadline: float) -> None:
        """Give the unit until `deadline`, and leave the databases as they are."""
        self.timeout, self.deadline = timeout, deadline
        self.timed = deadline < NEVER

    def doom(self, reason: BaseException | str) -> None:
        """Make sure that the unit is not committed, and remember why. The first reason counts."""
        if self._doomed_by is None:
            self._doomed_by = reason
        if self.transaction.status == "Active":
            self.transaction.doom()

    def refuse_doomed(self) -> None:
        """Raise when the unit must not be committed."""
        reason = self._doomed_by
        if isinstance(reason, BaseException):
            summary = str(reason).partition("\n")[0]
            raise UnitOfWorkDoomed(f"an inner unit failed with {type(reason).__name__}: {summary}") from reason
        if reason is not None or self.transaction.isDoomed():
            raise UnitOfWorkDoomed(reason or "its zope transaction was doomed")
        if self.transaction.status == "Commit failed":
            raise UnitOfWorkDoomed("a savepoint of it could not be taken or rolled back")

    def remaining(self) -> float:
        """Return the seconds that the unit has left."""
        return max(self.deadline - time.monotonic(), 0.0)

    def overtime(self) -> UnitOfWorkTimeout | None:
        """Return the error to raise when the unit has gone on for too long."""
        return UnitOfWorkTimeout(self.timeout) if self.timed and self.remaining() <= 0 else None

    def refuse_overtime(self) -> None:
        """Raise when the unit has gone on for too long."""
        error = self.overtime()
        if error is not None:
            raise error

    # -- what zope asks of a data manager

    def sortKey(self) -> str:  # noqa: N802  # zope's name
        return "~~app_db"  # after everybody else: a one-phase commit can't be taken back

    def should_retry(self, error: BaseException) -> bool:
        return retryable(error)

    def tpc_begin(self, transaction: Transaction) -> None:
        self.finishing = self.flushing = True
        if self._doomed_by is not None:
            self.refuse_doomed()  # zope forgets about it when a before-commit hook dooms
        self._flush()

    def commit(self, transaction: Transaction) -> None:
        if len(self.branches) > 1:
            self._flush()  # what one session's flush added to another that had been flushed
        self._refuse_what_cannot_commit()

    def tpc_vote(self, transaction: Transaction) -> None:
        if len(self.branches) > 1 or self.overlays:
            if len(self.branches) > 1:
                self._flush()  # what other data managers wrote while they voted
                self._refuse_what_cannot_commit()
            flush_for_good(self.overlays, self.branches)
            self._refuse_partial_commit()
        self.flushing = False
        self._committing = True
        if len(self.branches) > 1:
            commit_branches(self)
        else:
            commit_one_by_one([*self.branches])
        self.ended = True
        self.branches.clear()
        self.connections.clear()
        if self.overlays:
            self._end_overlays()
        self.sessions.clear()

    def tpc_finish(self, transaction: Transaction) -> None:
        """All is done by the vote."""

    def tpc_abort(self, transaction: Transaction) -> None:
        self.abort(transaction)

    def abort(self, transaction: Transaction) -> None:
        """Roll back every branch but the autonomous ones, which are committed.

        zope calls this for the whole transaction, more than once when a commit fails, and also for a savepoint older than
        the first session: after that the unit goes on, and sessions join anew.
        """
        self.finishing = True
        if self._committing and not self.ended:
            written = [branch for branch in self.branches if branch.wrote]
            self.decided = self.decided or (bool(written) and all(branch.committed for branch in written))
        interruption: BaseException | None = None
        for overlay in self.overlays:
            try:
                overlay.roll_back()
            except BaseException as error:  # noqa: BLE001  # the same
                interruption = error
        for branch in sorted(self.branches, key=position):
            try:
                if branch.config.autonomous and not branch.tried:
                    commit_or_log(branch)
                branch.roll_back()
            except BaseException as error:  # noqa: BLE001  # raised below, once the other connections are returned as well
                branch.abandon_work()  # where it was interrupted before it had done so
                interruption = error
        self.branches.clear()
        self.connections.clear()
        self.overlays.clear()
        self._named.clear()
        self.savepoints.clear()
        self._joined = self.finishing = self.flushing = False
        if interruption is not None:
            raise interruption

    def abandon(self) -> None:
        """Give back the connections of a unit whose block was torn down, without a word to the databases where one may be lost.

        What was in the middle of something may be anywhere in it, so nothing is asked of the sessions.
        """
        for branch in self.branches:
            branch.abandon_work()
        self.branches.clear()
        self.connections.clear()
        for overlay in self.overlays:
            overlay.abandon()
        self.overlays.clear()
        if self._checked_out:
            self._give_back_connections()

    def note_checkout(self, may_be_rolled_back: bool, connection: PoolProxiedConnection) -> None:
        """Note a connection that a session has taken out of its pool, and is about to begin a transaction on."""
        self._checked_out.append((ref(connection), may_be_rolled_back))

    def _give_back_connections(self) -> None:
        """Give back connections that sessions had taken when they were interrupted, before they could join."""
        while self._checked_out:
            reference, may_be_rolled_back = self._checked_out.pop()
            connection = reference()
            if connection is None or not connection.is_valid:
                continue
            try:
                if may_be_rolled_back and connection.dbapi_connection is not None:
                    connection.dbapi_connection.rollback()
                    connection.close()
                else:
                    connection.invalidate()
            except Exception:
                log.debug("A connection could not be given back", exc_info=True)

    def forget(self) -> None:
        """Let go of sessions and branches once the unit has ended."""
        self.abandon()  # there is something left if zope was interrupted before it had asked for it to be rolled back
        self._named.clear()
        self.sessions.clear()

    def _end_overlays(self) -> None:
        """Detach the objects of sessions that used the branches' connections."""
        for overlay in self.overlays:
            try:
                overlay.end()
            except Exception as error:
                log.exception("A unit of work has committed, and then a listener of its session failed")
                self.errors_afterwards.append(error)
        self.overlays.clear()

    def savepoint(self) -> WorkSavepoint:
        """Take a savepoint on every branch that has them."""
        for overlay in self.overlays:  # first: what is pending there is no part of what the savepoint can undo
            overlay.flush()
        savepoint = WorkSavepoint(self, [*(branch for branch in self.branches if branch.has_savepoints), *self.overlays])
        self.savepoints.append(savepoint)
        return savepoint

    def last_savepoint(self) -> WorkSavepoint | None:
        """Return the savepoint that was taken last and neither released nor rolled back past."""
        return self.savepoints[-1] if self.savepoints else None

    # -- how it ends

    def _flush(self) -> None:
        # A flush may make another session join, which this loop then reaches.
        for part in chain[Overlay | Branch](self.overlays, self.branches):
            try:
                part.flush()
            except PendingRollbackError as error:  # an earlier flush failed, and its error was swallowed
                raise TransactionLost(part.name) from error

    def _refuse_what_cannot_commit(self) -> None:
        if self.timed:
            self.refuse_overtime()
        for part in chain[Overlay | Branch](self.overlays, self.branches):
            if part.has_lost_transaction():
                raise TransactionLost(part.name)
        if len(self.branches) > 1:
            self._ask_who_wrote()
            self._refuse_partial_commit()

    def _ask_who_wrote(self) -> None:
        """Ask the databases which of them the unit has written to, where more than one of them may have been written to."""
        may_have_written = [branch for branch in self.branches if not (branch.read_only or branch.config.autonomous)]
        if len(may_have_written) > 1 and (self._coordinator.atomicity() == "strict" or any(b.can_prepare for b in self.branches)):
            for branch in may_have_written:
                branch.ask_whether_it_wrote()

    def _refuse_partial_commit(self) -> None:
        alone = [branch for branch in unpreparable(self.branches) if branch.wrote]
        if len(alone) > 1 and self._coordinator.atomicity() == "strict":
            by_threads = {branch.name for branch in alone if not branch.config.asynchronous}
            raise NotAtomic(
                sorted(
                    f"{branch.name} (async)" if branch.config.asynchronous and branch.name in by_threads else branch.name
                    for branch in alone
                )
            )
