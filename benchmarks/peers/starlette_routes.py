"""The routes of every program for Starlette."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from shared import COLLISION, PLACE, Boom, Handled, Item, is_first_try
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

gate = asyncio.Event()


async def passed() -> None:
    """Wait until the gate opens."""
    gate.clear()
    await gate.wait()


async def parts(*, waits: bool) -> AsyncIterator[str]:
    """Return the parts of a stream."""
    yield "first"
    if waits:
        await passed()
    yield "second"


class Passing(BaseHTTPMiddleware):
    """Does nothing, in the way of BaseHTTPMiddleware: it runs the application in another task."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        """Pass a request on."""
        return await call_next(request)


def inside() -> list[Middleware]:
    """Return the middleware that stands inside of the peer's."""
    return [Middleware(Passing)] if PLACE == "inside" else []


def handlers(session_of: Callable[[Request], Awaitable[AsyncSession]]) -> dict[Any, Any]:
    """Return the application's handler of errors, which reads."""

    async def on_handled(request: Request, error: Exception) -> Response:
        session = await session_of(request)
        names = (await session.scalars(select(Item.name))).all()
        return JSONResponse({"names": len(names)}, 409)

    return {Handled: on_handled}


def routes(  # noqa: C901  # one function for each route
    session_of: Callable[[Request], Awaitable[AsyncSession]],
    sync_session_of: Callable[[Request], Session] | None = None,
    doom: Callable[[], object] | None = None,
) -> list[Route]:
    """Return the routes besides `/place` and `/both`. `doom` is the peer's way to have a request not commit."""

    async def added(request: Request) -> AsyncSession:
        session = await session_of(request)
        session.add(Item(name=request.query_params["name"]))
        return session

    async def add(request: Request) -> Response:
        await added(request)
        headers = {"X-Tm": request.query_params["tm"]} if "tm" in request.query_params else {}
        return JSONResponse({}, int(request.query_params.get("status", "201")), headers)

    def add_sync(request: Request) -> Response:
        assert sync_session_of is not None
        sync_session_of(request).add(Item(name=request.query_params["name"]))
        return JSONResponse({}, 201)

    async def fail(request: Request) -> Response:
        await (await added(request)).flush()
        if request.query_params["kind"] == "http":
            raise HTTPException(409)
        raise {"boom": Boom, "handled": Handled}[request.query_params["kind"]]

    async def redirect(request: Request) -> Response:
        await added(request)
        return RedirectResponse("/nothing", 303)

    async def veto(request: Request) -> Response:
        session = await added(request)
        await session.flush()
        if doom is not None:
            doom()
        else:
            await session.rollback()
        return JSONResponse({})

    async def stream(request: Request) -> Response:
        await added(request)
        return StreamingResponse(parts(waits="free" not in request.query_params), 201)

    async def in_background(request: Request) -> Response:
        await added(request)
        return JSONResponse({}, 201, background=None if "free" in request.query_params else BackgroundTask(passed))

    async def wait(request: Request) -> Response:
        await (await added(request)).flush()
        await passed()
        return JSONResponse({}, 201)

    async def retry(request: Request) -> Response:
        name = (await request.json())["name"]
        session = await session_of(request)
        if is_first_try(name):
            await session.execute(text(COLLISION))
        session.add(Item(name=name))
        return JSONResponse({}, 201)

    async def nothing(request: Request) -> Response:
        return JSONResponse({})

    async def release(request: Request) -> Response:
        gate.set()
        return JSONResponse({})

    endpoints = [add, add_sync, fail, redirect, veto, stream, in_background, wait, retry, nothing, release]
    methods = ["GET", "POST"]
    return [Route(f"/{endpoint.__name__.replace('_', '-')}", endpoint, methods=methods) for endpoint in endpoints]
