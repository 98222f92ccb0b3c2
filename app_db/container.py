"""Database containers: declarative wiring of all the other modules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from functools import partial
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any, NoReturn, cast

from dependency_injector import containers, providers
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from app_db._databases.capacity import Capacity, most_by_settings, most_of
from app_db._databases.engines import build_async_engine, build_engine
from app_db._databases.pool_states import PoolState, state_of
from app_db._sessions.borrowing import BorrowingConfig
from app_db._sessions.described import METHODS, SignedCallable, SignedFactory, described_connection, provided
from app_db._sessions.makers import UnitSessionmaker, build_sessionmaker, unit_class
from app_db._sessions.own_engines import own_engine, settings_with
from app_db._sessions.providers import Current, Held, HolderProvider, Lasting, Lifecycle, resources_in_circle
from app_db._sessions.registry import UnitRegistry, build_scoped_session
from app_db._sessions.routing import Holders, RoutingConfig, RoutingSession
from app_db._sessions.sessions import SessionConfig, UnitSession
from app_db._sessions.state import State, StateHolder
from app_db._two_phase.checks import check
from app_db._two_phase.decision_logs import DecisionLogs
from app_db._two_phase.recovery import Recovery, build_recovery
from app_db._units.coordinator import build_coordinator
from app_db._units.deferred import DeferredUnit, build_deferred_unit
from app_db._units.manager import ContextTransactionManager
from app_db._units.transactions import Transaction, build_transaction, build_unit
from app_db._units.unit_of_work import Done, UnitOfWork
from app_db.errors import ConnectionNotConfigured, InvalidUse, UnknownConnection, UnknownModel
from app_db.health import Health
from app_db.health._rounds import async_health, build_checks, health
from app_db.models._bases import connection_of, described
from app_db.models._bootstrap import async_bootstrap, bootstrap
from app_db.models._reflection import ReflectedSchema, connections_in, reflect, reflect_schema
from app_db.models._schema import create_all, drop_all
from app_db.settings import DatabaseSettings
from app_db.settings._urls import require_greenlet

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker

    from app_db._sessions.async_routing import AsyncRoutingSession
    from app_db._sessions.async_sessions import AsyncUnitSession
    from app_db._units.branches import Branch

    DeclarativeMeta = type
else:
    from dependency_injector.containers import DeclarativeContainerMetaClass as DeclarativeMeta

__all__ = ["Connection", "ConnectionContainer", "Container", "DatabaseContainer", "container_of"]

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
"""The providers of every connection, as `NAME.KIND` and as `NAME_KIND`."""


# ---- instances --------------------------------------------------------------------------------------------------------


class _Instance(containers.DynamicContainer):
    """An instance of a container. Asked for an unknown provider, it raises an error that lists the known ones."""

    def __dir__(self) -> list[str]:
        return sorted({*provided(self.providers), *METHODS})

    def __getattr__(self, name: str) -> NoReturn:
        raise _unknown(name, self.__dict__.get("providers", ()))


class _ConnectionInstance(_Instance):
    """The providers of one connection."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnknownConnection(name, KINDS, self.__dict__["providers"]["name"]())


class _DatabaseInstance(_Instance):
    """The databases of an application: `container.writer.session()` is a session, `container.transaction()` a unit of work.

    `dir(container)` lists what it provides. `help(DatabaseContainer)` says what each of that is.
    """

    def shutdown_resources(self, resource_type: type[providers.BaseResource[Any]] = providers.BaseResource) -> Awaitable[None]:
        """Dispose all engines. Await the result if the running loop has engines; elsewhere awaiting is optional."""
        self._refuse_circle(resource_type)
        waiting: Awaitable[None] | None = super().shutdown_resources(resource_type)
        return Done() if waiting is None else waiting

    def _refuse_circle(self, resource_type: type[providers.BaseResource[Any]]) -> None:
        """Raise the error of dependency-injector, which loops for ever if there is a resource outside the circle, as app_db's."""
        resources = self.traverse(types=[providers.BaseResource])
        circle = resources_in_circle(resource for resource in resources if isinstance(resource, resource_type))
        if circle:
            names = [name for name, provider in self.providers.items() if provider in circle]
            listed = ", ".join(map(repr, names)) or "resources of a nested container"
            raise RuntimeError(
                f"Unable to resolve resources shutdown order: {listed} depend on each other. Nothing was shut down. Remove "
                "one of the dependencies, and shut down again"
            )

    def __repr__(self) -> str:
        provider: Any = self.settings
        settings = provider() if provider.overridden or provider.is_built else None
        found = [(name, provider) for name, provider in self.providers.items() if isinstance(provider, Connection)]
        own = {name: provider.container.given_engine() for name, provider in found}
        listed = ", ".join(described_connection(name, settings, engine) for name, engine in own.items()) or "no connections"
        return f"<{getattr(self.declarative_parent, '__name__', 'Container')}: {listed}>"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "core":
            value.container.database_container.set_provides(self)  # a copy of `core` refers to the original


def _unknown(name: str, known: Iterable[str]) -> AttributeError:
    if name.startswith("_"):
        return AttributeError(name)
    return UnknownConnection(name, provided(known))


# ---- what one name provides -----------------------------------------------------------------------------------------


def _require_instance(container: DatabaseContainer | None, name: str) -> DatabaseContainer:
    if container is None:
        raise InvalidUse(
            f"A provider of {name!r} was called on a container class", "Make an instance, `container = Container()`, and ask that"
        )
    return container


def _build_settings(container: DatabaseContainer | None, name: str) -> DatabaseSettings:
    connections = [] if container is None else [container.connection(each) for each in _names_in(container)]
    own = {each.container.name(): engine.url for each in connections if (engine := _own_engine(each)) is not None}
    given = {each.container.name(): each.container.given_engine() for each in connections}
    return settings_with(own, {each: engine.url for each, engine in given.items() if engine is not None})


def _settings_of(container: DatabaseContainer | None, name: str) -> DatabaseSettings:
    settings = _require_instance(container, name).settings()
    if not hasattr(settings, "connection"):
        raise InvalidUse(f"The container has a {type(settings).__name__} as its settings", "Give it DatabaseSettings(…)")
    return settings


def _own_engine(connection: Connection) -> Engine | AsyncEngine | None:
    return own_engine(connection.engine, connection.async_engine)


def _build_engine(container: DatabaseContainer | None, name: str) -> Engine:
    return build_engine(name, _settings_of(container, name))


def _build_async_engine(container: DatabaseContainer | None, name: str) -> AsyncEngine:
    return build_async_engine(name, _settings_of(container, name))


def _build_sessionmaker(
    container: DatabaseContainer | None, name: str, engine: Callable[[], Engine], session_class: type[Session] | None
) -> sessionmaker[Session]:
    return build_sessionmaker(_settings_of(container, name).connection(name), engine, session_class)


def _build_async_sessionmaker(
    container: DatabaseContainer | None,
    name: str,
    engine: Callable[[], AsyncEngine],
    session_class: type[Session] | None,
    async_session_class: type[AsyncSession] | None,
) -> async_sessionmaker[AsyncSession]:
    container = _require_instance(container, name)
    require_greenlet()
    from app_db._sessions.async_sessions import build_async_sessionmaker

    return build_async_sessionmaker(container.settings().connection(name), engine, session_class, async_session_class)


def _lender_of(container: DatabaseContainer, name: str) -> str | None:
    """Return the connection whose transaction this one shares, or None if it has its own."""
    return container.settings().lender_of(name, container.providers)


def _borrowing_config(container: DatabaseContainer, name: str, lender: str, kind: str) -> BorrowingConfig:
    return BorrowingConfig(name, lender, container.core.coordinator(), _holders(container, kind))


def _holders(container: DatabaseContainer, kind: str) -> Holders:
    return Holders(partial(_session_on, container, kind), partial(_holder_on, container), kind == "async_session")


def _session_on(container: DatabaseContainer, kind: str, name: str) -> Any:
    return getattr(container, f"{name}_{kind}")()


def _holder_on(container: DatabaseContainer, name: str) -> UnitSession | Branch:
    session = getattr(container, f"{name}_session")
    registry = getattr(container, f"{name}_scoped_session")().registry
    is_ours = isinstance(registry, UnitRegistry) and not session.overridden
    holder: UnitSession | Branch = registry.holder() if is_ours else session()
    return holder


def _names_in(container: DatabaseContainer) -> list[str]:
    return [name for name, provider in container.providers.items() if isinstance(provider, Connection)]


_current_session: Callable[[Any], Any] = methodcaller("registry")
"""Returns the current unit's session of a scoped session, sync or async."""


def _build_scoped_session(
    container: DatabaseContainer | None,
    name: str,
    maker: providers.Provider[sessionmaker[Session]],
    engine: Callable[[], Engine],
) -> scoped_session[UnitSession]:
    container = _require_instance(container, name)
    lender = _lender_of(container, name)
    if lender is not None:
        borrowing = cast(Any, _borrowing_config(container, name, lender, "session"))
        return build_scoped_session(UnitSessionmaker(borrowing, maker, partial(unit_class, RoutingSession)))
    config = SessionConfig(name, container.settings().connection(name), container.core.coordinator(), engine)
    return build_scoped_session(UnitSessionmaker(config, maker, partial(unit_class, UnitSession)))


def _build_async_scoped_session(
    container: DatabaseContainer | None,
    name: str,
    maker: providers.Provider[async_sessionmaker[AsyncSession]],
    engine: Callable[[], AsyncEngine],
) -> async_scoped_session[AsyncUnitSession]:
    container = _require_instance(container, name)
    maker()  # first: without greenlet it raises a clear error
    from app_db._sessions.async_routing import AsyncRoutingSession
    from app_db._sessions.async_sessions import (
        AsyncSessionConfig,
        AsyncUnitSession,
        async_unit_class,
        build_async_scoped_session,
    )

    lender = _lender_of(container, name)
    if lender is not None:
        borrowing = cast(Any, _borrowing_config(container, name, lender, "async_session"))
        return build_async_scoped_session(UnitSessionmaker(borrowing, maker, partial(async_unit_class, AsyncRoutingSession)))
    connection = container.settings().connection(name)
    config = AsyncSessionConfig(name, connection, container.core.coordinator(), lambda: engine().sync_engine)
    return build_async_scoped_session(UnitSessionmaker(config, maker, partial(async_unit_class, AsyncUnitSession)))


def _nothing() -> None:
    return None


class ConnectionContainer(containers.DeclarativeContainer):
    """The providers of one connection: its engine, sessionmaker, scoped session and session, each sync and async.

    `container.writer` is an instance. Its `session` is also provided as `container.writer_session`,
    and so on.
    """

    instance_type = _ConnectionInstance

    name: providers.Object[str] = providers.Object("")
    holder: providers.Callable[StateHolder] = providers.Callable()
    """The holder of the database container. `Connection` sets it."""

    session_class: providers.Object[Any] = providers.Object(None)
    async_session_class: providers.Object[Any] = providers.Object(None)
    given_engine: providers.Provider[Engine | AsyncEngine | None] = providers.Callable(_nothing)

    engine = Held(StateHolder.get, holder, "engine", name, _build_engine)
    sessionmaker = Held(StateHolder.get, holder, "sessionmaker", name, _build_sessionmaker, engine.provider, session_class)
    scoped_session = Held(
        StateHolder.get, holder, "scoped_session", name, _build_scoped_session, sessionmaker.provider, engine.provider
    )
    session = Current(_current_session, scoped_session)

    async_engine = Held(StateHolder.get_for_loop, holder, "async_engine", name, _build_async_engine)
    async_sessionmaker = Held(
        StateHolder.get,
        holder,
        "async_sessionmaker",
        name,
        _build_async_sessionmaker,
        async_engine.provider,
        session_class,
        async_session_class,
    )
    async_scoped_session = Held(
        StateHolder.get,
        holder,
        "async_scoped_session",
        name,
        _build_async_scoped_session,
        async_sessionmaker.provider,
        async_engine.provider,
    )
    async_session = Current(_current_session, async_scoped_session)


# ---- what a model names ---------------------------------------------------------------------------------------------


def _session_of(container: DatabaseContainer | None, subject: object) -> Session:
    """Return the unit's session for the connection of a model, table or statement."""
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


def _connection(container: DatabaseContainer | None, name: str) -> Connection:
    """Return the connection of that name. Raises UnknownConnection, with the names that there are."""
    container = _require_instance(container, name)
    found = container.providers.get(name)
    if not isinstance(found, Connection):
        raise UnknownConnection(name, sorted(_names_in(container)))
    return found


def _capacity(container: DatabaseContainer | None, *, threads: bool = True, coroutines: bool = True) -> Capacity:
    """Return the most connections that one process can open, by `threads`, by `coroutines` of one event loop, or by both."""
    container = _require_instance(container, "capacity")
    counted = {}
    for name in _names_in(container):
        with suppress(ConnectionNotConfigured):
            counted[name] = _most_of(container, name, threads=threads, coroutines=coroutines)
    return Capacity(counted)


def _most_of(container: DatabaseContainer, name: str, *, threads: bool, coroutines: bool) -> float:
    """Return the most connections of one name. An engine of the application's own has its own pool."""
    most = most_by_settings(container.settings().connection(name))
    own = _own_engine(container.connection(name))
    by_threads = most_of(own.pool) if isinstance(own, Engine) and most else most
    by_coroutines = most_of(own.pool) if own is not None and not isinstance(own, Engine) and most else most
    return (by_threads if threads else 0) + (by_coroutines if coroutines else 0)


def _pools(container: DatabaseContainer | None) -> dict[str, PoolState]:
    """Return how full the pools of each connection are in this process, and who holds what they have given out."""
    container = _require_instance(container, "pools")
    return {name: state_of(name, _engines_of(container, name)) for name in _names_in(container)}


def _engines_of(container: DatabaseContainer, name: str) -> list[Engine]:
    """Return the engines of a connection that were made, or the application's own."""
    own = _own_engine(container.connection(name))
    if own is None:
        return container.core.state().engines(name)
    return [own if isinstance(own, Engine) else own.sync_engine]


if TYPE_CHECKING:
    from typing import Generic

    from typing_extensions import TypeVar

    S_co = TypeVar("S_co", bound=Session, default=Session, covariant=True)
    A_co = TypeVar("A_co", bound=AsyncSession, default=AsyncSession, covariant=True)

    class _ContainerProvider(providers.Provider[ConnectionContainer], Generic[S_co, A_co]):
        """What Connection needs of `providers.Container`, without its `__getattr__`: that would allow misspelt names."""

        def __init__(self, container_class: type[ConnectionContainer]) -> None: ...

        @property
        def container(self) -> ConnectionContainer: ...

else:
    S_co = A_co = None

    class _ContainerProvider(providers.Container):
        def __class_getitem__(cls, classes):
            return cls


class Connection(_ContainerProvider[S_co, A_co]):
    """A named database of a container. `writer = Connection()` provides `writer.session`, which is also `writer_session`.

    The attribute's name is the connection's name in the settings. The providers are `engine`,
    `sessionmaker`, `scoped_session`, `session`, and the same four with the prefix `async_`. Both
    forms give the same provider:

    >>> from app_db import Connection, DatabaseContainer
    >>> class Container(DatabaseContainer):
    ...     writer = Connection()
    ...     warehouse = Connection()
    >>> Container.warehouse_session is Container.warehouse.session
    True
    """

    if TYPE_CHECKING:
        engine: Held[Engine]
        sessionmaker: providers.Provider[sessionmaker[S_co]]
        scoped_session: providers.Provider[scoped_session[S_co]]
        session: providers.Provider[S_co]
        async_engine: Held[AsyncEngine]
        async_sessionmaker: providers.Provider[async_sessionmaker[A_co]]
        async_scoped_session: providers.Provider[async_scoped_session[A_co]]
        async_session: providers.Provider[A_co]
        _given: tuple[Engine | AsyncEngine | None, type[Session] | None, type[AsyncSession] | None]

        def __init__(
            self,
            *,
            engine: Engine | AsyncEngine | None = None,
            session_class: type[S_co] | None = None,
            async_session_class: type[A_co] | None = None,
        ) -> None: ...

    else:

        def __init__(self, *, engine=None, session_class=None, async_session_class=None):
            super().__init__(ConnectionContainer)
            _require_engine(engine)
            _require_session_class(session_class, "session_class", Session)
            if async_session_class is not None:
                require_greenlet()
                from sqlalchemy.ext.asyncio import AsyncSession

                _require_session_class(async_session_class, "async_session_class", AsyncSession)
            self._given = engine, session_class, async_session_class

    def __repr__(self) -> str:
        name = self.container.name()
        return f"<Connection {name!r}>" if name else "<Connection>"

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *KINDS})

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise InvalidUse. Injection calls the connection for `Provide[Container.writer]`."""
        name = self.container.name()
        raise InvalidUse(
            f"{name!r} is a connection, which can't be called or injected itself",
            f"Say what of it you need: Provide[Container.{name}.session] injects the session, container.{name}.session() returns "
            f"it. A connection provides: {', '.join(KINDS)}",
        )

    def __set_name__(self, owner: type[DatabaseContainer], name: str) -> None:
        engine, *classes = self._given
        self.container.name.set_provides(name)
        self.container.session_class.set_provides(classes[0])
        self.container.async_session_class.set_provides(classes[1])
        if engine is not None:
            # A function, because copies of the container must not copy the engine.
            self.container.given_engine = providers.Callable(lambda: engine)
            provider = self.container.async_engine if hasattr(engine, "sync_engine") else self.container.engine
            provider.override(self.container.given_engine)
        self.container.holder.set_provides(DatabaseContainer.core.holder)
        for kind in KINDS:
            setattr(owner, f"{name}_{kind}", getattr(self.container, kind))


def _require_engine(given: object) -> None:
    if given is not None and not isinstance(getattr(given, "sync_engine", given), Engine):
        raise InvalidUse(
            f"Connection(engine=…) is given a {type(given).__name__}, and no engine", "Pass what create_engine() returns"
        )


def _require_session_class(given: object, argument: str, base: type) -> None:
    if given is not None and not (isinstance(given, type) and issubclass(given, base)):
        raise InvalidUse(
            f"Connection({argument}=…) is given {_kind_of(given)}, and no session class",
            f"Pass a subclass of {base.__module__}.{base.__name__}",
        )


def _kind_of(given: object) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"


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


def _routing_config(container: DatabaseContainer | None, kind: str) -> Any:
    container = _require_instance(container, kind)
    return RoutingConfig(
        container.core.coordinator(), _holders(container, kind), container.settings, lambda: _names_in(container)
    )


def _maker_of_default(
    container: DatabaseContainer | None, config: RoutingConfig, kind: str, none: Callable[[], object]
) -> providers.Provider[Any]:
    """Return the sessionmaker of the connection to which statements go that name no model. If there is none, call `none`."""
    if config.routes.has_default:
        return cast("providers.Provider[Any]", getattr(container, f"{config.routes.default}_{kind}"))
    return providers.Object(none())


def _build_routing(container: DatabaseContainer | None, name: str) -> scoped_session[RoutingSession]:
    config = _routing_config(container, name)
    return build_scoped_session(
        UnitSessionmaker(
            config, _maker_of_default(container, config, "sessionmaker", sessionmaker), partial(unit_class, RoutingSession)
        )
    )


def _build_async_routing(container: DatabaseContainer | None, name: str) -> async_scoped_session[AsyncRoutingSession]:
    require_greenlet()
    from sqlalchemy.ext.asyncio import async_sessionmaker

    from app_db._sessions.async_routing import AsyncRoutingSession
    from app_db._sessions.async_sessions import async_unit_class, build_async_scoped_session

    config = _routing_config(container, name)
    maker = _maker_of_default(container, config, "async_sessionmaker", async_sessionmaker)
    sessions = UnitSessionmaker(config, maker, partial(async_unit_class, AsyncRoutingSession))
    return cast("async_scoped_session[AsyncRoutingSession]", build_async_scoped_session(sessions))


# ---- what an application subclasses -----------------------------------------------------------------------------------


class _CoreContainer(containers.DeclarativeContainer):
    """The internal providers of a database container."""

    database_container: providers.Object[DatabaseContainer | None] = providers.Object(None)
    holder = HolderProvider(StateHolder, database_container)
    state: providers.Provider[State] = providers.Callable(attrgetter("state"), holder)
    decision_logs: providers.Provider[DecisionLogs] = providers.Callable(attrgetter("decision_logs"), state)
    coordinator = Lasting(build_coordinator, database_container, decision_logs.provider)
    lifecycle = Lifecycle(None, holder)
    routing = Held(StateHolder.get, holder, "routing", "session", _build_routing)
    health_checks = Held(StateHolder.get, holder, "health", "", build_checks)
    async_routing = Held(StateHolder.get, holder, "async_routing", "async_session", _build_async_routing)


class _DatabaseContainerMeta(DeclarativeMeta):
    """Gives container classes checks of their connections' names, and a clear error for unknown ones."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, object], **arguments: object) -> Any:
        for attribute, value in attributes.items():
            if isinstance(value, Connection):
                _refuse_taken_names(attribute, bases, attributes)
        if "core" in attributes and any(hasattr(base, "core") for base in bases):
            raise InvalidUse(f"{name} defines 'core', where app_db keeps its own providers", "Give it another name")
        for base in bases:  # wiring leaves `__self__` there, by which a subclass would find its base instead of itself
            getattr(base, "providers", {}).pop("__self__", None)
        return super().__new__(cls, name, bases, attributes, **arguments)

    def __getattr__(cls, name: str) -> providers.Provider[Any]:
        raise _unknown(name, getattr(cls, "providers", ()))


class DatabaseContainer(containers.DeclarativeContainer, metaclass=_DatabaseContainerMeta):
    """The base class of an application's container. Give a subclass a `Connection()` for every database.

    >>> from app_db import Connection, DatabaseContainer, DatabaseSettings
    >>> class Container(DatabaseContainer):
    ...     writer = Connection()
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> with container.transaction() as unit:
    ...     session = container.writer_session()

    Its providers, besides those of the connections:

    - `settings`: the DatabaseSettings, from the environment unless the instance is given others
    - `transaction`: a Transaction, for `with`. It takes the options of `transactional`
    - `deferred_unit`: a unit that begins when it is first asked for, as that of a request
    - `unit`: the current UnitOfWork. Raises NoUnitOfWork if there is none
    - `session_of(Model)`, `async_session_of(Model)`: the unit's session for the connection of a model, table or statement
    - `session`, `async_session`: the unit's session that finds the connection of each statement
    - `connection`: the connection of a name that is in a variable: `container.connection("writer").session()`
    - `capacity`: how many connections to servers one process can open
    - `pools`: how full the pools are, and who holds their connections
    - `health`, `async_health`: a report on which databases answer, and how full the pools are
    - `create_all`, `drop_all`: create and drop tables
    - `reflect`, `reflect_schema`: read tables from the databases
    - `bootstrap`, `async_bootstrap`: create the tables and call a function, once
    - `check`, `recovery`: check two-phase commit, and settle what is in doubt
    - `transaction_manager`: a ContextTransactionManager. Give the instance `transaction.manager` to share zope's own

    Engines are made at first use. `shutdown_resources()` disposes them.
    """

    instance_type = _DatabaseInstance

    core: type[_CoreContainer] = cast("type[_CoreContainer]", providers.Container(_CoreContainer))
    settings: providers.Provider[DatabaseSettings] = Held(StateHolder.get, core.holder, "settings", "", _build_settings)
    transaction_manager: providers.Provider[Any] = Lasting(ContextTransactionManager)
    recovery: providers.Provider[Recovery] = SignedFactory(build_recovery, core.database_container, core.decision_logs)
    check: providers.Provider[None] = SignedCallable(check, core.decision_logs)
    transaction: providers.Provider[Transaction] = SignedFactory(build_transaction, core.coordinator)
    deferred_unit: providers.Provider[DeferredUnit] = SignedFactory(build_deferred_unit, core.coordinator)
    unit: providers.Provider[UnitOfWork] = SignedFactory(build_unit, core.coordinator)
    capacity: providers.Provider[Capacity] = SignedCallable(_capacity, core.database_container)
    pools: providers.Provider[dict[str, PoolState]] = SignedCallable(_pools, core.database_container)
    health: providers.Provider[Health] = SignedCallable(health, core.health_checks)
    async_health: providers.Provider[Coroutine[Any, Any, Health]] = SignedCallable(async_health, core.health_checks)
    connection: providers.Provider[Connection] = SignedCallable(_connection, core.database_container)
    session_of: providers.Provider[Session] = SignedCallable(_session_of, core.database_container)
    async_session_of: providers.Provider[AsyncSession] = SignedCallable(_async_session_of, core.database_container)
    reflect: providers.Provider[None] = SignedCallable(reflect, core.database_container)
    reflect_schema: providers.Provider[ReflectedSchema] = SignedCallable(reflect_schema, core.database_container)
    create_all: providers.Provider[None] = SignedCallable(create_all, core.database_container)
    drop_all: providers.Provider[None] = SignedCallable(drop_all, core.database_container)
    bootstrap: providers.Provider[bool] = SignedCallable(bootstrap, core.database_container)
    async_bootstrap: providers.Provider[Awaitable[bool]] = SignedCallable(async_bootstrap, core.database_container)
    session: providers.Provider[RoutingSession] = Current(_current_session, core.routing)
    async_session: providers.Provider[AsyncRoutingSession] = Current(_current_session, core.async_routing)

    if TYPE_CHECKING:

        def shutdown_resources(self, resource_type: type[providers.BaseResource[Any]] = ...) -> Awaitable[None]: ...


class Container(DatabaseContainer):
    """A container with the connections `writer` and `reader`.

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
    """Return a container class with a connection for each name, for names that are known only at run time.

    >>> from app_db import DatabaseSettings, container_of
    >>> settings = DatabaseSettings(connections={"north": {"url": "sqlite://"}, "south": {"url": "sqlite://"}})
    >>> container = container_of(*settings.connections)(settings=settings)
    >>> with container.transaction():
    ...     container.south_session().get_bind().name
    'sqlite'
    """
    make = cast("Callable[..., type[DatabaseContainer]]", type(DatabaseContainer))
    return make("Container", (DatabaseContainer,), {name: Connection() for name in names})
