"""SQLAlchemy's adapter of asyncpg."""

from __future__ import annotations

from typing import Any


def note_ended_transaction(adapted: Any) -> None:
    """Have the adapter and asyncpg know that the transaction is over that a statement of ours has ended.

    Otherwise the next unit of work would begin none, and commit each statement by itself.
    """
    adapted._transaction = adapted.driver_connection._top_xact = None
    if hasattr(adapted, "_started"):  # before SQLAlchemy 2.1, which asks for the transaction itself
        adapted._started = False


def adapted_error(adapted: Any, error: Exception) -> Exception:
    """Return the adapter's error for one of asyncpg's: it is what applications know."""
    try:
        adapted._handle_exception(error)
    except Exception as raised:  # noqa: BLE001  # that is how it says
        return raised
    return error
