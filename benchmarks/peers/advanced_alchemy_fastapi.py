"""Advanced Alchemy with FastAPI, in its mode that commits by itself.

https://advanced-alchemy.litestar.dev/latest/usage/frameworks/fastapi.html, "Basic Setup" and "Dependency Injection".
"""

from typing import Annotated

from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    SQLAlchemyAsyncConfig,
    SQLAlchemySyncConfig,
)
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi_routes import add_handler, add_routes
from shared import SECOND_URL, URL, Item, SecondItem
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette_routes import inside

NOT_OFFERED = {
    "veto by header": "its middleware looks at the status only",
    "retry": "it repeats no request",
}

MODE = "autocommit_include_redirect"

# wiring begins
config = SQLAlchemyAsyncConfig(
    connection_string=URL,
    session_config=AsyncSessionConfig(expire_on_commit=False),
    commit_mode="autocommit_include_redirect",
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

# wiring begins
app = FastAPI(middleware=inside())
alchemy = AdvancedAlchemy(config=[config, second_config, sync_config], app=app)
Writer = Annotated[AsyncSession, Depends(alchemy.provide_async_session())]
# wiring ends
Second = Annotated[AsyncSession, Depends(alchemy.provide_async_session("second"))]
SyncWriter = Annotated[Session, Depends(alchemy.provide_sync_session("sync"))]


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
        async with alchemy.with_async_session() as session:
            session.add(Item(name=name))
            await session.commit()
        await socket.send_text("done")


async def session_of(request: Request) -> AsyncSession:
    return alchemy.get_async_session(request)


add_routes(app, Writer, SyncWriter)
add_handler(app, session_of)
