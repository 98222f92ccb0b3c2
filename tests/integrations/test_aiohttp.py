"""aiohttp, and docs/how-to/aiohttp.md, on aiohttp's own server. What every framework does is in test_every_framework.py."""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from aiohttp import web
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError
from websockets.sync.client import connect

from app_db.errors import InvalidUse, NoUnitOfWork, ReadOnlyViolation
from app_db.integrations.aiohttp import setup
from harness.recipes import Recipe, executed
from harness.webs import client

NewUrl = Callable[[], str]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def serving(app: web.Application, **options: Any) -> Iterator[httpx.Client]:
    """Serve an application by aiohttp for the length of the block, which gets a client."""
    addresses: list[str] = []
    started = threading.Event()
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def run() -> None:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=5, **options)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        addresses.append(f"http://{host}:{port}")
        started.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="aiohttp")
    thread.start()
    try:
        assert started.wait(5)
        with client(addresses[0]) as asking:
            yield asking
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


class Site:
    """The page's application, with more routes, on a real server."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.container = recipe, recipe.container
        self.app: web.Application = recipe["app"]
        self.arrived, self.go_on = threading.Event(), threading.Event()
        self.answered = threading.Event()
        for handler in (self.stream, self.hook, self.wait):
            self.app.router.add_post(f"/{handler.__name__}/{{sku}}", handler)
        self.app.router.add_get("/socket/{sku}", self.socket)

    def put(self, request: web.Request, more: str = "") -> None:
        self.container.writer_async_session().add(self.recipe["Order"](sku=request.match_info["sku"] + more))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        self.put(request)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(f"{self.recipe.skus()};".encode())
        try:
            self.container.writer_async_session()
        except NoUnitOfWork as error:
            await response.write(error.message.encode())
        await response.write_eof()
        return response

    async def socket(self, request: web.Request) -> web.StreamResponse:
        self.put(request)
        response = web.WebSocketResponse()
        await response.prepare(request)
        await response.send_str(f"{self.recipe.skus()}")
        async with self.container.transaction():
            self.put(request, " by the socket")
        await response.close()
        return response

    async def hook(self, request: web.Request) -> web.Response:
        def fail() -> None:
            raise RuntimeError("a hook")

        self.put(request)
        self.container.unit().on_commit(fail)
        return web.Response()

    async def wait(self, request: web.Request) -> web.Response:
        self.put(request)
        self.arrived.set()
        try:
            await asyncio.to_thread(self.go_on.wait, 20)
        finally:
            asyncio.get_running_loop().call_soon(self.answered.set)
        return web.Response()


@pytest.fixture
def site(new_postgres_url: NewUrl) -> Iterator[Site]:
    with executed("aiohttp", new_postgres_url()) as recipe:
        yield Site(recipe)


def test_what_the_client_hears_is_what_the_database_holds(site: Site) -> None:
    with serving(site.app) as asking:
        for path, status, is_kept in [
            ("orders/A-1", 201, True),
            ("orders/A-1", 409, True),
            ("orders/TAKEN", 500, False),
            ("hook/A-2", 200, True),
        ]:
            answer = asking.post(path)
            assert (path, answer.status_code) == (path, status)
            assert (path, path.rpartition("/")[2] in site.recipe.skus()) == (path, is_kept)
            assert (path, site.recipe.in_use()) == (path, 0)


def test_a_web_socket_ends_the_unit_before_its_first_byte(site: Site) -> None:
    with serving(site.app) as asking, connect(str(asking.base_url).replace("http", "ws") + "/socket/A-1", proxy=None) as socket:
        assert socket.recv() == "['A-1']"
        with pytest.raises(Exception, match="1000"):
            socket.recv()
    assert site.recipe.skus() == ["A-1", "A-1 by the socket"]


def test_a_handler_that_is_cancelled_because_its_client_has_gone_gets_nothing_committed(site: Site) -> None:
    with serving(site.app, handler_cancellation=True) as asking:
        with socket.create_connection((asking.base_url.host, asking.base_url.port or 0)) as gone:
            gone.sendall(b"POST /wait/A-1 HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\n\r\n")
            assert site.arrived.wait(20)
        assert site.answered.wait(20)
        site.go_on.set()
    assert site.recipe.skus() == []


def test_a_middleware_outside_may_answer_for_a_commit_and_one_inside_has_the_unit(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    container = site.container

    @web.middleware
    async def answering(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except IntegrityError:
            async with container.transaction():
                await container.writer_async_session().execute(text("SELECT 1"))
            return web.Response(status=409)

    @web.middleware
    async def inside(request: web.Request, handler: Handler) -> web.StreamResponse:
        await container.writer_async_session().execute(text("INSERT INTO orders VALUES (:sku)"), {"sku": request.query["by"]})
        return await handler(request)

    app = web.Application(middlewares=[answering])
    setup(app, container)
    app.middlewares.append(inside)
    app.router.add_post("/orders/{sku}", site.recipe["place_order"])
    app.router.add_post("/hook/{sku}", site.hook)
    with serving(app) as asking, caplog.at_level(logging.ERROR, "app_db"):
        assert asking.post("orders/A-1?by=B-1").status_code == 201
        assert asking.post("orders/TAKEN?by=B-2").status_code == 409
        assert asking.post("orders/A-1?by=B-3").status_code == 409
        assert asking.post("hook/A-2?by=B-4").status_code == 200
    assert site.recipe.skus() == ["A-1", "A-2", "B-1", "B-4"]
    assert "A request has committed, and then something failed" in caplog.messages


def test_set_up_twice_and_in_a_nested_application_it_is_one_unit(site: Site) -> None:
    """Middlewares of the outer application write in the unit of the nested one, and have the last word on it."""
    writer = site.container.connection("writer")

    @web.middleware
    async def inside(request: web.Request, handler: Handler) -> web.StreamResponse:
        if "by" in request.query:
            await writer.async_session().execute(text("INSERT INTO orders VALUES (:sku)"), {"sku": request.query["by"]})
        response = await handler(request)
        return web.Response(status=409) if "refused" in request.query else response

    async def count(request: web.Request) -> web.Response:
        number = await writer.async_session().scalar(text("SELECT count(*) FROM orders WHERE sku LIKE 'B%'"))
        return web.Response(text=str(number))

    outer = web.Application()
    setup(outer, site.container)
    setup(outer, site.container)
    outer.middlewares.append(inside)
    site.app.router.add_get("/count", count)
    outer.add_subapp("/nested", site.app)
    with serving(outer) as asking:
        assert asking.get("nested/count?by=B-1").text == "1"
        assert asking.post("nested/orders/TAKEN?by=B-2").status_code == 500
        assert asking.post("nested/orders/A-1?refused").status_code == 409
        assert asking.post("nested/stream/A-2?by=B-3").text.startswith("['A-2', 'B-1', 'B-3'];")
    assert site.recipe.skus() == ["A-2", "B-1", "B-3"]


@pytest.mark.exhaustive
def test_a_method_that_reads_has_a_read_only_unit(site: Site) -> None:
    seen: list[type[Exception]] = []

    async def add(request: web.Request) -> web.Response:
        try:
            await site.container.writer_async_session().execute(text("INSERT INTO orders VALUES ('A-1')"))
        except ReadOnlyViolation as error:
            seen.append(type(error))
        return web.Response()

    app = web.Application()
    setup(app, site.container, read_only_methods=["get"], rule=lambda status, headers, exception: status == 200)
    app.router.add_route("*", "/add", add)
    with serving(app) as asking:
        asking.get("add")
        assert (seen, site.recipe.skus()) == ([ReadOnlyViolation], [])
        asking.post("add")
        assert site.recipe.skus() == ["A-1"]


@pytest.mark.exhaustive
def test_the_end_disposes_the_engines(site: Site) -> None:
    with serving(site.app) as asking:
        asking.post("orders/A-1")
    with site.recipe.plain.connect() as connection:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        assert connection.execute(text(others + " AND backend_type = 'client backend'")).scalar_one() == 0


# ---- attempts -----------------------------------------------------------------------------------------------------------------


def tries_of(
    site: Site, read: Handler, asks: Callable[[httpx.Client], httpx.Response], *, client_max_size: int = 2**20, **options: Any
) -> tuple[int, int]:
    """Send a request whose first COMMIT fails. Return the status, and how often the handler was called."""
    tries = 0

    async def add(request: web.Request) -> web.StreamResponse:
        nonlocal tries
        tries += 1
        site.container.writer_async_session().add(site.recipe["Order"](sku=f"try {tries}"))
        return await read(request)

    app = web.Application(client_max_size=client_max_size)
    setup(app, site.container, **{"attempts": 3, **options})
    app.router.add_post("/", add)
    site.recipe.fail_commits()
    with serving(app) as asking:
        status = asks(asking).status_code
    assert site.recipe.skus() == ([f"try {tries}"] if status == 200 else [])
    return status, tries


def whole(asking: httpx.Client) -> httpx.Response:
    return asking.post("/", content=b"x" * 100_000)


def in_chunks(asking: httpx.Client) -> httpx.Response:
    return asking.post("/", content=iter([b"x" * 100_000]))


def compressed(asking: httpx.Client) -> httpx.Response:
    return asking.post("/", content=gzip.compress(b"x" * 100_000), headers={"Content-Encoding": "gzip"})


async def by_read(request: web.Request) -> web.StreamResponse:
    assert await request.read() == b"x" * 100_000
    return web.Response()


async def by_content(request: web.Request) -> web.StreamResponse:
    assert await request.content.read() == b"x" * 100_000
    return web.Response()


async def not_at_all(request: web.Request) -> web.StreamResponse:
    return web.Response()


async def and_raise(request: web.Request) -> web.StreamResponse:
    raise RuntimeError("boom")


async def by_itself(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write_eof()
    return response


async def after_another_answer(request: web.Request) -> web.StreamResponse:
    try:
        return await by_itself(request)
    except OperationalError:
        response = web.StreamResponse(status=503)
        response.content_length = 7
        await response.prepare(request)
        await response.write(b"not now")
        raise


@pytest.mark.parametrize(
    "read", [by_read, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in (not_at_all, by_itself))]
)
def test_a_request_is_answered_anew_with_its_body(read: Handler, site: Site) -> None:
    assert tries_of(site, read, whole) == (200, 2)


@pytest.mark.parametrize(
    ("read", "asks", "options"),
    [
        (by_content, whole, {}),
        pytest.param(by_read, in_chunks, {}, marks=pytest.mark.exhaustive),
        pytest.param(by_read, compressed, {}, marks=pytest.mark.exhaustive),
        pytest.param(by_read, whole, {"body_limit": 99_999}, marks=pytest.mark.exhaustive),
        pytest.param(not_at_all, whole, {"client_max_size": 99_999}, marks=pytest.mark.exhaustive),
    ],
)
def test_a_request_whose_body_is_not_kept_is_not_repeated(
    read: Handler,
    asks: Callable[[httpx.Client], httpx.Response],
    options: dict[str, Any],
    site: Site,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert tries_of(site, read, asks, **options) == (500, 1)
    assert "A request is not answered anew after OperationalError: its body is not kept as a whole" in caplog.messages


@pytest.mark.exhaustive
@pytest.mark.parametrize(("read", "attempts"), [(by_read, 1), (and_raise, 3)])
def test_a_request_is_not_repeated_without_attempts_or_after_an_error_that_stays(
    read: Handler, attempts: int, site: Site
) -> None:
    assert tries_of(site, read, whole, attempts=attempts) == (500, 1)


def test_a_request_is_not_repeated_once_something_was_sent(site: Site) -> None:
    assert tries_of(site, after_another_answer, whole) == (503, 1)


@pytest.mark.filterwarnings("ignore:It is recommended to use web.RequestKey")
def test_another_attempt_finds_on_the_request_what_the_first_one_has_found(site: Site) -> None:
    found: list[list[str]] = []

    @web.middleware
    async def outside(request: web.Request, handler: Handler) -> web.StreamResponse:
        request["user"] = "outside"
        return await handler(request)

    async def add(request: web.Request) -> web.Response:
        found.append([str(request.get(name)) for name in ("user", "note")])
        request["user"] = request["note"] = "the first attempt"
        site.container.writer_async_session().add(site.recipe["Order"](sku=f"A-{len(found)}"))
        return web.Response()

    app = web.Application(middlewares=[outside])
    setup(app, site.container, attempts=2)
    app.router.add_post("/", add)
    site.recipe.fail_commits()
    with serving(app) as asking:
        assert asking.post("/").status_code == 200
    assert (found, site.recipe.skus()) == ([["outside", "None"]] * 2, ["A-2"])


def test_no_attempts_are_refused(site: Site) -> None:
    with pytest.raises(InvalidUse, match="attempts=0 leaves no attempt"):
        setup(web.Application(), site.container, attempts=0)
