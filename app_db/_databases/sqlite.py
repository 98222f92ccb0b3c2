"""SQLite: WAL, foreign keys, and transactions that app_db begins instead of the driver."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.util.concurrency import await_only

from app_db._compat.aiosqlite import async_view as aiosqlite_async_view
from app_db._compat.asyncio import pause
from app_db._compat.clocks import monotonic
from app_db._databases.database import NEVER, Database, SharingRules, driver_of, execute, milliseconds, on_execute
from app_db._databases.migrating import MigrationRules
from app_db._databases.shells import Shell
from app_db._databases.statements import bare_texts
from app_db._databases.time_limits import TIME_LIMIT, TimeLimit, limit_of_checkout
from app_db.errors import InvalidUse
from app_db.settings._urls import is_memory

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from app_db._databases.database import AsyncView, Connected, Info, Rows, Say
    from app_db._databases.inspection import Inspection
    from app_db.settings import ConnectionSettings

# Keys in a DBAPI connection's info.
_READ_ONLY = "app_db_read_only"
"""Whether a read-only unit of work uses the connection."""

_DEADLINE = "app_db_deadline"
"""The monotonic time after which statements of the unit are interrupted."""

_STATEMENT_DEADLINE = "app_db_statement_deadline"
"""The same for one statement, if the settings limit each statement."""

_USUAL_WAIT = "app_db_usual_wait"
"""How many milliseconds the connection waits for a locked file if the unit of work has no time limit."""


_HEADER = ("schema_version", "user_version", "application_id")
"""What a transaction may change in a database file besides rows."""


_STAYS = re.compile(
    r"""PRAGMA\s+(?:"?\w+"?\s*\.\s*)?"?(query_only|busy_timeout|case_sensitive_like|ignore_check_constraints|locking_mode
    |read_uncommitted|recursive_triggers|trusted_schema|writable_schema)"?\s*[=(]""",
    re.IGNORECASE | re.VERBOSE,
)


@lru_cache(maxsize=2048)
def _words_that_stay(statement: str) -> str | None:
    matches = map(_STAYS.match, bare_texts(statement, "sqlite"))
    return next((f"PRAGMA {found[1]}" for found in matches if found), None)


class SQLiteSharing(SharingRules):
    """How units of an isolated test share a connection to SQLite."""

    syntax = "sqlite"
    reads_at_once = False
    survives_cancellation = False  # aiosqlite's thread goes on with the cancelled statement, beside later ones

    def around(self, mark: str, read_only: bool) -> tuple[list[str], list[str], list[str]]:
        if not read_only:
            return [], [], []
        off = ["PRAGMA query_only = OFF"]
        return ["PRAGMA query_only = ON"], off, off

    def given_back(self, statement: str, parameters: object, say: Say) -> Mapping[str, str]:
        return {"foreign keys": "PRAGMA defer_foreign_keys = OFF"} if "defer_foreign_keys" in statement.lower() else {}

    def check_deferred(self, say: Say) -> None:
        ((are_all_deferred,),) = say("PRAGMA defer_foreign_keys")
        if not (are_all_deferred or say("SELECT 1 FROM sqlite_master WHERE sql LIKE '%INITIALLY DEFERRED%' LIMIT 1")):
            return
        violations = say("PRAGMA foreign_key_check")
        if violations:
            from sqlite3 import IntegrityError

            raise IntegrityError(f"FOREIGN KEY constraint failed ({violations[0][0]})")


_VIOLATIONS = "app_db_violations"
"""Key in a DBAPI connection's info: how many rows of each table violated a foreign key before a migration."""


class SQLiteMigrationRules(MigrationRules):
    """SQLite: all of it in one transaction, whose lock on the file keeps other migrations away.

    Foreign keys are off meanwhile: Alembic alters a table by dropping it after copying it, and DROP TABLE would delete the rows
    that refer to it. SQLite ignores the switch inside a transaction.
    """

    transactional = True
    lock_ends_with_transaction = True
    has_autocommit_blocks = False
    alters_by_copying = True

    def begin(self, connection: Connection, locks: Sequence[str]) -> bool:
        dbapi_connection = connection.connection
        usual_wait = _value(dbapi_connection, "PRAGMA busy_timeout")
        execute(dbapi_connection, "PRAGMA foreign_keys = OFF", "PRAGMA busy_timeout = 0")
        try:
            connection.begin()
        except DBAPIError as error:
            execute(dbapi_connection, "PRAGMA foreign_keys = ON")
            if not DATABASE.is_transient(error.orig or error):
                raise
            return False
        finally:
            execute(dbapi_connection, f"PRAGMA busy_timeout = {usual_wait}")
        connection.info[_VIOLATIONS] = _violations(connection)
        return True

    def holder(self, connection: Connection, locks: Sequence[str]) -> str:
        return "a process that writes to the file, or migrates it (SQLite does not say which)"

    def check(self, connection: Connection) -> None:
        before = connection.info.get(_VIOLATIONS, {})
        for table, number in _violations(connection).items():
            if number > before.get(table, 0):
                raise sqlite3.IntegrityError(f"FOREIGN KEY constraint failed ({table})")

    def end(self, connection: Connection, locks: Sequence[str]) -> None:
        connection.info.pop(_VIOLATIONS, None)
        execute(connection.connection, "PRAGMA foreign_keys = ON")


def _value(dbapi_connection: PoolProxiedConnection, statement: str) -> Any:
    cursor = dbapi_connection.cursor()
    cursor.execute(statement)
    found = cursor.fetchall()[0][0]
    cursor.close()
    return found


def _violations(connection: Connection) -> Counter[str]:
    return Counter(row[0] for row in connection.exec_driver_sql("PRAGMA foreign_key_check"))


async def _roll_back(connection: Any) -> None:
    with suppress(Exception):  # it is closed
        await connection.rollback()


class SQLite(Database):
    """SQLite: WAL, foreign keys, and transactions that app_db begins instead of the driver."""

    syntax = "sqlite"
    sharing = SQLiteSharing()
    migrating = SQLiteMigrationRules()
    creates_databases = True
    waits_for_answers = False
    has_one_writer = True

    _steps_between_looks = 10_000

    def url(self, configured: URL, settings: ConnectionSettings) -> URL:
        if not is_memory(configured):
            return configured
        return configured.set(database=str(_memory_file(settings.database_identity())), query={})

    def tune(self, engine: Engine, settings: ConnectionSettings, name: str) -> None:
        self._set_up_connections(engine, settings)
        self._begin_ourselves(engine, "BEGIN" if settings.read_only else "BEGIN IMMEDIATE")
        if settings.statement_timeout is not None:
            self._interrupt_late_statements(engine, settings.statement_timeout)

    def clean_up(self, dbapi_connection: DBAPIConnection, info: Info) -> None:
        info.pop(_DEADLINE, None)
        if info.pop(_READ_ONLY, False):
            _authorize(driver_of(dbapi_connection), None)
            execute(dbapi_connection, "PRAGMA query_only = OFF")
        usual_wait = info.pop(_USUAL_WAIT, None)
        if usual_wait is not None:
            execute(dbapi_connection, f"PRAGMA busy_timeout = {usual_wait}")

    def _set_up_connections(self, engine: Engine, settings: ConnectionSettings) -> None:
        pragmas = ["PRAGMA foreign_keys = ON"]
        if is_memory(settings.sqlalchemy_url()):
            pragmas.append("PRAGMA synchronous = OFF")
        if settings.read_only:
            pragmas.append("PRAGMA query_only = ON")

        @event.listens_for(engine, "connect")
        def set_up(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
            if settings.isolation_level != "AUTOCOMMIT" and dbapi_connection.isolation_level is None:
                # `connect_args` say that the driver begins nothing, which it doesn't anyway. None is how AUTOCOMMIT is known.
                dbapi_connection.isolation_level = ""
            if not settings.read_only:
                _use_wal(dbapi_connection)
            elif settings.mirror is not None:
                # The mirrored connection can't do it while this one reads. If it fails here, that one may still succeed.
                with suppress(Exception):
                    _use_wal(dbapi_connection)
            execute(dbapi_connection, *pragmas)
            if settings.read_only:
                _authorize(driver_of(dbapi_connection), _refuse_to_lift)

    def _begin_ourselves(self, engine: Engine, statement: str) -> None:
        # A listener to the "begin" event would make every use of the engine slower. The dialect's own method does not.
        def begin(dbapi_connection: PoolProxiedConnection) -> None:
            if dbapi_connection.isolation_level is None:  # AUTOCOMMIT: nothing would end a transaction but a rollback
                return
            info = dbapi_connection.info
            if TIME_LIMIT in info:
                info.setdefault(_USUAL_WAIT, _limit_wait(dbapi_connection, info[TIME_LIMIT]))
            cursor = dbapi_connection.cursor()
            if _READ_ONLY in info:
                cursor.execute("PRAGMA query_only = ON")
                cursor.execute("BEGIN")
                _authorize(dbapi_connection.driver_connection, _refuse_to_lift)
            else:
                cursor.execute(statement)
            cursor.close()

        engine.dialect.do_begin = begin  # type: ignore[method-assign]

    def _interrupt_late_statements(self, engine: Engine, timeout: float) -> None:
        def set_deadline(cursor: object, statement: str, *parameters_and_context: Any) -> None:
            with suppress(NotImplementedError):
                parameters_and_context[-1].root_connection.info[_STATEMENT_DEADLINE] = monotonic() + timeout

        on_execute(engine, set_deadline)

        @event.listens_for(engine, "connect")
        def interrupt(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
            self._interrupt_at_deadline(driver_of(dbapi_connection), record.info)

    def read_only_step(self) -> Callable[[Connection], None]:
        return self._set_read_only

    def _set_read_only(self, connection: Connection) -> None:
        connection.info[_READ_ONLY] = True

    def limit_statements(self, connection: Connection, seconds: float) -> None:
        connection.info[_DEADLINE] = monotonic() + seconds
        self._interrupt_at_deadline(connection.connection.driver_connection, connection.info)

    def has_lost_transaction(self, connection: Connection, failures: Sequence[BaseException]) -> bool:
        # SQLite rolls back by itself, for example if the disk is full. Each later statement would then commit by itself.
        return not getattr(connection.connection.driver_connection, "in_transaction", True)

    def before_closing(self, dbapi_connection: DBAPIConnection) -> Coroutine[object, object, None]:
        # SQLite keeps the transaction, and its lock, of a connection that is closed before its last statement is freed.
        return _roll_back(driver_of(dbapi_connection))

    def begin_now(self, connection: Connection) -> None:
        # sqlite3 itself begins before a statement that changes rows, and not before DDL, which would be committed at once.
        if not getattr(connection.connection.driver_connection, "in_transaction", True):
            execute(connection.connection, "BEGIN")

    def has_ended_transaction(self, connection: Connection) -> bool:
        return self.has_lost_transaction(connection, ())

    def note_beginning(self, connection: Connection) -> object:
        return getattr(connection.connection.driver_connection, "total_changes", None)

    refused_in_unit = staticmethod(_words_that_stay)

    def has_written(self, connection: Connection, beginning: object, *, may_have_locked: bool) -> bool | None:
        if beginning is None:
            return None
        changes = getattr(connection.connection.driver_connection, "total_changes", None)
        if changes != beginning:
            return True
        try:
            return self._has_other_header(connection)
        except sqlite3.Error:  # the file can't be opened a second time: it is encrypted, or was moved
            return None

    def _has_other_header(self, connection: Connection) -> bool:
        """Return whether what PRAGMA and DDL change differs from what is committed, which another connection reads."""
        for _, name, file in connection.exec_driver_sql("PRAGMA database_list").all():
            if not file:  # a temporary database, or one in memory
                continue
            own = [connection.exec_driver_sql(f'PRAGMA "{name}".{pragma}').scalar() for pragma in _HEADER]
            with closing(sqlite3.connect(f"{Path(file).as_uri()}?mode=ro", uri=True)) as other:
                committed = [other.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in _HEADER]
            if own != committed:
                return True
        return False

    def may_be_in_transaction(self, dbapi_connection: DBAPIConnection) -> bool:
        # It is also true after a COMMIT that was refused with SQLITE_BUSY.
        found = getattr(dbapi_connection, "in_transaction", None)
        return bool(getattr(driver_of(dbapi_connection), "in_transaction", True) if found is None else found)

    def refuses_write(self, error: BaseException) -> bool:
        code: int = getattr(error, "sqlite_errorcode", 0)
        return code & 0xFF == 8

    def _interrupt_at_deadline(self, driver_connection: Any, info: Info) -> None:
        def past_deadline() -> bool:
            return bool(monotonic() > min(info.get(_DEADLINE, NEVER), info.get(_STATEMENT_DEADLINE, NEVER)))

        waiting = driver_connection.set_progress_handler(past_deadline, self._steps_between_looks)
        if waiting is not None:  # aiosqlite's
            await_only(waiting)

    def is_transient(self, error: BaseException) -> bool:
        code = getattr(error, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in (5, 6)  # SQLITE_BUSY and SQLITE_LOCKED; extended codes add higher bits

    def inspection(self) -> Inspection:
        from app_db._databases.inspections.sqlite import SQLiteInspection

        return SQLiteInspection()

    def file_of(self, url: URL) -> Path | None:
        name = url.database
        return None if is_memory(url) or name is None else Path(name.removeprefix("file:").partition("?")[0])

    def shell(self, url: URL, settings: ConnectionSettings, password: str | None) -> Shell | None:
        file = self.file_of(url)
        if file is None:
            raise InvalidUse(
                f"The database of {settings.variable('url')} is in memory, where no other program can see it",
                "Use `app-db shell`, or give it a file",
            )
        install = "Install SQLite's command line (Debian and Ubuntu: apt-get install sqlite3)"
        return Shell(["sqlite3"], install, [*(["-readonly"] if settings.read_only else []), str(file.absolute())])

    def read_alone(self, engine: Engine, statement: str) -> Rows:
        # Not in a transaction of SQLAlchemy: that would begin with BEGIN IMMEDIATE, and wait for other writers.
        connection = engine.raw_connection()
        try:
            cursor = connection.cursor()
            cursor.execute(statement)
            return list(cursor.fetchall())
        except engine.dialect.loaded_dbapi.Error as error:
            raise OperationalError(statement, None, error) from error
        finally:
            connection.close()

    def name_for_worker(self, database: str, worker: str) -> str:
        file = Path(database)
        return str(file.with_name(f"{file.stem}_{worker}{file.suffix}"))

    def has_database(self, connected: Connected, database: str) -> bool:
        return Path(database).exists()

    def copy_database(self, connected: Connected, source: str, database: str) -> None:
        """Copy what is committed, also what is in the WAL only."""
        with closing(sqlite3.connect(source)) as original, closing(sqlite3.connect(database)) as copy:
            original.backup(copy)

    def create_database(self, connected: Connected, database: str) -> None:
        """Do nothing: the first connection creates the file."""

    def drop_database(self, connected: Connected, database: str) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(database + suffix).unlink(missing_ok=True)

    def async_view(self, driver: str, async_driver: str) -> AsyncView | None:
        return aiosqlite_async_view if (driver, async_driver) == ("pysqlite", "aiosqlite") else None


def _refuse_to_lift(action: int, name: str | None, value: str | None, *_: object) -> int:
    """Refuse to lift `query_only`. SQLite asks when it compiles a statement, also one of a raw cursor."""
    lifts = action == sqlite3.SQLITE_PRAGMA and value not in (None, "ON") and str(name).lower() == "query_only"
    return sqlite3.SQLITE_DENY if lifts else sqlite3.SQLITE_OK


def _authorize(driver_connection: Any, authorize: Callable[..., int] | None) -> None:
    """Have SQLite ask a function whether it may compile a statement, or none."""
    set_authorizer = getattr(driver_connection, "set_authorizer", None)  # aiosqlite has it since 0.22
    waiting = None if set_authorizer is None else set_authorizer(authorize)
    if waiting is not None:  # aiosqlite's
        await_only(waiting)


def _use_wal(dbapi_connection: DBAPIConnection) -> None:
    """Switch the database to WAL, for good.

    Connections that do so at the same time can lock each other out. SQLite does not wait then, so this retries.
    """
    limit = limit_of_checkout.get()
    if limit is None:
        return _retry_to_use_wal(dbapi_connection, 5)
    usual_wait = _limit_wait(dbapi_connection, limit)
    try:
        _retry_to_use_wal(dbapi_connection, min(5, limit.remaining()))
    finally:
        execute(dbapi_connection, f"PRAGMA busy_timeout = {usual_wait}")


def _retry_to_use_wal(dbapi_connection: DBAPIConnection, seconds: float) -> None:
    give_up = monotonic() + seconds
    while True:
        try:
            return execute(dbapi_connection, "PRAGMA journal_mode = WAL")
        except Exception as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != 5 or monotonic() > give_up:
                raise
        _sleep(dbapi_connection, 0.01)


def _limit_wait(dbapi_connection: DBAPIConnection | PoolProxiedConnection, limit: TimeLimit) -> int:
    """Wait for a locked file no longer than the unit of work may go on. Return how many milliseconds it would have been."""
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA busy_timeout")
    usual_wait: int = cursor.fetchall()[0][0]
    cursor.execute(f"PRAGMA busy_timeout = {min(usual_wait, milliseconds(limit.remaining()))}")
    cursor.close()
    return usual_wait


def _sleep(dbapi_connection: DBAPIConnection, seconds: float) -> None:
    if isinstance(dbapi_connection, AdaptedConnection):
        await_only(pause(seconds))
    else:
        time.sleep(seconds)


_memory_files: WeakKeyDictionary[object, Path] = WeakKeyDictionary()


def _memory_file(identity: object) -> Path:
    """Return the file for a `:memory:` database. It is created at first use, and removed with its settings.

    A file in WAL mode can be read while another connection writes. SQLite's own in-memory databases either are private to one
    connection, or block readers while a connection writes.
    """
    path = _memory_files.get(identity)
    if path is None:
        directory = tempfile.mkdtemp(prefix="app_db-memory-")
        path = _memory_files.setdefault(identity, Path(directory) / "memory.db")
        weakref.finalize(identity, _remove_in_process, os.getpid(), directory)
    return path


def _remove_in_process(process: int, directory: str) -> None:
    if os.getpid() == process:  # a forked child must not remove its parent's database
        shutil.rmtree(directory, ignore_errors=True)


DATABASE = SQLite()
