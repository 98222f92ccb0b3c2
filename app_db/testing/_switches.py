"""The context managers of `app_db.testing`."""

from __future__ import annotations

import logging
import unittest
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar, TypeVar

from app_db._liveness import WithBlock
from app_db._units.hooks import CapturedHooks
from app_db._units.manager import current
from app_db.container import DatabaseContainer
from app_db.errors import InvalidUse, IsolationBroken
from app_db.settings import DatabaseSettings
from app_db.testing._fresh import FreshDatabases
from app_db.testing._isolation import Isolation
from app_db.testing._overrides import Override
from app_db.testing._plans import Plan, named_connections, plan_for
from app_db.testing._runner import runner
from app_db.testing._throw_away import ThrowAway
from app_db.testing._worker_databases import WorkerDatabases

_log = logging.getLogger("app_db")

T = TypeVar("T")


class isolated(WithBlock):  # noqa: N801  # used like a function
    """Roll back, at the end of the block, what it wrote to the databases of a container, although the code in it commits.

    In the block each database has one connection, in one transaction, that all sessions share:
    those of threads and of coroutines, and those of all connections to that database. Units of work
    commit, abort, nest and are retried as usual, and later units see what was committed. Units run
    one after the other. A block inside another one rolls back its own part only. For coroutines
    there is `async with`.

    `connections` names the connections to isolate, with all other connections to their databases;
    without it, all are isolated. `patience` is how long a unit waits for another one, in seconds.

    The block gives an `Isolation`. Raises InvalidUse inside a unit of work, IsolationTimeout in a
    unit that waited too long, and IsolationBroken at the end of a block that left something open or
    could not be isolated completely. If the block itself raised an error, the problems are notes of
    that error.

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
        self._container = container
        self._patience = patience
        self._connections = connections
        if connections is not None:
            named_connections(container, connections)  # now, where the names were written
        self._plan: Plan | None = None
        self._isolation: Isolation | None = None

    def __enter__(self) -> Isolation:
        coordinator = self._container.core.coordinator()
        if self._plan is not None or current(coordinator.manager) is not None:
            raise InvalidUse("A test is isolated before its first unit of work, and once", "Put `isolated(...)` around the unit")
        self._liveness = self.liveness_to_enter()
        self._liveness.torn = self
        self._rehearsal = coordinator.rehearsal
        self._plan = plan_for(self._container, self._connections)
        isolation = self._isolation = Isolation(coordinator, self._plan.places, self._patience)
        self._plan.begin(isolation)
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
        plan, self._plan = self._plan, None
        isolation, self._isolation = self._isolation, None
        try:
            return [] if isolation is None else isolation.end()
        finally:
            if plan is not None:
                plan.end()
                self._container.core.coordinator().rehearsal = self._rehearsal

    def torn_down(self) -> None:
        """End the isolation: an exception removed its `with` statement before `__exit__` could run."""
        for problem in self._end():
            _log.warning("An isolated test was torn down: %s", problem)

    async def __aenter__(self) -> Isolation:
        return self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        from app_db._units.to_the_end import to_the_end

        await to_the_end(self._leave, error)


# ---- other databases ---------------------------------------------------------------------------------------------------


def overridden(container: DatabaseContainer, settings: DatabaseSettings | Mapping[str, str]) -> Override:
    """Give a container other settings for the length of a `with` or `async with` block. The block gives those settings.

    The container makes new engines, sessionmakers and sessions from them, without its overrides. At
    the end of the block it has its own objects and overrides back, and the engines of the block are
    disposed. A unit of work that is under way keeps the sessions that it has. If the container
    class has a settings provider of its own, `reset_singletons()` in the block resets that, too.

    `settings` may be a mapping of connections to URLs. It replaces only the databases of those
    connections, and keeps how they are used. Raises SettingsError for an unknown name or a wrong
    URL, and changes nothing then.

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

    Every connection gets a file of its own, with the tables of its models. The files are removed at
    the end. Mirrors stay mirrors. A read-only connection to the database of a writable one becomes
    a mirror of that, and a read-only `reader` a mirror of `writer`. Read-only and autonomous
    connections stay what they are.

    SQLite can't prepare transactions. If a connection is two-phase, no connection is in the block,
    and atomicity becomes `best_effort`: units that write to several connections commit one after
    the other. Isolation levels that SQLite does not have are left out, and so are driver arguments
    and the settings for idle connections.

    >>> from app_db import Container, DatabaseSettings
    >>> from app_db.testing._switches import sqlite
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "postgresql://shop@db/shop"}}))
    >>> with sqlite(container):
    ...     container.writer_engine().name
    'sqlite'
    """
    return ThrowAway(container)


def worker_databases(container: DatabaseContainer, worker: str) -> WorkerDatabases:
    """Give a container the databases of one worker, for tests that run in several processes at the same time.

    In the `with` block, the database of every writable connection is called `<database>_<worker>`.
    It is created if it does not exist, and dropped at the end. Mirrors and read-only connections to
    the same database use it as well. Raises CannotMakeDatabase.
    """
    return WorkerDatabases(container, worker)


def fresh_databases(container: DatabaseContainer, *, name: str = "fresh") -> FreshDatabases:
    """Give a container copies of its databases for the length of a `with` or `async with` block, for what isolation can't show.

    A copy has the tables, and the rows that are committed. Units of work in the block commit to the
    copies, by as many connections as they like. The copies are dropped at the end. Mirrors and
    read-only connections to the same database use the copy as well. A database that no connection
    can write to is not copied.

    A copy is called `<database>_<name>`. With `kept = True` on the object that this returns, the
    copies stay at the end, until the next copies with that name are made.

    On PostgreSQL, no other program may be connected to the databases while they are copied. In
    `kept_templates(container)` that is so only at the first copy. Raises CannotMakeDatabase,
    InvalidUse in an isolated test, and IsolationBroken at the end if a unit of work is under way.

    >>> from app_db import Container, DatabaseSettings
    >>> from app_db.testing._switches import fresh_databases
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite:///shop.db"}}))
    >>> with fresh_databases(container):
    ...     container.writer_engine().url.database
    'shop_fresh.db'
    """
    return FreshDatabases(container, name)


# ---- hooks -------------------------------------------------------------------------------------------------------------


@contextmanager
def captured_hooks(container: DatabaseContainer) -> Generator[CapturedHooks]:
    """Collect the on-commit hooks of the units in the block instead of calling them. It gives the list, of CapturedHook.

    Hooks of units that abort, or of savepoints that are rolled back, are not in the list. `run()`
    of the list calls them; in coroutines `await run_awaited()` does.

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
    """A test case whose tests are isolated.

    For tests that are coroutines, derive from IsolatedAsyncioTestCase too, after this class. A
    `setUp` of a subclass begins with `super().setUp()`.

        class TestOrders(IsolatedTestCase):
            container = container  # your application's

            def test_an_order_is_placed(self) -> None:
                place_order("A-1")
                self.isolation.session().scalars(select(Order)).one()
    """

    container: ClassVar[DatabaseContainer]
    """The container whose databases are isolated."""
    connections: ClassVar[Collection[str] | None] = None
    """The connections to isolate, with the others to their databases; None for all."""
    isolation: Isolation
    """The isolation of the test that runs."""

    def setUp(self) -> None:
        super().setUp()
        container = getattr(type(self), "container", None)
        if container is None:
            raise InvalidUse(
                f"{type(self).__name__} has no container to isolate",
                "Write `container = container`, your application's, in the class",
            )
        runner().prepare_case(container)
        self.isolation = self.enterContext(isolated(container, self.connections))
