"""What an isolation of a container needs to know of it. Tests follow each other quickly, so it is kept for the next one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from dependency_injector import providers

from app_db._databases.registry import database_of
from app_db._wording import did_you_mean
from app_db.container import ConnectionContainer, DatabaseContainer
from app_db.errors import CannotIsolate, ConnectionNotConfigured, InvalidUse
from app_db.settings._urls import for_coroutines, for_threads
from app_db.testing._overrides import connections_of
from app_db.testing._shared_engines import IsolatedConnection

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from app_db._sessions.providers import Held
    from app_db.settings import ConnectionSettings, DatabaseSettings

T = TypeVar("T")


class Place:
    """A database, the connections to it, and the one that is shared by all of them."""

    def __init__(self, connections: Sequence[IsolatedConnection]) -> None:
        self.connections = {connection.name: connection for connection in connections}
        writable = [connection for connection in connections if not connection.settings.read_only]
        self.root = min(writable, key=lambda connection: (not connection.settings.transactional, connection.name))
        threads, coroutines = for_threads(self.root.url), for_coroutines(self.root.url)
        kind = database_of(threads.get_backend_name())
        if not kind.has_savepoints:
            raise CannotIsolate(
                self.root.name,
                f"A database without savepoints ({threads.get_backend_name()})",
                f"Leave it out, isolated(container, connections=[...]), or give {self.root.name!r} another database in tests",
            )
        self.drivers = threads.get_driver_name(), coroutines.get_driver_name()
        self.async_view = kind.async_view(*self.drivers)


class Engines(Protocol):
    """An isolation, as a plan knows it."""

    def engine(self, name: str) -> Engine: ...

    def async_engine(self, name: str) -> AsyncEngine: ...


class Plan:
    """The databases to isolate, by connection, and the providers that override the providers of their engines."""

    def __init__(self, container: DatabaseContainer, settings: DatabaseSettings, names: Collection[str] | None) -> None:
        self.settings = settings
        self._isolation: Engines | None = None
        self._stand_ins: list[tuple[Held[Any], providers.Callable[Any]]] = []
        by_place: dict[object, dict[str, ConnectionSettings]] = {}
        connections = named_connections(container, None)
        for name in connections:
            with suppress(ConnectionNotConfigured):  # as without the isolation, its first use raises that
                own = settings.connection(name)
                by_place.setdefault(own.place, {})[name] = own
        self.places = {
            name: place
            for group in by_place.values()
            if names is None or not group.keys().isdisjoint(names)
            if not all(own.read_only for own in group.values())  # or there is nothing to roll back
            for place in [Place([self._isolated(name, own, connections[name]) for name, own in group.items()])]
            for name in group
        }

    def _isolated(self, name: str, settings: ConnectionSettings, connection: ConnectionContainer) -> IsolatedConnection:
        return IsolatedConnection(
            name,
            settings,
            self._outside(connection.engine, self._engine, name),
            self._outside(connection.async_engine, self._async_engine, name),
            connection.sessionmaker,
            connection.async_sessionmaker,
        )

    def _outside(self, provider: Held[T], instead: Callable[[str], T], name: str) -> Callable[[], T]:
        """Return a function that returns what a provider returns outside the isolation."""
        stand_in = providers.Callable(instead, name)
        self._stand_ins.append((provider, stand_in))

        def outside() -> T:
            overriding: Sequence[Callable[[], T]] = provider.overridden
            before = overriding[: overriding.index(stand_in)] if stand_in in overriding else overriding
            return before[-1]() if before else provider.own()

        return outside

    @property
    def is_in_use(self) -> bool:
        """Whether an isolation goes by this plan now."""
        return self._isolation is not None

    def _engine(self, name: str) -> Engine:
        return self._running.engine(name)

    def _async_engine(self, name: str) -> AsyncEngine:
        return self._running.async_engine(name)

    @property
    def _running(self) -> Engines:
        if self._isolation is None:
            raise CannotIsolate("", "An engine of an isolation that has ended", "Ask the container for it again")
        return self._isolation

    def begin(self, isolation: Engines) -> None:
        """Let the container give isolated engines."""
        self._isolation = isolation
        for provider, stand_in in self._stand_ins:
            provider.override(stand_in)

    def end(self) -> None:
        """Let the container give its own engines again. Overrides that were made meanwhile stay."""
        for provider, stand_in in self._stand_ins:
            overriding: Sequence[Any] = provider.overridden
            if overriding and overriding[-1] is stand_in:
                provider.reset_last_overriding()
            elif stand_in in overriding:
                provider.reset_override()
                for other in overriding:
                    if other is not stand_in:
                        provider.override(other)
        self._isolation = None


def plan_for(container: DatabaseContainer, connections: Collection[str] | None) -> Plan:
    """Return a plan that is not in use, for the databases of the named connections, or else for all of the container."""
    settings = container.settings()
    kept = cast("dict[object, Plan]", container.core.holder().plans)
    key = None if connections is None else frozenset(connections)
    plan = kept.get(key)
    if plan is None or plan.settings is not settings:
        plan = kept[key] = Plan(container, settings, connections)
    return plan if not plan.is_in_use else Plan(container, settings, connections)


def named_connections(container: DatabaseContainer, names: Collection[str] | None) -> dict[str, ConnectionContainer]:
    """Return the connections of a container, or those that are named."""
    connections = connections_of(container)
    for name in names or ():
        if name not in connections:
            advice = f"{did_you_mean(name, connections)} The connections are {', '.join(connections)}".lstrip()
            raise InvalidUse(f"There is no connection {name!r} to isolate", advice)
    return {name: provider.container for name, provider in connections.items() if names is None or name in names}
