"""The routes of every program for FastAPI. FastAPI has to find the types of the endpoints, so annotations are no strings."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, BackgroundTasks, Body, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from shared import COLLISION, Boom, Handled, Item, is_first_try
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette_routes import gate, parts, passed


def add_handler(app: FastAPI, session_of: Callable[[Request], Awaitable[AsyncSession]]) -> None:
    """Add the application's handler of errors, which reads."""

    @app.exception_handler(Handled)
    async def on_handled(request: Request, error: Exception) -> Response:
        session = await session_of(request)
        names = (await session.scalars(select(Item.name))).all()
        return JSONResponse({"names": len(names)}, 409)


def add_simple_handler(app: FastAPI) -> None:
    """Add a handler of errors that does not read, where the peer offers it no session."""

    @app.exception_handler(Handled)
    async def on_handled(request: Request, error: Exception) -> Response:
        return JSONResponse({}, 409)


def add_routes(  # noqa: C901  # one function for each route
    router: APIRouter | FastAPI,
    Writer: Any,  # noqa: N803  # a type
    SyncWriter: Any,  # noqa: N803
    doom: Callable[[], object] | None = None,
) -> None:
    """Add the routes besides `/place` and `/both`.

    `Writer` and `SyncWriter` are the types of injected sessions, `doom` is the peer's way to have a request not commit.
    """

    @router.post("/add", status_code=201)
    async def add(session: Writer, name: str, response: Response, status: int = 201, tm: str = "") -> dict[str, str]:
        session.add(Item(name=name))
        response.status_code = status
        if tm:
            response.headers["X-Tm"] = tm
        return {}

    @router.post("/add-sync", status_code=201)
    def add_sync(session: SyncWriter, name: str) -> dict[str, str]:
        session.add(Item(name=name))
        return {}

    @router.post("/fail")
    async def fail(session: Writer, name: str, kind: str) -> None:
        session.add(Item(name=name))
        await session.flush()
        if kind == "http":
            raise HTTPException(409)
        raise {"boom": Boom, "handled": Handled}[kind]

    @router.post("/redirect")
    async def redirect(session: Writer, name: str) -> RedirectResponse:
        session.add(Item(name=name))
        return RedirectResponse("/nothing", 303)

    @router.post("/veto")
    async def veto(session: Writer, name: str) -> dict[str, str]:
        session.add(Item(name=name))
        await session.flush()
        if doom is not None:
            doom()
        else:
            await session.rollback()
        return {}

    @router.post("/stream")
    async def stream(session: Writer, name: str, free: str = "") -> StreamingResponse:
        session.add(Item(name=name))
        return StreamingResponse(parts(waits=not free), 201)

    @router.post("/in-background", status_code=201)
    async def in_background(session: Writer, name: str, tasks: BackgroundTasks, free: str = "") -> dict[str, str]:
        session.add(Item(name=name))
        if not free:
            tasks.add_task(passed)
        return {}

    @router.post("/wait", status_code=201)
    async def wait(session: Writer, name: str) -> dict[str, str]:
        session.add(Item(name=name))
        await session.flush()
        await passed()
        return {}

    @router.post("/retry", status_code=201)
    async def retry(session: Writer, name: str = Body(embed=True)) -> dict[str, str]:
        if is_first_try(name):
            await session.execute(text(COLLISION))
        session.add(Item(name=name))
        return {}

    @router.get("/nothing")
    async def nothing() -> dict[str, str]:
        await asyncio.sleep(0)
        return {}

    @router.post("/release")
    async def release() -> dict[str, str]:
        gate.set()
        return {}
