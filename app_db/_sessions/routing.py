"""One session a unit of work whose statements find their databases: by the models they name, and by whether they write.

It has no connection of its own. A statement that goes to the connection `writer` is sent on that of the unit's `writer_session`,
or of a branch without a session while nothing has asked for one, and so is a part of that branch of the unit; the unit
flushes, rolls back and ends this session around its branches (`Overlay`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import scoped_session, sessionmaker

from app_db._compat.sqlalchemy import lend
from app_db._databases.statements import Effect
from app_db._sessions.routes import Routes
from app_db._sessions.sessions import UnitRegistry, UnitSession
from app_db.errors import AppDbError, AwaitRequired, InvalidUse, ReplicaUnavailable
from app_db.settings import SessionSettings

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import SessionTransaction

    from app_db._units.branches import Branch
    from app_db._units.coordinator import Coordinator
    from app_db._units.overlays import Overlay
    from app_db._units.work import Work
    from app_db.settings import DatabaseSettings


class Holders(NamedTuple):
    """Where the connections of the unit's sessions are found, by name."""

    session_of: Callable[[str], Any]
    """The unit's session, of threads or of coroutines."""
    holder_of: Callable[[str], Any]
    """The session, or a branch while no session has been asked for."""
    asynchronous: bool = False


class OverlayConfig:
    """What sessions have in common that use the connections of others."""

    read_only = False
    autonomous = False
    maker = None
    may_keep_decisions = False
    name: str
    routes: Any
    """Where statements go: `Routes`, or what answers as they do."""

    def __init__(self, coordinator: Coordinator, holders: Holders) -> None:
        self.coordinator = coordinator
        self.asynchronous = holders.asynchronous
        self._holders = holders

    def session_of(self, name: str) -> UnitSession:
        """Return the unit's session of a connection, the one that threads use of a coroutines' one."""
        session: Any = self._holders.session_of(name)
        found: UnitSession = session.sync_session if self.asynchronous else session
        return found

    def holder_of(self, name: str) -> UnitSession | Branch:
        """Return what holds the connection in the unit: its session, or a branch while no session has been asked for."""
        found: UnitSession | Branch = self.session_of(name) if self.asynchronous else self._holders.holder_of(name)
        return found

    def engine_for(self, work: Work) -> None:
        """Return no engine. Coroutines may only use it in a unit that they can end."""
        if self.asynchronous and not work.asynchronous:
            raise AwaitRequired("The async session", "Begin its unit of work with `async with container.transaction():`")


class RoutingConfig(OverlayConfig):
    """What the sessions of one container have in common that find their databases."""

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

    @property
    def routes(self) -> Routes:
        """Where statements go, by the settings as they stand now."""
        settings, known = self._settings(), self._routes
        if known is None or known[0] is not settings:
            known = self._routes = settings, Routes(settings, self._names())
        return known[1]

    def session_settings(self) -> SessionSettings:
        """Return how the sessions behave: as those do of the connection that gets what names no model."""
        settings, routes = self._settings(), self.routes
        return settings.connection(routes.default).session if routes.has_default else SessionSettings()


class _InUse(NamedTuple):
    """A connection that a session uses, as long as neither its own transaction nor that of who holds it is another."""

    connection: Connection
    holder: UnitSession | Branch
    its_transaction: Any
    own_transaction: Any

    def stands(self, own_transaction: Any) -> bool:
        """Return whether it can be used again without asking its holder: a session begins savepoints when it is asked."""
        return (
            own_transaction is self.own_transaction
            and self.holder.current_transaction is self.its_transaction
            and self.its_transaction is not None
            and self.its_transaction.is_active
        )


class RoutingSession(UnitSession):
    """A session that belongs to the unit of work and goes to the connection of the model, table or statement that it is given.

    Reads go to a replica of that connection where there is one, until the unit has written there. What names no model goes to the
    writer. `using` says otherwise.
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
        """Have statements in the block go to the connection `name`: those of its database, and those that name no model.

        What a flush writes goes where it always goes.
        """
        self.config.routes.require(name)
        before, self._told = self._told, name
        try:
            yield
        finally:
            self._told = before

    # -- taking part in the unit

    def take_part(self) -> None:
        """Be a part of what the unit of work commits."""
        if self.overlay is None:
            self.require_unit()
            work: Any = self._work
            transaction = self.get_transaction() or super(UnitSession, self).begin()
            self.overlay = work.overlay(self, transaction, asynchronous=self.config.asynchronous)

    def begin_on(self, connection: Connection) -> None:
        """Begin a savepoint on a connection that is a branch's already."""

    def begin(self, nested: bool = False) -> SessionTransaction:
        self.require_unit()
        if nested:
            self.take_part()
        return super().begin(nested)

    def forget(self) -> None:
        """Let go of the unit's sessions when it has ended."""
        self.last_used = ""
        self._replicas.clear()
        self._in_use.clear()

    # -- where a statement goes

    def get_bind(self, mapper: Any = None, *, clause: Any = None, bind: Any = None, **arguments: Any) -> Any:
        """Return the connection to use: that of the unit's session of the connection to which the statement goes."""
        self.require_unit()
        if bind is not None:
            raise _no_bind()
        return self._connection_to(self._destination(mapper, clause))

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None) -> Connection:
        """Return the connection to which `bind_arguments` lead, or that of statements that name no model."""
        self.require_unit()
        if bind_arguments and bind_arguments.get("bind") is not None:
            raise _no_bind()
        if execution_options:
            self.config.session_of(self._destination(**(bind_arguments or {}))).connection(execution_options=execution_options)
        return super().connection(bind_arguments)

    if not TYPE_CHECKING:  # whose results have the types that SQLAlchemy gives them

        def execute(self, statement: Any, *args: Any, **arguments: Any) -> Any:
            return self._told_of(statement, super().execute, *args, **arguments)

        def scalar(self, statement: Any, *args: Any, **arguments: Any) -> Any:
            return self._told_of(statement, super().scalar, *args, **arguments)

        def scalars(self, statement: Any, *args: Any, **arguments: Any) -> Any:
            return self._told_of(statement, super().scalars, *args, **arguments)

    def _told_of(self, statement: Any, send: Callable[..., Any], *args: Any, bind_arguments: Any = None, **arguments: Any) -> Any:
        """Send a statement, and have SQLAlchemy pass it to `get_bind`. For a UNION, say, SQLAlchemy passes nothing."""
        bind_arguments = {"clause": statement, **(bind_arguments or {})}
        if not getattr(statement, "is_dml", False):
            return send(statement, *args, bind_arguments=bind_arguments, **arguments)
        before, self._is_writing = self._is_writing, True  # SQLAlchemy may look first which rows it is about to change
        try:
            return send(statement, *args, bind_arguments=bind_arguments, **arguments)
        finally:
            self._is_writing = before

    def _destination(self, mapper: Any = None, clause: Any = None, **_: Any) -> str:
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
        work: Any = self._work
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
        except (DBAPIError, OSError) as error:  # a unit's own timeout is an OSError, too
            routes: Routes = self.config.routes
            if routes.is_replica(name) and not isinstance(error, AppDbError):
                raise ReplicaUnavailable(name, routes.owner(name)) from error
            raise
        self._use(connection, holder)
        self._in_use[name] = _InUse(connection, holder, holder.current_transaction, self.current_transaction)
        return connection

    def _use(self, connection: Connection, holder: UnitSession | Branch) -> None:
        """Have SQLAlchemy take `connection` for one that this session has begun on already."""
        branch = holder.branch if isinstance(holder, UnitSession) else holder
        has_savepoints = branch is None or branch.has_savepoints
        transaction = self.current_transaction
        while transaction is not None:
            if (self.overlay and transaction in self.overlay.levels) or (transaction.nested and not has_savepoints):
                lend(connection, transaction)
            transaction = transaction.parent


def _no_bind() -> InvalidUse:
    # It would be begun beside the unit's branches, and nobody would commit it with them.
    return InvalidUse(
        "An engine was given to the session that finds its database", "Use session.using() with a connection's name"
    )


def build_routing_sessionmaker(config: OverlayConfig, settings: SessionSettings) -> sessionmaker[RoutingSession]:
    """Return the maker of the sessions of a config."""
    return sessionmaker(
        class_=RoutingSession, config=config, autoflush=settings.autoflush, expire_on_commit=settings.expire_on_commit
    )


def build_routing_session(config: RoutingConfig, settings: SessionSettings) -> scoped_session[RoutingSession]:
    """Return the proxy that is always the current unit's session."""
    maker = build_routing_sessionmaker(config, settings)
    scoped: scoped_session[RoutingSession] = scoped_session(maker)
    scoped.registry = UnitRegistry(maker)
    return scoped
