"""Disposing async engines: in their event loop while it is alive, otherwise by closing the sockets of their connections."""

from __future__ import annotations

import warnings
import weakref
from asyncio import AbstractEventLoop, CancelledError, get_running_loop, timeout, to_thread
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from threading import Event, Thread, current_thread
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy.util.concurrency import await_only, greenlet_spawn, in_greenlet

from app_db._compat.asyncio import begin_unseen, outlast, running_loop
from app_db._compat.clocks import monotonic
from app_db._databases.registry import database_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine

retired: WeakSet[Engine] = WeakSet()
"""Engines whose connections are closed when they return to the pool."""

_loops: WeakKeyDictionary[Engine, _LoopOfEngine] = WeakKeyDictionary()

_LONGEST_CLOSE = 2.0
"""Seconds that a server has to answer when a connection is closed. SQLAlchemy waits as long when it terminates one."""

_LONGEST_DISPOSAL = 5.0
"""Seconds that an event loop has to dispose an engine. The loop may be blocked, and a server may not answer."""

_LONGEST_WAIT = _LONGEST_DISPOSAL + 1.0
"""Seconds that other threads wait for that. It is longer, so that they see the end of a disposal that took too long."""

_LONGEST_STANDSTILL = 0.5
"""Seconds to wait for a loop that does not run at the moment: `asyncio.run()` ends its loop in several short runs."""


class _LoopOfEngine:
    """The event loop in which an engine connects, and the thread that runs it.

    In the loop, the engine's connections are closed by the driver. Anywhere else, their sockets are closed.
    """

    loop: AbstractEventLoop | None = None
    thread: Thread | None = None
    cut_off = 0
    """How many connections were closed at their sockets since the last warning."""

    def __init__(self, name: str, dialect: Dialect) -> None:
        self.name = name
        self._database = database_of(dialect.name)
        self._connect = dialect.connect
        self._close, self._terminate = dialect.do_close, dialect.do_terminate
        dialect.connect = self.connect  # type: ignore[method-assign]
        dialect.do_close = self.close  # type: ignore[method-assign]
        dialect.do_terminate = self.terminate  # type: ignore[method-assign]

    def connect(self, *arguments: object, **parameters: object) -> DBAPIConnection:
        self.loop, self.thread = running_loop(), current_thread()
        return self._connect(*arguments, **parameters)

    def close(self, dbapi_connection: DBAPIConnection) -> None:
        if in_greenlet() and running_loop() is self.loop:
            return await_only(self._close_in_time(dbapi_connection))
        return self._cut_off(dbapi_connection)

    async def _close_in_time(self, dbapi_connection: DBAPIConnection) -> None:
        """Close a connection. asyncpg would wait without end for a server that has gone silent."""
        try:
            async with timeout(_LONGEST_CLOSE):
                ahead = self._database.before_closing(dbapi_connection)
                if ahead is not None:
                    await ahead
                await greenlet_spawn(self._close, dbapi_connection)
        except TimeoutError:
            self._database.hang_up(dbapi_connection)

    def terminate(self, dbapi_connection: DBAPIConnection) -> None:
        # SQLAlchemy's adapters await nothing here if they can't.
        if running_loop() is self.loop:
            ahead = self._database.before_closing(dbapi_connection)
            if ahead is not None:
                begin_unseen(ahead)  # it is sent before SQLAlchemy's task closes the connection
            return self._terminate(dbapi_connection)
        return self._cut_off(dbapi_connection)

    def _cut_off(self, dbapi_connection: DBAPIConnection) -> None:
        self.cut_off += 1
        self._database.hang_up(dbapi_connection)

    def is_here(self) -> bool:
        """Return whether this thread may run the event loop, because no other living thread does."""
        return self.thread is None or self.thread is current_thread() or not self.thread.is_alive()


def settle(name: str, engine: AsyncEngine) -> None:
    """Make an engine disposable from any thread. Warn if it is dropped after its event loop was closed."""
    _loops[engine.sync_engine] = _LoopOfEngine(name, engine.sync_engine.dialect)
    weakref.finalize(engine, _look_for_forgotten, engine.sync_engine)  # called at the end of the process, too


def wait_outside(wait: Callable[[], None]) -> None:
    """Call what `begin_to_retire` returned. If an event loop runs here, do so in a thread: the other loop may depend on it."""
    if running_loop() is None:
        wait()
    else:
        Thread(target=wait).start()


async def dispose_here(engines: Iterable[AsyncEngine], waits: Iterable[Callable[[], None]]) -> None:
    """Dispose engines of the running loop, and call `waits`. A cancellation is raised after that."""
    cancelled: CancelledError | None = None
    for engine in engines:
        cancelled = await outlast(begin_unseen(_dispose(engine))) or cancelled
    for wait in waits:
        await to_thread(wait)
    if cancelled is not None:
        raise cancelled


def begin_to_retire(engine: AsyncEngine, loop: AbstractEventLoop | None) -> Callable[[], None]:
    """Begin to dispose an engine. Return a function that waits until its connections are closed."""
    retired.add(engine.sync_engine)
    if loop is not None and not loop.is_closed():
        if loop.is_running() or not _loops[engine.sync_engine].is_here():
            ended = Event()
            with suppress(RuntimeError):  # the loop was closed just now
                loop.call_soon_threadsafe(_dispose_here, engine, ended)
            return partial(_wait_for_loop, engine, loop, ended)
        if running_loop() is None:
            loop.run_until_complete(_dispose(engine))
    cut_off(engine.sync_engine)
    return lambda: None


async def _dispose(engine: AsyncEngine) -> None:
    """Dispose an engine in the running loop. If that takes too long, close the sockets of its connections."""
    retired.add(engine.sync_engine)
    try:
        async with timeout(_LONGEST_DISPOSAL):  # its timer also keeps the loop's reference to this task
            await engine.dispose()
    except TimeoutError:
        _loops[engine.sync_engine].cut_off += 1  # the driver closed one when it was interrupted
        cut_off(engine.sync_engine)


def _dispose_here(engine: AsyncEngine, ended: Event) -> None:
    """Dispose an engine in the running loop, by a task that `asyncio.run()` does not cancel when it ends its loop."""

    async def dispose() -> None:
        try:
            await _dispose(engine)
        finally:
            ended.set()

    try:
        get_running_loop().run_in_executor(None, ended.wait, _LONGEST_WAIT)  # `asyncio.run()` waits for it at its end
    except RuntimeError:  # it has done that already
        ended.set()
    else:
        begin_unseen(dispose())


def _wait_for_loop(engine: AsyncEngine, loop: AbstractEventLoop, ended: Event) -> None:
    """Wait until a loop has disposed an engine, then close the sockets of the connections that are left."""
    began = ran = now = monotonic()
    while not ended.wait(0.01) and now - began < _LONGEST_WAIT and now - ran < _LONGEST_STANDSTILL:
        now = monotonic()
        if loop.is_closed():
            ended.set()  # the thread that waits for it in `_dispose_here` must end, too
        elif loop.is_running():
            ran = now
    cut_off(engine.sync_engine)


def cut_off(engine: Engine, *, quietly: bool = False) -> None:
    """Close the sockets of the idle connections that an event loop has left open, and warn about them."""
    of_loop = _loops[engine]
    retired.add(engine)
    engine.dispose()
    number, of_loop.cut_off = of_loop.cut_off, 0
    if number and not quietly:
        message = (
            f"The connection {of_loop.name!r} was left open in an event loop that has ended or does not answer. DBAPI "
            f"connections closed at their sockets: {number}. Write `await container.shutdown_resources()` in that loop, "
            "before it ends"
        )
        # Issued as if by a destructor: where warnings are errors, Python reports this one, and the caller goes on closing.
        weakref.finalize(_Dropped(), warnings.warn, message, ResourceWarning)


class _Dropped:
    """An object without references."""


def _look_for_forgotten(engine: Engine) -> None:
    loop = _loops[engine].loop
    if loop is not None and loop.is_closed():
        cut_off(engine)
