"""What a block that does not begin a unit is to the unit under way: it takes part, waits outside, or is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError, PendingRollbackError

from app_db._databases.interruptions import interrupted_again
from app_db._liveness import Liveness
from app_db._units.coordinator import Coordinator
from app_db._units.manager import ContextTransactionManager, retryable, suspend
from app_db._units.options import Options
from app_db._units.owned_transactions import AwaitedTransaction, Owner
from app_db._units.unit_of_work import UnitOfWork
from app_db._units.work import Work
from app_db.errors import AlreadyInUnitOfWork, InvalidUse, NoUnitOfWork, UnitOfWorkInUse

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
