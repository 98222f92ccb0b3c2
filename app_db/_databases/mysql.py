"""MySQL and MariaDB, by PyMySQL, asyncmy or any other driver."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from app_db._compat import asyncmy, pymysql
from app_db._databases.database import (
    NEVER,
    PROTECTED,
    Database,
    SharingRules,
    code_of,
    driver_of,
    execute,
    milliseconds,
    on_execute,
    quoted,
)
from app_db._databases.drivers.mysql_connections import AwaitedAsyncmy, NonBlockingPyMySQL
from app_db._databases.migrating import MigrationRules, described_holder
from app_db._databases.mysql_copies import copy_schema
from app_db._databases.prepare_verbs import Prepared, PrepareVerbs, Settling
from app_db._databases.shells import FILE, Shell
from app_db._databases.statements import Effect, assignments, bare_texts, effect_of
from app_db.errors import CannotIsolate, InvalidUse, Problem, SettingsError

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from app_db._databases.concurrent_statements import AwaitedConnection, NonBlockingConnection
    from app_db._databases.database import Connected, Info, Rows, Say
    from app_db._databases.inspection import Inspection
    from app_db.settings import ConnectionSettings

_USUAL_LIMIT = "app_db_usual_limit"
"""Key in a DBAPI connection's info: the statement that restores the time limit from before the unit."""

_MAY_BE_LIFTED = "app_db_may_be_lifted"
"""Key in the info of a read-only DBAPI connection: a function may have lifted the protection."""

_BEGIN_READ_ONLY = "START TRANSACTION READ ONLY"
_PROTECT = "SET SESSION TRANSACTION READ ONLY"
_END_AND_PROTECT = "BEGIN NOT ATOMIC {end}; SET SESSION TRANSACTION READ ONLY; END"  # one round trip, on MariaDB

_MARK = "app_db_call"
"""The savepoint that is taken before a procedure is called."""

_LONGEST_DROP = 10
"""Seconds that DROP DATABASE waits for locks in the database."""

_LONGEST_WAIT = 3600
"""Seconds to wait for another process that creates tables."""


_CHANGED_ROWS = (
    "SHOW SESSION STATUS WHERE Variable_name IN ('Handler_write', 'Handler_update', 'Handler_delete')"  # the cheapest way to ask
)


_DEFINES = r"(?:CREATE|DROP)\s++(?!(?:OR\s++REPLACE\s++)?TEMPORARY\b)"

_COMMITS_BY_ITSELF = re.compile(
    rf"(?:{_DEFINES}|ALTER\b|RENAME\b|TRUNCATE\b|LOCK\s+TABLES?|UNLOCK\s+TABLES?|GRANT\b|REVOKE\b"
    r"|ANALYZE\b(?!\s+(?:FORMAT|SELECT))|OPTIMIZE\b|REPAIR\b|CHECK\s+TABLE|(?:LOAD|CACHE)\s+INDEX|FLUSH\b"
    r"|BEGIN\b(?!\s+NOT\s+ATOMIC)|START\b|STOP\b|(?:UN)?INSTALL\b|CHANGE\s+MASTER|RESET\b|BACKUP\b)",
    re.IGNORECASE,
)
_SETS_PASSWORD = re.compile(r"PASSWORD\b", re.IGNORECASE)
_STAYS = re.compile(
    r"""((?:UN)?LOCK\s+TABLES?\b|FLUSH\s+TABLES?\b[^;]*\b(?:FOR\s+EXPORT|READ\s+LOCK)|USE\b)""",
    re.IGNORECASE | re.VERBOSE,
)
_SETS_WHAT_STAYS = re.compile(
    r"""(?:(?:SESSION\b|LOCAL\b)\s*|@@\s*(?:"?(?:SESSION|LOCAL)"?\s*\.\s*)?)?"?(?:(?:tx|transaction)_(?:isolation|read_only)
    |completion_type|sql_mode|(?:foreign_key|unique|check_constraint)_checks|sql_safe_updates|time_zone)\b
    |(?:(?:SESSION|LOCAL|GLOBAL)\b\s*|@@\s*(?:"?(?:SESSION|LOCAL|GLOBAL)"?\s*\.\s*)?)?"?AUTOCOMMIT\b
    |(?:SESSION|LOCAL)\s+TRANSACTION\b|(?:DEFAULT\s+)?ROLE\b|NAMES\b|CHAR(?:ACTER\s+SET|SET)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_FOR_ONE_STATEMENT = re.compile(r"SET\s+STATEMENT\b", re.IGNORECASE)

_WITHOUT_TRANSACTIONS = """
    SELECT t.table_name, t.engine FROM information_schema.tables t JOIN information_schema.engines e ON e.engine = t.engine
    WHERE t.table_schema = DATABASE() AND t.table_type = 'BASE TABLE' AND e.transactions <> 'YES' ORDER BY t.table_name
    """
"""The tables of storage engines such as MyISAM and Aria. Those of InnoDB have transactions."""


@lru_cache(maxsize=2048)
def _commits_by_itself(statement: str) -> bool:
    texts = bare_texts(statement, "mysql")
    return any(map(_COMMITS_BY_ITSELF.match, texts)) or any(
        _SETS_PASSWORD.match(part) for bare in texts for part in assignments(bare)
    )


@lru_cache(maxsize=2048)
def _words_that_stay(statement: str) -> str | None:
    for bare in bare_texts(statement, "mysql"):
        found = _STAYS.match(bare)
        if found is not None:
            return " ".join(found[1].split())
        if not _FOR_ONE_STATEMENT.match(bare):
            for found in filter(None, map(_SETS_WHAT_STAYS.match, assignments(bare))):
                return f"{bare[:3]} {' '.join(found[0].split())}"
    return None


def _option_value(value: str) -> str:
    """Return a value as it stands in an option file, where the client reads escapes, and # begins a comment outside quotes."""
    escaped = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace('"', '\\"')
    return f'"{escaped}"'


class MySQLSharing(SharingRules):
    """How units of an isolated test share a connection to MariaDB or MySQL."""

    syntax = "mysql"
    first = ("START TRANSACTION",)
    survives_cancellation = False
    _limit = re.compile(r"SET SESSION (max_statement_time|max_execution_time)")
    _commits = re.compile(
        rf"(?:{_DEFINES}|ALTER\b|RENAME\b|TRUNCATE\b|LOCK\s+TABLES|UNLOCK\s+TABLES|GRANT\b|REVOKE\b"
        r"|ANALYZE\b|OPTIMIZE\b|REPAIR\b|LOAD\s+INDEX|FLUSH\b|SET\s+PASSWORD|SET\s+(?:SESSION\s+)?AUTOCOMMIT|XA\b)",
        re.IGNORECASE,
    )

    def refuse(self, name: str, statement: str) -> None:
        super().refuse(name, statement)
        found = next((bare for bare in bare_texts(statement, self.syntax) if self._commits.match(bare)), None)
        if found is not None:
            words = " ".join(found.split()[:2])
            raise CannotIsolate(
                name,
                f"{words} (MariaDB and MySQL commit before it, whatever comes afterwards)",
                "Do it before the isolation begins, or take the test out of it",
            )

    def given_back(self, statement: str, parameters: object, say: Say) -> Mapping[str, str]:
        changed = self._limit.match(statement)
        if changed is None:
            return {}
        ((before,),) = say(f"SELECT @@SESSION.{changed[1]}")
        return {changed[1]: f"{changed[0]} = {before}"}


_MIGRATION_LOCK = "CONCAT('app_db ', MD5(CONCAT(:lock, ' ', COALESCE(DATABASE(), ''))))"
"""The name of a lock on the server, which has the same names for all its databases, and at most 64 letters for each."""

_MIGRATION_LOCK_HOLDER = f"SELECT ID, USER, HOST FROM information_schema.PROCESSLIST WHERE ID = IS_USED_LOCK({_MIGRATION_LOCK})"  # noqa: S608


class MySQLMigrationRules(MigrationRules):
    """MySQL and MariaDB: DDL ends every transaction, so the lock belongs to the connection."""

    def begin(self, connection: Connection, locks: Sequence[str]) -> bool:
        held: list[str] = []
        for lock in locks:
            if connection.scalar(text(f"SELECT GET_LOCK({_MIGRATION_LOCK}, 0)"), {"lock": lock}) != 1:
                self.end(connection, held)
                return False
            held.append(lock)
        connection.rollback()
        return True

    def holder(self, connection: Connection, locks: Sequence[str]) -> str:
        for lock in locks:
            found = connection.execute(text(_MIGRATION_LOCK_HOLDER), {"lock": lock}).first()
            if found is not None:  # since when, the server does not say
                return described_holder(found[0], f"{found[1]}@{found[2]}", "")
        return super().holder(connection, locks)

    def end(self, connection: Connection, locks: Sequence[str]) -> None:
        for lock in locks:
            connection.execute(text(f"SELECT RELEASE_LOCK({_MIGRATION_LOCK})"), {"lock": lock})
        connection.rollback()


def _tls_of_asyncmy(said: Mapping[str, object]) -> dict[str, object]:
    """Return what PyMySQL's arguments for TLS are in asyncmy's words, which has none for `write_timeout`."""
    files = {word: said[f"ssl_{word}"] for word in ("ca", "cert", "key") if said.get(f"ssl_{word}")}
    checks = said.get("ssl_verify_cert"), said.get("ssl_verify_identity")
    if _is_true(said.get("ssl_disabled")) or not (files or any(map(_is_true, checks))):
        return {}
    return {"ssl": {**files, "verify_mode": _is_true(checks[0]), "check_hostname": _is_true(checks[1])}}


def _is_true(value: object) -> bool:
    return str(value).lower() in ("true", "1", "yes", "on")


class MySQL(Database):
    """MySQL and MariaDB."""

    syntax = "mysql"
    sharing = MySQLSharing()
    migrating = MySQLMigrationRules()
    creates_databases = True

    _drivers = frozenset({"pymysql", "MySQLdb", "mysql", "asyncmy", "aiomysql", "mariadb"})
    _transient = frozenset({1020, 1040, 1047, 1205, 1213})
    """Record changed since read, too many connections, a Galera node that is not ready, lock wait timeout, deadlock."""
    _read_only_server = 1290
    _gone = frozenset({1153, 2006, 2013})
    _large = 2**20  # no server's max_allowed_packet is set lower
    _pymysql_only = frozenset(
        """
        ssl_ca ssl_cert ssl_key ssl_key_password ssl_disabled ssl_verify_cert ssl_verify_identity
        write_timeout collation bind_address defer_connect
        """.split()
    )
    _in_transaction = 1  # the protocol's SERVER_STATUS_IN_TRANS
    _in_autocommit = 2  # SERVER_STATUS_AUTOCOMMIT
    _deadlock = 1213
    _lock_wait_timeout = 1205
    _denied = frozenset({1044, 1142, 1143, 1227, 1370})
    """Access denied to a database, a table, a column, an operation, a routine."""
    _no_such_savepoint = 1305

    def password(self, driver: str, password: str) -> str | bytes:
        # These drivers would encode a str in latin-1, which fails for most alphabets.
        return password.encode() if driver in ("pymysql", "asyncmy", "aiomysql") else password

    def url(self, configured: URL, settings: ConnectionSettings) -> URL:
        return configured.difference_update_query(self._pymysql_only) if configured.get_driver_name() == "asyncmy" else configured

    def connect_args(self, url: URL, application: str, settings: ConnectionSettings) -> dict[str, object]:
        own = {} if url.password is None else {"password": self.password(url.get_driver_name(), str(url.password))}
        if url.get_driver_name() != "asyncmy":
            return {**own, **settings.connect_args}
        said = {key: value for key, value in url.query.items() if key in self._pymysql_only} | settings.connect_args
        if said.get("bind_address"):
            message = "has bind_address, which asyncmy does not know. Leave it out, or give coroutines a connection of their own."
            raise SettingsError([Problem(settings.variable("url" if "bind_address" in url.query else "connect_args"), message)])
        return {**own, **{key: value for key, value in said.items() if key not in self._pymysql_only}, **_tls_of_asyncmy(said)}

    def tables_without_transactions(self, connection: Connection) -> Rows:
        return [tuple(row) for row in connection.execute(text(_WITHOUT_TRANSACTIONS))]

    def tune(self, engine: Engine, settings: ConnectionSettings, name: str) -> None:
        names = self._collating(settings) if engine.dialect.driver in ("pymysql", "asyncmy") else None

        @event.listens_for(engine, "connect")
        def set_up(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
            cursor = dbapi_connection.cursor()
            if names is not None:
                cursor.execute(names)
            if settings.read_only:
                cursor.execute(_PROTECT)
                record.info[PROTECTED] = True
            if settings.statement_timeout is not None:
                cursor.execute("SELECT VERSION()")
                is_mariadb = "mariadb" in str(cursor.fetchone()).lower()
                cursor.execute(self._timeout(settings.statement_timeout, is_mariadb))
            cursor.close()

        if settings.read_only:
            self._protect_from_functions(engine)

    def _collating(self, settings: ConnectionSettings) -> str | None:
        """Return the statement for PyMySQL's argument `collation`: asyncmy does not have it, and SQLAlchemy undoes it."""
        said = {**settings.sqlalchemy_url().query, **settings.connect_args}
        collation, charset = str(said.get("collation", "")), str(said.get("charset", "utf8mb4"))
        return f"SET NAMES {charset} COLLATE {collation}" if collation.isidentifier() and charset.isidentifier() else None

    def _protect_from_functions(self, engine: Engine) -> None:
        """Have a read-only connection stay so if a function lifts the protection by `SET SESSION TRANSACTION READ WRITE`.

        An open transaction stays read-only, but a SELECT begins none unless it reads a table. So it is begun before an unknown
        function is called. The session is protected again when a transaction ends. A text that only reads costs no round trip.
        """
        dialect = engine.dialect

        def before(cursor: object, statement: str, *parameters_and_context: Any) -> None:
            if effect_of(statement, self.syntax) is Effect.READS:
                return
            connection: Connection = parameters_and_context[-1].root_connection
            with suppress(NotImplementedError):  # the connection is not in the pool yet
                if PROTECTED in connection.info and _MAY_BE_LIFTED not in connection.info:
                    connection.info[_MAY_BE_LIFTED] = True
                    if self._is_mariadb(connection) and not self._has_begun(connection):
                        execute(connection.connection, _BEGIN_READ_ONLY)

        def protecting(word: str, end: Callable[[PoolProxiedConnection], None]) -> Callable[[PoolProxiedConnection], None]:
            def end_and_protect(dbapi_connection: PoolProxiedConnection) -> None:
                is_mariadb = getattr(dialect, "is_mariadb", False)
                if is_mariadb:
                    execute(dbapi_connection, _END_AND_PROTECT.format(end=word))
                else:
                    end(dbapi_connection)
                with suppress(NotImplementedError):
                    may_be_lifted = dbapi_connection.info.pop(_MAY_BE_LIFTED, False)
                    if may_be_lifted and not is_mariadb:
                        execute(dbapi_connection, _PROTECT)

            return end_and_protect

        on_execute(engine, before)
        for word, method in (("COMMIT", "do_commit"), ("ROLLBACK", "do_rollback")):
            setattr(dialect, method, protecting(word, getattr(dialect, method)))

    def hang_up(self, dbapi_connection: DBAPIConnection) -> None:
        driver_connection = driver_of(dbapi_connection)
        if hasattr(driver_connection, "ensure_closed"):  # of asyncmy or aiomysql
            asyncmy.hang_up(driver_connection)
        else:
            super().hang_up(dbapi_connection)

    def descriptor_of(self, dbapi_connection: DBAPIConnection) -> int | None:
        driver_connection = driver_of(dbapi_connection)
        if hasattr(driver_connection, "ensure_closed"):
            return asyncmy.descriptor_of(driver_connection)
        if pymysql.is_pymysql(driver_connection):
            return pymysql.descriptor_of(driver_connection) if driver_connection.open else None
        return super().descriptor_of(dbapi_connection)

    def connect_limits(self, driver: str, seconds: float, given: Mapping[str, object]) -> dict[str, object]:
        return {"connect_timeout": max(seconds, 0.1), "read_timeout": max(seconds, 0.1)} if driver == "pymysql" else {}

    def lift_connect_limits(self, dbapi_connection: DBAPIConnection, given: Mapping[str, object]) -> None:
        if pymysql.is_pymysql(dbapi_connection):
            configured = given.get("read_timeout")
            pymysql.set_read_timeout(dbapi_connection, None if configured is None else float(str(configured)))

    def clean_up(self, dbapi_connection: DBAPIConnection, info: Info) -> None:
        usual_limit = info.pop(_USUAL_LIMIT, None)
        if usual_limit is not None:
            execute(dbapi_connection, usual_limit)
        if info.pop(_MAY_BE_LIFTED, False):
            execute(dbapi_connection, _PROTECT)

    def read_only_step(self) -> Callable[[Connection], None]:
        return self._set_read_only

    def _set_read_only(self, connection: Connection) -> None:
        # SET TRANSACTION READ ONLY would be for the next one, which a function could prevent by SET SESSION TRANSACTION.
        execute(connection.connection, _BEGIN_READ_ONLY)

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

    asks_beginning = True

    def note_beginning(self, connection: Connection) -> object:
        # The server counts changed rows for each connection, whatever changed them. Neither a transaction nor a savepoint resets
        # the counters. MySQL also counts the rows of temporary tables that it makes for a query, so there the text decides.
        if not self._is_mariadb(connection):
            return None
        return sum(int(changes) for _, changes in connection.exec_driver_sql(_CHANGED_ROWS))

    def has_written(self, connection: Connection, beginning: object, *, may_have_locked: bool) -> bool | None:
        return None if beginning is None else self.note_beginning(connection) != beginning

    def is_in_autocommit(self, connection: Connection) -> bool:
        return getattr(connection.connection.driver_connection, "autocommit_mode", None) is True

    tells_transaction = True

    def is_in_transaction(self, connection: Connection) -> bool | None:
        driver_connection = connection.connection.driver_connection
        status: int | None = getattr(driver_connection, "server_status", None)
        if status is None:
            return True
        if status & self._in_autocommit and getattr(driver_connection, "autocommit_mode", None) is False:
            return None
        return bool(status & self._in_transaction)

    # A procedure may commit, and begin again: the server's status does not show that, but a savepoint does not outlive it.

    def mark_transaction(self, connection: Connection) -> None:
        execute(connection.connection, f"SAVEPOINT {_MARK}")

    def has_kept_mark(self, connection: Connection) -> bool:
        try:
            execute(connection.connection, f"RELEASE SAVEPOINT {_MARK}")
        except connection.dialect.loaded_dbapi.Error as error:
            if code_of(error) == self._no_such_savepoint:
                return False
            raise
        return True

    def _has_begun(self, connection: Connection) -> bool:
        """Return whether a transaction is open. Only PyMySQL knows without asking the server."""
        driver_connection = connection.connection.driver_connection
        if type(driver_connection).__module__.startswith("pymysql"):
            status: int = getattr(driver_connection, "server_status", 0)
            return bool(status & self._in_transaction)
        return self._asked_whether_in_transaction(connection)

    def _asked_whether_in_transaction(self, connection: Connection) -> bool:
        cursor = connection.connection.cursor()
        cursor.execute("SELECT @@in_transaction")
        found = cursor.fetchone()
        cursor.close()
        return bool(found and found[0])

    commits_by_itself = staticmethod(_commits_by_itself)

    refused_in_unit = staticmethod(_words_that_stay)

    def may_be_in_transaction(self, dbapi_connection: DBAPIConnection) -> bool:
        status: int | None = getattr(driver_of(dbapi_connection), "server_status", None)
        if not getattr(dbapi_connection, "open", True):
            return True  # its status is out of date; the pool finds out when the rollback fails
        return status is None or bool(status & self._in_transaction)

    def is_left_in_the_middle(self, dbapi_connection: DBAPIConnection) -> bool:
        # Code of the server may have set autocommit, which no text shows. The driver knows what was set through it, as
        # SQLAlchemy does for an isolation level.
        driver_connection = driver_of(dbapi_connection)
        status: int | None = getattr(driver_connection, "server_status", None)
        is_in_autocommit = bool(status and status & self._in_autocommit)
        is_unwanted = is_in_autocommit and getattr(driver_connection, "autocommit_mode", None) is False
        return is_unwanted or super().is_left_in_the_middle(dbapi_connection)

    def refuses_write(self, error: BaseException) -> bool:
        return bool(error.args) and error.args[0] == 1792

    def _is_mariadb(self, connection: Connection) -> bool:
        return bool(getattr(connection.dialect, "is_mariadb", False))

    def _timeout(self, seconds: float, is_mariadb: bool) -> str:
        if is_mariadb:
            return f"SET SESSION max_statement_time = {0 if seconds == NEVER else seconds:.6f}"
        return f"SET SESSION max_execution_time = {milliseconds(seconds)}"

    def denies(self, error: BaseException) -> bool:
        return code_of(error) in self._denied

    def is_transient(self, error: BaseException) -> bool:
        # Some drivers add a SQLSTATE, but after a lock wait timeout it does not begin with 40.
        driver = type(error).__module__.partition(".")[0]
        if driver not in self._drivers or not error.args:
            return False
        # 1290 names the option of the server that is in the way: after a failover, read_only.
        return error.args[0] in self._transient or (error.args[0] == self._read_only_server and "read-only" in str(error))

    def is_lost_for_good(self, error: DBAPIError) -> bool:
        # The server closes the connection on a statement larger than max_allowed_packet, and would do so again.
        parameters = error.params.values() if isinstance(error.params, Mapping) else error.params or ()
        size = len(error.statement or "") + sum(len(value) for value in parameters if isinstance(value, (str, bytes)))
        return code_of(error) in self._gone and size >= self._large

    is_read_only_by_transaction = False

    def inspection(self) -> Inspection:
        from app_db._databases.inspections.mysql import MySQLInspection

        return MySQLInspection()

    def shell(self, url: URL, settings: ConnectionSettings, password: str | None) -> Shell | None:
        options: dict[str, object] = {
            "host": url.host,
            "port": url.port,
            "user": url.username,
            "password": password,
            "default-character-set": url.query.get("charset"),
            "socket": url.query.get("unix_socket"),
            **{option.replace("_", "-"): url.query.get(option) for option in ("ssl_ca", "ssl_cert", "ssl_key")},
            "init-command": _PROTECT if settings.read_only else None,
        }
        lines = [f"{option}={_option_value(str(value))}" for option, value in options.items() if value is not None]
        database = [] if url.database is None else [url.database]
        install = "Install the client (Debian and Ubuntu: apt-get install mariadb-client)"
        private = "\n".join(["[client]", *lines, ""])
        return Shell(["mariadb", "mysql"], install, [f"--defaults-file={FILE}", *database], private=private)

    def prepare_verbs(self, driver: str) -> PrepareVerbs | None:
        return _VERBS if driver in ("pymysql", "asyncmy") else None

    def is_victim(self, error: BaseException) -> bool:
        return code_of(error) == self._deadlock

    def says_there_is_no_table(self, error: DBAPIError) -> bool:
        return code_of(error) == 1146

    def limit_log_creation(self, connection: Connection, wait: float) -> None:
        seconds = max(1, round(wait))
        connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {seconds}, innodb_lock_wait_timeout = {seconds}")

    def write_alone(self, connection: Connection, statement: str, wait: float) -> None:
        seconds = max(1, round(wait))
        if self._is_mariadb(connection):
            connection.exec_driver_sql(f"SET STATEMENT innodb_lock_wait_timeout = {seconds} FOR {statement}")
            return connection.commit()
        usual = int(connection.exec_driver_sql("SELECT @@SESSION.innodb_lock_wait_timeout").scalar_one())
        connection.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {seconds}")
        try:
            connection.exec_driver_sql(statement)
            connection.commit()
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {usual}")

    @contextmanager
    def changing_tables(self, connection: Connection, lock: str) -> Generator[None]:
        # The lock belongs to the connection and not to the transaction, because DDL ends every transaction.
        name = connection.scalar(text("SELECT CONCAT(:lock, ' ', MD5(COALESCE(DATABASE(), '')))"), {"lock": lock})
        if connection.scalar(text("SELECT GET_LOCK(:name, :wait)"), {"name": name, "wait": _LONGEST_WAIT}) != 1:
            raise InvalidUse(
                f"The lock {name!r} is held by another connection", "See on the server which one: SELECT IS_USED_LOCK(...)"
            )
        try:
            yield
            connection.commit()
        finally:
            if not connection.invalidated:
                connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": name})

    first_database = "information_schema"

    def has_database(self, connected: Connected, database: str) -> bool:
        with connected() as connection:
            found = text("SELECT 1 FROM information_schema.schemata WHERE schema_name = :name")
            return connection.scalar(found, {"name": database}) is not None

    def copy_database(self, connected: Connected, source: str, database: str) -> None:
        with connected() as connection:
            copy_schema(connection, source, database)

    def create_database(self, connected: Connected, database: str) -> None:
        with connected() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE IF NOT EXISTS {quoted(connection, database)}")

    def drop_database(self, connected: Connected, database: str) -> None:
        with connected() as connection:
            used = text("SELECT id FROM information_schema.processlist WHERE db = :name AND id <> CONNECTION_ID()")
            for number in connection.scalars(used, {"name": database}).all():
                with suppress(DBAPIError):  # it has gone by itself
                    connection.exec_driver_sql(f"KILL {int(number)}")
            connection.exec_driver_sql(
                f"SET SESSION lock_wait_timeout = {_LONGEST_DROP}"
            )  # of a prepared transaction, for example
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {quoted(connection, database)}")


class MySQLPrepareVerbs(PrepareVerbs):
    """MySQL and MariaDB: only a transaction that began with XA START can be prepared. The server does not list its database."""

    _start = ("XA START '{}'",)
    _prepare = ("XA END '{}'", "XA PREPARE '{}'")
    _commit_unprepared = ("XA END '{}'", "XA COMMIT '{}' ONE PHASE")
    _roll_back_unprepared = ("XA END '{}'", "XA ROLLBACK '{}'")  # after a deadlock, XA END fails and XA ROLLBACK works
    _commit = "XA COMMIT '{}'"
    _roll_back = "XA ROLLBACK '{}'"
    _our_format = 1  # the format of XA START if only a name is given
    _unknown_xid = 1397
    _rolled_back = 1402

    def non_blocking(self, driver_connection: pymysql.Connection) -> NonBlockingConnection:
        return NonBlockingPyMySQL(driver_connection)

    def awaited(self, adapted_connection: Any) -> AwaitedConnection:
        return AwaitedAsyncmy(adapted_connection)

    def prepared(self, connection: Connection) -> list[Prepared]:
        return [Prepared(xid) for xid in self._listed(connection)]

    def is_missing(self, error: BaseException) -> bool:
        return code_of(error) == self._unknown_xid

    def problem(self, connection: Connection) -> str | None:
        is_mariadb = getattr(connection.dialect, "is_mariadb", False)
        name, needed = ("MariaDB", (10, 5)) if is_mariadb else ("MySQL", (8, 0))
        if (connection.dialect.server_version_info or needed) < needed:
            least = ".".join(map(str, needed))
            return f"The server is older than {name} {least}: it loses prepared branches when a client disconnects. Upgrade it."
        try:
            self._listed(connection)
        except DBAPIError:
            return "The user may not list prepared branches. GRANT XA_RECOVER_ADMIN ON *.* to it."
        if (connection.exec_driver_sql("SHOW VARIABLES LIKE 'wsrep_on'").first() or ("", ""))[1] == "ON":
            return "The server is a node of a Galera cluster, which has no XA. Set TWO_PHASE=false for the connection."
        if connection.exec_driver_sql("SELECT @@innodb_flush_log_at_trx_commit").scalar() == 0:
            return (
                "innodb_flush_log_at_trx_commit is 0 on the server: it may lose prepared branches when it crashes. Set it to 1."
            )
        return None

    def _settled_otherwise(self, connection: Connection, xid: str, error: DBAPIError) -> Settling | None:
        if code_of(error) == self._rolled_back:
            # The answer to COMMIT and ROLLBACK of a branch that wrote nothing and whose client has gone. The branch has ended.
            return Settling.DONE
        if not self.is_missing(error):
            return None
        # Until the connection that prepared a branch is closed, the server tells other connections that there is no such branch.
        return Settling.HELD if xid in self._listed(connection) else Settling.MISSING

    def _listed(self, connection: Connection) -> list[str]:
        rows = connection.exec_driver_sql("XA RECOVER").all()
        ours = [data for kind, _, qualifier, data in rows if kind == self._our_format and qualifier == 0]
        return [data.decode(errors="replace") if isinstance(data, bytes) else str(data) for data in ours]


_VERBS = MySQLPrepareVerbs()
DATABASE = MySQL()
