"""How statements are sent on psycopg's and asyncpg's own connections, and answered later."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any

from app_db._compat.sqlalchemy_asyncpg import adapted_error, note_ended_transaction
from app_db._databases.exchange import DONE, Answer, AsyncChannel, Channel, Outcome

if TYPE_CHECKING:
    import psycopg
    from psycopg.pq.abc import PGresult


class PsycopgChannel(Channel):
    """psycopg's connection, spoken to by way of libpq.

    psycopg's cursor would begin a transaction, and its two-phase methods replace the reason why PREPARE failed by their own
    confusion. Its commit() and rollback() do nothing where libpq knows that the transaction has ended.
    """

    _done = (1, 2)  # libpq's PGRES_COMMAND_OK and PGRES_TUPLES_OK

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
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
        # psycopg does so wherever it reads; what stays with libpq is seen late or, by Connection.notifies(), never.
        while notification := self._libpq.notifies():
            if self._libpq.notify_handler is not None:
                self._libpq.notify_handler(notification)

    def _answer(self) -> Answer:
        result, self._result = self._result, None  # no interruption shall take it for the answer to the next statement
        if result is None or result.status not in self._done:
            return self._bad_answer(result)
        if result.command_status == b"ROLLBACK" and not self._statement.startswith("ROLLBACK"):
            from psycopg.errors import InFailedSqlTransaction

            # How the server answers COMMIT and PREPARE TRANSACTION where a statement had failed, or nothing had begun.
            return Answer(Outcome.REFUSED, InFailedSqlTransaction(f"the server answered {self._statement} with ROLLBACK"))
        return DONE

    def _bad_answer(self, result: PGresult | None) -> Answer:
        from psycopg import errors
        from psycopg.pq import DiagnosticField

        if result is None:
            return Answer(Outcome.UNKNOWN, errors.OperationalError("the answer got lost"))
        # Whoever is being shut down says FATAL, and may have done by then what was asked.
        refused = result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED) == b"ERROR"
        error = errors.error_from_result(result, encoding=self._connection.info.encoding)
        return Answer(Outcome.REFUSED if refused else Outcome.UNKNOWN, error)

    def abandon(self) -> None:
        self._connection.close()


class AsyncPsycopgChannel(AsyncChannel):
    """psycopg's asynchronous connection: libpq is the same, and the event loop waits for its socket."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._channel = PsycopgChannel(connection)

    async def say(self, statement: str) -> Answer:
        self._channel.send(statement)
        answer = self._channel.collect(ready=False)
        while answer is None:
            await _until_ready(self._channel)
            answer = self._channel.collect(ready=True)
        return answer

    def abandon(self) -> None:
        self._connection.pgconn.finish()  # close() has to be awaited, though it waits for nothing


class AsyncpgChannel(AsyncChannel):
    """asyncpg's connection, as SQLAlchemy adapts it.

    It is spoken to below the adapter, which would take two round trips for a statement, and keep it to be said again.
    """

    def __init__(self, connection: Any) -> None:
        self._adapted = connection
        self._connection = connection.driver_connection

    async def say(self, statement: str) -> Answer:
        try:
            answered = await self._connection.execute(statement)
            self._notice_end()
            self._refuse_rollback(statement, answered)
        except Exception as error:  # noqa: BLE001  # the driver's, the socket's: whatever it is, it is the answer
            self._notice_end()
            return self._answer(error)
        return Answer(Outcome.DONE)

    def _notice_end(self) -> None:
        if self._connection.is_closed() or not self._connection.is_in_transaction():
            note_ended_transaction(self._adapted)

    def _refuse_rollback(self, statement: str, answered: str) -> None:
        if answered == "ROLLBACK" and not statement.startswith("ROLLBACK"):
            from asyncpg import InFailedSQLTransactionError

            raise InFailedSQLTransactionError(f"the server answered {statement} with ROLLBACK")

    def _answer(self, error: Exception) -> Answer:
        sqlstate = getattr(error, "sqlstate", None)
        # 08 is a lost connection, 57P a server that is going away; without any, it is not the server who speaks.
        unclear = sqlstate is None or sqlstate.startswith(("08", "57P"))
        return Answer(Outcome.UNKNOWN if unclear else Outcome.REFUSED, adapted_error(self._adapted, error))

    def abandon(self) -> None:
        self._connection.terminate()


async def _until_ready(channel: PsycopgChannel) -> None:
    """Wait until the socket has something for the line, or takes something from it."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def note() -> None:
        if not ready.done():
            ready.set_result(None)

    descriptor = channel.fileno()
    loop.add_reader(descriptor, note)
    if channel.events & selectors.EVENT_WRITE:
        loop.add_writer(descriptor, note)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
        loop.remove_writer(descriptor)
