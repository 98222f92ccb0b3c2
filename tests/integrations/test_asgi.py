"""A unit of work for each request of an ASGI application: what the client hears is what the database holds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transaction.interfaces import TransientError

from app_db.errors import InvalidUse, NoUnitOfWork
from app_db.integrations import commit_rule
from app_db.integrations.asgi import UnitOfWorkMiddleware
from app_db.integrations.fastapi import dependency_of, lifespan, provided
from app_db.testing import isolated
from harness.applications import DEFER_UNIQUENESS, Application, Item, running
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
