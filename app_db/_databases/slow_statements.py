"""Log statements that take long, with the line of the application that sent them."""

from __future__ import annotations

import logging
from math import inf
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from app_db._compat.clocks import monotonic
from app_db._databases.holders import CHECKOUT, LineAbove

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine, ExceptionContext

log = logging.getLogger("app_db")

_line_above = LineAbove()

_BEGAN = "app_db_statement_began"
"""Key in a connection's info. The value is when its statement was sent, by `monotonic()`."""

LONGEST_TEXT = 500
"""Characters of a statement that are logged. Parameters never are: they may be secret."""


def log_slow_statements(engine: Engine, name: str, seconds: float) -> None:
    """Log a warning of each statement that takes longer, also if it fails."""

    @event.listens_for(engine, "before_cursor_execute")
    def note_beginning(connection: Connection, *_: Any) -> None:
        _info(connection)[_BEGAN] = monotonic()

    @event.listens_for(engine, "after_cursor_execute")
    def note_end(connection: Connection, cursor: object, statement: str, *_: Any) -> None:
        tell(connection, statement)

    @event.listens_for(engine, "handle_error")
    def note_failure(context: ExceptionContext) -> None:
        connection = context.connection
        if connection is not None and context.statement is not None and not (connection.closed or connection.invalidated):
            tell(connection, context.statement, ", and failed")

    def tell(connection: Connection, statement: str, then: str = "") -> None:
        info = _info(connection)
        took = monotonic() - info.pop(_BEGAN, inf)
        if took < seconds:
            return
        checkout, line = info.get(CHECKOUT), _line_above()
        log.warning(
            "Slow statement on %r: %.3f s%s%s: %s",
            name,
            took,
            then,
            "" if line is None else f", sent at {line}",
            " ".join(statement.split())[:LONGEST_TEXT],
            extra={"connection": name, "unit": None if checkout is None else checkout.unit_number},
        )


def _info(connection: Connection) -> dict[Any, Any]:
    try:
        return connection.info
    except NotImplementedError:  # the dialect initializes a connection that is not the pool's yet
        return {}
