"""Flask: what the client hears is what the database holds, and error handlers get the errors of commits."""

from __future__ import annotations

import contextvars
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from flask import Flask, abort, redirect, request, session, stream_with_context
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from app_db.errors import AwaitRequired, InvalidUse, NoUnitOfWork
from app_db.integrations.flask import AppDb
from app_db.testing import isolated
from harness.applications import DEFER_UNIQUENESS, DEFERRED_COLLISION, Application, Boom, Item, running
from harness.webs import client, serving_wsgi

NewUrl = Callable[[], str]


class Handled(Exception):
    """An error that the application has a handler for."""


def flask_app(app: Application, handled: list[BaseException]) -> Flask:  # noqa: C901  # one function for each route
    container, flask = app.container, Flask("shop")

    def put() -> None:
        container.writer_session().add(Item(name=request.args["name"]))

    @flask.post("/add")
    def add() -> tuple[str, int, dict[str, str]]:
        put()
        return "added", int(request.args.get("status", "201")), {"X-Tm": request.args.get("tm", "")}

    @flask.post("/abort")
    def refuse() -> str:
        put()
        abort(409)

    @flask.post("/redirect")
    def elsewhere() -> Any:
        put()
        return redirect("/elsewhere")

    @flask.post("/doom")
    def doom() -> str:
        put()
        container.unit().doom()
        return "doomed"

    @flask.post("/fail")
    def fail() -> str:
        put()
        raise {"boom": Boom, "handled": Handled}[request.args["kind"]]

    @flask.post("/stream")
    def stream() -> Any:
        put()

        def parts() -> Iterator[str]:
            yield f"first {request.args['name']};"
            try:
                container.writer_session()
            except NoUnitOfWork as error:
                yield error.message

        return stream_with_context(parts()), 200

    @flask.errorhandler(Handled)
    def on_handled(error: Handled) -> tuple[list[str], int]:
        return sorted(container.writer_session().scalars(select(Item.name))), 409

    @flask.errorhandler(500)
    def on_error(error: Any) -> tuple[str, int]:
        handled.append(error.original_exception)
        return "failed", 500

    @flask.after_request
    def adds_late(response: Any) -> Any:
        if "late" in request.args:
            container.writer_session().add(Item(name=request.args["late"]))
        return response

    return flask


class Site:
    def __init__(self, app: Application, handled: list[BaseException], asking: httpx.Client) -> None:
        self.app, self.handled, self._asking = app, handled, asking

    def post(self, path: str, **query: str) -> httpx.Response:
        return self._asking.post(f"/{path}", params=query)

    @property
    def names(self) -> list[str]:
        return [name for name in self.app.names() if name != "taken"]


@contextmanager
def site(url: str, **options: Any) -> Iterator[Site]:
    with running(writer=url) as app:
        app.run(*DEFER_UNIQUENESS)
        handled: list[BaseException] = []
        flask = flask_app(app, handled)
        AppDb(app.container, **options).init_app(flask)
        with serving_wsgi(flask) as address, client(address) as asking:
            yield Site(app, handled, asking)


@pytest.fixture
def web(new_postgres_url: NewUrl) -> Iterator[Site]:
    with site(new_postgres_url()) as opened:
        yield opened


def test_what_the_client_hears_is_what_the_database_holds(web: Site) -> None:
    kinds: list[tuple[str, dict[str, str], int, bool]] = [
        ("add", {}, 201, True),
        ("add", {"status": "409"}, 409, False),
        ("add", {"status": "409", "tm": "commit"}, 409, True),
        ("add", {"tm": "abort"}, 201, False),
        ("abort", {}, 409, False),
        ("redirect", {}, 302, True),
        ("doom", {}, 200, False),
        ("fail", {"kind": "boom"}, 500, False),
        ("fail", {"kind": "handled"}, 409, False),
        ("stream", {}, 200, True),
    ]
    for number, (path, query, status, is_kept) in enumerate(kinds):
        answer = web.post(path, name=f"item {number}", **query)
        assert (path, query, answer.status_code) == (path, query, status)
        assert (path, query, f"item {number}" in web.names) == (path, query, is_kept)


@pytest.mark.parametrize("path", ["add", "stream"])
def test_a_commit_that_fails_is_a_500_whose_handler_gets_the_error(path: str, web: Site) -> None:
    answer = web.post(path, name="taken")
    assert (answer.status_code, answer.text, web.names) == (500, "failed", [])
    assert [type(error) for error in web.handled] == [IntegrityError]
    assert web.post("add", name="next").status_code == 201


def test_a_handler_may_read_in_the_unit_that_will_abort(web: Site) -> None:
    assert web.post("fail", name="undone", kind="handled").json() == ["taken", "undone"]
    assert web.names == []


def test_what_runs_after_the_request_is_in_the_unit(web: Site) -> None:
    web.post("add", name="first", late="second")
    assert web.names == ["first", "second"]


def test_a_stream_has_its_request_and_no_unit(web: Site) -> None:
    said = web.post("stream", name="kept").text
    assert said.startswith("first kept;The 'writer' session was used")
    assert "with container.transaction():" in said


def test_the_constructor_installs_it_too_and_options_count(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        flask = flask_app(app, [])
        extension = AppDb(app.container, flask, read_only_methods=("POST",))
        assert flask.extensions["app_db"] is extension
        assert flask.test_client().post("/add?name=refused").status_code == 500
        assert app.names() == []


# ---- again --------------------------------------------------------------------------------------------------------------------

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

ALWAYS_FAILS = (
    "CREATE FUNCTION app_fails() RETURNS void LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"
)


def repeating(app: Application, seen: list[object], statement: Any = None, **options: Any) -> Flask:
    """Return an application whose route adds an item, and that has handlers for all that may happen."""
    flask = Flask("shop")

    @flask.post("/add")
    def add() -> dict[str, int]:
        seen.append(request.get_data())
        app.container.writer_session().add(Item(name="kept"))
        if statement is not None:
            app.container.writer_session().execute(statement)
        return {"attempts": len(seen)}

    @flask.errorhandler(OperationalError)
    def on_operational_error(error: OperationalError) -> tuple[str, int]:
        seen.append(type(error))
        return "busy", 503

    @flask.errorhandler(500)
    def on_error(error: Any) -> tuple[str, int]:
        seen.append(type(error.original_exception))
        return "failed", 500

    AppDb(app.container, flask, **options)
    return flask


def test_a_request_whose_commit_may_pass_is_answered_anew_before_error_handlers_are_asked(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        app.run(*FAILS_ONCE)
        seen: list[object] = []
        with serving_wsgi(repeating(app, seen, attempts=2)) as address, client(address) as asking:
            answer = asking.post("/add", content=b"x" * 100)
        assert (answer.status_code, answer.json(), seen) == (200, {"attempts": 2}, [b"x" * 100] * 2)
        assert app.names() == ["kept"]


def test_error_handlers_get_the_error_of_the_last_attempt(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        app.run(ALWAYS_FAILS)
        seen: list[object] = []
        flask = repeating(app, seen, select(func.app_fails()), attempts=3)
        answer = flask.test_client().post("/add", data=b"body")
        assert (answer.status_code, answer.text, seen) == (503, "busy", [b"body"] * 3 + [OperationalError])
        assert app.names() == []


@pytest.mark.exhaustive
def test_a_request_too_large_to_be_repeated_is_answered_by_the_error_handler(
    new_postgres_url: NewUrl, caplog: pytest.LogCaptureFixture
) -> None:
    with running(writer=new_postgres_url()) as app:
        app.run(ALWAYS_FAILS)
        seen: list[object] = []
        flask = repeating(app, seen, select(func.app_fails()), attempts=3, body_limit=2)
        assert flask.test_client().post("/add", data=b"body").status_code == 503
        assert seen == [b"body", OperationalError]
        assert caplog.text.count("its body is too large to be kept") == 1


# ---- several containers and applications --------------------------------------------------------------------------------------


def test_two_containers_of_an_application_commit_and_tell_their_errors_to_its_handlers(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as one, running(writer=new_postgres_url()) as other:
        for app in (one, other):
            app.run(*DEFER_UNIQUENESS)
        handled: list[BaseException] = []
        flask = flask_app(one, handled)

        @flask.post("/both")
        def both() -> str:
            one.container.writer_session().add(Item(name=request.args["one"]))
            other.container.writer_session().add(Item(name=request.args["other"]))
            return "added"

        AppDb(one.container, flask)
        AppDb(other.container, flask)
        asking = flask.test_client()
        assert asking.post("/both?one=a&other=a").status_code == 200
        for query in ("one=taken&other=b", "one=b&other=taken"):
            answer = asking.post(f"/both?{query}")
            assert (answer.status_code, answer.text) == (500, "failed")
        assert [type(error) for error in handled] == [IntegrityError] * 2
        assert ("a" in one.names(), "a" in other.names()) == (True, True)


@pytest.mark.exhaustive
def test_an_extension_serves_every_application_of_a_factory_and_may_be_installed_twice(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        extension = AppDb(app.container)
        flasks = [flask_app(app, []), flask_app(app, [])]
        for flask in (*flasks, flasks[0]):
            extension.init_app(flask)
        for name, flask in zip("abc", [*flasks, flasks[0]], strict=True):
            assert flask.test_client().post(f"/add?name={name}").status_code == 201
            assert flask.test_client().post(f"/add?name=lost{name}&status=409").status_code == 409
        assert app.names() == ["a", "b", "c"]


def test_wrong_options_are_refused_at_once(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app, pytest.raises(InvalidUse, match="attempts=0 leaves no attempt"):
        AppDb(app.container, attempts=0)


# ---- async views, tests, the command line -------------------------------------------------------------------------------------


def test_async_views_use_the_unit_by_sessions_for_threads_and_begin_units_for_coroutines(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)
        handled: list[BaseException] = []
        flask = flask_app(app, handled)

        @flask.post("/sync-session")
        async def sync_session() -> tuple[str, int]:
            app.container.writer_session().add(Item(name=request.args["name"]))
            return "added", int(request.args.get("status", "201"))

        @flask.post("/async-session")
        async def async_session() -> str:
            try:
                async with app.container.transaction(propagation="requires_new"):
                    app.container.writer_async_session().add(Item(name=request.args["name"]))
            finally:
                await app.container.writer_async_engine().dispose()  # the loop ends with the view
            return "added"

        @flask.post("/refused")
        async def refused() -> str:
            with pytest.raises(AwaitRequired, match="The 'writer' async session has to be awaited"):
                app.container.writer_async_session()
            return "refused"

        AppDb(app.container, flask)
        with serving_wsgi(flask) as address, client(address) as asking:
            assert asking.post("/refused").status_code == 200
            for path, name, status, heard in (
                ("sync-session", "a", "201", 201),
                ("sync-session", "b", "409", 409),
                ("sync-session", "taken", "201", 500),
                ("async-session", "c", "", 200),
                ("async-session", "taken", "", 500),
            ):
                answer = asking.post(f"/{path}", params={"name": name, **({"status": status} if status else {})})
                assert (path, name, answer.status_code) == (path, name, heard)
        assert [type(error) for error in handled] == [IntegrityError] * 2
        assert app.names() == ["a", "c", "taken"]


def test_requests_of_a_test_client_are_isolated_as_units_are(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        flask = flask_app(app, [])
        AppDb(app.container, flask)
        with isolated(app.container):
            assert [flask.test_client().post(f"/add?name={each}").status_code for each in "ab"] == [201, 201]
            assert flask.test_client().post("/fail?name=undone&kind=handled").json == ["a", "b", "undone"]
        assert app.names() == []


def test_its_command_line_is_that_of_app_db_for_the_applications_container(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        flask = flask_app(app, [])
        AppDb(app.container, flask)
        run = flask.test_cli_runner()
        checked = run.invoke(args=["app-db", "check"])
        assert (checked.exit_code, "writer\n  hint: lock_timeout" in checked.output) == (0, True), checked.output
        recovered = run.invoke(args=["app-db", "recover", "--dry-run", "--grace", "0"])
        assert (recovered.exit_code, "is in doubt" in recovered.output) == (0, True), recovered.output
        assert "settle what a crash left prepared" in run.invoke(args=["app-db", "--help"]).output
        assert run.invoke(args=["app-db", "--help"]).output.startswith("usage: flask app-db ")
        shown = run.invoke(args=["app-db", "--json", "show", "writer"])
        assert (shown.exit_code, json.loads(shown.output)["connections"][0]["name"]) == (0, "writer"), shown.output
        assert run.invoke(args=["app-db", "nonsense"]).exit_code == 2


# ---- rules, and blocks that go on --------------------------------------------------------------------------------------------


def test_a_rule_that_fails_leaves_no_transaction_open(new_postgres_url: NewUrl) -> None:
    def fails(status: int, headers: object, exception: object) -> bool:
        raise ZeroDivisionError

    with site(new_postgres_url(), rule=fails) as web:
        for _ in range(3):
            assert web.post("add", name="lost").status_code == 500
            assert web.app.checked_out() == 0
        assert [type(error) for error in web.handled] == [ZeroDivisionError] * 3
        assert web.names == []


def test_a_thread_that_is_still_at_work_when_the_view_has_answered_is_an_error(new_postgres_url: NewUrl) -> None:
    begun, go_on = threading.Event(), threading.Event()
    handled: list[BaseException] = []
    with running(writer=new_postgres_url()) as app:
        flask = flask_app(app, handled)

        def work() -> None:
            with app.container.transaction():
                app.container.writer_session().add(Item(name="half"))
                begun.set()
                go_on.wait(20)

        @flask.post("/work")
        def start() -> str:
            app.container.writer_session().add(Item(name="first"))
            thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
            threads.append(thread)
            thread.start()
            assert begun.wait(20)
            return "started"

        threads: list[threading.Thread] = []
        AppDb(app.container).init_app(flask)
        assert flask.test_client().post("/work").status_code == 500
        go_on.set()
        threads[0].join()
        assert [type(error) for error in handled] == [InvalidUse]
        assert app.names() == []


def test_a_request_is_not_answered_anew_once_another_container_has_committed(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app, running(writer=new_postgres_url()) as other:
        app.run(*DEFERRED_COLLISION)
        flask = Flask("shop")

        @flask.post("/")
        def add() -> str:
            for each in (app, other):
                each.container.writer_session().add(Item(name="once"))
            return "added"

        AppDb(app.container, attempts=3).init_app(flask)
        AppDb(other.container).init_app(flask)
        assert flask.test_client().post("/").status_code == 500
        assert app.names() == []
        assert other.names() in ([], ["once"])


def test_a_session_of_the_browser_that_cannot_be_saved_leaves_nothing(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        flask = flask_app(app, [])
        flask.secret_key = "for the test"

        @flask.post("/unsaved")
        def unsaved() -> str:
            app.container.writer_session().add(Item(name="lost"))
            session["what"] = {object()}  # no JSON
            return "done"

        AppDb(app.container).init_app(flask)
        assert flask.test_client().post("/unsaved").status_code == 500
        assert app.names() == []


def test_what_a_handler_writes_for_a_failed_commit_is_decided_by_its_response(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)
        flask = Flask("shop")
        AppDb(app.container).init_app(flask)

        @flask.post("/")
        def add() -> str:
            app.container.writer_session().add(Item(name="taken"))
            return "added"

        @flask.errorhandler(500)
        def on_error(error: Exception) -> tuple[str, int]:
            status = int(request.args["status"])
            app.container.writer_session().add(Item(name=f"log {status}"))
            return "logged", status

        for status in (200, 409):
            assert flask.test_client().post(f"/?status={status}").status_code == status
        assert app.names() == ["log 200", "taken"]


def test_a_middleware_that_answers_for_all_errors_keeps_no_request_from_being_answered_anew(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        tried: list[int] = []
        flask = Flask("shop")

        @flask.post("/")
        def collide() -> str:
            tried.append(1)
            writing = app.container.writer_session()
            writing.add(Item(name=f"attempt {len(tried)}"))
            if len(tried) < 3:
                writing.execute(text("DO $$ BEGIN RAISE EXCEPTION 'collided' USING errcode = '40001'; END $$"))
            return "done"

        inner = flask.wsgi_app

        def catch_all(environ: Any, start_response: Any) -> Any:
            try:
                return inner(environ, start_response)
            except Exception:
                start_response("500 Caught", [])
                return [b"caught"]

        flask.wsgi_app = catch_all  # type: ignore[method-assign]
        AppDb(app.container, attempts=3).init_app(flask)
        assert flask.test_client().post("/").status_code == 200
        assert (len(tried), app.names()) == (3, ["attempt 3"])
