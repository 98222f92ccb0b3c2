"""Private names of SQLAlchemy."""

from __future__ import annotations

from typing import Any


def is_executing(dbapi_connection: Any) -> bool:
    """Return whether a connection of coroutines has begun a statement that was not ended: the next would wait for ever."""
    mutex = getattr(dbapi_connection, "_execute_mutex", None)
    return mutex is not None and bool(mutex.locked())
