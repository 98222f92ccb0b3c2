"""The statements that prepare a transaction and end it, and what a server says about prepared ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from app_db._databases.exchange import AsyncChannel, Channel


@dataclass(frozen=True, slots=True)
class Prepared:
    """A transaction that a database holds prepared. What the database doesn't tell is None."""

    xid: str
    prepared_at: float | None = None
    """Seconds since the epoch, by the server's clock."""
    owner: str | None = None
    """The database user who prepared it: only this user and superusers may end it."""


class Settling(Enum):
    """What came of telling a database how a prepared branch ends."""

    DONE = "done"
    MISSING = "missing"
    """There is no such branch, or no longer: somebody else has settled it."""
    HELD = "held"
    """Somebody else has it in hand: settles it at this moment, or holds the connection that prepared it (MySQL). Try again."""


class PrepareVerbs(ABC):
    """How a kind of database prepares branches and ends them. A branch is named by an xid; statements are sent in order.

    A branch ends by `commit_unprepared`, by `roll_back_unprepared`, or by `prepare` and then one of `commit_prepared` and
    `roll_back_prepared`.
    """

    _commit: ClassVar[str]
    _roll_back: ClassVar[str]

    begins_by_xid = False
    """Whether only a transaction that `start` has begun can be prepared."""

    def start(self, xid: str) -> list[str]:
        """Return what begins a branch, before its first statement. Nothing where any transaction can be prepared."""
        return []

    @abstractmethod
    def prepare(self, xid: str) -> list[str]: ...

    @abstractmethod
    def commit_unprepared(self, xid: str) -> list[str]: ...

    @abstractmethod
    def roll_back_unprepared(self, xid: str) -> list[str]:
        """Return what rolls a branch back; to be said regardless of refusals, and the last answer counts."""

    def commit_prepared(self, xid: str) -> list[str]:
        return [self._commit.format(xid)]

    def roll_back_prepared(self, xid: str) -> list[str]:
        return [self._roll_back.format(xid)]

    @abstractmethod
    def channel(self, driver_connection: Any) -> Channel:
        """Return a channel on the driver's own connection, for as long as nothing else uses that."""

    @abstractmethod
    def async_channel(self, adapted_connection: Any) -> AsyncChannel:
        """Return a channel on a connection of an async driver, as SQLAlchemy adapts it."""

    @abstractmethod
    def prepared(self, connection: Connection) -> list[Prepared]:
        """Return what is prepared in the database, or as near as the server can tell."""

    def settle(self, connection: Connection, xid: str, *, commit: bool) -> Settling:
        """End a prepared branch from any connection in autocommit, other than the one that prepared it."""
        [statement] = self.commit_prepared(xid) if commit else self.roll_back_prepared(xid)
        try:
            connection.exec_driver_sql(statement)
        except DBAPIError as error:
            came_to = self._settled_otherwise(connection, xid, error)
            if came_to is None:
                raise
            return came_to
        return Settling.DONE

    @abstractmethod
    def is_missing(self, error: BaseException) -> bool:
        """Return whether `error`, the driver's or SQLAlchemy's around it, says that there is no such prepared branch."""

    @abstractmethod
    def problem(self, connection: Connection) -> str | None:
        """Return why branches can't be prepared on this server, or not safely, and what to do; None if they can."""

    @abstractmethod
    def _settled_otherwise(self, connection: Connection, xid: str, error: DBAPIError) -> Settling | None: ...
