"""How statements are sent on PyMySQL's and asyncmy's own connections, and answered later."""

from __future__ import annotations

import time
from math import inf
from typing import Any

from sqlalchemy.util.concurrency import greenlet_spawn

from app_db._compat import pymysql
from app_db._databases.exchange import DONE, Answer, AsyncChannel, Channel, Outcome


class PyMySQLChannel(Channel):
    """PyMySQL's connection."""

    unclear = frozenset({1053, 1180, 1317, 1401, 1927})
    """Shut down, failed or interrupted in the middle: with these errors the server leaves open what it has done."""

    def __init__(self, connection: Any) -> None:
        from pymysql.err import MySQLError

        self.driver_error = MySQLError
        self._connection = connection

    def fileno(self) -> int:
        return pymysql.descriptor_of(self._connection)

    def send(self, statement: str) -> None:
        self.deadline = time.monotonic() + (pymysql.read_timeout_of(self._connection) or inf)
        pymysql.send(self._connection, statement)

    def collect(self, ready: bool) -> Answer | None:
        # Only what has arrived is read, because the driver waits in its own way: an interruption would make it hang up.
        if not ready and not pymysql.has_decrypted(self._connection):
            return self._too_late() if time.monotonic() >= self.deadline else None
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


class AsyncmyChannel(AsyncChannel):
    """asyncmy's connection, as SQLAlchemy adapts it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def say(self, statement: str) -> Answer:
        try:
            await greenlet_spawn(self._execute, statement)
        except self._connection.dbapi.Error as error:
            code = error.args[0] if error.args else None
            # From 2000 on they are the client's own.
            unclear = not isinstance(code, int) or code in PyMySQLChannel.unclear or 2000 <= code < 3000
            return Answer(Outcome.UNKNOWN if unclear else Outcome.REFUSED, error)
        return Answer(Outcome.DONE)

    def _execute(self, statement: str) -> None:
        cursor = self._connection.cursor()
        cursor.execute(statement)
        cursor.close()

    def abandon(self) -> None:
        self._connection.driver_connection.close()
