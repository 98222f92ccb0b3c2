"""The roles of blocks that don't begin a unit of work: they take part in one, run outside it, or are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError, PendingRollbackError

from app_db._databases.database import NEVER
from app_db._databases.interruptions import interrupted_again
from app_db._liveness import Liveness
from app_db._units.coordinator import Coordinator
from app_db._units.manager import ContextTransactionManager, retryable, suspend
from app_db._units.options import Options
from app_db._units.owned_transactions import AwaitedTransaction, Owner
from app_db._units.savepoints import require_savepoints_of
from app_db._units.unit_of_work import UnitOfWork
from app_db._units.work import Work
from app_db.errors import AlreadyInUnitOfWork, InvalidUse, NoUnitOfWork, UnitOfWorkInUse

if TYPE_CHECKING:
    from transaction import Transaction as ZopeTransaction

log = logging.getLogger("app_db")


class Role:
    """The part that a block plays in a unit of work."""

    may_pass = False
    """Whether the block failed with a retryable error, and can be run again."""
    begun_by: Callable[..., object] | None = None
    """The function that runs in the block, if the block is there for one."""
    _resume: Callable[[], None] | None = None
    """Makes the outer unit current again, if one waits."""

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
        """Begin, and return the unit that the application gets."""
        return UnitOfWork(None)

    def leave(self, error: BaseException | None) -> None:
        """End what `enter` has begun. `error` is the exception that leaves the block, or None."""

    def _take_up_outer(self) -> None:
        if self._resume is not None:
            self._resume()
            self._resume = None

    def torn_down(self) -> None:
        """Clean up after a `with` statement that is gone without having left the block. After `leave` it does nothing."""

    def held_by(self, liveness: Liveness) -> None:
        """Depend on another `with` statement from now on."""
        before, self.liveness = self.liveness, liveness
        liveness.torn, before.torn = self, None

    def is_alive(self) -> object:
        """Return None when the `with` statement is gone."""
        return self.liveness()

    def waits_to_begin(self) -> bool:
        """Return whether its beginning may wait for a database. Its end may then, too."""
        return False

    def waits_to_end(self) -> bool:
        """Return whether its end may wait for a database."""
        return self.waits_to_begin()

    def fails_by(self, error: BaseException) -> bool:
        """Return whether the work of a block that raises `error` is undone."""
        return not isinstance(error, self.options.commit_on)


class OutsideUnits(Role):
    """Run without a unit of work. An outer unit waits."""

    def enter(self) -> UnitOfWork:
        manager = self.coordinator.manager
        if self.outer is not None or (isinstance(manager, ContextTransactionManager) and manager.may_lead_to_unit()):
            self._resume = suspend(manager, self.is_alive)
        return UnitOfWork(None)

    def leave(self, error: BaseException | None) -> None:
        self._take_up_outer()

    def torn_down(self) -> None:
        self._take_up_outer()


class Participant(Role):
    """Take part in the current unit. A failure dooms it."""

    outer: ZopeTransaction
    work: Work
    _time_before: tuple[float, float] | None = None
    _is_open = False
    """Whether the block may have run. If it is not left properly, the unit must not commit."""

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
            before = work.time_limit
            self._time_before = (NEVER, NEVER) if before is None else (before.seconds, before.deadline)
            work.limit(self.options.timeout)
        self._begin()
        self._is_open = True
        work.open_blocks.add(self)
        return UnitOfWork(self.work)

    def leave(self, error: BaseException | None) -> None:
        self.work.open_blocks.discard(self)
        self._end(error)
        self._end_visit()
        if self._time_before is not None:
            self._give_time_back(self._time_before)
        if error is not None and self.options.attempts > 1 and retryable(error):
            error.add_note(
                "app_db: this block is not retried, because it is part of an outer unit of work, "
                "which has to be repeated as a whole. Put attempts on the outermost unit."
            )

    def torn_down(self) -> None:
        self._end_visit()
        if self._is_open:
            self._is_open = False
            self.work.open_blocks.discard(self)
            if self._time_before is not None:
                self.work.note_deadline(*self._time_before)
            self.work.doom("an exception came from outside while an inner block was entered or left")

    def _begin(self) -> None:
        """Begin what is the block's own, such as a savepoint."""

    def _end(self, error: BaseException | None) -> None:
        if error is not None and self.fails_by(error):
            self.work.doom(error)

    def _begin_visit(self) -> None:
        """Note a thread that takes part without owning the unit. Only one may do so at a time."""
        owner = getattr(self.outer, "owner", None)
        if owner is None or owner.is_this_thread():
            return
        visitor = self.work.visitors.setdefault("thread", (Owner(), self))
        if not visitor[0].is_this_thread():
            raise UnitOfWorkInUse(str(Owner()), str(visitor[0]))

    def _end_visit(self) -> None:
        work: Work | None = getattr(self, "work", None)  # `enter` may have been interrupted
        visitor = None if work is None else work.visitors.get("thread")
        if visitor is not None and visitor[1] is self:
            del self.work.visitors["thread"]

    def _give_time_back(self, before: tuple[float, float]) -> None:
        try:
            self.work.set_deadline(*before)
        except (DBAPIError, PendingRollbackError):
            log.debug("A statement failed in the inner unit, so that its time limit could not be lifted", exc_info=True)


class NestedParticipant(Participant):
    """Take part in the current unit, inside a savepoint. A failure undoes only this block's work."""

    def waits_to_begin(self) -> bool:
        return True

    def enter(self) -> UnitOfWork:
        require_savepoints_of(self.coordinator.work_of(self.outer))
        return super().enter()

    def _begin(self) -> None:
        self._is_open = True  # an interruption below may leave a unit that zope does not know to be rolled back
        before = self.work.last_savepoint()
        self._savepoint = self.outer.savepoint(optimistic=True)  # a data manager without savepoints fails only at a rollback
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
            self.work.doom(error)  # it interrupted a rollback by SQLAlchemy, perhaps halfway
        if self._time_before is not None:
            self.work.note_deadline(*self._time_before)  # the block's deadline may have passed, and would refuse the rollback
        try:
            self._savepoint.rollback()
            if self._across_databases is not None:
                self._across_databases.release()
        except Exception as failure:
            log.warning("Rolling back to a savepoint failed, so the whole unit of work can't commit", exc_info=True)
            self.work.doom(failure)


class Refused(Role):
    """Refuse to run the block here."""

    def enter(self) -> UnitOfWork:
        subject = f"A block with propagation={self.options.propagation.value!r}"
        if self.outer is None:
            raise NoUnitOfWork(subject)
        raise AlreadyInUnitOfWork(subject)
