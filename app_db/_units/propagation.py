"""What a block of code is to units of work: it begins one of its own, takes part in the one under way, or neither."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError, PendingRollbackError

from app_db._databases.interruptions import came_from_outside, interrupted_again
from app_db._liveness import Liveness, always, tear_down
from app_db._units.coordinator import Coordinator, Work
from app_db._units.manager import (
    AwaitedTransaction,
    ContextTransactionManager,
    OwnedTransaction,
    Owner,
    current,
    is_of_this_process,
    regain,
    retryable,
    suspend,
)
from app_db._units.options import Options, Propagation
from app_db._units.unit_of_work import UnitOfWork
from app_db.errors import AlreadyInUnitOfWork, CommitUnconfirmed, HookFailed, InvalidUse, NoUnitOfWork, UnitOfWorkInUse

if TYPE_CHECKING:
    from transaction import Transaction as ZopeTransaction

log = logging.getLogger("app_db")


class Role:
    """What a block is to units of work while it runs."""

    may_pass = False
    """Whether the block failed for a reason that may pass, and can be run again: asked before the unit is aborted."""
    _resume: Callable[[], None] | None = None
    """What takes up the unit that waits for the block to end."""

    def __init__(
        self, coordinator: Coordinator, options: Options, outer: ZopeTransaction | None, liveness: Liveness, asynchronous: bool
    ) -> None:
        self.coordinator = coordinator
        self.options = options
        self.outer = outer
        self.asynchronous = asynchronous
        self.liveness = liveness
        liveness.torn = self

    def enter(self) -> UnitOfWork:
        """Begin what the block is, and return what it gives to the application."""
        return UnitOfWork(None)

    def leave(self, error: BaseException | None) -> None:
        """End what `enter` has begun."""

    def _take_up_outer(self) -> None:
        """Go on with the unit that waited, if one did."""
        if self._resume is not None:
            self._resume()
            self._resume = None

    def torn_down(self) -> None:
        """Clean up: the `with` statement is gone without having left the block. After `leave` it changes nothing."""

    def held_by(self, liveness: Liveness) -> None:
        """Be alive as long as another `with` statement runs from now on."""
        before, self.liveness = self.liveness, liveness
        liveness.torn, before.torn = self, None

    def is_alive(self) -> object:
        """Return None when the `with` statement is gone."""
        return self.liveness()

    def waits_to_begin(self) -> bool:
        """Return whether its beginning, and then its end, may have to wait for a database."""
        return False

    def waits_to_end(self) -> bool:
        """Return whether its end may have to wait for a database."""
        return self.waits_to_begin()

    def fails_by(self, error: BaseException) -> bool:
        """Return whether an error that leaves the block means that its work is not to be kept."""
        return not isinstance(error, self.options.commit_on)


class OutsideUnits(Role):
    """Run without a unit of work; one that is under way waits."""

    def enter(self) -> UnitOfWork:
        manager = self.coordinator.manager
        if self.outer is not None or (isinstance(manager, ContextTransactionManager) and manager.inherited() is not None):
            self._resume = suspend(manager, self.is_alive)
        return UnitOfWork(None)

    def leave(self, error: BaseException | None) -> None:
        self._take_up_outer()

    def torn_down(self) -> None:
        self._take_up_outer()


class OwnUnit(Role):
    """Begin a unit of work, and commit or abort it; one that is under way waits."""

    transaction: Any = None
    """The zope transaction, once there is one."""
    work: Work

    def waits_to_end(self) -> bool:
        return True

    def enter(self) -> UnitOfWork:
        options, manager = self.options, self.coordinator.manager
        if isinstance(manager, ContextTransactionManager):
            self.transaction = manager.prepare_block(self.liveness, awaited=self.asynchronous)
            manager.begin_block(self.transaction)
        else:
            self._begin_under(manager)
        work = self.work = Work(self.transaction, self.coordinator)
        work.liveness = self.liveness
        work.outer = self.outer
        work.asynchronous = self.asynchronous
        if options.read_only:
            work.read_only = True
        if options.isolation is not None:
            work.isolation = options.isolation
        if options.timeout is not None:
            work.limit(options.timeout)
        return UnitOfWork(work)

    def _begin_under(self, manager: Any) -> None:
        """Begin under a manager of zope's, which knows nothing of blocks."""
        if self.asynchronous:
            raise InvalidUse(
                f"`async with` can't begin a unit under a {type(manager).__name__}, because tasks would share its transaction",
                "Give the container no other manager",
            )
        try:
            if self.outer is not None:
                self._resume = suspend(manager, always)
            self.transaction = manager.begin()
        except BaseException:
            begun = current(manager)  # interrupted after that, or a synchronizer failed: the next block would join it
            if begun is not None and begun is not self.outer:
                self._abort(begun)
            self._take_up_outer()
            raise

    def held_by(self, liveness: Liveness) -> None:
        super().held_by(liveness)
        if (
            isinstance(self.transaction, OwnedTransaction)
            and self.transaction.liveness is not always
            and not self.transaction.ended
        ):
            self.transaction.liveness = liveness

    def leave(self, error: BaseException | None) -> None:
        """Commit the unit if the block returned, abort it if the block raised, and raise what is left to be told."""
        try:
            manager = self.coordinator.manager
            is_current = isinstance(manager, ContextTransactionManager) and manager.is_current(self.transaction)
            if not is_current and not self._is_current_again(error):
                return
            if error is not None and self.fails_by(error):
                self._abort_for(error)
            else:
                try:
                    if self.transaction.status != "Active":
                        self.work.refuse_doomed()
                    self.transaction.commit()  # calls Work.tpc_begin, commit, tpc_vote and tpc_finish
                except BaseException as failure:
                    if not self._ends_although(failure):
                        raise
            work = self.work
            if work.interruption is not None or work.errors_afterwards or work.hooks is not None:
                self._tell_what_followed(error)
        finally:
            if self._resume is not None:
                self._take_up_outer()

    def torn_down(self) -> None:
        if self.transaction is not None and not is_of_this_process(self.transaction):
            return  # a forked child leaves its parent's connections alone
        work: Work | None = getattr(self, "work", None)  # unless it was interrupted before there was any
        if work is not None:
            work.abandon()
        if self.transaction is not None and not self._is_over():
            log.warning("A unit of work is aborted: its block has gone without being left, by a signal handler's exception, say")
            self._end_torn(work)
        self._take_up_outer()

    def _is_over(self) -> bool:
        if isinstance(self.transaction, OwnedTransaction):
            return self.transaction.ended
        return current(self.coordinator.manager) is not self.transaction

    def _end_torn(self, work: Work | None) -> None:
        if work is not None and work.hooks is not None and work.has_committed:
            work.hooks.has_committed = True
        try:
            if isinstance(self.transaction, AwaitedTransaction):
                self.transaction.abort_torn_down()
            else:
                self.transaction.abort()
        except Exception:
            log.exception("Aborting a unit of work raised an error of its own")
        if work is not None:
            work.forget()

    def _is_current_again(self, error: BaseException | None) -> bool:
        """Make the unit the current one. Where it can't be, abort it, and raise why unless the block raised; return False."""
        try:
            regain(self.coordinator.manager, self.transaction)
        except Exception:
            # The block ends in another task than it began in, for example. Nothing else will end its unit.
            if self.work.is_under_way() and is_of_this_process(self.transaction):
                self._abort(self.transaction)
                self.work.forget()
            if error is None:
                raise
            return False
        return True

    def _tell_what_followed(self, error: BaseException | None) -> None:
        """Raise what interrupted the end of the unit, or what failed after it had committed."""
        hooks, failed = self.work.hooks, self.work.errors_afterwards
        if self.work.interruption is not None:
            if self.work.has_committed:
                self.work.interruption.add_note(_COMMITTED_ALL_THE_SAME)
            raise self.work.interruption
        if hooks is not None:
            if self.work.has_committed:
                hooks.run_what_is_left()
            if hooks.interruption is not None:
                raise hooks.interruption
            failed = [*failed, *hooks.errors]
        if failed and error is None:
            self._raise_afterwards(failed)

    def _raise_afterwards(self, errors: list[Exception]) -> None:
        if len(errors) == 1 and isinstance(errors[0], CommitUnconfirmed):
            raise errors[0]
        raise HookFailed(errors) from errors[0]

    def _ends_although(self, failure: BaseException) -> bool:
        """End the unit after its commit failed. Return whether it has committed all the same, and the failure is told later."""
        if self.work.has_committed:
            if self.work.hooks is not None:
                self.work.hooks.has_committed = True  # the unit has to be aborted for zope to end it
            if self.transaction.status == "Committed":
                self._end_after_commit(failure)
                return True
            failure.add_note(_COMMITTED_ALL_THE_SAME)
        self._abort_for(failure)
        return False

    def _end_after_commit(self, error: BaseException) -> None:
        """Let go of a unit that has committed, although zope was kept from saying so: by a synchronizer that failed, say."""
        log.error("A unit of work has committed, and then something failed before it had ended", exc_info=error)
        if isinstance(error, Exception) and not came_from_outside(error):
            self.work.errors_afterwards.append(error)
        else:
            self.work.interruption = error
        self._abort(self.transaction)

    def _abort_for(self, error: BaseException) -> None:
        # Retryability has to be asked before abort: afterwards the data managers that would know are gone.
        repeatable = isinstance(error, Exception) and not self.work.has_committed
        self.may_pass = repeatable and not self._is_over() and bool(self.transaction.isRetryableError(error))
        for branch in self.work.branches:
            branch.close_if_interrupted(error)
        self._abort(self.transaction)
        self.work.forget()

    def _abort(self, transaction: ZopeTransaction) -> None:
        try:
            transaction.abort()
        except Exception as error:
            if came_from_outside(error):
                raise
            log.exception("Aborting a unit of work raised an error of its own")


_COMMITTED_ALL_THE_SAME = (
    "app_db: the databases had committed when this came from another data manager, or from outside. Don't repeat the unit."
)


class Participant(Role):
    """Take part in the unit that is under way; a failure dooms it."""

    outer: ZopeTransaction
    work: Work
    _time_before: tuple[float, float] | None = None
    _is_open = False
    """Whether the block's code may have run, so that the unit can't commit unless the block is left properly."""

    def waits_to_begin(self) -> bool:
        return self.options.timeout is not None

    def enter(self) -> UnitOfWork:
        work = self.work = self.coordinator.work_of(self.outer)
        if isinstance(self.outer, AwaitedTransaction) and self.waits_to_begin():
            self.outer.require_bridge_or_thread("A block with a savepoint or a timeout, inside a unit of coroutines,")
        wanted = self.options.isolation
        if wanted is not None and wanted != work.isolation:
            raise InvalidUse(
                f"isolation={wanted!r} can't be had inside a unit of work that runs with "
                f"{work.isolation or 'the default isolation'}",
                "Give the outermost unit this isolation, or this one propagation='requires_new'",
            )
        self._begin_visit()
        if self.options.timeout is not None:
            self._time_before = (work.timeout, work.deadline)
            work.limit(self.options.timeout)
        self._begin()
        self._is_open = True
        return UnitOfWork(self.work)

    def leave(self, error: BaseException | None) -> None:
        self._end(error)
        self._end_visit()
        if self._time_before is not None:
            self._give_time_back(self._time_before)
        if error is not None and self.options.attempts > 1 and retryable(error):
            error.add_note(
                "app_db: not tried again here, because this block is a part of an outer unit of work, "
                "which has to be repeated as a whole. Put attempts on the outermost unit."
            )

    def torn_down(self) -> None:
        self._end_visit()
        if self._is_open:
            self._is_open = False
            if self._time_before is not None:
                self.work.note_deadline(*self._time_before)
            self.work.doom("an exception came from outside while an inner block was entered or left")

    def _begin(self) -> None:
        """Begin what the block has of its own."""

    def _end(self, error: BaseException | None) -> None:
        if error is not None and self.fails_by(error):
            self.work.doom(error)

    def _begin_visit(self) -> None:
        """Note that a thread takes part that does not own the unit; at most one may do so at a time."""
        owner = getattr(self.outer, "owner", None)
        if owner is None or owner.is_this_thread():
            return
        visitor = self.work.visitors.setdefault("thread", (Owner(), self))
        if not visitor[0].is_this_thread():
            raise UnitOfWorkInUse(str(Owner()), str(visitor[0]))

    def _end_visit(self) -> None:
        work: Work | None = getattr(self, "work", None)  # unless it was interrupted before it knew
        visitor = None if work is None else work.visitors.get("thread")
        if visitor is not None and visitor[1] is self:
            del self.work.visitors["thread"]

    def _give_time_back(self, before: tuple[float, float]) -> None:
        try:
            self.work.set_deadline(*before)
        except (DBAPIError, PendingRollbackError):
            log.debug("A statement failed in the inner unit, so that its time limit could not be lifted", exc_info=True)


class NestedParticipant(Participant):
    """Take part in the unit that is under way, inside a savepoint: a failure undoes this block's work only."""

    def waits_to_begin(self) -> bool:
        return True

    def _begin(self) -> None:
        self._is_open = True  # what interrupts this may have kept zope from saying that the unit was rolled back
        before = self.work.last_savepoint()
        self._savepoint = self.outer.savepoint(optimistic=True)  # a data manager without savepoints fails when it matters
        after = self.work.last_savepoint()
        self._across_databases = None if after is before else after

    def _end(self, error: BaseException | None) -> None:
        if error is not None and self.fails_by(error):
            self._roll_back(error)
            return
        try:
            if self._across_databases is not None:
                self._across_databases.release()
        except DBAPIError:
            self._roll_back()
            self._is_open = False
            raise

    def _roll_back(self, error: BaseException | None = None) -> None:
        if error is not None and interrupted_again(error):
            self.work.doom(error)  # SQLAlchemy was undoing something by itself, and may have stopped halfway
        if self._time_before is not None:
            self.work.note_deadline(*self._time_before)  # the block's own may be over, and that must not keep it from this
        try:
            self._savepoint.rollback()
            if self._across_databases is not None:
                self._across_databases.release()
        except Exception as failure:
            log.warning("Rolling back to a savepoint failed, so the whole unit of work can't commit", exc_info=True)
            self.work.doom(failure)


class Refused(Role):
    """Raise the error that says why the block can't run here."""

    def enter(self) -> UnitOfWork:
        subject = f"A block with propagation={self.options.propagation.value!r}"
        if self.outer is None:
            raise NoUnitOfWork(subject)
        raise AlreadyInUnitOfWork(subject)


_ROLES: dict[Propagation, tuple[type[Role], type[Role]]] = {
    # propagation: (where a unit is under way, where none is)
    Propagation.REQUIRED: (Participant, OwnUnit),
    Propagation.REQUIRES_NEW: (OwnUnit, OwnUnit),
    Propagation.NESTED: (NestedParticipant, OwnUnit),
    Propagation.MANDATORY: (Participant, Refused),
    Propagation.SUPPORTS: (Participant, OutsideUnits),
    Propagation.NOT_SUPPORTED: (OutsideUnits, OutsideUnits),
    Propagation.NEVER: (Refused, OutsideUnits),
}

_TAKES_PART = frozenset({Participant, NestedParticipant})


def role_for(coordinator: Coordinator, options: Options, liveness: Liveness, *, asynchronous: bool = False) -> Role:
    """Return the role of a block with these options, here and now."""
    manager = coordinator.manager
    inside, outside = _ROLES[options.propagation]
    if isinstance(manager, ContextTransactionManager):
        # In a task that was begun inside a unit, a unit of its own would commit whatever becomes of the outer one.
        outer = manager.current_or_refuse() if inside in _TAKES_PART else manager.current()
    else:
        outer = current(manager)
        if outer is not None:
            tear_down(coordinator.work_of(outer).liveness)  # zope's managers don't ask whether its block still runs
            outer = current(manager)
    return (outside if outer is None else inside)(coordinator, options, outer, liveness, asynchronous)
