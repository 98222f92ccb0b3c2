"""app_db with FastAPI: docs/web.md."""

import os
from typing import Annotated

from fastapi import FastAPI, Request, WebSocket
from fastapi_routes import add_handler, add_routes
from shared import SECOND_URL, URL, Item, SecondItem
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette_routes import inside

from app_db import container_of
from app_db.integrations.fastapi import UnitOfWorkMiddleware, lifespan, provided

NOT_OFFERED: dict[str, str] = {}

os.environ.update(APP_DB_CONNECTIONS__WRITER__URL=URL, APP_DB_CONNECTIONS__SECOND__URL=SECOND_URL, APP_DB_TWO_PHASE="true")
os.environ["APP_DB_APPLICATION"] = "compare"

# wiring begins
container = container_of("writer", "second")()
Writer = Annotated[AsyncSession, provided(container.connection("writer").async_session)]
app = FastAPI(lifespan=lifespan(container), middleware=inside())
app.add_middleware(UnitOfWorkMiddleware, container=container, attempts=3)
# wiring ends

Second = Annotated[AsyncSession, provided(container.connection("second").async_session)]
SyncWriter = Annotated[Session, provided(container.connection("writer").session)]


# endpoint begins
@app.post("/place", status_code=201)
async def place(name: str, session: Writer) -> dict[str, str]:
    session.add(Item(name=name))
    return {}
    # endpoint ends


@app.post("/both", status_code=201)
async def both(name: str, second: str, session: Writer, second_session: Second) -> dict[str, str]:
    session.add(Item(name=name))
    second_session.add(SecondItem(name=second))
    return {}


@app.websocket("/messages")
async def messages(socket: WebSocket) -> None:
    await socket.accept()
    async for name in socket.iter_text():
        async with container.transaction():
            container.writer_async_session().add(Item(name=name))
        await socket.send_text("done")


async def session_of(request: Request) -> AsyncSession:
    return container.writer_async_session()


add_routes(app, Writer, SyncWriter, lambda: container.unit().doom())
add_handler(app, session_of)
