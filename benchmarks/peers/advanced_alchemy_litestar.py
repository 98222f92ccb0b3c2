"""Advanced Alchemy with Litestar, in its mode that commits by itself.

https://advanced-alchemy.litestar.dev/latest/usage/frameworks/litestar.html, "Basic Setup" and "Database Sessions".
Litestar finds the types of the endpoints, so annotations are no strings.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from advanced_alchemy.extensions.litestar import (
    AsyncSessionConfig,
    SQLAlchemyAsyncConfig,
    SQLAlchemyPlugin,
    SQLAlchemySyncConfig,
)
from litestar import Litestar, Request, Response, WebSocket, get, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.exceptions import HTTPException, WebSocketDisconnect
from litestar.response import Redirect, Stream
from shared import COLLISION, SECOND_URL, URL, Boom, Handled, Item, SecondItem, is_first_try
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

NOT_OFFERED = {
    "veto by header": "its handler looks at the status only",
    "retry": "it repeats no request",
}

MODE = "autocommit_include_redirects"
gate = asyncio.Event()

# wiring begins
config = SQLAlchemyAsyncConfig(
    connection_string=URL,
    session_config=AsyncSessionConfig(expire_on_commit=False),
    before_send_handler="autocommit_include_redirects",
)
# wiring ends
second_config = SQLAlchemyAsyncConfig(
    connection_string=SECOND_URL,
    bind_key="second",
    session_dependency_key="second_session",
    engine_dependency_key="second_engine",
    before_send_handler=MODE,
)
sync_config = SQLAlchemySyncConfig(
    connection_string=URL,
    bind_key="sync",
    session_dependency_key="sync_session",
    engine_dependency_key="sync_engine",
    before_send_handler=MODE,
)


async def passed() -> None:
    gate.clear()
    await gate.wait()


# endpoint begins
@post("/place")
async def place(name: str, db_session: AsyncSession) -> dict[str, str]:
    db_session.add(Item(name=name))
    return {}
    # endpoint ends


@post("/both")
async def both(name: str, second: str, db_session: AsyncSession, second_session: AsyncSession) -> dict[str, str]:
    db_session.add(Item(name=name))
    second_session.add(SecondItem(name=second))
    return {}


@post("/add")
async def add(name: str, db_session: AsyncSession, status: int = 201, tm: str = "") -> Response[dict[str, str]]:
    db_session.add(Item(name=name))
    return Response({}, status_code=status, headers={"X-Tm": tm} if tm else {})


@post("/add-sync", sync_to_thread=True)
def add_sync(name: str, sync_session: Session) -> dict[str, str]:
    sync_session.add(Item(name=name))
    return {}


@post("/fail")
async def fail(name: str, kind: str, db_session: AsyncSession) -> None:
    db_session.add(Item(name=name))
    await db_session.flush()
    if kind == "http":
        raise HTTPException(status_code=409)
    raise {"boom": Boom, "handled": Handled}[kind]


@post("/redirect", status_code=303)
async def redirect(name: str, db_session: AsyncSession) -> Redirect:
    db_session.add(Item(name=name))
    return Redirect("/nothing", status_code=303)


@post("/veto", status_code=200)
async def veto(name: str, db_session: AsyncSession) -> dict[str, str]:
    db_session.add(Item(name=name))
    await db_session.flush()
    await db_session.rollback()
    return {}


async def parts(*, waits: bool) -> AsyncIterator[str]:
    yield "first"
    if waits:
        await passed()
    yield "second"


@post("/stream")
async def stream(name: str, db_session: AsyncSession, free: str = "") -> Stream:
    db_session.add(Item(name=name))
    return Stream(parts(waits=not free))


@post("/in-background")
async def in_background(name: str, db_session: AsyncSession, free: str = "") -> Response[dict[str, str]]:
    db_session.add(Item(name=name))
    return Response({}, background=None if free else BackgroundTask(passed))


@post("/wait")
async def wait(name: str, db_session: AsyncSession) -> dict[str, str]:
    db_session.add(Item(name=name))
    await db_session.flush()
    await passed()
    return {}


@post("/retry")
async def retry(data: dict[str, str], db_session: AsyncSession) -> dict[str, str]:
    if is_first_try(data["name"]):
        await db_session.execute(text(COLLISION))
    db_session.add(Item(name=data["name"]))
    return {}


@get("/nothing")
async def nothing() -> dict[str, str]:
    return {}


@post("/release")
async def release() -> dict[str, str]:
    gate.set()
    return {}


@websocket("/messages")
async def messages(socket: WebSocket[Any, Any, Any]) -> None:
    await socket.accept()
    try:
        while True:
            name = await socket.receive_text()
            async with config.get_session() as session:
                session.add(Item(name=name))
                await session.commit()
            await socket.send_text("done")
    except WebSocketDisconnect:
        return


def on_handled(request: Request[Any, Any, Any], error: Handled) -> Response[dict[str, int]]:
    session = sync_config.provide_session(request.app.state, request.scope)  # Litestar's handlers are no coroutines
    return Response({"names": len(session.scalars(select(Item.name)).all())}, status_code=409)


app = Litestar(
    route_handlers=[
        *(place, both, add, add_sync, fail, redirect, veto, stream, in_background, wait, retry, nothing, release, messages)
    ],
    exception_handlers={Handled: on_handled},
    # wiring begins
    plugins=[SQLAlchemyPlugin(config=[config, second_config, sync_config])],
    # wiring ends
)
