"""psycopg."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psycopg import AsyncConnection, Connection
    from psycopg.pq.abc import PGconn


def libpq_of(driver_connection: object) -> PGconn | None:
    """Return the libpq connection of a psycopg connection, None for the connection of another driver."""
    return getattr(driver_connection, "pgconn", None)


async def async_view(connection: Connection[object]) -> AsyncConnection[object]:
    """Return an async connection on the same libpq connection: threads and coroutines share its transaction."""
    from psycopg import AsyncConnection
    from psycopg.adapt import AdaptersMap

    view: AsyncConnection[object] = AsyncConnection(connection.pgconn)
    view._adapters = AdaptersMap(connection.adapters)
    view.prepare_threshold = None  # both connections would use the same names for their statements
    view._pool = None  # without this attribute, it warns when it is dropped open
    return view
