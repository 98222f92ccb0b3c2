"""A unit of work for each request of an ASGI application: what the client hears is what the database holds."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transaction.interfaces import TransientError

from app_db.errors import InvalidUse, NoUnitOfWork
from app_db.integrations import commit_rule
from app_db.integrations.asgi import CLIENT_HAS_GONE, UnitOfWorkMiddleware
from app_db.integrations.fastapi import dependency_of, lifespan, provided
from app_db.testing import isolated
from harness.applications import DEFER_UNIQUENESS, DEFERRED_COLLISION, Application, Item, running
from harness.frameworks import SET_UP, THERE, Doings, fastapi, starlette
from harness.frameworks.starlette import placed
from harness.webs import client, post, serving

NewUrl = Callable[[], str]


CLOSE = {"Connection": "close"}
"""uvicorn closes the connection of a request whose application raised."""


class Site:
    """The application by Starlette on a server in this process, and a client."""

    def __init__(self, app: Application, asking: httpx.Client) -> None:
        self.app, self.client = app, asking

    def post(self, path: str, **query: Any) -> httpx.Response:
        return self.client.post(f"/{path}", params=query, headers=CLOSE)

    @property
    def names(self) -> list[str]:
        return [name for name in self.app.names() if name not in THERE]


@contextmanager
def site(url: str, **options: Any) -> Iterator[Site]:
    with running(writer=url) as app:
        app.run(*SET_UP)
        with serving(starlette.application(Doings(app), **options)) as address, client(address) as asking:
            yield Site(app, asking)


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
            middleware=placed(app),
            exception_handlers={IntegrityError: awaited if is_coroutine else called},
            lifespan=lifespan(app.container),
        )
        with serving(whole) as address:
            answered_by_handler = post(address)
            assert (answered_by_handler.status_code, answered_by_handler.json()) == (409, {"there is": ["taken"]})
        assert app.names() == ["taken"]


# ---- one of a kind --------------------------------------------------------------------------------------------------------


def test_the_rule() -> None:
    assert [commit_rule(status, {}) for status in (200, 204, 302, 399, 400, 404, 500)] == [True] * 4 + [False] * 3
    assert commit_rule(500, {"x-tm": " Commit "})
    assert not commit_rule(200, {"x-tm": "abort"})
    assert commit_rule(200, {"x-tm": "1.4"}), "the header of another system"


def test_a_rule_of_ones_own(new_postgres_url: NewUrl) -> None:
    def always(status: int, headers: object, exception: object) -> bool:
        return True

    with site(new_postgres_url(), rule=always) as web:
        assert web.post("add-async", name="kept", status=409).status_code == 409
        assert web.names == ["kept"]


@pytest.mark.parametrize("attempts", [1, 3])
def test_middlewares_outside_see_what_the_application_has_noted_in_the_scope(attempts: int, new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        noted: list[object] = []

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            noted.append((scope.get("route"), {**scope["state"]}))
            scope["route"] = scope["state"]["who"] = f"attempt {len(noted)}"
            app.container.writer_async_session().add(Item(name="kept"))
            if len(noted) < attempts:
                raise TransientError
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> dict[str, object]:
            await asyncio.Event().wait()
            return {}

        async def send(message: object) -> None:
            """Send nothing."""

        async def main() -> None:
            scope: dict[str, Any] = {"type": "http", "method": "POST", "state": {}}
            await UnitOfWorkMiddleware(inner, app.container, attempts=attempts)(scope, receive, send)
            assert (scope["route"], scope["state"]) == (f"attempt {attempts}", {"who": f"attempt {attempts}"})
            await app.container.shutdown_resources()

        asyncio.run(main())
        assert noted == [(None, {})] * attempts, "another attempt gets what the first one got"
        assert app.names() == ["kept"]


def test_a_middleware_that_is_installed_twice_is_one(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        whole = UnitOfWorkMiddleware(starlette.application(Doings(app)), app.container)
        with serving(whole) as address:
            assert post(f"{address}/add-async", params={"name": "kept"}).status_code == 201
            assert post(f"{address}/add-async", params={"name": "lost", "status": 409}).status_code == 409
        assert app.names() == ["kept"]


def test_read_only_methods_make_read_only_units(new_postgres_url: NewUrl) -> None:
    with site(new_postgres_url(), read_only_methods=("get",)) as web:
        assert web.client.get("/add-async", params={"name": "refused"}, headers=CLOSE).status_code == 500
        assert web.post("add-async", name="kept").status_code == 201
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
        api = fastapi.application(Doings(app))
        api.dependency_overrides[dependency_of(app.container.connection("writer").async_session)] = StandIn
        with serving(api) as address:
            assert post(f"{address}/add-async", params={"name": "nowhere"}).status_code == 201
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
            middleware=placed(app, **options),
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


@pytest.mark.parametrize("path", ["add-async", "add-sync"])
@pytest.mark.parametrize("framework", [starlette, fastapi])
def test_requests_are_isolated_as_units_are(framework: Any, path: str, new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        whole = framework.application(Doings(app))

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


# ---- what an endpoint returns --------------------------------------------------------------------------------------------------


def test_fastapi_reads_a_model_for_its_response_while_there_is_the_unit(new_postgres_url: NewUrl) -> None:
    """Its attributes load, those that the database makes are there after a flush, and it is committed afterwards."""
    with running(writer=new_postgres_url()) as app:
        api = FastAPI(lifespan=lifespan(app.container))
        api.add_middleware(UnitOfWorkMiddleware, container=app.container)

        async def add(session: Any, name: str) -> Item:
            item = Item(name=name)
            session.add(item)
            await session.flush()
            session.expire(item, ["name"])
            await session.refresh(item)
            return item

        async def listed(session: Any) -> list[Item]:
            return list(await session.scalars(select(Item)))

        writer = provided(app.container.connection("writer").async_session)
        add.__annotations__ |= {"session": Annotated[AsyncSession, writer], "name": str}
        listed.__annotations__ |= {"session": Annotated[AsyncSession, writer]}
        api.post("/items", response_model=Named)(add)
        api.get("/items", response_model=list[Named])(listed)
        with serving(api) as address:
            assert post(f"{address}/items", params={"name": "a"}).json() == {"id": 1, "name": "a"}
            assert app.names() == ["a"]
            with client(address) as asking:
                assert asking.get("/items").json() == [{"id": 1, "name": "a"}]


class Named(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: int
    name: str


# ---- what other middlewares do -------------------------------------------------------------------------------------------------


def replaying(last: Callable[[], Any]) -> Callable[[Any], Any]:
    """Return a middleware that reads the body before the application, gives it again, and then what `last` does."""

    def wrap(app: Any) -> Any:
        async def replay(scope: Any, receive: Any, send: Any) -> None:
            messages = [await receive()] if scope["type"] == "http" else []

            async def again() -> Any:
                return messages.pop() if messages else last()

            await app(scope, again if scope["type"] == "http" else receive, send)

        return replay

    return wrap


def body_again() -> Any:
    return {"type": "http.request", "body": b""}


def nothing_more() -> Any:
    raise RuntimeError("the body was read already")


@pytest.mark.parametrize("last", [body_again, nothing_more])
def test_a_middleware_that_has_read_the_body_does_not_look_like_a_client_that_has_gone(
    last: Callable[[], Any], new_postgres_url: NewUrl
) -> None:
    with running(writer=new_postgres_url()) as app:
        with serving(replaying(last)(starlette.application(Doings(app)))) as address:
            assert post(f"{address}/add-async", params={"name": "kept"}).status_code == 201
        assert app.names() == ["kept"]


def test_a_client_that_is_said_to_have_gone_hears_no_success(new_postgres_url: NewUrl, caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> Any:
        return {"type": "http.disconnect"}

    with running(writer=new_postgres_url()) as app:
        with serving(replaying(gone)(starlette.application(Doings(app)))) as address, caplog.at_level(logging.INFO, "app_db"):
            assert post(f"{address}/add-async", params={"name": "lost"}).status_code == CLIENT_HAS_GONE
        assert app.names() == []
        assert "its client has gone" in caplog.text


# ---- blocks that go on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["task", "thread", "stream behind GZip", "around the response"])
def test_a_response_inside_a_block_that_takes_part_is_an_error_and_nothing_is_kept(way: str, new_postgres_url: NewUrl) -> None:
    """The block may not have done all its work: half of it must not be committed."""
    begun, go_on = threading.Event(), threading.Event()
    tasks: list[Any] = []

    with running(writer=new_postgres_url()) as app:
        container = app.container

        async def awaited() -> None:
            async with container.transaction():
                container.writer_async_session().add(Item(name="first"))
                begun.set()
                await asyncio.to_thread(go_on.wait, 20)

        def threaded() -> None:
            with container.transaction():
                container.writer_session().add(Item(name="first"))
                begun.set()
                go_on.wait(20)

        async def parts() -> Any:
            async with container.transaction():
                container.writer_async_session().add(Item(name="first"))
                yield "part"

        async def endpoint(request: Request) -> Response:
            if way == "stream behind GZip":
                return StreamingResponse(parts())
            tasks.append(asyncio.create_task(awaited() if way == "task" else asyncio.to_thread(threaded)))
            assert await asyncio.to_thread(begun.wait, 20)
            return JSONResponse({})

        class Around:
            """A middleware with a block around the whole application."""

            def __init__(self, app: Any) -> None:
                self.app = app

            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                if scope["type"] != "http":
                    await self.app(scope, receive, send)
                    return
                async with container.transaction():
                    container.writer_async_session().add(Item(name="first"))
                    await self.app(scope, receive, send)

        more = {"stream behind GZip": [Middleware(GZipMiddleware)], "around the response": [Middleware(Around)]}.get(way, [])
        handled: list[Exception] = []

        async def on_error(request: Request, error: Exception) -> Response:
            handled.append(error)
            return JSONResponse({}, 500)

        async def done(request: Request) -> Response:
            return JSONResponse({})

        whole = Starlette(
            routes=[Route("/", done if way == "around the response" else endpoint, methods=["POST"])],
            middleware=[*placed(app), *more],
            exception_handlers={Exception: on_error},
            lifespan=lifespan(container),
        )
        with serving(whole) as address:
            assert post(address, headers={"Accept-Encoding": "gzip"}).status_code == 500
            go_on.set()
        assert app.names() == []
        assert [type(error) for error in handled] == [InvalidUse]
        assert "while a block that takes part in it was open" in str(handled[0])


# ---- handlers, rules and options -----------------------------------------------------------------------------------------------


class Colliding:
    """Raises a serialization failure in the endpoint, twice."""

    def __init__(self, container: Any) -> None:
        self.container, self.attempts = container, 0

    async def __call__(self, request: Request) -> Response:
        self.attempts += 1
        session = self.container.writer_async_session()
        session.add(Item(name=f"attempt {self.attempts}"))
        if self.attempts < 3:
            await session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'collided' USING errcode = '40001'; END $$"))
        return JSONResponse({"id": request.path_params["id"]})


class Answering:
    """A callable object as an exception handler."""

    async def __call__(self, request: Request, error: Exception) -> Response:
        return JSONResponse({"handled": type(error).__name__, "id": request.path_params["id"]}, 503)


@pytest.mark.parametrize(("attempts", "heard"), [(3, (200, {"id": "7"})), (2, (503, {"handled": "OperationalError", "id": "7"}))])
def test_a_handler_of_the_errors_class_does_not_keep_a_request_from_being_answered_anew(
    attempts: int, heard: tuple[int, object], new_postgres_url: NewUrl
) -> None:
    with running(writer=new_postgres_url()) as app:
        endpoint = Colliding(app.container)

        async def collide(request: Request) -> Response:
            return await endpoint(request)

        whole = Starlette(
            routes=[Route("/{id}", collide, methods=["POST"])],
            middleware=[*placed(app, attempts=attempts), Middleware(starlette.Passing)],
            exception_handlers={SQLAlchemyError: Answering()},
            lifespan=lifespan(app.container),
        )
        with serving(whole) as address:
            answer = post(f"{address}/7")
        assert (answer.status_code, answer.json()) == heard
        assert endpoint.attempts == attempts
        assert app.names() == (["attempt 3"] if attempts == 3 else [])


def test_the_handler_of_a_failed_commit_sees_the_request_of_the_endpoint(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)

        async def add(request: Request) -> Response:
            request.state.noted = "by the endpoint"
            app.container.writer_async_session().add(Item(name="taken"))
            return JSONResponse({})

        async def refuse(request: Request, error: Exception) -> Response:
            return JSONResponse({"noted": request.state.noted, **request.path_params}, 409)

        whole = Starlette(
            routes=[Route("/{id}", add, methods=["POST"])],
            middleware=placed(app),
            exception_handlers={IntegrityError: refuse},
            lifespan=lifespan(app.container),
        )
        with serving(whole) as address:
            answer = post(f"{address}/7")
        assert (answer.status_code, answer.json()) == (409, {"noted": "by the endpoint", "id": "7"})


def rule_that_returns_nothing(status: int, headers: object, exception: object) -> None:
    """Decide nothing, as a coroutine function would that is not awaited."""


def rule_that_fails(status: int, headers: object, exception: object) -> bool:
    raise ZeroDivisionError


@pytest.mark.parametrize(("rule", "error"), [(rule_that_returns_nothing, "InvalidUse"), (rule_that_fails, "ZeroDivisionError")])
def test_a_rule_that_does_not_decide_is_an_error_and_nothing_is_kept(rule: Any, error: str, new_postgres_url: NewUrl) -> None:
    with site(new_postgres_url(), rule=rule) as web:
        answer = web.post("add-async", name="lost")
        assert (answer.status_code, answer.json()) == (500, {"handled": error})
        assert web.names == []


def test_a_request_is_not_answered_anew_once_another_container_has_committed(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app, running(writer=new_postgres_url()) as other:
        app.run(*DEFERRED_COLLISION)

        async def add(request: Request) -> Response:
            for each in (app, other):
                each.container.writer_async_session().add(Item(name="once"))
            return JSONResponse({})

        whole = Starlette(
            routes=[Route("/", add, methods=["POST"])],
            middleware=[*placed(app, attempts=3), *placed(other)],
            lifespan=lifespan(app.container, lifespan(other.container)),
        )
        with serving(whole) as address:
            assert post(address).status_code == 500
        assert (app.names(), other.names()) == ([], ["once"])


def test_options_that_would_do_something_else_are_refused(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url()) as app:
        with pytest.raises(InvalidUse, match=r"read_only_methods='GET' is a string. Give a tuple: \('GET',\)"):
            UnitOfWorkMiddleware(Starlette(), app.container, read_only_methods="GET")
        with pytest.raises(InvalidUse, match=r"is no database container\. Give an instance"):
            UnitOfWorkMiddleware(Starlette(), type(app.container))  # type: ignore[arg-type]
        with pytest.raises(InvalidUse, match=r"is no database container\. Give an instance"):
            lifespan(type(app.container))  # type: ignore[arg-type]


def test_a_dependency_keeps_its_provider_no_longer_than_the_application(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url()) as app:
        provider = app.container.connection("writer").session
        assert dependency_of(provider) == dependency_of(provider)
        assert dependency_of(provider) != dependency_of(app.container.connection("writer").async_session)
        before = sys.getrefcount(provider)
        provided(provider)
        gc.collect()
        assert sys.getrefcount(provider) == before


@pytest.mark.parametrize("status", [200, 409])
def test_what_a_handler_writes_for_a_failed_commit_is_decided_by_its_response(status: int, new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)

        async def add(request: Request) -> Response:
            app.container.writer_async_session().add(Item(name="taken"))
            return JSONResponse({})

        async def log(request: Request, error: Exception) -> Response:
            app.container.writer_async_session().add(Item(name="log"))
            return JSONResponse({}, status)

        whole = Starlette(
            routes=[Route("/", add, methods=["POST"])],
            middleware=placed(app),
            exception_handlers={IntegrityError: log},
            lifespan=lifespan(app.container),
        )
        with serving(whole) as address:
            assert post(address).status_code == status
        assert app.names() == (["log", "taken"] if status == 200 else ["taken"])


@pytest.mark.parametrize("has_handler", [True, False])
def test_a_middleware_that_answers_for_all_errors_keeps_no_request_with_a_handler_from_being_answered_anew(
    has_handler: bool, new_postgres_url: NewUrl
) -> None:
    """Without a handler, app_db does not see the error, and that middleware answers."""

    class CatchAll(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Any) -> Response:
            try:
                answer: Response = await call_next(request)
            except Exception:
                return JSONResponse({"caught": True}, 500)
            return answer

    with running(writer=new_postgres_url()) as app:
        endpoint = Colliding(app.container)

        async def collide(request: Request) -> Response:
            return await endpoint(request)

        whole = Starlette(
            routes=[Route("/{id}", collide, methods=["POST"])],
            middleware=[*placed(app, attempts=3), Middleware(CatchAll)],
            exception_handlers={SQLAlchemyError: Answering()} if has_handler else {},
            lifespan=lifespan(app.container),
        )
        with serving(whole) as address:
            answer = post(f"{address}/7")
        assert (answer.status_code, endpoint.attempts) == ((200, 3) if has_handler else (500, 1))
        assert app.names() == (["attempt 3"] if has_handler else [])


def test_numbers_and_rules_that_are_none_are_refused(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url()) as app:
        for wrong in ({"attempts": "3"}, {"attempts": 2.5}, {"body_limit": "1MB"}, {"body_limit": -1}, {"rule": "below 400"}):
            with pytest.raises(InvalidUse, match=next(iter(wrong))):
                UnitOfWorkMiddleware(Starlette(), app.container, **wrong)
