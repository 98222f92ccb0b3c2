"""app_db with Starlette: docs/web.md."""

from __future__ import annotations

import os

from shared import SECOND_URL, URL, Item, SecondItem
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from starlette_routes import handlers, inside, routes

from app_db import container_of
from app_db.integrations.starlette import UnitOfWorkMiddleware, lifespan

NOT_OFFERED: dict[str, str] = {}

os.environ.update(APP_DB_CONNECTIONS__WRITER__URL=URL, APP_DB_CONNECTIONS__SECOND__URL=SECOND_URL, APP_DB_TWO_PHASE="true")
os.environ["APP_DB_APPLICATION"] = "compare"

# wiring begins
container = container_of("writer", "second")()
middleware = [Middleware(UnitOfWorkMiddleware, container=container, attempts=3)]
# wiring ends


# endpoint begins
async def place(request: Request) -> Response:
    container.writer_async_session().add(Item(name=request.query_params["name"]))
    return JSONResponse({}, 201)
    # endpoint ends


async def both(request: Request) -> Response:
    container.writer_async_session().add(Item(name=request.query_params["name"]))
    container.second_async_session().add(SecondItem(name=request.query_params["second"]))
    return JSONResponse({}, 201)


async def messages(socket: WebSocket) -> None:
    await socket.accept()
    async for name in socket.iter_text():
        async with container.transaction():
            container.writer_async_session().add(Item(name=name))
        await socket.send_text("done")


async def session_of(request: Request):
    return container.writer_async_session()


app = Starlette(
    routes=[
        Route("/place", place, methods=["POST"]),
        Route("/both", both, methods=["POST"]),
        WebSocketRoute("/messages", messages),
        *routes(session_of, lambda _: container.writer_session(), lambda: container.unit().doom()),
    ],
    middleware=[*middleware, *inside()],
    exception_handlers=handlers(session_of),
    # wiring begins
    lifespan=lifespan(container),
    # wiring ends
)
