"""Listen to engines, so that branches can check each statement before it is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.exc import MissingGreenlet

from app_db._databases.database import on_execute
from app_db._databases.time_limits import TIME_LIMIT
from app_db._units.branch_connections import BRANCH

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect, Engine, ExceptionContext
    from sqlalchemy.pool import PoolProxiedConnection

    from app_db.errors import UnitOfWorkTimeout

_watched: WeakSet[Dialect] = WeakSet()

_NOT_AWAITED = (
    "was used outside `await`, usually to read an attribute that is not loaded. Load it with its object, such as by "
    '`select(Order).options(selectinload(Order.lines))`, or before it is read: `await session.refresh(order, ["lines"])`.'
)


def watch(engine: Engine) -> None:
    """Listen to the statements of an engine. Call it at first use: an application may have overridden the engine."""
    if engine.dialect not in _watched:
        _watched.add(engine.dialect)
        _guard_endings(engine.dialect)
        on_execute(engine, _before_execute)
        event.listen(engine, "handle_error", _handle_error)


def _guard_endings(dialect: Dialect) -> None:
    """Let the branch that uses a connection send COMMIT and ROLLBACK, and refuse a COMMIT that the unit does not send."""
    send_commit, send_rollback = dialect.do_commit, dialect.do_rollback

    def do_commit(dbapi_connection: PoolProxiedConnection) -> None:
        try:
            branch = dbapi_connection.info.get(BRANCH)
        except NotImplementedError:  # the dialect initializes a connection that is not the pool's yet
            branch = None
        if branch is None:
            send_commit(dbapi_connection)
        else:
            branch.send_commit(dbapi_connection, send_commit)

    def do_rollback(dbapi_connection: PoolProxiedConnection) -> None:
        try:
            branch = dbapi_connection.info.get(BRANCH)
        except NotImplementedError:
            branch = None
        if branch is None:
            send_rollback(dbapi_connection)
        else:
            branch.send_rollback(dbapi_connection, send_rollback)

    dialect.do_commit, dialect.do_rollback = do_commit, do_rollback  # type: ignore[method-assign]


def _before_execute(cursor: object, statement: str, *parameters_and_context: Any) -> None:
    try:
        branch = parameters_and_context[-1].root_connection.info.get(BRANCH)
    except NotImplementedError:
        return
    if branch is not None:
        branch.before_statement(statement)


def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.invalidated or connection.closed:
        return
    try:
        info = connection.info
    except NotImplementedError:  # the dialect initializes a connection that is not the pool's yet
        return
    branch, limit = info.get(BRANCH), info.get(TIME_LIMIT)
    overtime = None if limit is None else limit.overtime()
    if context.is_disconnect:
        if overtime is not None:
            _explain_cut_off(context, overtime, is_unknown=branch is not None and branch.is_commit_unanswered and branch.wrote)
        return
    if branch is not None:
        if isinstance(context.original_exception, MissingGreenlet):
            shown = context.sqlalchemy_exception or context.original_exception
            shown.add_note(f"app_db: the connection {branch.name!r} {_NOT_AWAITED}")
        if branch.is_interrupted_by(context.original_exception):
            context.is_disconnect = True  # makes SQLAlchemy close the connection
            context.invalidate_pool_on_disconnect = False  # other connections of the pool are intact
            return
        better = branch.statement_failed(context.original_exception)
        if better is not None:
            raise better from context.original_exception
    elif overtime is not None:  # at BEGIN
        raise overtime from context.original_exception


def _explain_cut_off(context: ExceptionContext, overtime: UnitOfWorkTimeout, *, is_unknown: bool) -> None:
    """Raise the error of the time limit that has cut the connection off. After COMMIT was sent, it is a note of the error."""
    context.invalidate_pool_on_disconnect = False
    if not is_unknown:
        raise overtime from context.original_exception
    context.original_exception.add_note(f"app_db: {overtime}")
