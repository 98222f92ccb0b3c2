"""What every kind of database has to answer, and the answers that suit a database that app_db does not know.

`app_db._databases.registry` finds the database of a dialect. A new database is a module of this package that has the name of
its dialect, and a `DATABASE` in it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import event
from sqlalchemy.engine import AdaptedConnection

from app_db._databases.sharing_rules import SharingRules

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Connection, Dialect, Engine
    from sqlalchemy.exc import DBAPIError

    from app_db._databases.prepare_verbs import PrepareVerbs
    from app_db.settings import ConnectionSettings

NEVER = math.inf
"""Seconds that nothing takes."""


class Terms(Protocol):
    """On what terms a unit of work runs, as far as its engines and connections have to know."""

    read_only: bool
    isolation: str | None

    @property
    def timed(self) -> bool: ...


class Database:
    """Any database that SQLAlchemy can talk to. Read-only is then only what app_db itself can see and refuse."""

    # -- engines

    sharing = SharingRules()
    """What it takes to share one connection in a transaction that is never committed."""

    waits_for_answers = True
    """Whether its drivers wait for a server, so that an exception in the middle may leave a connection one answer behind."""

    has_savepoints = True
    """Whether a part of a transaction can be rolled back."""

    has_one_writer = False
    """Whether a transaction that writes shuts out every other connection to its database."""

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

    def connector(self, dialect: Dialect, settings: ConnectionSettings) -> Callable[..., Any]:
        """Return what makes a new DBAPI connection, called with the driver's arguments."""
        return dialect.connect

    def tune(self, engine: Engine, settings: ConnectionSettings) -> None:
        """Set up what every connection of `engine` needs."""

    def clean_up(self, dbapi_connection: Any, info: dict[Any, Any]) -> None:
        """Take from a connection that is returned to its pool, with no transaction open, what a unit of work has set on it."""

    # -- units of work

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

    def roll_back(self, dbapi_connection: Any) -> None:
        """Roll back a connection that is returned to its pool, below SQLAlchemy."""
        dbapi_connection.rollback()

    def refuses_write(self, error: BaseException) -> bool:
        """Return whether `error` is the server's way of saying that the transaction is read-only."""
        return False

    def is_transient(self, error: BaseException) -> bool:
        """Return whether `error`, a driver's own, is this database's, and may pass when its unit of work is run again."""
        return False

    # -- two-phase commit

    def prepare_verbs(self, driver: str) -> PrepareVerbs | None:
        """Return how transactions are prepared by a driver; None where app_db does not know how."""
        return None

    # -- decision logs in a table

    def is_victim(self, error: BaseException) -> bool:
        """Return whether the database rolled the transaction back in favour of another one, as after a deadlock."""
        return False

    def says_there_is_no_table(self, error: DBAPIError) -> bool:
        """Return whether `error` says that a table is not there."""
        return "no such table" in str(error.orig)

    def file_of(self, url: URL) -> Path | None:
        """Return the file that a database is in, if it is in one."""
        return None

    def limit_log_creation(self, connection: Connection, wait: float) -> None:
        """Make a connection that is closed afterwards durable, and have it wait at most `wait` seconds for locks."""

    def durable_insert(self, into: str, values: str, wait: float | None = None) -> str:
        """Return an INSERT whose COMMIT is on disk when it is answered, and which waits at most `wait` seconds for locks."""
        return f"{into} VALUES ({values})"

    def write_alone(self, connection: Connection, statement: str, wait: float) -> None:
        """Execute one statement and commit it. Don't wait much longer than `wait` seconds for locks."""
        connection.exec_driver_sql(statement)
        connection.commit()

    def read_alone(self, engine: Engine, statement: str) -> Sequence[Any]:
        """Return the rows of one statement, read without waiting for transactions that write."""
        with engine.connect() as connection:
            return connection.exec_driver_sql(statement).all()

    # -- tables, and databases for tests

    @contextmanager
    def changing_tables(self, connection: Connection, lock: str) -> Generator[None]:
        """Make the block the only one that makes or drops tables under the name `lock`, and commit what it did."""
        with connection.begin():
            yield

    def lock_limit(self, seconds: int) -> str | None:
        """Return what keeps the statements of a transaction from waiting for a lock longer than that, if one is needed."""
        return None

    creates_databases = False
    """Whether `create_database` and `drop_database` work."""

    def name_for_worker(self, database: str, worker: str) -> str:
        """Return the name of a test worker's own copy of a database."""
        return f"{database}_{worker}"

    def create_database(self, connected: Connected, database: str) -> None:
        """Create a database by a connection to another one, unless it is there."""
        raise NotImplementedError

    def drop_database(self, connected: Connected, database: str) -> None:
        """Drop a database by a connection to another one, if it is there."""
        raise NotImplementedError

    def async_view(self, driver: str, async_driver: str) -> Callable[[Any], Awaitable[Any]] | None:
        """Return what gives coroutines a connection of `driver` as one of `async_driver`; None where one can't be given."""
        return None


Connected = Callable[[], AbstractContextManager["Connection"]]
"""Gives a connection in autocommit."""


def milliseconds(seconds: float) -> int:
    """Return a limit as servers take it: whole milliseconds, at least one, and 0 for none."""
    return 0 if seconds == NEVER else max(1, round(seconds * 1000))


def on_execute(engine: Engine, listener: Callable[..., None]) -> None:
    """Call `listener` with every statement that `engine` and the engines derived from it are about to execute.

    Its arguments are the cursor, the statement, the parameters if there are any, and the execution context. These are the
    dialect's events: those of the engine make every use of a connection dearer, with or without a statement. A dialect also
    executes on connections that are not the pool's yet: their `info` raises NotImplementedError.
    """
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(engine, name, listener)


def driver_of(dbapi_connection: Any) -> Any:
    """Return the driver's own connection, where SQLAlchemy stands between to make it look synchronous."""
    return dbapi_connection.driver_connection if isinstance(dbapi_connection, AdaptedConnection) else dbapi_connection


def execute(dbapi_connection: Any, *statements: str) -> None:
    """Execute statements below SQLAlchemy."""
    cursor = dbapi_connection.cursor()
    for statement in statements:
        cursor.execute(statement)
    cursor.close()


def quoted(connection: Connection, name: str) -> str:
    """Return a name as an identifier of the connection's database."""
    return connection.dialect.identifier_preparer.quote_identifier(name)


def code_of(error: BaseException) -> object:
    """Return PostgreSQL's SQLSTATE or MySQL's number of an error, the driver's or SQLAlchemy's around it."""
    original: BaseException = getattr(error, "orig", None) or error
    if original.args and isinstance(original.args[0], int):
        return original.args[0]
    return getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
