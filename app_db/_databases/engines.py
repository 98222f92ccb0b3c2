"""Settings in, SQLAlchemy engines out: tuned, checked after idling, safe across forks, and replaceable while running."""

from __future__ import annotations

import time
import weakref
from asyncio import AbstractEventLoop, Task, to_thread, wait
from asyncio.events import _get_running_loop
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from importlib import import_module
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import create_engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool, StaticPool
from sqlalchemy.util.concurrency import await_only

from app_db._compat.asyncio import begin_unseen, outlast
from app_db._compat.os import after_fork_in_child
from app_db._databases.database import Database
from app_db._databases.dialects import hang_up, is_left_in_the_middle
from app_db._databases.registry import database_of
from app_db.errors import Problem, SettingsError
from app_db.settings.urls import dialect_of, for_coroutines, for_threads, is_secret, require_greenlet

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool, PoolProxiedConnection

    from app_db.settings import ConnectionSettings, DatabaseSettings

_IDLE_SINCE = "app_db_idle_since"
_POOLS: dict[str, type[Pool]] = {"queue": QueuePool, "null": NullPool, "static": StaticPool}

_setups: WeakKeyDictionary[Engine, _Setup] = WeakKeyDictionary()
_retired: WeakSet[Engine] = WeakSet()
_disposing: set[Task[None]] = set()
"""The event loop keeps only weak references to its tasks."""

_LONGEST_DISPOSAL = 10.0
"""Seconds to wait for a loop in another thread, which may be blocked."""

_LONGEST_FAREWELL = 1.0
"""Seconds for which the end of a loop waits for servers to say good-bye."""

_LONGEST_STANDSTILL = 0.5
"""Seconds to wait for a loop of another thread that does not run: `asyncio.run()` ends its loop in several short runs."""

_checked_out: dict[int, Any] = {}  # pool records by their id, for the child of a fork
_of_parent_process: list[Any] = []


def build_engine(name: str, settings: DatabaseSettings) -> Engine:
    """Return a new engine for the connection `name`. Nothing connects before the engine is first used."""
    engine: Engine = _build(name, settings, for_threads, create_engine)
    _setups[engine] = _setup_of(engine, name, settings)
    return engine


def build_async_engine(name: str, settings: DatabaseSettings) -> AsyncEngine:
    """Return a new engine by which coroutines use the connection `name`, from the same settings and tuned in the same way."""
    require_greenlet()
    from sqlalchemy.ext.asyncio import create_async_engine

    engine: AsyncEngine = _build(name, settings, for_coroutines, create_async_engine)
    _setups[engine.sync_engine] = _setup_of(engine.sync_engine, name, settings)
    return engine


def _setup_of(engine: Engine, name: str, settings: DatabaseSettings) -> _Setup:
    return _Setup(engine, settings.connection(name), database_of(engine.dialect.name))


def _build(name: str, settings: DatabaseSettings, with_driver: Callable[[URL], URL], create: Callable[..., Any]) -> Any:
    connection = settings.connection(name)
    configured = with_driver(connection.sqlalchemy_url())
    asynchronous = with_driver is for_coroutines
    if isinstance(dialect := dialect_of(configured, asynchronous=asynchronous), str):  # a driver that the settings do not name
        raise SettingsError([Problem(connection.variable("driver" if connection.url is None else "url"), dialect)])
    database = database_of(configured.get_backend_name())
    secrets = {key: value for key, value in configured.query.items() if is_secret(key)}
    shown = configured.difference_update_query(secrets) if secrets else configured  # an engine shows its URL
    url = database.url(shown, connection)
    arguments = _pool_arguments(connection, asynchronous=asynchronous)
    isolation_level = database.isolation_level(connection)
    if isolation_level is not None:
        arguments["isolation_level"] = isolation_level
    if connection.echo:
        arguments |= {"echo": True, "logging_name": name}
    return create(url, connect_args=secrets | database.connect_args(shown, settings.application, connection), **arguments)


def retire(engine: Engine) -> None:
    """Close an engine's idle connections now, and those in use as they are returned. Sessions under way may finish."""
    setup = _setups.get(engine)
    if setup is not None:
        setup.ensure()  # or a first connection under way would miss the listener that closes it
    _retired.add(engine)
    engine.dispose()


def retire_async(engine: AsyncEngine, loop: AbstractEventLoop | None, *, may_run: bool = True) -> None:
    """Do the same with an engine of coroutines, in its own event loop, where that is still there.

    Where this is called inside a running loop, it doesn't wait for another one, which may be waiting for this one. A loop that
    stands still is run for it, unless that is for another thread to do, which may be closing the loop (`may_run`).
    """
    _retired.add(engine.sync_engine)
    here = _get_running_loop()
    if loop is not None and not may_run:
        _wait_while_it_stands_still(loop)
    try:
        if loop is None or loop.is_closed() or not (may_run or loop.is_running()):
            _hang_up(engine.sync_engine)
        elif here is None and not loop.is_running():
            loop.run_until_complete(engine.dispose())
        else:
            disposed = _dispose_in(loop, engine)
            give_up = time.monotonic() + _LONGEST_DISPOSAL
            while here is None and not disposed.wait(0.05) and time.monotonic() < give_up:
                if loop.is_closed():  # before it came to it
                    _hang_up(engine.sync_engine)
                    return
    except RuntimeError:  # just now the loop was closed, or began to run in another thread
        if loop is not None and not loop.is_closed():
            _dispose_in(loop, engine)
        else:
            _hang_up(engine.sync_engine)


def _wait_while_it_stands_still(loop: AbstractEventLoop) -> None:
    """Wait until a loop runs on or is closed: what is closed between the last two steps of its end is never told so."""
    give_up = time.monotonic() + _LONGEST_STANDSTILL
    while not (loop.is_running() or loop.is_closed()) and time.monotonic() < give_up:
        time.sleep(0.002)


async def dispose_awaited(engines: Iterable[tuple[AsyncEngine, AbstractEventLoop | None]]) -> None:
    """Dispose engines: those of the running event loop are disposed when this returns."""
    here = _get_running_loop()
    for engine, loop in engines:
        if loop is here:
            _retired.add(engine.sync_engine)
            await engine.dispose()
        else:
            await to_thread(retire_async, engine, loop, may_run=False)


def _dispose_in(loop: AbstractEventLoop, engine: AsyncEngine) -> Event:
    """Dispose an engine in its loop as soon as that comes to it; tell when it is done."""
    done = Event()

    def finish(task: Task[None]) -> None:
        _disposing.discard(task)
        if task.cancelled():  # by the end of asyncio.run(), say
            Thread(target=_hang_up_at_the_end, args=(loop, engine.sync_engine, done)).start()
        else:
            done.set()

    def begin() -> None:
        try:  # the last thing that asyncio.run() waits for, after it has cancelled all tasks, are the threads of its executor
            loop.run_in_executor(None, done.wait, _LONGEST_FAREWELL)
        except RuntimeError:  # it has done that, too
            Thread(target=_hang_up_at_the_end, args=(loop, engine.sync_engine, done)).start()
            return
        task = loop.create_task(_dispose(engine))
        _disposing.add(task)
        task.add_done_callback(finish)

    loop.call_soon_threadsafe(begin)
    return done


async def _dispose(engine: AsyncEngine) -> None:
    """Dispose an engine to the end, although the loop ends meanwhile; be cancelled only where that would take too long."""
    task = begin_unseen(engine.dispose())
    cancelled = await outlast(task, patience=_LONGEST_FAREWELL)
    try:
        if cancelled is not None and not task.done():
            task.cancel()
            await wait((task,), timeout=0.1)
            raise cancelled
        task.result()
    finally:
        del task, cancelled  # as in `outlast`


def _hang_up_at_the_end(loop: AbstractEventLoop, engine: Engine, done: Event) -> None:
    """Hang up when a loop that is ending is closed: what it is told to close in its last moment it may never come to."""
    give_up = time.monotonic() + _LONGEST_FAREWELL
    while not loop.is_closed() and time.monotonic() < give_up:
        time.sleep(0.002)
    _hang_up(engine)
    done.set()


def _hang_up(engine: Engine) -> None:
    """Close the idle connections of an engine whose event loop is gone or about to go: nobody can wait for an answer."""
    engine.dialect.do_close = engine.dialect.do_terminate = hang_up  # type: ignore[method-assign]
    thread = Thread(target=engine.dispose)  # where no event loop runs, so that one can be borrowed
    thread.start()
    thread.join()


class _Setup:
    """What an engine needs besides its arguments, done when it is about to connect: most of the engines of a large
    application never do, in most of its processes.
    """

    def __init__(self, engine: Engine, connection: ConnectionSettings, database: Database) -> None:
        self._engine = weakref.ref(engine)
        self._connection = connection
        self._database = database
        self._password = connection.load_password_provider() if connection.password_provider else None
        self._driver = engine.dialect.driver
        self._is_async = engine.dialect.is_async
        self._done = False
        self._lock = Lock()
        self._connect = engine.dialect.connect
        engine.dialect.connect = self.connect  # type: ignore[method-assign]

    def connect(self, *arguments: Any, **parameters: Any) -> Any:
        """Return a new DBAPI connection, with its password, of an engine that by now is set up."""
        self.ensure()
        if self._password is not None:
            # It may ask a server, which must not keep the event loop.
            password = await_only(to_thread(self._password)) if self._is_async else self._password()
            parameters["password"] = self._database.password(self._driver, password)
        return self._connect(*arguments, **parameters)

    def ensure(self) -> None:
        """Set the engine up, unless that is done; a second thread's first connection waits for it."""
        if not self._done:
            with self._lock:
                self._set_up()

    def forget_other_threads(self) -> None:
        """Be usable in the child of a fork, where the thread that may have held the lock is gone."""
        self._lock = Lock()

    def _set_up(self) -> None:
        engine = self._engine()
        if engine is None or self._done:
            return
        self._database.tune(engine, self._connection)
        _watch_pool(engine, self._connection)
        _clean_up_what_is_returned(engine, self._database)
        self._done = True


def _pool_arguments(connection: ConnectionSettings, *, asynchronous: bool) -> dict[str, Any]:
    pool = connection.pool
    pool_class = _pool_class(pool.class_)
    if asynchronous and issubclass(pool_class, QueuePool) and not issubclass(pool_class, AsyncAdaptedQueuePool):
        pool_class = _for_coroutines(pool_class)
    elif pool_class is AsyncAdaptedQueuePool and not asynchronous:
        pool_class = QueuePool
    arguments: dict[str, Any] = {
        "poolclass": pool_class,
        "pool_recycle": -1 if pool.recycle is None else pool.recycle,
        "pool_reset_on_return": None,  # `_clean_up_what_is_returned` does
    }
    if issubclass(pool_class, QueuePool):
        arguments |= {
            "pool_size": pool.size,
            "max_overflow": pool.max_overflow,
            "pool_timeout": pool.timeout,
            "pool_use_lifo": pool.use_lifo,
        }
    return arguments


def _for_coroutines(pool_class: type[QueuePool]) -> type[Pool]:
    """Return what makes a queue of connections one that coroutines can wait at."""
    if pool_class is QueuePool:
        return AsyncAdaptedQueuePool
    bases: tuple[Any, ...] = (pool_class, AsyncAdaptedQueuePool)
    return cast("type[Pool]", type(pool_class.__name__, bases, {}))


def _pool_class(name: str | None) -> type[Pool]:
    if name is None:
        return QueuePool
    if name in _POOLS:
        return _POOLS[name]
    module, _, attribute = name.replace(":", ".").rpartition(".")
    pool_class: type[Pool] = getattr(import_module(module), attribute)
    return pool_class


told_of_checkout: ContextVar[Callable[[PoolProxiedConnection], None] | None] = ContextVar("app_db.told_of_checkout", default=None)
"""What is told, once, of the next connection that a pool gives out in this context.

An exception from a signal handler may come before SQLAlchemy has noted that it has begun a transaction on it.
"""


def _watch_pool(engine: Engine, connection: ConnectionSettings) -> None:
    alive_window = connection.pool.alive_window
    dialect = engine.dialect
    pings = database_of(dialect.name).waits_for_answers

    @event.listens_for(engine, "checkout")
    def check(dbapi_connection: Any, record: Any, proxy: Any) -> None:
        idle_since = record.info.get(_IDLE_SINCE)
        if pings and idle_since is not None and time.monotonic() - idle_since > alive_window:
            try:
                dialect.do_ping(dbapi_connection)
            except dialect.loaded_dbapi.Error as error:
                raise InvalidatePoolError from error  # what killed this one has likely killed the others
        _checked_out[id(record)] = record
        tell = told_of_checkout.get()
        if tell is not None:
            told_of_checkout.set(None)
            tell(proxy)

    @event.listens_for(engine, "invalidate")
    def forget(dbapi_connection: Any, record: Any, error: BaseException | None) -> None:
        _checked_out.pop(id(record), None)


def _clean_up_what_is_returned(engine: Engine, database: Database) -> None:
    """Roll back a returned connection, and take from it what its user has set.

    One that says itself that it has no transaction is not rolled back: that can cost a round trip. The event is the one before
    "checkin": an exception from a signal handler that lands in a listener to that costs the connection its place in the pool.
    """

    @event.listens_for(engine, "reset")
    def reset(dbapi_connection: Any, record: Any, state: Any) -> None:
        if record is None or state.terminate_only:
            return
        if database.may_be_in_transaction(dbapi_connection):
            database.roll_back(dbapi_connection)
        if is_left_in_the_middle(dbapi_connection):
            record.invalidate()
            return
        database.clean_up(dbapi_connection, record.info)
        record.info[_IDLE_SINCE] = time.monotonic()
        _checked_out.pop(id(record), None)
        if engine in _retired:
            record.invalidate()


def _leave_parents_connections() -> None:
    """Give a forked child pools of its own, and never let it speak on a socket that it shares with its parent."""
    for record in list(_checked_out.values()):
        _of_parent_process.append(record.dbapi_connection)  # kept, lest its destructor ends the parent's session
        record.fairy_ref = None  # the collector would otherwise send a ROLLBACK; detach() takes a lock that may be held for ever
    _checked_out.clear()
    for engine, setup in list(_setups.items()):
        setup.forget_other_threads()
        if engine.dialect.is_async:
            _of_parent_process.append(engine.pool)  # connections of coroutines complain when they are dropped
        engine.dispose(close=False)


after_fork_in_child(_leave_parents_connections)
