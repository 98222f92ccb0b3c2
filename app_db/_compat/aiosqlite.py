"""aiosqlite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

if TYPE_CHECKING:
    import sqlite3

    import aiosqlite


async def async_view(connection: sqlite3.Connection) -> aiosqlite.Connection:
    """Return a connection of aiosqlite on an open one of sqlite3, so that one transaction serves threads and coroutines."""
    import aiosqlite

    view: Any = aiosqlite.Connection(lambda: connection, 64)
    view.create_function = _have_it_already
    getattr(view, "_thread", view).daemon = True  # which it was itself before 0.22
    opened: aiosqlite.Connection = await view
    return opened


async def _have_it_already(*arguments: object, **options: object) -> None:
    """Do nothing: SQLAlchemy made its functions when it made the shared connection, and SQLite makes none during a statement."""


class _Unclosable:
    """What a view closes in place of the connection that it is on."""

    def close(self) -> None:
        """Do nothing."""


def is_view(connection: object) -> TypeGuard[aiosqlite.Connection]:
    """Return whether a connection is aiosqlite's, which has a thread to stop."""
    return hasattr(connection, "_tx")


def leave_open(view: aiosqlite.Connection) -> None:
    """Have closing a view stop its thread, and leave the connection open that it is on."""
    view._connection = cast("sqlite3.Connection", _Unclosable())
