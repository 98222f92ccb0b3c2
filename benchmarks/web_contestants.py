"""The web applications that `web.py` compares, each served by uvicorn or waitress in a process of
its own: `python web_contestants.py NAME PORT URL`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from flask import Flask
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db.integrations.fastapi import UnitOfWorkMiddleware, provided
from app_db.integrations.flask import AppDb

POOL = {"pool_size": 20, "max_overflow": 0}


class Base(DeclarativeBase):
    """The one model."""


class Item(Base):
    """What a request adds."""

    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def _container(url: str) -> DatabaseContainer:
    pool = {"size": POOL["pool_size"], "max_overflow": POOL["max_overflow"]}
    settings = DatabaseSettings(_env_file=None, connections={"writer": {"url": url, "pool": pool}})
    return container_of("writer")(settings=settings)


class Watch:
    """How much memory requests in flight hold, and how long the event loop stands still."""

    def __init__(self) -> None:
        self._go_on = asyncio.Event()
        self._standstill = 0.0

    async def wait(self) -> None:
        """Keep a request in flight until `go_on`."""
        await self._go_on.wait()

    async def asked(self, what: str) -> dict[str, float]:
        """Do what the benchmark asks."""
        if what == "trace":
            tracemalloc.start()
        elif what == "go-on":
            self._go_on.set()
        elif what == "watch":
            self._standstill = 0.0
            self._watching = asyncio.create_task(self._watch())
        memory = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
        return {"memory": memory, "standstill": self._standstill}

    async def _watch(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0)
            self._standstill = max(self._standstill, time.perf_counter() - before)


def fastapi_by_hand(url: str) -> Any:
    """FastAPI, with `async with sessionmaker.begin()` in the endpoint."""
    maker = async_sessionmaker(create_async_engine(url, **POOL), expire_on_commit=False)
    sync_maker = sessionmaker(create_engine(url, **POOL))
    api = _fastapi()

    @api.post("/add")
    async def add() -> dict[str, int]:
        async with maker.begin() as session:
            session.add(Item(name="a"))
        return {}

    @api.post("/add-sync")
    def add_sync() -> dict[str, int]:
        with sync_maker.begin() as session:
            session.add(Item(name="a"))
        return {}

    return api


def fastapi_with_app_db(url: str) -> Any:
    """FastAPI with the middleware."""
    container = _container(url)
    writer = container.connection("writer")
    api = _fastapi()
    api.add_middleware(UnitOfWorkMiddleware, container=container)

    async def add(session: AsyncSession) -> dict[str, int]:
        session.add(Item(name="a"))
        return {}

    def add_sync(session: Session) -> dict[str, int]:
        session.add(Item(name="a"))
        return {}

    add.__annotations__["session"] = Annotated[AsyncSession, provided(writer.async_session)]
    add_sync.__annotations__["session"] = Annotated[Session, provided(writer.session)]
    api.post("/add")(add)
    api.post("/add-sync")(add_sync)
    return api


def fastapi_by_dependency(url: str) -> Any:
    """FastAPI, with a dependency that yields a session: what most applications do."""
    maker = async_sessionmaker(create_async_engine(url, **POOL), expire_on_commit=False)
    api = _fastapi()

    async def session_of_request() -> Any:
        async with maker.begin() as session:
            yield session

    async def add(session: AsyncSession) -> dict[str, int]:
        session.add(Item(name="a"))
        return {}

    add.__annotations__["session"] = Annotated[AsyncSession, Depends(session_of_request)]
    api.post("/add")(add)
    return api


def _fastapi() -> FastAPI:
    api, watch = FastAPI(), Watch()

    @api.post("/nothing")
    async def nothing() -> dict[str, int]:
        return {}

    @api.post("/wait")
    async def wait() -> dict[str, int]:
        await watch.wait()
        return {}

    @api.post("/asked")
    async def asked(what: str) -> dict[str, float]:
        return await watch.asked(what)

    return api


def starlette_bare(url: str) -> Any:
    """Starlette."""

    async def nothing(request: Request) -> JSONResponse:
        return JSONResponse({})

    return Starlette(routes=[Route("/nothing", nothing, methods=["POST"])])


def starlette_with_app_db(url: str) -> Any:
    """Starlette with the middleware."""
    application = starlette_bare(url)
    application.add_middleware(UnitOfWorkMiddleware, container=_container(url))
    return application


def flask_by_hand(url: str) -> Any:
    """Flask, with `with sessionmaker.begin()` in the view."""
    maker = sessionmaker(create_engine(url, **POOL))
    flask = _flask()

    @flask.post("/add")
    def add() -> dict[str, int]:
        with maker.begin() as session:
            session.add(Item(name="a"))
        return {}

    return flask


def flask_with_app_db(url: str) -> Any:
    """Flask with the extension."""
    container = _container(url)
    flask = _flask()
    AppDb(container).init_app(flask)

    @flask.post("/add")
    def add() -> dict[str, int]:
        container.connection("writer").session().add(Item(name="a"))
        return {}

    return flask


def _flask() -> Flask:
    flask = Flask("contestant")

    @flask.post("/nothing")
    def nothing() -> dict[str, int]:
        return {}

    return flask


CONTESTANTS: dict[str, Callable[[str], Any]] = {
    made.__name__: made
    for made in (
        fastapi_by_hand,
        fastapi_by_dependency,
        fastapi_with_app_db,
        starlette_bare,
        starlette_with_app_db,
        flask_by_hand,
        flask_with_app_db,
    )
}


def main(name: str, port: str, url: str) -> None:
    """Serve a contestant."""
    application = CONTESTANTS[name](json.loads(url))
    if name.startswith("flask"):
        import waitress

        waitress.serve(application, host="127.0.0.1", port=int(port), threads=8)
    else:
        import uvicorn

        uvicorn.run(application, host="127.0.0.1", port=int(port), log_level="critical")


if __name__ == "__main__":
    main(*sys.argv[1:])
