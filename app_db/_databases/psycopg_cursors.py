"""Cursors of psycopg that send BEGIN along with the first statement of a transaction.

psycopg sends it alone, and waits for the answer. Together they take one round trip: a unit of work that reads a row, or writes
one, takes two then, and not three.

Imported where psycopg is used, and is of a release whose cursors are put together as it is taken for here.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from psycopg import AsyncCursor, Cursor
from psycopg._preparing import Prepare
from psycopg.generators import fetch_many, send
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

_IDLE = int(TransactionStatus.IDLE)
_SYNCHRONIZED = int(ExecStatus.PIPELINE_SYNC)


class _SendingBeginAlong:
    """What such a cursor does otherwise than psycopg's `Cursor` or `AsyncCursor`."""

    _conn: Any
    _pgconn: PGconn

    def _execute_gen(self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool | None = None) -> Any:
        if params and self._begins():
            return self._begin_and_execute(query, params, prepare, binary)
        psycopgs: Any = super()
        return psycopgs._execute_gen(query, params, prepare=prepare, binary=binary)

    def _begins(self) -> bool:
        """Return whether psycopg would begin a transaction now, and nothing keeps two commands from being sent at once."""
        connection = self._conn
        return (
            self._pgconn.transaction_status == _IDLE
            and not connection._autocommit
            and connection._pipeline is None
            and connection.prepare_threshold is not None  # whoever switches that off has a pooler that follows the protocol
        )

    def _begin_and_execute(self, query: Any, params: Any, prepare: bool | None, binary: bool | None) -> Generator[Any, Any, None]:
        cursor: Any = self
        connection, pgconn = self._conn, self._pgconn
        remembered = None
        pgconn.enter_pipeline_mode()
        try:
            pgconn.send_query_params(connection._get_tx_start_command(), None)
            yield from cursor._start_query(query)  # which doesn't begin: to libpq, something is under way
            converted = cursor._convert_query(query, params)
            if converted.params:
                remembered = self._send(converted, prepare, binary)
        finally:
            answers = yield from _answers(pgconn)
        if remembered is not None:
            connection._prepared.validate(*remembered, answers[-1])
        for results in answers:
            cursor._check_results(results)
        if converted.params:
            cursor._set_results(answers[-1])
        else:  # there may be several statements in it, which can only be sent alone
            yield from cursor._maybe_prepare_gen(converted, prepare=prepare, binary=binary)
        cursor._last_query = query
        yield from connection._prepared.maintain_gen(connection)

    def _send(self, converted: Any, prepare: bool | None, binary: bool | None) -> tuple[Any, Prepare, bytes] | None:
        """Send a statement, prepared or not, and return what psycopg has to check that it remembers of it."""
        cursor: Any = self
        how, name = cursor._get_prepared(converted, prepare)
        if how is Prepare.NO:
            cursor._execute_send(converted, binary=binary)
        else:
            if how is Prepare.SHOULD:
                cursor._send_prepare(name, converted)
            cursor._send_query_prepared(name, converted, binary=binary)
        key = self._conn._prepared.maybe_add_to_cache(converted, how, name)
        return None if key is None else (key, how, name)


def _answers(pgconn: PGconn) -> Generator[Any, Any, list[list[PGresult]]]:
    """Return the results of all that was sent, a list for each, and leave the pipeline."""
    pgconn.pipeline_sync()
    yield from send(pgconn)
    answers: list[list[PGresult]] = []
    while (results := (yield from fetch_many(pgconn))) and results[0].status != _SYNCHRONIZED:
        answers.append(results)
    pgconn.exit_pipeline_mode()
    return answers


class _Cursor(_SendingBeginAlong, Cursor[Any]):
    pass


class _AsyncCursor(_SendingBeginAlong, AsyncCursor[Any]):
    pass


_INSTEAD: dict[Any, Any] = {Cursor: _Cursor, AsyncCursor: _AsyncCursor}


def send_begin_along(connection: Any) -> None:
    """Have the cursors of a connection do so, unless they are to be of another kind than psycopg's usual one."""
    connection.cursor_factory = _INSTEAD.get(connection.cursor_factory, connection.cursor_factory)
