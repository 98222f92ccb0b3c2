"""Connections of coroutines that can't be used again, or whose event loop is gone."""

from __future__ import annotations

import asyncio
from typing import Any

from app_db._databases.database import driver_of


def is_left_in_the_middle(dbapi_connection: Any) -> bool:
    """Return whether a connection of coroutines can't be used again, because an exception from outside came at a bad moment.

    SQLAlchemy's adapter for asyncpg does not know of a transaction when it was interrupted right after BEGIN, and its rollback
    does nothing then. asyncpg would begin a savepoint for the next unit, whose commit would only release that.
    """
    mutex = getattr(dbapi_connection, "_execute_mutex", None)
    if mutex is not None and mutex.locked():
        return True  # the next statement would wait without an end
    driver_connection = driver_of(dbapi_connection)
    if not hasattr(driver_connection, "is_in_transaction"):  # asyncpg's
        return False
    return (
        driver_connection.is_closed()
        or driver_connection.is_in_transaction()
        or getattr(driver_connection, "_top_xact", None) is not None
    )


def hang_up(dbapi_connection: Any) -> None:
    """Close a connection of coroutines whose event loop is closed, in a thread in which none runs."""
    driver_connection = driver_of(dbapi_connection)
    transport = _transport_of(driver_connection)
    if transport is None:
        asyncio.run(_close(driver_connection))  # psycopg's and aiosqlite's can be closed in any loop
        return
    try:  # asyncpg's and asyncmy's are bound to theirs
        (getattr(driver_connection, "terminate", None) or driver_connection.close)()
    except RuntimeError:
        own_socket = getattr(transport, "_sock", None)  # asyncio's, which nobody else can close any more
        if own_socket is not None:
            own_socket.close()
            transport._sock = None


def _transport_of(driver_connection: Any) -> Any:
    writer = getattr(driver_connection, "_writer", None)  # asyncmy's before 0.2.13
    return getattr(driver_connection, "_transport", None) if writer is None else writer.transport


async def _close(driver_connection: Any) -> None:
    await driver_connection.close()
