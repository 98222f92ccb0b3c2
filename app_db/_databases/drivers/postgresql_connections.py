"""Connections of psycopg and asyncpg, for `concurrent_statements`."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING

from app_db._compat.sqlalchemy_asyncpg import adapted_error, note_ended_transaction
from app_db._databases.concurrent_statements import DONE, Answer, AwaitedConnection, NonBlockingConnection, Outcome

if TYPE_CHECKING:
    import asyncpg
    import psycopg
    from psycopg.pq.abc import PGresult
    from sqlalchemy.engine.interfaces import DBAPIConnection


class NonBlockingPsycopg(NonBlockingConnection):
    """A connection of psycopg, used through libpq.

    A cursor of psycopg would begin a transaction. psycopg's two-phase methods hide why PREPARE failed. Its commit() and
    rollback() do nothing if libpq knows that the transaction has ended.
    """

    _done = (1, 2)  # libpq's PGRES_COMMAND_OK and PGRES_TUPLES_OK

    def __init__(self, connection: psycopg.BaseConnection[object]) -> None:
        import psycopg

        self.driver_error = psycopg.Error
        self._connection = connection
        self._libpq = connection.pgconn
        self._statement = ""
        self._result: PGresult | None = None

    def fileno(self) -> int:
        return self._libpq.socket

    def send(self, statement: str) -> None:
        self._statement = statement
        self._result = None
        self._libpq.send_query(statement.encode())

    def collect(self, ready: bool) -> Answer | None:
        if self._libpq.flush():
            self.events = selectors.EVENT_READ | selectors.EVENT_WRITE
        else:
            self.events = selectors.EVENT_READ
        try:
            if ready:
                self._libpq.consume_input()
                self._hand_on_notifications()
            while not self._libpq.is_busy():
                result = self._libpq.get_result()
                if result is None:
                    return self._answer()
                self._result = result
        except self.driver_error:
            if self._result is None:
                raise
            return self._answer()
        return None

    def _hand_on_notifications(self) -> None:
        # psycopg does so wherever it reads. A notification that stays in libpq is seen late, or never by notifies().
        while notification := self._libpq.notifies():
            if self._libpq.notify_handler is not None:
                self._libpq.notify_handler(notification)

    def _answer(self) -> Answer:
        result, self._result = self._result, None  # or an interruption might leave it as the answer to the next statement
        if result is None or result.status not in self._done:
            return self._bad_answer(result)
        if result.command_status == b"ROLLBACK" and not self._statement.startswith("ROLLBACK"):
            from psycopg.errors import InFailedSqlTransaction

            # The server answers COMMIT and PREPARE TRANSACTION so after a failed statement, or if no transaction has begun.
            return Answer(Outcome.REFUSED, InFailedSqlTransaction(f"the server answered {self._statement} with ROLLBACK"))
        return DONE

    def _bad_answer(self, result: PGresult | None) -> Answer:
        from psycopg import errors
        from psycopg.pq import DiagnosticField

        if result is None:
            return Answer(Outcome.UNKNOWN, errors.OperationalError("the answer got lost"))
        # A server that is being shut down answers FATAL, and may have executed the statement.
        refused = result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED) == b"ERROR"
        error = errors.error_from_result(result, encoding=self._connection.info.encoding)
        return Answer(Outcome.REFUSED if refused else Outcome.UNKNOWN, error)

    def abandon(self) -> None:
        self._libpq.finish()


class AwaitedPsycopg(AwaitedConnection):
    """An async connection of psycopg. libpq is the same; the event loop waits for its socket."""

    def __init__(self, connection: psycopg.AsyncConnection[object]) -> None:
        self._non_blocking = NonBlockingPsycopg(connection)

    async def execute(self, statement: str) -> Answer:
        self._non_blocking.send(statement)
        answer = self._non_blocking.collect(ready=False)
        while answer is None:
            await _until_ready(self._non_blocking)
            answer = self._non_blocking.collect(ready=True)
        return answer

    def abandon(self) -> None:
        self._non_blocking.abandon()


class AwaitedAsyncpg(AwaitedConnection):
    """A connection of asyncpg, as SQLAlchemy adapts it.

    Statements are sent below the adapter, which would prepare each statement with a round trip of its own, and keep it.
    """

    def __init__(self, adapted: DBAPIConnection) -> None:
        self._adapted = adapted
        self._connection: asyncpg.Connection = adapted.driver_connection

    async def execute(self, statement: str) -> Answer:
        try:
            answered = await self._connection.execute(statement)
            self._notice_end()
            self._refuse_rollback(statement, answered)
        except Exception as error:  # noqa: BLE001  # of the driver or the socket: each is an answer
            self._notice_end()
            return self._answer(error)
        return DONE

    def _notice_end(self) -> None:
        if self._connection.is_closed() or not self._connection.is_in_transaction():
            note_ended_transaction(self._adapted)

    def _refuse_rollback(self, statement: str, answered: str) -> None:
        if answered == "ROLLBACK" and not statement.startswith("ROLLBACK"):
            from asyncpg import InFailedSQLTransactionError

            raise InFailedSQLTransactionError(f"the server answered {statement} with ROLLBACK")

    def _answer(self, error: Exception) -> Answer:
        sqlstate = getattr(error, "sqlstate", None)
        # 08 is a lost connection, 57P a server that is shut down. An error without a SQLSTATE is not the server's.
        unclear = sqlstate is None or sqlstate.startswith(("08", "57P"))
        return Answer(Outcome.UNKNOWN if unclear else Outcome.REFUSED, adapted_error(self._adapted, error))

    def abandon(self) -> None:
        self._connection.terminate()


async def _until_ready(connection: NonBlockingPsycopg) -> None:
    """Wait until the socket is ready to be read or, if there is something to send, to be written."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def note() -> None:
        if not ready.done():
            ready.set_result(None)

    descriptor = connection.fileno()
    loop.add_reader(descriptor, note)
    if connection.events & selectors.EVENT_WRITE:
        loop.add_writer(descriptor, note)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
        loop.remove_writer(descriptor)
