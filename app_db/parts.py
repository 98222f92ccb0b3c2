"""What a block of code becomes: a unit of work of its own, a part of the one under way, or neither."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError, PendingRollbackError

from app_db.coordinator import Coordinator, Work
from app_db.errors import AlreadyInUnitOfWork, CommitUnconfirmed, HookFailed, InvalidUse, NoUnitOfWork
from app_db.manager import (
    AwaitedTransaction,
    ContextTransactionManager,
    current,
    is_of_this_process,
    regain,
    retryable,
    suspended,
)
from app_db.options import Options, Propagation
from app_db.units import UnitOfWork

if TYPE_CHECKING:
    from transaction import Transaction as ZopeTransaction


log = logging.getLogger("app_db")


class Part:
    """What a block is while it runs. A unit that is under way waits, unless the block is a part of that."""

    _waiting: AbstractContextManager[None] | None = None
    may_pass = False
    """Whether the block failed for a reason that may pass, and can be run again: asked before the unit is aborted."""

    def __init__(self, coordinator: Coordinator, options: Options, outer: ZopeTransaction | None, asynchronous: bool) -> None:
        self.coordinator = coordinator
        self.options = options
        self.outer = outer
        self.asynchronous = asynchronous
        if outer is not None:
            self._waiting = suspended(coordinator.manager)

    def __enter__(self) -> UnitOfWork:
        if self._waiting is not None:
            self._waiting.__enter__()
        try:
            return self.begin()
        except BaseException:
            if self._waiting is not None:
                self._waiting.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.end(error)
        finally:
            if self._waiting is not None:
                self._waiting.__exit__(None, None, None)

    def waits_to_begin(self) -> bool:
        """Return whether its beginning, and then its end, may have to wait for a database."""
        return False

    def waits_to_end(self) -> bool:
        """Return whether its end may have to wait for a database."""
        return self.waits_to_begin()

    async def __aenter__(self) -> UnitOfWork:
        from app_db.aio import to_the_end

        if not self.waits_to_begin():
            return self.__enter__()
        entered: list[UnitOfWork] = []
        try:
            await to_the_end(lambda: entered.append(self.__enter__()))
        except CancelledError as error:
            if entered:  # the block won't run, and won't be left
                await to_the_end(self.__exit__, type(error), error, error.__traceback__)
            raise
        return entered[0]

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.waits_to_end():
            from app_db.aio import to_the_end

            await to_the_end(self.__exit__, kind, error, trace)
        else:
            self.__exit__(kind, error, trace)

    def begin(self) -> UnitOfWork:
        return UnitOfWork(None)

    def end(self, error: BaseException | None) -> None:
        """Nothing was begun."""

    def fails_by(self, error: BaseException) -> bool:
        """Return whether an error that leaves the block means that its work is not to be kept."""
        return not isinstance(error, self.options.commit_on)


class Without(Part):
    """Run without a unit of work."""


class Own(Part):
    """Begin a unit of work, and commit or abort it."""

    transaction: ZopeTransaction
    work: Work

    def waits_to_end(self) -> bool:
        return True

    def begin(self) -> UnitOfWork:
        options = self.options
        self.transaction = self._begun()
        work = self.work = self.coordinator.new_work(self.transaction)
        work.outer = self.outer
        work.asynchronous = self.asynchronous
        if options.read_only:
            work.read_only = True
        if options.isolation is not None:
            work.isolation = options.isolation
        if options.timeout is not None:
            work.limit(options.timeout)
        return UnitOfWork(work)

    def _begun(self) -> ZopeTransaction:
        manager = self.coordinator.manager
        try:
            return self._begun_awaited(manager) if self.asynchronous else manager.begin()
        except BaseException:
            begun = current(manager)  # a synchronizer failed after that; the next block would join what nobody will ever commit
            if begun is not None:
                self._abort(begun)
            raise

    def _begun_awaited(self, manager: Any) -> ZopeTransaction:
        if not isinstance(manager, ContextTransactionManager):
            raise InvalidUse(
                f"`async with` can't begin a unit under a {type(manager).__name__}, because tasks would share its transaction",
                "Give the container no other manager",
            )
        return manager.begin_awaited()

    def end(self, error: BaseException | None) -> None:
        try:
            regain(self.coordinator.manager, self.transaction)
        except Exception:
            # The block ends in another task than it began in, say; nobody else will end its unit.
            if self.work.is_under_way() and is_of_this_process(self.transaction):
                self._abort(self.transaction)
                self.work.forget()
            if error is None:
                raise
            return
        if error is None or not self.fails_by(error):
            self._commit()
        else:
            self._abort_for(error)
        hooks, failed = self.work.hooks, self.work.errors_afterwards
        if self.work.interruption is not None:
            raise self.work.interruption
        if hooks is not None:
            if hooks.interruption is not None:
                raise hooks.interruption
            failed = [*failed, *hooks.errors]
        if failed and error is None:
            self._raise_afterwards(failed)

    def _raise_afterwards(self, errors: list[Exception]) -> None:
        if len(errors) == 1 and isinstance(errors[0], CommitUnconfirmed):
            raise errors[0]
        raise HookFailed(errors) from errors[0]

    def _commit(self) -> None:
        try:
            self.work.refuse_doomed()
            self.transaction.commit()
        except Exception as error:
            if self.work.has_committed:
                if self.transaction.status == "Committed":
                    self._end_after_commit(error)
                    return
                error.add_note(
                    "app_db: the databases had committed when another data manager failed to finish. Don't repeat the unit."
                )
            self._abort_for(error)
            raise
        except BaseException as error:
            self._abort_for(error)
            raise

    def _end_after_commit(self, error: Exception) -> None:
        """Let go of a unit that has committed, although zope was kept from saying so by a synchronizer that failed."""
        log.error("A unit of work has committed, and then a synchronizer failed", exc_info=error)
        self.work.errors_afterwards.append(error)
        if self.work.hooks is not None:
            self.work.hooks.has_committed = True
        self._abort(self.transaction)

    def _abort_for(self, error: BaseException) -> None:
        # Retryability has to be asked before abort: afterwards the data managers that would know are gone.
        repeatable = isinstance(error, Exception) and not self.work.has_committed
        self.may_pass = repeatable and bool(self.transaction.isRetryableError(error))
        self._abort(self.transaction)
        self.work.forget()

    def _abort(self, transaction: ZopeTransaction) -> None:
        try:
            transaction.abort()
        except Exception:
            log.exception("Aborting a unit of work raised an error of its own")


class Joined(Part):
    """Be a part of the unit that is under way; a failure dooms it."""

    outer: ZopeTransaction
    work: Work

    def waits_to_begin(self) -> bool:
        return self.options.timeout is not None

    def __enter__(self) -> UnitOfWork:
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
        self._time_before = (work.timeout, work.deadline)
        if self.options.timeout is not None:
            work.limit(self.options.timeout)
        return self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(error)
        if self.options.timeout is not None:
            self._give_time_back()
        if error is not None and self.options.attempts > 1 and retryable(error):
            error.add_note(
                "app_db: not tried again here, because this block is a part of an outer unit of work, "
                "which has to be repeated as a whole. Put attempts on the outermost unit."
            )

    def begin(self) -> UnitOfWork:
        return UnitOfWork(self.work)

    def end(self, error: BaseException | None) -> None:
        if error is not None and self.fails_by(error):
            self.work.doom(error)

    def _give_time_back(self) -> None:
        try:
            self.work.set_deadline(*self._time_before)
        except (DBAPIError, PendingRollbackError):
            log.debug("A statement failed in the inner unit, so that its time limit could not be lifted", exc_info=True)


class Nested(Joined):
    """Be a part of the unit that is under way, inside a savepoint: a failure undoes this part only."""

    def waits_to_begin(self) -> bool:
        return True

    def begin(self) -> UnitOfWork:
        before = self.work.last_savepoint()
        self._savepoint = self.outer.savepoint(optimistic=True)  # a data manager without savepoints fails when it matters
        after = self.work.last_savepoint()
        self._across_databases = None if after is before else after
        return UnitOfWork(self.work)

    def end(self, error: BaseException | None) -> None:
        if error is not None and self.fails_by(error):
            self._roll_back()
            return
        try:
            if self._across_databases is not None:
                self._across_databases.release()
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        self.work.note_deadline(*self._time_before)  # the block's own time may be over, and that must not keep it from this
        try:
            self._savepoint.rollback()
            if self._across_databases is not None:
                self._across_databases.release()
        except Exception as failure:
            log.warning("Rolling back to a savepoint failed, so the whole unit of work can't commit", exc_info=True)
            self.work.doom(failure)


class Refused(Part):
    """Raise the error that says why the block can't run here."""

    def __enter__(self) -> UnitOfWork:
        subject = f"A block with propagation={self.options.propagation.value!r}"
        if self.outer is None:
            raise NoUnitOfWork(subject)
        raise AlreadyInUnitOfWork(subject)


PARTS: dict[Propagation, tuple[type[Part], type[Part]]] = {
    # propagation: (where a unit is under way, where none is)
    Propagation.REQUIRED: (Joined, Own),
    Propagation.REQUIRES_NEW: (Own, Own),
    Propagation.NESTED: (Nested, Own),
    Propagation.MANDATORY: (Joined, Refused),
    Propagation.SUPPORTS: (Joined, Without),
    Propagation.NOT_SUPPORTED: (Without, Without),
    Propagation.NEVER: (Refused, Without),
}


def part_for(coordinator: Coordinator, options: Options, *, asynchronous: bool = False) -> Part:
    """Return the part that a block with these options plays, here and now."""
    outer = current(coordinator.manager)
    inside, outside = PARTS[options.propagation]
    return (outside if outer is None else inside)(coordinator, options, outer, asynchronous)
