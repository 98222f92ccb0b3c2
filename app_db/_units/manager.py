"""A zope transaction manager whose transaction follows the context.

Threads, tasks and greenlets have each their own current transaction, because it lives in a ContextVar; worker threads
that run with a copy of their caller's context (a sync endpoint, `asyncio.to_thread`) see their caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple, cast
from weakref import ref

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.exc import StaleDataError
from transaction import Transaction
from transaction.interfaces import TransientError
from transaction.weakset import WeakSet

from app_db._compat.asyncio import running_loop
from app_db._compat.transaction import TransactionManager, current_of, set_current
from app_db._databases.registry import is_transient
from app_db._liveness import WithBlock, always, gone, tear_down
from app_db._units.owned_transactions import AwaitedTransaction, OwnedTransaction, Owner, Process
from app_db._units.synchronizers import Synchronizers
from app_db.errors import AlreadyInUnitOfWork, NoUnitOfWork, UnitOfWorkEnded
from app_db.settings._urls import require_greenlet


class _Suspension:
    """Stands where a transaction would, in a block that runs as if none were under way."""

    process = -1
    """That of no transaction, so that it is never taken for one."""

    def __init__(self, liveness: Callable[[], object]) -> None:
        self.liveness = liveness
        self.ended = False

    def is_open(self) -> bool:
        return not self.ended and self.liveness() is not None

    def is_usable(self) -> bool:
        return False


class _Entry(NamedTuple):
    """What a context says is current, and what is current when that is over.

    The transaction of a block is found by a weak reference: when the block is torn down, its connections go at once.
    """

    find: Callable[[], OwnedTransaction | _Suspension | None]
    outer: _Entry | None


class ContextTransactionManager(TransactionManager):
    """A complete, explicit `ITransactionManager` that keeps its current transaction in a ContextVar.

    It is explicit: `get()` never begins a transaction, and `begin()` refuses where one is under way. After a commit
    that failed the next `begin()` works all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.synchronizers = Synchronizers()
        self._current: ContextVar[_Entry | None] = ContextVar("app_db.current_transaction", default=None)

    def current(self) -> OwnedTransaction | None:
        """Return the transaction that is under way here, or None: what has ended or is another's doesn't count."""
        entry = self._current.get()
        if entry is None:
            return None
        found = entry.find()
        if found is None or not found.is_usable():  # a block inside it may have been torn down
            entry = self._standing()
            found = None if entry is None else entry.find()
            if found is None or not found.is_usable():
                return None
        return cast("OwnedTransaction", found)

    def is_current(self, transaction: OwnedTransaction) -> bool:
        """Return whether a transaction is the one that is under way here."""
        entry = self._current.get()
        return entry is not None and entry.find() is transaction and transaction.is_usable()

    def inherited(self) -> OwnedTransaction | None:
        """Return the transaction under way of another task, from which the calling code has its context, or None."""
        entry = self._standing()
        found = None if entry is None else entry.find()
        return None if found is None or isinstance(found, _Suspension) or found.is_usable() else found

    def current_or_refuse(self) -> OwnedTransaction | None:
        """Return the transaction that is under way here, or None. Raise where it is that of the calling task's parent."""
        if self._current.get() is None:
            return None
        found = self.current()
        if found is None:
            inherited = self.inherited()
            if inherited is not None:
                raise inherited.refusal()
        return found

    def get(self) -> OwnedTransaction:
        """Return the transaction that is under way here, or raise the error that says why there is none."""
        entry = self._current.get()
        if entry is None:
            raise NoUnitOfWork
        found = entry.find()
        if found is None or found.ended or found.process != Process.generation or found.liveness() is None:
            return self._get_outer(entry)
        # Any thread may use it whose context says that it is current; tasks have copies of their parents' contexts.
        return cast("OwnedTransaction", found) if running_loop() is None or found.is_usable() else self._get_outer(entry)

    def _get_outer(self, inner: _Entry) -> OwnedTransaction:
        entry = self._standing() or inner
        found = entry.find()
        if found is None:
            raise UnitOfWorkEnded("The block of a unit of work")
        if isinstance(found, _Suspension):
            raise NoUnitOfWork
        if found.is_usable():
            return found
        raise found.refusal()

    def _standing(self) -> _Entry | None:
        """Return the innermost entry of this context that is not over."""
        entry = self._current.get()
        while entry is not None:
            found = entry.find()
            if found is not None:
                if found.is_open():
                    return entry
                tear_down(found.liveness)
            entry = entry.outer
        return None

    def begin(self) -> OwnedTransaction:
        """Begin a transaction and make it the current one of this context. It lasts until it is ended."""
        under_way = self.current()
        if under_way is not None:
            if under_way.status != "Commit failed":
                raise AlreadyInUnitOfWork
            under_way.abort()
        transaction = OwnedTransaction(self.synchronizers, self)
        self._current.set(_Entry(lambda: transaction, self._standing()))
        if self.synchronizers.are_used:
            self._announce(transaction)
        return transaction

    def prepare_block(self, liveness: Callable[[], object], *, awaited: bool) -> OwnedTransaction:
        """Return the transaction of a block, for `begin_block` to begin: the block has it before anything is begun."""
        if awaited:
            require_greenlet()
        return (AwaitedTransaction if awaited else OwnedTransaction)(self.synchronizers, self, liveness)

    def begin_block(self, transaction: OwnedTransaction) -> None:
        """Make the transaction of a block the current one of this context; the one that was waits."""
        outer = self._current.get()
        self._current.set(_Entry(ref(transaction), None if outer is None else self._standing()))
        if self.synchronizers.are_used:
            self._announce(transaction)

    def _announce(self, transaction: OwnedTransaction) -> None:
        try:
            self.synchronizers.of(transaction.owner).map(lambda synchronizer: synchronizer.newTransaction(transaction))
        except BaseException:
            transaction.abort()
            raise

    def synchronizers_here(self) -> WeakSet:
        """Return the synchronizers of the thread or task whose transaction is under way here, or of the calling one."""
        transaction = self.current()
        return self.synchronizers.of(Owner.acting() if transaction is None else transaction.owner)

    def free(self, txn: Any) -> None:
        """Forget a transaction that has ended. Called by the transaction itself, in whichever context that happens."""
        if not isinstance(txn, OwnedTransaction) or txn.ended or txn.begun_by is not self:
            raise ValueError("Foreign transaction")
        txn.ended = True
        txn.liveness = gone  # which may hold the block, and so the unit: a circle
        txn.owner.task = None  # whose error may hold the block as well
        entry = self._current.get()
        if entry is not None and entry.find() is txn:
            self._current.set(entry.outer)

    def resume(self, transaction: OwnedTransaction) -> None:
        """Make a transaction the current one here that began in another context, as a generator's may have."""
        if self.current() is transaction:
            return
        if not transaction.is_usable():
            raise transaction.refusal()
        self._current.set(_Entry(ref(transaction), self._standing()))

    def adopt(self, transaction: OwnedTransaction) -> None:
        """Make a transaction the current one here, and the calling task its owner, which it will be alone from now on.

        The block that began it may be gone by now: the transaction lasts until it is ended.
        """
        if not transaction.is_open():
            raise transaction.refusal()
        transaction.owner = Owner()
        transaction.liveness = always
        self._current.set(_Entry(lambda: transaction, self._standing()))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.abort()
            return
        try:
            self.commit()
        except BaseException:
            self.abort()  # a failed commit would otherwise stay the current transaction
            raise

    def is_retryable(self, error: BaseException) -> bool:
        return retryable(error)

    def suspend(self, liveness: Callable[[], object]) -> Callable[[], None]:
        """Have no transaction be under way here. Return what takes up the one that was; so does the end of `liveness`."""
        suspension = _Suspension(liveness)
        self._current.set(_Entry(lambda: suspension, self._standing()))

        def resume() -> None:
            suspension.ended = True
            suspension.liveness = gone
            entry = self._current.get()
            if entry is not None and entry.find() is suspension:
                self._current.set(entry.outer)

        return resume


def current(manager: Any) -> Transaction | None:
    """Return the transaction that is under way under any zope manager, or None, without beginning one."""
    if isinstance(manager, ContextTransactionManager):
        return manager.current()
    found: Transaction | None = current_of(manager)
    return found


def regain(manager: Any, transaction: Transaction) -> None:
    """Make sure that `transaction` is the current one, or raise the error that says why it can't be."""
    if isinstance(manager, ContextTransactionManager):
        manager.resume(cast("OwnedTransaction", transaction))
    elif current(manager) is not transaction:
        raise UnitOfWorkEnded("The block of a unit of work")


def suspend(manager: Any, liveness: Callable[[], object]) -> Callable[[], None]:
    """Have no transaction be under way under any zope manager, and return what takes up the one that was."""
    if isinstance(manager, ContextTransactionManager):
        return manager.suspend(liveness)
    transaction = current_of(manager)
    set_current(manager, None)
    return lambda: set_current(manager, transaction)


class suspended(WithBlock):  # noqa: N801  # used like a function
    """Run a block as if no transaction were under way under any zope manager, then take up the one that was."""

    __slots__ = ("_manager", "_resume")

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._resume: Callable[[], None] | None = None

    def __enter__(self) -> None:
        liveness = self.liveness_to_enter()
        liveness.torn = self
        self._resume = suspend(self._manager, liveness)

    def _leave(self, error: BaseException | None) -> None:
        self.torn_down()

    def torn_down(self) -> None:
        """Take up the transaction that was under way."""
        resume, self._resume = self._resume, None
        if resume is not None:
            resume()


# ---- what is worth another attempt --------------------------------------------------------------------------------


def retryable(error: BaseException) -> bool:
    """Return whether the unit of work that raised `error` may succeed when it is run again from its start.

    So it is for serialization failures, deadlocks, locks waited for too long, a row changed by somebody else, and a
    connection lost before COMMIT was sent.
    """
    if isinstance(error, (TransientError, StaleDataError)):
        return True
    if not isinstance(error, DBAPIError) or error.orig is None:
        return False
    return error.connection_invalidated or is_transient(error.orig)
