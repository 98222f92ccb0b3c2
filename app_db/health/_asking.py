"""Asks one database how it is, over a connection beside the application's pools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from app_db._compat.clocks import monotonic
from app_db._databases.engines import build_engine_beside
from app_db._databases.facts import Facts
from app_db._databases.registry import database_of
from app_db._databases.telling import described, secrets_of
from app_db._databases.time_limits import GRACE, TimeLimit
from app_db._two_phase.xids import Xid
from app_db.settings import ConnectionSettings
from app_db.settings._urls import is_memory

R = TypeVar("R")

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry


@dataclass(frozen=True)
class Target:
    """A connection of the container."""

    name: str
    connection: ConnectionSettings
    application: str
    required: bool
    own: Engine | AsyncEngine | None
    """The application's own engine, in place of app_db's."""

    @property
    def database(self) -> Hashable:
        """A value that is equal for connections that one question is enough for, such as mirrors."""
        if self.own is not None:
            return self.own
        connection, url = self.connection, self.connection.sqlalchemy_url()
        arguments = tuple(sorted((key, repr(value)) for key, value in connection.connect_args.items()))
        identity = connection.database_identity() if is_memory(url) else None
        return url, identity, arguments, connection.password_provider, connection.pooler


@dataclass(frozen=True)
class Answer:
    """What a database has answered, or why it has not."""

    facts: Facts = Facts()  # noqa: RUF009  # it is frozen
    milliseconds: float | None = None
    in_doubt: Mapping[str, float] = field(default_factory=dict)
    """By connection, the seconds since its oldest branch was prepared."""
    error: str = ""
    """Why there is no answer."""


class Source:
    """Opens connections to the database of a target, for one thread at a time.

    Nothing is set on the session, which a pooler may hand on, and a file of SQLite is not switched to WAL.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._engine: Engine | AsyncEngine | None = None
        self._seconds = 0.0
        self._limit = TimeLimit(lambda: False)

    def ask(self, seconds: float, *, prepares: bool) -> Answer:
        """Return the answer. Without one, most drivers give up soon after so many seconds. `prepares`: ask what is in doubt."""
        began = monotonic()
        in_time = True
        self._limit = TimeLimit(lambda: in_time)
        self._limit.set(seconds, began + seconds)

        def question(connection: Connection) -> tuple[Facts, dict[str, float]]:
            facts = database_of(connection.dialect.name).inspection().facts(connection)
            return facts, _ages_in_doubt(connection, self._target.application) if prepares else {}

        try:
            self._refuse_missing_file()
            engine = self._engine_for(seconds)
            if isinstance(engine, Engine):
                facts, in_doubt = _ask_in_thread(engine, question)
            else:
                facts, in_doubt = _ask_in_loop(engine, question, seconds + GRACE)
        except BaseException as error:  # noqa: BLE001  # the asking thread ends, whatever it was
            return Answer(error=described(error, self._secrets()))
        finally:
            in_time = False
        return Answer(facts, (monotonic() - began) * 1000, in_doubt, self._unnoticed_pooler(facts))

    def _engine_for(self, seconds: float) -> Engine | AsyncEngine:
        if self._engine is None or self._seconds != seconds:
            self._seconds = seconds
            self._engine = engine = self._build(seconds)
            pool = sync_engine_of(engine).pool
            event.listen(pool, "connect", self._cover, insert=True)  # before the listeners that send statements
            event.listen(pool, "close", self._release)
        return self._engine

    def _build(self, seconds: float) -> Engine | AsyncEngine:
        target, own = self._target, self._target.own
        if own is None:
            # A little later than the deadline, so that the reason does not depend on which of them is first.
            return build_engine_beside(target.name, target.connection, target.application, seconds + GRACE)
        if isinstance(own, Engine):
            return Engine(own.pool.recreate(), own.dialect, own.url)
        from sqlalchemy.ext.asyncio import AsyncEngine

        return AsyncEngine(Engine(own.sync_engine.pool.recreate(), own.dialect, own.url))

    def _cover(self, dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        engine = self._engine
        if engine is not None:
            self._limit.cover(database_of(engine.dialect.name), dbapi_connection)

    def _release(self, dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        self._limit.release(dbapi_connection)

    def _refuse_missing_file(self) -> None:
        """Raise FileNotFoundError instead of making an empty database of SQLite."""
        url = self._target.connection.sqlalchemy_url() if self._target.own is None else self._target.own.url
        file = database_of(url.get_backend_name()).file_of(url)
        if file is not None and not file.exists():
            raise FileNotFoundError(f"the file {file} does not exist")

    def _unnoticed_pooler(self, facts: Facts) -> str:
        """Return why the application can't connect if a pooler answers and the settings don't say so."""
        connection = self._target.connection
        if self._target.own is not None or not facts.pooler or connection.pooler is not None:
            return ""
        return f"a pooler stands before the server, and {connection.variable('pooler')} is not set"

    def _secrets(self) -> Iterator[str]:
        yield from secrets_of(self._target.connection)
        if self._target.own is not None and (password := self._target.own.url.password):
            yield password


def sync_engine_of(engine: Engine | AsyncEngine) -> Engine:
    """Return the engine itself, or the one below an engine for coroutines."""
    return engine if isinstance(engine, Engine) else engine.sync_engine


def _ask_in_thread(engine: Engine, question: Callable[[Connection], R]) -> R:
    try:
        with engine.connect() as connection:
            return question(connection)
    finally:
        engine.dispose()


def _ask_in_loop(engine: AsyncEngine, question: Callable[[Connection], R], seconds: float) -> R:
    """Ask by a driver for coroutines, in an event loop of this thread."""

    async def ask() -> R:
        try:
            async with asyncio.timeout(seconds), engine.connect() as connection:
                return await connection.run_sync(question)
        finally:
            await engine.dispose()

    return asyncio.run(ask())


def _ages_in_doubt(connection: Connection, application: str) -> dict[str, float]:
    """Return for each connection of the application how long ago its oldest prepared branch was prepared."""
    verbs = database_of(connection.dialect.name).prepare_verbs(connection.dialect.driver)
    ages: dict[str, float] = {}
    try:
        prepared = [] if verbs is None else verbs.prepared(connection)
    except DBAPIError:  # the user may not list them
        return ages
    for found in prepared:
        xid = Xid.parse(found.xid)
        if xid is not None and xid.application == application:
            age = max(time.time() - (found.prepared_at or xid.begun_at), 0.0)
            ages[xid.connection_name] = max(age, ages.get(xid.connection_name, 0.0))
    return ages
