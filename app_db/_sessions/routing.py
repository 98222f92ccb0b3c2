"""The session that chooses a database for each statement: by the models that it names, and by whether it writes.

It has no connection of its own. A statement for the connection `writer` is sent on the connection
of the unit's branch of `writer`, and belongs to that branch. The branch may have a session,
`writer_session`, or none. The unit flushes, rolls back and ends this session through an `Overlay`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from sqlalchemy.exc import DBAPIError

from app_db._compat.sqlalchemy import lend
from app_db._databases.statements import Effect
from app_db._sessions.routes import Routes
from app_db._sessions.sessions import UnitSession
from app_db._units.held_units import HeldUnits
from app_db._units.owned_transactions import async_session_refused
from app_db._units.savepoints import require_savepoints
from app_db.errors import AppDbError, InvalidUse, ReplicaUnavailable

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, RootTransaction
    from sqlalchemy.orm import SessionTransaction

    from app_db._units.branches import Branch
    from app_db._units.coordinator import Coordinator
    from app_db._units.overlays import Overlay
    from app_db._units.work import Work
    from app_db.settings import DatabaseSettings


T = TypeVar("T")


class Holders(NamedTuple):
    """Find the unit's sessions and branches by the names of their connections."""

    session_of: Callable[[str], Any]
    """Returns the unit's session, sync or async."""
    holder_of: Callable[[str], UnitSession | Branch]
    """Returns the unit's session, or its branch if no session has been asked for."""
    asynchronous: bool = False


class OverlayConfig:
    """The configuration of sessions that use the connections of a unit's branches."""

    read_only = False
    autonomous = False
    has_branches = False
    may_keep_decisions = False
    held_units: HeldUnits | None = None
    """Looks after the units that ask for such a session, by the HELD_WARNING of all connections."""
    name: str
    routes: Any
    """`Routes`, or an object with the same methods."""

    def __init__(self, coordinator: Coordinator, holders: Holders) -> None:
        self.coordinator = coordinator
        self.asynchronous = holders.asynchronous
        self._holders = holders

    def session_of(self, name: str) -> UnitSession:
        """Return the unit's session of a connection: for an async session, the sync session inside it."""
        session: Any = self._holders.session_of(name)
        found: UnitSession = session.sync_session if self.asynchronous else session
        return found

    def holder_of(self, name: str) -> UnitSession | Branch:
        """Return the unit's session of a connection, or its branch if no session has been asked for."""
        return self.session_of(name) if self.asynchronous else self._holders.holder_of(name)

    def engine_for(self, work: Work) -> None:
        """Return no engine. Raises AwaitRequired for an async session in a unit that was not begun by `async with`."""
        if self.asynchronous and not work.asynchronous:
            raise async_session_refused("The async session", work.transaction)


class RoutingConfig(OverlayConfig):
    """The configuration of a container's routing sessions."""

    name = "session"

    def __init__(
        self,
        coordinator: Coordinator,
        holders: Holders,
        settings: Callable[[], DatabaseSettings],
        names: Callable[[], Sequence[str]],
    ) -> None:
        super().__init__(coordinator, holders)
        self._settings = settings
        self._names = names
        self._routes: tuple[DatabaseSettings, Routes] | None = None
        self.held_units = HeldUnits(seconds) if (seconds := settings().held_warning) is not None else None

    @property
    def routes(self) -> Routes:
        """The routes of statements, by the current settings."""
        settings, known = self._settings(), self._routes
        if known is None or known[0] is not settings:
            known = self._routes = settings, Routes(settings, self._names())
        return known[1]


class _InUse(NamedTuple):
    """A connection that a routing session uses, and the transactions of session and holder in which it may."""

    connection: Connection
    holder: UnitSession | Branch
    its_transaction: SessionTransaction | RootTransaction | None
    own_transaction: SessionTransaction | None

    def stands(self, own_transaction: SessionTransaction | None) -> bool:
        """Return whether it can be used again without asking its holder, because no transaction has changed."""
        return (
            own_transaction is self.own_transaction
            and self.holder.current_transaction is self.its_transaction
            and self.its_transaction is not None
            and self.its_transaction.is_active
        )


class RoutingSession(UnitSession):
    """A session of one unit of work that sends each statement to the connection of the model or table that it names.

    A read goes to a replica of that connection, if there is one and the unit has not written to the
    connection. A statement that names no model goes to `writer`, or to the only connection. Use
    `using` to choose another connection. `container.session()` returns the current unit's:

    >>> from app_db import Container, DatabaseSettings
    >>> from sqlalchemy import text
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> with container.transaction():
    ...     container.session().scalar(text("SELECT 42"))
    42
    """

    config: Any

    def __init__(self, *args: Any, config: OverlayConfig, **arguments: Any) -> None:
        super().__init__(*args, config=cast(Any, config), **arguments)
        self.overlay: Overlay | None = None
        self.last_used = ""
        self._told: str | None = None
        self._is_writing = False
        self._replicas: dict[str, str] = {}
        self._in_use: dict[str, _InUse] = {}

    @contextmanager
    def using(self, name: str) -> Generator[None]:
        """Send statements in the `with` block to the connection `name`.

        This holds for statements that name no model, and for models of the same database. Flushes
        are not affected. Raises InvalidUse if there is no such connection.
        """
        self.config.routes.require(name)
        before, self._told = self._told, name
        try:
            yield
        finally:
            self._told = before

    # -- taking part in the unit

    def take_part(self) -> None:
        """Join the unit of work, which ends the session."""
        if self.overlay is None:
            self.require_unit()
            transaction = self.get_transaction() or super(UnitSession, self).begin()
            self.overlay = cast("Work", self._work).overlay(self, transaction, asynchronous=self.config.asynchronous)

    def begin_on(self, connection: Connection) -> None:
        """Do nothing: the connection belongs to a branch that has begun."""

    def begin(self, nested: bool = False) -> SessionTransaction:
        self.require_unit()
        if nested:
            self.take_part()
        return super().begin(nested)

    def _refuse_savepoint(self) -> None:
        """Do nothing: each connection is asked when a statement goes there."""

    def forget(self) -> None:
        """Forget the unit's connections after it has ended."""
        self.last_used = ""
        self._replicas.clear()
        self._in_use.clear()

    # -- where a statement goes

    def get_bind(self, mapper: object = None, *, clause: object = None, bind: object = None, **arguments: object) -> Connection:
        """Return the connection for a statement. Raises InvalidUse if `bind` is given."""
        self.require_unit()
        if bind is not None:
            raise _no_bind()
        return self._connection_to(self._destination(mapper, clause))

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, object] | None = None) -> Connection:
        """Return the connection for `bind_arguments`, or the default one. Raises InvalidUse if they contain `bind`."""
        self.require_unit()
        if bind_arguments and bind_arguments.get("bind") is not None:
            raise _no_bind()
        if execution_options:
            self.config.session_of(self._destination(**(bind_arguments or {}))).connection(execution_options=execution_options)
        return super().connection(bind_arguments)

    if not TYPE_CHECKING:  # their signatures are SQLAlchemy's

        def execute(self, statement, *args, **arguments):
            return self._told_of(statement, super().execute, *args, **arguments)

        def scalar(self, statement, *args, **arguments):
            return self._told_of(statement, super().scalar, *args, **arguments)

        def scalars(self, statement, *args, **arguments):
            return self._told_of(statement, super().scalars, *args, **arguments)

    def _told_of(
        self,
        statement: object,
        send: Callable[..., T],
        *args: object,
        bind_arguments: Mapping[str, object] | None = None,
        **arguments: object,
    ) -> T:
        """Send a statement, and make SQLAlchemy pass it to `get_bind`. By itself it passes nothing for a UNION, for example."""
        bind_arguments = {"clause": statement, **(bind_arguments or {})}
        if not getattr(statement, "is_dml", False):
            return send(statement, *args, bind_arguments=bind_arguments, **arguments)
        before, self._is_writing = self._is_writing, True  # SQLAlchemy may first select the rows to change
        try:
            return send(statement, *args, bind_arguments=bind_arguments, **arguments)
        finally:
            self._is_writing = before

    def _destination(self, mapper: object = None, clause: object = None, **_: object) -> str:
        routes: Routes = self.config.routes
        named, reads = (None, False) if clause is None else routes.of_statement(clause)
        if named is None and mapper is not None:
            named = routes.of_mapper(mapper)
        if self.is_flushing:
            return named or routes.default
        if self._told is not None and (named is None or routes.owner(self._told) == routes.owner(named)):
            return self._told
        return self._reader_of(routes, named or routes.default, reads and named is not None)

    def _reader_of(self, routes: Routes, name: str, reads: bool) -> str:
        work = cast("Work", self._work)
        lags = reads and routes.may_lag_behind(name) and not self._must_see_writes(work, routes.branch_of(name))
        if not (work.read_only or lags):
            return name
        replica = self._replicas.get(name)
        if replica is None:
            replica = self._replicas[name] = routes.next_replica(name)
        return replica

    def _must_see_writes(self, work: Work, name: str) -> bool:
        if self._is_writing or work.isolation is not None:
            return True
        return any(branch.config.name == name and branch.effect > Effect.READS for branch in work.branches)

    def _connection_to(self, name: str) -> Connection:
        self.last_used = name
        known = self._in_use.get(name)
        if known is not None and known.stands(self.current_transaction):
            return known.connection
        self.take_part()
        holder = self.config.holder_of(name)
        try:
            connection: Connection = holder.begun_connection()
        except (DBAPIError, OSError) as error:  # UnitOfWorkTimeout is an OSError too
            routes: Routes = self.config.routes
            if routes.is_replica(name) and not isinstance(error, AppDbError):
                raise ReplicaUnavailable(name, routes.owner(name), routes.variable(name, "replica_of")) from error
            raise
        self._use(connection, holder)
        self._in_use[name] = _InUse(connection, holder, holder.current_transaction, self.current_transaction)
        return connection

    def _use(self, connection: Connection, holder: UnitSession | Branch) -> None:
        """Register `connection` with SQLAlchemy as one that this session has begun on."""
        branch = holder.branch if isinstance(holder, UnitSession) else holder
        has_savepoints = branch is None or branch.has_savepoints
        transaction = self.current_transaction
        while transaction is not None:
            if (self.overlay and transaction in self.overlay.levels) or (transaction.nested and not has_savepoints):
                lend(connection, transaction)
            elif transaction.nested:
                require_savepoints(holder.config)
            transaction = transaction.parent


def _no_bind() -> InvalidUse:
    # Its transaction would be outside the unit's branches, and not be committed with them.
    return InvalidUse(
        "An engine was given to the session that finds its database", "Use session.using() with a connection's name"
    )
