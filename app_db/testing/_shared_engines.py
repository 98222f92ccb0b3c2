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

from app_db._compat.aiosqlite import is_view, leave_open
from app_db.testing._sharing import SHARED, SHARER, SharedConnection, Sharer

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Connection, Dialect
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine

READ_ONLY = "app_db_read_only"
"""The execution option that makes a connection of a sharing engine read-only."""

AsyncView = Callable[[Any], Awaitable[Any]]
"""Gives coroutines a connection that the driver for threads has made."""

_INSTEAD = frozenset(
    "dispatch connect do_begin do_commit do_rollback do_close do_terminate do_savepoint do_rollback_to_savepoint "
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
        if shared.rules.reads_at_once or context is None or cursor.description is None:
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


def async_sharing_engine(
    shared: SharedConnection, name: str, url: URL, view: AsyncView, *, at_once: bool, read_only: bool
) -> AsyncEngine:
    """Return an engine of coroutines whose connections are a view on a shared one that the driver for threads has made."""
    from sqlalchemy.ext.asyncio import create_async_engine

    def create(*arguments: Any, **parameters: Any) -> Awaitable[Any]:
        dbapi_connection = shared.dbapi_connection()  # here, where it can wait for others, and not in the coroutine
        return view(dbapi_connection)

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


def _leave_open(dbapi_connection: Any) -> None:
    """Do nothing: the connection is everybody's."""


def _let_go(dbapi_connection: Any) -> None:
    """Stop using a view, and leave the shared connection open."""
    view = dbapi_connection.driver_connection
    if not is_view(view):
        return
    leave_open(view)
    if in_greenlet():
        await_only(view.close())
    else:
        view.stop()
