"""Tests that leave nothing behind: each database of a container has one connection, which is rolled back at their end."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy.orm import Session
from sqlalchemy.util.concurrency import greenlet_spawn, in_greenlet

from app_db._compat.asyncio import running_loop
from app_db._databases.registry import database_of
from app_db._units.manager import current
from app_db.errors import CannotIsolate, InvalidUse
from app_db.settings._urls import for_coroutines, for_threads
from app_db.testing._shared_engines import READ_ONLY, async_sharing_engine, sharing_engine
from app_db.testing._sharing import SharedConnection, shared_by
from app_db.testing._turns import Turns

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from app_db._databases.database import Terms
    from app_db._units.coordinator import Coordinator
    from app_db.settings import ConnectionSettings

_AT_ONCE: Any = {"isolation_level": "AUTOCOMMIT"}

_shared: WeakKeyDictionary[Engine, SharedConnection] = WeakKeyDictionary()
"""By real engine. They last as long as that, so that every test finds compiled what the tests before it have compiled."""


@dataclass(frozen=True, eq=False)
class Isolated:
    """A connection of the container: its settings, and where its engines come from when it is not isolated."""

    name: str
    settings: ConnectionSettings
    engine: Callable[[], Engine]
    async_engine: Callable[[], AsyncEngine]

    @property
    def at_once(self) -> bool:
        """Whether its statements are each for themselves, without a transaction around them."""
        return database_of(self.url.get_backend_name()).isolation_level(self.settings) == "AUTOCOMMIT"

    @property
    def url(self) -> URL:
        return self.settings.sqlalchemy_url()


class Isolation:
    """What `isolated(container)` gives while it lasts."""

    def __init__(self, coordinator: Coordinator, connections: Iterable[Isolated], patience: float) -> None:
        self._coordinator = coordinator
        self._turns = Turns(self._units, patience)
        by_place: dict[object, list[Isolated]] = {}
        for connection in connections:
            by_place.setdefault(connection.settings.place, []).append(connection)
        self._databases = {
            connection.name: database
            for group in by_place.values()
            if any(not connection.settings.read_only for connection in group)  # or there is nothing to roll back
            for database in [_Database(group, self._turns, patience)]
            for connection in group
        }

    @property
    def names(self) -> Sequence[str]:
        """The connections that are isolated: all of them, but those to databases that nobody can write to."""
        return sorted(self._databases)

    def engine(self, name: str) -> Engine:
        """Return the engine of a connection while it is isolated."""
        return self._databases[name].engine(name)

    def async_engine(self, name: str) -> AsyncEngine:
        """Return the engine by which coroutines use a connection while it is isolated."""
        return self._databases[name].async_engine(name)

    def session(self, name: str = "writer") -> Session:
        """Return a session to prepare and check with: what it flushes is committed at once, as far as the test is concerned.

        It belongs to no unit of work, and keeps nobody waiting while it is not executing a statement.
        """
        return Session(self._of(name).engine(name).execution_options(**_AT_ONCE), expire_on_commit=False)

    def async_session(self, name: str = "writer") -> AsyncSession:
        """Return the same for coroutines. It belongs to the event loop in which it is used first, which need not run yet."""
        from sqlalchemy.ext.asyncio import AsyncSession

        database = self._of(name)
        engine = cache(lambda: database.async_engine(name).sync_engine.execution_options(**_AT_ONCE))
        return AsyncSession(sync_session_class=_InItsLoop, engine=engine, expire_on_commit=False)

    def _of(self, name: str) -> _Database:
        if name not in self._databases:
            known = ", ".join(self.names) or "none"
            raise InvalidUse(f"The connection {name!r} is not isolated", f"Those that are: {known}")
        return self._databases[name]

    # -- what units of work ask

    def engine_for_unit(self, engine: Engine, terms: Terms) -> Engine:
        """Return an isolated engine as a unit of work on other terms than the usual uses it. How it is isolated from others is
        everybody's; how long it may take, the unit's branches see to.
        """
        return engine.execution_options(**{READ_ONLY: True}) if terms.read_only else engine

    def check_commit(self, connection: Connection) -> None:
        """Raise what preparing a branch would raise in its database."""
        shared = shared_by(connection.engine)
        if shared is not None:
            shared.check_deferred()

    def _units(self) -> Sequence[object]:
        """Return the unit of work that is under way here, and those around it."""
        units: list[Any] = []
        transaction = current(self._coordinator.manager)
        while transaction is not None:
            units.append(transaction)
            transaction = self._coordinator.work_of(transaction).outer
        return units

    # -- the end

    def end(self) -> list[str]:
        """Roll everything back, and say what was not as it should be."""
        under_way = self._under_way()
        for transaction in under_way:
            with suppress(Exception):  # one of coroutines that nobody here can wait for: its connections are reported, too
                transaction.abort()
        problems = [f"a unit of work is still under way, in {who}" for who in under_way.values()]
        for database in set(self._databases.values()):
            problems += database.end()
        return problems

    def _under_way(self) -> dict[Any, str]:
        """Return the transactions of the units that nobody has ended, and in whose hands they are."""
        found: dict[Any, str] = {holder.units[0]: str(holder) for holder in self._turns.holders() if holder.units}
        here = current(self._coordinator.manager)
        if here is not None:
            found.setdefault(here, str(getattr(here, "owner", "this thread")))
        return found


class _InItsLoop(Session):
    """A session that asks for its engine when it needs one: that of coroutines is one of their event loop."""

    def __init__(self, *, engine: Callable[[], Engine], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._engine = engine

    def get_bind(self, *args: Any, **arguments: Any) -> Engine:
        return self._engine()


class _Database:
    """One database of the container, with the connections that lead there."""

    def __init__(self, connections: Sequence[Isolated], turns: Turns, patience: float) -> None:
        self._connections = {connection.name: connection for connection in connections}
        writable = [connection for connection in connections if not connection.settings.read_only]
        self._root = min(writable, key=lambda connection: (not connection.settings.transactional, connection.name))
        self._turns = turns
        self._patience = patience
        self._ready: dict[SharedConnection, AbstractEventLoop | None] = {}
        self._used: SharedConnection | None = None
        self._reals: dict[AbstractEventLoop | None, Engine] = {}  # of now, even if the container is made to make new ones
        threads, coroutines = for_threads(self._root.url), for_coroutines(self._root.url)
        if not database_of(threads.get_backend_name()).has_savepoints:
            raise CannotIsolate(
                self._root.name,
                f"A database without savepoints ({threads.get_backend_name()})",
                f"Leave it out, isolated(container, connections=[...]), or give {self._root.name!r} another database in tests",
            )
        self._drivers = threads.get_driver_name(), coroutines.get_driver_name()
        self._async_view = database_of(threads.get_backend_name()).async_view(*self._drivers)

    def engine(self, name: str) -> Engine:
        real = self._real(None)
        shared = self._shared(real, None)
        if name not in shared.engines:
            shared.engines[name] = sharing_engine(shared, name, real, **self._terms(name))
        engine: Engine = shared.engines[name]
        return engine

    def async_engine(self, name: str) -> AsyncEngine:
        from sqlalchemy.ext.asyncio import AsyncEngine

        loop = None if self._async_view is not None else running_loop()
        real = self._real(loop)
        shared = self._shared(real, loop)
        key = (name, "async")
        if key not in shared.engines and self._async_view is not None:
            url = for_coroutines(real.url)
            shared.engines[key] = async_sharing_engine(shared, name, url, self._async_view, **self._terms(name))
        elif key not in shared.engines:
            shared.engines[key] = AsyncEngine(sharing_engine(shared, name, real, **self._terms(name)))
        engine: AsyncEngine = shared.engines[key]
        return engine

    def _real(self, loop: AbstractEventLoop | None) -> Engine:
        if loop not in self._reals:
            self._reals[loop] = self._root.engine() if loop is None else self._root.async_engine().sync_engine
        return self._reals[loop]

    def _terms(self, name: str) -> dict[str, bool]:
        connection = self._connections[name]
        return {"at_once": connection.at_once, "read_only": connection.settings.read_only}

    def _shared(self, real: Engine, loop: AbstractEventLoop | None) -> SharedConnection:
        shared = _shared.get(real)
        if shared is None:
            shared = _shared.setdefault(real, SharedConnection(real.dialect.name))
        if shared not in self._ready:
            shared.begin(real, self._turns, self._patience, lambda: self._claim(shared))
            self._ready[shared] = loop
        return shared

    def _claim(self, shared: SharedConnection) -> None:
        """Let only one connection to this database be opened: another one would see nothing of it, and wait for its locks."""
        if self._used not in (None, shared):
            threads, coroutines = self._drivers
            raise CannotIsolate(
                self._root.name,
                f"The use of one database by {threads} and {coroutines}, or in two event loops, in one test",
                "Let the test use one kind of session of it, in one loop, or give it a URL whose driver serves both, such as "
                "postgresql+psycopg",
            )
        self._used = shared

    def end(self) -> list[str]:
        return [problem for shared, loop in self._ready.items() for problem in _end(shared, loop)]


def _end(shared: SharedConnection, loop: AbstractEventLoop | None) -> list[str]:
    """End a shared connection in the event loop that it belongs to, if there is one."""
    here = running_loop()
    if loop is None or not shared.is_open or (in_greenlet() and here is loop):
        return shared.end()
    if loop.is_closed():
        return shared.end(answers=False)
    if not loop.is_running():
        return loop.run_until_complete(greenlet_spawn(shared.end))
    ending = asyncio.run_coroutine_threadsafe(greenlet_spawn(shared.end), loop)
    return [] if here is loop else ending.result()
