"""PostgreSQL, by psycopg, asyncpg or any other driver."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from app_db._compat.psycopg import async_view as psycopg_async_view
from app_db._databases.database import NEVER, Connected, Database, Terms, code_of, driver_of, execute, milliseconds, quoted
from app_db._databases.drivers.postgresql_channels import AsyncpgChannel, AsyncPsycopgChannel, PsycopgChannel
from app_db._databases.prepare_verbs import Prepared, PrepareVerbs, Settling
from app_db._databases.sharing_rules import SharingRules, new_mark
from app_db.errors import CannotIsolate

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Connection, Dialect, Engine

    from app_db._databases.exchange import AsyncChannel, Channel
    from app_db.settings import ConnectionSettings

_DURABLE = (
    "set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' "
    "ELSE current_setting('synchronous_commit') END, {local})"
)
"""With `synchronous_commit = off`, PostgreSQL answers COMMIT before the commit is on disk. It never does so for prepared
transactions, and must not for what decides about them."""

_AMOUNT = re.compile(r"(\d+)(ms|s|min|h|d)?$")
_SECONDS = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400, None: 0.001}


class PostgreSQLSharing(SharingRules):
    """How units of an isolated test share a connection to PostgreSQL."""

    _prepares = re.compile(r"\s*PREPARE\s+TRANSACTION\b", re.IGNORECASE)

    def refuse(self, name: str, statement: str) -> None:
        super().refuse(name, statement)
        if self._prepares.match(statement):
            raise CannotIsolate(
                name, "PREPARE TRANSACTION", "Leave it to the unit of work, or take the test out of the isolation"
            )

    def around(self, mark: str, read_only: bool) -> tuple[list[str], list[str], list[str]]:
        back = [f"ROLLBACK TO SAVEPOINT {mark}", f"RELEASE SAVEPOINT {mark}"]
        if read_only:  # which ends with the savepoint
            return [f"SAVEPOINT {mark}", "SET LOCAL transaction_read_only = on"], back, back
        return [f"SAVEPOINT {mark}"], back[1:], back

    def check_deferred(self, say: Callable[..., Any]) -> None:
        mark = new_mark()  # to leave it to later units when their constraints are checked
        checks = [
            f"SAVEPOINT {mark}",
            "SET CONSTRAINTS ALL IMMEDIATE",
            f"ROLLBACK TO SAVEPOINT {mark}",
            f"RELEASE SAVEPOINT {mark}",
        ]
        say(*checks)

    def execute(self, dbapi_connection: Any, *statements: str) -> Any:
        sends_several = statements and hasattr(dbapi_connection, "pgconn")  # psycopg sends them in one go
        return super().execute(dbapi_connection, *(("; ".join(statements),) if sends_several else statements))

    def limit_before(self, statement: str, ask: Callable[[str], Any]) -> str | None:
        if not statement.startswith("SET LOCAL statement_timeout"):
            return None
        return f"SET LOCAL statement_timeout = '{ask('SHOW statement_timeout')}'"


class PostgreSQL(Database):
    """PostgreSQL, by psycopg or any other driver."""

    sharing = PostgreSQLSharing()
    creates_databases = True

    _idle = 0  # libpq's PQTRANS_IDLE
    _failed = 3  # libpq's PQTRANS_INERROR

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

    def connector(self, dialect: Dialect, settings: ConnectionSettings) -> Callable[..., Any]:
        if not settings.begin_with_statement or dialect.driver != "psycopg" or self.isolation_level(settings) == "AUTOCOMMIT":
            return dialect.connect
        from psycopg import Pipeline

        if not Pipeline.is_supported():  # by an old libpq
            return dialect.connect
        from app_db._databases.drivers import begin_along

        if dialect.is_async:
            return partial(dialect.connect, async_creator_fn=begin_along.connect_async)
        return begin_along.connect

    def tune(self, engine: Engine, settings: ConnectionSettings) -> None:
        if self.isolation_level(settings) == "AUTOCOMMIT":
            engine.dialect.supports_server_side_cursors = False  # they need a transaction; `yield_per` then fetches at once
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
            execute(dbapi_connection, statement)
            dbapi_connection.autocommit = autocommit

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
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {milliseconds(seconds)}")

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
        driver_connection = driver_of(dbapi_connection)
        if hasattr(driver_connection, "is_in_transaction"):  # asyncpg's
            return _may_be_in_asyncpgs_transaction(driver_connection)
        libpq = getattr(driver_connection, "pgconn", None)
        return libpq is None or bool(libpq.transaction_status != self._idle)

    def clean_up(self, dbapi_connection: Any, info: dict[Any, Any]) -> None:
        # The transaction may have been ended below the driver's commit() and rollback(): by PREPARE TRANSACTION, say.
        if getattr(driver_of(dbapi_connection), "is_left_in_autocommit", False):
            dbapi_connection.autocommit = False

    def refuses_write(self, error: BaseException) -> bool:
        return getattr(error, "sqlstate", None) == "25006"

    def is_transient(self, error: BaseException) -> bool:
        sqlstate = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return isinstance(sqlstate, str) and sqlstate.startswith("40")

    def prepare_verbs(self, driver: str) -> PrepareVerbs | None:
        return _VERBS if driver in ("psycopg", "asyncpg") else None

    def is_victim(self, error: BaseException) -> bool:
        return code_of(error) in ("40001", "40P01")

    def says_there_is_no_table(self, error: DBAPIError) -> bool:
        return code_of(error) == "42P01"

    def limit_log_creation(self, connection: Connection, wait: float) -> None:
        durable = _DURABLE.format(local="false")
        connection.exec_driver_sql(f"SELECT {durable}, set_config('lock_timeout', '{milliseconds(wait)}', false)")

    def durable_insert(self, into: str, values: str, wait: float | None = None) -> str:
        # What the statement sets holds until the end of its transaction, and costs no round trip of its own.
        sets = f"{_DURABLE.format(local='true')} AS durable"
        if wait is not None:
            sets += f", set_config('lock_timeout', '{milliseconds(wait)}', true) AS patient"
        return f"{into} SELECT {values} FROM {sets}"  # noqa: S608  # the caller has checked the values

    def write_alone(self, connection: Connection, statement: str, wait: float) -> None:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement)  # one round trip, not three

    def read_alone(self, engine: Engine, statement: str) -> Sequence[Any]:
        with engine.connect() as connection:
            return connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement).all()

    @contextmanager
    def changing_tables(self, connection: Connection, lock: str) -> Generator[None]:
        connection.execution_options(isolation_level="READ COMMITTED")  # in autocommit, the lock would be gone at once
        key = int.from_bytes(hashlib.sha256(lock.encode()).digest()[:8], signed=True)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield
        connection.commit()

    def lock_limit(self, seconds: int) -> str | None:
        return f"SET LOCAL lock_timeout = '{seconds}s'"

    def create_database(self, connected: Connected, database: str) -> None:
        with connected() as connection:
            if connection.scalar(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": database}) is None:
                connection.exec_driver_sql(f"CREATE DATABASE {quoted(connection, database)}")

    def drop_database(self, connected: Connected, database: str) -> None:
        with connected() as connection:
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {quoted(connection, database)} WITH (FORCE)")

    def async_view(self, driver: str, async_driver: str) -> Callable[[Any], Awaitable[Any]] | None:
        return psycopg_async_view if (driver, async_driver) == ("psycopg", "psycopg") else None


class PostgreSQLPrepareVerbs(PrepareVerbs):
    """PostgreSQL: any transaction can be prepared, and settled from any connection to its database."""

    _commit = "COMMIT PREPARED '{}'"
    _roll_back = "ROLLBACK PREPARED '{}'"

    def prepare(self, xid: str) -> list[str]:
        return [f"PREPARE TRANSACTION '{xid}'"]

    def commit_unprepared(self, xid: str) -> list[str]:
        return ["COMMIT"]

    def roll_back_unprepared(self, xid: str) -> list[str]:
        return ["ROLLBACK"]

    def channel(self, driver_connection: Any) -> Channel:
        return PsycopgChannel(driver_connection)

    def async_channel(self, adapted_connection: Any) -> AsyncChannel:
        driver_connection = adapted_connection.driver_connection
        has_libpq = hasattr(driver_connection, "pgconn")
        return AsyncPsycopgChannel(driver_connection) if has_libpq else AsyncpgChannel(adapted_connection)

    def prepared(self, connection: Connection) -> list[Prepared]:
        rows = connection.exec_driver_sql(
            "SELECT gid, CAST(extract(epoch FROM prepared) AS double precision), owner FROM pg_prepared_xacts "
            "WHERE database = current_database() ORDER BY prepared"
        )
        return [Prepared(gid, at, owner) for gid, at, owner in rows]

    def is_missing(self, error: BaseException) -> bool:
        return code_of(error) == "42704"

    def problem(self, connection: Connection) -> str | None:
        if connection.exec_driver_sql("SHOW max_prepared_transactions").scalar() != "0":
            return None
        return (
            "max_prepared_transactions is 0 on the server, which then prepares nothing. Set it in postgresql.conf to the number "
            "of transactions that may be prepared at once (max_connections is enough), and restart the server."
        )

    def _settled_otherwise(self, connection: Connection, xid: str, error: DBAPIError) -> Settling | None:
        if self.is_missing(error):
            return Settling.MISSING
        return Settling.HELD if code_of(error) == "55000" else None


def _may_be_in_asyncpgs_transaction(driver_connection: Any) -> bool:
    # Of a connection that was closed it can't be asked; that such a one can't commit or roll back is how it is found out.
    return bool(driver_connection.is_closed() or driver_connection.is_in_transaction())


_VERBS = PostgreSQLPrepareVerbs()
DATABASE = PostgreSQL()
