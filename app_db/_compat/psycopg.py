"""psycopg."""

from __future__ import annotations

from typing import Any


async def async_view(connection: Any) -> Any:
    """Return an asynchronous connection on the same libpq connection, so that one transaction serves threads and coroutines."""
    from psycopg import AsyncConnection
    from psycopg.adapt import AdaptersMap

    view: Any = AsyncConnection(connection.pgconn)
    view._adapters = AdaptersMap(connection.adapters)
    view.prepare_threshold = None  # both would give their statements the same names
    view._pool = None  # a connection without this attribute complains when it is dropped open
    return view
