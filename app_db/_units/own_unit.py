"""The role of a block that begins and ends a unit of work."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from app_db._databases.holders import LineAbove
from app_db._databases.interruptions import came_from_outside
from app_db._liveness import Liveness, always
from app_db._units.manager import ContextTransactionManager, TransactionManager, current, regain, suspend
from app_db._units.owned_transactions import AwaitedTransaction, OwnedTransaction, is_of_this_process
from app_db._units.roles import Role
from app_db._units.unit_of_work import UnitOfWork
from app_db._units.work import Work
from app_db.errors import CommitUnconfirmed, HookFailed, InvalidUse

if TYPE_CHECKING:
    from transaction import Transaction as ZopeTransaction

log = logging.getLogger("app_db")

_line_above = LineAbove()


class OwnUnit(Role):
    """Begin a unit of work, and commit or abort it. An outer unit waits."""

    transaction: Any = None
    """The zope transaction, after `enter`."""
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
        work.begun_by = self.begun_by or _line_above()
        work.liveness = self.liveness
        work.outer = self.outer
        work.asynchronous = self.asynchronous
        if options.read_only:
            work.read_only = True
        if options.isolation is not None:
            work.isolation = options.isolation
        if self.outer is not None:
            self._keep_to_outer_limit(self.outer)
        if options.timeout is not None:
            work.limit(options.timeout)
        return UnitOfWork(work)

    def _keep_to_outer_limit(self, outer: ZopeTransaction) -> None:
        """Give the unit no more time than the unit has that waits for it."""
        limit = self.coordinator.work_of(outer).time_limit
        if limit is not None:
            self.work.set_deadline(limit.seconds, limit.deadline)

    def _begin_under(self, manager: TransactionManager) -> None:
        """Begin under one of zope's own managers."""
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
            begun = current(manager)  # a synchronizer failed, or we were interrupted: the next block must not join this
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
        """Commit the unit if the block returned, abort it if the block raised. Then raise the errors of its end."""
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
            return  # a forked child must not touch its parent's connections
        work: Work | None = getattr(self, "work", None)  # `enter` may have been interrupted
        if work is not None:
            work.abandon()
        if self.transaction is not None and not self._is_over():
            log.warning("A unit of work is aborted: its block was never left (an exception from a signal handler?)")
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
        """Make the unit current again, and return True. If that is impossible, abort it.

        Then raise the reason, or return False if the block has raised an error itself.
        """
        try:
            regain(self.coordinator.manager, self.transaction)
        except Exception:
            # For example, the block ends in another task than it began in. Nothing else would end its unit.
            if self.work.is_under_way() and is_of_this_process(self.transaction):
                self._abort(self.transaction)
                self.work.forget()
            if error is None:
                raise
            return False
        return True

    def _tell_what_followed(self, error: BaseException | None) -> None:
        """Raise the interruption of the unit's end, or the errors that followed its commit."""
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
        """End the unit after `commit()` raised. Return True if it has committed anyway: the failure is raised later."""
        if self.work.has_committed:
            if self.work.hooks is not None:
                self.work.hooks.has_committed = True  # zope ends the unit only by an abort
            if self.transaction.status == "Committed":
                self._end_after_commit(failure)
                return True
            failure.add_note(_COMMITTED_ALL_THE_SAME)
        self._abort_for(failure)
        return False

    def _end_after_commit(self, error: BaseException) -> None:
        """End a unit that has committed, although `commit()` raised: a synchronizer may have failed, for example."""
        log.error("A unit of work has committed, and then something failed before it had ended", exc_info=error)
        if isinstance(error, Exception) and not came_from_outside(error):
            self.work.errors_afterwards.append(error)
        else:
            self.work.interruption = error
        self._abort(self.transaction)

    def _abort_for(self, error: BaseException) -> None:
        # Ask before the abort: it removes the data managers that know whether the error is retryable.
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
    "app_db: the databases had committed when another data manager, or an exception from outside, raised this. "
    "Don't repeat the unit."
)
