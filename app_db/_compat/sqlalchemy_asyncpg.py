"""SQLAlchemy's adapter of asyncpg."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection


def note_ended_transaction(adapted: DBAPIConnection) -> None:
    """Tell the adapter and asyncpg that a statement sent below them has ended the transaction.

    Otherwise the next unit of work would begin no transaction, and each of its statements would commit by itself.
    """
    adapted._transaction = adapted.driver_connection._top_xact = None
    if hasattr(adapted, "_started"):  # before SQLAlchemy 2.1, which looks at the transaction itself
        adapted._started = False


def adapted_error(adapted: DBAPIConnection, error: Exception) -> Exception:
    """Return the adapter's error for one of asyncpg's. Applications know the adapter's classes."""
    try:
        adapted._handle_exception(error)
    except Exception as raised:  # noqa: BLE001  # it raises what it makes
        return raised
    return error
