"""How each kind of database prepares a branch, and how it ends one that is prepared.

A kind of database says which statements prepare, commit and roll back a branch under its `Xid`, which branches it holds in
doubt, and what keeps it from preparing at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy.exc import DBAPIError

from app_db._two_phase.async_exchange import AsyncmyLine, AsyncpgLine, AwaitedLine, AwaitedPostgreSQLLine
from app_db._two_phase.exchange import Line, MySQLLine, PostgreSQLLine
from app_db._two_phase.xids import Xid
from app_db.errors import code_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection


# ---- preparing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InDoubtBranch:
    """A prepared branch that a database holds until somebody settles it. What the database doesn't tell is None."""

    xid: Xid
    prepared_at: float | None = None
    """Seconds since the epoch, by the server's clock."""
    owner: str | None = None
    """The database user who prepared it: nobody but this one and superusers may settle it."""


class Settling(Enum):
    """What came of telling a database how a prepared branch ends."""

    DONE = "done"
    MISSING = "missing"
    """There is no such branch, or no longer: somebody else has settled it."""
    HELD = "held"
    """Somebody else has it in hand: settles it at this moment, or holds the connection that prepared it (MySQL). Try again."""


class Prepares(ABC):
    """How a kind of database prepares branches and ends them. A branch is named by an xid, a list of statements is said in order.

    A branch ends by `commit_unprepared`, by `roll_back_unprepared`, or by `prepare` and then one of `commit_prepared` and
    `roll_back_prepared`.
    """

    _commit: ClassVar[str]
    _roll_back: ClassVar[str]

    def start(self, xid: Xid) -> list[str]:
        """Return what begins a branch, before its first statement. Nothing where any transaction can be prepared."""
        return []

    @abstractmethod
    def prepare(self, xid: Xid) -> list[str]: ...

    @abstractmethod
    def commit_unprepared(self, xid: Xid) -> list[str]: ...

    @abstractmethod
    def roll_back_unprepared(self, xid: Xid) -> list[str]:
        """Return what rolls a branch back; to be said regardless of refusals, and the last answer counts."""

    def commit_prepared(self, xid: Xid) -> list[str]:
        return [self._commit.format(xid)]

    def roll_back_prepared(self, xid: Xid) -> list[str]:
        return [self._roll_back.format(xid)]

    @abstractmethod
    def line(self, driver_connection: Any) -> Line:
        """Return a line on the driver's own connection, while nobody else uses that."""

    @abstractmethod
    def awaited_line(self, adapted_connection: Any) -> AwaitedLine:
        """Return a line on a connection of a driver that is awaited, as SQLAlchemy adapts it."""

    @abstractmethod
    def in_doubt(self, connection: Connection) -> list[InDoubtBranch]:
        """Return the branches of any app_db application that are prepared in the database, or as near as it can tell."""

    def settle(self, connection: Connection, xid: Xid, *, commit: bool) -> Settling:
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
    def _settled_otherwise(self, connection: Connection, xid: Xid, error: DBAPIError) -> Settling | None: ...


class PostgreSQLPrepares(Prepares):
    """PostgreSQL: any transaction can be prepared, and settled from any connection to its database."""

    _commit = "COMMIT PREPARED '{}'"
    _roll_back = "ROLLBACK PREPARED '{}'"

    def prepare(self, xid: Xid) -> list[str]:
        return [f"PREPARE TRANSACTION '{xid}'"]

    def commit_unprepared(self, xid: Xid) -> list[str]:
        return ["COMMIT"]

    def roll_back_unprepared(self, xid: Xid) -> list[str]:
        return ["ROLLBACK"]

    def line(self, driver_connection: Any) -> Line:
        return PostgreSQLLine(driver_connection)

    def awaited_line(self, adapted_connection: Any) -> AwaitedLine:
        driver_connection = adapted_connection.driver_connection
        has_libpq = hasattr(driver_connection, "pgconn")
        return AwaitedPostgreSQLLine(driver_connection) if has_libpq else AsyncpgLine(adapted_connection)

    def in_doubt(self, connection: Connection) -> list[InDoubtBranch]:
        rows = connection.exec_driver_sql(
            "SELECT gid, CAST(extract(epoch FROM prepared) AS double precision), owner FROM pg_prepared_xacts "
            "WHERE database = current_database() ORDER BY prepared"
        )
        return [InDoubtBranch(xid, at, owner) for gid, at, owner in rows if (xid := Xid.parse(gid)) is not None]

    def is_missing(self, error: BaseException) -> bool:
        return code_of(error) == "42704"

    def problem(self, connection: Connection) -> str | None:
        if connection.exec_driver_sql("SHOW max_prepared_transactions").scalar() != "0":
            return None
        return (
            "max_prepared_transactions is 0 on the server, which then prepares nothing. Set it in postgresql.conf to the number "
            "of transactions that may be prepared at once (max_connections is enough), and restart the server."
        )

    def _settled_otherwise(self, connection: Connection, xid: Xid, error: DBAPIError) -> Settling | None:
        if self.is_missing(error):
            return Settling.MISSING
        return Settling.HELD if code_of(error) == "55000" else None


class MySQLPrepares(Prepares):
    """MySQL and MariaDB: only what began with XA START can be prepared, and the server doesn't say in which database it did."""

    _commit = "XA COMMIT '{}'"
    _roll_back = "XA ROLLBACK '{}'"
    _our_format = 1  # what XA START takes where only a name is given
    _unknown_xid = 1397
    _rolled_back = 1402

    def start(self, xid: Xid) -> list[str]:
        return [f"XA START '{xid}'"]

    def prepare(self, xid: Xid) -> list[str]:
        return [f"XA END '{xid}'", f"XA PREPARE '{xid}'"]

    def commit_unprepared(self, xid: Xid) -> list[str]:
        return [f"XA END '{xid}'", f"XA COMMIT '{xid}' ONE PHASE"]

    def roll_back_unprepared(self, xid: Xid) -> list[str]:
        # After a deadlock, XA END is refused and XA ROLLBACK is not.
        return [f"XA END '{xid}'", f"XA ROLLBACK '{xid}'"]

    def line(self, driver_connection: Any) -> Line:
        return MySQLLine(driver_connection)

    def awaited_line(self, adapted_connection: Any) -> AwaitedLine:
        return AsyncmyLine(adapted_connection)

    def in_doubt(self, connection: Connection) -> list[InDoubtBranch]:
        return [InDoubtBranch(xid) for xid in self._listed(connection)]

    def is_missing(self, error: BaseException) -> bool:
        return code_of(error) == self._unknown_xid

    def problem(self, connection: Connection) -> str | None:
        dialect: Any = connection.dialect
        needed = (10, 5) if dialect.is_mariadb else (8, 0)
        if dialect.server_version_info < needed:
            name, least = ("MariaDB", "10.5") if dialect.is_mariadb else ("MySQL", "8.0")
            return f"The server is older than {name} {least}, and forgets what was prepared when its client goes. Upgrade it."
        try:
            self._listed(connection)
        except DBAPIError:
            return "The user may not ask for prepared branches. GRANT XA_RECOVER_ADMIN ON *.* to it."
        if connection.exec_driver_sql("SELECT @@innodb_flush_log_at_trx_commit").scalar() == 0:
            return (
                "innodb_flush_log_at_trx_commit is 0 on the server, which then loses what was prepared last when it crashes. "
                "Set it to 1."
            )
        return None

    def _settled_otherwise(self, connection: Connection, xid: Xid, error: DBAPIError) -> Settling | None:
        if code_of(error) == self._rolled_back:
            # What the server answers to either verdict for a branch that wrote nothing, once the client has gone. It ends by it.
            return Settling.DONE
        if not self.is_missing(error):
            return None
        # A branch is unknown to all others while the connection that prepared it is open.
        return Settling.HELD if xid in self._listed(connection) else Settling.MISSING

    def _listed(self, connection: Connection) -> list[Xid]:
        rows = connection.exec_driver_sql("XA RECOVER").all()
        ours = [data for kind, _, qualifier, data in rows if kind == self._our_format and qualifier == 0]
        return [xid for xid in map(Xid.parse, ours) if xid is not None]


_PREPARES: dict[str, Prepares] = {
    "postgresql+psycopg": PostgreSQLPrepares(),
    "postgresql+asyncpg": PostgreSQLPrepares(),
    "mysql+pymysql": MySQLPrepares(),
    "mysql+asyncmy": MySQLPrepares(),
    "mariadb+pymysql": MySQLPrepares(),
    "mariadb+asyncmy": MySQLPrepares(),
}


def prepares_of(driver_name: str) -> Prepares | None:
    """Return how the databases of a driver (`postgresql+psycopg`) prepare; None where app_db doesn't know how to."""
    return _PREPARES.get(driver_name)
