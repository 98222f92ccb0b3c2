"""Transactions that belong to the thread or task that began them."""

from __future__ import annotations

import os
import threading
from asyncio import Task, current_task
from collections.abc import Callable
from threading import get_ident

from sqlalchemy.util.concurrency import in_greenlet
from transaction import Savepoint, Transaction

from app_db._compat.asyncio import running_loop
from app_db._compat.os import after_fork_in_child
from app_db._compat.transaction import Transaction as HookedTransaction
from app_db._compat.transaction import TransactionManager
from app_db._liveness import always
from app_db.errors import AwaitRequired, ForeignUnitOfWork, UnitOfWorkEnded, UnitOfWorkError


class Process:
    """Counts forks. A child process recognizes its parent's transactions by the lower count."""

    generation = 0

    @classmethod
    def note_fork(cls) -> None:
        cls.generation += 1


after_fork_in_child(Process.note_fork)


_acting_for: dict[Task[object], Task[object] | None] = {}


class acting_for:  # noqa: N801  # used like a function; `contextmanager` takes longer, and every unit ends in one
    """Let the calling task use what belongs to `owner`, a task that waits for it."""

    __slots__ = ("_owner", "_task")

    def __init__(self, owner: Task[object] | None) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        task = current_task()
        if task is None:
            raise RuntimeError("no task is running")
        self._task = task
        _acting_for[task] = self._owner

    def __exit__(self, *_: object) -> None:
        del _acting_for[self._task], self._task  # the task and this object would refer to each other


class Owner:
    """The thread in which a transaction began, and its asyncio task if there was one."""

    __slots__ = ("task", "thread")

    def __init__(self) -> None:
        loop = running_loop()
        self.task = None if loop is None else current_task(loop)
        self.thread = get_ident()

    @classmethod
    def acting(cls) -> Owner:
        """Return the calling task or thread, or the task that the calling one acts for."""
        owner = cls()
        while owner.task in _acting_for:
            owner.task = _acting_for[owner.task]
        return owner

    def is_this_thread(self) -> bool:
        return self.thread == get_ident()

    def __str__(self) -> str:
        if self.task is not None:
            return f"task {self.task.get_name()!r}"
        return f"thread {self.thread_name}"

    @property
    def thread_name(self) -> str:
        names = (repr(thread.name) for thread in threading.enumerate() if thread.ident == self.thread)
        return next(names, str(self.thread))


class OwnedTransaction(HookedTransaction):
    """A transaction that knows its owner, and refuses to be used by another task. Copies of a context share it."""

    def __init__(self, synchronizers: object, manager: TransactionManager, liveness: Callable[[], object] = always) -> None:
        super().__init__(synchronizers, manager)
        self.begun_by = manager
        self.owner = Owner()
        self.ended = False
        self.process = Process.generation
        self.liveness = liveness
        """Returns None when the block that has to end the transaction is gone."""

    def is_usable(self) -> bool:
        """Return whether the transaction is open and the calling code may use it.

        A task that inherited its parent's context may not use it, and a forked child may not. A
        thread without a running loop may: it works for the unit's owner, which waits for it.
        """
        if self.ended or self.process != Process.generation or self.liveness() is None:
            return False
        loop = running_loop()
        if loop is None:
            return True
        task = current_task(loop)
        if self.owner.task is None:
            if task is None:
                return True  # a callback of the loop: no task runs it
            self.owner.task = task  # it began outside a task, and this is the first task to use it
        while task is not self.owner.task and task is not None:
            task = _acting_for.get(task)  # repeatedly: a hook's block may end while its unit's block ends
        return task is not None

    def is_open(self) -> bool:
        """Return whether the transaction is open in this process, and its block still runs."""
        return not self.ended and self.process == Process.generation and self.liveness() is not None

    def savepoint(self, optimistic: bool = False) -> Savepoint:
        """Take a savepoint. If that fails, the transaction is doomed, because zope has aborted its data managers."""
        try:
            return super().savepoint(optimistic)
        except BaseException:  # zope dooms it too, unless an exception from a signal handler interrupts zope
            if self.status == "Active":
                self.doom()
            raise

    def refusal(self) -> UnitOfWorkError:
        if self.ended or self.liveness() is None:
            return UnitOfWorkEnded("The block of a unit of work")
        if self.process != Process.generation:
            return ForeignUnitOfWork("The unit of work", f"{self.owner} in the parent process", f"process {os.getpid()}")
        return ForeignUnitOfWork("The unit of work", str(self.owner), str(Owner()))


class AwaitedTransaction(OwnedTransaction):
    """A transaction begun by `async with`. It can only be ended where coroutines can be awaited."""

    awaits = False
    """Whether it has an async session, which waits for its database through the event loop."""

    def commit(self) -> None:
        self._require_bridge("The commit of the unit of work")
        super().commit()

    def abort(self) -> None:
        self._require_bridge("The abort of the unit of work")
        super().abort()

    def abort_torn_down(self) -> None:
        """Abort without awaiting anything, after the connections were closed."""
        super().abort()

    def savepoint(self, optimistic: bool = False) -> Savepoint:
        self._require_bridge("A savepoint of the unit of work")
        return super().savepoint(optimistic)

    def before_rollback_to(self, savepoint: Savepoint) -> None:
        self._require_bridge("The rollback to a savepoint of the unit of work")

    def require_bridge_or_thread(self, subject: str) -> None:
        """Raise AwaitRequired if a part of the unit that begins here would block the event loop when it ends."""
        self._require_bridge(subject, keeps_waiting=running_loop() is not None)

    def _require_bridge(self, subject: str, *, keeps_waiting: bool = False) -> None:
        # Check first. The driver would fail halfway, and the connection would go back to its pool in that state.
        if (self.awaits or keeps_waiting) and not in_greenlet():
            advice = "Leave its end to `async with container.transaction()`; for a savepoint, give that propagation='nested'"
            raise AwaitRequired(subject, advice)


def async_session_refused(session: str, transaction: Transaction) -> AwaitRequired:
    """Return the error for an async session in a unit that was not begun by `async with`."""
    owner = getattr(transaction, "owner", None)
    if not isinstance(owner, Owner) or owner.is_this_thread():
        return AwaitRequired(session, "Begin its unit of work with `async with container.transaction():`")
    # TestClient runs the application in a thread of its own, with a copy of the context of the test.
    return AwaitRequired(
        session,
        f"Its unit of work was begun by a plain `with` in another thread, {owner.thread_name}. If a test calls TestClient inside "
        "a unit, end that unit before the call. Otherwise use `async with container.transaction(propagation='requires_new'):`",
    )


def is_of_this_process(transaction: Transaction) -> bool:
    """Return whether a transaction began in this process. Ending one that was forked would end the parent's."""
    return not isinstance(transaction, OwnedTransaction) or transaction.process == Process.generation
