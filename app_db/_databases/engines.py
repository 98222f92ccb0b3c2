"""Builds SQLAlchemy engines from settings: tuned, with a ping after idling, safe across forks, and replaceable at run time."""

from __future__ import annotations

import weakref
from asyncio import to_thread
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import create_engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

from app_db._compat.clocks import monotonic
from app_db._compat.os import after_fork_in_child
from app_db._databases.database import PROTECTED, Database, driver_of
from app_db._databases.disposal import retired, settle
from app_db._databases.holders import Checkout, Holder, HolderLog, holder_logs
from app_db._databases.pools import name_pool, pool_arguments
from app_db._databases.registry import database_of
from app_db._databases.slow_statements import log_slow_statements
from app_db._databases.time_limits import TIME_LIMIT, TimedConnects, TimeLimit, limit_of_checkout
from app_db.errors import Problem, SettingsError
from app_db.settings import PoolSettings
from app_db.settings._urls import URL_PARTS, dialect_of, for_coroutines, for_threads, is_secret, require_greenlet

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Dialect, Engine, ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState

    from app_db.settings import ConnectionSettings, DatabaseSettings

E = TypeVar("E")

_PLACE = ("url", *(part for part in URL_PARTS if part != "driver"), "password_provider")
"""The settings that say where a database is and how to log in."""

_IDLE_SINCE = "app_db_idle_since"

_LEAST_TO_CONNECT = 2.0
"""Seconds after which an attempt to connect ends by itself, at the soonest: a later unit may wait for it."""

_setups: WeakKeyDictionary[Engine, _Setup] = WeakKeyDictionary()
SHARED = "app_db_shared"
"""The attribute of a dialect whose engine stands for app_db's in an isolated test. It holds the SharedConnection."""

built: WeakSet[Dialect] = WeakSet()
"""The dialects of the engines that were built here. An engine of the application's own has another one."""

_of_parent_process: list[object] = []
"""Connections and pools of the parent process, kept so that no destructor ends the parent's sessions."""


def build_engine(name: str, settings: DatabaseSettings) -> Engine:
    """Return a new engine for the connection `name`. It connects at its first use."""
    return _build_engine(name, settings.connection(name), settings.application)


def _build_engine(name: str, connection: ConnectionSettings, application: str) -> Engine:
    engine = _build(name, connection, application, for_threads, create_engine)
    _setups[engine] = _Setup(name, engine, connection)
    return engine


def build_async_engine(name: str, settings: DatabaseSettings) -> AsyncEngine:
    """Return a new async engine for the connection `name`, from the same settings and tuned in the same way."""
    engine = _build_async_engine(name, settings.connection(name), settings.application)
    settle(name, engine)
    return engine


def build_engine_beside(name: str, connection: ConnectionSettings, application: str, seconds: float) -> Engine | AsyncEngine:
    """Return an engine that keeps no connection and sets nothing on its sessions. It does not change a file of SQLite.

    Its driver gives up an attempt to connect after about `seconds`, if it can. The engine is one for coroutines if no driver for
    threads is installed.
    """
    url = connection.sqlalchemy_url()
    is_awaited = isinstance(dialect_of(for_threads(url)), str) and not isinstance(
        dialect_of(for_coroutines(url), asynchronous=True), str
    )
    with_driver = for_coroutines if is_awaited else for_threads
    database = database_of(url.get_backend_name())
    given = {**url.query, **connection.connect_args}
    limits = database.connect_limits(with_driver(url).get_driver_name(), seconds, given)
    beside = connection.model_copy(
        update={
            "connect_args": {**connection.connect_args, **limits},
            "pool": PoolSettings(class_="null"),
            "read_only": database.is_read_only_by_transaction,
            "pooler": "transaction",  # so nothing is set on the session
            "isolation_level": None,
            "statement_timeout": None,
            "slow_statement": None,
            "held_warning": None,
            "begin_with_statement": False,
            "echo": False,
        }
    )
    if not is_awaited:
        return _build_engine(name, beside, application)
    return _build_async_engine(name, beside, application)


def _build_async_engine(name: str, connection: ConnectionSettings, application: str) -> AsyncEngine:
    require_greenlet()
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = _build(name, connection, application, for_coroutines, create_async_engine)
    _setups[engine.sync_engine] = _Setup(name, engine.sync_engine, connection)
    return engine


def _build(
    name: str, connection: ConnectionSettings, application: str, with_driver: Callable[[URL], URL], create: Callable[..., E]
) -> E:
    configured = with_driver(connection.sqlalchemy_url())
    asynchronous = with_driver is for_coroutines
    if isinstance(dialect := dialect_of(configured, asynchronous=asynchronous), str):  # the message about an unusable driver
        raise SettingsError([Problem(connection.variable("driver" if connection.url is None else "url"), dialect)])
    database = database_of(configured.get_backend_name())
    secrets = {key: value for key, value in configured.query.items() if is_secret(key)}
    shown = configured.difference_update_query(secrets) if secrets else configured  # a URL shows in an engine's repr
    url = database.url(shown, connection)
    arguments = pool_arguments(connection, asynchronous=asynchronous)
    isolation_level = database.isolation_level(connection)
    if isolation_level is not None:
        arguments["isolation_level"] = isolation_level
    if options := database.engine_options(connection):
        arguments["execution_options"] = options
    if connection.echo:
        arguments |= {"echo": True, "logging_name": name}
    return create(url, connect_args=secrets | database.connect_args(shown, application, connection), **arguments)


def holders_of(engine: Engine) -> tuple[Holder, ...] | None:
    """Return who holds connections of an engine, from the longest on; None for an engine that was not built here."""
    setup = _setups.get(engine)
    return None if setup is None else setup.holders.holders()


def retire(engine: Engine) -> None:
    """Close an engine's idle connections now, and its other connections when they return to the pool."""
    setup = _setups.get(engine)
    if setup is not None:
        setup.ensure()  # or a first connection that is being opened would miss the listener that closes it
    retired.add(engine)
    engine.dispose()


class _Setup:
    """Registers an engine's listeners just before its first connection.

    In most processes of a large application, most engines never connect.
    """

    def __init__(self, name: str, engine: Engine, connection: ConnectionSettings) -> None:
        self._name = name
        self._engine = weakref.ref(engine)
        self._connection = connection
        self._database = database = database_of(engine.dialect.name)
        self._password = connection.load_password_provider() if connection.password_provider else None
        self._driver = engine.dialect.driver
        self._is_async = engine.dialect.is_async
        self._done = False
        self._lock = Lock()
        self._timed = TimedConnects()
        self.holders = HolderLog(name, warns_after=connection.held_warning, keeps_stacks=connection.pool.stacks)
        self._connect = database.connector(engine.dialect, connection)
        built.add(engine.dialect)
        engine.dialect.connect = self.connect  # type: ignore[method-assign]
        name_pool(engine.pool, self._note_if_full)
        if connection.slow_statement is not None:
            # Now: a unit with a timeout listens to errors before it connects, and the listener that raises ends the event.
            log_slow_statements(engine, name, connection.slow_statement)

    def connect(self, *arguments: object, **parameters: object) -> DBAPIConnection:
        """Set the engine up, and return a new DBAPI connection. An error says in a note which connection was wanted."""
        self.ensure()
        limit = limit_of_checkout.get()
        try:
            if limit is None or not limit.is_in_force():
                return self._new_connection(*arguments, **parameters)
            return self._connected_in_time(limit, arguments, parameters)
        except Exception as error:
            error.add_note(self._note())  # SQLAlchemy does not wrap an OSError, such as asyncpg raises
            raise

    def _connected_in_time(
        self, limit: TimeLimit, arguments: tuple[object, ...], parameters: dict[str, object]
    ) -> DBAPIConnection:
        database = self._database
        if not database.waits_for_answers:
            limit.refuse_overtime()
            return self._new_connection(*arguments, **parameters)
        own = database.connect_limits(self._driver, max(limit.remaining(), _LEAST_TO_CONNECT), parameters)
        connect = partial(self._new_connection, *arguments, **{**parameters, **own})
        if self._is_async:
            connection: DBAPIConnection = await_only(limit.await_in_time(greenlet_spawn(connect)))
        else:
            connection = self._timed.connect(limit, connect)
        if own:
            database.lift_connect_limits(connection, parameters)
        limit.cover(database, connection)
        return connection

    def _explain(self, context: ExceptionContext) -> None:
        """Say which connection could not be made."""
        if context.connection is None and context.sqlalchemy_exception is not None:
            context.sqlalchemy_exception.add_note(self._note())

    def _note(self) -> str:
        connection = self._connection
        fields = [field for field in _PLACE if getattr(connection, field)] or ["host"]
        listed = ", ".join(map(connection.variable, fields))
        return f"app_db: the connection {self._name!r} to {connection.masked_url} could not be made. Look at {listed}."

    def _note_if_full(self) -> str:
        connection = self._connection
        return (
            f"app_db: all connections of {self._name!r} to {connection.masked_url} are in use. End units of work sooner, "
            f"or raise {connection.variable('pool')}__SIZE or {connection.variable('pool')}__MAX_OVERFLOW. They are held by:"
            f"{self.holders.shown()}"
        )

    def _new_connection(self, *arguments: object, **parameters: object) -> DBAPIConnection:
        if self._password is not None:
            # The password function may ask a server, and must not block the event loop.
            password = await_only(to_thread(self._password)) if self._is_async else self._password()
            parameters["password"] = self._database.password(self._driver, password)
        connection: DBAPIConnection = self._connect(*arguments, **parameters)
        return connection

    def ensure(self) -> None:
        """Set the engine up once. Other threads wait for that."""
        if not self._done:
            with self._lock:
                self._set_up()

    def forget_other_threads(self) -> None:
        """Replace in a forked child what belongs to threads of the parent: the lock, and what they connect."""
        self._lock = Lock()
        _of_parent_process.append(self._timed)
        self._timed = TimedConnects()

    def _set_up(self) -> None:
        engine = self._engine()
        if engine is None or self._done:
            return
        event.listen(engine, "handle_error", self._explain)
        self._database.tune(engine, self._connection, self._name)
        _watch_pool(engine, self._connection, self._database, self.holders)
        _clean_up_what_is_returned(engine, self._database, self.holders)
        self._done = True


next_checkout: ContextVar[Checkout | None] = ContextVar("app_db.next_checkout", default=None)
"""What a unit has noted before its session takes a connection from a pool in this context.

The unit learns so of the connection even if an exception from a signal handler comes before SQLAlchemy has noted it.
"""


def _watch_pool(engine: Engine, connection: ConnectionSettings, database: Database, holders: HolderLog) -> None:
    alive_window = connection.pool.alive_window
    dialect = engine.dialect
    pings = database.waits_for_answers

    @event.listens_for(engine, "checkout")
    def check(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        limit = limit_of_checkout.get()
        if limit is not None and limit.is_in_force():
            record.info[TIME_LIMIT] = limit
            limit.cover(database, dbapi_connection)
        idle_since = record.info.get(_IDLE_SINCE)
        if pings and idle_since is not None and monotonic() - idle_since > alive_window:
            try:
                dialect.do_ping(dbapi_connection)
            except dialect.loaded_dbapi.Error as error:
                raise InvalidatePoolError from error  # what closed this connection has probably closed the others
        noted = next_checkout.get()
        holders.note(record, noted)
        if noted is not None:
            next_checkout.set(None)
            if noted.taken is not None:
                noted.taken.append((weakref.ref(proxy), noted.may_be_rolled_back))

    @event.listens_for(engine, "invalidate")
    def forget(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry, error: BaseException | None) -> None:
        holders.forget(record)

    @event.listens_for(engine, "detach")
    def forget_detached(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        holders.forget(record)

    @event.listens_for(engine, "close")
    def stop_watching(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        limit = record.info.get(TIME_LIMIT)
        if limit is not None:
            limit.release(dbapi_connection)


def _clean_up_what_is_returned(engine: Engine, database: Database, holders: HolderLog) -> None:
    """Roll back connections that return to the pool, and undo what a unit of work has set on them.

    A connection that certainly has no transaction is not rolled back, because that can cost a round trip. The event is "reset"
    and not "checkin", because an exception from a signal handler in a listener to "checkin" keeps the connection out of the pool.
    """
    may_wait = engine.dialect.is_async or database.waits_for_answers

    @event.listens_for(engine, "reset")
    def reset(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry | None, state: PoolResetState) -> None:
        if record is None or state.terminate_only:
            return
        if database.may_be_in_transaction(dbapi_connection):
            database.roll_back(dbapi_connection)
        if may_wait and database.is_left_in_the_middle(dbapi_connection):
            record.invalidate()
            return
        if PROTECTED in record.info and database.may_write(driver_of(dbapi_connection)):
            record.invalidate()  # a statement has lifted the protection
            return
        database.clean_up(dbapi_connection, record.info)
        limit = record.info.get(TIME_LIMIT)
        if limit is not None:
            if limit.release(dbapi_connection):
                record.invalidate()
                return
            del record.info[TIME_LIMIT]
        record.info[_IDLE_SINCE] = monotonic()
        holders.forget(record)
        if engine in retired:
            record.invalidate()


def _leave_parents_connections() -> None:
    """Give a forked child pools of its own, so that it never uses a socket that it shares with its parent."""
    record: Any
    for record in [record for holders in holder_logs for record in holders.forget_parents()]:
        _of_parent_process.append(record.dbapi_connection)
        record.fairy_ref = None  # or the garbage collector sends a ROLLBACK; detach() takes a lock that may never be free
    for engine, setup in list(_setups.items()):
        setup.forget_other_threads()
        if engine.dialect.is_async:
            _of_parent_process.append(engine.pool)  # async connections warn when they are dropped
        engine.dispose(close=False)


after_fork_in_child(_leave_parents_connections)
