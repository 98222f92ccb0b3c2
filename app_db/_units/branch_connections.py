"""The connection of a branch: it checks statements, and ends its transaction in the database."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

from app_db._databases.interruptions import interrupted
from app_db._databases.prepare_verbs import PrepareVerbs, Settling
from app_db._databases.time_limits import TIME_LIMIT
from app_db._units.branch_statements import BranchStatements
from app_db.errors import InvalidUse, SessionIsManaged, UnitOfWorkEnded

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.pool import PoolProxiedConnection


log = logging.getLogger("app_db")

BRANCH = "app_db_branch"
"""Key in a DBAPI connection's info. The value is the branch that uses the connection."""


class Stage(Enum):
    """The state of a branch in its database."""

    ACTIVE = "active"
    """Its transaction is open."""
    PREPARED = "prepared"
    """PREPARE was sent, and may have been executed. Only its xid can end it."""
    ENDED = "ended"
    """Its xid has ended it, or recovery will. Nothing more may be sent."""


class BranchConnection(BranchStatements):
    """The connection of one branch of a unit of work, and how its transaction ends in the database."""

    committed = False
    """Whether the database has confirmed COMMIT."""
    is_commit_unanswered = False
    """Whether COMMIT was sent, and the answer is not known."""
    stage = Stage.ACTIVE
    _xid: str | None = None
    _begun_by_xid = False
    _usual_limits: Mapping[Connection, float] = MappingProxyType({})

    @property
    def can_prepare(self) -> bool:
        """Whether it can be prepared for two-phase commit."""
        return self.config.two_phase and self.config.verbs is not None and len(self._connections) == 1

    @property
    def verbs(self) -> PrepareVerbs:
        """The database's statements for two-phase commit. Raises InvalidUse if it has none."""
        if self.config.verbs is None:
            raise InvalidUse(f"The connection {self.name!r} can't be prepared", "Set its two_phase to false")
        return self.config.verbs

    @property
    def xid(self) -> str:
        if self._xid is None:
            self._xid = str(self._work.xid_for(self))
        return self._xid

    @property
    def connections(self) -> Iterable[Connection]:
        """All connections that its session has begun on."""
        return self._connections

    @property
    def driver_connection(self) -> object:
        return self.connection.connection.driver_connection

    def uses(self, connection: Connection) -> None:
        """Note that the session has begun on `connection`."""
        if connection in self._connections:
            return
        if self._rolled_back_by is not None:
            connection.close()  # the branch was rolled back meanwhile
            raise UnitOfWorkEnded(f"The {self.name!r} session")
        if self._connections and connection.dialect is not self.connection.dialect:
            raise InvalidUse(
                f"The {self.name!r} session began on a second engine, whose work might commit alone",
                "Use one engine for each session, and declare a connection for the other database",
            )
        info = self._connections[connection] = connection.info
        if self.config.two_phase and not self.read_only and self._work.rehearsal is None:
            self._begin_by_xid(connection)
        if self.config.has_own_engine:
            self._require_transaction(connection)
        info[BRANCH] = self
        if not self.config.database.asks_beginning or self._may_have_to_tell():
            self._beginning = self.config.database.note_beginning(connection)
        if self._work.timed:
            self.apply_time_limit()

    def _require_transaction(self, connection: Connection) -> None:
        """Refuse an engine of the application's own that commits each statement. One that begins late begins now."""
        database = self.config.database
        if self.read_only or self.config.autonomous or self._work.rehearsal is not None:
            return
        if database.is_in_autocommit(connection):
            raise InvalidUse(
                f"The engine of {self.name!r} is in autocommit, so that a unit of work there could not be rolled back",
                "Create it without isolation_level='AUTOCOMMIT', or set TRANSACTIONAL=false",
            )
        database.begin_now(connection)

    def _may_have_to_tell(self) -> bool:
        """Return whether the unit may ask at its end if this branch wrote."""
        return not (self.read_only or self.config.autonomous) and self._work.may_write_to_several()

    def _begin_by_xid(self, connection: Connection) -> None:
        """Begin by xid, if the database can't prepare other transactions. Call it before `info[BRANCH]` is set."""
        verbs = self.config.verbs
        if verbs is None or not verbs.begins_by_xid:
            return  # making an xid asks the decision log
        for statement in verbs.start(self.xid):
            connection.exec_driver_sql(statement)
        self._begun_by_xid = True

    def apply_time_limit(self) -> None:
        """Make the server stop statements at the unit's deadline. A shorter limit of the connection stays."""
        database, limit = self.config.database, self._work.time_limit
        if limit is None:
            return
        for connection, info in self._connections.items():
            if connection not in self._usual_limits:
                dbapi_connection = connection.connection.dbapi_connection
                if self._work.rehearsal is None and database.waits_for_answers and dbapi_connection is not None:
                    info[TIME_LIMIT] = limit
                    limit.cover(database, dbapi_connection)
                self._usual_limits = {**self._usual_limits, connection: database.statement_limit(connection)}
            database.limit_statements(connection, min(limit.remaining(), self._usual_limits[connection]))

    def is_interrupted_by(self, error: BaseException) -> bool:
        """Return whether an exception from outside interrupted the driver, so that the connection must be closed."""
        if not self.config.database.waits_for_answers or self._work.rehearsal is not None:
            return False
        return any(
            not (connection.closed or connection.invalidated) and interrupted(error, connection.connection.driver_connection)
            for connection in self._connections
        )

    def better_error(self, statement: str, error: BaseException) -> BaseException:
        """Return a driver's error as SQLAlchemy would raise it. Close the connection if it was lost."""
        connection, dialect = self.connection, self.connection.dialect
        if connection.closed or connection.invalidated or not isinstance(error, dialect.loaded_dbapi.Error):
            return error
        lost = dialect.is_disconnect(error, connection.connection.dbapi_connection, None)
        wrapped = DBAPIError.instance(
            statement, None, error, dialect.loaded_dbapi.Error, connection_invalidated=lost, dialect=dialect
        )
        if lost and self.stage is not Stage.PREPARED:  # a prepared branch is told on another connection
            self.abandon()
        return wrapped

    def send_commit(self, dbapi_connection: PoolProxiedConnection, plainly: Callable[[PoolProxiedConnection], None]) -> None:
        """Send COMMIT in the form in which the transaction began, or nothing if its xid has ended it."""
        if not self._work.finishing:
            raise SessionIsManaged(self.name, "connection().commit")
        if self.stage is Stage.ACTIVE:
            self.is_commit_unanswered = True
            if self._begun_by_xid:
                say(dbapi_connection, self.verbs.commit_unprepared(self.xid))
            else:
                plainly(dbapi_connection)
        self.committed = True  # a later failure does not undo it
        self.is_commit_unanswered = False

    def send_rollback(self, dbapi_connection: PoolProxiedConnection, plainly: Callable[[PoolProxiedConnection], None]) -> None:
        """Send ROLLBACK in the form in which the transaction began, or nothing if its xid ends it."""
        self.was_rolled_back = not self._work.finishing
        if not self._begun_by_xid:
            plainly(dbapi_connection)
        elif self.stage is Stage.ACTIVE:
            say(dbapi_connection, self.verbs.roll_back_unprepared(self.xid), regardless=True)

    def has_lost_transaction_on(self, connection: Connection) -> bool:
        """Return whether the database would roll back on COMMIT."""
        if self._failures:
            return self.config.database.has_lost_transaction(connection, self._failures)
        if not (self.wrote and self.config.database.has_ended_transaction(connection)):
            return False
        dbapi_connection = connection.connection.dbapi_connection
        self.has_ended_transaction = dbapi_connection is not None and not self.config.database.may_be_in_transaction(
            dbapi_connection
        )
        return True

    def abandon(self) -> None:
        """Close the connection. Recovery settles what it may have prepared."""
        self.stage = Stage.ENDED
        connection = self.connection
        if not (connection.closed or connection.invalidated):
            connection.invalidate()

    def settle_elsewhere(self, *, commit: bool) -> bool:
        """End a branch that did not answer by its xid, on another connection. Return whether that succeeded."""
        try:
            with self.connection.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                return self.verbs.settle(connection, self.xid, commit=commit) is not Settling.HELD
        except Exception:
            log.warning("%r could not be reached a second time, and is left to recovery", self.name, exc_info=True)
            return False

    def close_if_interrupted(self, error: BaseException) -> None:
        """Close the connection if the exception that ends the unit interrupted the driver, for example in a raw cursor."""
        if self.is_interrupted_by(error):
            self._close_connections()

    def _close_connections(self) -> None:
        self.stage = Stage.ENDED
        for connection in self._connections:
            with suppress(Exception):
                if not (connection.closed or connection.invalidated):
                    connection.invalidate()


def say(dbapi_connection: PoolProxiedConnection, statements: Sequence[str], *, regardless: bool = False) -> None:
    """Execute statements without SQLAlchemy, which would begin and end transactions by itself.

    With `regardless`, only an error of the last statement is raised.
    """
    cursor = dbapi_connection.cursor()
    for statement in statements[:-1]:
        try:
            cursor.execute(statement)
        except Exception:
            if not regardless:
                raise
            log.debug("%s was refused", statement, exc_info=True)
    cursor.execute(statements[-1])
    cursor.close()
