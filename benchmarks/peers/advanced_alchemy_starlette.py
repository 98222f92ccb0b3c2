"""Advanced Alchemy with Starlette, in its mode that commits by itself.

https://advanced-alchemy.litestar.dev/latest/usage/frameworks/fastapi.html, whose extension is the one for Starlette, and
https://advanced-alchemy.litestar.dev/latest/reference/extensions/starlette/ for `commit_mode` and `get_async_session`.
"""

from __future__ import annotations

from advanced_alchemy.extensions.starlette import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    SQLAlchemyAsyncConfig,
    SQLAlchemySyncConfig,
)
from shared import SECOND_URL, URL, Item, SecondItem
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from starlette_routes import handlers, inside, routes

NOT_OFFERED = {
    "veto by header": "its middleware looks at the status only",
    "retry": "it repeats no request",
}

MODE = "autocommit_include_redirect"

# wiring begins
config = SQLAlchemyAsyncConfig(
    connection_string=URL,
    session_config=AsyncSessionConfig(expire_on_commit=False),
    commit_mode=MODE,
)
# wiring ends
second_config = SQLAlchemyAsyncConfig(
    connection_string=SECOND_URL,
    bind_key="second",
    session_key="second_session",
    session_maker_key="second_maker",
    engine_key="second_engine",
    commit_mode=MODE,
)
sync_config = SQLAlchemySyncConfig(connection_string=URL, bind_key="sync", commit_mode=MODE)


# endpoint begins
async def place(request: Request) -> Response:
    alchemy.get_async_session(request).add(Item(name=request.query_params["name"]))
    return JSONResponse({}, 201)
    # endpoint ends


async def both(request: Request) -> Response:
    alchemy.get_async_session(request).add(Item(name=request.query_params["name"]))
    alchemy.get_async_session(request, "second").add(SecondItem(name=request.query_params["second"]))
    return JSONResponse({}, 201)


async def messages(socket: WebSocket) -> None:
    await socket.accept()
    async for name in socket.iter_text():
        async with alchemy.with_async_session() as session:
            session.add(Item(name=name))
            await session.commit()
        await socket.send_text("done")


async def session_of(request: Request) -> AsyncSession:
    return alchemy.get_async_session(request)


app = Starlette(
    routes=[
        Route("/place", place, methods=["POST"]),
        Route("/both", both, methods=["POST"]),
        WebSocketRoute("/messages", messages),
        *routes(session_of, lambda request: alchemy.get_sync_session(request, "sync")),
    ],
    middleware=inside(),
    exception_handlers=handlers(session_of),
)
# wiring begins
alchemy = AdvancedAlchemy(config=[config, second_config, sync_config], app=app)
# wiring ends
