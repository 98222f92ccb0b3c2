"""The application by Starlette."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from app_db.integrations.starlette import UnitOfWorkMiddleware, lifespan
from harness.applications import Application
from harness.frameworks import RAISED, Doings, Handled

PLACES = ("alone", "inside", "outside")
"""Where the middleware stands: alone, inside a BaseHTTPMiddleware, or outside of one."""


class Passing(BaseHTTPMiddleware):
    """Runs the application in a task of its own."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


def placed(app: Application, place: str = "alone", **options: Any) -> list[Middleware]:
    """Return the middleware of an application."""
    ours = Middleware(UnitOfWorkMiddleware, container=app.container, **options)
    return {"alone": [ours], "inside": [Middleware(Passing), ours], "outside": [ours, Middleware(Passing)]}[place]


def application(  # noqa: C901  # one function for each route
    doings: Doings, inner: Doings | None = None, *, place: str = "alone", **options: Any
) -> Starlette:
    async def add_async(request: Request) -> Response:
        query = request.query_params
        await doings.put_async(query["name"])
        return JSONResponse({}, int(query.get("status", "201")), {"X-Tm": query["tm"]} if "tm" in query else {})

    def add_sync(request: Request) -> Response:
        doings.put(request.query_params["name"])
        return JSONResponse({}, int(request.query_params.get("status", "201")))

    async def fail(request: Request) -> Response:
        await add_async(request)
        kind = request.query_params["kind"]
        raise HTTPException(409) if kind == "http" else RAISED[kind]

    async def redirect(request: Request) -> Response:
        await add_async(request)
        return RedirectResponse("/elsewhere", 303)

    async def doom(request: Request) -> Response:
        await add_async(request)
        doings.container.unit().doom()
        return JSONResponse({})

    async def stream(request: Request) -> Response:
        await add_async(request)

        async def parts() -> Any:
            yield "first;"
            yield await doings.refused_async()

        return StreamingResponse(parts())

    async def in_background(request: Request) -> Response:
        await add_async(request)
        return JSONResponse({}, background=BackgroundTask(doings.work_afterwards_async, request.query_params["name"]))

    async def count(request: Request) -> Response:
        body = await request.body()
        return JSONResponse({"attempts": await doings.count_async(request.query_params["name"]), "bytes": len(body)})

    async def slow(request: Request) -> Response:
        await add_async(request)
        await doings.wait_async()
        return JSONResponse({})

    async def two(request: Request) -> Response:
        await doings.put_into_two_async(request.query_params["name"])
        return JSONResponse({}, int(request.query_params.get("status", "201")))

    async def nothing(request: Request) -> Response:
        return JSONResponse({})

    async def on_handled(request: Request, error: Exception) -> Response:
        return JSONResponse({"names": await doings.names_async()}, 409)

    async def on_error(request: Request, error: Exception) -> Response:
        return JSONResponse({"handled": type(error).__name__}, 500)

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await doings.refused_async())
        async with doings.container.transaction():
            await doings.put_async("by the socket")
        await websocket.close()

    endpoints = [add_async, add_sync, fail, redirect, doom, stream, in_background, count, slow, two, nothing]
    contained = [] if inner is None else [Mount("/inner", application(inner))]
    own = lifespan(doings.container)
    return Starlette(
        routes=[
            *(Route(f"/{each.__name__.replace('_', '-')}", each, methods=["GET", "POST"]) for each in endpoints),
            WebSocketRoute("/socket", socket),
            *contained,
        ],
        middleware=placed(doings.app, place, **options),
        exception_handlers={Handled: on_handled, Exception: on_error},
        lifespan=own if inner is None else lifespan(inner.container, own),
    )
