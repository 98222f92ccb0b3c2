"""What a database can be asked about itself, with the answers for a database that app_db does not know.

Everything is told by settings and privileges. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import select

from app_db._databases.facts import Facts

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.schema import Table


class Failure(Enum):
    """Why a connection could not be made."""

    SERVER = "server"
    """The server can't be reached."""
    LOGIN = "login"
    """The server refuses the user or the password."""
    DATABASE = "database"
    """The server has no such database, or does not let the user in."""


class Trouble(NamedTuple):
    """What is wrong, and what to do: a sentence each."""

    what: str
    remedy: str


class Limit(NamedTuple):
    """A time limit of the server: the name of the setting, and seconds. 0 is no limit."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Server:
    """What a server says about itself and about a connection to it. None: it does not say."""

    clock: float | None = None
    """Seconds since the epoch."""
    identity: str | None = None
    """Equal for a server and its physical replicas. None for a logical one."""
    is_copy: bool | None = None
    """Whether it, or the database, follows another server."""
    refuses_writes: Trouble | None = None
    """Why it refuses the writes of a connection that is not read-only by its settings."""
    is_writable_replica: bool = False
    """Whether it follows another server, and accepts writes all the same, which would make the two differ."""
    room: int | None = None
    """The most connections that it accepts from ordinary users."""
    preparable: int | None = None
    """The most transactions that may be prepared at once."""
    is_encrypted: bool | None = None
    """Whether the connection is."""


@dataclass(frozen=True)
class Limits:
    """The time limits that a server sets to a connection."""

    idle_in_unit: Sequence[Limit] = ()
    """What ends a connection that sends nothing for so long inside a transaction."""
    idle_in_pool: Sequence[Limit] = ()
    """What ends a connection that sends nothing for so long outside of one."""
    missing: Sequence[str] = ()
    """Settings any of which would limit how long a statement waits for a lock, if none does."""


@dataclass(frozen=True)
class ServerSession:
    """A connection to a database as its server sees it. Statements are not told: they may contain secrets."""

    id: int
    """PostgreSQL's pid, MariaDB's connection id."""
    client: str
    """The application's name where clients have one, or the user."""
    host: str
    """Where the client is; empty for one on the same machine."""
    state: str
    """What it does, in the server's words."""
    in_state: float
    """For how many seconds."""
    in_transaction: float | None
    """For how many seconds its transaction is open; None if there is none, or the server does not say."""
    blocked_by: tuple[int, ...] = ()
    """The ids of the sessions that hold the lock that it waits for. PostgreSQL has 0 for a prepared transaction."""


class Inspection:
    """The questions to a server. The connection is in a read-only transaction or in autocommit."""

    def facts(self, connection: Connection) -> Facts:
        """Return what the database tells about itself. Nothing is changed there."""
        connection.execute(select(1))
        version = connection.dialect.server_version_info
        return Facts(version=None if version is None else ".".join(map(str, version)))

    def failure(self, error: BaseException) -> Failure:
        """Return why a connection could not be made, by the driver's error."""
        return Failure.SERVER

    def server(self, connection: Connection) -> Server:
        """Return what the server says about itself."""
        return Server()

    def limits(self, connection: Connection) -> Limits:
        """Return the time limits that hold for the connection."""
        return Limits()

    def is_pooled(self, connection: Connection) -> bool | None:
        """Return whether a transaction pooler answers; None if it can't be told."""
        return None

    def lacking(self, connection: Connection, privilege: str, tables: Iterable[Table]) -> list[str]:
        """Return those of the tables that exist, and on which the user lacks INSERT or SELECT."""
        return []

    def sessions(self, connection: Connection) -> list[ServerSession]:
        """Return the other connections to the database, those with the oldest transactions first."""
        return []

    def may_write(self, connection: Connection) -> bool:
        """Return whether the user may change rows of a table of the database. What protects a session is left out."""
        return False


def by_name(rows: Iterable[Sequence[object]]) -> Mapping[str, str]:
    """Return settings of a server by name, as it spells them."""
    return {str(name): str(value) for name, value in rows}


def ids_in(listed: str | None) -> tuple[int, ...]:
    """Return the ids that a server has joined by commas."""
    return tuple(sorted({int(each) for each in (listed or "").split(",") if each}))
