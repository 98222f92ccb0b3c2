"""dishka with Starlette: https://dishka.readthedocs.io/en/stable/integrations/starlette.html."""

from __future__ import annotations

from dishka import AsyncContainer
from dishka.integrations.starlette import FromDishka, inject, setup_dishka
from dishka_provider import container
from shared import Item
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from starlette_routes import handlers, inside, routes

WIRED_IN = ["dishka_provider"]
NOT_OFFERED = {
    "sync endpoint": "its `inject` for Starlette refuses plain functions",
    "veto by header": "a provider sees no response",
    "retry": "it repeats no request",
    "two databases": "it injects what it is given, and has no transaction of its own",
}


# endpoint begins
@inject
async def place(request: Request, *, session: FromDishka[AsyncSession]) -> Response:
    session.add(Item(name=request.query_params["name"]))
    return JSONResponse({}, 201)
    # endpoint ends


@inject
async def messages(socket: WebSocket, *, container: FromDishka[AsyncContainer]) -> None:
    await socket.accept()
    async for name in socket.iter_text():
        async with container() as scope:
            (await scope.get(AsyncSession)).add(Item(name=name))
        await socket.send_text("done")


async def session_of(request: Request) -> AsyncSession:
    return await request.state.dishka_container.get(AsyncSession)


app = Starlette(
    routes=[Route("/place", place, methods=["POST"]), WebSocketRoute("/messages", messages), *routes(session_of)],
    middleware=inside(),
    exception_handlers=handlers(session_of),
)
# wiring begins
setup_dishka(container, app)
# wiring ends
