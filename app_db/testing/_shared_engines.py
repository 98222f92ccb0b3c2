"""Engines whose checkouts all share one connection, a `SharedConnection`: for threads, and for coroutines."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.engine.characteristics import ConnectionCharacteristic
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.pool import NullPool
from sqlalchemy.util import immutabledict
from sqlalchemy.util.concurrency import await_only, in_greenlet

from app_db._compat.aiosqlite import is_view, leave_open
from app_db._compat.sqlalchemy import listeners_to
from app_db._databases.engines import SHARED
from app_db._databases.registry import database_of
from app_db.errors import CannotIsolate
from app_db.settings._urls import for_coroutines
from app_db.testing._savepoints import Checkout
from app_db.testing._shared_connection import CHECKOUT, SharedConnection, checkout_in

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import AdaptedConnection, Connection, Dialect
    from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
    from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
    from sqlalchemy.orm import sessionmaker
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState

    from app_db.settings import ConnectionSettings

READ_ONLY = "app_db_read_only"
"""The execution option that makes a connection of an isolated engine read-only."""

BESIDE = "app_db_beside"
"""The execution option of an isolated engine for connections that the test itself uses, beside the units of work."""

AsyncView = Callable[["DBAPIConnection"], Awaitable[object]]
"""Returns a connection for coroutines that uses a connection of the driver for threads."""

_OWN_ATTRIBUTES = frozenset(
    "dispatch connect do_begin do_commit do_rollback do_close do_terminate do_savepoint do_rollback_to_savepoint "
    "do_release_savepoint do_begin_twophase do_execute do_executemany do_execute_no_params connection_characteristics "
    "supports_server_side_cursors".split()
) | {SHARED}
"""The attributes that the dialect of an isolated engine does not copy from the dialect of the real engine."""


@dataclass(frozen=True, eq=False)
class IsolatedConnection:
    """A connection of the container, what makes its engines outside the isolation, and its sessionmakers."""

    name: str
    settings: ConnectionSettings
    engine: Callable[[], Engine]
    async_engine: Callable[[], AsyncEngine]
    sessionmaker: Callable[[], sessionmaker[Any]]
    async_sessionmaker: Callable[[], async_sessionmaker[Any]]

    @cached_property
    def autocommit(self) -> bool:
        """Whether each statement is a transaction of its own."""
        return database_of(self.url.get_backend_name()).isolation_level(self.settings) == "AUTOCOMMIT"

    @property
    def url(self) -> URL:
        """The URL of its database."""
        return self.settings.sqlalchemy_url()


class _NotedOption(ConnectionCharacteristic):
    """An execution option that is noted in the checkout, and not set on the connection, which other checkouts share."""

    __slots__ = ("_note",)
    transactional = True

    def __init__(self, note: Callable[[Checkout, object], None]) -> None:
        self._note = note

    def set_connection_characteristic(
        self, dialect: Dialect, conn: Connection, dbapi_conn: DBAPIConnection, value: object
    ) -> None:
        checkout = checkout_in(conn.info)
        if checkout is not None:
            self._note(checkout, value)

    def set_characteristic(self, dialect: Dialect, dbapi_conn: DBAPIConnection, value: object) -> None:
        """Do nothing: other checkouts share the connection."""

    def reset_characteristic(self, dialect: Dialect, dbapi_conn: DBAPIConnection) -> None:
        """Do nothing: the note ends with the checkout."""

    def get_characteristic(self, dialect: Dialect, dbapi_conn: DBAPIConnection) -> None:
        """Return None: SQLAlchemy asks for the default, to set it again."""


def _note_isolation(checkout: Checkout, level: object) -> None:
    checkout.autocommit = checkout.read_only or level == "AUTOCOMMIT"


def _note_read_only(checkout: Checkout, read_only: object) -> None:
    checkout.read_only = bool(read_only)
    checkout.autocommit = checkout.autocommit or checkout.read_only


def _note_beside(checkout: Checkout, beside: object) -> None:
    checkout.beside = bool(beside)


_CHARACTERISTICS = immutabledict(
    {
        "isolation_level": _NotedOption(_note_isolation),
        "postgresql_readonly": _NotedOption(_note_read_only),
        READ_ONLY: _NotedOption(_note_read_only),
        BESIDE: _NotedOption(_note_beside),
    }
)


def sharing_engine(shared: SharedConnection, user: IsolatedConnection, real: Engine) -> Engine:
    """Return an engine like `real` whose checkouts share one connection."""
    original = real.dialect  # not the engine, which may be disposed when the container makes a new one
    dialect = copy.copy(original)
    for attribute in _OWN_ATTRIBUTES:
        vars(dialect).pop(attribute, None)

    def create() -> DBAPIConnection:
        dbapi_connection = shared.dbapi_connection()
        # Opening it may have told the original dialect what the server can do.
        vars(dialect).update({name: value for name, value in vars(original).items() if name not in _OWN_ATTRIBUTES})
        return dbapi_connection

    _share(dialect, shared, close=_leave_open)
    pool = NullPool(create, dialect=dialect, reset_on_return=None)
    engine = Engine(pool, dialect, real.url, logging_name=user.name, echo=cast("bool | None", real.echo))
    _note_use(engine, shared, user, real)
    return engine


def _share(dialect: Dialect, shared: SharedConnection, close: Callable[[AdaptedConnection], None]) -> None:
    """Make a dialect begin and end transactions, and send statements, by a shared connection."""

    def on_checkout(method: Callable[[Checkout | None], None]) -> Callable[[PoolProxiedConnection], None]:
        return lambda connection: method(_checkout_on(connection))

    def on_savepoint(method: Callable[[Checkout, str], None]) -> Callable[[Connection, str], None]:
        def instead(connection: Connection, name: str) -> None:
            with shared.statement_lock():
                method(connection.info[CHECKOUT], name)

        return instead

    attributes: dict[str, object] = {
        "do_begin": on_checkout(shared.start),
        "do_commit": on_checkout(partial(shared.finish, commit=True)),
        "do_rollback": on_checkout(partial(shared.finish, commit=False)),
        "do_savepoint": on_savepoint(shared.savepoints.savepoint),
        "do_release_savepoint": on_savepoint(shared.savepoints.release),
        "do_begin_twophase": _refuse_two_phase,
        "do_rollback_to_savepoint": on_savepoint(shared.savepoints.roll_back_to),
        "do_close": close,
        "do_terminate": close,
        "connection_characteristics": _CHARACTERISTICS,
        SHARED: shared,
    }
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        attributes[name] = partial(_execute, shared, getattr(dialect, name))
    if not dialect.is_async:
        attributes["supports_server_side_cursors"] = False  # they would keep the connection busy between two statements
    for name, value in attributes.items():
        setattr(dialect, name, value)


def _refuse_two_phase(connection: Connection, xid: object) -> None:
    checkout = _checkout_on(connection)
    raise CannotIsolate(
        "" if checkout is None else checkout.connection,
        "Two-phase commit",
        "Give the test copies of the databases: @pytest.mark.app_db(fresh=True), or fresh_databases(container)",
    )


def _execute(
    shared: SharedConnection, execute: Callable[..., None], cursor: DBAPICursor, statement: str, *arguments: object
) -> None:
    """Do what `execute`, one of a dialect's three methods for that, does. The last argument may be the execution context."""
    context = arguments[-1] if arguments and isinstance(arguments[-1], DefaultExecutionContext) else None
    parameters = arguments[0] if arguments and arguments[0] is not context else None

    def send() -> None:
        shared.uncancelled(execute, cursor, shared.rules.as_sent(statement), *arguments)
        if shared.rules.reads_at_once or context is None or not cursor.description:
            return
        if not (context.isinsert or context.isupdate or context.isdelete):  # SQLAlchemy itself reads some rows of these
            context.cursor_fetch_strategy = FullyBufferedCursorFetchStrategy(cursor, initial_buffer=deque(cursor.fetchall()))

    shared.statement(None if context is None else _checkout_on(context.root_connection), statement, parameters, send)


def _listeners(engine: Engine | None, name: str) -> Sequence[Callable[..., object]]:
    """Return what listens to the transactions of the engine outside of the isolation."""
    return () if engine is None else listeners_to(engine, name)


def _note_use(engine: Engine, shared: SharedConnection, user: IsolatedConnection, real: Engine) -> None:
    """Make the pool tell the shared connection of each checkout and return, and call the listeners of the real engine."""
    # Not `user` itself, by which the engine would keep its container alive.
    name, autocommit, read_only = user.name, user.autocommit, user.settings.read_only

    outside = ref(real)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        listeners = _listeners(outside(), "begin")
        if listeners:
            # Their statements are part of the transaction. If it can't begin, `do_begin` says why in SQLAlchemy's words.
            with suppress(connection.dialect.loaded_dbapi.Error):
                shared.start(_checkout_on(connection))
        for listener in listeners:
            listener(connection)

    @event.listens_for(engine, "commit")
    def commit(connection: Connection) -> None:
        for listener in _listeners(outside(), "commit"):
            listener(connection)

    @event.listens_for(engine, "rollback")
    def roll_back(connection: Connection) -> None:
        for listener in _listeners(outside(), "rollback"):
            listener(connection)

    @event.listens_for(engine, "checkout")
    def check_out(dbapi_connection: object, record: ConnectionPoolEntry, proxy: object) -> None:
        shared.check_out(record.info, name, autocommit=autocommit, read_only=read_only)

    @event.listens_for(engine, "reset")
    def check_in_early(dbapi_connection: object, record: ConnectionPoolEntry | None, state: PoolResetState) -> None:
        # SQLAlchemy goes on to the event below when an exception from a signal handler lands here,
        # but not when it lands there.
        if record is not None and state.asyncio_safe:
            shared.check_in(record.info)

    @event.listens_for(engine, "checkin")
    def check_in(dbapi_connection: object, record: ConnectionPoolEntry) -> None:
        shared.check_in(record.info)


def _checkout_on(connection: Connection | PoolProxiedConnection) -> Checkout | None:
    try:
        return checkout_in(connection.info)
    except NotImplementedError:  # the connection of a dialect that reads the server's version, outside the pool
        return None


# ---- one connection for threads and coroutines ------------------------------------------------------------------------------


def async_sharing_engine(shared: SharedConnection, user: IsolatedConnection, real: Engine, view: AsyncView) -> AsyncEngine:
    """Return an engine for coroutines whose checkouts share a connection that the driver for threads has made."""
    from sqlalchemy.ext.asyncio import create_async_engine

    def create(*arguments: object, **parameters: object) -> Awaitable[object]:
        dbapi_connection = shared.dbapi_connection()  # here, where it can wait for others, and not in the coroutine
        return view(dbapi_connection)

    url = for_coroutines(real.url)
    engine = create_async_engine(url, async_creator=create, poolclass=NullPool, pool_reset_on_return=None, logging_name=user.name)
    dialect = engine.dialect
    _share(dialect, shared, close=_close_view)
    read_version = dialect.initialize

    def initialize(connection: Connection) -> None:
        with shared.statement_lock():  # for the whole of it: some of its questions don't go through the dialect
            read_version(connection)

    dialect.initialize = initialize  # type: ignore[method-assign]  # of this one dialect
    _note_use(engine.sync_engine, shared, user, real)
    return engine


def _leave_open(dbapi_connection: object) -> None:
    """Do nothing: other checkouts share the connection."""


def _close_view(dbapi_connection: AdaptedConnection) -> None:
    """Close a connection for coroutines, and leave the shared connection open that it uses."""
    view = dbapi_connection.driver_connection
    if not is_view(view):
        return
    leave_open(view)
    if in_greenlet():
        await_only(view.close())
    else:
        view.stop()
