"""The isolation of a test: each database of a container has one connection, which is rolled back at the end."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from sqlalchemy.util.concurrency import greenlet_spawn, in_greenlet

from app_db._compat.asyncio import running_loop
from app_db._units.manager import current
from app_db.errors import CannotIsolate, InvalidUse
from app_db.settings._urls import require_asyncio
from app_db.testing._serial_units import UnitLock
from app_db.testing._shared_connection import SharedConnection, shared_by
from app_db.testing._shared_engines import BESIDE, READ_ONLY, async_sharing_engine, sharing_engine

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from sqlalchemy.orm import Session
    from transaction import Transaction

    from app_db._databases.database import Terms
    from app_db._units.coordinator import Coordinator
    from app_db.testing._plans import Place

_shared: WeakKeyDictionary[Engine, SharedConnection] = WeakKeyDictionary()
"""By real engine. They last as long as that engine, so that each test finds the statements that earlier tests have compiled."""


class Isolation:
    """The isolation of a test: what `with isolated(container) as isolation:` gives.

    Its sessions prepare and check what the test is about, outside units of work.
    """

    def __init__(self, coordinator: Coordinator, places: Mapping[str, Place], patience: float) -> None:
        self._coordinator = coordinator
        self._places = places
        self._patience = patience
        self._lock = UnitLock(partial(_units_here, coordinator), patience)
        self._sessions: list[Session] = []
        self._databases: dict[Place, _Database] = {}

    @property
    def names(self) -> Sequence[str]:
        """The connections that are isolated: all of them, except those to databases without a writable connection."""
        return sorted(self._places)

    def engine(self, name: str) -> Engine:
        """Return the engine of a connection while it is isolated."""
        return self._database(name).engine(name)

    def async_engine(self, name: str) -> AsyncEngine:
        """Return the engine for coroutines of a connection while it is isolated."""
        return self._database(name).async_engine(name)

    def has(self, shared: SharedConnection) -> bool:
        """Return whether a connection is shared by engines of this isolation."""
        return any(shared in database._ready for database in self._databases.values())

    def session(self, name: str = "writer") -> Session:
        """Return a session to prepare and check with. It commits and rolls back as it would outside a test.

        It belongs to no unit of work, and makes units wait only while it executes a statement.
        Units see what it has flushed, before it commits. Commit what units shall keep: if it rolls
        back after units have committed, their work is undone with its own, and the test fails at
        its end. The isolation closes the session.

        It has the class and the arguments of the connection's sessionmaker, as the sessions of units have.

        Raises InvalidUse for a connection that is not isolated.
        """
        database = self._database(name)
        maker = database.connections[name].sessionmaker()
        session: Session = maker.class_(**{"expire_on_commit": False, **maker.kw, "bind": _beside(database.engine(name))})
        self._sessions.append(session)
        return session

    def async_session(self, name: str = "writer") -> AsyncSession:
        """Return such a session for coroutines. It belongs to the event loop of its first use, which need not run yet."""
        database = self._database(name)
        engine = cache(lambda: _beside(database.async_engine(name).sync_engine))
        maker = database.connections[name].async_sessionmaker()
        own: type[Session] = maker.kw.get("sync_session_class", maker.class_.sync_session_class)

        class SessionOfLoop(own):  # type: ignore[valid-type,misc]
            def get_bind(self, *arguments: object, **options: object) -> Engine:
                return engine()

        session: AsyncSession = maker.class_(
            **{"expire_on_commit": False, **maker.kw, "bind": None, "sync_session_class": SessionOfLoop}
        )
        self._sessions.append(session.sync_session)
        return session

    def _database(self, name: str) -> _Database:
        place = self._places.get(name)
        if place is None:
            known = ", ".join(self.names) or "none"
            raise InvalidUse(f"The connection {name!r} is not isolated", f"Those that are: {known}")
        # Another thread may make one at the same time.
        return self._databases.get(place) or self._databases.setdefault(place, _Database(place, self._lock, self._patience))

    # -- what units of work call

    def engine_for_unit(self, engine: Engine, terms: Terms) -> Engine:
        """Return an isolated engine for a unit of work on special terms. Only `read_only` has an effect.

        All units share the isolation level, and the unit's branches see to its timeout.
        """
        return engine.execution_options(**{READ_ONLY: True}) if terms.read_only else engine

    def check_commit(self, connection: Connection) -> None:
        """Raise what preparing a branch would raise in its database: violations of deferred constraints."""
        shared = shared_by(connection.engine)
        if shared is not None:
            shared.check_deferred()

    # -- the end

    def keep_for_good(self) -> bool:
        """Commit what the test has written, instead of rolling it back at the end, so that it can be looked at.

        Call it only for copies of databases, as `--app-db-keep-failed` does: in any other database the rows stay.

        Returns whether all could be committed. A connection whose event loop has ended can't be used.
        """
        committed = [database.commit() for database in set(self._databases.values())]
        return all(committed)

    def end(self) -> list[str]:
        """Roll everything back, and return a sentence for each problem."""
        under_way = self._under_way()
        for transaction in under_way:
            with suppress(Exception):  # it can't be awaited here, and its connections are reported below
                transaction.abort()
        problems = [f"a unit of work is still under way, in {place}" for place in under_way.values()]
        for database in self._databases.values():
            problems += database.end()
        for session in self._sessions:
            session.close()  # without awaiting it: there is nothing to send any more
        return problems

    def _under_way(self) -> dict[Transaction, str]:
        """Return the transactions of the units that have not ended, and where each is under way."""
        found = {holder.units[0]: str(holder) for holder in self._lock.holders() if holder.units}
        here = current(self._coordinator.manager)
        if here is not None:
            found.setdefault(here, str(getattr(here, "owner", "this thread")))
        return found


def _units_here(coordinator: Coordinator) -> Sequence[Transaction]:
    """Return the unit of work that is under way here, and the units around it."""
    units: list[Transaction] = []
    transaction = current(coordinator.manager)
    while transaction is not None:
        units.append(transaction)
        transaction = coordinator.work_of(transaction).outer
    return units


def _beside(engine: Engine) -> Engine:
    return engine.execution_options(**{BESIDE: True})


class _Database:
    """One database of the container, and the connections to it."""

    def __init__(self, place: Place, lock: UnitLock, patience: float) -> None:
        self.connections = place.connections
        self._root = place.root
        self._drivers = place.drivers
        self._async_view = place.async_view
        self._lock = lock
        self._patience = patience
        self._ready: dict[SharedConnection, AbstractEventLoop | None] = {}
        self._used: SharedConnection | None = None
        self._reals: dict[AbstractEventLoop | None, Engine] = {}  # kept, because `reset_singletons()` in a test makes new ones

    def engine(self, name: str) -> Engine:
        real = self._real(None)
        shared = self._shared(real, None)
        if name not in shared.engines:
            shared.engines[name] = sharing_engine(shared, self.connections[name], real)
        return shared.engines[name]

    def async_engine(self, name: str) -> AsyncEngine:
        require_asyncio()
        from sqlalchemy.ext.asyncio import AsyncEngine

        loop = None if self._async_view is not None else running_loop()
        real = self._real(loop)
        shared = self._shared(real, loop)
        if name not in shared.async_engines:
            connection = self.connections[name]
            if self._async_view is not None:
                made = async_sharing_engine(shared, connection, real, self._async_view)
            else:
                made = AsyncEngine(sharing_engine(shared, connection, real))
            shared.async_engines[name] = made
        return shared.async_engines[name]

    def _real(self, loop: AbstractEventLoop | None) -> Engine:
        if loop not in self._reals:
            self._reals[loop] = self._root.engine() if loop is None else self._root.async_engine().sync_engine
        return self._reals[loop]

    def _shared(self, real: Engine, loop: AbstractEventLoop | None) -> SharedConnection:
        shared = _shared.get(real)
        if shared is None:
            shared = _shared.setdefault(real, SharedConnection(real.dialect.name))
        if shared not in self._ready:
            shared.begin(real, self._lock, self._patience, lambda: self._claim(shared))
            self._ready[shared] = loop
        return shared

    def _claim(self, shared: SharedConnection) -> None:
        """Refuse a second connection to this database: it would not see what the first wrote, and would wait for its locks."""
        if self._used not in (None, shared):
            threads, coroutines = self._drivers
            raise CannotIsolate(
                self._root.name,
                f"The use of one database by {threads} and {coroutines}, or in two event loops, in one test",
                "Let the test use one kind of session of it, in one loop, or give it a URL whose driver serves both, such as "
                "postgresql+psycopg",
            )
        self._used = shared

    def commit(self) -> bool:
        committed = [_commit(shared, loop) for shared, loop in self._ready.items() if shared.is_open]
        return all(committed)

    def end(self) -> list[str]:
        return [problem for shared, loop in self._ready.items() for problem in _end(shared, loop)]


def _commit(shared: SharedConnection, loop: AbstractEventLoop | None) -> bool:
    """Commit a shared connection, in the event loop that it belongs to if there is one. Return whether that was possible."""
    if loop is None:
        shared.dbapi_connection().commit()
        return True
    if loop.is_closed() or loop.is_running():
        return False
    loop.run_until_complete(greenlet_spawn(lambda: shared.dbapi_connection().commit()))
    return True


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
