"""PostgreSQL, by psycopg, asyncpg or any other driver."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from math import ceil
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import bindparam, event, inspect, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import DBAPIError

from app_db._compat.asyncpg import believes_in_transaction, is_asyncpg
from app_db._compat.asyncpg import descriptor_of as asyncpg_descriptor
from app_db._compat.asyncpg import hang_up as hang_up_asyncpg
from app_db._compat.psycopg import async_view as psycopg_async_view
from app_db._compat.psycopg import libpq_of
from app_db._databases.database import (
    NEVER,
    PROTECTED,
    Database,
    code_of,
    driver_of,
    execute,
    milliseconds,
    quoted,
)
from app_db._databases.drivers.poolers import is_pooled
from app_db._databases.drivers.postgresql_connections import AwaitedAsyncpg, AwaitedPsycopg, NonBlockingPsycopg
from app_db._databases.migrating import MigrationRules, described_holder, moment
from app_db._databases.prepare_verbs import Prepared, PrepareVerbs, Settling
from app_db._databases.sharing.postgresql import PostgreSQLSharing
from app_db._databases.shells import Shell
from app_db._databases.statements import bare_texts
from app_db.errors import Problem, ReadOnlyViolation, SettingsError

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy import URL
    from sqlalchemy.dialects.postgresql.base import PGInspector
    from sqlalchemy.engine import Connection, Dialect, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

    from app_db._databases.concurrent_statements import AwaitedConnection, NonBlockingConnection
    from app_db._databases.database import AsyncView, Connect, Connected, Info, Rows, Terms
    from app_db._databases.inspection import Inspection
    from app_db.settings import ConnectionSettings

_DURABLE = (
    "set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' "
    "ELSE current_setting('synchronous_commit') END, {local})"
)
"""Makes the COMMIT of a decision durable. With `synchronous_commit = off`, PostgreSQL answers COMMIT before it is on disk,
except for prepared transactions."""

_WHO_WROTE = """
WITH told AS MATERIALIZED (
    SELECT txid_current_if_assigned() IS NOT NULL AS has_id, EXISTS (
        SELECT FROM pg_catalog.pg_locks AS held
        LEFT JOIN pg_catalog.pg_class AS relation ON relation.oid = held.relation
        WHERE held.pid = pg_backend_pid() AND held.locktype IN ('relation', 'object') AND held.granted
        AND held.mode NOT IN ('AccessShareLock', 'RowShareLock') AND relation.relkind IS DISTINCT FROM 'S'
    ) AS holds_locks, EXISTS (
        SELECT FROM pg_catalog.pg_locks AS held JOIN pg_catalog.pg_class AS relation ON relation.oid = held.relation
        WHERE held.pid = pg_backend_pid() AND held.mode = 'RowExclusiveLock' AND held.granted AND relation.relkind = 'f'
    ) AS writes_elsewhere
)
SELECT has_id, holds_locks, writes_elsewhere, current_setting('track_counts') = 'on', CASE WHEN has_id AND NOT holds_locks THEN (
    SELECT string_agg(CASE WHEN has_table_privilege(catalog.oid, 'SELECT') THEN catalog.relname ELSE '' END, ' ')
    FROM pg_catalog.pg_class AS catalog WHERE catalog.oid < 16384 AND catalog.relkind = 'r'
    AND catalog.relnamespace = 'pg_catalog'::regnamespace
    AND pg_stat_get_xact_tuples_inserted(catalog.oid) + pg_stat_get_xact_tuples_updated(catalog.oid) > 0
) END FROM told"""
"""A write to a foreign table takes no transaction id here: it is another server's. The last column names the system catalogs that
the transaction may have inserted into or updated. An empty name stands for one that the user may not read."""

_UNPREPARED: dict[str, object] = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": str,  # the unnamed statement
}

_POOLER = (
    "is not set, and a pooler such as PgBouncer stands before the server. Set it to transaction if the pooler gives out a server "
    "connection for each transaction, or to none if it gives out one for each client connection (session pooling)."
)

_NO_AUTOCOMMIT = (
    "can't be AUTOCOMMIT on a reader behind a transaction pooler, where only BEGIN can make it read-only. Unset it, or set "
    "another level."
)

_NESTED = r"\((?:[^()]|\((?:[^()]|\([^()]*+\))*+\))*+\)"
_ARGUMENT = rf"(?:[^(),]|{_NESTED})*+"

_STAYS = re.compile(
    rf"""(?:\A|;)[\s;]*(?P<set>(?:SET(?:\s+|(?="))(?!LOCAL\b|CONSTRAINTS\b|TRANSACTION\b)(?:SESSION\b\s*)?
    |RESET(?:\s+|(?=")))(?:\w+|"\w+"))
    |\bset_config"?\s*\((?!\s*text\s*,\s*text\s*,\s*bool(?:ean)?\s*\))  # not the types, as in GRANT
    (?!{_ARGUMENT},{_ARGUMENT},\s*true(?:\s*::\s*bool(?:ean)?)?\s*\))
    (?P<false>{_ARGUMENT},{_ARGUMENT},\s*false\s*\))?""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
"""A bound parameter as the third argument of `set_config` can't be seen, so everything but the word true is refused."""


@lru_cache(maxsize=2048)
def _words_that_stay(statement: str) -> str | None:
    for bare in bare_texts(statement, "postgresql"):
        found = _STAYS.search(bare)
        if found is not None:
            if found["set"]:
                return " ".join(found["set"].split())
            return "set_config(…, false)" if found["false"] else "set_config(…) without the word true"
    return None


_AMOUNT = re.compile(r"(\d+)(ms|s|min|h|d)?$")
_SECONDS = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400, None: 0.001}


_OF_LIBPQ = frozenset(
    """host hostaddr port dbname user connect_timeout client_encoding application_name sslmode sslnegotiation sslcompression
    sslcert sslkey sslrootcert sslcrl sslcrldir sslsni require_auth channel_binding gssencmode krbsrvname target_session_attrs
    load_balance_hosts keepalives keepalives_idle keepalives_interval keepalives_count tcp_user_timeout passfile
    service""".split()
)
"""The parameters that psql takes, without those that may hold a secret."""


def _conninfo_value(value: object) -> str:
    if re.fullmatch(r"[\w./:-]+", str(value)):
        return str(value)  # without quotes, which a shell would quote once more
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_ADVISORY_HOLDER = """
SELECT held.pid, activity.application_name, activity.xact_start
FROM pg_catalog.pg_locks AS held LEFT JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = held.pid
WHERE held.locktype = 'advisory' AND held.granted AND held.objsubid = 1
AND held.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
AND (held.classid::bigint << 32 | held.objid::bigint) IN :keys
"""


def _advisory_key(lock: str) -> int:
    return int.from_bytes(hashlib.sha256(lock.encode()).digest()[:8], signed=True)


class PostgreSQLMigrationRules(MigrationRules):
    """PostgreSQL: all of it in one transaction, whose advisory lock works behind a transaction pooler too."""

    transactional = True
    lock_ends_with_transaction = True

    def begin(self, connection: Connection, locks: Sequence[str]) -> bool:
        connection.execution_options(isolation_level="READ COMMITTED")  # in autocommit, the lock would be released at once
        held = self.take(connection, locks)
        if not held:
            connection.rollback()
        return held

    def take(self, connection: Connection, locks: Sequence[str]) -> bool:
        # It does not wait on the server: CREATE INDEX CONCURRENTLY waits for all statements that run, and so for that one.
        one = text("SELECT pg_try_advisory_xact_lock(:key)")
        held = all(connection.scalar(one, {"key": _advisory_key(lock)}) for lock in locks)
        # This transaction sends nothing while other databases are migrated, or while the revisions run on a connection of their
        # own. A result stays open on the server until the next one, and keeps a snapshot, for which CREATE INDEX CONCURRENTLY
        # would wait. SET needs none.
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        return held

    def holder(self, connection: Connection, locks: Sequence[str]) -> str:
        asked = text(_ADVISORY_HOLDER).bindparams(bindparam("keys", expanding=True))
        found = connection.execute(asked, {"keys": [*map(_advisory_key, locks)]}).first()
        if found is None:
            return super().holder(connection, locks)
        if found[0] is None:
            return "a prepared transaction, which `app-db recover` settles"
        return described_holder(found[0], found[1], moment(found[2]))

    def left_in(self, connection: Connection) -> list[str]:
        enums = cast("PGInspector", inspect(connection)).get_enums()
        return [*super().left_in(connection), *(f"type {enum['name']}" for enum in enums)]

    def clear(self, connection: Connection) -> None:
        super().clear(connection)
        for enum in cast("PGInspector", inspect(connection)).get_enums():
            connection.exec_driver_sql(f"DROP TYPE {quoted(connection, enum['name'])}")


class PostgreSQL(Database):
    """PostgreSQL, by psycopg or any other driver."""

    syntax = "postgresql"
    sharing = PostgreSQLSharing()
    migrating = PostgreSQLMigrationRules()
    creates_databases = True

    _idle = 0  # libpq's PQTRANS_IDLE
    _active = 1  # libpq's PQTRANS_ACTIVE
    _failed = 3  # libpq's PQTRANS_INERROR
    _with_read_only = ("psycopg", "psycopg2", "asyncpg")  # drivers whose connections have an attribute for it

    _words = {"sslmode": "ssl", "connect_timeout": "timeout"}  # noqa: RUF012  # names of libpq, and asyncpg's for the same
    _asyncpg_alone = frozenset(
        "statement_cache_size prepared_statement_cache_size prepared_statement_name_func max_cached_statement_lifetime "
        "max_cacheable_statement_size".split()
    )

    def url(self, configured: URL, settings: ConnectionSettings) -> URL:
        # Options in the URL that only the other driver knows become arguments, under the name that this driver has for them.
        if configured.get_driver_name() == "asyncpg":
            return configured.difference_update_query([*self._words, "application_name", "timeout"])
        if configured.get_driver_name() == "psycopg":
            return configured.difference_update_query([*self._words.values(), *self._asyncpg_alone])
        return configured

    def connect_args(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, object]:
        driver = url.get_driver_name()
        pooled = settings.pooler == "transaction"  # a prepared statement is in one server connection, and the next one is any
        if driver == "asyncpg":
            return (_UNPREPARED if pooled else {}) | self._asyncpg_arguments(url, application, settings)
        if driver == "psycopg":
            return ({"prepare_threshold": None} if pooled else {}) | self._psycopg_arguments(url, application, settings)
        own = {"application_name": application} if driver == "psycopg2" and "application_name" not in url.query else {}
        return {**own, **settings.connect_args}

    def _asyncpg_arguments(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, object]:
        given = _given(url, (*self._words, "application_name", "timeout"), settings)
        arguments = {self._words.get(key, key): value for key, value in given.items()}
        name = arguments.pop("application_name", application)
        if "timeout" in arguments:
            arguments["timeout"] = float(arguments["timeout"])
        return {**arguments, "server_settings": {"application_name": name, **arguments.get("server_settings", {})}}

    def _psycopg_arguments(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, object]:
        words = {asyncpgs: libpqs for libpqs, asyncpgs in self._words.items()}
        given = _given(url, words, settings)
        arguments = {words.get(key, key): value for key, value in given.items() if key not in self._asyncpg_alone}
        server_settings = dict(arguments.pop("server_settings", {}))
        name = server_settings.pop("application_name", application)
        if "application_name" not in url.query:
            arguments = {"application_name": name, **arguments}
        if server_settings:
            quoted = {key: re.sub(r"([ \\])", r"\\\1", str(value)) for key, value in server_settings.items()}
            arguments["options"] = " ".join(f"-c {key}={value}" for key, value in quoted.items())
        return arguments

    def isolation_level(self, settings: ConnectionSettings) -> str | None:
        # A read takes one round trip in autocommit, and three with BEGIN and COMMIT.
        pooled = settings.pooler == "transaction"
        if settings.read_only and pooled and settings.isolation_level == "AUTOCOMMIT":
            raise SettingsError([Problem(settings.variable("isolation_level"), _NO_AUTOCOMMIT)])
        alone = settings.read_only and not pooled  # behind a pooler, READ ONLY goes with BEGIN
        return settings.isolation_level or ("AUTOCOMMIT" if alone else None)

    def engine_options(self, settings: ConnectionSettings) -> dict[str, object]:
        return {"postgresql_readonly": True} if settings.read_only and settings.pooler == "transaction" else {}

    def connector(self, dialect: Dialect, settings: ConnectionSettings) -> Connect:
        if not settings.begin_with_statement or dialect.driver != "psycopg" or self.isolation_level(settings) == "AUTOCOMMIT":
            return dialect.connect
        from psycopg import Pipeline

        if not Pipeline.is_supported():  # libpq is too old
            return dialect.connect
        from app_db._databases.drivers import begin_along

        if dialect.is_async:
            return partial(dialect.connect, async_creator_fn=begin_along.connect_async)
        return begin_along.connect

    def tune(self, engine: Engine, settings: ConnectionSettings, name: str) -> None:
        if self.isolation_level(settings) == "AUTOCOMMIT":
            engine.dialect.supports_server_side_cursors = False  # they need a transaction; `yield_per` fetches everything without
        self._keep_read_only(engine, settings, name)
        if settings.pooler == "transaction":
            self._limit_each_transaction(engine, settings)
            return
        if settings.pooler is None:
            self._refuse_pooler(engine, settings)
        parameters: dict[str, str] = {}
        if settings.read_only:
            parameters["default_transaction_read_only"] = "on"
        if settings.statement_timeout is not None:
            parameters["statement_timeout"] = f"{settings.statement_timeout * 1000:.0f}"
        if not parameters:
            return
        statement = "SELECT " + ", ".join(f"set_config('{name}', '{value}', false)" for name, value in parameters.items())

        @event.listens_for(engine, "connect")
        def set_parameters(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
            autocommit = dbapi_connection.autocommit
            dbapi_connection.autocommit = True  # otherwise a rollback would undo the parameters
            execute(dbapi_connection, statement)
            dbapi_connection.autocommit = autocommit
            if settings.read_only:
                record.info[PROTECTED] = True

        if settings.read_only:
            self._close_what_is_lifted(engine, name)

    def _keep_read_only(self, engine: Engine, settings: ConnectionSettings, name: str) -> None:
        """Have execution options not make a connection writable that the session, or BEGIN, makes read-only.

        SQLAlchemy ends the option `postgresql_readonly` by False, and psycopg then begins with READ WRITE. None leaves it to the
        session. Behind a pooler a reader is read-only by BEGIN alone, so it needs one.
        """
        dialect: Any = engine.dialect
        if dialect.driver not in self._with_read_only:
            return
        set_read_only, set_level = dialect.set_readonly, dialect.set_isolation_level
        by_begin = settings.read_only and settings.pooler == "transaction"

        def keep_read_only(dbapi_connection: DBAPIConnection, value: object) -> None:
            set_read_only(dbapi_connection, True if by_begin else value or None)

        def refuse_autocommit(dbapi_connection: DBAPIConnection, level: str) -> None:
            if level == "AUTOCOMMIT":
                raise ReadOnlyViolation(name, "The isolation level AUTOCOMMIT behind a pooler")
            set_level(dbapi_connection, level)

        dialect.set_readonly = keep_read_only
        if by_begin:
            dialect.set_isolation_level = refuse_autocommit

    def _close_what_is_lifted(self, engine: Engine, name: str) -> None:
        """Look after each statement whether it has lifted the protection, as a function can, and close the connection then.

        A raw cursor could write otherwise, before the next statement. These are no listeners, because SQLAlchemy has an event
        after a statement only for an engine, and that would make every statement slower.
        """
        may_write = self.may_write

        def is_protected(connection: Connection) -> bool:
            try:
                return PROTECTED in connection.info
            except NotImplementedError:  # the connection is not in the pool yet
                return False

        def looking_after(execute: Callable[..., None]) -> Callable[..., None]:
            def look_after(*arguments: Any) -> None:
                execute(*arguments)
                connection: Connection = arguments[-1].root_connection
                if may_write(connection.connection.driver_connection) and is_protected(connection):
                    connection.invalidate()
                    raise ReadOnlyViolation(name, "A statement that lifted the protection")

            return look_after

        dialect = engine.dialect
        for method in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(dialect, method, looking_after(getattr(dialect, method)))

    def _limit_each_transaction(self, engine: Engine, settings: ConnectionSettings) -> None:
        if settings.statement_timeout is None:
            return
        statement = f"SET LOCAL statement_timeout = {milliseconds(settings.statement_timeout)}"

        @event.listens_for(engine, "begin")
        def limit(connection: Connection) -> None:
            connection.exec_driver_sql(statement)

    def _refuse_pooler(self, engine: Engine, settings: ConnectionSettings) -> None:
        """Raise at the first connection if a pooler answers: what is set on a session would be another program's, later."""
        is_checked = False

        @event.listens_for(engine, "connect")
        def check(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
            nonlocal is_checked
            if is_checked:
                return
            if is_pooled(dbapi_connection):
                dbapi_connection.close()  # SQLAlchemy 2.0 leaves it open
                raise SettingsError([Problem(settings.variable("pooler"), _POOLER)])
            is_checked = True

    def unit_options(self, settings: ConnectionSettings, terms: Terms) -> dict[str, object]:
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
        # The server answers the COMMIT of a failed transaction with ROLLBACK, and drivers don't report that as an error.
        try:
            connection.exec_driver_sql("SELECT 1")
        except DBAPIError:
            return True
        return False

    def has_written(self, connection: Connection, beginning: object, *, may_have_locked: bool) -> bool | None:
        # A transaction id is assigned by the first change, but also by a row lock, and stays when a savepoint is rolled back.
        # The locks on tables tell these apart: a row lock takes a weaker one, and ROLLBACK TO gives back what was taken since.
        # GRANT, CREATE SCHEMA, CREATE FUNCTION and others keep no such lock, but insert into system catalogs or update them.
        try:
            has_id, holds_locks, writes_elsewhere, has_counters, catalogs = connection.exec_driver_sql(_WHO_WROTE).one()
            if writes_elsewhere or not has_id or holds_locks or not may_have_locked or not has_counters:
                return bool(writes_elsewhere or has_id)
            return catalogs is not None and self._has_changed(connection, catalogs.split(" "))
        except DBAPIError as error:
            if code_of(error) == "25P02":  # the transaction has failed, so the server answers nothing any more
                return None
            raise

    def _has_changed(self, connection: Connection, catalogs: Sequence[str]) -> bool:
        """Return whether a row of system catalogs comes from this transaction, or may do so.

        Their counters alone don't tell: they keep the changes of rolled back savepoints, and for a second those of earlier
        transactions. A visible row with the id of this transaction or a later one is its own, or that of a later transaction
        that has committed meanwhile.
        """
        if "" in catalogs:
            return True
        own = " OR ".join(f"EXISTS (SELECT FROM pg_catalog.{catalog} WHERE age(xmin) <= 0)" for catalog in catalogs)
        return bool(connection.exec_driver_sql(f"SELECT {own}").scalar_one())

    refused_in_unit = staticmethod(_words_that_stay)

    instead_in_unit = (
        "Write SET LOCAL, or set_config(…, true), which ends with the unit. true is a word in the text and no bound parameter: "
        "func.set_config(…, sqlalchemy.true())"
    )

    def is_in_autocommit(self, connection: Connection) -> bool:
        return getattr(connection.connection.dbapi_connection, "autocommit", None) is True

    tells_transaction = True
    begins_with_first_statement = True

    def is_in_transaction(self, connection: Connection) -> bool:
        return not self._is_idle(connection.connection.driver_connection)

    def denies(self, error: BaseException) -> bool:
        return code_of(error) in ("42501", "25P02")

    def has_ended_transaction(self, connection: Connection) -> bool:
        driver_connection = connection.connection.driver_connection
        libpq = libpq_of(driver_connection)  # asyncpg does not tell a failed transaction from one that goes on
        return self._is_idle(driver_connection) or (libpq is not None and libpq.transaction_status == self._failed)

    def may_be_in_transaction(self, dbapi_connection: DBAPIConnection) -> bool:
        return not self._is_idle(driver_of(dbapi_connection))

    def _is_idle(self, driver_connection: object) -> bool:
        """Return whether it is certain that no transaction is open."""
        if is_asyncpg(driver_connection):
            # A closed connection can't tell. The error of its COMMIT or ROLLBACK then shows that it is closed.
            return not (driver_connection.is_closed() or driver_connection.is_in_transaction())
        libpq = libpq_of(driver_connection)
        return libpq is not None and libpq.transaction_status == self._idle

    def descriptor_of(self, dbapi_connection: DBAPIConnection) -> int | None:
        driver_connection = driver_of(dbapi_connection)
        return asyncpg_descriptor(driver_connection) if is_asyncpg(driver_connection) else super().descriptor_of(dbapi_connection)

    def is_waiting(self, dbapi_connection: DBAPIConnection) -> bool:
        libpq = libpq_of(driver_of(dbapi_connection))
        return libpq is None or libpq.transaction_status == self._active

    def connect_limits(self, driver: str, seconds: float, given: Mapping[str, object]) -> dict[str, object]:
        configured = str(given.get("connect_timeout", ""))
        soon = max(2, ceil(seconds))  # whole seconds, and libpq takes 1 for 2
        is_sooner = configured.isdigit() and 0 < int(configured) < soon
        return {} if is_sooner or driver not in ("psycopg", "psycopg2") else {"connect_timeout": soon}

    def is_left_in_the_middle(self, dbapi_connection: DBAPIConnection) -> bool:
        driver_connection = driver_of(dbapi_connection)
        if super().is_left_in_the_middle(dbapi_connection) or getattr(driver_connection, "is_left_in_the_middle", False):
            return True
        # SQLAlchemy's adapter for asyncpg does not know of a transaction if it was interrupted right after BEGIN, and its
        # rollback does nothing then. asyncpg would begin a savepoint for the next unit, and its commit would only release that.
        return is_asyncpg(driver_connection) and (
            not self._is_idle(driver_connection) or believes_in_transaction(driver_connection)
        )

    def hang_up(self, dbapi_connection: DBAPIConnection) -> None:
        driver_connection = driver_of(dbapi_connection)
        if (libpq := libpq_of(driver_connection)) is not None:
            libpq.finish()
        elif is_asyncpg(driver_connection):
            hang_up_asyncpg(driver_connection)
        else:
            super().hang_up(dbapi_connection)

    def clean_up(self, dbapi_connection: DBAPIConnection, info: Info) -> None:
        # The transaction may have ended without the driver's commit() or rollback(), as by PREPARE TRANSACTION.
        if getattr(driver_of(dbapi_connection), "is_left_in_autocommit", False):
            dbapi_connection.autocommit = False

    def may_write(self, driver_connection: object) -> bool:
        # The server reports what is the default, from version 14 on.
        if is_asyncpg(driver_connection):
            return getattr(driver_connection.get_settings(), "default_transaction_read_only", "on") == "off"
        libpq = libpq_of(driver_connection)
        return libpq is not None and libpq.parameter_status(b"default_transaction_read_only") == b"off"

    def refuses_write(self, error: BaseException) -> bool:
        return getattr(error, "sqlstate", None) == "25006"

    def is_transient(self, error: BaseException) -> bool:
        sqlstate = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return isinstance(sqlstate, str) and sqlstate.startswith("40")

    def inspection(self) -> Inspection:
        from app_db._databases.inspections.postgresql import PostgreSQLInspection

        return PostgreSQLInspection()

    def shell(self, url: URL, settings: ConnectionSettings, password: str | None) -> Shell | None:
        dialect: Any = PGDialect_psycopg
        given: dict[str, object] = {**dialect().create_connect_args(url)[1], **settings.connect_args}
        given.setdefault("sslmode", given.get("ssl"))  # asyncpg's word
        options = [str(given["options"])] if given.get("options") else []
        if settings.read_only and settings.pooler != "transaction":  # which knows no options
            options.append("-c default_transaction_read_only=on")
        words = [f"{key}={_conninfo_value(value)}" for key, value in given.items() if key in _OF_LIBPQ and value is not None]
        environment = {"PGPASSWORD": password or "", "PGOPTIONS": " ".join(options)}
        install = "Install the client (Debian and Ubuntu: apt-get install postgresql-client)"
        return Shell(["psql"], install, [" ".join(words)], {key: value for key, value in environment.items() if value})

    def prepare_verbs(self, driver: str) -> PrepareVerbs | None:
        return _VERBS if driver in ("psycopg", "asyncpg") else None

    def is_victim(self, error: BaseException) -> bool:
        return code_of(error) in ("40001", "40P01")

    def says_there_is_no_table(self, error: DBAPIError) -> bool:
        return code_of(error) == "42P01"

    def limit_log_creation(self, connection: Connection, wait: float) -> None:
        durable = _DURABLE.format(local="true")
        connection.exec_driver_sql(f"SELECT {durable}, set_config('lock_timeout', '{milliseconds(wait)}', true)")

    def durable_insert(self, into: str, values: str, wait: float | None = None) -> str:
        # The settings last until the end of the transaction. Within the INSERT they cost no round trip.
        sets = f"{_DURABLE.format(local='true')} AS durable"
        if wait is not None:
            sets += f", set_config('lock_timeout', '{milliseconds(wait)}', true) AS patient"
        return f"{into} SELECT {values} FROM {sets}"  # noqa: S608  # the caller has checked the values

    def write_alone(self, connection: Connection, statement: str, wait: float) -> None:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement)  # one round trip, not three

    def read_alone(self, engine: Engine, statement: str) -> Rows:
        with engine.connect() as connection:
            return connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement).all()

    @contextmanager
    def changing_tables(self, connection: Connection, lock: str) -> Generator[None]:
        connection.execution_options(isolation_level="READ COMMITTED")  # in autocommit, the lock would be released at once
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _advisory_key(lock)})
        yield
        connection.commit()

    def lock_limit(self, seconds: int) -> str | None:
        return f"SET LOCAL lock_timeout = '{seconds}s'"

    first_database = "postgres"

    def has_database(self, connected: Connected, database: str) -> bool:
        with connected() as connection:
            return connection.scalar(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": database}) is not None

    def create_database(self, connected: Connected, database: str) -> None:
        with connected() as connection:
            if connection.scalar(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": database}) is None:
                connection.exec_driver_sql(f"CREATE DATABASE {quoted(connection, database)}")

    def copy_database(self, connected: Connected, source: str, database: str) -> None:
        with connected() as connection:
            # Copying files is quicker for databases as small as those of tests: they need not be written to the WAL as well.
            strategy = " STRATEGY FILE_COPY" if (connection.dialect.server_version_info or ()) >= (15,) else ""
            names = quoted(connection, database), quoted(connection, source)
            connection.exec_driver_sql("CREATE DATABASE {} TEMPLATE {}".format(*names) + strategy)

    def drop_database(self, connected: Connected, database: str) -> None:
        with connected() as connection:
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {quoted(connection, database)} WITH (FORCE)")

    def roll_back_prepared(self, beside: Connected, inside: Connected, database: str) -> None:
        with beside() as connection:
            found = text("SELECT gid FROM pg_prepared_xacts WHERE database = :name")
            prepared = connection.scalars(found, {"name": database}).all()
        if prepared:
            with inside() as connection:
                for gid in prepared:
                    connection.exec_driver_sql("ROLLBACK PREPARED '{}'".format(gid.replace("'", "''")))

    def async_view(self, driver: str, async_driver: str) -> AsyncView | None:
        return psycopg_async_view if (driver, async_driver) == ("psycopg", "psycopg") else None


class PostgreSQLPrepareVerbs(PrepareVerbs):
    """PostgreSQL: any transaction can be prepared, and settled from any connection to its database."""

    _prepare = ("PREPARE TRANSACTION '{}'",)
    _commit_unprepared = ("COMMIT",)
    _roll_back_unprepared = ("ROLLBACK",)
    _commit = "COMMIT PREPARED '{}'"
    _roll_back = "ROLLBACK PREPARED '{}'"

    def non_blocking(self, driver_connection: psycopg.Connection[object]) -> NonBlockingConnection:
        return NonBlockingPsycopg(driver_connection)

    def awaited(self, adapted_connection: Any) -> AwaitedConnection:
        driver_connection = adapted_connection.driver_connection
        return AwaitedAsyncpg(adapted_connection) if is_asyncpg(driver_connection) else AwaitedPsycopg(driver_connection)

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
            "max_prepared_transactions is 0 on the server, so it can't prepare transactions. Set it in postgresql.conf to the "
            "number of transactions that may be prepared at once (max_connections is enough), and restart the server."
        )

    def _settled_otherwise(self, connection: Connection, xid: str, error: DBAPIError) -> Settling | None:
        if self.is_missing(error):
            return Settling.MISSING
        return Settling.HELD if code_of(error) == "55000" else None


def _given(url: URL, keys: Iterable[str], settings: ConnectionSettings) -> dict[str, Any]:
    """Return the arguments that a URL gives under `keys`, and those of the settings, which win."""
    return {key: url.query[key] for key in keys if key in url.query} | settings.connect_args


_VERBS = PostgreSQLPrepareVerbs()
DATABASE = PostgreSQL()
