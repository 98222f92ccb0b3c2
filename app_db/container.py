"""Declarative wiring, and nothing else: the one module that knows all the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from dependency_injector import containers, providers
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from app_db._databases.disposal import disposed
from app_db._databases.engines import build_async_engine, build_engine
from app_db._databases.providers import AsyncEngineProvider, EngineProvider, Lasting
from app_db._sessions.borrowing import BorrowingHome
from app_db._sessions.routing import Holders, RoutingHome, RoutingSession, build_routing_session, build_routing_sessionmaker
from app_db._sessions.sessions import SessionHome, UnitRegistry, build_scoped_session, build_sessionmaker
from app_db._two_phase.checks import check
from app_db._two_phase.decision_places import DecisionPlaces, build_decision_places
from app_db._two_phase.recovery import Recovery, build_recovery
from app_db._units.coordinator import build_coordinator
from app_db._units.manager import ContextTransactionManager
from app_db._units.transactions import Transaction, build_transaction, build_unit
from app_db._units.unit_of_work import UnitOfWork
from app_db.errors import InvalidUse, UnknownConnection, UnknownModel
from app_db.models.bases import connection_of, described
from app_db.models.bootstrap import async_bootstrap, bootstrap
from app_db.models.reflection import ReflectedSchema, connections_in, reflect, reflect_schema
from app_db.models.schema import create_all, drop_all
from app_db.settings import DatabaseSettings, SessionSettings
from app_db.settings.urls import require_greenlet

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker

    from app_db._sessions.async_routing import AsyncRoutingSession

    DeclarativeMeta = type
else:
    from dependency_injector.containers import DeclarativeContainerMetaClass as DeclarativeMeta

KINDS = (
    "engine",
    "sessionmaker",
    "scoped_session",
    "session",
    "async_engine",
    "async_sessionmaker",
    "async_scoped_session",
    "async_session",
)
"""What every connection provides: `NAME.KIND`, and `NAME_KIND` beside it."""

_PLUMBING = frozenset(
    {"__self__", "async_routing", "coordinator", "database_container", "decision_places", "lifecycle", "name", "routing"}
)
"""Providers that no error suggests to anybody."""


# ---- providers ------------------------------------------------------------------------------------------------------


class Lifecycle(providers.Resource[None]):
    """What `init_resources()` and `shutdown_resources()` do, of a database container or of one around it.

    The first checks that two-phase commit can work, where a connection wants it, and recovers and reflects models, where the
    settings say so; it makes no engine otherwise. The second disposes all engines.
    """

    @property
    def initialized(self) -> bool:
        return self.args[0]().decision_places().in_use or any(engine.is_built for engine in self._engines())

    def init(self) -> None:
        """Check; recover what the last crash left, if `recover_at_start` is set; reflect models, if `reflect_at_start` is."""
        container = self.args[0]()
        container.check()
        if container.settings().recover_at_start:
            container.recovery().settle()
        if container.settings().reflect_at_start:
            container.reflect()

    def is_async_mode_enabled(self) -> bool:
        """Whether `shutdown_resources()` has to be awaited: where a running loop has engines."""
        return any(isinstance(engine, AsyncEngineProvider) and engine.is_built_here for engine in self._engines())

    def shutdown(self) -> Any:
        here = [engine for engine in self._engines() if isinstance(engine, AsyncEngineProvider) and engine.is_built_here]
        waits = [wait for engine in here for wait in engine.begin_to_retire()]
        self.args[0]().decision_places().close()
        for engine in self._engines():
            engine.reset()
        return disposed(waits) if here else None

    def _engines(self) -> list[EngineProvider | AsyncEngineProvider]:
        container = self.args[0]()
        connections = [provider for provider in container.providers.values() if isinstance(provider, Connection)]
        return [engine for connection in connections for engine in (connection.engine, connection.async_engine)]


# ---- instances --------------------------------------------------------------------------------------------------------


class _Instance(containers.DynamicContainer):
    """An instance of a container of this module: it knows its providers' names when asked for one that it has not."""

    def __getattr__(self, name: str) -> Any:
        raise _unknown(name, self.__dict__.get("providers", ()))


class _DatabaseInstance(_Instance):
    """An instance of a database container. Its providers and those of its connections find it as `database_container`."""

    def shutdown_resources(self, *arguments: Any, **options: Any) -> Awaitable[None]:
        """Dispose all engines. What it returns has to be awaited where a running loop has engines, and may be anywhere else."""
        waiting: Awaitable[None] | None = super().shutdown_resources(*arguments, **options)
        return _Nothing() if waiting is None else waiting

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Connection) and name != "parent":
            value.container.database_container.set_provides(self)
        elif name == "database_container":
            value.set_provides(self)  # a copy's, which came with the original's, too


class _Nothing:
    """Can be awaited, and does nothing."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


def _unknown(name: str, known: Iterable[str]) -> AttributeError:
    if name.startswith("_"):
        return AttributeError(name)
    return UnknownConnection(name, sorted(set(known) - _PLUMBING))


# ---- what one name provides -----------------------------------------------------------------------------------------


def _require_instance(container: DatabaseContainer | None, name: str) -> DatabaseContainer:
    if container is None:
        raise InvalidUse(
            f"A provider of {name!r} was called on a container class", "Make an instance, `container = Container()`, and ask that"
        )
    return container


def _build_engine(container: DatabaseContainer | None, name: str) -> Engine:
    return build_engine(name, _require_instance(container, name).settings())


def _build_async_engine(container: DatabaseContainer | None, name: str) -> AsyncEngine:
    return build_async_engine(name, _require_instance(container, name).settings())


def _build_async_sessionmaker(
    container: DatabaseContainer | None, name: str, engine: Callable[[], AsyncEngine]
) -> async_sessionmaker[Any]:
    container = _require_instance(container, name)
    require_greenlet()
    from app_db._sessions.async_sessions import AsyncSessionHome, build_async_sessionmaker

    settings = container.settings().connection(name)
    lender = _lender_of(container, name)
    if lender is not None:
        from app_db._sessions.async_routing import build_async_routing_sessionmaker

        return build_async_routing_sessionmaker(_borrowing_home(container, name, lender, "async_session"), settings.session)
    return build_async_sessionmaker(AsyncSessionHome(name, settings, container.coordinator(), lambda: engine().sync_engine))


def _build_sessionmaker(container: DatabaseContainer | None, name: str, engine: Callable[[], Engine]) -> sessionmaker[Any]:
    container = _require_instance(container, name)
    settings = container.settings().connection(name)
    lender = _lender_of(container, name)
    if lender is not None:
        return build_routing_sessionmaker(_borrowing_home(container, name, lender, "session"), settings.session)
    return build_sessionmaker(SessionHome(name, settings, container.coordinator(), engine))


def _lender_of(container: DatabaseContainer, name: str) -> str | None:
    """Return the connection in whose transaction this one takes part, if it has none of its own."""
    return container.settings().lender_of(name, container.providers)


def _borrowing_home(container: DatabaseContainer, name: str, lender: str, kind: str) -> BorrowingHome:
    return BorrowingHome(name, lender, container.coordinator(), _holders(container, kind))


def _holders(container: DatabaseContainer, kind: str) -> Holders:
    return Holders(partial(_session_on, container, kind), partial(_holder_on, container), kind == "async_session")


def _session_on(container: DatabaseContainer, kind: str, name: str) -> Any:
    return getattr(container, f"{name}_{kind}")()


def _holder_on(container: DatabaseContainer, name: str) -> Any:
    session = getattr(container, f"{name}_session")
    registry = getattr(container, f"{name}_scoped_session")().registry
    return registry.holder() if isinstance(registry, UnitRegistry) and not session.overridden else session()


def _names_in(container: DatabaseContainer) -> list[str]:
    return [name for name, provider in container.providers.items() if isinstance(provider, Connection)]


def _current_session(scoped: scoped_session[Any]) -> Session:
    session: Session = scoped.registry()
    return session


def _build_async_scoped_session(maker: async_sessionmaker[Any]) -> async_scoped_session[Any]:
    from app_db._sessions.async_sessions import build_async_scoped_session

    return build_async_scoped_session(maker)


def _current_async_session(scoped: async_scoped_session[Any]) -> AsyncSession:
    session: AsyncSession = scoped.registry()
    return session


class ConnectionContainer(containers.DeclarativeContainer):
    """What one connection provides: `writer` of a container is one, and `writer_session` is its `session`."""

    instance_type = _Instance

    name: providers.Object[str] = providers.Object("")
    database_container: providers.Object[Any] = providers.Object(None)

    engine = EngineProvider(_build_engine, database_container, name)
    sessionmaker = providers.ThreadSafeSingleton(_build_sessionmaker, database_container, name, engine.provider)
    scoped_session = providers.ThreadSafeSingleton(build_scoped_session, sessionmaker)
    session = providers.Callable(_current_session, scoped_session)

    async_engine = AsyncEngineProvider(_build_async_engine, database_container, name)
    async_sessionmaker = providers.ThreadSafeSingleton(_build_async_sessionmaker, database_container, name, async_engine.provider)
    async_scoped_session = providers.ThreadSafeSingleton(_build_async_scoped_session, async_sessionmaker)
    async_session = providers.Callable(_current_async_session, async_scoped_session)


# ---- what a model names ---------------------------------------------------------------------------------------------


def _session_of(container: DatabaseContainer | None, subject: object) -> Session:
    """Return the unit's session of the connection that a model, table or statement belongs to."""
    session: Session = _provider_of(container, "session", subject)()
    return session


def _async_session_of(container: DatabaseContainer | None, subject: object) -> AsyncSession:
    session: AsyncSession = _provider_of(container, "async_session", subject)()
    return session


def _provider_of(container: DatabaseContainer | None, kind: str, subject: object) -> Callable[[], Any]:
    container = _require_instance(container, f"{kind}_of")
    name = connection_of(subject)
    try:
        provider: Callable[[], Any] = container.providers[f"{name}_{kind}"]
    except KeyError:
        raise UnknownModel(described(subject), connections_in(container), name) from None
    return provider


class Connection(providers.Container[ConnectionContainer]):
    """A named database of a container: `writer = Connection()` provides `writer.session`, and `writer_session` beside it.

    The attribute's name is the connection's name in the settings. `engine`, `sessionmaker`, `scoped_session` and `session` are
    provided in both ways, and are the same providers:

    >>> from app_db import Connection, DatabaseContainer
    >>> class Container(DatabaseContainer):
    ...     writer = Connection()
    ...     warehouse = Connection()
    >>> Container.warehouse_session is Container.warehouse.session
    True
    """

    if TYPE_CHECKING:
        engine: EngineProvider
        sessionmaker: providers.Provider[sessionmaker[Session]]
        scoped_session: providers.Provider[scoped_session[Session]]
        session: providers.Provider[Session]
        async_engine: AsyncEngineProvider
        async_sessionmaker: providers.Provider[async_sessionmaker[AsyncSession]]
        async_scoped_session: providers.Provider[async_scoped_session[AsyncSession]]
        async_session: providers.Provider[AsyncSession]

        def __init__(self) -> None: ...

    def __set_name__(self, owner: type[DatabaseContainer], name: str) -> None:
        super().__init__(ConnectionContainer)
        self.container.name.set_provides(name)
        for kind in KINDS:
            setattr(owner, f"{name}_{kind}", getattr(self.container, kind))


def _refuse_taken_names(name: str, bases: Iterable[type], attributes: Iterable[str]) -> None:
    inherited = [getattr(base, name) for base in bases if hasattr(base, name)]
    if hasattr(_DatabaseInstance(), name) or not all(isinstance(value, Connection) for value in inherited):
        raise InvalidUse(
            f"A connection can't be called {name!r}, because the container provides that itself",
            "Give the connection another name",
        )
    for taken in {f"{name}_{kind}" for kind in KINDS}.intersection(attributes):
        raise InvalidUse(
            f"The connection {name!r} provides {taken!r}, which the container class defines a second time", "Rename one of them"
        )


# ---- the session that finds its database --------------------------------------------------------------------------------


def _routing_home(container: DatabaseContainer | None, kind: str) -> tuple[RoutingHome, SessionSettings]:
    container = _require_instance(container, kind)
    home = RoutingHome(container.coordinator(), _holders(container, kind), container.settings, lambda: _names_in(container))
    return home, home.session_settings()


def _build_routing(container: DatabaseContainer | None) -> scoped_session[RoutingSession]:
    return build_routing_session(*_routing_home(container, "session"))


def _current_routing_session(scoped: scoped_session[RoutingSession]) -> RoutingSession:
    session: RoutingSession = scoped.registry()
    return session


def _build_async_routing(container: DatabaseContainer | None) -> async_scoped_session[AsyncRoutingSession]:
    require_greenlet()
    from app_db._sessions.async_routing import build_async_routing_session

    return build_async_routing_session(*_routing_home(container, "async_session"))


def _current_async_routing_session(scoped: async_scoped_session[AsyncRoutingSession]) -> AsyncRoutingSession:
    session: AsyncRoutingSession = scoped.registry()
    return session


# ---- what an application subclasses -----------------------------------------------------------------------------------


class DatabaseContainerMeta(DeclarativeMeta):
    """Gives a container class the flat names, `Container.writer_session`, and a clear error for those it has not."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any], **arguments: Any) -> Any:
        for attribute, value in attributes.items():
            if isinstance(value, Connection):
                _refuse_taken_names(attribute, bases, attributes)
        for base in bases:  # wiring leaves `__self__` there, and a subclass would take its base for itself
            getattr(base, "providers", {}).pop("__self__", None)
        return super().__new__(cls, name, bases, attributes, **arguments)

    def __getattr__(cls, name: str) -> providers.Provider[Any]:
        raise _unknown(name, getattr(cls, "providers", ()))


class DatabaseContainer(containers.DeclarativeContainer, metaclass=DatabaseContainerMeta):
    """What an application subclasses, with a `Connection()` for every database.

    `settings` come from the environment, unless an instance is given others. `transaction` makes a unit of work for `with`,
    with the options of `transactional`, and `unit` is the one under way; `session_of(Model)` is its session of the model's
    connection. Statements of `session` and, for coroutines, of `async_session` find their connections. `create_all`, `drop_all`,
    `reflect`, `reflect_schema` and `bootstrap` make, drop, read and fill tables. `transaction_manager` follows the context; give
    the instance `transaction.manager` to share zope's own. Engines are made at first use; `shutdown_resources()` disposes them.
    """

    instance_type = _DatabaseInstance

    settings: providers.Provider[DatabaseSettings] = providers.ThreadSafeSingleton(DatabaseSettings)
    transaction_manager: providers.Provider[Any] = Lasting(ContextTransactionManager)
    database_container: providers.Object[Any] = providers.Object(None)
    decision_places: providers.Provider[DecisionPlaces] = Lasting(build_decision_places, database_container)
    coordinator = Lasting(build_coordinator, database_container)
    recovery: providers.Provider[Recovery] = providers.Factory(build_recovery, database_container)
    check: providers.Provider[None] = providers.Callable(check, database_container)
    lifecycle = Lifecycle(None, database_container)
    transaction: providers.Provider[Transaction] = providers.Factory(build_transaction, coordinator)
    unit: providers.Provider[UnitOfWork] = providers.Factory(build_unit, coordinator)
    session_of: providers.Provider[Session] = providers.Callable(_session_of, database_container)
    async_session_of: providers.Provider[AsyncSession] = providers.Callable(_async_session_of, database_container)
    reflect: providers.Provider[None] = providers.Callable(reflect, database_container)
    reflect_schema: providers.Provider[ReflectedSchema] = providers.Callable(reflect_schema, database_container)
    create_all: providers.Provider[None] = providers.Callable(create_all, database_container)
    drop_all: providers.Provider[None] = providers.Callable(drop_all, database_container)
    bootstrap: providers.Provider[bool] = providers.Callable(bootstrap, database_container)
    async_bootstrap: providers.Provider[Awaitable[bool]] = providers.Callable(async_bootstrap, database_container)
    routing = providers.ThreadSafeSingleton(_build_routing, database_container)
    session: providers.Provider[RoutingSession] = providers.Callable(_current_routing_session, routing)
    async_routing = providers.ThreadSafeSingleton(_build_async_routing, database_container)
    async_session: providers.Provider[AsyncRoutingSession] = providers.Callable(_current_async_routing_session, async_routing)

    if TYPE_CHECKING:

        def shutdown_resources(self, resource_type: type[providers.BaseResource[Any]] = ...) -> Awaitable[None]: ...


class Container(DatabaseContainer):
    """A container with a writer and a reader, ready to use.

    >>> from app_db import Container, DatabaseSettings
    >>> from sqlalchemy import text
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> with container.transaction():
    ...     container.writer_session().scalar(text("SELECT 42"))
    42
    """

    writer = Connection()
    reader = Connection()


def container_of(*names: str) -> type[DatabaseContainer]:
    """Return a container class for connections whose names are known only at run time.

    >>> from app_db import DatabaseSettings, container_of
    >>> settings = DatabaseSettings(connections={"north": {"url": "sqlite://"}, "south": {"url": "sqlite://"}})
    >>> container = container_of(*settings.connections)(settings=settings)
    >>> with container.transaction():
    ...     container.south_session().get_bind().name
    'sqlite'
    """
    make: Any = type(DatabaseContainer)
    container: type[DatabaseContainer] = make("Container", (DatabaseContainer,), {name: Connection() for name in names})
    return container
