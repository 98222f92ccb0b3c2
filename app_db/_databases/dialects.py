"""What app_db knows about each kind of database: one class each, and one that suits all the others.

A kind says how an engine is created and its connections set up, how a unit's options reach them, and what its errors
mean. Everything that is the same for all kinds stands elsewhere.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util.concurrency import await_only

from app_db.settings.urls import is_memory

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Connection, Engine, ExecutionContext
    from sqlalchemy.pool import PoolProxiedConnection

    from app_db.settings import ConnectionSettings

# Keys in a DBAPI connection's info.
_READ_ONLY = "app_db_read_only"
"""A read-only unit of work runs on it."""

_DEADLINE = "app_db_deadline"
"""The monotonic time after which its statements are interrupted."""

_STATEMENT_DEADLINE = "app_db_statement_deadline"
"""The same for one statement, when statements have a timeout of their own."""

_USUAL_LIMIT = "app_db_usual_limit"
"""The statement that gives the server's limit for statements back as it was before a unit set it."""

NEVER = math.inf
"""Seconds that nothing takes."""

_AMOUNT = re.compile(r"(\d+)(ms|s|min|h|d)?$")
_SECONDS = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400, None: 0.001}


def _milliseconds(seconds: float) -> int:
    """Return a limit as servers take it: whole milliseconds, at least one, and 0 for none."""
    return 0 if seconds == NEVER else max(1, round(seconds * 1000))


class Terms(Protocol):
    """On what terms a unit of work runs, as far as its engines and connections have to know."""

    read_only: bool
    isolation: str | None

    @property
    def timed(self) -> bool: ...


class Database:
    """Any database that SQLAlchemy can talk to. Read-only is then only what app_db itself can see and refuse."""

    waits_for_answers = True
    """Whether its drivers wait for a server, so that an exception in the middle may leave a connection one answer behind."""

    def url(self, configured: URL, settings: ConnectionSettings) -> URL:
        """Return the URL to connect to."""
        return configured

    def connect_args(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, Any]:
        """Return the driver's arguments for a new connection."""
        return dict(settings.connect_args)

    def password(self, driver: str, password: str) -> str | bytes:
        """Return a password in the form in which the driver sends it right."""
        return password

    def isolation_level(self, settings: ConnectionSettings) -> str | None:
        """Return the isolation level an engine is created with."""
        return settings.isolation_level

    def tune(self, engine: Engine, settings: ConnectionSettings) -> None:
        """Set up what every connection of `engine` needs."""

    def clean_up(self, dbapi_connection: Any, info: dict[Any, Any]) -> None:
        """Take from a connection that is returned to its pool, with no transaction open, what a unit of work has set on it."""

    def engine_for_unit(self, engine: Engine, settings: ConnectionSettings, terms: Terms) -> Engine:
        """Return `engine` as a unit of work on other terms than the usual uses it. Pool and dialect stay the same."""
        options = self.unit_options(settings, terms)
        make_read_only = self.read_only_step() if terms.read_only and not settings.read_only else None
        if not options and make_read_only is None:
            return engine
        # One derived engine for all: SQLAlchemy 2.0 has no events for an engine derived from a derived one. On connecting,
        # SQLAlchemy sets the isolation level first, which ends with a COMMIT, and then the transaction is made read-only.
        own = engine.execution_options(**options)
        if make_read_only is not None:
            event.listen(own, "engine_connect", make_read_only)
        return own

    def unit_options(self, settings: ConnectionSettings, terms: Terms) -> dict[str, Any]:
        """Return the execution options by which SQLAlchemy itself arranges the terms of a unit of work."""
        return {} if terms.isolation is None else {"isolation_level": terms.isolation}

    def read_only_step(self) -> Callable[[Connection], None] | None:
        """Return what makes the next transaction of a connection read-only, where no execution option does."""
        return None

    def statement_limit(self, connection: Connection) -> float:
        """Return the seconds after which the server stops a statement; infinity for never."""
        return NEVER

    def limit_statements(self, connection: Connection, seconds: float) -> None:
        """Have the server stop statements that take longer than `seconds`, until told otherwise or until the unit ends."""

    def has_lost_transaction(self, connection: Connection, failures: Sequence[BaseException]) -> bool:
        """Return whether, after statements failed with `failures`, the transaction of `connection` can't commit any more."""
        return False

    def has_ended_transaction(self, connection: Connection) -> bool:
        """Return whether the driver itself knows that the transaction of `connection` is over or failed, whoever saw to that."""
        return False

    def may_be_in_transaction(self, dbapi_connection: Any) -> bool:
        """Return whether a connection that is returned to its pool has to be rolled back. False only when that is certain."""
        return True

    def refuses_write(self, error: BaseException) -> bool:
        """Return whether `error` is the server's way of saying that the transaction is read-only."""
        return False


class PostgreSQL(Database):
    """PostgreSQL, by psycopg or any other driver."""

    _idle = 0  # libpq's PQTRANS_IDLE
    _failed = 3  # libpq's PQTRANS_INERROR

    _known_psycopgs = ("3.2.", "3.3.")  # to app_db._databases.psycopg_cursors

    _words = {"sslmode": "ssl", "connect_timeout": "timeout"}  # noqa: RUF012  # libpq's, and what asyncpg says for them
    _asyncpg_alone = frozenset(
        "statement_cache_size prepared_statement_cache_size prepared_statement_name_func max_cached_statement_lifetime "
        "max_cacheable_statement_size".split()
    )

    def url(self, configured: URL, settings: ConnectionSettings) -> URL:
        # What one driver's URL says is told the other as arguments, in its own words.
        if configured.get_driver_name() == "asyncpg":
            return configured.difference_update_query([*self._words, "application_name", "timeout"])
        if configured.get_driver_name() == "psycopg":
            return configured.difference_update_query([*self._words.values(), *self._asyncpg_alone])
        return configured

    def connect_args(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, Any]:
        driver = url.get_driver_name()
        if driver == "asyncpg":
            return self._asyncpg_arguments(url, application, settings)
        if driver == "psycopg":
            return self._psycopg_arguments(url, application, settings)
        own = {"application_name": application} if driver == "psycopg2" and "application_name" not in url.query else {}
        return {**own, **settings.connect_args}

    def _asyncpg_arguments(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, Any]:
        said: dict[str, Any] = {key: url.query[key] for key in (*self._words, "application_name", "timeout") if key in url.query}
        arguments = {self._words.get(key, key): value for key, value in (said | settings.connect_args).items()}
        name = arguments.pop("application_name", application)
        if "timeout" in arguments:
            arguments["timeout"] = float(arguments["timeout"])
        return {**arguments, "server_settings": {"application_name": name, **arguments.get("server_settings", {})}}

    def _psycopg_arguments(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, Any]:
        words = {asyncpgs: libpqs for libpqs, asyncpgs in self._words.items()}
        said: dict[str, Any] = {key: url.query[key] for key in words if key in url.query}
        arguments = {
            words.get(key, key): value for key, value in (said | settings.connect_args).items() if key not in self._asyncpg_alone
        }
        server_settings = dict(arguments.pop("server_settings", {}))
        name = server_settings.pop("application_name", application)
        if "application_name" not in url.query:
            arguments = {"application_name": name, **arguments}
        if server_settings:
            quoted = {key: re.sub(r"([ \\])", r"\\\1", str(value)) for key, value in server_settings.items()}
            arguments["options"] = " ".join(f"-c {key}={value}" for key, value in quoted.items())
        return arguments

    def isolation_level(self, settings: ConnectionSettings) -> str | None:
        # In autocommit a read is one round trip; with BEGIN and COMMIT around it, it is three.
        return settings.isolation_level or ("AUTOCOMMIT" if settings.read_only else None)

    def tune(self, engine: Engine, settings: ConnectionSettings) -> None:
        if self.isolation_level(settings) == "AUTOCOMMIT":
            engine.dialect.supports_server_side_cursors = False  # they need a transaction; `yield_per` then fetches at once
        elif engine.dialect.driver == "psycopg":
            self._save_a_round_trip(engine)
        parameters: dict[str, str] = {}
        if settings.read_only:
            parameters["default_transaction_read_only"] = "on"
        if settings.statement_timeout is not None:
            parameters["statement_timeout"] = f"{settings.statement_timeout * 1000:.0f}"
        if not parameters:
            return
        statement = "SELECT " + ", ".join(f"set_config('{name}', '{value}', false)" for name, value in parameters.items())

        @event.listens_for(engine, "connect")
        def set_parameters(dbapi_connection: Any, record: Any) -> None:
            autocommit = dbapi_connection.autocommit
            dbapi_connection.autocommit = True  # a rollback would otherwise take the parameters back
            _execute(dbapi_connection, statement)
            dbapi_connection.autocommit = autocommit

    def _save_a_round_trip(self, engine: Engine) -> None:
        import psycopg

        if not psycopg.__version__.startswith(self._known_psycopgs) or not psycopg.capabilities.has_pipeline():
            return
        from app_db._databases.psycopg_cursors import send_begin_along

        @event.listens_for(engine, "connect")
        def set_cursors(dbapi_connection: Any, record: Any) -> None:
            send_begin_along(_driver_of(dbapi_connection))

    def unit_options(self, settings: ConnectionSettings, terms: Terms) -> dict[str, Any]:
        options = super().unit_options(settings, terms)
        if not options and terms.timed and self.isolation_level(settings) == "AUTOCOMMIT":
            options["isolation_level"] = "READ COMMITTED"  # SET LOCAL needs a transaction
        if terms.read_only and not settings.read_only:
            options["postgresql_readonly"] = True
        return options

    def statement_limit(self, connection: Connection) -> float:
        shown = _AMOUNT.match(str(connection.exec_driver_sql("SHOW statement_timeout").scalar()))
        return (int(shown[1]) * _SECONDS[shown[2]] if shown else 0) or NEVER

    def limit_statements(self, connection: Connection, seconds: float) -> None:
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {_milliseconds(seconds)}")

    def has_lost_transaction(self, connection: Connection, failures: Sequence[BaseException]) -> bool:
        # The server answers COMMIT of a failed transaction with ROLLBACK, and no driver reports that as an error.
        try:
            connection.exec_driver_sql("SELECT 1")
        except DBAPIError:
            return True
        return False

    def has_ended_transaction(self, connection: Connection) -> bool:
        driver_connection: Any = connection.connection.driver_connection
        if hasattr(driver_connection, "is_in_transaction"):  # asyncpg's, which doesn't tell a failed one from one that goes on
            return not _may_be_in_asyncpgs_transaction(driver_connection)
        libpq = getattr(driver_connection, "pgconn", None)
        return libpq is not None and libpq.transaction_status in (self._idle, self._failed)

    def may_be_in_transaction(self, dbapi_connection: Any) -> bool:
        driver_connection = _driver_of(dbapi_connection)
        if hasattr(driver_connection, "is_in_transaction"):  # asyncpg's
            return _may_be_in_asyncpgs_transaction(driver_connection)
        libpq = getattr(driver_connection, "pgconn", None)
        return libpq is None or bool(libpq.transaction_status != self._idle)

    def refuses_write(self, error: BaseException) -> bool:
        return getattr(error, "sqlstate", None) == "25006"


class MySQL(Database):
    """MySQL and MariaDB."""

    _in_transaction = 1  # the protocol's SERVER_STATUS_IN_TRANS
    _deadlock = 1213
    _lock_wait_timeout = 1205

    def password(self, driver: str, password: str) -> str | bytes:
        # These would encode it in latin-1, which fails for most of the world's letters.
        return password.encode() if driver in ("pymysql", "asyncmy", "aiomysql") else password

    def connect_args(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, Any]:
        own = {} if url.password is None else {"password": self.password(url.get_driver_name(), str(url.password))}
        return {**own, **settings.connect_args}

    def tune(self, engine: Engine, settings: ConnectionSettings) -> None:
        @event.listens_for(engine, "connect")
        def set_up(dbapi_connection: Any, record: Any) -> None:
            cursor = dbapi_connection.cursor()
            if settings.read_only:
                cursor.execute("SET SESSION TRANSACTION READ ONLY")
            if settings.statement_timeout is not None:
                cursor.execute("SELECT VERSION()")
                is_mariadb = "mariadb" in cursor.fetchone()[0].lower()
                cursor.execute(self._timeout(settings.statement_timeout, is_mariadb))
            cursor.close()

    def clean_up(self, dbapi_connection: Any, info: dict[Any, Any]) -> None:
        usual_limit = info.pop(_USUAL_LIMIT, None)
        if usual_limit is not None:
            _execute(dbapi_connection, usual_limit)

    def read_only_step(self) -> Callable[[Connection], None]:
        return self._set_read_only

    def _set_read_only(self, connection: Connection) -> None:
        _execute(connection.connection, "SET TRANSACTION READ ONLY")  # the next one, which the first statement begins

    def statement_limit(self, connection: Connection) -> float:
        is_mariadb = self._is_mariadb(connection)
        variable = "max_statement_time" if is_mariadb else "max_execution_time"
        value = float(connection.exec_driver_sql(f"SELECT @@SESSION.{variable}").scalar() or 0)
        return value / (1 if is_mariadb else 1000) or NEVER

    def limit_statements(self, connection: Connection, seconds: float) -> None:
        if _USUAL_LIMIT not in connection.info:
            connection.info[_USUAL_LIMIT] = self._timeout(self.statement_limit(connection), self._is_mariadb(connection))
        connection.exec_driver_sql(self._timeout(seconds, self._is_mariadb(connection)))

    def has_lost_transaction(self, connection: Connection, failures: Sequence[BaseException]) -> bool:
        codes = {failure.args[0] for failure in failures if failure.args}
        if self._deadlock in codes:
            return True
        return self._lock_wait_timeout in codes and bool(
            connection.exec_driver_sql("SELECT @@innodb_rollback_on_timeout").scalar()
        )

    def may_be_in_transaction(self, dbapi_connection: Any) -> bool:
        status: int | None = getattr(_driver_of(dbapi_connection), "server_status", None)
        if not getattr(dbapi_connection, "open", True):
            return True  # its status is what it heard last; that it can't be rolled back is how the pool finds out
        return status is None or bool(status & self._in_transaction)

    def refuses_write(self, error: BaseException) -> bool:
        return bool(error.args) and error.args[0] == 1792

    def _is_mariadb(self, connection: Connection) -> bool:
        return bool(getattr(connection.dialect, "is_mariadb", False))

    def _timeout(self, seconds: float, is_mariadb: bool) -> str:
        if is_mariadb:
            return f"SET SESSION max_statement_time = {0 if seconds == NEVER else seconds:.6f}"
        return f"SET SESSION max_execution_time = {_milliseconds(seconds)}"


class SQLite(Database):
    """SQLite: WAL, foreign keys, and transactions that begin when app_db says so instead of the driver."""

    waits_for_answers = False

    _steps_between_looks = 10_000

    def url(self, configured: URL, settings: ConnectionSettings) -> URL:
        if not is_memory(configured):
            return configured
        return configured.set(database=str(_memory_file(settings.database_identity())), query={})

    def tune(self, engine: Engine, settings: ConnectionSettings) -> None:
        self._set_up_connections(engine, settings)
        self._begin_ourselves(engine, "BEGIN" if settings.read_only else "BEGIN IMMEDIATE")
        if settings.statement_timeout is not None:
            self._interrupt_late_statements(engine, settings.statement_timeout)

    def clean_up(self, dbapi_connection: Any, info: dict[Any, Any]) -> None:
        info.pop(_DEADLINE, None)
        if info.pop(_READ_ONLY, False):
            _execute(dbapi_connection, "PRAGMA query_only = OFF")

    def _set_up_connections(self, engine: Engine, settings: ConnectionSettings) -> None:
        pragmas = ["PRAGMA foreign_keys = ON"]
        if is_memory(settings.sqlalchemy_url()):
            pragmas.append("PRAGMA synchronous = OFF")
        if settings.read_only:
            pragmas.append("PRAGMA query_only = ON")

        @event.listens_for(engine, "connect")
        def set_up(dbapi_connection: Any, record: Any) -> None:
            if not settings.read_only:
                _use_wal(dbapi_connection)
            elif settings.mirror is not None:
                with suppress(Exception):  # what it mirrors couldn't, once this one reads; where it can't either, it needn't
                    _use_wal(dbapi_connection)
            _execute(dbapi_connection, *pragmas)

    def _begin_ourselves(self, engine: Engine, statement: str) -> None:
        # A listener to the "begin" event would make every use of the engine dearer; the dialect's own method doesn't.
        def begin(dbapi_connection: PoolProxiedConnection) -> None:
            if _READ_ONLY in dbapi_connection.info:
                _execute(dbapi_connection, "PRAGMA query_only = ON", "BEGIN")
            else:
                _execute(dbapi_connection, statement)

        engine.dialect.do_begin = begin  # type: ignore[method-assign]

    def _interrupt_late_statements(self, engine: Engine, timeout: float) -> None:
        def set_deadline(info: dict[Any, Any], statement: str) -> None:
            info[_STATEMENT_DEADLINE] = time.monotonic() + timeout

        on_execute(engine, set_deadline)

        @event.listens_for(engine, "connect")
        def interrupt(dbapi_connection: Any, record: Any) -> None:
            self._interrupt_at_deadline(_driver_of(dbapi_connection), record.info)

    def read_only_step(self) -> Callable[[Connection], None]:
        return self._set_read_only

    def _set_read_only(self, connection: Connection) -> None:
        connection.info[_READ_ONLY] = True

    def limit_statements(self, connection: Connection, seconds: float) -> None:
        connection.info[_DEADLINE] = time.monotonic() + seconds
        self._interrupt_at_deadline(connection.connection.driver_connection, connection.info)

    def has_lost_transaction(self, connection: Connection, failures: Sequence[BaseException]) -> bool:
        # A full disk, say, makes SQLite roll back by itself; what follows would be committed a statement at a time.
        return not getattr(connection.connection.driver_connection, "in_transaction", True)

    def may_be_in_transaction(self, dbapi_connection: Any) -> bool:
        # So it is also after a COMMIT refused with SQLITE_BUSY.
        return bool(getattr(_driver_of(dbapi_connection), "in_transaction", True))

    def refuses_write(self, error: BaseException) -> bool:
        code: int = getattr(error, "sqlite_errorcode", 0)
        return code & 0xFF == 8

    def _interrupt_at_deadline(self, driver_connection: Any, info: dict[Any, Any]) -> None:
        def past_deadline() -> bool:
            return bool(time.monotonic() > min(info.get(_DEADLINE, NEVER), info.get(_STATEMENT_DEADLINE, NEVER)))

        waiting = driver_connection.set_progress_handler(past_deadline, self._steps_between_looks)
        if waiting is not None:  # aiosqlite's
            await_only(waiting)


def on_execute(engine: Engine, listener: Callable[[dict[Any, Any], str], None]) -> None:
    """Call `listener` with every statement that `engine` and the engines derived from it are about to execute, and with the
    info of the DBAPI connection.

    These are the dialect's events. Those of the engine make every use of a connection dearer, statement or not.
    """

    def heard(cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> None:
        try:
            info = context.root_connection.info
        except NotImplementedError:  # the dialect is looking around on a connection that is not the pool's yet
            return
        listener(info, statement)

    def heard_without_parameters(cursor: Any, statement: str, context: ExecutionContext) -> None:
        heard(cursor, statement, (), context)

    event.listen(engine, "do_execute", heard)
    event.listen(engine, "do_executemany", heard)
    event.listen(engine, "do_execute_no_params", heard_without_parameters)


def _driver_of(dbapi_connection: Any) -> Any:
    """Return the driver's own connection, where SQLAlchemy stands between to make it look synchronous."""
    return dbapi_connection.driver_connection if isinstance(dbapi_connection, AdaptedConnection) else dbapi_connection


def _may_be_in_asyncpgs_transaction(driver_connection: Any) -> bool:
    # Of a connection that was closed it can't be asked; that such a one can't commit or roll back is how it is found out.
    return bool(driver_connection.is_closed() or driver_connection.is_in_transaction())


def is_left_in_the_middle(dbapi_connection: Any) -> bool:
    """Return whether a connection of coroutines can't be used again, because an exception from outside came at a bad moment.

    SQLAlchemy's adapter for asyncpg does not know of a transaction when it was interrupted right after BEGIN, and its rollback
    does nothing then. asyncpg would begin a savepoint for the next unit, whose commit would only release that.
    """
    mutex = getattr(dbapi_connection, "_execute_mutex", None)
    if mutex is not None and mutex.locked():
        return True  # the next statement would wait without an end
    driver_connection = _driver_of(dbapi_connection)
    if not hasattr(driver_connection, "is_in_transaction"):  # asyncpg's
        return False
    return _may_be_in_asyncpgs_transaction(driver_connection) or getattr(driver_connection, "_top_xact", None) is not None


def hang_up(dbapi_connection: Any) -> None:
    """Close a connection of coroutines whose event loop is closed, in a thread in which none runs."""
    driver_connection = _driver_of(dbapi_connection)
    transport = _transport_of(driver_connection)
    if transport is None:
        asyncio.run(_close(driver_connection))  # psycopg's and aiosqlite's can be closed in any loop
        return
    try:  # asyncpg's and asyncmy's are bound to theirs
        (getattr(driver_connection, "terminate", None) or driver_connection.close)()
    except RuntimeError:
        own_socket = getattr(transport, "_sock", None)  # asyncio's, which nobody else can close any more
        if own_socket is not None:
            own_socket.close()
            transport._sock = None


def _transport_of(driver_connection: Any) -> Any:
    writer = getattr(driver_connection, "_writer", None)  # asyncmy's before 0.2.13
    return getattr(driver_connection, "_transport", None) if writer is None else writer.transport


async def _close(driver_connection: Any) -> None:
    await driver_connection.close()


def _execute(dbapi_connection: Any, *statements: str) -> None:
    cursor = dbapi_connection.cursor()
    for statement in statements:
        cursor.execute(statement)
    cursor.close()


def _use_wal(dbapi_connection: Any) -> None:
    """Switch the database to WAL, which it then stays in.

    Connections that switch at once can lock each other out, in which case SQLite does not wait, so this does.
    """
    give_up = time.monotonic() + 5
    while True:
        try:
            return _execute(dbapi_connection, "PRAGMA journal_mode = WAL")
        except Exception as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != 5 or time.monotonic() > give_up:
                raise
        _sleep(dbapi_connection, 0.01)


def _sleep(dbapi_connection: Any, seconds: float) -> None:
    if isinstance(dbapi_connection, AdaptedConnection):
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


_memory_files: WeakKeyDictionary[object, Path] = WeakKeyDictionary()


def _memory_file(identity: object) -> Path:
    """Return the file that stands in for a `:memory:` database, made at first use and removed with its settings.

    A file in WAL mode lets a unit read through one connection what another connection of it has not written yet; SQLite's
    own in-memory databases either are private to one connection or block their readers while somebody writes.
    """
    path = _memory_files.get(identity)
    if path is None:
        directory = tempfile.mkdtemp(prefix="app_db-memory-")
        path = _memory_files.setdefault(identity, Path(directory) / "memory.db")
        weakref.finalize(identity, _remove_in_process, os.getpid(), directory)
    return path


def _remove_in_process(process: int, directory: str) -> None:
    if os.getpid() == process:  # a forked child must leave its parent's database alone
        shutil.rmtree(directory, ignore_errors=True)


_KINDS: dict[str, Database] = {"postgresql": PostgreSQL(), "mysql": MySQL(), "mariadb": MySQL(), "sqlite": SQLite()}
_ANY = Database()


def database_of(dialect: str) -> Database:
    """Return what app_db knows about the databases of a SQLAlchemy dialect."""
    return _KINDS.get(dialect, _ANY)
