"""Lines whose drivers wait by way of the event loop: the same exchange of statements, for branches that coroutines write."""

from __future__ import annotations

import asyncio
import selectors
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.util.concurrency import greenlet_spawn

from app_db._two_phase.exchange import Answer, Exchange, Line, MySQLLine, Outcome, PostgreSQLLine, exchange

K = TypeVar("K")


class AwaitedLine(ABC):
    """A driver's connection on which a statement is said and its answer awaited."""

    @abstractmethod
    async def say(self, statement: str) -> Answer:
        """Say a statement and return the answer. Whatever is raised means that none came."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the connection without a word, so that nobody takes a late answer for that to another question."""


class AwaitedPostgreSQLLine(AwaitedLine):
    """psycopg's asynchronous connection: libpq is the same, and the event loop waits for its socket."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._line = PostgreSQLLine(connection)

    async def say(self, statement: str) -> Answer:
        self._line.send(statement)
        answer = self._line.collect(ready=False)
        while answer is None:
            await _until_ready(self._line)
            answer = self._line.collect(ready=True)
        return answer

    def abandon(self) -> None:
        self._connection.pgconn.finish()  # close() has to be awaited, though it waits for nothing


class AsyncpgLine(AwaitedLine):
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
        """Have a transaction be over that has ended by its xid. The next unit would else begin none, and commit as it goes."""
        if self._connection.is_closed() or not self._connection.is_in_transaction():
            self._adapted._transaction = self._connection._top_xact = None
            if hasattr(self._adapted, "_started"):  # before SQLAlchemy 2.1, which asks for the transaction itself
                self._adapted._started = False

    def _refuse_rollback(self, statement: str, answered: str) -> None:
        if answered == "ROLLBACK" and not statement.startswith("ROLLBACK"):
            from asyncpg import InFailedSQLTransactionError

            raise InFailedSQLTransactionError(f"the server answered {statement} with ROLLBACK")

    def _answer(self, error: Exception) -> Answer:
        sqlstate = getattr(error, "sqlstate", None)
        # 08 is a lost connection, 57P a server that is going away; without any, it is not the server who speaks.
        unclear = sqlstate is None or sqlstate.startswith(("08", "57P"))
        try:
            self._adapted._handle_exception(error)  # raises what the application knows: the adapter's error
        except Exception as adapted:  # noqa: BLE001
            error = adapted
        return Answer(Outcome.UNKNOWN if unclear else Outcome.REFUSED, error)

    def abandon(self) -> None:
        self._connection.terminate()


class AsyncmyLine(AwaitedLine):
    """asyncmy's connection, as SQLAlchemy adapts it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def say(self, statement: str) -> Answer:
        try:
            await greenlet_spawn(self._execute, statement)
        except self._connection.dbapi.Error as error:
            code = error.args[0] if error.args else None
            # From 2000 on they are the client's own.
            unclear = not isinstance(code, int) or code in MySQLLine.unclear or 2000 <= code < 3000
            return Answer(Outcome.UNKNOWN if unclear else Outcome.REFUSED, error)
        return Answer(Outcome.DONE)

    def _execute(self, statement: str) -> None:
        cursor = self._connection.cursor()
        cursor.execute(statement)
        cursor.close()

    def abandon(self) -> None:
        self._connection.driver_connection.close()


async def exchange_awaited(
    lines: Mapping[K, tuple[Line | AwaitedLine, Sequence[str]]], threads: Executor, *, regardless: bool = False
) -> Exchange[K]:
    """Do what `exchange` does where some lines have to be awaited; those that block do so in one of `threads`."""
    blocking = {key: (line, statements) for key, (line, statements) in lines.items() if isinstance(line, Line)}
    awaited = {key: (line, statements) for key, (line, statements) in lines.items() if isinstance(line, AwaitedLine)}
    conversations = asyncio.gather(*(_converse(line, statements, regardless) for line, statements in awaited.values()))
    others: Exchange[K] = Exchange({})
    if blocking:
        loop = asyncio.get_running_loop()
        others = await loop.run_in_executor(threads, partial(exchange, blocking, regardless=regardless))
    answers = dict(zip(awaited, await conversations, strict=True))
    return Exchange({**others.answers, **answers}, others.interruption)


async def _converse(line: AwaitedLine, statements: Sequence[str], regardless: bool) -> Answer:
    answer = Answer(Outcome.DONE)
    for statement in statements:
        try:
            answer = await line.say(statement)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # none may leave the others behind; the loop may end
            answer = Answer(Outcome.UNKNOWN, error)
        if answer.outcome is Outcome.UNKNOWN:
            line.abandon()
            return answer
        if answer.outcome is Outcome.REFUSED and not regardless:
            return answer
    return answer


async def _until_ready(line: PostgreSQLLine) -> None:
    """Wait until the socket has something for the line, or takes something from it."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def note() -> None:
        if not ready.done():
            ready.set_result(None)

    descriptor = line.fileno()
    loop.add_reader(descriptor, note)
    if line.events & selectors.EVENT_WRITE:
        loop.add_writer(descriptor, note)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
        loop.remove_writer(descriptor)
