"""What app_db needs to know about a kind of database, with the answers for a database that it does not know.

A new database is a module of this package that is named like its dialect and has a `DATABASE`. `registry` finds it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import event
from sqlalchemy.engine import AdaptedConnection

from app_db._compat.sqlalchemy import is_executing
from app_db._databases.migrating import MigrationRules
from app_db._databases.readings import Syntax
from app_db._databases.statements import transaction_verb
from app_db.errors import CannotIsolate

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Connection, Dialect, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.pool import PoolProxiedConnection

    from app_db._databases.inspection import Inspection
    from app_db._databases.prepare_verbs import PrepareVerbs
    from app_db._databases.shells import Shell
    from app_db.settings import ConnectionSettings

PROTECTED = "app_db_protected"
"""Key in the info of a DBAPI connection whose session was made read-only."""

NEVER = math.inf
"""The number of seconds that stands for no limit."""

Rows = Sequence[Sequence[Any]]
"""The rows of a result."""

Info = dict[str, Any]
"""The dictionary that SQLAlchemy keeps for a DBAPI connection: `Connection.info`."""

_LONGEST_CLOSE = 1.0
"""Seconds to wait for the thread of a connection that closes."""


# ---- isolated tests -----------------------------------------------------------------------------------------------------


Say = Callable[..., Rows]
"""Executes statements on the shared connection, and returns the rows of the last one."""

_numbers = count(1)


def new_mark() -> str:
    """Return a new name for a savepoint. If two savepoints have the same name, the later hides or ends the earlier one."""
    return f"app_db_{next(_numbers)}"


class SharingRules:
    """The rules for sharing one connection in a transaction that is never committed, for any database."""

    syntax: Syntax = "any"
    """By which rules the database reads texts."""
    first: tuple[str, ...] = ()
    """Statements that begin the transaction, where the driver would begin it later."""
    survives_cancellation = True
    """Whether async drivers can go on using a connection after a cancellation while they waited for an answer."""
    reads_at_once = True
    """Whether executing a statement reads the whole result, so that later statements can't change it."""
    fails_as_a_whole = False
    """Whether a statement that fails makes its whole transaction fail."""

    def refuse(self, name: str, statement: str) -> None:
        """Raise an error if a statement would end the shared transaction."""
        verb = transaction_verb(statement, self.syntax)
        if verb is not None:
            raise CannotIsolate(name, f"A {verb.upper()} sent as SQL", "Begin and end transactions by SQLAlchemy's own methods")

    def around(self, mark: str, read_only: bool) -> tuple[list[str], list[str], list[str]]:
        """Return what to execute before a unit's autonomous statement, after it, and after it has failed."""
        return [], [], []

    def fail(self, say: Say) -> None:
        """Make the transaction fail, where a statement that fails does that."""

    def check_deferred(self, say: Say) -> None:
        """Check deferred constraints, and raise the error that COMMIT would raise."""

    def as_sent(self, statement: str) -> str:
        """Return what is sent in place of a statement."""
        return statement

    def given_back(self, statement: str, parameters: object, say: Say) -> Mapping[str, str]:
        """Return what undoes, at the end of a transaction, what a statement is about to set for its length.

        The keys say what it sets: the first statement of a transaction that sets something knows how it was before.
        """
        return {}

    def execute(self, dbapi_connection: DBAPIConnection | PoolProxiedConnection, *statements: str) -> Rows:
        """Execute statements below SQLAlchemy. Return the rows of the last one."""
        if not statements:
            return []
        cursor = dbapi_connection.cursor()
        try:
            for statement in statements:
                cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
        finally:
            cursor.close()


# ---- databases ----------------------------------------------------------------------------------------------------------


class Terms(Protocol):
    """The options of a unit of work that its engines and connections depend on."""

    read_only: bool
    isolation: str | None

    @property
    def timed(self) -> bool: ...


class ReadOnlyTerms:
    """The terms of a transaction that writes nothing. On SQLite it does not wait for writers."""

    read_only = True
    isolation: str | None = None
    timed = False


class Database:
    """A database that app_db does not know. Only app_db itself refuses the writes of a read-only session there."""

    # -- engines

    syntax: Syntax = "any"
    """By which rules it reads texts."""

    sharing = SharingRules()
    """How units of an isolated test share one connection."""

    migrating = MigrationRules()
    """In which transaction migrations run, and under which lock."""

    waits_for_answers = True
    """Whether its drivers wait for a server. If so, an exception from a signal handler may leave an answer unread."""

    has_savepoints = True
    """Whether the database has savepoints."""

    has_one_writer = False
    """Whether a transaction that writes keeps all other connections from writing to the database."""

    def url(self, configured: URL, settings: ConnectionSettings) -> URL:
        """Return the URL to connect to."""
        return configured

    def connect_args(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, object]:
        """Return the driver's arguments for a new connection."""
        return dict(settings.connect_args)

    def password(self, driver: str, password: str) -> str | bytes:
        """Return a password as the driver has to be given it."""
        return password

    def isolation_level(self, settings: ConnectionSettings) -> str | None:
        """Return the isolation level to create an engine with."""
        return settings.isolation_level

    def engine_options(self, settings: ConnectionSettings) -> dict[str, object]:
        """Return the execution options of an engine."""
        return {}

    def connector(self, dialect: Dialect, settings: ConnectionSettings) -> Connect:
        """Return the function that opens a DBAPI connection."""
        return dialect.connect

    def tables_without_transactions(self, connection: Connection) -> Rows:
        """Return the names and storage engines of the tables whose rows survive a rollback."""
        return []

    def tune(self, engine: Engine, settings: ConnectionSettings, name: str) -> None:
        """Register the listeners that set up every connection of `engine`, that of the connection `name`."""

    def clean_up(self, dbapi_connection: DBAPIConnection, info: Info) -> None:
        """Undo what a unit of work has set on a connection that returns to its pool. No transaction is open."""

    # -- units of work

    def engine_for_unit(self, engine: Engine, settings: ConnectionSettings, terms: Terms) -> Engine:
        """Return `engine` with the options of a unit of work. Pool and dialect stay the same."""
        options = self.unit_options(settings, terms)
        make_read_only = self.read_only_step() if terms.read_only and not settings.read_only else None
        if not options and make_read_only is None:
            return engine
        # One derived engine for everything: SQLAlchemy 2.0 has no events for an engine derived from a derived one. The listener
        # comes after SQLAlchemy has set the isolation level, which ends with a COMMIT.
        own = engine.execution_options(**options)
        if make_read_only is not None:
            event.listen(own, "engine_connect", make_read_only)
        return own

    def unit_options(self, settings: ConnectionSettings, terms: Terms) -> dict[str, object]:
        """Return the execution options that a unit of work needs."""
        return {} if terms.isolation is None else {"isolation_level": terms.isolation}

    def read_only_step(self) -> Callable[[Connection], None] | None:
        """Return a function that makes the next transaction of a connection read-only; None if an execution option does."""
        return None

    def statement_limit(self, connection: Connection) -> float:
        """Return the seconds after which the server stops a statement; `NEVER` if it does not."""
        return NEVER

    def limit_statements(self, connection: Connection, seconds: float) -> None:
        """Have the server stop statements that take longer than `seconds`, until this is called again or the unit ends."""

    def has_lost_transaction(self, connection: Connection, failures: Sequence[BaseException]) -> bool:
        """Return whether the transaction of `connection` can't commit after statements failed with `failures`."""
        return False

    def is_in_autocommit(self, connection: Connection) -> bool:
        """Return whether the driver commits each statement, as far as that is known without asking the server."""
        return False

    def begin_now(self, connection: Connection) -> None:
        """Begin the transaction of `connection`, if the driver would begin it only before some of its statements."""

    tells_transaction = False
    """Whether `is_in_transaction` can be asked after each statement: statements may end the transaction there."""

    begins_with_first_statement = False
    """Whether a transaction is certainly open after a statement that did not fail."""

    def is_in_transaction(self, connection: Connection) -> bool | None:
        """Return whether a transaction is open, by the last answer of the server.

        None: a statement has set autocommit, so none is open, and the server commits each statement that follows.
        """
        return True

    def mark_transaction(self, connection: Connection) -> None:
        """Mark the transaction before a statement for which `calls_code` is true."""

    def has_kept_mark(self, connection: Connection) -> bool:
        """Return whether the transaction is still the one that was marked, and take the mark away."""
        return True

    @staticmethod
    def commits_by_itself(statement: str) -> bool:  # noqa: ARG004  # of those that override it
        """Return whether the database commits before this statement."""
        return False

    @staticmethod
    def refused_in_unit(statement: str) -> str | None:  # noqa: ARG004  # of those that override it
        """Return the words of a statement that changes what later units of the connection mean, or None."""
        return None

    instead_in_unit = "Use a connection of the engine, and undo it there"
    """What to do instead of what `refused_in_unit` names."""

    asks_beginning = False
    """Whether `note_beginning` sends a statement."""

    def note_beginning(self, connection: Connection) -> object:
        """Return what `has_written` is to compare with; None if there is nothing to compare with."""
        return None

    def has_written(self, connection: Connection, beginning: object, *, may_have_locked: bool) -> bool | None:
        """Return whether the transaction has changed the database. None: only the texts of its statements tell.

        `may_have_locked` is true where the transaction has locked rows, or rolled back to a savepoint.
        """
        return None

    def has_ended_transaction(self, connection: Connection) -> bool:
        """Return whether the driver knows that the transaction of `connection` has ended or failed. Nothing is sent."""
        return False

    def may_be_in_transaction(self, dbapi_connection: DBAPIConnection) -> bool:
        """Return whether a connection that returns to its pool has to be rolled back. False only when it certainly has not."""
        return True

    def roll_back(self, dbapi_connection: DBAPIConnection) -> None:
        """Roll back a connection that returns to its pool, below SQLAlchemy."""
        dbapi_connection.rollback()

    def descriptor_of(self, dbapi_connection: DBAPIConnection) -> int | None:
        """Return the file descriptor of a connection's socket; None if it has none, or the driver does not show it."""
        try:
            descriptor: int = driver_of(dbapi_connection).fileno()
        except Exception:  # noqa: BLE001  # it has no such method, or is closed
            return None
        return descriptor

    def is_waiting(self, dbapi_connection: DBAPIConnection) -> bool:
        """Return whether an answer of the server may be waited for, in another thread or in a coroutine."""
        return True

    def connect_limits(self, driver: str, seconds: float, given: Mapping[str, object]) -> dict[str, object]:
        """Return the driver's arguments by which an attempt to connect ends by itself soon after `seconds`."""
        return {}

    def lift_connect_limits(self, dbapi_connection: DBAPIConnection, given: Mapping[str, object]) -> None:
        """Restore what `connect_limits` has changed for more than the attempt."""

    def is_left_in_the_middle(self, dbapi_connection: DBAPIConnection) -> bool:
        """Return whether a connection was left in a state in which it can't be used again, as by an exception in the driver."""
        return is_executing(dbapi_connection)  # the next statement would wait without an end

    def hang_up(self, dbapi_connection: DBAPIConnection) -> None:
        """Close a connection of an async driver without its event loop, from any thread."""
        # aiosqlite has a thread of its own for each connection, and answers any loop.
        driver_connection = driver_of(dbapi_connection)
        thread = Thread(target=lambda: asyncio.run(driver_connection.close()), daemon=True)
        thread.start()
        thread.join(_LONGEST_CLOSE)

    def before_closing(self, dbapi_connection: DBAPIConnection) -> Coroutine[object, object, None] | None:
        """Return what has to be awaited before a connection of an async driver is closed in its event loop."""
        return None

    def may_write(self, driver_connection: object) -> bool:
        """Return whether a connection with PROTECTED in its info is known to be writable by now. This costs no round trip."""
        return False

    def refuses_write(self, error: BaseException) -> bool:
        """Return whether `error` says that the transaction is read-only."""
        return False

    def denies(self, error: BaseException) -> bool:
        """Return whether `error` says that the user lacks a privilege, or that a statement came after such an error."""
        return False

    def is_transient(self, error: BaseException) -> bool:
        """Return whether `error` is of a driver of this database, and may not occur when the unit of work is run again."""
        return False

    def is_lost_for_good(self, error: DBAPIError) -> bool:
        """Return whether the connection that was lost by `error` would be lost again when the unit of work is run again."""
        return False

    is_read_only_by_transaction = True
    """Whether a read-only connection behind a pooler has nothing set on its session."""

    def inspection(self) -> Inspection:
        """Return what the database can be asked about itself. Its module is imported when it is asked for."""
        from app_db._databases.inspection import Inspection

        return Inspection()

    # -- two-phase commit

    def prepare_verbs(self, driver: str) -> PrepareVerbs | None:
        """Return the statements that prepare a transaction; None if app_db can't prepare by this driver."""
        return None

    # -- decision logs in a table

    def is_victim(self, error: BaseException) -> bool:
        """Return whether `error` says that the transaction was rolled back in favour of another one, as after a deadlock."""
        return False

    def says_there_is_no_table(self, error: DBAPIError) -> bool:
        """Return whether `error` says that a table does not exist."""
        return "no such table" in str(error.orig)

    def file_of(self, url: URL) -> Path | None:
        """Return the file of a database; None if it is not in a file."""
        return None

    def limit_log_creation(self, connection: Connection, wait: float) -> None:
        """Make commits of a connection durable, and its waits for locks at most `wait` seconds. It is closed afterwards."""

    def durable_insert(self, into: str, values: str, wait: float | None = None) -> str:
        """Return an INSERT whose COMMIT returns once it is on disk, and that waits at most `wait` seconds for locks."""
        return f"{into} VALUES ({values})"

    def write_alone(self, connection: Connection, statement: str, wait: float) -> None:
        """Execute one statement and commit it. Wait at most about `wait` seconds for locks."""
        connection.exec_driver_sql(statement)
        connection.commit()

    def read_alone(self, engine: Engine, statement: str) -> Rows:
        """Return the rows of one statement without waiting for transactions that write."""
        with engine.connect() as connection:
            return connection.exec_driver_sql(statement).all()

    # -- by hand

    def shell(self, url: URL, settings: ConnectionSettings, password: str | None) -> Shell | None:
        """Return how to use the database by hand; None if app_db knows no program for it.

        `url` is that of the settings. `password` is the one to use: the URL's, or the one that a function has returned.
        """
        return None

    # -- tables, and databases for tests

    @contextmanager
    def changing_tables(self, connection: Connection, lock: str) -> Generator[None]:
        """Hold a lock called `lock` during the block, which creates or drops tables, and commit at its end."""
        with connection.begin():
            yield

    def lock_limit(self, seconds: int) -> str | None:
        """Return the statement that limits how long a transaction waits for locks; None if none is needed."""
        return None

    creates_databases = False
    """Whether `create_database` and `drop_database` work."""

    def name_for_worker(self, database: str, worker: str) -> str:
        """Return the name of the database that a test worker uses in place of `database`."""
        return f"{database}_{worker}"

    first_database: str | None = None
    """The database to connect to where that of the settings does not exist; None if there is none."""

    def has_database(self, connected: Connected, database: str) -> bool:
        """Return whether a database exists. `connected` connects to another one."""
        raise NotImplementedError

    def create_database(self, connected: Connected, database: str) -> None:
        """Create a database unless it exists. `connected` connects to another one."""
        raise NotImplementedError

    def copy_database(self, connected: Connected, source: str, database: str) -> None:
        """Create a database with the tables and rows of `source`, to which no connection may be open."""
        raise NotImplementedError

    def roll_back_prepared(self, beside: Connected, inside: Connected, database: str) -> None:
        """Roll back the prepared transactions of a database that could not be dropped with them. `inside` connects to it."""

    def drop_database(self, connected: Connected, database: str) -> None:
        """Drop a database if it exists. `connected` connects to another one."""
        raise NotImplementedError

    def async_view(self, driver: str, async_driver: str) -> AsyncView | None:
        """Return a function that makes a connection of `async_driver` from one of `driver`; None if that is not possible."""
        return None


Connected = Callable[[], AbstractContextManager["Connection"]]
"""Returns a context manager that gives a connection in autocommit."""

Connect = Callable[..., Any]
"""Opens a DBAPI connection, called with the arguments of the driver's `connect()`."""

AsyncView = Callable[..., Awaitable[object]]
"""Returns an async driver's connection that uses the given connection of a sync driver."""


def milliseconds(seconds: float) -> int:
    """Return a limit in whole milliseconds, at least 1; 0 for `NEVER`."""
    return 0 if seconds == NEVER else max(1, round(seconds * 1000))


def on_execute(engine: Engine, listener: Callable[..., None]) -> None:
    """Call `listener` before each statement of `engine` and the engines derived from it.

    Its arguments are the cursor, the statement, the parameters if there are any, and the execution context. The events are the
    dialect's, because those of the engine make every use of a connection slower, also one without a statement. A dialect also
    executes on connections that are not in the pool yet: their `info` raises NotImplementedError.
    """
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(engine, name, listener)


def driver_of(dbapi_connection: DBAPIConnection | AdaptedConnection) -> Any:
    """Return the driver's own connection. SQLAlchemy wraps those of async drivers."""
    return dbapi_connection.driver_connection if isinstance(dbapi_connection, AdaptedConnection) else dbapi_connection


def execute(dbapi_connection: DBAPIConnection | PoolProxiedConnection, *statements: str) -> None:
    """Execute statements below SQLAlchemy."""
    cursor = dbapi_connection.cursor()
    for statement in statements:
        cursor.execute(statement)
    cursor.close()


def quoted(connection: Connection, name: str) -> str:
    """Return a name as an identifier of the connection's database."""
    return connection.dialect.identifier_preparer.quote_identifier(name)


def code_of(error: BaseException) -> object:
    """Return PostgreSQL's SQLSTATE or MySQL's number of an error of a driver or of SQLAlchemy."""
    original: BaseException = getattr(error, "orig", None) or error
    if original.args and isinstance(original.args[0], int):
        return original.args[0]
    return getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
