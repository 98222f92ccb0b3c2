"""Private names of asyncmy and aiomysql. asyncmy was derived from aiomysql."""

from __future__ import annotations

from typing import Any

from app_db._compat import asyncio


def hang_up(connection: Any) -> None:
    """Close a connection at its socket, from any thread. `close()` alone needs the event loop."""
    writer = getattr(connection, "_writer", None)  # of asyncmy before 0.2.13, and of aiomysql
    transport = getattr(connection, "_transport", None) if writer is None else writer.transport
    if transport is not None:  # None if the connection is closed
        asyncio.hang_up(transport, connection.close)
