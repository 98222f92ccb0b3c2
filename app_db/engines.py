"""Settings in, SQLAlchemy engines out: tuned, checked after idling, safe across forks, and replaceable while running."""

from __future__ import annotations

import os
import time
import weakref
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import create_engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from app_db.dialects import Database, database_of
from app_db.urls import is_secret

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.pool import Pool

    from app_db.settings import ConnectionSettings, DatabaseSettings

_IDLE_SINCE = "app_db_idle_since"
_POOLS: dict[str, type[Pool]] = {"queue": QueuePool, "null": NullPool, "static": StaticPool}

_setups: WeakKeyDictionary[Engine, _Setup] = WeakKeyDictionary()
_retired: WeakSet[Engine] = WeakSet()
_checked_out: dict[int, Any] = {}  # pool records by their id, for the child of a fork
_of_parent_process: list[Any] = []


def build_engine(name: str, settings: DatabaseSettings) -> Engine:
    """Return a new engine for the connection `name`. Nothing connects before the engine is first used."""
    connection = settings.connection(name)
    configured = connection.sqlalchemy_url()
    database = database_of(configured.get_backend_name())
    secrets = {key: value for key, value in configured.query.items() if is_secret(key)}
    shown = configured.difference_update_query(secrets) if secrets else configured  # an engine shows its URL
    url = database.url(shown, connection)
    arguments = _pool_arguments(connection)
    isolation_level = database.isolation_level(connection)
    if isolation_level is not None:
        arguments["isolation_level"] = isolation_level
    if connection.echo:
        arguments |= {"echo": True, "logging_name": name}
    engine = create_engine(url, connect_args=secrets | database.connect_args(url, settings.application, connection), **arguments)
    _setups[engine] = _Setup(engine, connection, database)
    return engine


def retire(engine: Engine) -> None:
    """Close an engine's idle connections now, and those in use as they are returned. Sessions under way may finish."""
    setup = _setups.get(engine)
    if setup is not None:
        setup.ensure()  # or a first connection under way would miss the listener that closes it
    _retired.add(engine)
    engine.dispose()


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
        self._done = False
        self._lock = Lock()
        self._connect = engine.dialect.connect
        engine.dialect.connect = self.connect  # type: ignore[method-assign]

    def connect(self, *arguments: Any, **parameters: Any) -> Any:
        """Return a new DBAPI connection, with its password, of an engine that by now is set up."""
        self.ensure()
        if self._password is not None:
            parameters["password"] = self._database.password(self._driver, self._password())
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
        _watch_pool(engine, self._connection)  # after what cleans connections up, which a retired engine closes
        _reset_when_needed(engine, self._database)
        self._done = True


def _pool_arguments(connection: ConnectionSettings) -> dict[str, Any]:
    pool = connection.pool
    pool_class = _pool_class(pool.class_)
    arguments: dict[str, Any] = {
        "poolclass": pool_class,
        "pool_recycle": -1 if pool.recycle is None else pool.recycle,
        "pool_reset_on_return": None,  # `_reset_when_needed` does
    }
    if issubclass(pool_class, QueuePool):
        arguments |= {
            "pool_size": pool.size,
            "max_overflow": pool.max_overflow,
            "pool_timeout": pool.timeout,
            "pool_use_lifo": pool.use_lifo,
        }
    return arguments


def _pool_class(name: str | None) -> type[Pool]:
    if name is None:
        return QueuePool
    if name in _POOLS:
        return _POOLS[name]
    module, _, attribute = name.replace(":", ".").rpartition(".")
    pool_class: type[Pool] = getattr(import_module(module), attribute)
    return pool_class


def _watch_pool(engine: Engine, connection: ConnectionSettings) -> None:
    alive_window = connection.pool.alive_window
    dialect = engine.dialect
    pings = dialect.name != "sqlite"

    @event.listens_for(engine, "checkout")
    def check(dbapi_connection: Any, record: Any, proxy: Any) -> None:
        idle_since = record.info.get(_IDLE_SINCE)
        if pings and idle_since is not None and time.monotonic() - idle_since > alive_window:
            try:
                dialect.do_ping(dbapi_connection)
            except dialect.loaded_dbapi.Error as error:
                raise InvalidatePoolError from error  # what killed this one has likely killed the others
        _checked_out[id(record)] = record

    @event.listens_for(engine, "checkin")
    def note_idle(dbapi_connection: Any, record: Any) -> None:
        _checked_out.pop(id(record), None)
        record.info[_IDLE_SINCE] = time.monotonic()
        if engine in _retired and dbapi_connection is not None:
            record.invalidate()


def _reset_when_needed(engine: Engine, database: Database) -> None:
    """Roll back a returned connection, but not one that says itself that it has no transaction: that can cost a round trip."""

    @event.listens_for(engine, "reset")
    def reset(dbapi_connection: Any, record: Any, state: Any) -> None:
        if not state.terminate_only and database.may_be_in_transaction(dbapi_connection):
            dbapi_connection.rollback()


def _leave_parents_connections() -> None:
    """Give a forked child pools of its own, and never let it speak on a socket that it shares with its parent."""
    for record in list(_checked_out.values()):
        _of_parent_process.append(record.dbapi_connection)  # kept, lest its destructor ends the parent's session
        record.fairy_ref = None  # the collector would otherwise send a ROLLBACK; detach() takes a lock that may be held for ever
    _checked_out.clear()
    for engine, setup in list(_setups.items()):
        setup.forget_other_threads()
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_leave_parents_connections)
