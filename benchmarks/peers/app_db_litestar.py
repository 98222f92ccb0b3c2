"""app_db with Litestar: docs/how-to/litestar.md. Litestar finds the types of the endpoints, so annotations are no strings."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from litestar import Litestar, Request, Response, WebSocket, get, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.exceptions import HTTPException, WebSocketDisconnect
from litestar.response import Redirect, Stream
from shared import COLLISION, SECOND_URL, URL, Boom, Handled, Item, SecondItem, is_first_try
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app_db import container_of
from app_db.integrations.litestar import AppDbPlugin

NOT_OFFERED: dict[str, str] = {}

os.environ.update(APP_DB_CONNECTIONS__WRITER__URL=URL, APP_DB_CONNECTIONS__SECOND__URL=SECOND_URL, APP_DB_TWO_PHASE="true")
os.environ["APP_DB_APPLICATION"] = "compare"

gate = asyncio.Event()

# wiring begins
container = container_of("writer", "second")()
# wiring ends


async def passed() -> None:
    gate.clear()
    await gate.wait()


# endpoint begins
@post("/place")
async def place(name: str, writer_async_session: AsyncSession) -> dict[str, str]:
    writer_async_session.add(Item(name=name))
    return {}
    # endpoint ends


@post("/both")
async def both(name: str, second: str, writer_async_session: AsyncSession, second_async_session: AsyncSession) -> dict[str, str]:
    writer_async_session.add(Item(name=name))
    second_async_session.add(SecondItem(name=second))
    return {}


@post("/add")
async def add(name: str, writer_async_session: AsyncSession, status: int = 201, tm: str = "") -> Response[dict[str, str]]:
    writer_async_session.add(Item(name=name))
    return Response({}, status_code=status, headers={"X-Tm": tm} if tm else {})


@post("/add-sync", sync_to_thread=True)
def add_sync(name: str, writer_session: Session) -> dict[str, str]:
    writer_session.add(Item(name=name))
    return {}


@post("/fail")
async def fail(name: str, kind: str, writer_async_session: AsyncSession) -> None:
    writer_async_session.add(Item(name=name))
    await writer_async_session.flush()
    if kind == "http":
        raise HTTPException(status_code=409)
    raise {"boom": Boom, "handled": Handled}[kind]


@post("/redirect", status_code=303)
async def redirect(name: str, writer_async_session: AsyncSession) -> Redirect:
    writer_async_session.add(Item(name=name))
    return Redirect("/nothing", status_code=303)


@post("/veto", status_code=200)
async def veto(name: str, writer_async_session: AsyncSession) -> dict[str, str]:
    writer_async_session.add(Item(name=name))
    container.unit().doom()
    return {}


async def parts(*, waits: bool) -> AsyncIterator[str]:
    yield "first"
    if waits:
        await passed()
    yield "second"


@post("/stream")
async def stream(name: str, writer_async_session: AsyncSession, free: str = "") -> Stream:
    writer_async_session.add(Item(name=name))
    return Stream(parts(waits=not free))


@post("/in-background")
async def in_background(name: str, writer_async_session: AsyncSession, free: str = "") -> Response[dict[str, str]]:
    writer_async_session.add(Item(name=name))
    return Response({}, background=None if free else BackgroundTask(passed))


@post("/wait")
async def wait(name: str, writer_async_session: AsyncSession) -> dict[str, str]:
    writer_async_session.add(Item(name=name))
    await writer_async_session.flush()
    await passed()
    return {}


@post("/retry")
async def retry(data: dict[str, str], writer_async_session: AsyncSession) -> dict[str, str]:
    if is_first_try(data["name"]):
        await writer_async_session.execute(text(COLLISION))
    writer_async_session.add(Item(name=data["name"]))
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
            async with container.transaction():
                container.writer_async_session().add(Item(name=name))
            await socket.send_text("done")
    except WebSocketDisconnect:
        return


def on_handled(request: Request[Any, Any, Any], error: Handled) -> Response[dict[str, int]]:
    session = container.writer_session()  # Litestar's handlers are no coroutines
    return Response({"names": len(session.scalars(select(Item.name)).all())}, status_code=409)


app = Litestar(
    route_handlers=[
        *(place, both, add, add_sync, fail, redirect, veto, stream, in_background, wait, retry, nothing, release, messages)
    ],
    exception_handlers={Handled: on_handled},
    # wiring begins
    plugins=[AppDbPlugin(container, attempts=3)],
    # wiring ends
)
