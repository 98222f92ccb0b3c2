"""Litestar: what only it has. The list of cases for all frameworks is in test_every_framework.

Litestar has to find the types of the handlers, which are local here. So annotations are no strings.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from litestar import Litestar, Request, Response, WebSocket, get, post, websocket
from litestar.config.response_cache import CACHE_FOREVER
from litestar.connection import ASGIConnection
from litestar.datastructures import UploadFile
from litestar.di import NamedDependency, Provide
from litestar.enums import RequestEncodingType
from litestar.exceptions import NotAuthorizedException, WebSocketDisconnect
from litestar.handlers import BaseRouteHandler
from litestar.logging import LoggingConfig
from litestar.middleware import DefineMiddleware
from litestar.middleware.session.server_side import ServerSideSessionConfig
from litestar.params import Body, FromQuery
from litestar.response import ServerSentEvent
from litestar.testing import AsyncTestClient, TestClient
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app_db.errors import InvalidUse, NoUnitOfWork
from app_db.integrations.litestar import AppDbPlugin, provided
from app_db.testing import isolated
from harness.applications import DEFER_UNIQUENESS, Application, Item, running
from harness.webs import client, serving
from harness.webs import post as post_once

NewUrl = Callable[[], str]

FAILS_ONCE = (
    "CREATE SEQUENCE commits",
    """
    CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('commits') = 1 THEN RAISE EXCEPTION 'try again' USING ERRCODE = '40001'; END IF; RETURN NULL;
    END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER once AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION fail_once()
    """,
)
"""On PostgreSQL: the first COMMIT of an item is a serialization failure."""


@post("/add")
async def add(
    writer_async_session: NamedDependency[AsyncSession], name: FromQuery[str], status: FromQuery[int] = 201
) -> Response[None]:
    writer_async_session.add(Item(name=name))
    return Response(None, status_code=status)


def with_plugin(app: Application, *handlers: Any, options: dict[str, Any] | None = None, **given: Any) -> Litestar:
    given.setdefault("logging_config", None)  # that of Litestar configures the root logger of the tests
    return Litestar([*handlers], plugins=[AppDbPlugin(app.container, **(options or {}))], **given)


# ---- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.representative("handler-IntegrityError", "application-500")
@pytest.mark.parametrize("kind", [IntegrityError, Exception, 500])
@pytest.mark.parametrize("layer", ["handler", "application"])
def test_the_handlers_of_the_route_answer_for_a_commit_that_fails_and_may_read(
    kind: Any, layer: str, new_postgres_url: NewUrl
) -> None:
    seen: list[Exception] = []

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[list[str]]:
        seen.append(error)
        return Response([*app.container.writer_session().scalars(select(Item.name))], status_code=409)

    def wrong(request: Request[Any, Any, Any], error: Exception) -> Response[None]:
        raise AssertionError("the route has a handler of its own")

    own: dict[Any, Any]
    common: dict[Any, Any]
    if layer == "handler":
        own, common = {kind: answer}, {kind: wrong}
    else:
        own, common = {}, {kind: answer}

    @post("/", exception_handlers=own)
    async def place(writer_async_session: NamedDependency[AsyncSession]) -> None:
        writer_async_session.add(Item(name="taken"))

    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)
        with serving(with_plugin(app, place, exception_handlers=common)) as address:
            heard = post_once(address)
        assert (heard.status_code, heard.json()) == (409, ["taken"])
        assert [type(error) for error in seen] == [IntegrityError]
        assert app.names() == ["taken"]


def test_a_commit_that_fails_is_logged_and_told_to_hooks_as_an_error_that_was_raised(
    new_postgres_url: NewUrl, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Exception] = []

    async def tell(error: Exception, scope: Scope) -> None:
        told.append(error)

    logged = LoggingConfig(
        log_exceptions="always",
        configure_root_logger=False,
        handlers={},
        loggers={"litestar": {"level": "INFO", "handlers": [], "propagate": True}},
    )
    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)
        whole = with_plugin(app, add, after_exception=[tell], logging_config=logged)
        with serving(whole) as address, client(address) as asking:
            heard = asking.post("/add", params={"name": "taken"})
            assert (heard.status_code, heard.json()["detail"]) == (500, "Internal Server Error")
            assert asking.post("/add", params={"name": "next"}).status_code == 201
        assert [type(error) for error in told] == [IntegrityError]
        assert [record for record in caplog.records if record.name == "litestar"] != []
        assert app.names() == ["next", "taken"]


@pytest.mark.exhaustive
def test_a_failed_commit_is_not_kept_in_the_cache_of_responses(new_postgres_url: NewUrl) -> None:
    @get("/add", cache=CACHE_FOREVER)
    async def cached(writer_async_session: NamedDependency[AsyncSession]) -> str:
        writer_async_session.add(Item(name="taken"))
        return "added"

    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)
        with serving(with_plugin(app, cached)) as address, client(address) as asking:
            assert asking.get("/add").status_code == 500
            app.run("DELETE FROM items")
            assert [asking.get("/add").status_code for _ in range(2)] == [200, 200]
        assert app.names() == ["taken"]


@pytest.mark.exhaustive
def test_a_response_that_cannot_be_rendered_commits_nothing(new_postgres_url: NewUrl) -> None:
    @post("/")
    async def place(writer_async_session: NamedDependency[AsyncSession]) -> dict[str, object]:
        writer_async_session.add(Item(name="lost"))
        return {"no json": object()}

    with running(writer=new_postgres_url()) as app:
        with serving(with_plugin(app, place)) as address:
            assert post_once(address).status_code == 500
        assert app.names() == []


# ---- dependencies -------------------------------------------------------------------------------------------------------------


def test_dependencies_share_the_session_of_the_unit_also_those_that_litestar_resolves_at_once(new_postgres_url: NewUrl) -> None:
    sessions: list[Session | AsyncSession] = []

    async def stock(writer_async_session: NamedDependency[AsyncSession]) -> int:
        sessions.append(writer_async_session)
        writer_async_session.add(Item(name="by a dependency"))
        await writer_async_session.flush()
        return await writer_async_session.scalar(select(func.count()).select_from(Item)) or 0

    @post("/")
    async def place(
        stock: NamedDependency[int],
        writer_async_session: NamedDependency[AsyncSession],
        warehouse_async_session: NamedDependency[AsyncSession],
        everything: NamedDependency[AsyncSession],
    ) -> int:
        sessions.append(writer_async_session)
        writer_async_session.add(Item(name="by the handler"))
        warehouse_async_session.add(Item(name="in the warehouse"))
        assert everything is app.container.async_session()
        return stock

    with running("best_effort", writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        whole = with_plugin(
            app, place, dependencies={"stock": Provide(stock), "everything": provided(app.container.async_session)}
        )
        with serving(whole) as address:
            heard = post_once(address)
        assert (heard.status_code, heard.json()) == (201, 1)
        assert len({id(session) for session in sessions}) == 1
        assert (app.names(), app.names("warehouse")) == (["by a dependency", "by the handler"], ["in the warehouse"])


@pytest.mark.exhaustive
def test_a_dependency_of_the_applications_own_wins(new_postgres_url: NewUrl) -> None:
    class StandIn(AsyncSession):
        def add(self, instance: object, _warn: bool = True) -> None:
            added.append(instance)

    async def stand_in() -> StandIn:
        return StandIn()

    added: list[object] = []
    with running(writer=new_postgres_url()) as app:
        whole = with_plugin(app, add, dependencies={"writer_async_session": Provide(stand_in)})
        with serving(whole) as address:
            assert post_once(f"{address}/add", params={"name": "nowhere"}).status_code == 201
        assert (len(added), app.names()) == (1, [])


def test_two_containers_with_connections_of_one_name_are_refused_unless_the_application_says_which(
    new_postgres_url: NewUrl,
) -> None:
    with running(writer=new_postgres_url()) as one, running(writer=new_postgres_url(), log=new_postgres_url()) as other:
        plugins = [AppDbPlugin(one.container), AppDbPlugin(other.container)]
        with pytest.raises(InvalidUse, match="Two containers of the application provide 'writer_session'"):
            Litestar([add], plugins=[*plugins], logging_config=None)
        own = {f"writer_{kind}": provided(getattr(one.container, f"writer_{kind}")) for kind in ("session", "async_session")}

        @post("/both")
        async def both(
            writer_async_session: NamedDependency[AsyncSession],
            log_async_session: NamedDependency[AsyncSession],
            status: FromQuery[int],
        ) -> Response[None]:
            writer_async_session.add(Item(name="one"))
            log_async_session.add(Item(name="other"))
            return Response(None, status_code=status)

        with (
            serving(Litestar([both], plugins=[*plugins], dependencies=own, logging_config=None)) as address,
            client(address) as asking,
        ):
            assert asking.post("/both", params={"status": 409}).status_code == 409
            assert (one.names(), other.names("log")) == ([], [])
            assert asking.post("/both", params={"status": 201}).status_code == 201
        assert (one.names(), other.names("log"), other.names()) == (["one"], ["other"], [])


@pytest.mark.exhaustive
def test_annotations_may_name_sessions_that_are_imported_for_type_checkers_only(new_postgres_url: NewUrl) -> None:
    def place(writer_session: Any) -> None:
        writer_session.add(Item(name="kept"))

    place.__annotations__["writer_session"] = NamedDependency["Session"]
    place.__module__ = "builtins"  # a module that has not imported it
    with running(writer=new_postgres_url()) as app:
        with serving(with_plugin(app, post("/", sync_to_thread=True)(place))) as address:
            assert post_once(address).status_code == 201
        assert app.names() == ["kept"]


@pytest.mark.exhaustive
def test_objects_are_rendered_with_what_they_load_lazily(new_postgres_url: NewUrl) -> None:
    @post("/", sync_to_thread=False)
    def place(writer_session: NamedDependency[Session]) -> Item:
        item = Item(name="kept")
        writer_session.add(item)
        writer_session.flush()
        writer_session.expire(item)
        return item

    encoders = {Item: lambda item: {"id": item.id, "name": item.name}}
    with running(writer=new_postgres_url()) as app:
        with serving(with_plugin(app, place, type_encoders=encoders)) as address:
            heard = post_once(address)
        assert (heard.status_code, heard.json()) == (201, {"id": 1, "name": "kept"})
        assert app.names() == ["kept"]


# ---- what stands around a handler ---------------------------------------------------------------------------------------------


def test_guards_and_middleware_use_the_unit_of_the_request(new_postgres_url: NewUrl) -> None:
    def middleware(app: ASGIApp, name: str) -> ASGIApp:
        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            container.writer_async_session().add(Item(name=name))
            if b"refuse=middleware" in scope["query_string"]:
                container.writer_session().add(Item(name="seen by the handler of errors"))
                raise NotAuthorizedException
            await app(scope, receive, send)

        return run

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        container.writer_async_session().add(Item(name="by a guard"))
        if connection.query_params.get("refuse") == "guard":
            raise NotAuthorizedException

    def unauthorized(request: Request[Any, Any, Any], error: NotAuthorizedException) -> Response[list[str]]:
        return Response([*container.writer_session().scalars(select(Item.name))], status_code=401)

    with running("best_effort", writer=new_postgres_url()) as app:
        container = app.container
        whole = with_plugin(
            app,
            add,
            guards=[guard],
            middleware=[DefineMiddleware(middleware, name="by a middleware")],
            exception_handlers={NotAuthorizedException: unauthorized},
        )
        with serving(whole) as address, client(address) as asking:
            by_guard = asking.post("/add", params={"name": "lost", "refuse": "guard"})
            by_middleware = asking.post("/add", params={"name": "lost", "refuse": "middleware"})
            assert (by_guard.status_code, by_middleware.status_code) == (401, 401)
            assert by_middleware.json() == ["seen by the handler of errors"]
            assert app.names() == []
            assert asking.post("/add", params={"name": "by the handler"}).status_code == 201
        assert app.names() == ["by a guard", "by a middleware", "by the handler"]


def test_before_send_comes_after_the_commit_and_sees_what_the_handler_has_noted(new_postgres_url: NewUrl) -> None:
    seen: list[tuple[str, object, list[str]]] = []

    async def look(message: Message, scope: Scope) -> None:
        seen.append((message["type"], scope.get("noted"), app.names()))

    @post("/")
    async def place(request: Request[Any, Any, Any], writer_async_session: NamedDependency[AsyncSession]) -> None:
        request.scope["noted"] = "by the handler"  # type: ignore[typeddict-unknown-key]
        writer_async_session.add(Item(name="kept"))

    with running(writer=new_postgres_url()) as app, serving(with_plugin(app, place, before_send=[look])) as address:
        assert post_once(address).status_code == 201
    assert seen == [(f"http.response.{each}", "by the handler", ["kept"]) for each in ("start", "body")]


@pytest.mark.exhaustive
def test_a_session_of_the_browser_is_kept_as_without_the_plugin(new_postgres_url: NewUrl) -> None:
    @post("/sign-in")
    async def sign_in(request: Request[Any, Any, Any], writer_async_session: NamedDependency[AsyncSession]) -> None:
        writer_async_session.add(Item(name="kept"))
        request.set_session({"user": "me"})

    @get("/who")
    async def who(request: Request[Any, Any, Any]) -> str:
        return str(request.session.get("user"))

    with running(writer=new_postgres_url()) as app:
        whole = with_plugin(app, sign_in, who, middleware=[ServerSideSessionConfig().middleware])
        with serving(whole) as address, client(address) as asking:
            assert asking.post("/sign-in").status_code == 201
            assert asking.get("/who").text == "me"


def test_what_runs_after_the_response_has_no_unit(new_postgres_url: NewUrl) -> None:
    said: list[str] = []

    async def ask(request: Request[Any, Any, Any]) -> None:
        with pytest.raises(NoUnitOfWork) as refused:
            app.container.writer_async_session()
        said.append(refused.value.message)

    @post("/", after_response=ask)
    async def events(writer_async_session: NamedDependency[AsyncSession]) -> ServerSentEvent:
        async def all_of_them() -> Any:
            yield str(app.names())
            with pytest.raises(NoUnitOfWork) as refused:
                app.container.writer_async_session()
            yield refused.value.message.partition(".")[0]

        writer_async_session.add(Item(name="kept"))
        return ServerSentEvent(all_of_them())

    with running(writer=new_postgres_url()) as app:
        with serving(with_plugin(app, events)) as address:
            heard = post_once(address).text
        assert "data: ['kept']" in heard
        assert "data: The 'writer' session was used after the response had begun" in heard
        assert len(said) == 1
        assert "with container.transaction():" in said[0]


def test_a_web_socket_gets_no_session_by_name_and_begins_units_of_its_own(new_postgres_url: NewUrl) -> None:
    @websocket("/named")
    async def named(socket: WebSocket[Any, Any, Any], writer_async_session: NamedDependency[AsyncSession]) -> None:
        raise AssertionError("there is no session")

    @websocket("/own")
    async def own(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        async with app.container.transaction():
            app.container.writer_async_session().add(Item(name=await socket.receive_text()))
        await socket.send_text("done")
        await socket.close()

    with running(writer=new_postgres_url()) as app, TestClient(with_plugin(app, named, own)) as asking:
        with pytest.raises(WebSocketDisconnect), asking.websocket_connect("/named") as socket:
            socket.receive_text()
        with asking.websocket_connect("/own") as socket:
            socket.send_text("kept")
            assert socket.receive_text() == "done"
        assert app.names() == ["kept"]


# ---- again --------------------------------------------------------------------------------------------------------------------


@dataclass
class Upload:
    name: str
    file: UploadFile


def test_a_request_whose_commit_may_pass_is_answered_anew_with_its_form(new_postgres_url: NewUrl) -> None:
    contents: list[bytes] = []

    @post("/")
    async def place(
        data: Annotated[Upload, Body(media_type=RequestEncodingType.MULTI_PART)],
        writer_async_session: NamedDependency[AsyncSession],
    ) -> int:
        contents.append(await data.file.read())
        writer_async_session.add(Item(name=data.name))
        return len(contents)

    with running(writer=new_postgres_url()) as app:
        app.run(*FAILS_ONCE)
        with serving(with_plugin(app, place, options={"attempts": 2})) as address:
            heard = post_once(address, data={"name": "kept"}, files={"file": b"x" * 1000})
        assert (heard.status_code, heard.json(), contents) == (201, 2, [b"x" * 1000] * 2)
        assert app.names() == ["kept"]


@pytest.mark.representative("3")
@pytest.mark.parametrize("attempts", [1, 3])
def test_the_handler_of_errors_answers_when_no_attempt_is_left(attempts: int, new_postgres_url: NewUrl) -> None:
    seen: list[Exception] = []
    calls: list[str] = []

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[None]:
        seen.append(error)
        return Response(None, status_code=503)

    @post("/")
    async def place(writer_async_session: NamedDependency[AsyncSession]) -> None:
        calls.append("called")
        writer_async_session.add(Item(name="lost"))
        await writer_async_session.execute(select(func.app_fails()))

    with running(writer=new_postgres_url()) as app:
        app.run(
            "CREATE FUNCTION app_fails() RETURNS void LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"
        )
        whole = with_plugin(app, place, options={"attempts": attempts}, exception_handlers={OperationalError: answer})
        with serving(whole) as address:
            assert post_once(address).status_code == 503
        assert (len(calls), [type(error) for error in seen]) == (attempts, [OperationalError])
        assert app.names() == []


@pytest.mark.exhaustive
def test_a_request_too_large_to_be_repeated_is_answered_by_the_handler_of_errors(
    new_postgres_url: NewUrl, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Exception] = []

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[None]:
        seen.append(error)
        return Response(None, status_code=503)

    @post("/")
    async def place(request: Request[Any, Any, Any], writer_async_session: NamedDependency[AsyncSession]) -> None:
        await request.body()
        writer_async_session.add(Item(name="lost"))
        await writer_async_session.execute(select(func.app_fails()))

    with running(writer=new_postgres_url()) as app:
        app.run(
            "CREATE FUNCTION app_fails() RETURNS void LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"
        )
        options = {"attempts": 3, "body_limit": 10}
        whole = with_plugin(app, place, options=options, exception_handlers={OperationalError: answer})
        with serving(whole) as address:
            assert post_once(address, content=b"x" * 100).status_code == 503
        assert len(seen) == 1
        assert "its body is too large to be kept" in caplog.text


# ---- its life, and tests ------------------------------------------------------------------------------------------------------


def test_hooks_of_the_lifespan_may_use_the_databases_and_the_engines_are_closed_after_them(new_postgres_url: NewUrl) -> None:
    async def put(name: str) -> None:
        async with app.container.transaction():
            app.container.writer_async_session().add(Item(name=name))

    async def at_start() -> None:
        await put("at the start")

    async def at_end() -> None:
        await put("at the end")
        engines.append(app.container.writer_async_engine())

    engines: list[Any] = []
    with running(writer=new_postgres_url()) as app:
        with serving(with_plugin(app, add, on_startup=[at_start], on_shutdown=[at_end])):
            assert app.names() == ["at the start"]
        assert app.names() == ["at the end", "at the start"]
        assert engines[0].pool.checkedin() == 0


def test_options_are_those_of_the_middleware(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        with pytest.raises(InvalidUse, match="attempts=0 leaves no attempt"):
            with_plugin(app, add, options={"attempts": 0})
        with serving(with_plugin(app, add, options={"read_only_methods": ["post"]})) as address:
            assert post_once(f"{address}/add", params={"name": "refused"}).status_code == 500
        assert app.names() == []


def test_requests_of_a_test_client_are_isolated_as_units_are(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:

        @get("/names", sync_to_thread=True)
        def names(writer_session: NamedDependency[Session]) -> list[str]:
            return [*writer_session.scalars(select(Item.name).order_by(Item.name))]

        @post("/add-sync", sync_to_thread=True)
        def add_sync(writer_session: NamedDependency[Session], name: FromQuery[str], status: FromQuery[int]) -> Response[None]:
            writer_session.add(Item(name=name))
            return Response(None, status_code=status)

        with isolated(app.container), TestClient(with_plugin(app, add_sync, names)) as asking:
            for name, status in (("a", 201), ("b", 409), ("c", 201)):
                assert asking.post("/add-sync", params={"name": name, "status": status}).status_code == status
            assert asking.get("/names").json() == ["a", "c"]
        assert app.names() == []


@pytest.mark.exhaustive
def test_requests_of_an_async_test_client_are_isolated_too(new_postgres_url: NewUrl) -> None:
    async def main(app: Application) -> None:
        async with isolated(app.container):
            async with AsyncTestClient(with_plugin(app, add)) as asking:
                for name, status in (("a", 201), ("b", 409), ("c", 201)):
                    assert (await asking.post("/add", params={"name": name, "status": status})).status_code == status
            async with app.unit():
                found = await app.container.writer_async_session().scalars(select(Item.name).order_by(Item.name))
                assert found.all() == ["a", "c"]
        await app.container.shutdown_resources()

    with running(writer=new_postgres_url()) as app:
        asyncio.run(main(app))
        assert app.names() == []
