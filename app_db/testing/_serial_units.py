"""A lock that lets the units of work of an isolated test run one after the other, because they share a connection."""

from __future__ import annotations

import threading
import time
from asyncio import Task, current_task
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from sqlalchemy.util.concurrency import await_only, in_greenlet

from app_db._compat.asyncio import pause, running_loop
from app_db._compat.clocks import monotonic
from app_db._liveness import Liveness, LivingLock, WithBlock, always
from app_db._units.owned_transactions import AwaitedTransaction
from app_db.errors import IsolationTimeout

if TYPE_CHECKING:
    from transaction import Transaction

T = TypeVar("T")

_PAUSE = 0.001
"""How often a waiting thread or coroutine checks, in seconds."""


def _pause() -> None:
    if in_greenlet():
        await_only(pause(_PAUSE))
    else:
        time.sleep(_PAUSE)


@dataclass(frozen=True, eq=False)
class Holder:
    """A unit of work that holds the lock or asks for it, and the thread and the task in which it runs."""

    connection: str
    units: Sequence[Transaction]
    """The unit, and the units around it, which go on when it has ended."""
    thread: threading.Thread
    task: Task[object] | None
    liveness: Callable[[], object] = always
    """Returns None when the `with` statement that took the lock is gone."""
    is_lent: bool = False
    """Whether the unit belongs to a coroutine, and runs in a thread of a pool for a while. It ends elsewhere."""

    def is_alive(self) -> bool:
        """Return whether it still holds the lock. A unit that was torn down may not have released it."""
        if self.units and getattr(self.units[0], "liveness", always)() is None:
            return False
        return self.liveness() is not None

    def may_go_inside(self, other: Holder) -> bool:
        """Return whether `other` waits for this unit: making this unit wait for `other` would then be a deadlock."""
        if other.units and other.units[0] in self.units:
            return True
        if other.is_lent:
            return False  # the pool has given the thread to another unit: both would wait for each other
        # A task that can't await stops the event loop, and with it the task that it waits for.
        return self.thread is other.thread and (self.task is other.task or not in_greenlet())

    def __str__(self) -> str:
        place = f"the task {self.task.get_name()!r}" if self.task is not None else f"the thread {self.thread.name!r}"
        return f"{place}, which uses {self.connection!r}"


class UnitLock:
    """Admits one unit of work at a time, and at once those that the unit inside waits for."""

    def __init__(self, units: Callable[[], Sequence[Transaction]], patience: float) -> None:
        self._units = units
        self._patience = patience
        # Written in C. A Condition is written in Python, so that an exception from a signal handler
        # could leave it halfway.
        self._guard = threading.Lock()
        self._holders: list[Holder] = []

    def acquire(self, connection: str, liveness: Callable[[], object] = always) -> Holder:
        """Wait until the caller's unit may run, and return what releases the lock. Raises IsolationTimeout."""
        loop = running_loop()
        task = None if loop is None else current_task(loop)
        units = self._units()
        is_lent = loop is None and bool(units) and isinstance(units[0], AwaitedTransaction)
        asker = Holder(connection, units, threading.current_thread(), task, liveness, is_lent)
        give_up = monotonic() + self._patience
        while not self._admit(asker):
            if monotonic() > give_up:
                raise IsolationTimeout(connection, [str(holder) for holder in self._blocking(asker)], self._patience)
            _pause()
        return asker

    def release(self, holder: Holder) -> None:
        """Admit the next unit."""
        with self._guard:
            if holder in self._holders:
                self._holders.remove(holder)

    def holders(self) -> list[Holder]:
        """Return the units that hold the lock: one, and those inside it."""
        with self._guard:
            return [holder for holder in self._holders if holder.is_alive()]

    def _admit(self, asker: Holder) -> bool:
        with self._guard:
            self._holders = [holder for holder in self._holders if holder.is_alive()]
            if self._blocking(asker):
                return False
            self._holders.append(asker)
            return True

    def _blocking(self, asker: Holder) -> list[Holder]:
        return [holder for holder in self._holders if holder.is_alive() and not asker.may_go_inside(holder)]


class StatementLock(LivingLock):
    """Lets one thread or coroutine at a time use a connection."""

    def acquire(self, patience: float, user: Liveness) -> Liveness:
        """Wait until the caller may use the connection, and return what releases the lock. Raises IsolationTimeout."""
        if not self.take(user, 0.0 if in_greenlet() else patience):
            raise IsolationTimeout("", [], patience)
        return user

    def _wait(self) -> None:
        _pause()


class Held(WithBlock, Generic[T]):
    """A block that holds a lock: `acquire` returns what `release` takes."""

    __slots__ = ("_acquire", "_held", "_release")

    def __init__(self, acquire: Callable[[Liveness], T], release: Callable[[T], None]) -> None:
        self._acquire = acquire
        self._release = release

    def __enter__(self) -> None:
        self._held = self._acquire(self.liveness_to_enter())

    def _leave(self, error: BaseException | None) -> None:
        self._release(self._held)
