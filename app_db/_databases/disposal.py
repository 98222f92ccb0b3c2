"""The end of an engine of coroutines: in its event loop while that is alive, and at the sockets of its connections otherwise."""

from __future__ import annotations

import time
import warnings
import weakref
from asyncio import AbstractEventLoop, CancelledError, get_running_loop, timeout, to_thread
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from threading import Event, Thread, current_thread
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy.util.concurrency import in_greenlet

from app_db._compat.asyncio import begin_unseen, outlast, running_loop
from app_db._databases.async_connections import hang_up

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

retired: WeakSet[Engine] = WeakSet()
"""Engines whose connections close as they are returned."""

_homes: WeakKeyDictionary[Engine, _Home] = WeakKeyDictionary()

_LONGEST_DISPOSAL = 5.0
"""Seconds to wait for an event loop, which may be blocked, and for its servers to say good-bye."""

_LONGEST_WAIT = _LONGEST_DISPOSAL + 1.0
"""The same, seen from outside: longer, or the end of the loop would not wait for the end of its disposal."""

_LONGEST_STANDSTILL = 0.5
"""Seconds to wait for a loop of another thread that does not run: `asyncio.run()` ends its loop in several short runs."""


class _Home:
    """Where an engine connects: in one event loop, run by one thread.

    Its connections are closed by awaiting that in the loop, and at their sockets anywhere else.
    """

    loop: AbstractEventLoop | None = None
    thread: Thread | None = None
    cut_off = 0
    """The number of connections that were closed at their sockets, and not yet warned of."""

    def __init__(self, name: str, dialect: Any) -> None:
        self.name = name
        self._connect = dialect.connect
        dialect.connect = self.connect
        dialect.do_close = partial(self.close, dialect.do_close)
        dialect.do_terminate = partial(self.terminate, dialect.do_terminate)

    def connect(self, *arguments: Any, **parameters: Any) -> Any:
        self.loop, self.thread = running_loop(), current_thread()
        return self._connect(*arguments, **parameters)

    def close(self, in_the_loop: Callable[[Any], None], dbapi_connection: Any) -> None:
        if in_greenlet() and running_loop() is self.loop:
            return in_the_loop(dbapi_connection)
        return self._cut_off(dbapi_connection)

    def terminate(self, in_the_loop: Callable[[Any], None], dbapi_connection: Any) -> None:
        # SQLAlchemy's adapters do this without awaiting anything where they can't.
        if running_loop() is self.loop:
            return in_the_loop(dbapi_connection)
        return self._cut_off(dbapi_connection)

    def _cut_off(self, dbapi_connection: Any) -> None:
        self.cut_off += 1
        hang_up(dbapi_connection)

    def is_here(self) -> bool:
        """Return whether this thread may run the event loop: it is its own, or that of no living thread."""
        return self.thread is None or self.thread is current_thread() or not self.thread.is_alive()


def settle(name: str, engine: AsyncEngine) -> None:
    """Let an engine be disposed from anywhere, and found when it was forgotten."""
    _homes[engine.sync_engine] = _Home(name, engine.sync_engine.dialect)
    weakref.finalize(engine, _look_for_forgotten, engine.sync_engine)  # which also looks when the process ends


def wait_outside(wait: Callable[[], None]) -> None:
    """Wait for what `begin_to_retire` has begun; in a thread, where a loop runs here on which the other one may depend."""
    if running_loop() is None:
        wait()
    else:
        Thread(target=wait).start()


async def dispose_here(engines: Iterable[AsyncEngine], waits: Iterable[Callable[[], None]]) -> None:
    """Dispose engines of the running loop, to the end, and wait for what `begin_to_retire` has begun in others."""
    cancelled: CancelledError | None = None
    for engine in engines:
        cancelled = await outlast(begin_unseen(_dispose(engine))) or cancelled
    for wait in waits:
        await to_thread(wait)
    if cancelled is not None:
        raise cancelled


def begin_to_retire(engine: AsyncEngine, loop: AbstractEventLoop | None) -> Callable[[], None]:
    """Begin to dispose an engine; return what waits until it is disposed, or closed at its sockets."""
    retired.add(engine.sync_engine)
    if loop is not None and not loop.is_closed():
        if loop.is_running() or not _homes[engine.sync_engine].is_here():
            ended = Event()
            with suppress(RuntimeError):  # the loop was closed just now
                loop.call_soon_threadsafe(_dispose_here, engine, ended)
            return partial(_wait_for_loop, engine, loop, ended)
        if running_loop() is None:
            loop.run_until_complete(_dispose(engine))
    cut_off(engine.sync_engine)
    return lambda: None


async def _dispose(engine: AsyncEngine) -> None:
    """Dispose an engine in the running loop, unless its server doesn't say good-bye."""
    retired.add(engine.sync_engine)
    try:
        async with timeout(_LONGEST_DISPOSAL):  # by its timer, the loop holds the task
            await engine.dispose()
    except TimeoutError:
        _homes[engine.sync_engine].cut_off += 1  # by its driver, when it was interrupted
        cut_off(engine.sync_engine)


def _dispose_here(engine: AsyncEngine, ended: Event) -> None:
    """Dispose an engine in the running loop, to the end: no task that `asyncio.run()` sees and cancels when its loop ends."""

    async def dispose() -> None:
        try:
            await _dispose(engine)
        finally:
            ended.set()

    try:
        get_running_loop().run_in_executor(None, ended.wait, _LONGEST_WAIT)  # what `asyncio.run()` waits for last
    except RuntimeError:  # it has done so
        ended.set()
    else:
        begin_unseen(dispose())


def _wait_for_loop(engine: AsyncEngine, loop: AbstractEventLoop, ended: Event) -> None:
    """Wait until a loop has disposed an engine, and close at the socket what it doesn't come to."""
    began = ran = now = time.monotonic()
    while not ended.wait(0.01) and now - began < _LONGEST_WAIT and now - ran < _LONGEST_STANDSTILL:
        now = time.monotonic()
        if loop.is_closed():
            ended.set()  # or the thread that the loop did not wait for would
        elif loop.is_running():
            ran = now
    cut_off(engine.sync_engine)


def cut_off(engine: Engine, *, quietly: bool = False) -> None:
    """Close at their sockets the idle connections that an event loop has left behind, and warn of them."""
    home = _homes[engine]
    retired.add(engine)
    engine.dispose()
    number, home.cut_off = home.cut_off, 0
    if number and not quietly:
        message = (
            f"The connection {home.name!r} was left open in an event loop that has ended or does not answer. DBAPI connections "
            f"closed at their sockets: {number}. Write `await container.shutdown_resources()` in that loop, "
            "before it ends"
        )
        # Said as by a destructor: where warnings are errors, this one is reported, and what else is to be closed is closed.
        weakref.finalize(_Dying(), warnings.warn, message, ResourceWarning)


class _Dying:
    """An object that nothing holds."""


def _look_for_forgotten(engine: Engine) -> None:
    loop = _homes[engine].loop
    if loop is not None and loop.is_closed():
        cut_off(engine)
