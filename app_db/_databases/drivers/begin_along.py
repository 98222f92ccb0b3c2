"""Connections of psycopg that send BEGIN together with the first statement of a transaction.

psycopg sends BEGIN alone and waits for the answer. Here BEGIN and the first statement are sent in one pipeline, which saves a
round trip. Only psycopg's public API is used: its autocommit mode is switched on for the pipeline, so that psycopg sends no
BEGIN of its own, and off again when the transaction is over. psycopg refuses to switch it off earlier.

Only a statement with parameters, executed by a client-side cursor, is sent so. All others begin as in psycopg.

This module imports psycopg, so import it only where psycopg is used.
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
    """What sync and async connections share: the state of the transaction. Nothing here waits for the server."""

    _is_switched_on = False
    """Whether psycopg's autocommit mode is on, or about to be, because this module sends BEGIN."""

    is_left_in_the_middle = False
    """Whether BEGIN and the first statement are being sent. If it is true at any other time, an exception from a signal handler
    interrupted that. Their answers may still come then, and the connection can't be used again."""

    @property
    def autocommit(self) -> bool:
        """Whether each statement commits by itself, as the application has set it."""
        return super().autocommit and not self._is_switched_on

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        _psycopgs_autocommit.__set__(self, value)

    @property
    def is_left_in_autocommit(self) -> bool:
        """Whether psycopg's autocommit mode is still on although the transaction has ended."""
        return self._is_switched_on and self.pgconn.transaction_status == TransactionStatus.IDLE

    def begins_along(self, query: object, parameters: object) -> bool:
        """Return whether a statement is to be sent together with BEGIN."""
        return (
            bool(parameters)
            and self.pgconn.transaction_status == TransactionStatus.IDLE
            and not super().autocommit
            # Without a placeholder, psycopg sends the text as it is. It may contain several statements.
            and isinstance(query, str)
            and "%" in query.replace("%%", "")
            and self.pgconn.pipeline_status == PipelineStatus.OFF
            # Prepared statements are switched off for poolers. Those may not support pipelines either.
            and self.prepare_threshold is not None
            and not self._has_news()
        )

    def _has_news(self) -> bool:
        """Return whether the server has sent something since the last statement, such as why it closes the connection.

        Before a pipeline, psycopg reads such an error as a notice. Before a single statement, it raises the error with SQLSTATE.
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
        if self.is_left_in_the_middle:
            self.pgconn.finish()
            self.is_left_in_the_middle = False

    def _start_sending(self) -> None:
        # Set these before sending: an exception from a signal handler may come between any two lines.
        self.is_left_in_the_middle = True
        self._is_switched_on = True

    def _end_sending(self) -> None:
        """Close the connection unless every answer was read. Otherwise the next statement would get the answer to this one."""
        if self._has_unread_answers():
            self.pgconn.finish()
        self.is_left_in_the_middle = False

    def _has_unread_answers(self) -> bool:
        return self.pgconn.status == ConnStatus.OK and (
            self.pgconn.pipeline_status != PipelineStatus.OFF or self.pgconn.transaction_status == TransactionStatus.ACTIVE
        )

    def _interruption(self, error: BaseException, handled: BaseException | None) -> BaseException:
        """Return the exception to raise after a pipeline ended with `error`. `handled` is what the caller was handling before.

        If an exception from a signal handler ends the wait for the answers, psycopg can't leave the pipeline and raises an error
        about that. The exception from the signal handler is then the context of that error.
        """
        interruption: BaseException | None = error
        while self._has_unread_answers() and isinstance(interruption, Error):
            interruption = interruption.__context__
        return error if interruption is None or interruption is handled else interruption


# ---- for threads --------------------------------------------------------------------------------------------------------


class BeginAlongConnection(_BeginsAlong, Connection[object]):
    """A connection of psycopg that sends BEGIN together with the first statement."""

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
        """Send BEGIN and the statement of the block in one pipeline, and read the answers."""
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
        connection.settle()  # another kind of cursor may have ended the transaction
        if connection.begins_along(query, params):
            with connection.beginning():
                return super().execute(query, params, **options)
        try:
            return super().execute(query, params, **options)
        finally:
            connection.settle()  # the statement may be COMMIT or ROLLBACK


def connect(*arguments: str, **parameters: Any) -> BeginAlongConnection:
    """Connect as `psycopg.connect` does. The connection sends BEGIN together with the first statement."""
    connection = BeginAlongConnection.connect(*arguments, **parameters)
    if connection.cursor_factory is Cursor and _is_tcp(connection):
        connection.cursor_factory = _Cursor
    return connection


# ---- for coroutines -----------------------------------------------------------------------------------------------------


class AsyncBeginAlongConnection(_BeginsAlong, AsyncConnection[object]):
    """An async connection of psycopg that sends BEGIN together with the first statement."""

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


async def connect_async(*arguments: str, **parameters: Any) -> AsyncBeginAlongConnection:
    """Connect as `psycopg.AsyncConnection.connect` does. The connection sends BEGIN together with the first statement."""
    connection = await AsyncBeginAlongConnection.connect(*arguments, **parameters)
    if connection.cursor_factory is AsyncCursor and _is_tcp(connection):
        connection.cursor_factory = _AsyncCursor
    return connection


def _is_tcp(connection: BaseConnection[object]) -> bool:
    """Return whether a connection is over TCP. Over a Unix socket, a pipeline costs about as much as the round trip it saves."""
    return not connection.info.host.startswith(("/", "@"))
