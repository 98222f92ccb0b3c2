"""Flask: what the client hears is what the database holds, and error handlers get the errors of commits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from flask import Flask, abort, redirect, request, stream_with_context
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from app_db.errors import NoUnitOfWork
from app_db.integrations.flask import AppDb
from harness.applications import DEFER_UNIQUENESS, Application, Boom, Item, running
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
