"""aiosqlite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

if TYPE_CHECKING:
    import sqlite3

    import aiosqlite


async def async_view(connection: sqlite3.Connection) -> aiosqlite.Connection:
    """Return a connection of aiosqlite that uses an open one of sqlite3: threads and coroutines share its transaction."""
    import aiosqlite

    view: Any = aiosqlite.Connection(lambda: connection, 64)
    view.create_function = _do_nothing
    getattr(view, "_thread", view).daemon = True  # before 0.22, the connection itself was the thread
    opened: aiosqlite.Connection = await view
    return opened


async def _do_nothing(*arguments: object, **options: object) -> None:
    """Do nothing: the shared connection has SQLAlchemy's functions, and SQLite can't create functions during a statement."""


class _Unclosable:
    """Stands for the shared connection, which the view must not close."""

    def close(self) -> None:
        """Do nothing."""


def is_view(connection: object) -> TypeGuard[aiosqlite.Connection]:
    """Return whether a connection is aiosqlite's. It has a thread that has to be stopped."""
    return hasattr(connection, "_tx")


def leave_open(view: aiosqlite.Connection) -> None:
    """Make closing a view stop its thread, and leave the shared connection open."""
    view._connection = cast("sqlite3.Connection", _Unclosable())
