"""Whose turn it is, where units of work share a connection that would run side by side on connections of their own."""

from __future__ import annotations

import asyncio
import threading
import time
from asyncio import Task, current_task
from asyncio.events import _get_running_loop
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.util.concurrency import await_only, in_greenlet

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

    def may_go_inside(self, other: Holder) -> bool:
        """Return whether the other can't go on anyway before this one has ended."""
        if other.units and other.units[0] in self.units:
            return True
        return self.thread is other.thread and self.task is other.task

    def __str__(self) -> str:
        who = f"the task {self.task.get_name()!r}" if self.task is not None else f"the thread {self.thread.name!r}"
        return f"{who}, which uses {self.connection!r}"


class Turns:
    """Lets in one unit of work after the other, and those inside another one at once."""

    def __init__(self, units: Callable[[], Sequence[object]], patience: float) -> None:
        self._units = units
        self._patience = patience
        self._changed = threading.Condition()
        self._holders: list[Holder] = []

    def enter(self, connection: str) -> Holder:
        """Wait for the turn of whoever calls, and take it. Raises IsolationTimeout when it does not come."""
        loop = _get_running_loop()
        asker = Holder(connection, self._units(), threading.current_thread(), None if loop is None else current_task(loop))
        give_up = time.monotonic() + self._patience
        while not self._let_in(asker):
            if time.monotonic() > give_up:
                raise IsolationTimeout(connection, [str(holder) for holder in self._in_the_way_of(asker)], self._patience)
            self._wait()
        return asker

    def holders(self) -> list[Holder]:
        """Return who has a turn now."""
        with self._changed:
            return list(self._holders)

    def leave(self, holder: Holder) -> None:
        """Give the turn back."""
        with self._changed:
            if holder in self._holders:
                self._holders.remove(holder)
            self._changed.notify_all()

    @contextmanager
    def turn(self, connection: str) -> Generator[None]:
        """Have the turn for a block."""
        holder = self.enter(connection)
        try:
            yield
        finally:
            self.leave(holder)

    def _let_in(self, asker: Holder) -> bool:
        with self._changed:
            if self._in_the_way_of(asker):
                return False
            self._holders.append(asker)
            return True

    def _in_the_way_of(self, asker: Holder) -> list[Holder]:
        return [holder for holder in self._holders if not asker.may_go_inside(holder)]

    def _wait(self) -> None:
        if in_greenlet():
            await_only(asyncio.sleep(_PAUSE))
        else:
            with self._changed:
                self._changed.wait(0.05)
