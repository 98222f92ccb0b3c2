"""A unit of work for each request of a WSGI application: what the client hears is what the database holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs
from wsgiref.validate import validator

import httpx
import pytest
from sqlalchemy import text

from app_db.errors import InvalidUse, NoUnitOfWork
from app_db.integrations.wsgi import UnitOfWorkMiddleware
from harness.applications import DEFER_UNIQUENESS, Application, Boom, Item, running
from harness.webs import client, serving_wsgi

NewUrl = Callable[[], str]
Start = Callable[..., Any]

OK = "200 OK", [("Content-Type", "text/plain")]


def query_of(environ: dict[str, Any]) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(environ.get("QUERY_STRING", "")).items()}


def endpoints(app: Application) -> dict[str, Callable[[dict[str, Any], Start], Any]]:
    container = app.container

    def add(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        query = query_of(environ)
        container.writer_session().add(Item(name=query["name"]))
        headers = [*OK[1], *([("X-Tm", query["tm"])] if "tm" in query else [])]
        start_response(f"{query.get('status', '201')} Said", headers)
        return [b"added"]

    def fail(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        add(environ, start_response)
        raise Boom

    def doom(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        body = add(environ, start_response)
        container.unit().doom()
        return body

    def generated(environ: dict[str, Any], start_response: Start) -> Iterator[bytes]:
        container.writer_session().add(Item(name=query_of(environ)["name"]))
        start_response(*OK)
        yield b"first;"
        try:
            container.writer_session()
        except NoUnitOfWork as error:
            yield error.message.encode()

    def written(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        container.writer_session().add(Item(name=query_of(environ)["name"]))
        write = start_response(*OK)
        write(b"first;")
        try:
            container.writer_session()
        except NoUnitOfWork as error:
            return [error.message.encode()]
        return []

    def changed_its_mind(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        try:
            add(environ, start_response)
            raise Boom
        except Boom as error:
            start_response("500 Oops", [("Content-Type", "text/plain")], (Boom, error, error.__traceback__))
        return [b"sorry"]

    return {"add": add, "fail": fail, "doom": doom, "generated": generated, "written": written, "changed": changed_its_mind}


class Site:
    def __init__(self, app: Application, asking: httpx.Client) -> None:
        self.app, self._asking = app, asking

    def post(self, path: str, body: bytes = b"", /, **query: str) -> httpx.Response:
        return self._asking.post(f"/{path}", params=query, content=body)

    @property
    def names(self) -> list[str]:
        return [name for name in self.app.names() if name != "taken"]


@contextmanager
def site(url: str, *, valid: bool = True, more: dict[str, Any] | None = None, **options: Any) -> Iterator[Site]:
    with running(writer=url) as app:
        app.run(*DEFER_UNIQUENESS)
        found = endpoints(app) | (more or {})

        def whole(environ: dict[str, Any], start_response: Start) -> Any:
            return found[environ["PATH_INFO"].strip("/")](environ, start_response)

        served: Any = UnitOfWorkMiddleware(validator(whole) if valid else whole, app.container, **options)
        with serving_wsgi(validator(served) if valid else served) as address, client(address) as asking:
            yield Site(app, asking)


@pytest.fixture
def web(new_postgres_url: NewUrl) -> Iterator[Site]:
    with site(new_postgres_url()) as opened:
        yield opened


def test_what_the_client_hears_is_what_the_database_holds(web: Site) -> None:
    kinds: list[tuple[str, dict[str, str], int, bool]] = [
        ("add", {}, 201, True),
        ("add", {"status": "302"}, 302, True),
        ("add", {"status": "409"}, 409, False),
        ("add", {"status": "409", "tm": "commit"}, 409, True),
        ("add", {"tm": "abort"}, 201, False),
        ("fail", {}, 500, False),
        ("doom", {}, 201, False),
        ("generated", {}, 200, True),
        ("changed", {}, 500, False),
    ]
    for number, (path, query, status, is_kept) in enumerate(kinds):
        answer = web.post(path, name=f"item {number}", **query)
        assert (path, query, answer.status_code) == (path, query, status)
        assert (path, query, f"item {number}" in web.names) == (path, query, is_kept)


@pytest.mark.parametrize("path", ["add", "generated", "written"])
def test_a_commit_that_fails_is_a_500_and_leaves_no_row(path: str, new_postgres_url: NewUrl) -> None:
    with site(new_postgres_url(), valid=False) as web:
        assert web.post(path, name="taken").status_code == 500
        assert web.names == []
        assert web.post("add", name="next").status_code == 201


@pytest.mark.parametrize("path", ["generated", "written"])
def test_what_is_sent_after_the_beginning_has_no_unit(path: str, new_postgres_url: NewUrl) -> None:
    with site(new_postgres_url(), valid=False) as web:
        answer = web.post(path, name="kept")
        assert answer.text.startswith("first;The 'writer' session was used")
        assert "with container.transaction():" in answer.text
        assert web.names == ["kept"]


def test_a_request_whose_failure_may_pass_is_answered_anew_with_its_body(
    new_postgres_url: NewUrl, caplog: pytest.LogCaptureFixture
) -> None:
    bodies: list[bytes] = []
    apps: list[Application] = []

    def count(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        bodies.append(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        session = apps[0].container.writer_session()
        session.execute(text("SELECT count(*) FROM items"))
        if len(bodies) < 3:
            apps[0].run("UPDATE items SET name = name")
        session.execute(text("UPDATE items SET name = :name"), {"name": f"attempt {len(bodies)}"})
        start_response(*OK)
        return [b"done"]

    options: dict[str, Any] = {"attempts": 3, "isolation": "REPEATABLE READ", "body_limit": 1000}
    with site(new_postgres_url(), valid=False, more={"count": count}, **options) as web:
        apps.append(web.app)
        assert web.post("count", b"x" * 500).status_code == 200
        assert bodies == [b"x" * 500] * 3
        assert web.names == ["attempt 3"]
        bodies.clear()
        with caplog.at_level(logging.WARNING, "app_db"):
            assert web.post("count", b"x" * 2000).status_code == 500
        assert len(bodies) == 1
        assert "its body is too large to be kept" in caplog.text


def test_a_middleware_that_is_installed_twice_is_one(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        inner = UnitOfWorkMiddleware(endpoints(app)["add"], app.container)
        with serving_wsgi(UnitOfWorkMiddleware(inner, app.container)) as address, client(address) as asking:
            assert asking.post("/", params={"name": "kept"}).status_code == 201
            assert asking.post("/", params={"name": "lost", "status": "409"}).status_code == 409
        assert app.names() == ["kept"]


def test_read_only_methods_make_read_only_units(new_postgres_url: NewUrl) -> None:
    with site(new_postgres_url(), valid=False, read_only_methods=("post",)) as web:
        assert web.post("add", name="refused").status_code == 500
        assert web.names == []


def test_wrong_options_are_refused_at_once(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url()) as app, pytest.raises(InvalidUse, match="timeout=0 is no time limit"):
        UnitOfWorkMiddleware(endpoints(app)["add"], app.container, timeout=0)
