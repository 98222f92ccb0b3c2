"""The data manager of one unit of work, across all its databases."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from inspect import unwrap
from itertools import chain, count
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from sqlalchemy.exc import PendingRollbackError
from transaction.interfaces import IRetryDataManager, ISavepointDataManager
from zope.interface import implementer

from app_db._compat.clocks import monotonic
from app_db._databases.database import NEVER
from app_db._databases.holders import Line, Taken, line_of
from app_db._databases.time_limits import TimeLimit
from app_db._liveness import always
from app_db._two_phase.decision_logs import DecisionLogs
from app_db._two_phase.xids import Xid, new_unit_id
from app_db._units.branches import Branch, BranchSession, SessionDataManager, position
from app_db._units.commit import commit_branches, commit_one_by_one, commit_or_log, flush_for_good, unpreparable
from app_db._units.manager import TransactionManager, retryable
from app_db._units.off_loop import BranchOffLoop
from app_db._units.overlays import OverlaidSession, Overlay
from app_db._units.savepoints import WorkSavepoint
from app_db.errors import (
    InvalidUse,
    NotAtomic,
    TransactionLost,
    UnitOfWorkDoomed,
    UnitOfWorkEnded,
    UnknownConnection,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction
    from transaction import Transaction

    from app_db._two_phase.decisions import DecisionLog
    from app_db._units.hooks import CapturedHooks, Hooks
    from app_db._units.interfaces import BranchConfig, UnitContext
    from app_db._units.owned_transactions import AwaitedTransaction, Owner

log = logging.getLogger("app_db")

_numbers = count(1)


@implementer(ISavepointDataManager, IRetryDataManager)
class Work:
    """The sessions and branches of one unit of work. To zope it is one data manager, which commits or aborts all of them."""

    asynchronous = False
    """Whether it was begun by `async with`, so that its end can await coroutines."""
    read_only = False
    isolation: str | None = None
    time_limit: TimeLimit | None = None
    timed = False
    """Whether the unit has a deadline."""
    hooks: Hooks | None = None
    begun_by: Callable[..., object] | Line | None = None
    """The function that runs in the unit, or the line of the block."""
    liveness: Callable[[], object] = staticmethod(always)
    """Returns None when the block that has to end the unit is gone."""
    outer: Transaction | None = None
    """The transaction of the unit that waits for this one to end."""
    finishing = False
    """Whether the unit itself is ending transactions, so that sessions and connections allow it."""
    flushing = False
    """Whether sessions are in their last flush, and may still begin."""
    decided = False
    """Whether the unit commits in all its databases, even if this process stops now."""
    _doomed_by: BaseException | str | None = None
    is_vetoed = False
    """Whether `unit.doom()` was called."""
    _joined = False
    _committing = False
    ended = False
    """Whether it has committed."""
    _unit_id: str | None = None

    def __init__(self, transaction: Transaction, coordinator: UnitContext) -> None:
        self.transaction = transaction
        self.number = next(_numbers)
        self.sessions: dict[str, Any] = {}
        """The sessions that were asked for, sync and async."""
        self.connections: dict[str, Branch] = {}
        """The branches that begin without a session."""
        self.branches: list[Branch] = []
        self.overlays: list[Overlay] = []
        self.savepoints: list[WorkSavepoint] = []
        self.errors_afterwards: list[Exception] = []
        self.interruption: BaseException | None = None
        self._named: dict[str, Branch] = {}
        self.checked_out: Taken = []
        """Connections that sessions have taken out of their pools, and may not have begun on."""
        self.visitors: dict[str, tuple[Owner, object]] = {}
        """The thread that takes part in the unit without owning it, if there is one."""
        self.open_blocks: set[object] = set()
        """The blocks that take part in the unit and have not ended."""
        self.rehearsal = coordinator.rehearsal
        """The isolated test in which the unit runs, if there is one."""
        self._coordinator = coordinator
        transaction.set_data(coordinator, self)

    def get(self) -> Work:
        """Return this object, which zope.sqlalchemy uses as its transaction. Raises UnitOfWorkEnded if the unit has ended."""
        with suppress(KeyError):
            known: object = self.transaction.data(self._coordinator)
            if known is self and not self.ended:
                return self
        raise UnitOfWorkEnded("The unit of work")  # for example while a thread waited for a connection

    @property
    def manager(self) -> TransactionManager:
        return self._coordinator.manager

    @property
    def captures(self) -> list[CapturedHooks]:
        """The lists that collect on_commit hooks instead of running them. The last one is used."""
        return self._coordinator.captures

    # -- what branches ask

    @property
    def places(self) -> DecisionLogs:
        """Where the decision about the unit can be written."""
        return self._coordinator.places()

    def name_unit(self, decided_in: DecisionLog) -> str:
        """Return the unit's id. If it has none yet, make one that contains the id of the log `decided_in`."""
        if self._unit_id is None:
            self._unit_id = new_unit_id(decided_in.id)
        return self._unit_id

    @property
    def unit_id(self) -> str:
        """The id of the unit, in the decision log and in every xid of its branches."""
        return self._unit_id or self.name_unit(self.places.configured)

    def xid_for(self, branch: Branch) -> Xid:
        numbered = (f"{branch.name}.{number}" for number in range(2, 10))  # several sessions may use one database
        for name in (branch.name, *numbered):
            holder = self._named.get(name)
            if holder is None or holder.finished:  # rolled back to a savepoint
                self._named[name] = branch
                return Xid(self._coordinator.application(), self.unit_id, name)
        raise InvalidUse(f"The unit of work has more than 9 sessions of the connection {branch.name!r}", "Let it use fewer")

    # -- what zope.sqlalchemy asks of a transaction

    def join(self, data_manager: SessionDataManager) -> None:
        """Make a session's data manager the one of its branch. zope.sqlalchemy calls this."""
        session = data_manager.session
        branch = session.branch
        if branch is None:
            kind = BranchOffLoop if self.asynchronous and not session.config.asynchronous else Branch
            branch = session.branch = kind(self, session.config)
            self.add(branch)
        branch.join(data_manager)

    # -- what sessions ask

    def new_branch(self, config: BranchConfig, make_session: Callable[[], BranchSession] | None = None) -> Branch:
        kind = BranchOffLoop if self.asynchronous and not config.asynchronous else Branch
        return kind(self, config, make_session)

    def add(self, branch: Branch) -> None:
        if not self._joined:
            self.transaction.join(self)
            self._joined = True
        if branch.config.asynchronous:
            cast("AwaitedTransaction", self.transaction).awaits = True
        self.branches.append(branch)

    def overlay(self, session: OverlaidSession, transaction: SessionTransaction, *, asynchronous: bool) -> Overlay:
        """Add a session that uses the connections of the branches, and return its overlay."""
        if not self._joined:
            self.transaction.join(self)
            self._joined = True
        if asynchronous:
            cast("AwaitedTransaction", self.transaction).awaits = True
        overlay = Overlay(session, transaction, blocks_loop=self.asynchronous and not asynchronous)
        self.overlays.append(overlay)
        return overlay

    def is_open(self, branch: Branch | None = None) -> bool:
        """Return whether a session may begin or go on. While branches are being committed, only a session with a branch may."""
        status = self.transaction.status
        if status == "Committing":
            return self._joined and not self.ended and (branch is not None or not self._committing)
        return status in ("Active", "Doomed")

    @property
    def begun_at(self) -> Line | None:
        """The line that began the unit, or the first one of the function that runs in it. Spelled for logs and errors."""
        begun = self.begun_by
        return begun if begun is None or isinstance(begun, Line) else line_of(unwrap(begun))

    def owner(self) -> str:
        """Return the description of the unit's owner, for errors."""
        return str(getattr(self.transaction, "owner", "another thread"))

    def is_under_way(self) -> bool:
        """Return whether the unit has not ended."""
        try:
            return self.transaction.data(self._coordinator) is self and not self.ended
        except KeyError:
            return False

    @property
    def has_committed(self) -> bool:
        """Whether the unit has committed, or is decided to."""
        return self.ended or self.decided

    def limit(self, timeout: float) -> None:
        """Limit the unit to `timeout` seconds from now. An earlier deadline stays."""
        deadline = monotonic() + timeout
        if self.time_limit is None or deadline < self.time_limit.deadline:
            self.set_deadline(timeout, deadline)

    def set_deadline(self, timeout: float, deadline: float) -> None:
        """Set the unit's deadline, and limit the statements of its connections."""
        self.note_deadline(timeout, deadline)
        for branch in self.branches:
            branch.apply_time_limit()

    def note_deadline(self, timeout: float, deadline: float) -> None:
        """Set the unit's deadline, without telling the databases."""
        if self.time_limit is None:
            self.time_limit = TimeLimit(self.is_under_way)
        self.time_limit.set(timeout, deadline)
        self.timed = deadline < NEVER

    def doom(self, reason: BaseException | str) -> None:
        """Make sure that the unit is not committed, and keep the first reason."""
        if self._doomed_by is None:
            self._doomed_by = reason
        if self.transaction.status == "Active":
            self.transaction.doom()

    def refuse_doomed(self) -> None:
        reason = self._doomed_by
        if isinstance(reason, BaseException):
            summary = str(reason).partition("\n")[0]
            raise UnitOfWorkDoomed(f"an inner unit failed with {type(reason).__name__}: {summary}") from reason
        if reason is not None or self.transaction.isDoomed():
            raise UnitOfWorkDoomed(reason or "its zope transaction was doomed")
        if self.transaction.status == "Commit failed":
            raise UnitOfWorkDoomed("a savepoint of it could not be taken or rolled back")

    # -- what zope asks of a data manager

    def sortKey(self) -> str:  # noqa: N802  # zope's name
        return "~~app_db"  # last of all data managers: a one-phase commit can't be undone

    def should_retry(self, error: BaseException) -> bool:
        return retryable(error)

    def tpc_begin(self, transaction: Transaction) -> None:
        self.finishing = self.flushing = True
        if self._doomed_by is not None:
            self.refuse_doomed()  # zope ignores a doom() in a before-commit hook
        self._flush()

    def commit(self, transaction: Transaction) -> None:
        if len(self.branches) > 1:
            self._flush()  # a session's flush may have changed another session
        self._refuse_what_cannot_commit()
        if len(self.branches) > 1:
            self._refuse_partial_commit()

    def tpc_vote(self, transaction: Transaction) -> None:
        if len(self.branches) > 1 or self.overlays:
            if len(self.branches) > 1:
                self._flush()  # other data managers may have written while they voted
                self._refuse_what_cannot_commit()
            flush_for_good(self.overlays, self.branches)
            self._refuse_partial_commit()  # again, because listeners and other data managers may have written
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
        """Do nothing: `tpc_vote` has committed."""

    def tpc_abort(self, transaction: Transaction) -> None:
        self.abort(transaction)

    def abort(self, transaction: Transaction) -> None:
        """Roll back every branch, and commit the autonomous ones.

        zope calls this for the whole transaction, more than once when a commit fails. zope also
        calls it for a savepoint that is older than the first session. The unit goes on then, and
        sessions join again.
        """
        self.finishing = True
        if self._committing and not self.ended:
            written = [branch for branch in self.branches if branch.wrote]
            self.decided = self.decided or (bool(written) and all(branch.committed for branch in written))
        interruption: BaseException | None = None
        for overlay in self.overlays:
            try:
                overlay.roll_back()
            except BaseException as error:  # noqa: BLE001  # raised below, as for branches
                interruption = error
        for branch in sorted(self.branches, key=position):
            try:
                if branch.config.autonomous and not branch.tried:
                    commit_or_log(branch)
                branch.roll_back()
            except BaseException as error:  # noqa: BLE001  # raised below, after the other connections were returned
                branch.abandon_work()  # it may have been interrupted before it returned its connection
                interruption = error
        self.branches.clear()
        self.connections.clear()
        self.overlays.clear()
        self._named.clear()
        self.savepoints.clear()
        self._joined = self.finishing = self.flushing = False
        if interruption is not None:
            raise interruption

    def roll_back(self, branch: Branch) -> None:
        """Roll back a branch that wrote nothing. The unit goes on, and the branch's session may join it again."""
        before, self.finishing = self.finishing, True
        try:
            branch.roll_back()
        finally:
            self.finishing = before
        self.branches.remove(branch)

    def restart(self, branch: Branch, end: Callable[[], None]) -> None:
        """End the transaction of a branch by `end`. Its session goes on, in another branch."""
        before, self.finishing = self.finishing, True
        try:
            branch.restart(end)
        finally:
            self.finishing = before
        self.branches.remove(branch)

    def roll_back_connection(self, name: str) -> None:
        """Undo what the unit has done on one connection. The unit goes on, and so do the sessions of the connection."""
        self._require_connection(name)
        branches = [branch for branch in self.branches if branch.name == name]
        if any(savepoint.has_any(branches) for savepoint in self.savepoints):
            raise InvalidUse(
                f"The connection {name!r} can't be rolled back alone inside a nested unit or after a savepoint that includes it",
                "Roll back to the savepoint",
            )
        for overlay in [overlay for overlay in self.overlays if branches]:
            if overlay.has_lost_transaction():
                raise InvalidUse(
                    "The session that finds its connection failed to flush, and has forgotten its changes to all connections",
                    "Let the unit of work fail, or use the sessions of the connections",
                )
            overlay.flush()  # what is for the other connections
            self._rolled_back(overlay)
        for branch in branches:
            if branch.session is None:
                self.roll_back(branch)
            else:
                branch.session.undo()

    def _rolled_back(self, overlay: Overlay) -> None:
        before, self.finishing = self.finishing, True
        try:
            overlay.roll_back()
        finally:
            self.finishing = before
        self.overlays.remove(overlay)

    def _require_connection(self, name: str) -> None:
        """Raise an error unless a connection of this name has a transaction of its own."""
        known = self._coordinator.connections()
        if name not in known:
            raise UnknownConnection(name, sorted(known))
        lender = known[name]
        if lender is not None:
            raise InvalidUse(
                f"The connection {name!r} can't be rolled back alone, because it shares the transaction of {lender!r}",
                f"Roll back {lender!r}, which undoes the work of both",
            )

    def abandon(self) -> None:
        """Return the connections of a unit whose block was torn down.

        Sessions and drivers may have been interrupted halfway, so sessions are not used, and
        nothing is sent on a connection that may still wait for an answer.
        """
        for branch in self.branches:
            branch.abandon_work()
        self.branches.clear()
        self.connections.clear()
        for overlay in self.overlays:
            overlay.abandon()
        self.overlays.clear()
        if self.checked_out:
            self._give_back_connections()

    def _give_back_connections(self) -> None:
        """Return connections of sessions that were interrupted before they joined."""
        while self.checked_out:
            reference, may_be_rolled_back = self.checked_out.pop()
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
        self.abandon()  # branches are left if zope was interrupted before it rolled them back
        self._named.clear()
        self.sessions.clear()

    def _end_overlays(self) -> None:
        """End the sessions that used the branches' connections."""
        for overlay in self.overlays:
            try:
                overlay.end()
            except Exception as error:
                log.exception("A unit of work has committed, and then a listener of its session failed")
                self.errors_afterwards.append(error)
        self.overlays.clear()

    def savepoint(self) -> WorkSavepoint:
        """Take a savepoint on every branch that has them."""
        for overlay in self.overlays:  # first: a savepoint can't undo what is flushed after it
            overlay.flush()
        savepoint = WorkSavepoint(self, [*(branch for branch in self.branches if branch.has_savepoints), *self.overlays])
        self.savepoints.append(savepoint)
        return savepoint

    def last_savepoint(self) -> WorkSavepoint | None:
        """Return the newest savepoint that still exists, or None."""
        return self.savepoints[-1] if self.savepoints else None

    # -- how it ends

    def _flush(self) -> None:
        # A flush may make another session join, which this loop then reaches.
        for part in chain[Overlay | Branch](self.overlays, self.branches):
            try:
                part.flush()
            except PendingRollbackError as error:  # an earlier flush failed, and its error was swallowed
                if not self._may_be_rolled_back_alone(part):
                    raise TransactionLost(part.name) from error

    def _refuse_what_cannot_commit(self) -> None:
        if self.time_limit is not None:
            self.time_limit.refuse_overtime()
        for part in list(chain[Overlay | Branch](self.overlays, self.branches)):
            if part.has_lost_transaction():
                if not self._may_be_rolled_back_alone(part):
                    raise part.lost() if isinstance(part, Branch) else TransactionLost(part.name)
                self.roll_back(part)

    def _may_be_rolled_back_alone(self, part: Overlay | Branch) -> TypeGuard[Branch]:
        """Return whether a lost transaction does not doom the unit: nothing of it is lost, and others go on."""
        return isinstance(part, Branch) and part.lost_nothing and (part.config.read_only or len(self.branches) > 1)

    def may_write_to_several(self) -> bool:
        """Return whether a unit may write to several databases that have to commit together."""
        return self.rehearsal is None and self._coordinator.may_write_to_several()

    def _ask_who_wrote(self) -> None:
        """Ask the databases which of them the unit has written to, where more than one of them may have been written to."""
        may_have_written = [branch for branch in self.branches if not (branch.read_only or branch.config.autonomous)]
        if len(may_have_written) > 1 and (self._coordinator.atomicity() == "strict" or any(b.can_prepare for b in self.branches)):
            for branch in may_have_written:
                branch.ask_whether_it_wrote()

    def _that_wrote_alone(self) -> list[Branch]:
        return [branch for branch in unpreparable(self.branches) if branch.wrote]

    def _refuse_partial_commit(self) -> None:
        if len(self.branches) < 2:
            return
        self._ask_who_wrote()
        alone = self._that_wrote_alone()
        if len(alone) > 1 and self._coordinator.atomicity() == "strict":
            for branch in alone:
                branch.ask_whether_it_wrote(also_if_certain=True)
            alone = self._that_wrote_alone()
        if len(alone) > 1 and self._coordinator.atomicity() == "strict":
            by_threads = {branch.name for branch in alone if not branch.config.asynchronous}
            raise NotAtomic(
                sorted(
                    f"{branch.name} (async)" if branch.config.asynchronous and branch.name in by_threads else branch.name
                    for branch in alone
                ),
                self.places.variable("connections", "name", "two_phase"),
                self.places.variable("atomicity"),
            )
