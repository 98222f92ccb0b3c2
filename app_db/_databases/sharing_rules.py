"""How several units of an isolated test share one connection, whose transaction is never committed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from app_db._databases.statements import transaction_verb
from app_db.errors import CannotIsolate

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import PoolProxiedConnection

Rows = Sequence[Sequence[Any]]
"""The rows of a result."""

Say = Callable[..., Rows]
"""Executes statements on the shared connection; returns the rows of the last one."""

_numbers = count(1)


def new_mark() -> str:
    """Return a name that no savepoint of this process has: where names are equal, one savepoint hides another, or ends it."""
    return f"app_db_{next(_numbers)}"


class SharingRules:
    """What it takes to share one connection in a transaction that is never committed, on any database."""

    first: tuple[str, ...] = ()
    """What begins a transaction that the driver would begin later."""
    survives_cancellation = True
    """Whether drivers for coroutines can use a connection on which they were cancelled while they waited for an answer."""
    reads_at_once = True
    """Whether a result has been read when its statement has been executed, so that later ones can't change it."""

    def refuse(self, name: str, statement: str) -> None:
        """Raise when a statement would end the transaction that all share."""
        verb = transaction_verb(statement)
        if verb is not None:
            raise CannotIsolate(name, f"A {verb.upper()} sent as SQL", "Begin and end transactions by SQLAlchemy's own methods")

    def around(self, mark: str, read_only: bool) -> tuple[list[str], list[str], list[str]]:
        """Return what to say before a statement that is for itself, after it, and after it has failed."""
        return [], [], []

    def check_deferred(self, say: Say) -> None:
        """Raise what COMMIT would: the violation of a constraint that is checked only then."""

    def limit_before(self, statement: str, ask: Callable[[str], object]) -> str | None:
        """Return what sets the server's limit for statements as it was, where this statement is about to change it."""
        return None

    def execute(self, dbapi_connection: DBAPIConnection | PoolProxiedConnection, *statements: str) -> Rows:
        """Execute statements below SQLAlchemy, and return the rows of the last one."""
        if not statements:
            return []
        cursor = dbapi_connection.cursor()
        try:
            for statement in statements:
                cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
        finally:
            cursor.close()
