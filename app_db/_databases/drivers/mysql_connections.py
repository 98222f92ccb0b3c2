"""Connections of PyMySQL and asyncmy, for `concurrent_statements`."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from sqlalchemy.util.concurrency import greenlet_spawn

from app_db._compat import pymysql
from app_db._compat.clocks import monotonic
from app_db._databases.concurrent_statements import DONE, Answer, AwaitedConnection, NonBlockingConnection, Outcome
from app_db._databases.database import execute

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection


class NonBlockingPyMySQL(NonBlockingConnection):
    """A connection of PyMySQL."""

    unclear = frozenset({1053, 1180, 1317, 1401, 1927})
    """Errors of a server that was shut down or interrupted. They don't say whether the statement was executed."""

    def __init__(self, connection: pymysql.Connection) -> None:
        from pymysql.err import MySQLError

        self.driver_error = MySQLError
        self._connection = connection

    def fileno(self) -> int:
        return pymysql.descriptor_of(self._connection)

    def send(self, statement: str) -> None:
        self.deadline = monotonic() + (pymysql.read_timeout_of(self._connection) or inf)
        pymysql.send(self._connection, statement)

    def collect(self, ready: bool) -> Answer | None:
        # Read only what has arrived: PyMySQL closes the connection if it is interrupted while it waits.
        if not ready and not pymysql.has_decrypted(self._connection):
            return self._too_late() if monotonic() >= self.deadline else None
        try:
            pymysql.receive(self._connection)
        except self.driver_error as error:
            unclear = not self._connection.open or (error.args[:1] and error.args[0] in self.unclear)
            return Answer(Outcome.UNKNOWN if unclear else Outcome.REFUSED, error)
        return DONE

    def _too_late(self) -> Answer:
        from pymysql.constants import CR
        from pymysql.err import OperationalError

        return Answer(Outcome.UNKNOWN, OperationalError(CR.CR_SERVER_LOST, "No answer came within the connection's read_timeout"))

    def abandon(self) -> None:
        pymysql.close_at_once(self._connection)


class AwaitedAsyncmy(AwaitedConnection):
    """A connection of asyncmy, as SQLAlchemy adapts it."""

    def __init__(self, adapted: DBAPIConnection) -> None:
        self._connection = adapted

    async def execute(self, statement: str) -> Answer:
        try:
            await greenlet_spawn(execute, self._connection, statement)
        except self._connection.dbapi.Error as error:
            code = error.args[0] if error.args else None
            # The errors from 2000 to 2999 are the client's own.
            unclear = not isinstance(code, int) or code in NonBlockingPyMySQL.unclear or 2000 <= code < 3000
            return Answer(Outcome.UNKNOWN if unclear else Outcome.REFUSED, error)
        return DONE

    def abandon(self) -> None:
        self._connection.driver_connection.close()
