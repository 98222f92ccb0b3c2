"""Synchronizers: what zope tells of the beginning and the end of transactions."""

from __future__ import annotations

from asyncio import Task
from collections.abc import Callable
from threading import get_ident, local
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from transaction.weakset import WeakSet

from app_db._units.owned_transactions import OwnedTransaction, Owner


class Synchronizers:
    """The synchronizers of each thread and task.

    A ZODB connection is one, and forgets its snapshot when a transaction begins. So it is told of the transactions of its own
    thread or task only, as under zope's thread-local manager.
    """

    def __init__(self) -> None:
        self.are_used = False
        """Whether there has been one, anywhere. Units cost less until then."""
        self._of_tasks: WeakKeyDictionary[Task[Any], WeakSet] = WeakKeyDictionary()
        self._of_threads: WeakValueDictionary[int, WeakSet] = WeakValueDictionary()
        self._of_this_thread = local()  # keeps the set of a thread as long as the thread lives

    def of(self, owner: Owner) -> WeakSet:
        """Return the synchronizers of a task, or of a thread where no task runs."""
        self.are_used = True
        if owner.task is not None:
            return self._of_tasks.setdefault(owner.task, WeakSet())
        found = self._of_threads.get(owner.thread)
        if found is None:
            found = self._of_this_thread.synchronizers = WeakSet()
            self._of_threads[get_ident()] = found
        return found

    def announce(self, transaction: OwnedTransaction) -> None:
        """Tell the synchronizers of a transaction's owner that it has begun."""

        def tell(synchronizer: Any) -> None:
            synchronizer.newTransaction(transaction)

        self.of(transaction.owner).map(tell)

    def apart(self, owner: Owner) -> SynchronizersApart:
        """Return the synchronizers that a thread or task will have beside those of now: of a unit while another one waits."""
        return SynchronizersApart(self.of(owner))

    def map(self, function: Callable[[Any], object]) -> None:
        """Call a function with each synchronizer of the calling task or thread, or of the task that it acts for."""
        if self.are_used:
            self.of(Owner.acting()).map(function)


class SynchronizersApart:
    """The synchronizers that are added to a set from now on. The others serve the unit that waits, and keep their snapshot."""

    def __init__(self, synchronizers: WeakSet) -> None:
        self._all = synchronizers
        self._before = WeakSet()
        synchronizers.map(self._before.add)

    def map(self, function: Callable[[Any], object]) -> None:
        """Call a function with each of them."""

        def call(synchronizer: Any) -> None:
            if synchronizer not in self._before:
                function(synchronizer)

        self._all.map(call)
