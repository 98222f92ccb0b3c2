"""The application by Litestar. It has to find the types of the handlers, which are local here. So annotations are no strings."""

from typing import Any

from litestar import HttpMethod, Litestar, Request, Response, WebSocket, asgi, post, route, websocket
from litestar.background_tasks import BackgroundTask
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException
from litestar.params import FromQuery
from litestar.response import Redirect, Stream
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app_db.integrations.litestar import AppDbPlugin
from harness.applications import Item
from harness.frameworks import RAISED, Doings, Handled


def application(  # noqa: C901  # one function for each route
    doings: Doings, inner: Doings | None = None, **options: Any
) -> Litestar:
    container, others = doings.container, doings.app.connections[1:]

    @post("/add-async")
    async def add_async(
        writer_async_session: NamedDependency[AsyncSession],
        name: FromQuery[str],
        status: FromQuery[int] = 201,
        tm: FromQuery[str] = "",
    ) -> Response[None]:
        writer_async_session.add(Item(name=name))
        for other in others:
            container.connection(other).async_session().add(Item(name=name))
        return Response(None, status_code=status, headers={"X-Tm": tm} if tm else {})

    @post("/add-sync", sync_to_thread=True)
    def add_sync(writer_session: NamedDependency[Session], name: FromQuery[str], status: FromQuery[int] = 201) -> Response[None]:
        writer_session.add(Item(name=name))
        for other in others:
            container.connection(other).session().add(Item(name=name))
        return Response(None, status_code=status)

    # No coroutine: exception handlers of Litestar are none, and that of `Handled` reads by the same session.
    @post("/fail", sync_to_thread=True)
    def fail(name: FromQuery[str], kind: FromQuery[str]) -> None:
        doings.put(name)
        raise HTTPException(status_code=409) if kind == "http" else RAISED[kind]

    @post("/redirect")
    async def redirect(name: FromQuery[str]) -> Redirect:
        await doings.put_async(name)
        return Redirect("/elsewhere", status_code=303)

    @post("/doom", status_code=200)
    async def doom(name: FromQuery[str]) -> None:
        await doings.put_async(name)
        container.unit().doom()

    @post("/stream", status_code=200)
    async def stream(name: FromQuery[str]) -> Stream:
        await doings.put_async(name)

        async def parts() -> Any:
            yield "first;"
            yield await doings.refused_async()

        return Stream(parts())

    @post("/in-background", status_code=200)
    async def in_background(name: FromQuery[str]) -> Response[None]:
        await doings.put_async(name)
        return Response(None, background=BackgroundTask(doings.work_afterwards_async, name))

    @post("/count", status_code=200)
    async def count(name: FromQuery[str], request: Request[Any, Any, Any]) -> dict[str, int]:
        body = await request.body()
        return {"attempts": await doings.count_async(name), "bytes": len(body)}

    @post("/slow")
    async def slow(name: FromQuery[str]) -> None:
        await doings.put_async(name)
        await doings.wait_async()

    @post("/two")
    async def two(name: FromQuery[str], status: FromQuery[int] = 201) -> Response[None]:
        await doings.put_into_two_async(name)
        return Response(None, status_code=status)

    @route("/nothing", http_method=[HttpMethod.GET, HttpMethod.POST], status_code=200)
    async def nothing() -> None:
        """Touch no session."""

    @websocket("/socket")
    async def socket(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        await socket.send_text(await doings.refused_async())
        async with container.transaction():
            await doings.put_async("by the socket")
        await socket.close()

    def on_handled(request: Request[Any, Any, Any], error: Handled) -> Response[dict[str, list[str]]]:
        return Response({"names": doings.names()}, status_code=409)

    def on_error(request: Request[Any, Any, Any], error: Exception) -> Response[dict[str, str]]:
        return Response({"handled": type(error).__name__}, status_code=500)

    mounted = None if inner is None else application(inner)
    handlers = [add_async, add_sync, fail, redirect, doom, stream, in_background, count, slow, two, nothing, socket]
    return Litestar(
        handlers if mounted is None else [*handlers, asgi("/inner", is_mount=True)(mounted)],
        plugins=[AppDbPlugin(container, **options)],
        exception_handlers={Handled: on_handled, 500: on_error},
        lifespan=[] if mounted is None else [lambda app: mounted.lifespan()],
    )
