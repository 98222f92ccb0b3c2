"""Everything that is found. The table of `docs/how-to/check.md` has the same rows."""

from __future__ import annotations

from app_db._findings.finding import Matter

# ---- settings

SETTINGS = Matter("settings", "error", "The settings can't be read, a driver is missing, or an engine can't be made from them.")
NOT_CONFIGURED = Matter("not-configured", "warning", "The container has a connection that has no settings.")
ISOLATION_LEVEL = Matter("isolation-level", "error", "The database does not have the isolation level.")
SEPARATE_ROWS = Matter(
    "separate-rows",
    "warning",
    "Two writable connections to one database don't share a transaction: their rows commit separately.",
)

# ---- reaching the server

UNREACHABLE = Matter("unreachable", "error", "The server can't be reached.")
SILENT = Matter("silent", "error", "The server gave no connection or no answer in time.")
LOGIN = Matter("login", "error", "The server refuses the user or the password.")
NO_DATABASE = Matter("no-database", "error", "The server has no such database, or the user may not connect to it.")
NO_FILE = Matter("no-file", "warning", "The file of an SQLite database does not exist, or its directory does not.")
UNASKED = Matter("unasked", "warning", "The server can't be asked for something, so that is not known.")
POOLER_NOT_NAMED = Matter("pooler-not-named", "error", "A pooler answers, and the settings don't name it.")
NO_POOLER = Matter("no-pooler", "hint", "The settings name a transaction pooler, and no pooler answers.")
NOT_ENCRYPTED = Matter("not-encrypted", "hint", "The connection to another host is not encrypted.")

# ---- reading and writing

WRITES_REFUSED = Matter("writes-refused", "error", "A connection that writes goes to a standby or a read-only server.")
NO_PRIVILEGE = Matter(
    "no-privilege",
    "error",
    "The user lacks INSERT on tables of the connection's models, or SELECT where the connection only reads.",
)
READER_MAY_WRITE = Matter(
    "reader-may-write", "hint", "The user of a read-only connection could write: only app_db makes its sessions read-only."
)
REPLICA_WRITABLE = Matter("replica-writable", "warning", "A replica accepts writes, which would make it differ from its primary.")
NOT_A_REPLICA = Matter("not-a-replica", "warning", "Reads are sent to a server that does not follow that of the writer.")
REPLICA_IS_OWNER = Matter("replica-is-owner", "warning", "REPLICA_OF names a connection to the same database.")

# ---- the server's settings

CLOCK = Matter("clock", "warning", "The server's clock differs by more than 30 s. The grace of recovery depends on it.")
KILLS_UNITS = Matter("kills-units", "warning", "The server ends transactions that send nothing for less than 10 s.")
KILLS_IDLE = Matter(
    "kills-idle", "warning", "The server ends idle connections before the pool would ask whether they live (POOL__ALIVE_WINDOW)."
)
WAITS_FOR_EVER = Matter("waits-for-ever", "hint", "Nothing limits how long a statement waits for a lock.")
TOO_MANY_CONNECTIONS = Matter(
    "too-many-connections", "warning", "The pools of one process can open more connections than the server accepts."
)
POOL_WITHOUT_LIMIT = Matter("pool-without-limit", "hint", "A pool has no limit, and the server has one.")

# ---- tables

NO_TRANSACTIONS = Matter("no-transactions", "warning", "Tables of MariaDB or MySQL have no transactions (MyISAM, Aria).")
NO_TABLE = Matter("no-table", "error", "The table of a model does not exist.")
NO_COLUMN = Matter("no-column", "error", "A model has a column that its table does not have.")
UNKNOWN_COLUMN = Matter("unknown-column", "warning", "A table requires a value for a column that its model does not have.")
PENDING = Matter("pending-migrations", "warning", "Migrations have not been run, or the folder of the migrations can't be used.")
DRIFT = Matter(
    "drift", "warning", "All migrations have been run, and models and database differ, as `app-db migrate --check` lists it."
)
STRAY = Matter("stray-migrations", "warning", "A folder of migrations has the name of no connection, so nothing runs them.")

# ---- two-phase commit

CANNOT_PREPARE = Matter("cannot-prepare", "error", "The server of a two-phase connection can't prepare transactions.")
TOO_FEW_PREPARED = Matter(
    "too-few-prepared", "warning", "max_prepared_transactions is lower than what the pools of one process can prepare at once."
)
DECISION_LOG = Matter("decision-log", "error", "Decisions can't be written to the decision log.")
DECISION_LOG_APART = Matter(
    "decision-log-apart", "hint", "The decision log is in a database that takes no part in two-phase commit."
)
IN_DOUBT = Matter("in-doubt", "warning", "A crash has left prepared branches.")

# ---- injection

MODULE = Matter("module", "error", "A module of the application can't be imported.")
NOT_WIRED = Matter("not-wired", "warning", "Functions have markers, and their module is not wired.")
NOTHING_WIRED = Matter("nothing-wired", "hint", "The container wires no module, so it is not known which ones will be.")
UNRESOLVED = Matter("unresolved", "error", "A marker, or a provider, names something that the container does not have.")

MATTERS: tuple[Matter, ...] = tuple(value for value in list(vars().values()) if isinstance(value, Matter))
"""All of them, in the order of this page."""
