"""docs/how-to/quart.md on a real server. What every framework does with a request is in test_every_framework.py."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypercorn.asyncio import serve
from hypercorn.config import Config
from quart import Quart, request
from sqlalchemy import text

from app_db.integrations.asgi import UnitOfWorkMiddleware
from harness.recipes import executed
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


def test_what_the_client_hears_is_what_the_database_holds(new_postgres_url: NewUrl) -> None:
    with executed("quart", new_postgres_url()) as recipe, serving(recipe["app"]) as asking:
        for path, status, skus in [
            ("orders/A-1", 201, ["A-1"]),
            ("orders/A-1", 409, ["A-1"]),
            ("orders/TAKEN", 500, ["A-1"]),
        ]:
            answer = asking.post(path)
            assert (path, answer.status_code, recipe.skus()) == (path, status, skus)
            assert (path, recipe.in_use()) == (path, 0)


def test_the_server_waits_for_a_background_task_before_it_ends(new_postgres_url: NewUrl) -> None:
    with executed("quart", new_postgres_url()) as recipe:
        app, container, order = recipe["app"], recipe.container, recipe["Order"]
        seen: list[str] = []

        async def afterwards(sku: str) -> None:
            async with container.transaction():
                container.writer_async_session().add(order(sku=sku))
            seen.append(sku)

        @app.post("/background/<sku>")  # type: ignore[untyped-decorator]
        async def in_background(sku: str) -> str:
            container.writer_async_session().add(order(sku=sku))
            container.unit().on_commit(app.add_background_task, afterwards, f"{sku} later")
            return "placed"

        with serving(app) as asking:
            assert asking.post("background/A-1").status_code == 200
        assert seen == ["A-1 later"]
        assert recipe.skus() == ["A-1", "A-1 later"]


@pytest.mark.parametrize("propagates", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_commit_is_repeated_and_a_view_if_its_errors_reach_the_middleware(propagates: bool, new_postgres_url: NewUrl) -> None:
    with executed("quart", new_postgres_url()) as recipe:
        bodies: list[str | bytes] = []
        app: Any = Quart("again")
        app.config["PROPAGATE_EXCEPTIONS"] = propagates
        app.asgi_app = UnitOfWorkMiddleware(app.asgi_app, recipe.container, attempts=2)
        app.after_serving(recipe.container.shutdown_resources)

        @app.post("/<when>/<sku>")  # type: ignore[untyped-decorator]
        async def place(when: str, sku: str) -> str:
            session = recipe.container.writer_async_session()
            session.add(recipe["Order"](sku=sku))
            bodies.append(await request.get_data())
            if when == "in-the-view":
                await session.flush()
                await session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
            return "placed"

        @app.errorhandler(500)  # type: ignore[untyped-decorator]
        async def on_error(error: object) -> tuple[str, int]:
            return "the application's own answer", 500

        with serving(app) as asking:
            recipe.fail_commits()
            assert asking.post("at-commit/A-1", content=b"x" * 100_000).status_code == 200
            assert bodies == [b"x" * 100_000] * 2
            recipe.fail_commits()
            answer = asking.post("in-the-view/A-2")
            assert (answer.status_code, len(bodies)) == ((200, 4) if propagates else (500, 3))
            assert (answer.text == "the application's own answer") is not propagates
        assert recipe.skus() == ["A-1", "A-2"] if propagates else ["A-1"]
