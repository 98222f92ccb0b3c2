"""dishka with FastAPI: https://dishka.readthedocs.io/en/stable/integrations/fastapi.html."""

from dishka import AsyncContainer
from dishka.integrations.fastapi import DishkaRoute, FromDishka, inject, setup_dishka
from dishka_provider import container
from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi_routes import add_handler, add_routes
from shared import Item
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette_routes import inside

WIRED_IN = ["dishka_provider"]
NOT_OFFERED = {
    "veto by header": "a provider sees no response",
    "retry": "it repeats no request",
    "two databases": "it injects what it is given, and has no transaction of its own",
}

# wiring begins
app = FastAPI(middleware=inside())
router = APIRouter(route_class=DishkaRoute)
# wiring ends


# endpoint begins
@router.post("/place", status_code=201)
async def place(name: str, session: FromDishka[AsyncSession]) -> dict[str, str]:
    session.add(Item(name=name))
    return {}
    # endpoint ends


@router.websocket("/messages")
@inject
async def messages(socket: WebSocket, container: FromDishka[AsyncContainer]) -> None:
    await socket.accept()
    async for name in socket.iter_text():
        async with container() as scope:
            (await scope.get(AsyncSession)).add(Item(name=name))
        await socket.send_text("done")


async def session_of(request: Request) -> AsyncSession:
    return await request.state.dishka_container.get(AsyncSession)


add_routes(router, FromDishka[AsyncSession], FromDishka[Session])
add_handler(app, session_of)

# wiring begins
app.include_router(router)
setup_dishka(container, app)
# wiring ends
