"""How migrations run on a kind of database: in which transaction, and under which lock."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import MetaData, inspect

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

_TIMES = "%Y-%m-%d %H:%M:%S UTC"


class MigrationRules:
    """The rules for a database that app_db does not know: no lock, and each migration is committed by itself."""

    transactional = False
    """Whether a rollback undoes CREATE, ALTER and DROP."""

    lock_ends_with_transaction = False
    """Whether the COMMIT of the connection that holds the lock releases it."""

    has_autocommit_blocks = True
    """Whether a migration may leave its transaction for some statements."""

    alters_by_copying = False
    """Whether most changes of a table need a copy of it, as Alembic's batch mode makes one."""

    def begin(self, connection: Connection, locks: Sequence[str]) -> bool:
        """Take the locks, in a new transaction if its end releases them. Return False if another connection holds one of them.

        No transaction is open then.
        """
        return True

    def take(self, connection: Connection, locks: Sequence[str]) -> bool:
        """Take the locks in the transaction that is open. Return False if another connection holds one of them."""
        return True

    def holder(self, connection: Connection, locks: Sequence[str]) -> str:
        """Return which connection holds one of the locks, as a phrase for an error."""
        return "another process"

    def check(self, connection: Connection) -> None:
        """Raise an error if the database would be inconsistent after a COMMIT that the database itself does not refuse."""

    def end(self, connection: Connection, locks: Sequence[str]) -> None:
        """Undo what `begin` has set that outlives the transaction. No transaction is open."""

    def left_in(self, connection: Connection) -> list[str]:
        """Return what is in the database, such as `table orders`."""
        inspector = inspect(connection)
        found = {"table": inspector.get_table_names(), "view": inspector.get_view_names()}
        if connection.dialect.supports_sequences:
            found["sequence"] = inspector.get_sequence_names()
        return [f"{kind} {name}" for kind, names in found.items() for name in names]

    def clear(self, connection: Connection) -> None:
        """Drop all tables."""
        metadata = MetaData()
        metadata.reflect(connection)
        metadata.drop_all(connection)


def described_holder(pid: object, program: object, since: object) -> str:
    """Return the phrase for an error about the connection that holds a lock."""
    named = f" ({program})" if program else ""
    return f"the connection {pid}{named}" + (f", since {since}" if since else "")


def moment(at: object) -> str:
    """Return a time that a server has given, to the second, in UTC."""
    return at.astimezone(UTC).strftime(_TIMES) if isinstance(at, datetime) else ""
