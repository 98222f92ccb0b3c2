"""fastapi-sqla, as its README shows it: https://github.com/dialoguemd/fastapi-sqla#readme (lifespan, session, multi-session)."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import fastapi_sqla
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi_routes import add_handler, add_routes
from fastapi_sqla import AsyncSession, AsyncSessionDependency, SessionDependency, SqlaAsyncSession, SqlaSession
from shared import SECOND_URL, URL, Item, SecondItem
from starlette_routes import inside

NOT_OFFERED = {
    "veto by header": "its middleware looks at the status only",
    "retry": "it repeats no request",
}

os.environ["SQLALCHEMY_URL"] = URL.replace("+psycopg:", "+psycopg_async:")
os.environ["FASTAPI_SQLA__SYNC__SQLALCHEMY_URL"] = URL
os.environ["FASTAPI_SQLA__SECOND__SQLALCHEMY_URL"] = SECOND_URL.replace("+psycopg:", "+psycopg_async:")


# wiring begins
@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await fastapi_sqla.startup()
    yield


app = FastAPI(lifespan=lifespan, middleware=inside())
fastapi_sqla.setup_middlewares(app)
# wiring ends

Second = Annotated[SqlaAsyncSession, Depends(AsyncSessionDependency(key="second"))]
SyncWriter = Annotated[SqlaSession, Depends(SessionDependency(key="sync"))]


# endpoint begins
@app.post("/place", status_code=201)
async def place(name: str, session: AsyncSession) -> dict[str, str]:
    session.add(Item(name=name))
    return {}
    # endpoint ends


@app.post("/both", status_code=201)
async def both(name: str, second: str, session: AsyncSession, second_session: Second) -> dict[str, str]:
    session.add(Item(name=name))
    second_session.add(SecondItem(name=second))
    return {}


@app.websocket("/messages")
async def messages(socket: WebSocket) -> None:
    await socket.accept()
    async for name in socket.iter_text():
        async with fastapi_sqla.open_async_session() as session:
            session.add(Item(name=name))
        await socket.send_text("done")


async def session_of(request: Request) -> SqlaAsyncSession:
    return AsyncSessionDependency()(request)


add_routes(app, AsyncSession, SyncWriter)
add_handler(app, session_of)
