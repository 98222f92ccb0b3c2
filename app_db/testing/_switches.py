"""Switches for tests: everything rolled back, other settings for a while, throw-away databases, hooks that are only noted.

They are context managers, for every test runner. Under pytest they are fixtures, too.
"""

from __future__ import annotations

import logging
import unittest
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, ClassVar

from dependency_injector import providers
from sqlalchemy import Engine, Table, inspect

from app_db._liveness import WithBlock
from app_db._units.hooks import CapturedHooks
from app_db._units.manager import current
from app_db._wording import did_you_mean
from app_db.container import Connection, DatabaseContainer
from app_db.errors import ConnectionNotConfigured, InvalidUse, IsolationBroken
from app_db.models._schema import own_tables, writable
from app_db.settings import DatabaseSettings
from app_db.testing._isolation import Isolated, Isolation
from app_db.testing._overrides import Override
from app_db.testing._throw_away import ThrowAway
from app_db.testing._worker_databases import WorkerDatabases

_log = logging.getLogger("app_db")


class isolated(WithBlock):  # noqa: N801  # used like a function
    """Roll back at the end what is written in the block, on every connection of a container, whoever commits it.

    Within it each database has one connection, in one transaction, that all sessions share: those of threads and of coroutines,
    and those of connections that lead to the same database. Units of work commit, abort, nest, and are tried again as they are
    outside; what they have committed, later ones see. They run one after the other; one that waits for another one longer than
    `patience` seconds raises IsolationTimeout. `connections` names those to isolate, if not all.

    What was left open, or could not be kept apart, is raised as IsolationBroken at the end of a block that raised nothing.
    In a coroutine it is `async with`. Inside another one it undoes its own part only.

    >>> from app_db import Container, DatabaseSettings
    >>> from app_db.testing._switches import isolated
    >>> from sqlalchemy import text
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> with container.transaction():
    ...     _ = container.writer_session().execute(text("CREATE TABLE items (id INTEGER PRIMARY KEY)"))
    >>> with isolated(container) as isolation:
    ...     with container.transaction():
    ...         _ = container.writer_session().execute(text("INSERT INTO items VALUES (1)"))
    ...     with isolation.session("writer") as session:
    ...         session.scalar(text("SELECT count(*) FROM items"))
    1
    >>> with container.transaction():
    ...     container.writer_session().scalar(text("SELECT count(*) FROM items"))
    0
    """

    def __init__(
        self, container: DatabaseContainer, connections: Collection[str] | None = None, *, patience: float = 5.0
    ) -> None:
        self._container: Any = container
        self._patience = patience
        self._connections = _connections_of(container, connections)
        self._stack = ExitStack()
        self._isolation: Isolation | None = None

    def __enter__(self) -> Isolation:
        coordinator = self._container.core.coordinator()
        if self._isolation is not None or current(coordinator.manager) is not None:
            raise InvalidUse("A test is isolated before its first unit of work, and once", "Put `isolated(...)` around the unit")
        self._liveness = self.liveness_to_enter()
        self._liveness.torn = self
        isolation = self._isolation = Isolation(coordinator, self._configured(), self._patience)
        for name in isolation.names:
            connection = self._connections[name]
            self._stack.enter_context(_overriding(connection.engine, partial(isolation.engine, name)))
            self._stack.enter_context(_overriding(connection.async_engine, partial(isolation.async_engine, name)))
        self._stack.callback(setattr, coordinator, "rehearsal", coordinator.rehearsal)
        coordinator.rehearsal = isolation
        return isolation

    def _leave(self, error: BaseException | None) -> None:
        problems = self._end()
        self._liveness.torn = None
        if error is None and problems:
            raise IsolationBroken(problems)
        if error is not None:
            for problem in problems:
                error.add_note(f"app_db: {problem}")

    def _end(self) -> list[str]:
        isolation, self._isolation = self._isolation, None
        try:
            return [] if isolation is None else isolation.end()
        finally:
            self._stack.close()

    def torn_down(self) -> None:
        """End the isolation, whose `with` statement is gone without having left it."""
        for problem in self._end():
            _log.warning("An isolated test was torn down: %s", problem)

    async def __aenter__(self) -> Isolation:
        return self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        from app_db._units.to_the_end import to_the_end

        await to_the_end(self._leave, error)

    def _configured(self) -> Iterator[Isolated]:
        settings = self._container.settings()
        for name, connection in self._connections.items():
            with suppress(ConnectionNotConfigured):  # nor does it matter to the application until somebody uses it
                engines = _unless_overridden(connection.engine), _unless_overridden(connection.async_engine)
                yield Isolated(name, settings.connection(name), *engines)


def _connections_of(container: Any, names: Collection[str] | None) -> dict[str, Any]:
    """Return the connections of a container, or those that are named."""
    connections = {name: provider for name, provider in container.providers.items() if isinstance(provider, Connection)}
    for name in names or ():
        if name not in connections:
            advice = f"{did_you_mean(name, connections)} The connections are {', '.join(connections)}".lstrip()
            raise InvalidUse(f"There is no connection {name!r} to isolate", advice)
    return {name: provider.container for name, provider in connections.items() if names is None or name in names}


def _unless_overridden(provider: Any) -> Any:
    """Return what gives what a provider gives now, whatever will override it."""
    return provider.overridden[-1] if provider.overridden else provider.own


def _overriding(provider: Any, function: Any) -> Any:
    return provider.override(providers.Callable(function))


# ---- other databases ---------------------------------------------------------------------------------------------------


def overridden(container: DatabaseContainer, settings: DatabaseSettings | Mapping[str, str]) -> Override:
    """Give a container other settings for the length of a `with` or `async with` block, and give the block those settings.

    Engines, makers and sessions, for threads and for coroutines, follow at once, whatever existed before or was overridden; and
    at the end of the block everything is as it was, the same objects as before, and what was made in the meantime is disposed.
    A unit of work that is under way keeps the sessions that it has. If the container class has a settings provider of its own,
    `reset_singletons()` in the block resets that, too.

    `settings` may be a mapping of connections to URLs. Then only the databases of those connections are replaced, and how they
    are used stays as it is. A wrong name or URL is a SettingsError, and changes nothing.

    >>> from app_db import Container, DatabaseSettings
    >>> from app_db.testing._switches import overridden
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite:///shop.db"}}))
    >>> with overridden(container, {"writer": "sqlite:///other.db"}):
    ...     container.writer_engine().url.database
    'other.db'
    >>> container.writer_engine().url.database
    'shop.db'
    """
    return Override(container, settings)


def sqlite(container: DatabaseContainer) -> Override:
    """Give a container throw-away SQLite databases for the length of a `with` or `async with` block.

    Every connection gets a file of its own, which is removed afterwards. Mirrors stay mirrors; a read-only connection to the
    database of a writable one becomes a mirror of that, and a read-only `reader` one of `writer`. Read-only and autonomous
    connections stay what they are.

    SQLite can't prepare: connections that are two-phase are not, then, and atomicity becomes `best_effort`, so that units that
    write to several of them run; they commit one after the other. Isolation levels that SQLite does not have, and what is
    said to a driver or about connections that idle, are left out.

    >>> from app_db import Container, DatabaseSettings
    >>> from app_db.testing._switches import sqlite
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "postgresql://shop@db/shop"}}))
    >>> with sqlite(container):
    ...     container.writer_engine().name
    'sqlite'
    """
    return ThrowAway(container)


def worker_databases(container: DatabaseContainer, worker: str) -> WorkerDatabases:
    """Give a container databases of one worker's own, for tests that run in several processes at the same time.

    Within the `with` block, the database of every writable connection is called `<database>_<worker>`. It is made if it is not
    there, and dropped at the end. Mirrors, and read-only connections to the same database, follow.
    """
    return WorkerDatabases(container, worker)


@contextmanager
def made_tables(container: DatabaseContainer) -> Generator[frozenset[str]]:
    """Make the tables of the models for the length of the block, and give it the names of the connections that had none before.

    Only the tables of those are dropped again.
    """
    names = [name for name in writable(container, ()) if not _has_some(container.providers[f"{name}_engine"](), own_tables(name))]
    container.create_all()
    try:
        yield frozenset(names)
    finally:
        for name in reversed(names):
            container.drop_all(name)


def _has_some(engine: Engine, tables: Sequence[Table]) -> bool:
    inspector = inspect(engine)
    return any(inspector.has_table(table.name, schema=table.schema) for table in tables)


# ---- hooks -------------------------------------------------------------------------------------------------------------


@contextmanager
def captured_hooks(container: DatabaseContainer) -> Generator[CapturedHooks]:
    """Note what units of work would call after they have committed, and don't call it: a list of CapturedHook.

    Hooks of units that abort, or of savepoints that are rolled back, are not in it. `run()` of the list calls them,
    and `await run_awaited()` does in coroutines.

    >>> from app_db import Container, DatabaseSettings
    >>> from app_db.testing._switches import captured_hooks
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> told = []
    >>> with captured_hooks(container) as hooks, container.transaction() as unit:
    ...     unit.on_commit(told.append, "A-1")
    >>> hooks
    [list.append('A-1')]
    >>> hooks.run()
    >>> told
    ['A-1']
    """
    captures = container.core.coordinator().captures
    hooks = CapturedHooks()
    captures.append(hooks)
    try:
        yield hooks
    finally:
        captures[:] = [other for other in captures if other is not hooks]


# ---- unittest ---------------------------------------------------------------------------------------------------------


class IsolatedTestCase(unittest.TestCase):
    """A test case whose tests are isolated: `class TestOrders(IsolatedTestCase)`, with the container in `container`.

    With coroutines it is `class TestOrders(IsolatedTestCase, IsolatedAsyncioTestCase)`. Each test has `self.isolation`, whose
    `session()` prepares and checks. A `setUp` of its own begins with `super().setUp()`.
    """

    container: ClassVar[DatabaseContainer]
    connections: ClassVar[Collection[str] | None] = None
    """Those to isolate, if not all."""
    isolation: Isolation

    def setUp(self) -> None:
        super().setUp()
        container = getattr(type(self), "container", None)
        if container is None:
            raise InvalidUse(
                f"{type(self).__name__} has no container to isolate",
                "Write `container = container`, your application's, in the class",
            )
        self.isolation = self.enterContext(isolated(container, self.connections))
