"""docs/how-to/quart.md: what the client hears is what the database holds, on a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypercorn.asyncio import serve
from hypercorn.config import Config
from quart import websocket
from websockets.sync.client import connect

from app_db.errors import NoUnitOfWork
from harness.recipes import Recipe, executed
from harness.servers import free_port
from harness.webs import client

NewUrl = Callable[[], str]


@contextmanager
def serving(app: Any) -> Iterator[httpx.Client]:
    """Serve an application by Hypercorn for the length of the block, which gets a client."""
    config = Config()
    config.bind = [f"127.0.0.1:{free_port()}"]
    config.accesslog = config.errorlog = None
    started, ended = threading.Event(), threading.Event()
    app.before_serving(started.set)

    async def run() -> None:
        async def until_the_end() -> None:
            await asyncio.to_thread(ended.wait)

        await serve(app, config, shutdown_trigger=until_the_end)

    thread = threading.Thread(target=asyncio.run, args=(run(),), name="hypercorn")
    thread.start()
    try:
        assert started.wait(20)
        with client(f"http://{config.bind[0]}") as asking:
            yield asking
    finally:
        ended.set()
        thread.join()


def add_routes(recipe: Recipe, seen: list[str]) -> None:
    """Add to the page's application what the page only mentions."""
    app, container, order = recipe["app"], recipe.container, recipe["Order"]

    def put(sku: str) -> None:
        container.writer_async_session().add(order(sku=sku))

    @app.post("/sync/<sku>")  # type: ignore[untyped-decorator]
    def place_in_a_thread(sku: str) -> str:
        container.writer_session().add(order(sku=sku))
        return "placed"

    @app.post("/boom/<sku>")  # type: ignore[untyped-decorator]
    async def fail(sku: str) -> str:
        put(sku)
        raise RuntimeError(sku)

    @app.post("/stream/<sku>")  # type: ignore[untyped-decorator]
    async def stream(sku: str) -> AsyncIterator[str]:
        put(sku)

        async def parts() -> AsyncIterator[str]:
            yield "first;"
            try:
                container.writer_async_session()
            except NoUnitOfWork as error:
                yield error.message

        return parts()

    async def afterwards(sku: str) -> None:
        async with container.transaction():
            put(sku)
        seen.append(sku)

    @app.post("/background/<sku>")  # type: ignore[untyped-decorator]
    async def in_background(sku: str) -> str:
        put(sku)
        container.unit().on_commit(app.add_background_task, afterwards, f"{sku} later")
        return "placed"

    @app.errorhandler(500)  # type: ignore[untyped-decorator]
    async def on_error(error: Any) -> tuple[str, int]:
        return "the application's own answer", 500

    @app.websocket("/socket")  # type: ignore[untyped-decorator]
    async def socket() -> None:
        try:
            container.writer_async_session()
        except NoUnitOfWork as error:
            await websocket.send(error.message)


@pytest.fixture
def site(new_postgres_url: NewUrl) -> Iterator[tuple[Recipe, httpx.Client]]:
    with executed("quart", new_postgres_url()) as recipe:
        add_routes(recipe, [])
        with serving(recipe["app"]) as asking:
            yield recipe, asking


def test_what_the_client_hears_is_what_the_database_holds(site: tuple[Recipe, httpx.Client]) -> None:
    recipe, asking = site
    for path, status, skus in [
        ("orders/A-1", 201, ["A-1"]),
        ("orders/A-1", 409, ["A-1"]),
        ("orders/TAKEN", 500, ["A-1"]),
        ("sync/A-2", 200, ["A-1", "A-2"]),
        ("sync/TAKEN", 500, ["A-1", "A-2"]),
        ("boom/A-3", 500, ["A-1", "A-2"]),
        ("stream/TAKEN", 500, ["A-1", "A-2"]),
    ]:
        answer = asking.post(path)
        assert (path, answer.status_code, recipe.skus()) == (path, status, skus)
        assert (path, recipe.in_use()) == (path, 0)
        is_asked = answer.text == "the application's own answer"
        assert (path, is_asked) == (path, path == "boom/A-3"), "Quart's handler for 500 is not asked about a COMMIT"


@pytest.mark.exhaustive
def test_a_stream_has_no_unit(site: tuple[Recipe, httpx.Client]) -> None:
    recipe, asking = site
    answer = asking.post("stream/A-1")
    assert answer.text.startswith("first;The 'writer' session was used after the response had begun")
    assert recipe.skus() == ["A-1"]


def test_a_background_task_has_a_unit_of_its_own(new_postgres_url: NewUrl) -> None:
    with executed("quart", new_postgres_url()) as recipe:
        seen: list[str] = []
        add_routes(recipe, seen)
        with serving(recipe["app"]) as asking:
            assert asking.post("background/A-1").status_code == 200
        assert seen == ["A-1 later"]  # the server waits for its tasks before it ends
        assert recipe.skus() == ["A-1", "A-1 later"]


@pytest.mark.exhaustive
def test_a_web_socket_has_no_unit(site: tuple[Recipe, httpx.Client]) -> None:
    _, asking = site
    with connect(str(asking.base_url).replace("http", "ws") + "/socket", proxy=None) as socket:
        assert "was used outside a unit of work" in str(socket.recv())
