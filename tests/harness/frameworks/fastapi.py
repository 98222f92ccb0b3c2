"""The application by FastAPI. It has to find the types of the endpoints, which are local here. So annotations are no strings."""

from typing import Annotated, Any

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app_db.integrations.fastapi import lifespan, provided
from harness.applications import Item
from harness.frameworks import RAISED, Doings, Handled
from harness.frameworks.starlette import placed


def application(  # noqa: C901  # one function for each route
    doings: Doings, inner: Doings | None = None, *, place: str = "alone", **options: Any
) -> FastAPI:
    container, others = doings.container, doings.app.connections[1:]
    Writer = Annotated[AsyncSession, provided(container.connection("writer").async_session)]  # noqa: N806  # a type
    SyncWriter = Annotated[Session, provided(container.connection("writer").session)]  # noqa: N806
    own = lifespan(container)
    api = FastAPI(
        lifespan=own if inner is None else lifespan(inner.container, own), middleware=placed(doings.app, place, **options)
    )
    if inner is not None:
        api.mount("/inner", application(inner))

    @api.post("/add-async")
    async def add_async(session: Writer, response: Response, name: str, status: int = 201, tm: str = "") -> None:
        session.add(Item(name=name))
        for other in others:
            container.connection(other).async_session().add(Item(name=name))
        response.status_code = status
        if tm:
            response.headers["X-Tm"] = tm

    @api.post("/add-sync")
    def add_sync(session: SyncWriter, response: Response, name: str, status: int = 201) -> None:
        session.add(Item(name=name))
        for other in others:
            container.connection(other).session().add(Item(name=name))
        response.status_code = status

    @api.post("/fail")
    async def fail(name: str, kind: str) -> None:
        await doings.put_async(name)
        if kind == "http":
            raise HTTPException(409)
        raise RAISED[kind]

    @api.post("/redirect")
    async def redirect(name: str) -> RedirectResponse:
        await doings.put_async(name)
        return RedirectResponse("/elsewhere", 303)

    @api.post("/doom")
    async def doom(name: str) -> None:
        await doings.put_async(name)
        container.unit().doom()

    @api.post("/stream")
    async def stream(name: str) -> StreamingResponse:
        await doings.put_async(name)

        async def parts() -> Any:
            yield "first;"
            yield await doings.refused_async()

        return StreamingResponse(parts())

    @api.post("/in-background")
    async def in_background(name: str, tasks: BackgroundTasks) -> None:
        await doings.put_async(name)
        tasks.add_task(doings.work_afterwards_async, name)

    @api.post("/count")
    async def count(name: str, request: Request) -> dict[str, int]:
        body = await request.body()
        return {"attempts": await doings.count_async(name), "bytes": len(body)}

    @api.post("/slow")
    async def slow(name: str) -> None:
        await doings.put_async(name)
        await doings.wait_async()

    @api.post("/two")
    async def two(name: str, response: Response, status: int = 201) -> None:
        await doings.put_into_two_async(name)
        response.status_code = status

    @api.api_route("/nothing", methods=["GET", "POST"])
    async def nothing() -> None:
        """Touch no session."""

    @api.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await doings.refused_async())
        async with container.transaction():
            await doings.put_async("by the socket")
        await websocket.close()

    @api.exception_handler(Handled)
    async def on_handled(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"names": await doings.names_async()}, 409)

    @api.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"handled": type(error).__name__}, 500)

    return api
