"""A zope transaction manager whose transaction follows the context.

The current transaction is in a ContextVar, so each thread, task and greenlet has its own. A worker
thread that runs with a copy of its caller's context (a sync endpoint, `asyncio.to_thread`) sees its
caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import NamedTuple, NoReturn, Protocol, cast
from weakref import ref

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.exc import StaleDataError
from transaction import Transaction
from transaction.interfaces import TransientError
from transaction.weakset import WeakSet

from app_db._compat.asyncio import running_loop
from app_db._compat.transaction import TransactionManager as HookedManager
from app_db._compat.transaction import current_of, set_current
from app_db._databases.registry import is_lost_for_good, is_transient
from app_db._liveness import WithBlock, always, gone, tear_down
from app_db._units.owned_transactions import AwaitedTransaction, OwnedTransaction, Owner, Process
from app_db._units.synchronizers import Synchronizers
from app_db.errors import AlreadyInUnitOfWork, NoUnitOfWork, UnitOfWorkEnded
from app_db.settings._urls import require_asyncio, require_greenlet


class TransactionManager(Protocol):
    """A transaction manager: app_db's own, or one of zope's, which have no type hints."""

    def get(self) -> Transaction: ...
    def begin(self) -> Transaction: ...


class _Suspension:
    """Takes the place of a transaction in a block that runs as if there were none."""

    process = -1
    """No transaction has this value, so a suspension is never used as one."""

    def __init__(self, liveness: Callable[[], object]) -> None:
        self.liveness = liveness
        self.ended = False

    def is_open(self) -> bool:
        return not self.ended and self.liveness() is not None

    def is_usable(self) -> bool:
        return False


class _Entry(NamedTuple):
    """The current transaction of a context, and the entry that becomes current after it.

    `find` is a weak reference for the transaction of a block: when the block is torn down, its
    connections are returned at once.
    """

    find: Callable[[], OwnedTransaction | _Suspension | None]
    outer: _Entry | None


class Deferred(Protocol):
    """A unit of work that begins when it is first asked for."""

    is_over: bool

    def transaction(self) -> OwnedTransaction:
        """Return its transaction, which the first call begins. Raises ForeignUnitOfWork if it belongs to another task."""
        ...

    def begun(self) -> OwnedTransaction | None:
        """Return its transaction if it has begun, and the calling code may use it."""
        ...


class ContextTransactionManager(HookedManager):
    """A zope transaction manager (`ITransactionManager`) that keeps its current transaction in a ContextVar.

    It is in explicit mode: `get()` never begins a transaction, and `begin()` raises
    AlreadyInUnitOfWork if there is one. After a failed commit, `begin()` aborts the old transaction
    first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.synchronizers = Synchronizers()
        self._current: ContextVar[_Entry | None] = ContextVar("app_db.current_transaction", default=None)
        self.deferred: ContextVar[Deferred | None] = ContextVar("app_db.deferred_unit", default=None)
        """The unit of work that begins when one is asked for, and there is none."""

    def current(self) -> OwnedTransaction | None:
        """Return the transaction of this context that the calling code may use, or None. It begins none."""
        entry = self._current.get()
        if entry is None:
            return self._begun_before()
        found = entry.find()
        if found is None or not found.is_usable():  # a block inside it may have been torn down
            entry = self._standing()
            if entry is None:
                return self._begun_before()
            found = entry.find()
            if found is None or not found.is_usable():
                return None
        return cast("OwnedTransaction", found)

    def is_current(self, transaction: OwnedTransaction) -> bool:
        entry = self._current.get()
        return entry is not None and entry.find() is transaction and transaction.is_usable()

    def may_lead_to_unit(self) -> bool:
        """Return whether code of this context may use, or begin, a unit although none is current."""
        deferred = self.deferred.get()
        return (deferred is not None and not deferred.is_over) or self.inherited() is not None

    def inherited(self) -> OwnedTransaction | None:
        """Return the open transaction of another task from which this context was copied, or None."""
        entry = self._standing()
        found = None if entry is None else entry.find()
        return None if found is None or isinstance(found, _Suspension) or found.is_usable() else found

    def current_or_refuse(self) -> OwnedTransaction | None:
        """Return the current transaction, or None. Raises ForeignUnitOfWork if it belongs to the calling task's parent."""
        if self._current.get() is None:
            deferred = self.deferred.get()
            return None if deferred is None or deferred.is_over else deferred.transaction()
        found = self.current()
        if found is None:
            if self._standing() is None:
                return self._begun_now()
            inherited = self.inherited()
            if inherited is not None:
                raise inherited.refusal()
        return found

    def _begun_now(self) -> OwnedTransaction | None:
        """Return the transaction of this context's deferred unit, which begins by that; None if there is no such unit."""
        deferred = self.deferred.get()
        return None if deferred is None or deferred.is_over else deferred.transaction()

    def _begun_before(self) -> OwnedTransaction | None:
        deferred = self.deferred.get()
        return None if deferred is None or deferred.is_over else deferred.begun()

    def _refuse(self) -> NoReturn:
        raise NoUnitOfWork(after_response=self.deferred.get() is not None)

    def get(self) -> OwnedTransaction:
        """Return the current transaction. Raises NoUnitOfWork, UnitOfWorkEnded or ForeignUnitOfWork if there is none."""
        entry = self._current.get()
        if entry is None:
            return self._begun_now() or self._refuse()
        found = entry.find()
        if found is None or found.ended or found.process != Process.generation or found.liveness() is None:
            return self._get_outer(entry)
        # A thread may use the transaction of its context. A task may not: its context is a copy of its parent's.
        return cast("OwnedTransaction", found) if running_loop() is None or found.is_usable() else self._get_outer(entry)

    def _get_outer(self, inner: _Entry) -> OwnedTransaction:
        standing = self._standing()
        if standing is None and self.deferred.get() is not None:
            return self._begun_now() or self._refuse()
        found = (standing or inner).find()
        if found is None:
            raise UnitOfWorkEnded("The block of a unit of work")
        if isinstance(found, _Suspension):
            raise NoUnitOfWork
        if found.is_usable():
            return found
        raise found.refusal()

    def _standing(self) -> _Entry | None:
        """Return the innermost entry of this context whose transaction is still open."""
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
        """Begin a transaction and return it. It is current in this context until it is committed or aborted."""
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
        """Return a new transaction for a block. Call `begin_block` with it next.

        There are two steps so that the block has the transaction before it begins.
        """
        if awaited:
            require_greenlet()
            require_asyncio()
        return (AwaitedTransaction if awaited else OwnedTransaction)(self.synchronizers, self, liveness)

    def begin_block(self, transaction: OwnedTransaction) -> None:
        """Make the transaction of a block the current one of this context. An outer transaction waits."""
        outer = None if self._current.get() is None else self._standing()
        self._current.set(_Entry(ref(transaction), outer))
        if not self.synchronizers.are_used:
            return
        if outer is None:
            self._announce(transaction)
        else:
            transaction.tell(self.synchronizers.apart(transaction.owner))

    def _announce(self, transaction: OwnedTransaction) -> None:
        try:
            self.synchronizers.announce(transaction)
        except BaseException:
            transaction.abort()
            raise

    def synchronizers_here(self) -> WeakSet:
        """Return the synchronizers of the thread or task whose transaction is under way here, or of the calling one."""
        transaction = self.current()
        return self.synchronizers.of(Owner.acting() if transaction is None else transaction.owner)

    def free(self, txn: object) -> None:
        """Forget a transaction that has ended. The transaction calls this, in the context in which it ends.

        Raises ValueError for a transaction that this manager has not begun, or that has ended.
        """
        if not isinstance(txn, OwnedTransaction) or txn.ended or txn.begun_by is not self:
            raise ValueError("Foreign transaction")
        txn.ended = True
        txn.liveness = gone  # it may refer to the block, and so to the unit: a reference cycle
        txn.owner.task = None  # the task's error may refer to the block
        entry = self._current.get()
        if entry is not None and entry.find() is txn:
            self._current.set(entry.outer)

    def resume(self, transaction: OwnedTransaction) -> None:
        """Make `transaction` current in this context. It may have begun in another one, as in a generator."""
        if self.current() is transaction:
            return
        if not transaction.is_usable():
            raise transaction.refusal()
        self._current.set(_Entry(ref(transaction), self._standing()))

    def adopt(self, transaction: OwnedTransaction) -> None:
        """Make `transaction` current in this context, and the calling task its only owner.

        From now on the transaction lasts until it is committed or aborted, even if the block that
        began it is gone.
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
            self.abort()  # otherwise the failed transaction would stay current
            raise

    def is_retryable(self, error: BaseException) -> bool:
        return retryable(error)

    def suspend(self, liveness: Callable[[], object]) -> Callable[[], None]:
        """Make no transaction current in this context. Return a function that undoes it.

        The end of `liveness` undoes it too.
        """
        suspension = _Suspension(liveness)
        self._current.set(_Entry(lambda: suspension, self._standing()))

        def resume() -> None:
            suspension.ended = True
            suspension.liveness = gone
            entry = self._current.get()
            if entry is not None and entry.find() is suspension:
                self._current.set(entry.outer)

        return resume


def current(manager: TransactionManager) -> Transaction | None:
    """Return the current transaction of any zope manager, or None. It begins none."""
    if isinstance(manager, ContextTransactionManager):
        return manager.current()
    found: Transaction | None = current_of(manager)
    return found


def regain(manager: TransactionManager, transaction: Transaction) -> None:
    """Make `transaction` the current one. Raises ForeignUnitOfWork or UnitOfWorkEnded if that is impossible."""
    if isinstance(manager, ContextTransactionManager):
        manager.resume(cast("OwnedTransaction", transaction))
    elif current(manager) is not transaction:
        raise UnitOfWorkEnded("The block of a unit of work")


def suspend(manager: TransactionManager, liveness: Callable[[], object]) -> Callable[[], None]:
    """Make no transaction current under any zope manager. Return a function that undoes it."""
    if isinstance(manager, ContextTransactionManager):
        return manager.suspend(liveness)
    transaction = current_of(manager)
    set_current(manager, None)
    return lambda: set_current(manager, transaction)


class suspended(WithBlock):  # noqa: N801  # used like a function
    """Make no transaction current under any zope manager while the block runs."""

    __slots__ = ("_manager", "_resume")

    def __init__(self, manager: TransactionManager) -> None:
        self._manager = manager
        self._resume: Callable[[], None] | None = None

    def __enter__(self) -> None:
        liveness = self.liveness_to_enter()
        liveness.torn = self
        self._resume = suspend(self._manager, liveness)

    def _leave(self, error: BaseException | None) -> None:
        self.torn_down()

    def torn_down(self) -> None:
        resume, self._resume = self._resume, None
        if resume is not None:
            resume()


# ---- what is worth another attempt --------------------------------------------------------------------------------


def retryable(error: BaseException) -> bool:
    """Return whether the unit of work that raised `error` may succeed when it is run again from its start.

    It returns True for serialization failures, deadlocks, lock timeouts, SQLAlchemy's
    StaleDataError, zope's TransientError, and a connection that was lost before COMMIT was sent.

    >>> from app_db import retryable
    >>> retryable(ValueError())
    False
    """
    if isinstance(error, (TransientError, StaleDataError)):
        return True
    if not isinstance(error, DBAPIError) or error.orig is None:
        return False
    if error.connection_invalidated:
        return not is_lost_for_good(error)
    return is_transient(error.orig)
