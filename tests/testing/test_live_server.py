"""The application on a real port, in the isolation of the test: what a browser writes is seen by the test, and gone with it."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import pytest
from fastapi import FastAPI, Form, WebSocket
from fastapi.responses import HTMLResponse, StreamingResponse
from flask import Flask, request
from freezegun import freeze_time
from sqlalchemy import select

from app_db.errors import InvalidUse, IsolationBroken, LiveServerError
from app_db.integrations.fastapi import UnitOfWorkMiddleware
from app_db.testing import isolated, live_server
from harness.applications import Application, Boom, Item, running
from harness.coroutines import with_driver
from harness.projects import CONFTEST, Project
from harness.requiring import need
from harness.webs import client, post

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest_plugins = ["pytester"]

FORM = """<!doctype html><title>Items</title>
<form method="post" action="/items"><label>Name <input name="name"></label><button>Add</button></form>
<output id="done"></output>
<script>
  const one = name => fetch("/items", {method: "POST", body: new URLSearchParams({name})}).then(answer => answer.status)
  const several = names => Promise.all(names.map(one)).then(all => document.getElementById("done").textContent = all.join(" "))
</script>"""


@pytest.fixture(params=["sqlite", "postgresql"])
def app(request: pytest.FixtureRequest) -> Iterator[Application]:
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    with running(writer=url, reader={"mirror": "writer", "read_only": True}) as application:
        yield application
        assert application.names() == []


def add(app: Application, name: str, seconds: float = 0.0) -> None:
    with app.unit():
        app.add(name)
        time.sleep(seconds)


def by_fastapi(app: Application) -> Callable[..., Any]:
    web = FastAPI()

    @web.get("/", response_class=HTMLResponse)
    async def form() -> str:
        return FORM

    @web.post("/items", response_class=HTMLResponse)
    def post(name: str = Form()) -> str:
        add(app, name, 0.05)
        return f"Added {name}."

    @web.post("/awaited")
    async def awaited(name: str = Form()) -> str:
        async with app.unit():
            app.container.writer_async_session().add(Item(name=name))
            await asyncio.sleep(0.05)
        return f"Added {name}."

    @web.get("/boom")
    def boom() -> None:
        raise Boom("of the application")

    return web


def by_flask(app: Application) -> Callable[..., Any]:
    web = Flask(__name__)

    @web.get("/")
    def form() -> str:
        return FORM

    @web.post("/items")
    def post() -> str:
        add(app, request.form["name"], 0.05)
        return f"Added {request.form['name']}."

    @web.get("/boom")
    def boom() -> str:
        raise Boom("of the application")

    return web


def by_hand(app: Application) -> Callable[..., Any]:
    def web(environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
        path = environ["PATH_INFO"]
        if path == "/boom":
            raise Boom("of the application")
        answer = FORM
        if path == "/items":
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
            [name] = parse_qs(body)["name"]
            add(app, name, 0.05)
            answer = f"Added {name}."
        start_response("200 OK" if path in ("/", "/items") else "404 Not Found", [("Content-Type", "text/html")])
        return [answer.encode()]

    return web


WEBS = {"FastAPI": by_fastapi, "Flask": by_flask, "WSGI": by_hand}


@pytest.fixture(params=WEBS)
def web(request: pytest.FixtureRequest, app: Application) -> Callable[..., Any]:
    return WEBS[request.param](app)


@pytest.mark.representative("postgresql-Flask")
def test_what_a_browsers_form_writes_is_seen_by_the_test_and_gone_in_the_next(
    app: Application, web: Callable[..., Any], browser: Browser
) -> None:
    page = browser.new_page()
    for _ in range(2):
        with isolated(app.container) as isolation, live_server(web) as server:
            page.goto(server.url)
            page.get_by_label("Name").fill("tea")
            page.get_by_role("button", name="Add").click()
            page.get_by_text("Added tea.").wait_for()
            with isolation.session() as session:
                assert session.scalars(select(Item.name)).all() == ["tea"]
        assert app.names() == []


@pytest.mark.exhaustive
def test_parallel_requests_of_a_browser_wait_for_each_other(app: Application, web: Callable[..., Any], browser: Browser) -> None:
    page = browser.new_page()
    with isolated(app.container) as isolation, live_server(web) as server:
        page.goto(server.url)
        page.evaluate("several(['a', 'b', 'c', 'd', 'e', 'f'])")
        assert page.locator("#done").text_content() == "200 200 200 200 200 200"
        with isolation.session() as session:
            assert sorted(session.scalars(select(Item.name))) == [*"abcdef"]


@pytest.mark.representative("sqlite")
def test_the_test_prepares_rows_that_requests_see(app: Application) -> None:
    def count(environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [])
        with app.unit():
            return [",".join(app.session("reader").scalars(select(Item.name))).encode()]

    with isolated(app.container) as isolation, live_server(count) as server, isolation.session() as session:
        session.add(Item(name="of the test"))
        session.commit()
        with urllib.request.urlopen(server.url) as answer:
            assert answer.read() == b"of the test"


@pytest.mark.representative("sqlite-WSGI", "postgresql-FastAPI")
def test_a_client_keeps_its_connection(app: Application, web: Callable[..., Any]) -> None:
    with isolated(app.container), live_server(web) as server, client(server.url) as one:
        for name in "abc":
            assert one.post("/items", data={"name": name}).text == f"Added {name}."
        assert one.get("/nowhere").status_code == 404


@pytest.mark.representative("sqlite-WSGI", "sqlite-FastAPI")
def test_an_idle_connection_does_not_delay_the_end(app: Application, web: Callable[..., Any]) -> None:
    with client() as one, socket.socket() as silent:
        with isolated(app.container), live_server(web) as server:
            assert one.get(server.url).status_code == 200
            silent.connect(("127.0.0.1", server.port))
            began = time.monotonic()
        assert time.monotonic() - began < 1
        with pytest.raises(ConnectionError), socket.create_connection(("127.0.0.1", server.port)):
            pass
    assert [thread for thread in threading.enumerate() if "live server" in thread.name] == []


@pytest.mark.representative("sqlite-*")
def test_an_error_of_the_application_is_in_the_log(
    app: Application, web: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with isolated(app.container), live_server(web) as server, client(server.url) as one:
        assert one.get("/boom").status_code == 500
        assert "of the application" in caplog.text  # already, as the test may end here
        assert one.get("/").status_code == 200
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [str(error) for error in errors] == ["of the application"]


@pytest.mark.representative("sqlite")
def test_a_request_is_outside_of_the_units_of_the_test(app: Application) -> None:
    """It waits for them, as it would for a row that is locked, and its error says for what."""
    caught: list[str] = []

    def web(environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [])
        try:
            add(app, "a")
        except Exception as error:
            caught.append(str(error))
        return [b""]

    with isolated(app.container, patience=0.2), live_server(web) as server, app.unit():
        app.add("of the test")
        urllib.request.urlopen(server.url).close()
    assert "the thread 'MainThread'" in caught[0]


@pytest.mark.representative("sqlite-FastAPI")
def test_time_that_stands_still_stops_no_server(app: Application, web: Callable[..., Any]) -> None:
    with freeze_time("2020-01-01"), isolated(app.container), live_server(web, patience=0.5) as server, client(server.url) as one:
        assert one.post("/items", data={"name": "a"}).status_code == 200


# ---- ASGI -------------------------------------------------------------------------------------------------------------------


@pytest.mark.representative("psycopg")
@pytest.mark.parametrize("driver", ["aiosqlite", "psycopg"])
def test_async_sessions_of_requests_share_the_connection_of_the_test(driver: str, request: pytest.FixtureRequest) -> None:
    url: str = request.getfixturevalue("sqlite_url" if driver == "aiosqlite" else "postgres_url")
    with running(writer=with_driver(url, driver)) as app:
        with isolated(app.container) as isolation, live_server(by_fastapi(app)) as server, client(server.url) as one:
            with ThreadPoolExecutor(4) as pool:
                names = [*"abcd"]
                answers = pool.map(lambda name: one.post("/awaited", data={"name": name}).status_code, names)
                assert [*answers] == [200] * 4
            assert one.post("/items", data={"name": "e"}).status_code == 200
            with isolation.session() as session:
                assert sorted(session.scalars(select(Item.name))) == [*"abcde"]
        assert app.names() == []


@pytest.mark.parametrize("way", ["a unit in the endpoint", "a unit for each request"])
def test_coroutines_with_sync_sessions_do_not_wait_for_each_other(way: str, sqlite_url: str) -> None:
    """Such a coroutine can't await, so that the one it waits for could not go on."""
    web = FastAPI()
    with running(writer=sqlite_url) as app:
        if way == "a unit for each request":
            web.add_middleware(UnitOfWorkMiddleware, container=app.container)

        @web.post("/items")
        async def post(name: str = Form()) -> None:
            if way == "a unit for each request":
                app.add(name)
                await asyncio.sleep(0.02)
                return
            with app.unit():
                app.add(name)
                await asyncio.sleep(0.02)

        with isolated(app.container) as isolation, live_server(web) as server, client(server.url) as one:
            with ThreadPoolExecutor(4) as pool:
                answers = pool.map(lambda name: one.post("/items", data={"name": name}).status_code, "abcd")
                assert [*answers] == [200] * 4
            with isolation.session() as session:
                assert sorted(session.scalars(select(Item.name))) == [*"abcd"]
        assert app.names() == []


def test_a_unit_inside_another_that_is_rolled_back_is_told(sqlite_url: str) -> None:
    web, begun = FastAPI(), threading.Event()
    with running(writer=sqlite_url) as app:

        @web.post("/outer")
        async def outer() -> None:
            with app.unit():
                app.add("outer")
                begun.set()
                await asyncio.sleep(0.3)
                raise Boom

        @web.post("/inner")
        async def inner() -> None:
            with app.unit():
                app.add("inner")

        def in_isolation() -> None:
            with isolated(app.container), live_server(web) as server, ThreadPoolExecutor() as pool:
                answer = pool.submit(lambda: post(f"{server.url}/outer").status_code)
                begun.wait()
                assert post(f"{server.url}/inner").status_code == 200
                assert answer.result() == 500

        with pytest.raises(IsolationBroken, match=r"what was committed inside another unit of work .* was undone"):
            in_isolation()


@pytest.mark.parametrize("is_begun", [False, True])
@pytest.mark.parametrize("level", [logging.NOTSET, logging.CRITICAL])  # as an application sets it for its own server
def test_an_error_without_an_answer_is_in_the_log_once(is_begun: bool, level: int, caplog: pytest.LogCaptureFixture) -> None:
    async def web(scope: Any, receive: Any, send: Any) -> None:
        if is_begun:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            await send({"type": "http.response.body", "body": b"he", "more_body": True})
        raise Boom("of the application")

    log = logging.getLogger("uvicorn.error")
    before = log.level
    log.setLevel(level)
    try:
        with live_server(web) as server:
            if is_begun:
                with pytest.raises(http.client.IncompleteRead), urllib.request.urlopen(server.url) as response:
                    response.read()
            else:
                assert post(server.url).status_code == 500
    finally:
        log.setLevel(before)
    assert caplog.text.count("Boom: of the application") == 1


@pytest.mark.exhaustive
def test_asyncpg_serves_requests_and_not_the_test_as_well(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with running(writer=with_driver(postgres_url, "asyncpg")) as app:

        async def read(isolation: Any) -> list[str]:
            async with isolation.async_session() as session:
                return [*await session.scalars(select(Item.name))]

        with isolated(app.container), live_server(by_fastapi(app)) as server, client(server.url) as one:
            assert one.post("/awaited", data={"name": "a"}).status_code == 200
            assert one.post("/awaited", data={"name": "a"}).status_code == 500  # it is there already
        assert app.names() == []
        with isolated(app.container) as isolation, live_server(by_fastapi(app)) as server, client(server.url) as one:
            assert one.post("/awaited", data={"name": "a"}).status_code == 200
            with pytest.raises(Exception, match="or in two event loops, in one test can't be isolated on 'writer'"):
                asyncio.run(read(isolation))
        assert app.names() == []


def test_the_lifespan_starts_and_ends(sqlite_url: str) -> None:
    told: list[str] = []

    @asynccontextmanager
    async def lifespan(web: FastAPI) -> AsyncIterator[None]:
        told.append("started")
        yield
        told.append("ended")

    with live_server(FastAPI(lifespan=lifespan)):
        assert told == ["started"]
    assert told == ["started", "ended"]


@pytest.mark.representative("sqlite")
def test_a_lifespan_may_shut_the_container_down(app: Application) -> None:
    """As it does in production. The isolation of the test outlasts it."""

    @asynccontextmanager
    async def lifespan(web: FastAPI) -> AsyncIterator[None]:
        yield
        waiting = app.container.shutdown_resources()
        if waiting is not None:
            await waiting

    for _ in range(2):
        web = by_fastapi(app)
        web.router.lifespan_context = lifespan  # type: ignore[attr-defined]
        with isolated(app.container) as isolation:
            with live_server(web) as server, client(server.url) as one:
                assert one.post("/items", data={"name": "a"}).status_code == 200
                assert one.post("/awaited", data={"name": "b"}).status_code == 200
            with isolation.session() as session:
                assert sorted(session.scalars(select(Item.name))) == ["a", "b"]


def test_an_application_that_does_not_start_is_one_error() -> None:
    @asynccontextmanager
    async def lifespan(web: FastAPI) -> AsyncIterator[None]:
        raise Boom("no start")
        yield

    with pytest.raises(LiveServerError, match="The application did not start") as caught, live_server(FastAPI(lifespan=lifespan)):
        pass
    assert str(caught.value.__cause__) == "no start"


def ticks_by_fastapi(ended: threading.Event) -> Callable[..., Any]:
    web = FastAPI()

    @web.get("/events")
    async def events() -> StreamingResponse:
        async def ticks() -> AsyncIterator[str]:
            try:
                while True:
                    yield "tick\n"
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        return StreamingResponse(ticks())

    return web


def ticks_by_hand(ended: threading.Event) -> Callable[..., Any]:
    def ticks() -> Iterator[bytes]:
        try:
            while True:
                yield b"tick\n"
                time.sleep(0.01)
        finally:
            ended.set()

    def web(environ: Any, start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        return ticks()

    return web


@pytest.mark.parametrize("ticks", [ticks_by_fastapi, ticks_by_hand])
def test_a_stream_that_goes_on_is_cancelled_in_time(ticks: Callable[[threading.Event], Any]) -> None:
    ended = threading.Event()
    with client() as one, ExitStack() as outer:
        with live_server(ticks(ended), patience=0.2) as server:
            answer = outer.enter_context(one.stream("GET", f"{server.url}/events"))
            assert next(answer.iter_text()).startswith("tick")
            began = time.monotonic()
        assert time.monotonic() - began < 2
    assert ended.wait(1)


@pytest.mark.exhaustive
def test_a_thread_of_a_request_that_does_not_end_is_named() -> None:
    web, begun, end = FastAPI(), threading.Event(), threading.Event()

    @web.get("/slow")
    def slow() -> None:
        begun.set()
        end.wait(10)

    with (
        pytest.raises(LiveServerError, match="could not end: it had no answer to GET /slow within"),
        live_server(web, patience=0.1) as server,
    ):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/slow?secret=1")
        begun.wait()
    end.set()
    connection.close()
    while any(thread.name == "live server" for thread in threading.enumerate()):
        time.sleep(0.01)


@pytest.mark.exhaustive
def test_a_websocket_that_stays_open_is_closed() -> None:
    need("websockets")
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    web = FastAPI()

    @web.websocket("/talk")
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        while True:
            await socket.send_text(await socket.receive_text())

    with ExitStack() as outer:
        with live_server(web) as server:
            talking = outer.enter_context(connect(f"ws{server.url.removeprefix('http')}/talk", proxy=None))
            talking.send("hello")
            assert talking.recv() == "hello"
            began = time.monotonic()
        assert time.monotonic() - began < 1
        with pytest.raises(ConnectionClosed):
            talking.recv()


def test_without_uvicorn_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "app_db.testing._asgi_server", raising=False)
    with pytest.raises(LiveServerError, match=r"needs uvicorn .*pip install 'app-db\[live-server\]'"), live_server(FastAPI()):
        pass


# ---- WSGI -------------------------------------------------------------------------------------------------------------------


def test_a_request_that_does_not_end_is_named() -> None:
    end = threading.Event()

    def web(environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
        end.wait(10)
        start_response("200 OK", [])
        return [b""]

    with (
        pytest.raises(LiveServerError, match=r"could not end: it had no answer to GET /slow within 0\.1 s"),
        live_server(web, patience=0.1) as server,
    ):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/slow?secret=1")
        time.sleep(0.1)
    end.set()
    connection.close()


def test_the_error_of_the_test_comes_first() -> None:
    begun, end = threading.Event(), threading.Event()

    def web(environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
        begun.set()
        end.wait(10)
        start_response("200 OK", [])
        return [b""]

    with pytest.raises(Boom) as caught, live_server(web, patience=0.1) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/slow")
        begun.wait()
        raise Boom
    end.set()
    connection.close()
    assert "app_db: The live server could not end: it had no answer to GET /slow" in caught.value.__notes__[0]


def test_a_request_that_runs_at_the_end_is_answered() -> None:
    begun = threading.Event()

    def web(environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
        begun.set()
        time.sleep(0.2)
        start_response("200 OK", [])
        return [str(environ["wsgi.multithread"]).encode()]

    with ThreadPoolExecutor() as pool:
        with live_server(web) as server:
            answer = pool.submit(lambda: urllib.request.urlopen(server.url).read())
            begun.wait()
        assert answer.result() == b"True"


@pytest.mark.representative("WSGI")
@pytest.mark.parametrize("web", ["Flask", "WSGI"])
def test_a_long_body_that_is_not_read_is_answered(web: str, sqlite_url: str) -> None:
    with running(writer=sqlite_url) as app, live_server(WEBS[web](app)) as server, client(server.url) as one:
        assert one.post("/nowhere", content=b"x" * 3_000_000).status_code == 404


def test_a_body_without_a_length_is_refused(sqlite_url: str) -> None:
    with running(writer=sqlite_url) as app, live_server(by_flask(app)) as server, client(server.url) as one:
        answer = one.post("/items", content=iter([b"name=", b"tea"]))
        assert answer.status_code == 411
        assert "Send the header Content-Length" in answer.text


# ---- what an application is ---------------------------------------------------------------------------------------------------


def test_the_arguments_tell_the_interface(sqlite_url: str) -> None:
    async def asgi(*arguments: Any) -> None:
        scope, _, send = arguments
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})

    def wsgi(*arguments: Any) -> list[bytes]:
        arguments[1]("204 No Content", [])
        return []

    with live_server(asgi) as server, client(server.url) as one:
        assert one.get("/").status_code == 204
    with live_server(wsgi, interface="wsgi") as server, client(server.url) as one:
        assert one.get("/").status_code == 204


def make_application() -> FastAPI:
    return FastAPI()


@pytest.mark.parametrize(
    ("application", "described"),
    [
        (make_application, "The function make_application is not seen to be an ASGI or a WSGI application"),
        (lambda *arguments: None, "The function <lambda> is not seen to be an ASGI or a WSGI application"),
        ("shop:app", "A str is not seen to be an ASGI or a WSGI application"),
    ],
)
def test_what_is_no_application_is_refused(application: Any, described: str) -> None:
    with pytest.raises(InvalidUse) as caught, live_server(application):
        pass
    assert caught.value.message.startswith(described)
    assert 'interface="asgi"' in caught.value.message


def test_an_unknown_interface_is_refused() -> None:
    with pytest.raises(InvalidUse, match="There is no interface 'cgi'"), live_server(make_application, interface="cgi"):  # type: ignore[arg-type]
        pass


# ---- the plugin ---------------------------------------------------------------------------------------------------------------

WEB = {
    "asgi": """
        import fastapi, shop

        app = fastapi.FastAPI()

        @app.post("/orders")
        def order():
            shop.place_order()

        @app.get("/boom")
        def boom():
            raise ValueError("of the application")
    """,
    "wsgi": """
        import flask, shop

        app = flask.Flask(__name__)

        @app.post("/orders")
        def order():
            shop.place_order()
            return ""

        @app.get("/boom")
        def boom():
            raise ValueError("of the application")
    """,
}

APPLICATION = """
    @pytest.fixture(scope="session")
    def app_db_application():
        from web import app
        return app
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: Path) -> Project:
    made = Project(pytester, monkeypatch, installed)
    made.file("conftest.py", CONFTEST + APPLICATION)
    return made


@pytest.mark.exhaustive
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.parametrize("interface", WEB)
def test_the_fixture_serves_the_application_of_the_project(
    project: Project, request: pytest.FixtureRequest, database: str, interface: str
) -> None:
    if database == "postgresql":
        project.set("WRITER__URL", request.getfixturevalue("postgres_url"))
    project.file("web.py", WEB[interface])
    project.file(
        "test_shop.py",
        """
        import pytest, shop
        from urllib.request import urlopen

        @pytest.mark.parametrize("number", range(2))
        def test_a_request(app_db_live_server, app_db_session, app_db_expecting, number):
            with app_db_expecting({"writer": 1, "warehouse": 1}):
                urlopen(f"{app_db_live_server.url}/orders", data=b"")
            assert app_db_session.scalar(shop.ORDERS) == 1

        @pytest.mark.app_db(isolation=False)
        def test_not_isolated(app_db_live_server):
            urlopen(f"{app_db_live_server.url}/orders", data=b"")
            assert shop.orders() == 1

        def test_an_error(app_db_live_server):
            urlopen(f"{app_db_live_server.url}/boom")
        """,
    )
    result = project.run()
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        ["*HTTPError: HTTP Error 500: *", "*Captured log call*", "*boom*", "ValueError: of the application"]
    )


@pytest.mark.exhaustive
def test_without_an_application_the_fixture_says_what_to_write(project: Project) -> None:
    project.file("conftest.py", CONFTEST)
    project.file("test_shop.py", "def test_a_request(app_db_live_server):\n    pass\n")
    result = project.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["The fixture app_db_live_server needs the ASGI or WSGI application*", "*def app_db_application():"]
    )


@pytest.mark.exhaustive
def test_coroutines_use_the_server(project: Project) -> None:
    project.file("web.py", WEB["asgi"])
    project.file(
        "test_shop.py",
        """
        import httpx, pytest, shop

        @pytest.mark.asyncio
        async def test_a_request(app_db_live_server, app_db_async_session):
            async with httpx.AsyncClient(trust_env=False) as client:
                await client.post(f"{app_db_live_server.url}/orders")
            assert await app_db_async_session.scalar(shop.ORDERS) == 1
        """,
    )
    project.run(plugins=("asyncio",)).assert_outcomes(passed=1)
