"""What a MariaDB or MySQL server can be asked about itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app_db._databases.database import code_of
from app_db._databases.facts import Facts
from app_db._databases.inspection import Failure, Inspection, Limit, Limits, Server, ServerSession, Trouble, by_name, ids_in

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.schema import Table

_VARIABLES = """
SHOW VARIABLES WHERE Variable_name IN ('version', 'max_connections', 'read_only', 'super_read_only', 'tx_read_only',
    'transaction_read_only', 'innodb_read_only', 'wsrep_on', 'idle_transaction_timeout', 'idle_write_transaction_timeout',
    'wait_timeout')
"""

_STATUS = """
SHOW STATUS WHERE Variable_name IN ('Ssl_cipher', 'Ssl_version', 'wsrep_ready', 'wsrep_cluster_status',
    'wsrep_local_state_comment')
"""

_GRANTED = """
SELECT privilege_type, '' FROM information_schema.user_privileges WHERE grantee = :grantee
UNION SELECT privilege_type, '' FROM information_schema.schema_privileges
    WHERE grantee = :grantee AND DATABASE() LIKE table_schema
UNION SELECT privilege_type, table_name FROM information_schema.table_privileges
    WHERE grantee = :grantee AND table_schema = DATABASE()
UNION SELECT privilege_type, table_name FROM information_schema.column_privileges
    WHERE grantee = :grantee AND table_schema = DATABASE()
"""

_SESSIONS = """
SELECT p.id, p.user, p.host, p.command, p.time, TIMESTAMPDIFF(SECOND, t.trx_started, NOW()), {blocking}
FROM information_schema.processlist p LEFT JOIN information_schema.innodb_trx t ON t.trx_mysql_thread_id = p.id
WHERE p.db = DATABASE() AND p.id <> CONNECTION_ID() ORDER BY t.trx_started IS NULL, t.trx_started, p.id
"""

_BLOCKING_ON_MARIADB = """(
    SELECT GROUP_CONCAT(b.trx_mysql_thread_id)
    FROM information_schema.innodb_lock_waits w JOIN information_schema.innodb_trx b ON b.trx_id = w.blocking_trx_id
    WHERE w.requesting_trx_id = t.trx_id
)"""
"""MySQL has no such table since 8.0, and its performance_schema is closed to most users."""

_SESSIONS_WITHOUT_TRANSACTIONS = """
SELECT id, user, host, command, time, NULL, NULL FROM information_schema.processlist
WHERE db = DATABASE() AND id <> CONNECTION_ID() ORDER BY id
"""
"""For a user without the privilege PROCESS, who sees only his own connections and no transactions."""

_CHANGES_ROWS = frozenset({"INSERT", "UPDATE", "DELETE", "DROP"})

_NO_PROCESS_PRIVILEGE = 1227

_NOT_A_REPLICA_QUERY = 1064
"""A syntax error: the server is older than the words SHOW REPLICA STATUS."""

_READ_ONLY = Trouble(
    "The server is read-only (read_only), so it refuses every write.",
    "Give the URL of the server that writes, SET GLOBAL read_only = OFF, or set READ_ONLY=true for the connection.",
)

_NOT_READY = Trouble(
    "The Galera node is not ready (wsrep_ready is OFF), so it refuses every statement.",
    "See SHOW STATUS LIKE 'wsrep_%' on the node: it has to join the primary component of its cluster.",
)


class MySQLInspection(Inspection):
    """The questions to MariaDB and MySQL."""

    _logins = frozenset({1045, 1698, 1862})
    """Access denied, the same for a plugin, and a password that has expired."""
    _databases = frozenset({1044, 1049})
    """Access denied to a database, and an unknown one."""

    def facts(self, connection: Connection) -> Facts:
        # SHOW is answered by each node of Galera, SELECT only by one that is in the cluster.
        told = by_name([*connection.exec_driver_sql(_VARIABLES), *connection.exec_driver_sql(_STATUS)])
        galera = _galera(told) if told.get("wsrep_on") == "ON" else None
        source = self._replication(connection) or None
        is_replica = source is not None or told.get("read_only", "OFF") != "OFF"
        problem = "" if source is None else _why_stopped(source)
        if galera is not None and galera != _SYNCED:
            problem = f"the Galera node is {galera}, and not {_SYNCED}"
        return Facts(
            version=told["version"].partition("-")[0],
            role="replica" if is_replica else "primary",
            lag=None if source is None else _seconds_behind(source),
            galera=galera,
            tls=told.get("Ssl_version"),
            problem=problem,
        )

    def _replication(self, connection: Connection) -> Mapping[str, Any] | None:
        """Return what the server tells about its replication: nothing if it follows no server, None if the user may not ask."""
        for statement in ("SHOW REPLICA STATUS", "SHOW SLAVE STATUS"):
            try:
                row = connection.exec_driver_sql(statement).mappings().first()
            except DBAPIError as error:
                if code_of(error) != _NOT_A_REPLICA_QUERY:
                    return None
            else:
                return {} if row is None else {str(key): value for key, value in row.items()}
        return None

    def failure(self, error: BaseException) -> Failure:
        code = code_of(error)
        return Failure.LOGIN if code in self._logins else Failure.DATABASE if code in self._databases else Failure.SERVER

    def server(self, connection: Connection) -> Server:
        variables = by_name(connection.exec_driver_sql(_VARIABLES))
        status = by_name(connection.exec_driver_sql(_STATUS))
        clock = connection.exec_driver_sql("SELECT UNIX_TIMESTAMP(NOW(6))").scalar_one()
        in_cluster = variables.get("wsrep_on") == "ON"
        source = self._replication(connection)
        is_replica = None if source is None else bool(source)
        is_writable = all(variables.get(name, "OFF") in ("OFF", "0") for name in ("read_only", "innodb_read_only"))
        refusal = _NOT_READY if in_cluster and status.get("wsrep_ready") == "OFF" else None if is_writable else _READ_ONLY
        return Server(
            clock=float(clock),
            # A server that is read-only for other reasons may be a copy by other means: of Aurora, or by group replication.
            is_copy=in_cluster or is_replica or (False if is_replica is False and is_writable else None),
            refuses_writes=refusal,
            is_writable_replica=bool(is_replica) and not in_cluster and refusal is None,
            room=int(variables["max_connections"]),
            is_encrypted=bool(status.get("Ssl_cipher")),
        )

    def limits(self, connection: Connection) -> Limits:
        variables = by_name(connection.exec_driver_sql(_VARIABLES))

        def limit(name: str) -> Limit:
            return Limit(name, float(variables.get(name, 0)))

        return Limits(
            idle_in_unit=[limit("idle_transaction_timeout"), limit("idle_write_transaction_timeout")],
            idle_in_pool=[limit("wait_timeout")],
            missing=[],  # innodb_lock_wait_timeout can't be switched off
        )

    def lacking(self, connection: Connection, privilege: str, tables: Iterable[Table]) -> list[str]:
        granted = self._granted(connection)
        if granted is None or (privilege, "") in granted:
            return []
        existing = set(connection.exec_driver_sql("SHOW TABLES").scalars())
        names = [table.name for table in tables if table.schema is None and table.name in existing]
        return [name for name in names if (privilege, name) not in granted]

    def sessions(self, connection: Connection) -> list[ServerSession]:
        blocking = _BLOCKING_ON_MARIADB if getattr(connection.dialect, "is_mariadb", False) else "NULL"
        try:
            rows = list(connection.exec_driver_sql(_SESSIONS.format(blocking=blocking)))
        except DBAPIError as error:
            if code_of(error) != _NO_PROCESS_PRIVILEGE:
                raise
            rows = list(connection.exec_driver_sql(_SESSIONS_WITHOUT_TRANSACTIONS))
        return [
            ServerSession(
                number,
                user,
                host.rpartition(":")[0] or host,
                command,
                float(since or 0),
                None if begun is None else float(begun),
                ids_in(blocking),
            )
            for number, user, host, command, since, begun, blocking in rows
        ]

    def may_write(self, connection: Connection) -> bool:
        granted = self._granted(connection) or ()
        return any(privilege in _CHANGES_ROWS for privilege, _ in granted)

    def _granted(self, connection: Connection) -> set[tuple[str, str]] | None:
        """Return the privileges of the user, each with its table, or "" for all tables. None if a role may give others."""
        user, role = connection.exec_driver_sql("SELECT CURRENT_USER(), CURRENT_ROLE()").one()
        if role not in (None, "", "NONE"):
            return None
        name, _, host = str(user).rpartition("@")
        rows = connection.execute(text(_GRANTED), {"grantee": f"'{name}'@'{host}'"})
        return {(str(privilege), str(table)) for privilege, table in rows}


# ---- facts ----------------------------------------------------------------------------------------------------------------

_SYNCED = "Synced"


def _galera(told: Mapping[str, str]) -> str:
    """Return the state of a node of Galera. A node outside of the majority calls itself synced, too."""
    cluster = told.get("wsrep_cluster_status", "")
    return told.get("wsrep_local_state_comment", "") if cluster == "Primary" else cluster


def _seconds_behind(source: Mapping[str, Any]) -> float | None:
    behind = source.get("Seconds_Behind_Master", source.get("Seconds_Behind_Source"))
    return None if behind is None else float(behind)


def _why_stopped(source: Mapping[str, Any]) -> str:
    """Return that replication has stopped, or an empty string. A replica whose primary is gone is `Connecting` for ever."""
    threads = {key: state for key, state in source.items() if key.endswith(("_IO_Running", "_SQL_Running"))}
    stopped = [f"{key} is {state}" for key, state in threads.items() if state != "Yes"]
    return f"replication has stopped ({', '.join(stopped)})" if stopped else ""
