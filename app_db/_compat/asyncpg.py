"""Private names of asyncpg."""

from __future__ import annotations

from typing import Any

from app_db._compat import asyncio


def believes_in_transaction(connection: Any) -> bool:
    """Return whether asyncpg would begin a savepoint next, because it believes that a transaction is open."""
    return connection._top_xact is not None


def hang_up(connection: Any) -> None:
    """Close a connection at its socket, from any thread. `terminate()` alone needs the event loop."""
    asyncio.hang_up(connection._transport, connection.terminate)
