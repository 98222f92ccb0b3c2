"""Whose turn it is, where units of work share a connection that would run side by side on connections of their own."""

from __future__ import annotations

import asyncio
import threading
import time
from asyncio import Task, current_task
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.util.concurrency import await_only, in_greenlet

from app_db._compat.asyncio import running_loop
from app_db._liveness import LivingLock, WithBlock, always
from app_db.errors import IsolationTimeout

_PAUSE = 0.001
"""Seconds between two looks of a coroutine. Who waits is a test, and waits for another unit of the same test."""


@dataclass(frozen=True, eq=False)
class Holder:
    """Who takes a turn: a unit of work with those that wait for it, and the thread and the task it runs in."""

    connection: str
    units: Sequence[object]
    """The unit, and the ones around it: they go on when it has ended."""
    thread: threading.Thread
    task: Task[Any] | None
    liveness: Callable[[], object] = always
    """Returns None when the `with` statement is gone that took the turn."""

    def is_alive(self) -> bool:
        """Return whether it still takes a turn: a unit that was torn down may not have given it back."""
        if self.units and getattr(self.units[0], "liveness", always)() is None:
            return False
        return self.liveness() is not None

    def may_go_inside(self, other: Holder) -> bool:
        """Return whether the other can't go on anyway before this one has ended."""
        if other.units and other.units[0] in self.units:
            return True
        return self.thread is other.thread and self.task is other.task

    def __str__(self) -> str:
        who = f"the task {self.task.get_name()!r}" if self.task is not None else f"the thread {self.thread.name!r}"
        return f"{who}, which uses {self.connection!r}"


class Wire(LivingLock):
    """What one thread or coroutine at a time may use."""

    def _wait(self) -> None:
        if in_greenlet():
            await_only(asyncio.sleep(_PAUSE))
        else:
            super()._wait()


class OnTheWire(WithBlock):
    """Uses a `Wire` for a block."""

    __slots__ = ("_patience", "_user", "_wire")

    def __init__(self, wire: Wire, patience: float) -> None:
        self._wire = wire
        self._patience = patience

    def __enter__(self) -> None:
        self._user = self.liveness_to_enter()
        if not self._wire.take(self._user, 0.0 if in_greenlet() else self._patience):
            raise IsolationTimeout("", ["a statement of another thread or task, which has had no answer yet"], self._patience)

    def _leave(self, error: BaseException | None) -> None:
        self._wire.leave(self._user)


class Turns:
    """Lets in one unit of work after the other, and those inside another one at once."""

    def __init__(self, units: Callable[[], Sequence[object]], patience: float) -> None:
        self._units = units
        self._patience = patience
        self._guard = threading.Lock()  # of C: a Condition is Python, out of which a signal handler's exception may come halfway
        self._holders: list[Holder] = []

    def enter(self, connection: str, liveness: Callable[[], object] = always) -> Holder:
        """Wait for the turn of whoever calls, and take it. Raises IsolationTimeout when it does not come."""
        loop = running_loop()
        task = None if loop is None else current_task(loop)
        asker = Holder(connection, self._units(), threading.current_thread(), task, liveness)
        give_up = time.monotonic() + self._patience
        while not self._let_in(asker):
            if time.monotonic() > give_up:
                raise IsolationTimeout(connection, [str(holder) for holder in self._in_the_way_of(asker)], self._patience)
            self._wait()
        return asker

    def holders(self) -> list[Holder]:
        """Return who has a turn now."""
        with self._guard:
            return [holder for holder in self._holders if holder.is_alive()]

    def leave(self, holder: Holder) -> None:
        """Give the turn back."""
        with self._guard:
            if holder in self._holders:
                self._holders.remove(holder)

    def turn(self, connection: str) -> Turn:
        """Have the turn for a block."""
        return Turn(self, connection)

    def _let_in(self, asker: Holder) -> bool:
        with self._guard:
            self._holders = [holder for holder in self._holders if holder.is_alive()]
            if self._in_the_way_of(asker):
                return False
            self._holders.append(asker)
            return True

    def _in_the_way_of(self, asker: Holder) -> list[Holder]:
        return [holder for holder in self._holders if holder.is_alive() and not asker.may_go_inside(holder)]

    def _wait(self) -> None:
        if in_greenlet():
            await_only(asyncio.sleep(_PAUSE))
        else:
            time.sleep(_PAUSE)


class Turn(WithBlock):
    """Has a turn for a block."""

    __slots__ = ("_connection", "_holder", "_turns")

    def __init__(self, turns: Turns, connection: str) -> None:
        self._turns = turns
        self._connection = connection

    def __enter__(self) -> None:
        self._holder = self._turns.enter(self._connection, self.liveness_to_enter())

    def _leave(self, error: BaseException | None) -> None:
        self._turns.leave(self._holder)
