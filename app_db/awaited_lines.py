"""Lines whose drivers wait by way of the event loop: the same exchange of statements, for branches that coroutines write."""

from __future__ import annotations

import asyncio
import selectors
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy.util.concurrency import greenlet_spawn

from app_db.lines import Answer, Exchange, Line, MySQLLine, Outcome, PostgreSQLLine, exchange

K = TypeVar("K")


class AwaitedLine(ABC):
    """A driver's connection on which a statement is said and its answer awaited."""

    driver_error: type[BaseException]
    """The base of the driver's errors."""

    @abstractmethod
    async def say(self, statement: str) -> Answer:
        """Say a statement and return the answer. Raises the driver's error where none came."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the connection without a word, so that nobody takes a late answer for that to another question."""


class AwaitedPostgreSQLLine(AwaitedLine):
    """psycopg's asynchronous connection: libpq is the same, and the event loop waits for its socket."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._line = PostgreSQLLine(connection)
        self.driver_error = self._line.driver_error

    async def say(self, statement: str) -> Answer:
        self._line.send(statement)
        answer = self._line.collect(ready=False)
        while answer is None:
            await _until_ready(self._line)
            answer = self._line.collect(ready=True)
        return answer

    def abandon(self) -> None:
        self._connection.pgconn.finish()  # close() has to be awaited, though it waits for nothing


class CursorLine(AwaitedLine):
    """A connection as SQLAlchemy adapts it, for drivers that take any statement at any time: asyncpg and asyncmy."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.driver_error = connection.dbapi.Error

    async def say(self, statement: str) -> Answer:
        try:
            await greenlet_spawn(self._execute, statement)
        except self.driver_error as error:
            return Answer(Outcome.UNKNOWN if self._leaves_open(error) else Outcome.REFUSED, error)
        return Answer(Outcome.DONE)

    def _execute(self, statement: str) -> None:
        cursor = self._connection.cursor()
        cursor.execute(statement)
        cursor.close()

    def _leaves_open(self, error: BaseException) -> bool:
        """Return whether an error leaves open what the server has done."""
        sqlstate = getattr(error, "sqlstate", None)
        if sqlstate is not None:  # PostgreSQL's: 08 is a lost connection, 57P a server that is going away
            return str(sqlstate).startswith(("08", "57P"))
        code = error.args[0] if error.args else None
        return not isinstance(code, int) or code in MySQLLine.unclear or 2000 <= code < 3000  # the client's own errors

    def abandon(self) -> None:
        connection = self._connection.driver_connection
        (getattr(connection, "terminate", None) or connection.close)()


async def exchange_awaited(
    lines: Mapping[K, tuple[Line | AwaitedLine, Sequence[str]]], *, regardless: bool = False
) -> Exchange[K]:
    """Do what `exchange` does where some lines have to be awaited; those that block do so in a thread."""
    blocking = {key: (line, statements) for key, (line, statements) in lines.items() if isinstance(line, Line)}
    awaited = {key: (line, statements) for key, (line, statements) in lines.items() if isinstance(line, AwaitedLine)}
    conversations = asyncio.gather(*(_converse(line, statements, regardless) for line, statements in awaited.values()))
    others: Exchange[K] = Exchange({})
    if blocking:
        others = await asyncio.to_thread(exchange, blocking, regardless=regardless)
    answers = dict(zip(awaited, await conversations, strict=True))
    return Exchange({**others.answers, **answers}, others.interruption)


async def _converse(line: AwaitedLine, statements: Sequence[str], regardless: bool) -> Answer:
    answer = Answer(Outcome.DONE)
    for statement in statements:
        try:
            answer = await line.say(statement)
        except (line.driver_error, OSError, asyncio.CancelledError) as error:  # cancelled: the loop is being shut down
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
