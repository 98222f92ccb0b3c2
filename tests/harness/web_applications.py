"""The same routes by several ASGI frameworks, each written as its framework's documentation does it.

FastAPI has to find the types of the endpoints, which are local here. So annotations are no strings.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
from fastapi import BackgroundTasks, FastAPI, HTTPException, Response
from fastapi.responses import JSONResponse as FastJSONResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, StreamingResponse
from starlette.responses import Response as StarletteResponse
from starlette.routing import Route

from app_db.errors import NoUnitOfWork
from app_db.integrations.fastapi import UnitOfWorkMiddleware, lifespan, provided
from harness.applications import DEFER_UNIQUENESS, Application, Boom, Item, running
from harness.webs import client, serving


class Handled(Exception):
    """An error that the application has a handler for."""


RAISED: dict[str, type[Exception]] = {"boom": Boom, "handled": Handled}


class Passing(BaseHTTPMiddleware):
    """Runs the application in a task of its own."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> StarletteResponse:
        return await call_next(request)


class Seen:
    """What happened on the side of the server."""

    def __init__(self) -> None:
        self.without_unit: list[NoUnitOfWork] = []
        self.handled: list[BaseException] = []


async def parts_without_unit(app: Application) -> AsyncIterator[str]:
    yield "first;"
    try:
        app.container.writer_async_session()
    except NoUnitOfWork as error:
        yield error.message


async def work_afterwards(app: Application, seen: Seen) -> None:
    try:
        app.container.writer_async_session()
    except NoUnitOfWork as error:
        seen.without_unit.append(error)
    async with app.container.transaction():
        app.container.writer_async_session().add(Item(name="by the task"))


def starlette_app(app: Application, seen: Seen, middleware: list[Middleware]) -> Any:
    container = app.container

    async def add(request: Request) -> StarletteResponse:
        container.writer_async_session().add(Item(name=request.query_params["name"]))
        headers = {"X-Tm": request.query_params["tm"]} if "tm" in request.query_params else {}
        return JSONResponse({}, int(request.query_params.get("status", "201")), headers)

    def add_sync(request: Request) -> StarletteResponse:
        container.writer_session().add(Item(name=request.query_params["name"]))
        return JSONResponse({}, int(request.query_params.get("status", "201")))

    async def fail(request: Request) -> StarletteResponse:
        await add(request)
        raise RAISED[request.query_params["kind"]]

    async def redirect(request: Request) -> StarletteResponse:
        await add(request)
        return RedirectResponse("/elsewhere", 303)

    async def doom(request: Request) -> StarletteResponse:
        await add(request)
        container.unit().doom()
        return JSONResponse({})

    async def stream(request: Request) -> StarletteResponse:
        await add(request)
        return StreamingResponse(parts_without_unit(app))

    async def in_background(request: Request) -> StarletteResponse:
        await add(request)
        return JSONResponse({}, background=BackgroundTask(work_afterwards, app, seen))

    async def nothing(request: Request) -> StarletteResponse:
        return JSONResponse({})

    async def on_handled(request: Request, error: Exception) -> StarletteResponse:
        names = (await container.writer_async_session().scalars(select(Item.name))).all()
        return JSONResponse({"names": sorted(names)}, 409)

    async def on_error(request: Request, error: Exception) -> StarletteResponse:
        seen.handled.append(error)
        return JSONResponse({}, 500)

    endpoints = [add, add_sync, fail, redirect, doom, stream, in_background, nothing]
    return Starlette(
        routes=[Route(f"/{endpoint.__name__.replace('_', '-')}", endpoint, methods=["GET", "POST"]) for endpoint in endpoints],
        middleware=middleware,
        exception_handlers={Handled: on_handled, Exception: on_error},
        lifespan=lifespan(container),
    )


def fastapi_app(app: Application, seen: Seen, middleware: list[Middleware]) -> Any:  # noqa: C901  # one function for each route
    container = app.container
    Writer = Annotated[AsyncSession, provided(container.connection("writer").async_session)]  # noqa: N806  # a type
    SyncWriter = Annotated[Session, provided(container.connection("writer").session)]  # noqa: N806
    api = FastAPI(lifespan=lifespan(container), middleware=middleware)

    @api.api_route("/add", methods=["GET", "POST"])
    async def add(session: Writer, response: Response, name: str, status: int = 201, tm: str = "") -> None:
        session.add(Item(name=name))
        response.status_code = status
        if tm:
            response.headers["X-Tm"] = tm

    @api.post("/add-sync")
    def add_sync(session: SyncWriter, response: Response, name: str, status: int = 201) -> None:
        session.add(Item(name=name))
        response.status_code = status

    @api.post("/fail")
    async def fail(session: Writer, name: str, kind: str) -> None:
        session.add(Item(name=name))
        if kind == "http":
            raise HTTPException(409)
        raise RAISED[kind]

    @api.post("/redirect")
    async def redirect(session: Writer, name: str) -> RedirectResponse:
        session.add(Item(name=name))
        return RedirectResponse("/elsewhere", 303)

    @api.post("/doom")
    async def doom(session: Writer, name: str) -> None:
        session.add(Item(name=name))
        container.unit().doom()

    @api.post("/stream")
    async def stream(session: Writer, name: str) -> StreamingResponse:
        session.add(Item(name=name))
        return StreamingResponse(parts_without_unit(app))

    @api.post("/in-background")
    async def in_background(session: Writer, name: str, tasks: BackgroundTasks) -> None:
        session.add(Item(name=name))
        tasks.add_task(work_afterwards, app, seen)

    @api.api_route("/nothing", methods=["GET", "POST"])
    async def nothing() -> None:
        """Touch no session."""

    @api.exception_handler(Handled)
    async def on_handled(request: Request, error: Exception) -> FastJSONResponse:
        names = (await container.writer_async_session().scalars(select(Item.name))).all()
        return FastJSONResponse({"names": sorted(names)}, 409)

    @api.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> FastJSONResponse:
        seen.handled.append(error)
        return FastJSONResponse({}, 500)

    return api


FRAMEWORKS: dict[str, Callable[[Application, Seen, list[Middleware]], Any]] = {"starlette": starlette_app, "fastapi": fastapi_app}
PLACES = ("alone", "inside", "outside")
"""Where the middleware stands: alone, inside a BaseHTTPMiddleware, or outside of one."""


def placed(app: Application, place: str, **options: Any) -> list[Middleware]:
    """Return the middleware of an application."""
    ours = Middleware(UnitOfWorkMiddleware, container=app.container, **options)
    return {"alone": [ours], "inside": [Middleware(Passing), ours], "outside": [ours, Middleware(Passing)]}[place]


class Site:
    """An application on a real server, and a client."""

    def __init__(self, app: Application, seen: Seen, client: httpx.Client) -> None:
        self.app, self.seen, self.client = app, seen, client

    def post(self, path: str, **query: Any) -> httpx.Response:
        return self.client.post(f"/{path}", params=query)

    @property
    def names(self) -> list[str]:
        return [name for name in self.app.names() if name != "taken"]


@contextmanager
def site(framework: str, place: str, url: str, **options: Any) -> Iterator[Site]:
    """Serve one of the applications on a PostgreSQL database, where adding another item "taken" fails at COMMIT."""
    with running(writer=url) as app:
        app.run(*DEFER_UNIQUENESS)
        seen = Seen()
        served = FRAMEWORKS[framework](app, seen, placed(app, place, **options))
        with serving(served) as address, client(address) as asking:
            yield Site(app, seen, asking)
