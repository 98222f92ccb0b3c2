"""A unit of work for each request of an ASGI application: what the client hears is what the database holds."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from app_db.errors import InvalidUse, NoUnitOfWork
from app_db.integrations import commit_rule
from app_db.integrations.asgi import UnitOfWorkMiddleware
from app_db.integrations.fastapi import dependency_of, lifespan
from app_db.testing import isolated
from harness.applications import DEFER_UNIQUENESS, Application, Item, running
from harness.web_applications import FRAMEWORKS, PLACES, Seen, Site, fastapi_app, placed, site, starlette_app
from harness.webs import post, serving

NewUrl = Callable[[], str]


ORDINARY = ("starlette, outside", "fastapi, alone", "fastapi, inside")
SITES = [f"{framework}, {place}" for framework in FRAMEWORKS for place in PLACES]


@pytest.fixture(params=[each if each in ORDINARY else pytest.param(each, marks=pytest.mark.exhaustive) for each in SITES])
def web(request: pytest.FixtureRequest, new_postgres_url: NewUrl) -> Iterator[Site]:
    framework, place = request.param.split(", ")
    with site(framework, place, new_postgres_url()) as opened:
        yield opened


# ---- what commits ---------------------------------------------------------------------------------------------------------


def test_what_the_client_hears_is_what_the_database_holds(web: Site) -> None:
    """One request of each kind: its answer, and whether its row is there as soon as the client has heard it."""
    kinds: list[tuple[str, dict[str, Any], int, bool]] = [
        ("add", {}, 201, True),
        ("add", {"status": 409}, 409, False),
        ("add", {"status": 500}, 500, False),
        ("add", {"status": 409, "tm": "commit"}, 409, True),
        ("add", {"tm": "abort"}, 201, False),
        ("add", {"tm": "some other system"}, 201, True),
        ("add-sync", {}, 201, True),
        ("add-sync", {"status": 404}, 404, False),
        ("redirect", {}, 303, True),
        ("doom", {}, 200, False),
        ("fail", {"kind": "boom"}, 500, False),
        ("fail", {"kind": "handled"}, 409, False),
        ("stream", {}, 200, True),
    ]
    for number, (path, query, status, is_kept) in enumerate(kinds):
        answer = web.post(path, name=f"item {number}", **query)
        assert (path, query, answer.status_code) == (path, query, status)
        assert (path, query, f"item {number}" in web.names) == (path, query, is_kept)


@pytest.mark.parametrize("path", ["add", "add-sync", "stream"])
def test_a_commit_that_fails_is_a_500_and_leaves_no_row(path: str, web: Site) -> None:
    answer = web.post(path, name="taken")
    assert (answer.status_code, web.names) == (500, [])
    assert [type(error) for error in web.seen.handled] == [IntegrityError], "the handler gets the original error"
    assert web.post("add", name="next").status_code == 201
    assert web.names == ["next"]


@pytest.mark.parametrize("is_coroutine", [True, False])
def test_a_handler_for_the_errors_own_class_answers_for_a_commit_and_may_read(
    is_coroutine: bool, new_postgres_url: NewUrl
) -> None:
    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)

        async def add(request: Request) -> Response:
            app.container.writer_async_session().add(Item(name="taken"))
            return JSONResponse({}, 201)

        async def awaited(request: Request, error: Exception) -> Response:
            return answer((await app.container.writer_async_session().scalars(select(Item.name))).all())

        def called(request: Request, error: Exception) -> Response:
            return answer(app.container.writer_session().scalars(select(Item.name)).all())

        def answer(names: object) -> Response:
            return JSONResponse({"there is": names}, 409)

        whole = Starlette(
            routes=[Route("/", add, methods=["POST"])],
            middleware=placed(app, "alone"),
            exception_handlers={IntegrityError: awaited if is_coroutine else called},
            lifespan=lifespan(app.container),
        )
        with serving(whole) as address:
            answered_by_handler = post(address)
            assert (answered_by_handler.status_code, answered_by_handler.json()) == (409, {"there is": ["taken"]})
        assert app.names() == ["taken"]


def test_a_handler_may_read_in_the_unit_that_will_abort(web: Site) -> None:
    answer = web.post("fail", name="undone", kind="handled")
    assert (answer.status_code, answer.json()["names"]) == (409, ["taken", "undone"])
    assert web.names == []


def test_a_stream_and_a_background_task_have_no_unit_and_are_told_how_to_begin_one(web: Site) -> None:
    said = web.post("stream", name="streamed").text
    assert said.startswith("first;The 'writer' session was used after the response had begun")
    assert "Begin another one: put the code in `with container.transaction():`" in said
    assert web.post("in-background", name="answered").status_code == 200
    give_up = time.monotonic() + 10
    while "by the task" not in web.names and time.monotonic() < give_up:
        time.sleep(0.02)
    assert web.names == ["answered", "by the task", "streamed"]
    assert [error.after_response for error in web.seen.without_unit] == [True]


def test_a_request_without_a_session_opens_no_connection(web: Site) -> None:
    connected: list[object] = []

    def note(*arguments: object) -> None:
        connected.append(arguments)

    async def listen() -> None:
        event.listen(web.app.container.writer_async_engine().sync_engine, "connect", note)
        event.listen(web.app.container.writer_async_engine().sync_engine, "checkout", note)

    asyncio.run(listen())
    event.listen(web.app.engine(), "checkout", note)
    assert web.client.get("/nothing").status_code == 200
    assert connected == []


# ---- one of a kind --------------------------------------------------------------------------------------------------------


def test_the_rule() -> None:
    assert [commit_rule(status, {}) for status in (200, 204, 302, 399, 400, 404, 500)] == [True] * 4 + [False] * 3
    assert commit_rule(500, {"x-tm": " Commit "})
    assert not commit_rule(200, {"x-tm": "abort"})
    assert commit_rule(200, {"x-tm": "1.4"}), "the header of another system"


def test_a_request_header_decides_nothing(new_postgres_url: NewUrl) -> None:
    with site("starlette", "alone", new_postgres_url()) as web:
        assert web.client.post("/add", params={"name": "kept"}, headers={"X-Tm": "abort"}).status_code == 201
        assert web.names == ["kept"]


def test_a_rule_of_ones_own(new_postgres_url: NewUrl) -> None:
    def always(status: int, headers: object, exception: object) -> bool:
        return True

    with site("starlette", "alone", new_postgres_url(), rule=always) as web:
        assert web.post("add", name="kept", status=409).status_code == 409
        assert web.names == ["kept"]


def test_a_middleware_that_is_installed_twice_is_one(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        with serving(starlette_app(app, Seen(), placed(app, "alone") * 2)) as address:
            assert post(f"{address}/add", params={"name": "kept"}).status_code == 201
            assert post(f"{address}/add", params={"name": "lost", "status": 409}).status_code == 409
        assert app.names() == ["kept"]


def test_mounted_applications_with_containers_of_their_own(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as outer, running(writer=new_postgres_url()) as inner:
        mounted = starlette_app(inner, Seen(), placed(inner, "alone"))

        async def add(request: Request) -> Response:
            outer.container.writer_async_session().add(Item(name="outer"))
            return JSONResponse({})

        whole = Starlette(
            routes=[Route("/add", add, methods=["POST"]), Mount("/inner", mounted)],
            middleware=placed(outer, "alone"),
            lifespan=lifespan(outer.container, lifespan(inner.container)),
        )
        with serving(whole) as address:
            assert post(f"{address}/add").status_code == 200
            assert post(f"{address}/inner/add", params={"name": "inner"}).status_code == 201
        assert (outer.names(), inner.names()) == (["outer"], ["inner"])


def test_a_web_socket_has_no_unit_and_is_told_how_to_begin_one(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            with pytest.raises(NoUnitOfWork, match="outside a unit of work"):
                app.container.writer_async_session()
            async with app.container.transaction():
                app.container.writer_async_session().add(Item(name="kept"))
            await app.container.shutdown_resources()

        asyncio.run(UnitOfWorkMiddleware(inner, app.container)({"type": "websocket"}, None, None))  # type: ignore[arg-type]
        assert app.names() == ["kept"]


def test_read_only_methods_make_read_only_units(new_postgres_url: NewUrl) -> None:
    with site("starlette", "alone", new_postgres_url(), read_only_methods=("get",)) as web:
        assert web.client.get("/add", params={"name": "refused"}).status_code == 500
        assert web.post("add", name="kept").status_code == 201
        assert web.names == ["kept"]


def test_wrong_options_are_refused_at_once(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url()) as app:
        with pytest.raises(InvalidUse, match="attempts=0 leaves no attempt"):
            UnitOfWorkMiddleware(Starlette(), app.container, attempts=0)
        with pytest.raises(InvalidUse, match="no isolation level"):
            UnitOfWorkMiddleware(Starlette(), app.container, isolation="NONE")


def test_dependencies_are_overridden_as_fastapi_does_it(new_postgres_url: NewUrl) -> None:
    class StandIn:
        def add(self, item: object) -> None:
            added.append(item)

    added: list[object] = []
    with running(writer=new_postgres_url()) as app:
        api = fastapi_app(app, Seen(), placed(app, "alone"))
        api.dependency_overrides[dependency_of(app.container.connection("writer").async_session)] = StandIn
        with serving(api) as address:
            assert post(f"{address}/add", params={"name": "nowhere"}).status_code == 201
        assert (len(added), app.names()) == (1, [])


# ---- again, and gone ------------------------------------------------------------------------------------------------------


def test_a_request_whose_failure_may_pass_is_answered_anew_with_its_body(
    new_postgres_url: NewUrl, caplog: pytest.LogCaptureFixture
) -> None:
    with running(writer=new_postgres_url()) as app:
        app.put("counted")
        bodies: list[bytes] = []

        async def count(request: Request) -> Response:
            bodies.append(await request.body())
            session = app.container.writer_async_session()
            await session.execute(text("SELECT count(*) FROM items"))
            if len(bodies) < 3:
                await asyncio.to_thread(app.run, "UPDATE items SET name = name")
            await session.execute(text("UPDATE items SET name = :name"), {"name": f"attempt {len(bodies)}"})
            return JSONResponse({"attempts": len(bodies)})

        options: dict[str, Any] = {"attempts": 3, "isolation": "REPEATABLE READ", "body_limit": 1000}
        whole = Starlette(
            routes=[Route("/", count, methods=["POST"])],
            middleware=placed(app, "alone", **options),
            lifespan=lifespan(app.container),
        )
        with serving(whole) as address:
            answer = post(address, content=b"x" * 500)
            assert (answer.status_code, answer.json(), app.names()) == (200, {"attempts": 3}, ["attempt 3"])
            assert bodies == [b"x" * 500] * 3
            bodies.clear()
            with caplog.at_level(logging.WARNING, "app_db"):
                assert post(address, content=b"x" * 2000).status_code == 500
            assert len(bodies) == 1
            assert "its body is too large to be kept" in caplog.text


def test_a_client_that_has_gone_gets_no_commit(new_postgres_url: NewUrl) -> None:
    asked, go_on, ended = threading.Event(), asyncio.Event(), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def slow(request: Request) -> Response:
        loops.append(asyncio.get_running_loop())
        app.container.writer_async_session().add(Item(name="for nobody"))
        asked.set()
        await go_on.wait()
        return JSONResponse({})

    async def told(scope: Any, receive: Any, send: Any) -> None:
        await whole(scope, receive, send)
        if scope["type"] == "http":
            ended.set()

    with running(writer=new_postgres_url()) as app:
        whole = Starlette(
            routes=[Route("/", slow, methods=["POST"])], middleware=placed(app, "alone"), lifespan=lifespan(app.container)
        )
        with serving(told) as address:
            host, port = address.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as client:
                client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
                assert asked.wait(10)
            time.sleep(0.2)  # until the server has noticed
            loops[0].call_soon_threadsafe(go_on.set)
            assert ended.wait(10)
            assert app.names() == []
            assert post(address).status_code == 200
        assert app.names() == ["for nobody"]


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("add", {}),
    ("add", {"status": 409}),
    ("add-sync", {}),
    ("fail", {"kind": "boom"}),
    ("fail", {"kind": "handled"}),
    ("stream", {}),
    ("redirect", {}),
    ("doom", {}),
    ("add", {"name": "taken"}),
    ("nothing", {}),
]


ONE_REQUEST_EACH = httpx.Limits(max_keepalive_connections=0)
"""uvicorn closes the connection of a request whose application raised."""


async def many_requests(address: str, number: int) -> list[str]:
    """Send requests of all kinds, 20 at once. Return the names of the items that were acknowledged."""
    acknowledged: list[str] = []
    at_once = asyncio.Semaphore(20)

    async def one(number: int, client: httpx.AsyncClient) -> None:
        path, query = KINDS[number % len(KINDS)]
        asked = {"name": f"item {number}", **query}
        async with at_once:
            answer = await client.post(f"/{path}", params=asked)
        if answer.status_code < 400 and path not in ("doom", "nothing"):
            acknowledged.append(asked["name"])

    async with httpx.AsyncClient(base_url=address, timeout=30, trust_env=False, limits=ONE_REQUEST_EACH) as client:
        await asyncio.gather(*(one(each, client) for each in range(number)))
    return sorted(acknowledged)


@pytest.mark.representative("fastapi")
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_many_requests_at_once_leave_what_was_acknowledged(framework: str, new_postgres_url: NewUrl) -> None:
    with site(framework, "outside", new_postgres_url()) as web:
        assert asyncio.run(many_requests(str(web.client.base_url), 500)) == sorted(web.names)


# ---- tasks and threads of a request -----------------------------------------------------------------------------------------


async def answered(app: Application, endpoint: Callable[[], Any]) -> list[str]:
    """Call an endpoint as a request's, and return what it gives."""
    said: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        said.extend(await endpoint())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    async def send(message: object) -> None:
        """Send nothing."""

    await UnitOfWorkMiddleware(inner, app.container)({"type": "http", "method": "POST"}, receive, send)
    await app.container.shutdown_resources()
    return said


def test_the_next_task_goes_on_when_the_one_that_began_is_done(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:

        async def add(name: str) -> None:
            app.container.writer_async_session().add(Item(name=name))

        async def endpoint() -> list[str]:
            await asyncio.create_task(add("first"))
            await asyncio.create_task(add("second"))
            await add("third")
            return []

        asyncio.run(answered(app, endpoint))
        assert app.names() == ["first", "second", "third"]


def test_two_tasks_at_once_are_refused(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:

        async def endpoint() -> list[str]:
            begun, done = asyncio.Event(), asyncio.Event()

            async def first() -> None:
                app.container.writer_async_session().add(Item(name="first"))
                begun.set()
                await done.wait()

            task = asyncio.create_task(first())
            await begun.wait()
            with pytest.raises(Exception, match="belongs to task") as refused:
                app.container.writer_async_session()
            done.set()
            await task
            return [type(refused.value).__name__]

        assert asyncio.run(answered(app, endpoint)) == ["ForeignUnitOfWork"]
        assert app.names() == ["first"]


def test_what_propagation_does_in_a_request(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        container = app.container

        async def endpoint() -> list[str]:
            async with container.transaction(propagation="requires_new"):
                container.writer_async_session().add(Item(name="new"))
            async with container.transaction(propagation="never"):
                with pytest.raises(NoUnitOfWork):
                    container.writer_async_session()
            async with container.transaction(propagation="mandatory"):
                container.writer_async_session().add(Item(name="mandatory"))
            async with container.transaction(propagation="not_supported"):
                with pytest.raises(NoUnitOfWork):
                    container.writer_async_session()
            with pytest.raises(Exception, match="never"):
                async with container.transaction(propagation="never"):
                    pass
            async with container.transaction():
                container.writer_async_session().add(Item(name="required"))
            assert app.names() == ["new"]
            return []

        asyncio.run(answered(app, endpoint))
        assert app.names() == ["mandatory", "new", "required"]


def test_a_hook_that_fails_after_the_commit_is_logged_and_the_response_sent(
    new_postgres_url: NewUrl, caplog: pytest.LogCaptureFixture
) -> None:
    with running(writer=new_postgres_url()) as app:

        async def endpoint() -> list[str]:
            app.container.writer_async_session().add(Item(name="kept"))
            app.container.unit().on_commit(int, "no number")
            return ["answered"]

        assert asyncio.run(answered(app, endpoint)) == ["answered"]
        assert "A request has committed, and then something failed" in caplog.text
        assert app.names() == ["kept"]


def test_a_request_that_is_cancelled_aborts(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:

        async def endpoint() -> list[str]:
            app.container.writer_async_session().add(Item(name="lost"))
            await app.container.writer_async_session().flush()
            await asyncio.sleep(30)
            return []

        async def main() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await answered(app, endpoint)
            assert app.container.writer_async_engine().pool.checkedout() == 0
            await app.container.shutdown_resources()

        asyncio.run(main())
        assert app.names() == []


# ---- in isolated tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["add", "add-sync"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_requests_are_isolated_as_units_are(framework: str, path: str, new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        whole = FRAMEWORKS[framework](app, Seen(), placed(app, "alone"))

        async def visit() -> list[int]:
            transport = httpx.ASGITransport(whole)
            async with httpx.AsyncClient(transport=transport, base_url="http://shop", trust_env=False) as asking:
                return [
                    (await asking.post(f"/{path}", params={"name": name, "status": status})).status_code
                    for name, status in (("a", "201"), ("b", "409"), ("c", "201"))
                ]

        async def main() -> None:
            async with isolated(app.container):
                assert await visit() == [201, 409, 201]
                async with app.unit():
                    names = (await app.container.writer_async_session().scalars(select(Item.name))).all()
                    assert sorted(names) == ["a", "c"]
            await app.container.shutdown_resources()

        asyncio.run(main())
        assert app.names() == []
