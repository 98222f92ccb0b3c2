"""wireup with FastAPI: https://maldoinc.github.io/wireup/latest/integrations/fastapi/.

https://maldoinc.github.io/wireup/latest/resources/ shows a factory that rolls back if there was an error. It shows no
commit: this one commits where that error would have been raised. The scope is the endpoint's, which is wireup's default.
"""

from collections.abc import AsyncIterator, Iterator

import wireup
import wireup.integration.fastapi
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, Response
from fastapi_routes import add_routes
from shared import URL, Handled, Item
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from starlette_routes import inside
from wireup import Injected, injectable

NOT_OFFERED = {
    "veto by header": "a factory sees no response",
    "retry": "it repeats no request",
    "two databases": "it injects what it is given, and has no transaction of its own",
}


# wiring begins
@injectable
def engine() -> AsyncEngine:
    return create_async_engine(URL)


@injectable(lifetime="scoped")
async def get_session(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session
        await session.commit()


# wiring ends

sync_engine = create_engine(URL)


@injectable(lifetime="scoped")
def get_sync_session() -> Iterator[Session]:
    with Session(sync_engine, expire_on_commit=False) as session:
        yield session
        session.commit()


# wiring begins
app = FastAPI(middleware=inside())
# wiring ends


# endpoint begins
@app.post("/place", status_code=201)
async def place(name: str, session: Injected[AsyncSession]) -> dict[str, str]:
    session.add(Item(name=name))
    return {}
    # endpoint ends


@app.websocket("/messages")
async def messages(socket: WebSocket) -> None:
    await socket.accept()
    async for name in socket.iter_text():
        async with container.enter_scope() as scope:
            (await scope.get(AsyncSession)).add(Item(name=name))
        await socket.send_text("done")


@app.exception_handler(Handled)
async def on_handled(request: Request, error: Exception) -> Response:
    async with container.enter_scope() as scope:
        names = (await (await scope.get(AsyncSession)).scalars(select(Item.name))).all()
    return JSONResponse({"names": len(names)}, 409)


add_routes(app, Injected[AsyncSession], Injected[Session])

# wiring begins
container = wireup.create_async_container(injectables=[engine, get_session, get_sync_session])
wireup.integration.fastapi.setup(container, app)
# wiring ends
