"""Connections of coroutines that can't be used again, or whose event loop is gone."""

from __future__ import annotations

import asyncio
from threading import Thread
from typing import Any

from app_db._compat import asyncmy, asyncpg, sqlalchemy
from app_db._databases.database import driver_of

_LONGEST_CLOSE = 1.0
"""Seconds to wait for the thread of a connection that closes."""


def is_left_in_the_middle(dbapi_connection: Any) -> bool:
    """Return whether a connection can't be used again, because an exception from outside came at a bad moment.

    SQLAlchemy's adapter for asyncpg does not know of a transaction when it was interrupted right after BEGIN, and its rollback
    does nothing then. asyncpg would begin a savepoint for the next unit, whose commit would only release that.
    """
    if sqlalchemy.is_executing(dbapi_connection):
        return True  # the next statement would wait without an end
    driver_connection = driver_of(dbapi_connection)
    if getattr(driver_connection, "is_left_in_the_middle", False):  # psycopg's, on which BEGIN goes along
        return True
    if not hasattr(driver_connection, "is_in_transaction"):  # asyncpg's
        return False
    return (
        driver_connection.is_closed()
        or driver_connection.is_in_transaction()
        or asyncpg.believes_in_transaction(driver_connection)
    )


def hang_up(dbapi_connection: Any) -> None:
    """Close a connection of coroutines without its event loop, from any thread."""
    driver_connection = driver_of(dbapi_connection)
    if hasattr(driver_connection, "pgconn"):  # psycopg's
        driver_connection.pgconn.finish()
    elif hasattr(driver_connection, "is_in_transaction"):  # asyncpg's
        asyncpg.hang_up(driver_connection)
    elif hasattr(driver_connection, "ensure_closed"):  # asyncmy's and aiomysql's
        asyncmy.hang_up(driver_connection)
    else:  # aiosqlite's has a thread of its own, and answers any loop
        thread = Thread(target=lambda: asyncio.run(_close(driver_connection)), daemon=True)
        thread.start()
        thread.join(_LONGEST_CLOSE)


async def _close(driver_connection: Any) -> None:
    await driver_connection.close()
