"""FastAPI alone: a dependency with `yield` that commits.

https://fastapi.tiangolo.com/tutorial/dependencies/dependencies-with-yield/ shows where the code after `yield` runs, and
`scope="function"`, by which it runs before the response is sent. COMPARE_SCOPE names the scope.
"""

import os
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal, cast

from fastapi import Depends, FastAPI, WebSocket
from fastapi_routes import add_routes, add_simple_handler
from shared import URL, Item
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette_routes import inside

NOT_OFFERED = {
    "veto by header": "dependencies see no response",
    "exception handler reads": "handlers have no dependencies",
    "retry": "FastAPI repeats no request",
    "two databases": "one session is one transaction; there is nothing above it",
}

SCOPE = cast("Literal['function', 'request']", os.environ["COMPARE_SCOPE"])

# wiring begins
engine = create_async_engine(URL)
new_session = async_sessionmaker(engine, expire_on_commit=False)


async def get_session() -> AsyncIterator[AsyncSession]:
    async with new_session.begin() as session:
        yield session


Writer = Annotated[AsyncSession, Depends(get_session, scope=SCOPE)]
app = FastAPI(middleware=inside())
# wiring ends

sync_maker = sessionmaker(create_engine(URL), expire_on_commit=False)


def get_sync_session() -> Iterator[Session]:
    with sync_maker.begin() as session:
        yield session


SyncWriter: Any = Annotated[Session, Depends(get_sync_session, scope=SCOPE)]


# endpoint begins
@app.post("/place", status_code=201)
async def place(name: str, session: Writer) -> dict[str, str]:
    session.add(Item(name=name))
    return {}
    # endpoint ends


@app.websocket("/messages")
async def messages(socket: WebSocket) -> None:
    await socket.accept()
    async for name in socket.iter_text():
        async with new_session.begin() as session:
            session.add(Item(name=name))
        await socket.send_text("done")


add_routes(app, Writer, SyncWriter)
add_simple_handler(app)
