"""Transactions that belong to the thread or task that began them."""

from __future__ import annotations

import os
import threading
from asyncio import Task, current_task
from collections.abc import Callable
from threading import get_ident
from typing import Any

from sqlalchemy.util.concurrency import in_greenlet
from transaction import Savepoint, Transaction

from app_db._compat.asyncio import running_loop
from app_db._compat.os import after_fork_in_child
from app_db._compat.transaction import Transaction as HookedTransaction
from app_db._compat.transaction import TransactionManager
from app_db._liveness import always
from app_db.errors import AwaitRequired, ForeignUnitOfWork, UnitOfWorkEnded, UnitOfWorkError


class Process:
    """Counts the forks behind this process, so that a child tells its parent's transactions from its own."""

    generation = 0

    @classmethod
    def note_fork(cls) -> None:
        cls.generation += 1


after_fork_in_child(Process.note_fork)


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

    @classmethod
    def acting(cls) -> Owner:
        """Return the calling task or thread, or the task that the calling one acts for."""
        owner = cls()
        while owner.task in _acting_for:
            owner.task = _acting_for[owner.task]
        return owner

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

    def __init__(self, synchronizers: Any, manager: TransactionManager, liveness: Callable[[], object] = always) -> None:
        super().__init__(synchronizers, manager)
        self.begun_by = manager
        self.owner = Owner()
        self.ended = False
        self.process = Process.generation
        self.liveness = liveness
        """Returns None when the block is gone that would have ended the transaction."""

    def is_usable(self) -> bool:
        """Return whether the transaction is under way, and the calling code may use it.

        A task that merely inherited its parent's context may not, and neither may a forked child. Threads without a
        running loop may: they work for the unit's owner, who waits for them.
        """
        if self.ended or self.process != Process.generation or self.liveness() is None:
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
        return not self.ended and self.process == Process.generation and self.liveness() is not None

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
        if self.process != Process.generation:
            return ForeignUnitOfWork("The unit of work", f"{self.owner} in the parent process", f"process {os.getpid()}")
        return ForeignUnitOfWork("The unit of work", str(self.owner), str(Owner()))


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


def is_of_this_process(transaction: Transaction) -> bool:
    """Return whether a transaction did not come with a fork: ending it then would end its parent's."""
    return not isinstance(transaction, OwnedTransaction) or transaction.process == Process.generation
