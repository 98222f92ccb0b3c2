"""Private names of asyncmy and aiomysql. asyncmy was derived from aiomysql."""

from __future__ import annotations

from typing import Any

from app_db._compat import asyncio


def descriptor_of(connection: Any) -> int | None:
    """Return the file descriptor of the connection's socket, None if it is closed."""
    return asyncio.descriptor_of(_transport_of(connection))


def hang_up(connection: Any) -> None:
    """Close a connection at its socket, from any thread. `close()` alone needs the event loop."""
    transport = _transport_of(connection)
    if transport is not None:
        asyncio.hang_up(transport, connection.close)


def _transport_of(connection: Any) -> Any:
    """Return the transport of a connection, None if it is closed."""
    writer = getattr(connection, "_writer", None)  # of asyncmy before 0.2.13, and of aiomysql
    return getattr(connection, "_transport", None) if writer is None else writer.transport
