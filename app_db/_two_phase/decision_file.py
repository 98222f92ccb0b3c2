"""A decision log in an SQLite file, shared by the threads and processes of one host.

The rows and the statements are those of a log in a table. The file is in WAL mode, so a decision costs one write and one wait for
the disk. Threads that decide at the same time share both: the thread that gets the turn writes for all.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from app_db._compat.clocks import monotonic
from app_db._compat.os import after_fork_in_child
from app_db._databases.database import Rows
from app_db._liveness import LivingLock, WithBlock
from app_db._two_phase.decision_database import DecisionDatabase, busy
from app_db._two_phase.decisions import Decision, DecisionLog
from app_db._two_phase.file_checks import has_content, wal_of
from app_db.errors import DecisionFileDamaged, DecisionFileUnusable

T = TypeVar("T")

_LOST_WAKE_UP = 0.01
"""Seconds after which a waiting thread tries to get the turn without a wake-up: the thread that sends it may be interrupted."""


class FileLog(DecisionLog):
    """Decisions in an SQLite file of this host. Threads and processes may share it.

    A symbolic link is followed once, here. Waiting longer than about `lock_wait` seconds is an error.
    """

    def __init__(self, path: str | os.PathLike[str], application: str = "app_db", *, lock_wait: float = 10.0) -> None:
        super().__init__(application)
        self._path = Path(path).resolve()
        self.place = f"the file {self._path}"
        self._lock_wait = lock_wait
        self._id = ""
        self._begin_afresh()
        _logs.add(self)

    def _begin_afresh(self) -> None:
        self._threads = LivingLock()
        self._waiting: deque[_PendingWrite] = deque()
        self._database: DecisionDatabase | None = None

    def ensure(self) -> str:
        return self._id or self._alone(lambda database, _: database.id)

    def _decision_of(self, row: Sequence[object]) -> Decision:
        try:
            return super()._decision_of(row)
        except (AttributeError, TypeError, ValueError) as error:
            raise DecisionFileDamaged(str(self._path), "what is in one of its rows is no decision") from error

    def _read(self, statement: str) -> Rows:
        if not self._id and not has_content(self._path) and not has_content(wal_of(self._path)):
            return []
        return self._alone(lambda database, give_up: database.read(statement, give_up))

    def _alone(self, use: Callable[[DecisionDatabase, float], T]) -> T:
        """Call `use` with the file while no other thread of this process uses it."""
        give_up = monotonic() + self._lock_wait
        with _Turn(self, self._lock_wait) as is_ours:
            if not is_ours:
                raise busy(self._path)
            return use(self._open(give_up), give_up)

    # -- writing: one thread writes for all threads that wait

    def _write(self, statement: str) -> None:
        ours = _PendingWrite(statement)
        self._waiting.append(ours)
        try:
            self._have_written(ours, monotonic() + self._lock_wait)
        except BaseException:
            # An exception from a signal handler: if no thread has taken the statement yet, none may execute it later.
            with suppress(ValueError):
                self._waiting.remove(ours)
            raise
        if ours.error is not None:
            raise copy(ours.error) from ours.error.__cause__

    def _have_written(self, ours: _PendingWrite, give_up: float) -> None:
        while True:
            with _Turn(self) as is_ours:
                if is_ours and not ours.is_answered:
                    self._write_for_all(ours, give_up)
            if is_ours:
                self._wake_next()
            if ours.is_answered:
                return
            if monotonic() > give_up:
                raise self._withdrawn(ours)
            ours.sleep()

    def _write_for_all(self, ours: _PendingWrite, give_up: float) -> None:
        """Execute all waiting statements in one transaction. If a signal handler raises, each thread tries again."""
        writes = [ours]

        def statements() -> list[str]:
            with suppress(IndexError):
                while True:
                    waiting = self._waiting.popleft()
                    if waiting is not ours:
                        writes.append(waiting)
            return [write.statement for write in writes]

        answers: Sequence[Exception | None]
        try:
            answers = self._open(give_up).write(statements, give_up)
        except DecisionFileUnusable as error:
            answers = [error] * len(writes)
        for write, answer in zip(writes, answers, strict=True):
            write.answer(answer)

    def _wake_next(self) -> None:
        with suppress(IndexError):
            self._waiting[0].wake()

    def _withdrawn(self, ours: _PendingWrite) -> DecisionFileUnusable:
        """Withdraw a statement that waited too long. Return the error, which says whether another thread may have executed it."""
        try:
            self._waiting.remove(ours)
        except ValueError:  # another thread has taken it
            return busy(self._path, undecided=False)
        return busy(self._path)

    # -- the file

    def _open(self, give_up: float) -> DecisionDatabase:
        if self._database is None:
            database = DecisionDatabase(self._path, give_up, is_new=not self._id)
            if self._id not in ("", database.id):
                problem = f"it is another log, {database.id}, than it was before, {self._id}"
                raise DecisionFileDamaged(str(self._path), problem)
            self._database, self._id = database, database.id
        self._database.require_in_place()
        return self._database

    def roll_back(self) -> None:
        """Roll back the transaction that an exception from a signal handler has left open."""
        if self._database is not None:
            self._database.roll_back()

    def leave_to_parent(self) -> None:
        """Begin afresh in a forked child, which must not touch its parent's connection, not even to close it."""
        if self._database is not None:
            self._database.leave_open()
        self._begin_afresh()


class _Turn(WithBlock):
    """A thread's turn to use the file of a log. `with` gives False if another thread has it, after `patience` seconds."""

    __slots__ = ("_log", "_patience", "_user")

    def __init__(self, log: FileLog, patience: float = 0.0) -> None:
        self._log = log
        self._patience = patience

    def __enter__(self) -> bool:
        self._user = self.liveness_to_enter()
        threads = self._log._threads
        is_ours = threads.take(self._user, self._patience) if self._patience else threads.try_to_take(self._user)
        if is_ours:
            self._log.roll_back()
        return is_ours

    def _leave(self, error: BaseException | None) -> None:
        if error is not None and self._log._threads.is_held_by(self._user):
            self._log.roll_back()  # other processes wait
        self._log._threads.leave(self._user)


class _PendingWrite:
    """A statement that waits to be executed, and its answer.

    It uses no lock that is written in Python, such as a Condition: an interrupted thread might leave that locked.
    """

    def __init__(self, statement: str) -> None:
        self.statement = statement
        self.is_answered = False
        self.error: Exception | None = None
        self._wake_ups: SimpleQueue[None] = SimpleQueue()

    def answer(self, error: Exception | None) -> None:
        self.error = error
        self.is_answered = True
        self.wake()

    def wake(self) -> None:
        self._wake_ups.put(None)

    def sleep(self) -> None:
        with suppress(Empty):
            self._wake_ups.get(timeout=_LOST_WAKE_UP)


# ---- forked children ----------------------------------------------------------------------------------------------------


_logs: weakref.WeakSet[FileLog] = weakref.WeakSet()


def _leave_parents_files() -> None:
    for log in list(_logs):
        log.leave_to_parent()


after_fork_in_child(_leave_parents_files)
