"""The same application by every web framework, each written as its framework's documentation does it.

| route (POST) | what it does |
|---|---|
| `/add-sync`, `/add-async` | adds an item, and answers with `status` and the header `X-Tm: tm` |
| `/fail` | adds an item and raises: `kind` is "boom", "handled" or "http", the framework's own error for 409 |
| `/redirect`, `/doom`, `/stream`, `/in-background` | adds an item, and does that |
| `/count` | fails by a serialization failure once; answers with the number of attempts and of bytes in the body |
| `/slow` | adds an item, and waits in the database for `LOCK` |
| `/two` | adds an item to the database of another container as well |
| `/nothing` | touches no session |
| `/inner/...` | is another application with a container of its own |
| `/socket` | a web socket: says what a session says there, and adds an item in a unit of its own |

An item is added to every connection of the container. The handler of `Handled` reads, that of all other errors names the error.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from sqlalchemy import select, text

from app_db.errors import NoUnitOfWork
from harness.applications import DEFER_UNIQUENESS, Application, Boom, Item

LOCK = 15_001
"""The advisory lock for which `/slow` waits."""

COMMIT_LOCK = 15_002
"""The advisory lock for which the COMMIT of an item waits whose name begins with "waits"."""

SET_UP = (
    *DEFER_UNIQUENESS,
    "INSERT INTO items (name) VALUES ('counted')",
    f"""
    CREATE FUNCTION wait_in_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.name LIKE 'waits%%' THEN PERFORM pg_advisory_xact_lock({COMMIT_LOCK}); END IF; RETURN NULL;
    END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION wait_in_commit()
    """,
)
"""What each database of such an application needs: two items that are there, and a COMMIT that can fail or wait."""

THERE = ("counted", "taken")


class Handled(Exception):
    """An error that the application has a handler for."""


RAISED: dict[str, type[Exception]] = {"boom": Boom, "handled": Handled}

NAMES = select(Item.name).order_by(Item.name)


class Doings:
    """What the routes of all frameworks do, by threads and by coroutines."""

    def __init__(self, app: Application, other: Application | None = None) -> None:
        self.app = app
        self.container = app.container
        self.other = other
        self._attempts: Counter[str] = Counter()

    # ---- by threads

    def put(self, name: str) -> None:
        """Add an item to every database."""
        for connection in self.app.connections:
            self.app.container.connection(connection).session().add(Item(name=name))

    def names(self) -> list[str]:
        return list(self.container.connection("writer").session().scalars(NAMES))

    def count(self, name: str) -> int:
        """Fail by a serialization failure at the first attempt. Return the number of attempts."""
        session = self.container.connection("writer").session()
        for statement in self._before():
            session.execute(text(statement))
        self._overtake(name)
        session.execute(text(WRITE))
        self.put(name)
        return self._attempts[name]

    def wait(self) -> None:
        session = self.container.connection("writer").session()
        session.flush()
        session.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))

    def put_into_two(self, name: str) -> None:
        self.put(name)
        assert self.other is not None
        self.other.container.connection("writer").session().add(Item(name=name))

    def refused(self) -> str:
        """Return what a session says where there is no unit of work."""
        try:
            self.container.connection("writer").session()
        except NoUnitOfWork as error:
            return error.message
        return "there is a unit of work"

    def work_afterwards(self, name: str) -> None:
        said = self.refused()
        with self.container.transaction():
            self.put(f"after {name}: {'begin another' if 'with container.transaction():' in said else said}"[:50])

    # ---- by coroutines

    async def put_async(self, name: str) -> None:
        for connection in self.app.connections:
            self.app.container.connection(connection).async_session().add(Item(name=name))

    async def names_async(self) -> list[str]:
        return list(await self.container.connection("writer").async_session().scalars(NAMES))

    async def count_async(self, name: str) -> int:
        session = self.container.connection("writer").async_session()
        for statement in self._before():
            await session.execute(text(statement))
        await asyncio.to_thread(self._overtake, name)
        await session.execute(text(WRITE))
        await self.put_async(name)
        return self._attempts[name]

    async def wait_async(self) -> None:
        session = self.container.connection("writer").async_session()
        await session.flush()
        await session.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))

    async def put_into_two_async(self, name: str) -> None:
        await self.put_async(name)
        assert self.other is not None
        self.other.container.connection("writer").async_session().add(Item(name=name))

    async def refused_async(self) -> str:
        try:
            self.container.connection("writer").async_session()
        except NoUnitOfWork as error:
            return error.message
        return "there is a unit of work"

    async def work_afterwards_async(self, name: str) -> None:
        said = await self.refused_async()
        async with self.container.transaction():
            await self.put_async(f"after {name}: {'begin another' if 'with container.transaction():' in said else said}"[:50])

    # ---- both

    def _before(self) -> tuple[str, ...]:
        return "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT count(*) FROM items"

    def _overtake(self, name: str) -> None:
        self._attempts[name] += 1
        if self._attempts[name] == 1:
            self.app.run(WRITE)


WRITE = "UPDATE items SET name = name WHERE name = 'counted'"


@dataclass(frozen=True)
class Framework:
    """One of the frameworks, in one way to set it up."""

    module: str
    interface: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Cases that the framework can't have, and why."""

    def application(self, doings: Doings, inner: Doings | None, **options: Any) -> Any:
        """Return the application. `inner` is what the application that it contains does."""
        build: Callable[..., Any] = import_module(f"harness.frameworks.{self.module}").application
        return build(doings, inner, **self.options, **options)


_NO_COROUTINES = {"async endpoint": "Pyramid has no coroutines"}
_WSGI = {
    "web socket": "WSGI has none",
    "the client goes during the request": "a WSGI application is not told that its client has gone",
}
_QUART = {
    "the handler of errors": "Quart has made its response before the COMMIT",
    "a serialization failure": "Quart answers for the errors of its views itself. One of a COMMIT is repeated",
}
_AGAIN: dict[str, Any] = {"attempts": 3}

FRAMEWORKS: dict[str, Framework] = {
    "Starlette": Framework("starlette", "asgi", _AGAIN),
    "Starlette, inside BaseHTTPMiddleware": Framework("starlette", "asgi", {"place": "inside", **_AGAIN}),
    "Starlette, outside BaseHTTPMiddleware": Framework("starlette", "asgi", {"place": "outside", **_AGAIN}),
    "FastAPI": Framework("fastapi", "asgi", _AGAIN),
    "FastAPI, inside BaseHTTPMiddleware": Framework("fastapi", "asgi", {"place": "inside", **_AGAIN}),
    "FastAPI, outside BaseHTTPMiddleware": Framework("fastapi", "asgi", {"place": "outside", **_AGAIN}),
    "Litestar": Framework("litestar", "asgi", _AGAIN),
    "Quart": Framework("quart", "asgi", _AGAIN, _QUART),
    "aiohttp": Framework("aiohttp", "aiohttp", _AGAIN, {"sync endpoint": "aiohttp has coroutines only"}),
    "Flask": Framework("flask", "wsgi", _AGAIN, _WSGI),
    "Pyramid": Framework("pyramid", "wsgi", {"tm": False, **_AGAIN}, {**_WSGI, **_NO_COROUTINES}),
    "Pyramid with pyramid_tm": Framework("pyramid", "wsgi", {"tm": True, **_AGAIN}, {**_WSGI, **_NO_COROUTINES}),
}
