"""The time limit of a unit of work, for all that it waits for: a place in a pool, a new connection, an answer.

The server is told the limit of a statement, and stops it with an error of its own. A server that can't be reached, or stands
still, stops nothing. So a thread watches the connections of units that have a limit. A little after the deadline it shuts down
the sockets on which an answer is still waited for, and the driver raises an error in the waiting thread or task.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from contextvars import ContextVar, copy_context
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, TypeVar

from app_db._compat.clocks import monotonic
from app_db._compat.os import after_fork_in_child
from app_db._databases.database import NEVER, Database, driver_of
from app_db.errors import UnitOfWorkTimeout

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection

R = TypeVar("R")

TIME_LIMIT = "app_db_time_limit"
"""Key in the info of a DBAPI connection. The value is the limit of the unit that uses it."""

limit_of_checkout: ContextVar[TimeLimit | None] = ContextVar("app_db.limit_of_checkout", default=None)
"""The limit of the unit that takes connections from their pools in this context."""

GRACE = 0.2
"""Seconds that the server has to stop a statement at the deadline, before the socket is shut down."""

_NEXT_LOOK = 0.1
"""Seconds after which a connection is looked at again on which no answer was waited for."""


class TimeLimit:
    """The deadline of a unit of work, and the connections that must not be waited for after it."""

    def __init__(self, is_in_force: Callable[[], bool]) -> None:
        self.seconds = NEVER
        self.deadline = NEVER
        self.is_in_force = is_in_force
        """Whether the unit has not ended."""
        self.watched: dict[int, _Watched] = {}
        self.next_look = NEVER

    def set(self, seconds: float, deadline: float) -> None:
        """Set the deadline, by `monotonic()`, and the number of seconds that an error names."""
        self.seconds, self.deadline, self.next_look = seconds, deadline, deadline + GRACE
        if self.watched:
            _watch.look_early(self)

    def remaining(self) -> float:
        return max(self.deadline - monotonic(), 0.0)

    def overtime(self) -> UnitOfWorkTimeout | None:
        """Return the error to raise if the deadline has passed, or None."""
        return UnitOfWorkTimeout(self.seconds) if monotonic() >= self.deadline else None

    def refuse_overtime(self) -> None:
        error = self.overtime()
        if error is not None:
            raise error

    # -- a new connection

    async def await_in_time(self, connection: Awaitable[R]) -> R:
        """Return what an awaitable returns. Wait for it no longer than the limit allows."""
        try:
            async with asyncio.timeout(self.remaining()):
                return await connection
        except TimeoutError as error:
            overtime = self.overtime()
            if overtime is None:
                raise
            raise overtime from error

    # -- answers

    def cover(self, database: Database, dbapi_connection: DBAPIConnection) -> None:
        """Shut down the socket of a connection if its answers are waited for after the deadline, until it is released."""
        descriptor = database.descriptor_of(dbapi_connection)
        if descriptor is not None:
            _watch.add(self, id(driver_of(dbapi_connection)), _Watched(database, dbapi_connection, descriptor))

    def release(self, dbapi_connection: DBAPIConnection) -> bool:
        """Stop watching a connection. Return whether its socket was shut down."""
        watched = _watch.remove(self, id(driver_of(dbapi_connection)))
        return watched is not None and watched.is_shut


class TimedConnects:
    """Opens the connections of an engine for units of work that have a limit.

    Drivers limit only parts of that, and some in whole seconds. So each attempt runs in a thread. An attempt that takes too long
    for its unit is left to the next one, which waits for it instead of beginning another: units whose limit is shorter than it
    takes to connect would otherwise leave one thread each, and never get a connection.
    """

    def __init__(self) -> None:
        self._late: deque[_Attempt] = deque()

    def connect(self, limit: TimeLimit, connect: Callable[[], DBAPIConnection]) -> DBAPIConnection:
        """Return what `connect` returns, now or for an earlier unit. Wait for it no longer than the limit allows."""
        limit.refuse_overtime()
        connection: DBAPIConnection | None = None
        while connection is None:
            late = self._next_late()
            attempt = _Attempt(connect) if late is None else late
            try:
                wait((attempt.made,), limit.remaining())
                if not attempt.made.done():
                    raise UnitOfWorkTimeout(limit.seconds)
                if late is None or attempt.made.exception() is None:  # an earlier unit's error says nothing about now
                    connection = attempt.take()
            except BaseException:
                if attempt.taken.done():
                    attempt.made.result().close()  # an exception from a signal handler came between
                elif not attempt.made.done():
                    self._late.append(attempt)
                raise
        return connection

    def _next_late(self) -> _Attempt | None:
        """Return the oldest attempt that was left, and that does not hang."""
        with suppress(IndexError):
            while True:
                attempt = self._late.popleft()
                if monotonic() < attempt.began + _KEPT:
                    return attempt
        return None


_KEPT = 5.0
"""Seconds for which a late connection is kept, and an attempt is waited for by other units."""


class _Attempt:
    """An attempt to connect, in a thread. The thread closes a connection that nobody takes."""

    def __init__(self, connect: Callable[[], DBAPIConnection]) -> None:
        self.began = monotonic()
        self.made: Future[DBAPIConnection] = Future()
        self.taken: Future[None] = Future()
        Thread(target=copy_context().run, args=(self._run, connect), name="app_db-connect", daemon=True).start()

    def take(self) -> DBAPIConnection | None:
        """Return the connection, or None if it was closed because it was not taken in time. Raises the error of a failure."""
        connection = self.made.result()
        try:
            self.taken.set_result(None)
        except InvalidStateError:
            return None
        return connection

    def _run(self, connect: Callable[[], DBAPIConnection]) -> None:
        try:
            connection = connect()
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
            self.made.set_exception(error)
            return
        self.made.set_result(connection)
        wait((self.taken,), _KEPT)
        if self.taken.cancel():
            connection.close()


class _Watched:
    """A connection that is watched, by a descriptor of our own: the driver may close its own at any time."""

    def __init__(self, database: Database, dbapi_connection: DBAPIConnection, descriptor: int) -> None:
        self._database = database
        self._dbapi_connection = dbapi_connection
        self._socket = socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM)
        self.is_shut = False

    def shut_if_waiting(self) -> None:
        if not self.is_shut and self._database.is_waiting(self._dbapi_connection):
            self.is_shut = True
            with suppress(OSError):  # the server has closed it
                self._socket.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        self._socket.close()


class _Watch:
    """The thread that watches. It is started when a unit with a limit first uses a connection.

    Only a plain lock and a SimpleQueue are used: an exception from a signal handler can't leave these half changed.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._limits: set[TimeLimit] = set()
        self._wake_ups: SimpleQueue[None] = SimpleQueue()
        self._thread: Thread | None = None
        self._sleeps_until = NEVER

    def add(self, limit: TimeLimit, key: int, watched: _Watched) -> None:
        with self._lock:
            known = limit.watched.setdefault(key, watched)
            self._limits.add(limit)
        if known is not watched:
            watched.forget()
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._run, name="app_db-time-limits", daemon=True)
            self._thread.start()
        self.look_early(limit)

    def remove(self, limit: TimeLimit, key: int) -> _Watched | None:
        with self._lock:
            watched = limit.watched.pop(key, None)
            if not limit.watched:
                self._limits.discard(limit)
        if watched is not None:
            watched.forget()
        return watched

    def look_early(self, limit: TimeLimit) -> None:
        """Wake the thread if it would sleep beyond the next look at `limit`."""
        if limit.next_look < self._sleeps_until:
            self._wake_ups.put(None)

    def _run(self) -> None:
        while True:
            with self._lock:
                for limit in [each for each in self._limits if each.next_look <= monotonic()]:
                    self._look(limit)
                self._sleeps_until = min((limit.next_look for limit in self._limits), default=NEVER)
            with suppress(Empty):
                self._wake_ups.get(timeout=min(max(self._sleeps_until - monotonic(), 0.0), _LONGEST_SLEEP))

    def _look(self, limit: TimeLimit) -> None:
        limit.next_look = monotonic() + _NEXT_LOOK
        if limit.is_in_force():
            for watched in limit.watched.values():
                watched.shut_if_waiting()
        else:  # the application has detached what is left, or has lost it
            for watched in limit.watched.values():
                watched.forget()
            limit.watched.clear()
            self._limits.discard(limit)


_LONGEST_SLEEP = 3600.0

_watch = _Watch()


def _watch_anew() -> None:
    """Begin anew in a forked child: the thread and the connections are the parent's."""
    global _watch  # noqa: PLW0603
    _watch = _Watch()


after_fork_in_child(_watch_anew)
