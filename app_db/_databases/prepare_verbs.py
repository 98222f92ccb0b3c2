"""The statements that prepare a transaction and end it, and what a server says about prepared ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from app_db._databases.concurrent_statements import AwaitedConnection, NonBlockingConnection


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared transaction. A field is None if the database does not say."""

    xid: str
    prepared_at: float | None = None
    """Seconds since the epoch, by the server's clock."""
    owner: str | None = None
    """The database user that prepared it. Only this user and superusers may end it."""


class Settling(Enum):
    """The result of telling a database how a prepared branch ends."""

    DONE = "done"
    MISSING = "missing"
    """There is no such branch, or no longer: another process has settled it."""
    HELD = "held"
    """Try again: another connection is settling it, or the connection that prepared it is still open (MySQL)."""


class PrepareVerbs(ABC):
    """How a kind of database prepares branches and ends them. A branch is named by an xid; statements are sent in order.

    A branch ends by `commit_unprepared`, by `roll_back_unprepared`, or by `prepare` and then one of `commit_prepared` and
    `roll_back_prepared`. Subclasses give the statements, in which `{}` stands for the xid.
    """

    _start: ClassVar[Sequence[str]] = ()
    _prepare: ClassVar[Sequence[str]]
    _commit_unprepared: ClassVar[Sequence[str]]
    _roll_back_unprepared: ClassVar[Sequence[str]]
    _commit: ClassVar[str]
    _roll_back: ClassVar[str]

    @property
    def begins_by_xid(self) -> bool:
        """Whether only a transaction that `start` has begun can be prepared."""
        return bool(self._start)

    def start(self, xid: str) -> list[str]:
        """Return what begins a branch, before its first statement. Empty if any transaction can be prepared."""
        return [statement.format(xid) for statement in self._start]

    def prepare(self, xid: str) -> list[str]:
        return [statement.format(xid) for statement in self._prepare]

    def commit_unprepared(self, xid: str) -> list[str]:
        return [statement.format(xid) for statement in self._commit_unprepared]

    def roll_back_unprepared(self, xid: str) -> list[str]:
        """Return what rolls a branch back. If one statement is refused, send the next; only the last answer counts."""
        return [statement.format(xid) for statement in self._roll_back_unprepared]

    def commit_prepared(self, xid: str) -> list[str]:
        return [self._commit.format(xid)]

    def roll_back_prepared(self, xid: str) -> list[str]:
        return [self._roll_back.format(xid)]

    @abstractmethod
    def non_blocking(self, driver_connection: Any) -> NonBlockingConnection:
        """Return a wrapper of a driver's connection. Nothing else may use the connection at the same time."""

    @abstractmethod
    def awaited(self, adapted_connection: Any) -> AwaitedConnection:
        """Return a wrapper of an async driver's connection, as SQLAlchemy adapts it."""

    @abstractmethod
    def prepared(self, connection: Connection) -> list[Prepared]:
        """Return what is prepared in the database; on MySQL, what is prepared on the server."""

    def settle(self, connection: Connection, xid: str, *, commit: bool) -> Settling:
        """End a prepared branch on a connection in autocommit, which is not the one that prepared it."""
        try:
            connection.exec_driver_sql((self._commit if commit else self._roll_back).format(xid))
        except DBAPIError as error:
            settling = self._settled_otherwise(connection, xid, error)
            if settling is None:
                raise
            return settling
        return Settling.DONE

    @abstractmethod
    def is_missing(self, error: BaseException) -> bool:
        """Return whether `error`, the driver's or SQLAlchemy's around it, says that there is no such prepared branch."""

    @abstractmethod
    def problem(self, connection: Connection) -> str | None:
        """Return why branches can't be prepared safely on this server, and what to do; None if they can."""

    @abstractmethod
    def _settled_otherwise(self, connection: Connection, xid: str, error: DBAPIError) -> Settling | None:
        """Return what `error` of `settle` means for the branch; None if it is an error."""
