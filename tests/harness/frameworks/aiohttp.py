"""The application by aiohttp."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from app_db.integrations.aiohttp import setup
from harness.frameworks import RAISED, Doings, Handled

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(  # noqa: C901  # one function for each route
    doings: Doings, inner: Doings | None = None, **options: Any
) -> web.Application:
    container = doings.container
    tasks: list[asyncio.Task[None]] = []

    def answer(request: web.Request) -> web.Response:
        tm = {"X-Tm": request.query["tm"]} if "tm" in request.query else {}
        return web.json_response({}, status=int(request.query.get("status", "201")), headers=tm)

    async def add_async(request: web.Request) -> web.Response:
        await doings.put_async(request.query["name"])
        return answer(request)

    async def fail(request: web.Request) -> web.Response:
        await add_async(request)
        raise web.HTTPConflict if request.query["kind"] == "http" else RAISED[request.query["kind"]]

    async def redirect(request: web.Request) -> web.Response:
        await add_async(request)
        raise web.HTTPSeeOther("/elsewhere")

    async def doom(request: web.Request) -> web.Response:
        await add_async(request)
        container.unit().doom()
        return web.json_response({})

    async def stream(request: web.Request) -> web.StreamResponse:
        await add_async(request)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first;")
        await response.write((await doings.refused_async()).encode())
        await response.write_eof()
        return response

    async def in_background(request: web.Request) -> web.Response:
        def begin() -> None:
            tasks.append(asyncio.create_task(doings.work_afterwards_async(request.query["name"])))

        await add_async(request)
        container.unit().on_commit(begin)
        return web.json_response({})

    async def count(request: web.Request) -> web.Response:
        body = await request.read()
        return web.json_response({"attempts": await doings.count_async(request.query["name"]), "bytes": len(body)})

    async def slow(request: web.Request) -> web.Response:
        await add_async(request)
        await doings.wait_async()
        return web.json_response({})

    async def two(request: web.Request) -> web.Response:
        await doings.put_into_two_async(request.query["name"])
        return answer(request)

    async def nothing(request: web.Request) -> web.Response:
        return web.json_response({})

    async def socket(request: web.Request) -> web.WebSocketResponse:
        response = web.WebSocketResponse()
        await response.prepare(request)
        await response.send_str(await doings.refused_async())
        async with container.transaction():
            await doings.put_async("by the socket")
        await response.close()
        return response

    @web.middleware
    async def on_error(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException:
            raise
        except Exception as error:
            return web.json_response({"handled": type(error).__name__}, status=500)

    @web.middleware
    async def on_handled(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Handled:
            return web.json_response({"names": await doings.names_async()}, status=409)

    app = web.Application(middlewares=[on_error])
    setup(app, container, **options)
    app.middlewares.append(on_handled)
    for each in (add_async, fail, redirect, doom, stream, in_background, count, slow, two, nothing):
        app.router.add_post(f"/{each.__name__.replace('_', '-')}", each)
    app.router.add_get("/nothing", nothing)
    app.router.add_get("/socket", socket)
    if inner is not None:
        app.add_subapp("/inner", application(inner))
    return app
