"""Engines whose connections are all the same one, a `SharedConnection`: for threads, and for coroutines."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.engine.characteristics import ConnectionCharacteristic
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy
from sqlalchemy.pool import NullPool
from sqlalchemy.util import immutabledict
from sqlalchemy.util.concurrency import await_only, in_greenlet

from app_db.testing.sharing import SHARED, SHARER, SharedConnection, Sharer

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Connection, Dialect
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine

READ_ONLY = "app_db_read_only"
"""The execution option that makes a connection of a sharing engine read-only."""

_INSTEAD = frozenset(
    "dispatch _has_events connect do_begin do_commit do_rollback do_close do_terminate do_savepoint do_rollback_to_savepoint "
    "do_release_savepoint do_execute do_executemany do_execute_no_params connection_characteristics "
    "supports_server_side_cursors".split()
) | {SHARED}
"""What a dialect of a sharing engine has of its own."""


class _Noted(ConnectionCharacteristic):
    """An execution option that is noted where it would be set on the connection."""

    __slots__ = ("_note",)
    transactional = True

    def __init__(self, note: Callable[[Sharer, Any], None]) -> None:
        self._note = note

    def set_connection_characteristic(self, dialect: Dialect, conn: Connection, dbapi_conn: DBAPIConnection, value: Any) -> None:
        sharer = conn.info.get(SHARER)
        if sharer is not None:
            self._note(sharer, value)

    def set_characteristic(self, dialect: Dialect, dbapi_conn: DBAPIConnection, value: Any) -> None:
        """Do nothing: the connection is everybody's."""

    def reset_characteristic(self, dialect: Dialect, dbapi_conn: DBAPIConnection) -> None:
        """Do nothing: what was noted goes when the connection is returned."""

    def get_characteristic(self, dialect: Dialect, dbapi_conn: DBAPIConnection) -> Any:
        return None


def _note_isolation(sharer: Sharer, level: str) -> None:
    sharer.at_once = sharer.read_only or level == "AUTOCOMMIT"


def _note_read_only(sharer: Sharer, read_only: bool) -> None:
    sharer.read_only = read_only
    sharer.at_once = sharer.at_once or read_only


_CHARACTERISTICS = immutabledict(
    {
        "isolation_level": _Noted(_note_isolation),
        "postgresql_readonly": _Noted(_note_read_only),
        READ_ONLY: _Noted(_note_read_only),
    }
)


def sharing_engine(shared: SharedConnection, name: str, model: Engine, *, at_once: bool, read_only: bool) -> Engine:
    """Return an engine like `model`, whose connections are the shared one."""
    teacher = model.dialect  # not the engine, which may go when the container makes a new one
    dialect = copy.copy(teacher)
    for attribute in _INSTEAD:
        vars(dialect).pop(attribute, None)

    def create() -> Any:
        dbapi_connection = shared.dbapi_connection()
        learned = {name: value for name, value in vars(teacher).items() if name not in _INSTEAD}
        vars(dialect).update(learned)  # by connecting
        return dbapi_connection

    share(dialect, shared, close=_leave_open)
    pool = NullPool(create, dialect=dialect, reset_on_return=None)
    engine = Engine(pool, dialect, model.url, logging_name=name, echo=cast("bool | None", model.echo))
    watch_sharers(engine, shared, name, at_once=at_once, read_only=read_only)
    return engine


def share(dialect: Any, shared: SharedConnection, close: Callable[[Any], None]) -> None:
    """Have a dialect begin and end transactions, and send statements, as on a connection that is shared."""
    execute, executemany, execute_no_params = dialect.do_execute, dialect.do_executemany, dialect.do_execute_no_params

    def read_at_once(cursor: Any, context: Any) -> None:
        if shared.kind.reads_at_once or context is None or cursor.description is None:
            return
        if not (context.isinsert or context.isupdate or context.isdelete):  # of which SQLAlchemy reads some itself
            context.cursor_fetch_strategy = FullyBufferedCursorFetchStrategy(cursor, initial_buffer=deque(cursor.fetchall()))

    def do_execute(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        def send() -> None:
            shared.uncut(execute, cursor, statement, parameters, context)
            read_at_once(cursor, context)

        shared.statement(_sharer_in(context), statement, send)

    def do_executemany(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        def send() -> None:
            shared.uncut(executemany, cursor, statement, parameters, context)

        shared.statement(_sharer_in(context), statement, send)

    def do_execute_no_params(cursor: Any, statement: str, context: Any = None) -> None:
        def send() -> None:
            shared.uncut(execute_no_params, cursor, statement, context)
            read_at_once(cursor, context)

        shared.statement(_sharer_in(context), statement, send)

    dialect.do_execute, dialect.do_executemany, dialect.do_execute_no_params = do_execute, do_executemany, do_execute_no_params
    _share_transactions(dialect, shared)
    dialect.do_close = dialect.do_terminate = close
    dialect.connection_characteristics = _CHARACTERISTICS
    setattr(dialect, SHARED, shared)
    if not dialect.is_async:
        dialect.supports_server_side_cursors = False  # they would keep the wire between two statements


def _share_transactions(dialect: Any, shared: SharedConnection) -> None:
    def do_begin(proxied: Any) -> None:
        shared.start(_sharer_on(proxied))

    def do_commit(proxied: Any) -> None:
        shared.finish(_sharer_on(proxied), commit=True)

    def do_rollback(proxied: Any) -> None:
        shared.finish(_sharer_on(proxied), commit=False)

    def do_savepoint(connection: Any, name: str) -> None:
        shared.savepoint(_sharer_on(connection), name)

    def do_release_savepoint(connection: Any, name: str) -> None:
        shared.release(_sharer_on(connection), name)

    def do_rollback_to_savepoint(connection: Any, name: str) -> None:
        shared.roll_back_to(_sharer_on(connection), name)

    for instead in (do_begin, do_commit, do_rollback, do_savepoint, do_release_savepoint, do_rollback_to_savepoint):
        setattr(dialect, instead.__name__, instead)


def watch_sharers(engine: Engine, shared: SharedConnection, name: str, *, at_once: bool, read_only: bool) -> None:
    """Have the shared connection know who has it."""

    @event.listens_for(engine, "checkout")
    def check_out(dbapi_connection: Any, record: Any, proxy: Any) -> None:
        shared.check_out(record.info, name, at_once=at_once, read_only=read_only)

    @event.listens_for(engine, "reset")
    def check_in_early(dbapi_connection: Any, record: Any, state: Any) -> None:
        # SQLAlchemy goes on to the event below when an exception from a signal handler lands here, but not when it lands there.
        if record is not None and state.asyncio_safe:
            shared.check_in(record.info)

    @event.listens_for(engine, "checkin")
    def check_in(dbapi_connection: Any, record: Any) -> None:
        shared.check_in(record.info)


def _sharer_in(context: Any) -> Any:
    return None if context is None else _sharer_on(context.root_connection)


def _sharer_on(connection: Any) -> Any:
    try:
        return connection.info.get(SHARER)
    except NotImplementedError:  # the dialect is looking around on a connection that is not the pool's yet
        return None


# ---- one connection for threads and coroutines ------------------------------------------------------------------------------


def has_twin(driver: str, awaited_driver: str) -> bool:
    """Return whether the two drivers can use one connection, each in its own way."""
    return (driver, awaited_driver) in _TWINS


def async_sharing_engine(shared: SharedConnection, name: str, url: URL, *, at_once: bool, read_only: bool) -> AsyncEngine:
    """Return an engine of coroutines whose connections are a shared one that the driver for threads has made."""
    from sqlalchemy.ext.asyncio import create_async_engine

    def create(*arguments: Any, **parameters: Any) -> Awaitable[Any]:
        dbapi_connection = shared.dbapi_connection()  # here, where it can wait for others, and not in the coroutine
        return _TWINS[_driver_of(dbapi_connection), url.get_driver_name()](dbapi_connection)

    engine = create_async_engine(url, async_creator=create, poolclass=NullPool, pool_reset_on_return=None, logging_name=name)
    dialect: Any = engine.sync_engine.dialect
    share(dialect, shared, close=_let_go)
    look_around = dialect.initialize

    def initialize(connection: Connection) -> None:
        with shared.on_the_wire():  # all the time: some of what it asks the dialect doesn't hear of
            look_around(connection)

    dialect.initialize = initialize
    watch_sharers(engine.sync_engine, shared, name, at_once=at_once, read_only=read_only)
    return engine


async def _psycopg_twin(dbapi_connection: Any) -> Any:
    from psycopg import AsyncConnection
    from psycopg.adapt import AdaptersMap

    twin: Any = AsyncConnection(dbapi_connection.pgconn)
    twin._adapters = AdaptersMap(dbapi_connection.adapters)
    twin.prepare_threshold = None  # both would give their statements the same names
    twin._pool = None  # a connection without this attribute complains when it is dropped open
    return twin


async def _aiosqlite_twin(dbapi_connection: Any) -> Any:
    import aiosqlite

    twin: Any = aiosqlite.Connection(lambda: dbapi_connection, 64)
    twin.create_function = _have_it_already
    getattr(twin, "_thread", twin).daemon = True  # which it was itself before 0.22
    return await twin


async def _have_it_already(*arguments: Any, **options: Any) -> None:
    """Do nothing: SQLAlchemy made its functions when it made the shared connection, and SQLite makes none during a statement."""


def _leave_open(dbapi_connection: Any) -> None:
    """Do nothing: the connection is everybody's."""


class _Unclosable:
    """What a twin closes in place of the shared connection."""

    def close(self) -> None:
        """Do nothing."""


def _let_go(dbapi_connection: Any) -> None:
    """Stop using a twin, and leave the shared connection open."""
    twin = dbapi_connection.driver_connection
    if not hasattr(twin, "_tx"):  # aiosqlite's has a thread to stop
        return
    twin._connection = _Unclosable()
    if in_greenlet():
        await_only(twin.close())
    else:
        twin.stop()


def _driver_of(dbapi_connection: Any) -> str:
    return "psycopg" if hasattr(dbapi_connection, "pgconn") else "pysqlite"


_TWINS: dict[tuple[str, str], Callable[[Any], Awaitable[Any]]] = {
    ("psycopg", "psycopg"): _psycopg_twin,
    ("pysqlite", "aiosqlite"): _aiosqlite_twin,
}
