"""asyncpg."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from app_db._compat import asyncio

if TYPE_CHECKING:
    from asyncpg import Connection


def is_asyncpg(driver_connection: object) -> TypeGuard[Connection]:
    """Return whether a connection is asyncpg's."""
    return hasattr(driver_connection, "is_in_transaction")


def believes_in_transaction(connection: Connection) -> bool:
    """Return whether asyncpg would begin a savepoint next, because it believes that a transaction is open."""
    return connection._top_xact is not None


def hang_up(connection: Connection) -> None:
    """Close a connection at its socket, from any thread. `terminate()` alone needs the event loop."""
    asyncio.hang_up(connection._transport, connection.terminate)


def descriptor_of(connection: Connection) -> int | None:
    """Return the file descriptor of the connection's socket, None if it is closed."""
    return asyncio.descriptor_of(connection._transport)
