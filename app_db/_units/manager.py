"""A zope transaction manager whose transaction follows the context.

Threads, tasks and greenlets have each their own current transaction, because it lives in a ContextVar; worker threads
that run with a copy of their caller's context (a sync endpoint, `asyncio.to_thread`) see their caller's.
"""

from __future__ import annotations

import os
import threading
from asyncio import Task, current_task
from collections.abc import Callable
from contextvars import ContextVar
from threading import get_ident
from types import TracebackType
from typing import Any, NamedTuple, cast
from weakref import ref

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.util.concurrency import in_greenlet
from transaction import Savepoint, Transaction
from transaction.interfaces import TransientError

from app_db._compat.asyncio import running_loop
from app_db._compat.os import after_fork_in_child
from app_db._compat.transaction import Transaction as HookedTransaction
from app_db._compat.transaction import TransactionManager, current_of, set_current
from app_db._databases.registry import is_transient
from app_db._liveness import WithBlock, always, gone, tear_down
from app_db.errors import AlreadyInUnitOfWork, AwaitRequired, ForeignUnitOfWork, NoUnitOfWork, UnitOfWorkEnded, UnitOfWorkError
from app_db.settings._urls import require_greenlet


class _Process:
    """Counts the forks behind this process, so that a child tells its parent's transactions from its own."""

    generation = 0

    @classmethod
    def note_fork(cls) -> None:
        cls.generation += 1


after_fork_in_child(_Process.note_fork)


_acting_for: dict[Task[Any], Task[Any] | None] = {}


class acting_for:  # noqa: N801  # used like a function; `contextmanager` takes longer, and every unit ends in one
    """Let the calling task use what belongs to another one, which waits for it."""

    __slots__ = ("_owner", "_task")

    def __init__(self, owner: Task[Any] | None) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        task = current_task()
        if task is None:
            raise RuntimeError("no task is running")
        self._task = task
        _acting_for[task] = self._owner

    def __exit__(self, *_: object) -> None:
        del _acting_for[self._task], self._task  # or the task and this one would hold each other


class Owner:
    """The thread, and the asyncio task if there is one, in which something began."""

    __slots__ = ("task", "thread")

    def __init__(self) -> None:
        loop = running_loop()
        self.task = None if loop is None else current_task(loop)
        self.thread = get_ident()

    def is_this_thread(self) -> bool:
        """Return whether the calling thread is the one in which it began."""
        return self.thread == get_ident()

    def __str__(self) -> str:
        if self.task is not None:
            return f"task {self.task.get_name()!r}"
        names = (repr(thread.name) for thread in threading.enumerate() if thread.ident == self.thread)
        return f"thread {next(names, self.thread)}"


class OwnedTransaction(HookedTransaction):
    """A transaction that knows who began it, so that nobody else uses it. Copied contexts share it."""

    def __init__(self, synchronizers: Any, manager: ContextTransactionManager, liveness: Callable[[], object] = always) -> None:
        super().__init__(synchronizers, manager)
        self.owner = Owner()
        self.ended = False
        self.process = _Process.generation
        self.liveness = liveness
        """Returns None when the block is gone that would have ended the transaction."""

    def is_usable(self) -> bool:
        """Return whether the transaction is under way, and the calling code may use it.

        A task that merely inherited its parent's context may not, and neither may a forked child. Threads without a
        running loop may: they work for the unit's owner, who waits for them.
        """
        if self.ended or self.process != _Process.generation or self.liveness() is None:
            return False
        loop = running_loop()
        if loop is None:
            return True
        task = current_task(loop)
        if self.owner.task is None:
            if task is None:
                return True  # a callback of the loop, which no task runs
            self.owner.task = task  # begun where no task ran, and this is the first one to use it
        while task is not self.owner.task and task is not None:
            task = _acting_for.get(task)  # which may itself act for one: a hook's block ends while its unit's does
        return task is not None

    def is_open(self) -> bool:
        """Return whether the transaction is under way in this process, and the block that began it still runs."""
        return not self.ended and self.process == _Process.generation and self.liveness() is not None

    def savepoint(self, optimistic: bool = False) -> Savepoint:
        """Take a savepoint. If that fails, zope has aborted what took part, and the transaction can't commit any more.

        zope says so itself, unless an exception from outside keeps it from that.
        """
        try:
            return super().savepoint(optimistic)
        except BaseException:
            if self.status == "Active":
                self.doom()
            raise

    def refusal(self) -> UnitOfWorkError:
        """Return the error that says why the transaction can't be used here."""
        if self.ended or self.liveness() is None:
            return UnitOfWorkEnded("The block of a unit of work")
        if self.process != _Process.generation:
            return ForeignUnitOfWork("The unit of work", f"{self.owner} in the parent process", f"process {os.getpid()}")
        return ForeignUnitOfWork("The unit of work", str(self.owner), str(Owner()))


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


class AwaitedTransaction(OwnedTransaction):
    """A transaction that was begun by `async with`, and can be ended only where coroutines can be awaited."""

    awaits = False
    """Whether a session of it waits for its database by way of the event loop."""

    def commit(self) -> None:
        self._require_bridge("The commit of the unit of work")
        super().commit()

    def abort(self) -> None:
        self._require_bridge("The abort of the unit of work")
        super().abort()

    def abort_torn_down(self) -> None:
        """Abort although nothing can be waited for, after the connections were closed."""
        super().abort()

    def savepoint(self, optimistic: bool = False) -> Savepoint:
        self._require_bridge("A savepoint of the unit of work")
        return super().savepoint(optimistic)

    def before_rollback_to(self, savepoint: Savepoint) -> None:
        self._require_bridge("The rollback to a savepoint of the unit of work")

    def require_bridge_or_thread(self, subject: str) -> None:
        """Raise where a part of the unit begins that would wait for a database when it ends, and keep the event loop waiting."""
        self._require_bridge(subject, keeps_waiting=running_loop() is not None)

    def _require_bridge(self, subject: str, *, keeps_waiting: bool = False) -> None:
        # Asked first: drivers would notice in the middle, and the connection would go back to its pool as it is.
        if (self.awaits or keeps_waiting) and not in_greenlet():
            advice = "Leave its end to `async with container.transaction()`; for a savepoint, give that propagation='nested'"
            raise AwaitRequired(subject, advice)


class ContextTransactionManager(TransactionManager):
    """A complete, explicit `ITransactionManager` that keeps its current transaction in a ContextVar.

    It is explicit: `get()` never begins a transaction, and `begin()` refuses where one is under way. After a commit
    that failed the next `begin()` works all the same.
    """

    def __init__(self) -> None:
        super().__init__()
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
        if found is None or found.ended or found.process != _Process.generation or found.liveness() is None:
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
        if self.synchronizers.entries:
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
        if self.synchronizers.entries:
            self._announce(transaction)

    def _announce(self, transaction: OwnedTransaction) -> None:
        try:
            self.synchronizers.map(lambda synchronizer: synchronizer.newTransaction(transaction))
        except BaseException:
            transaction.abort()
            raise

    def free(self, txn: OwnedTransaction) -> None:
        """Forget a transaction that has ended. Called by the transaction itself, in whichever context that happens."""
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


def is_of_this_process(transaction: Transaction) -> bool:
    """Return whether a transaction did not come with a fork: ending it then would end its parent's."""
    return not isinstance(transaction, OwnedTransaction) or transaction.process == _Process.generation


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
