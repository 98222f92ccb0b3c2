"""Connections of psycopg that send BEGIN along with the first statement of a transaction.

psycopg sends BEGIN by itself and waits for the answer. Here BEGIN and the first statement are sent in one pipeline, which saves
a round trip. Only psycopg's public API is used: its autocommit mode is switched on for the pipeline, so that psycopg sends no
BEGIN of its own, and off again when the transaction is over. psycopg refuses to switch it off earlier.

Everything but a statement with parameters, executed by a client-side cursor, begins as psycopg begins it.

Imported where psycopg is used.
"""

from __future__ import annotations

import select
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self, cast

from psycopg import AsyncConnection, AsyncCursor, BaseConnection, Connection, Cursor, Error, IsolationLevel
from psycopg.abc import Params
from psycopg.pq import ConnStatus, PipelineStatus, TransactionStatus

_psycopgs_autocommit = cast("property", BaseConnection.autocommit)


class _BeginsAlong(BaseConnection[object]):
    """What the two kinds of connections share: what they know about their transaction. Nothing here waits for the server."""

    _is_switched_on = False
    """Whether psycopg's autocommit mode is on, or about to be, because we sent BEGIN ourselves."""

    _is_sending = False
    """Whether BEGIN and the first statement are under way, or an exception from a signal handler came while they were."""

    @property
    def autocommit(self) -> bool:
        """Whether each statement is committed by itself, as the application has set it."""
        return self._is_on and not self._is_switched_on

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        _psycopgs_autocommit.__set__(self, value)

    @property
    def _is_on(self) -> bool:
        return super().autocommit

    @property
    def is_left_in_the_middle(self) -> bool:
        """Whether a first statement was interrupted so that its answer may still come. The connection can't be used again."""
        return self._is_sending

    @property
    def is_left_in_autocommit(self) -> bool:
        """Whether the transaction is over, and psycopg's autocommit mode is still on."""
        return self._is_switched_on and self.pgconn.transaction_status == TransactionStatus.IDLE

    def begins_along(self, query: object, parameters: object) -> bool:
        """Return whether a statement is to be sent together with BEGIN."""
        return (
            bool(parameters)
            and self.pgconn.transaction_status == TransactionStatus.IDLE
            and not self._is_on
            # Without a placeholder, psycopg sends the text as it is. It may contain several statements.
            and isinstance(query, str)
            and "%" in query.replace("%%", "")
            and self.pgconn.pipeline_status == PipelineStatus.OFF
            # Prepared statements are switched off for poolers. Those may not support pipelines either.
            and self.prepare_threshold is not None
            and not self._has_news()
        )

    def _has_news(self) -> bool:
        """Return whether the server has said something since the last statement.

        It may be why it closes the connection. psycopg reads it before it sends a pipeline, and takes it for a notice. When it
        sends a statement alone, it raises it as an error that has the SQLSTATE.
        """
        if not hasattr(select, "poll"):  # Windows
            return bool(select.select([self], [], [], 0)[0])
        poll = select.poll()
        poll.register(self, select.POLLIN)
        return bool(poll.poll(0))

    def _text_of_begin(self) -> bytes:
        """Return the BEGIN that psycopg would send."""
        words = ["BEGIN"]
        if self.isolation_level is not None:
            words += ["ISOLATION LEVEL", IsolationLevel(self.isolation_level).name.replace("_", " ")]
        if self.read_only is not None:
            words.append("READ ONLY" if self.read_only else "READ WRITE")
        if self.deferrable is not None:
            words.append("DEFERRABLE" if self.deferrable else "NOT DEFERRABLE")
        return " ".join(words).encode()

    def close_if_left_in_the_middle(self) -> None:
        """Close the connection if it can't be used again. Using it later raises psycopg's error for that."""
        if self._is_sending:
            self.pgconn.finish()
            self._is_sending = False

    def _start_sending(self) -> None:
        # First the marks, and then what they stand for: an exception from a signal handler may come between any two lines.
        self._is_sending = True
        self._is_switched_on = True

    def _end_sending(self) -> None:
        """Close the connection unless every answer was read. The next statement would else get the answer to this one."""
        if self._has_unread_answers():
            self.pgconn.finish()
        self._is_sending = False

    def _has_unread_answers(self) -> bool:
        return self.pgconn.status == ConnStatus.OK and (
            self.pgconn.pipeline_status != PipelineStatus.OFF or self.pgconn.transaction_status == TransactionStatus.ACTIVE
        )

    def _interruption(self, error: BaseException, handled: BaseException | None) -> BaseException:
        """Return what is to be raised where a pipeline ended with `error` while the caller was handling another exception.

        An exception from a signal handler ends the wait for the answers. psycopg then can't leave the pipeline, and raises that
        instead. The first exception is its context.
        """
        interruption: BaseException | None = error
        while self._has_unread_answers() and isinstance(interruption, Error):
            interruption = interruption.__context__
        return error if interruption is None or interruption is handled else interruption


# ---- for threads --------------------------------------------------------------------------------------------------------


class BeginAlongConnection(_BeginsAlong, Connection[object]):
    """A connection of psycopg on which BEGIN goes along with the first statement."""

    def set_autocommit(self, value: bool) -> None:
        super().set_autocommit(value)
        self._is_switched_on = False

    def commit(self) -> None:
        self.close_if_left_in_the_middle()
        try:
            super().commit()
        finally:
            self.settle()

    def rollback(self) -> None:
        self.close_if_left_in_the_middle()
        try:
            super().rollback()
        finally:
            self.settle()

    def settle(self) -> None:
        """Switch psycopg's autocommit mode off again, once the transaction is over."""
        if self.is_left_in_autocommit:
            self.set_autocommit(False)

    @contextmanager
    def beginning(self) -> Generator[None]:
        """Send BEGIN and what is executed in the block at once, and read the answers."""
        self._start_sending()
        super().set_autocommit(True)
        handled = sys.exc_info()[1]
        try:
            with self.pipeline():
                Cursor(self).execute(self._text_of_begin(), prepare=False)
                yield
        except Error as error:
            raise self._interruption(error, handled)  # noqa: B904  # not raised by the error, but before it
        finally:
            self._end_sending()
            self.settle()


class _Cursor(Cursor[object]):
    @property
    def connection(self) -> BeginAlongConnection:
        return cast("BeginAlongConnection", super().connection)

    def execute(self, query: Any, params: Params | None = None, **options: bool | None) -> Self:
        connection = self.connection
        connection.close_if_left_in_the_middle()
        connection.settle()  # the transaction was ended by another kind of cursor
        if connection.begins_along(query, params):
            with connection.beginning():
                return super().execute(query, params, **options)
        try:
            return super().execute(query, params, **options)
        finally:
            connection.settle()  # the statement may be COMMIT or ROLLBACK


def connect(*arguments: Any, **parameters: Any) -> BeginAlongConnection:
    """Connect as `psycopg.connect` does. On the connection, BEGIN goes along with the first statement."""
    connection = BeginAlongConnection.connect(*arguments, **parameters)
    if connection.cursor_factory is Cursor and _is_tcp(connection):
        connection.cursor_factory = _Cursor
    return connection


# ---- for coroutines -----------------------------------------------------------------------------------------------------


class AsyncBeginAlongConnection(_BeginsAlong, AsyncConnection[object]):
    """The same for coroutines."""

    async def set_autocommit(self, value: bool) -> None:
        await super().set_autocommit(value)
        self._is_switched_on = False

    async def commit(self) -> None:
        self.close_if_left_in_the_middle()
        try:
            await super().commit()
        finally:
            await self.settle()

    async def rollback(self) -> None:
        self.close_if_left_in_the_middle()
        try:
            await super().rollback()
        finally:
            await self.settle()

    async def settle(self) -> None:
        if self.is_left_in_autocommit:
            await self.set_autocommit(False)

    @asynccontextmanager
    async def beginning(self) -> AsyncGenerator[None]:
        self._start_sending()
        await super().set_autocommit(True)
        handled = sys.exc_info()[1]
        try:
            async with self.pipeline():
                await AsyncCursor(self).execute(self._text_of_begin(), prepare=False)
                yield
        except Error as error:
            raise self._interruption(error, handled)  # noqa: B904  # not raised by the error, but before it
        finally:
            self._end_sending()
            await self.settle()


class _AsyncCursor(AsyncCursor[object]):
    @property
    def connection(self) -> AsyncBeginAlongConnection:
        return cast("AsyncBeginAlongConnection", super().connection)

    async def execute(self, query: Any, params: Params | None = None, **options: bool | None) -> Self:
        connection = self.connection
        connection.close_if_left_in_the_middle()
        await connection.settle()
        if connection.begins_along(query, params):
            async with connection.beginning():
                return await super().execute(query, params, **options)
        try:
            return await super().execute(query, params, **options)
        finally:
            await connection.settle()


async def connect_async(*arguments: Any, **parameters: Any) -> AsyncBeginAlongConnection:
    """Connect as `psycopg.AsyncConnection.connect` does, in the same way."""
    connection = await AsyncBeginAlongConnection.connect(*arguments, **parameters)
    if connection.cursor_factory is AsyncCursor and _is_tcp(connection):
        connection.cursor_factory = _AsyncCursor
    return connection


def _is_tcp(connection: BaseConnection[object]) -> bool:
    """Return whether a round trip is worth saving: over a Unix socket the pipeline costs about as much as it saves."""
    return not connection.info.host.startswith(("/", "@"))
