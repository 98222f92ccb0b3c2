"""The application by Quart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from hypercorn.middleware import DispatcherMiddleware
from quart import Quart, abort, redirect, request, websocket

from app_db.integrations.asgi import UnitOfWorkMiddleware
from harness.frameworks import RAISED, Doings, Handled


def application(  # noqa: C901  # one function for each route
    doings: Doings, inner: Doings | None = None, **options: Any
) -> Any:
    quart = Quart("shop")
    container = doings.container

    def answer() -> tuple[str, int, dict[str, str]]:
        tm = {"X-Tm": request.args["tm"]} if "tm" in request.args else {}
        return "{}", int(request.args.get("status", "201")), tm

    async def put() -> None:
        await doings.put_async(request.args["name"])

    @quart.post("/add-async")
    async def add_async() -> Any:
        await put()
        return answer()

    @quart.post("/add-sync")
    def add_sync() -> Any:
        doings.put(request.args["name"])
        return answer()

    @quart.post("/fail")
    async def fail() -> str:
        await put()
        if request.args["kind"] == "http":
            abort(409)
        raise RAISED[request.args["kind"]]

    @quart.post("/redirect")
    async def elsewhere() -> Any:
        await put()
        return redirect("/elsewhere", 303)

    @quart.post("/doom")
    async def doom() -> str:
        await put()
        container.unit().doom()
        return "{}"

    @quart.post("/stream")
    async def stream() -> Any:
        await put()

        async def parts() -> AsyncIterator[str]:
            yield "first;"
            yield await doings.refused_async()

        return parts(), 200

    @quart.post("/in-background")
    async def in_background() -> str:
        await put()
        container.unit().on_commit(quart.add_background_task, doings.work_afterwards_async, request.args["name"])
        return "{}"

    @quart.post("/count")
    async def count() -> dict[str, int]:
        body = await request.get_data()
        return {"attempts": await doings.count_async(request.args["name"]), "bytes": len(body)}

    @quart.post("/slow")
    async def slow() -> str:
        await put()
        await doings.wait_async()
        return "{}"

    @quart.post("/two")
    async def two() -> Any:
        await doings.put_into_two_async(request.args["name"])
        return answer()

    @quart.route("/nothing", methods=["GET", "POST"])
    async def nothing() -> str:
        return "{}"

    @quart.errorhandler(Handled)
    async def on_handled(error: Handled) -> Any:
        return {"names": await doings.names_async()}, 409

    @quart.errorhandler(500)
    async def on_error(error: Any) -> Any:
        return {"handled": type(error.original_exception).__name__}, 500

    @quart.websocket("/socket")
    async def socket() -> None:
        await websocket.send(await doings.refused_async())
        async with container.transaction():
            await doings.put_async("by the socket")

    whole: Any = quart
    whole.asgi_app = UnitOfWorkMiddleware(whole.asgi_app, container, **options)
    whole.after_serving(container.shutdown_resources)
    return whole if inner is None else DispatcherMiddleware({"/inner": application(inner), "": whole})
