"""What a PostgreSQL server can be asked about itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from app_db._compat.psycopg import libpq_of
from app_db._databases.drivers.poolers import is_pooled, pid_told_to
from app_db._databases.facts import Facts
from app_db._databases.inspection import Failure, Inspection, Limit, Limits, Server, ServerSession, Trouble, by_name, ids_in

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.schema import Table

_SERVER = """
SELECT extract(epoch FROM clock_timestamp())::float8, pg_is_in_recovery(),
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true)::int, 0),
    current_setting('max_prepared_transactions')::int,
    (SELECT ssl FROM pg_catalog.pg_stat_ssl WHERE pid = pg_backend_pid()),
    (SELECT reset_val FROM pg_catalog.pg_settings WHERE name = 'default_transaction_read_only') = 'on',
    EXISTS (SELECT FROM pg_catalog.pg_subscription JOIN pg_catalog.pg_database AS own ON own.oid = subdbid
        WHERE own.datname = current_database())
"""
"""The reset value of default_transaction_read_only is that of the user and database: app_db sets another one for a reader."""

_FACTS = """
SELECT current_setting('server_version'), pg_is_in_recovery(), pg_backend_pid(),
    (SELECT CASE WHEN ssl THEN version ELSE '' END FROM pg_stat_ssl WHERE pid = pg_backend_pid())"""

_LAG = """
SELECT CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() AND has_receiver THEN 0
    ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) END,
    pg_last_wal_receive_lsn() IS NOT NULL AND NOT has_receiver, pg_is_wal_replay_paused()
FROM (SELECT EXISTS (SELECT FROM pg_stat_wal_receiver) AS has_receiver) AS told"""
"""A replica that follows an idle primary has replayed all, although its last transaction may be hours old. One that has received
WAL since it started, and receives none, has lost its primary. One that is fed with files has never received any."""

_LOST_PRIMARY = "replication has stopped: it receives nothing from its primary"
_PAUSED = "replication has stopped: it does not apply what it receives, until SELECT pg_wal_replay_resume()"

_IDENTITY = """
SELECT CASE WHEN has_function_privilege('pg_catalog.pg_control_system()', 'EXECUTE')
THEN (SELECT system_identifier::text FROM pg_catalog.pg_control_system()) END
"""

_MAY_WRITE = """
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_class AS relation JOIN pg_catalog.pg_namespace AS schema ON schema.oid = relation.relnamespace
    WHERE relation.relkind IN ('r', 'p') AND schema.nspname !~ '^pg_' AND schema.nspname <> 'information_schema'
    AND has_schema_privilege(schema.oid, 'USAGE')
    AND (has_any_column_privilege(relation.oid, 'INSERT, UPDATE') OR has_table_privilege(relation.oid, 'DELETE, TRUNCATE'))
)
"""

_LACKING = """
SELECT NOT (
    has_schema_privilege(schema.oid, 'USAGE') AND has_any_column_privilege(relation.oid, CAST(:privilege AS text))
) FROM pg_catalog.pg_class AS relation JOIN pg_catalog.pg_namespace AS schema ON schema.oid = relation.relnamespace
WHERE relation.relname = :name AND relation.relkind IN ('r', 'p', 'v', 'm', 'f') AND CASE
    WHEN CAST(:schema AS text) IS NULL THEN pg_table_is_visible(relation.oid) ELSE schema.nspname = :schema
END
"""

_SESSIONS = """
SELECT pid, coalesce(nullif(application_name, ''), usename, ''), coalesce(host(client_addr), ''), coalesce(state, 'hidden'),
    greatest(extract(epoch FROM clock_timestamp() - state_change), 0)::float8,
    CASE WHEN xact_start IS NOT NULL THEN greatest(extract(epoch FROM clock_timestamp() - xact_start), 0)::float8 END,
    CASE WHEN wait_event_type = 'Lock' THEN array_to_string(pg_blocking_pids(pid), ',') END
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
ORDER BY xact_start NULLS LAST, pid
"""
"""greatest() ignores NULL: without CASE, a session without a transaction would have one since 0 s.

Of other users' sessions the server hides what they do, unless the user has the role pg_read_all_stats."""

_LOGIN_REFUSED = ("password authentication failed", "no password supplied", "SASL authentication failed", "no such user")
_DATABASE_REFUSED = ("does not exist", "CONNECT privilege", "no such database")
"""The last words of each are PgBouncer's."""

_STANDBY = Trouble(
    "The server is a standby, which refuses every write.",
    "Give the URL of the primary, or set READ_ONLY=true for the connection.",
)

_READ_ONLY_BY_DEFAULT = Trouble(
    "default_transaction_read_only is on for this user and database, so the server refuses every write.",
    "ALTER ROLE … or ALTER DATABASE … RESET default_transaction_read_only, or set READ_ONLY=true for the connection.",
)


class PostgreSQLInspection(Inspection):
    """The questions to PostgreSQL."""

    def facts(self, connection: Connection) -> Facts:
        try:
            version, is_replica, pid, tls = connection.exec_driver_sql(_FACTS).one()
        except ProgrammingError:  # the server is another one with the same protocol, or the user may not call a function
            connection.rollback()
            return super().facts(connection)
        driver_connection = connection.connection.driver_connection
        said = pid_told_to(driver_connection)
        is_pooled = None if not said else said != pid
        lag, problem = self._replay(connection) if is_replica else (None, "")
        return Facts(
            version=version.partition(" ")[0],
            role="replica" if is_replica else "primary",
            lag=lag,
            pooler=is_pooled,
            tls=_tls_to_pooler(driver_connection) if is_pooled else tls,
            problem=problem,
        )

    def _replay(self, connection: Connection) -> tuple[float | None, str]:
        """Return by how many seconds a replica is behind, and why it does not follow its primary, if it doesn't."""
        try:
            behind, has_lost_primary, is_paused = connection.exec_driver_sql(_LAG).one()
        except DBAPIError:  # Aurora's replicas don't replay WAL
            connection.rollback()
            return None, ""
        problem = _LOST_PRIMARY if has_lost_primary else _PAUSED if is_paused else ""
        # The clock with which the server compares its own is the primary's.
        return None if behind is None else max(float(behind), 0.0), problem

    def failure(self, error: BaseException) -> Failure:
        # libpq gives no SQLSTATE for a connection that was refused, and servers speak the language of lc_messages. asyncpg does.
        said, code = str(error), getattr(error, "sqlstate", None)
        if code in ("28P01", "28000") or any(words in said for words in _LOGIN_REFUSED):
            return Failure.LOGIN
        is_refused = code in ("3D000", "42501") or ("FATAL" in said and any(words in said for words in _DATABASE_REFUSED))
        if is_refused:
            return Failure.LOGIN if 'role "' in said else Failure.DATABASE
        return Failure.SERVER

    def server(self, connection: Connection) -> Server:
        row = connection.exec_driver_sql(_SERVER).one()
        clock, in_recovery, room, preparable, is_encrypted, read_only, subscribes = row
        return Server(
            clock=clock,
            identity=None if subscribes and not in_recovery else connection.exec_driver_sql(_IDENTITY).scalar(),
            is_copy=in_recovery or subscribes,
            refuses_writes=_STANDBY if in_recovery else _READ_ONLY_BY_DEFAULT if read_only else None,
            room=room,
            preparable=preparable,
            is_encrypted=is_encrypted,
        )

    def limits(self, connection: Connection) -> Limits:
        rows = connection.exec_driver_sql("SELECT name, setting FROM pg_catalog.pg_settings WHERE unit = 'ms'")
        found = {name: float(value) / 1000 for name, value in by_name(rows).items()}

        def limit(name: str) -> Limit:
            return Limit(name, found.get(name, 0))

        waits = ("lock_timeout", "statement_timeout", "transaction_timeout")
        return Limits(
            idle_in_unit=[limit("idle_in_transaction_session_timeout")],
            idle_in_pool=[limit("idle_session_timeout")],
            missing=[] if any(found.get(name) for name in waits) else waits[:2],
        )

    def is_pooled(self, connection: Connection) -> bool | None:
        dbapi_connection = connection.connection.dbapi_connection
        return None if dbapi_connection is None else is_pooled(dbapi_connection)

    def lacking(self, connection: Connection, privilege: str, tables: Iterable[Table]) -> list[str]:
        def is_lacking(table: Table) -> bool:
            asked = {"name": table.name, "schema": table.schema, "privilege": privilege}
            return bool(connection.scalar(text(_LACKING), asked))

        return [table.fullname for table in tables if is_lacking(table)]

    def sessions(self, connection: Connection) -> list[ServerSession]:
        rows = connection.exec_driver_sql(_SESSIONS)
        return [
            ServerSession(pid, client, host, state, since or 0.0, begun, ids_in(blocking))
            for pid, client, host, state, since, begun, blocking in rows
        ]

    def may_write(self, connection: Connection) -> bool:
        return bool(connection.exec_driver_sql(_MAY_WRITE).scalar())


def _tls_to_pooler(driver_connection: object) -> str | None:
    """Return whether the connection to a pooler has TLS. The server tells only about the pooler's own connection."""
    libpq = libpq_of(driver_connection)
    return None if libpq is None else "TLS" if libpq.ssl_in_use else ""
