"""Whether a pooler such as PgBouncer stands before a PostgreSQL server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app_db._compat.asyncpg import is_asyncpg
from app_db._compat.psycopg import libpq_of
from app_db._databases.database import driver_of

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection


def pid_told_to(driver_connection: Any) -> int | None:
    """Return the process id that a connection was told when it was opened. A pooler tells one of its own."""
    if is_asyncpg(driver_connection):
        return int(driver_connection.get_server_pid())
    libpq = libpq_of(driver_connection)
    return None if libpq is None else libpq.backend_pid


def is_pooled(dbapi_connection: DBAPIConnection) -> bool:
    """Return whether a pooler answers: the process id that it reports is not the server's. No transaction may be open."""
    said = pid_told_to(driver_of(dbapi_connection))
    cursor = dbapi_connection.cursor()
    cursor.execute("SELECT pg_backend_pid()")
    found = cursor.fetchone()
    cursor.close()
    if not dbapi_connection.autocommit:
        dbapi_connection.rollback()
    return bool(said and found and said != found[0])
