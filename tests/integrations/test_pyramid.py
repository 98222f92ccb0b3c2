"""Pyramid, with pyramid_tm and without it: what the client hears is what the database holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPConflict, HTTPFound
from pyramid.response import Response
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column
from webtest import TestApp

from app_db import orm_base
from app_db.errors import SettingsError
from harness.applications import DEFER_UNIQUENESS, Application, Boom, Item, running

NewUrl = Callable[[], str]


class Handled(Exception):
    """An error that the application has an exception view for."""


class Site:
    def __init__(self, app: Application, asking: Any, seen: list[BaseException]) -> None:
        self.app, self.asking, self.seen = app, asking, seen

    def get(self, path: str, **query: str) -> Any:
        return self.asking.get(f"/{path}", params=query, expect_errors=True)

    @property
    def names(self) -> list[str]:
        return [name for name in self.app.names() if name != "taken"]


def configured(seen: list[BaseException], **settings: Any) -> Configurator:
    config = Configurator(settings=settings)

    def view(function: Callable[[Any], Any], name: str, **predicates: Any) -> None:
        if not predicates:
            config.add_route(name, f"/{name}")
            predicates = {"route_name": name}
        config.add_view(function, **predicates)

    def add(request: Any) -> Response:
        request.dbsession.add(Item(name=request.params["name"]))
        response = Response("added", status=int(request.params.get("status", "201")))
        if "tm" in request.params:
            response.headers["X-Tm"] = request.params["tm"]
        return response

    def raising(error: Callable[[], BaseException]) -> Callable[[Any], Any]:
        def fail(request: Any) -> Any:
            request.dbsession.add(Item(name=request.params["name"]))
            raise error()

        return fail

    def doom(request: Any) -> Response:
        request.dbsession.add(Item(name=request.params["name"]))
        request.unit.doom()
        return Response("doomed")

    def returns_redirect(request: Any) -> Any:
        request.dbsession.add(Item(name=request.params["name"]))
        return HTTPFound("/elsewhere")

    def on_handled(request: Any) -> Response:
        return Response("handled", status=409)

    def on_error(error: Any, request: Any) -> Response:
        seen.append(error)
        return Response("failed", status=500)

    view(add, "add")
    view(doom, "doom")
    view(returns_redirect, "redirect")
    view(raising(lambda: HTTPConflict()), "conflict")
    view(raising(Handled), "handled")
    view(raising(Boom), "boom")
    config.add_exception_view(on_handled, context=Handled)
    config.add_exception_view(on_error, context=Exception)
    return config


@pytest.fixture(params=["with pyramid_tm", "without"])
def web(request: pytest.FixtureRequest, new_postgres_url: NewUrl) -> Iterator[Site]:
    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)
        seen: list[BaseException] = []
        config = configured(seen)
        if request.param == "with pyramid_tm":
            config.include("pyramid_tm")
        config.include("app_db.integrations.pyramid")
        config.set_app_db(app.container)
        yield Site(app, TestApp(config.make_wsgi_app()), seen)


def test_what_the_client_hears_is_what_the_database_holds(web: Site) -> None:
    kinds: list[tuple[str, dict[str, str], int, bool]] = [
        ("add", {}, 201, True),
        ("add", {"status": "409"}, 409, False),
        ("add", {"status": "409", "tm": "commit"}, 409, True),
        ("add", {"tm": "abort"}, 201, False),
        ("redirect", {}, 302, True),
        ("conflict", {}, 409, False),
        ("handled", {}, 409, False),
        ("boom", {}, 500, False),
        ("doom", {}, 200, False),
    ]
    for number, (path, query, status, is_kept) in enumerate(kinds):
        answer = web.get(path, name=f"item {number}", **query)
        assert (path, query, answer.status_int) == (path, query, status)
        assert (path, query, f"item {number}" in web.names) == (path, query, is_kept)


def test_a_commit_that_fails_is_a_500_whose_exception_view_gets_the_error(web: Site) -> None:
    answer = web.get("add", name="taken")
    assert (answer.status_int, answer.text, web.names) == (500, "failed", [])
    assert [type(error) for error in web.seen] == [IntegrityError]
    assert web.get("add", name="next").status_int == 201


def test_the_container_is_made_from_the_ini_file(new_sqlite_url: NewUrl) -> None:
    settings = {"app_db.connections.writer.url": new_sqlite_url(), "unrelated": "1"}
    config = configured([], **settings)
    config.include("app_db.integrations.pyramid")
    asking = TestApp(config.make_wsgi_app())
    container = config.registry["app_db.container"]
    with container.transaction():
        container.writer_session().execute(text("CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT)"))
    assert asking.get("/add?name=kept").status_int == 201
    with container.transaction():
        assert container.writer_session().scalars(text("SELECT name FROM items")).all() == ["kept"]
    container.shutdown_resources()


class OwnBase(orm_base("notebook")):  # type: ignore[misc]  # it is made at run time
    __abstract__ = True


class Note(OwnBase):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)


def test_a_request_has_the_session_of_a_model(new_sqlite_url: NewUrl) -> None:
    def count(request: Any) -> Response:
        assert request.session_of(Note) is request.registry["app_db.container"].notebook_session()
        return Response("the same")

    config = Configurator(settings={"app_db.connections.notebook.url": new_sqlite_url()})
    config.include("app_db.integrations.pyramid")
    config.add_route("count", "/")
    config.add_view(count, route_name="count")
    assert TestApp(config.make_wsgi_app()).get("/").text == "the same"
    config.registry["app_db.container"].shutdown_resources()


def test_two_phase_commit_is_enabled_by_pyramid_sqlalchemys_name(new_postgres_url: NewUrl) -> None:
    config = configured([], **{"app_db.connections.writer.url": new_postgres_url()})
    config.include("app_db.integrations.pyramid")
    config.enable_sql_two_phase_commit()
    config.make_wsgi_app()
    assert config.registry["app_db.container"].settings().connections["writer"].two_phase


def test_a_wrong_key_of_the_ini_file_is_told_when_the_application_is_made() -> None:
    config = configured([], **{"app_db.connections.writer.ulr": "sqlite://"})
    config.include("app_db.integrations.pyramid")
    with pytest.raises(SettingsError, match=r"app_db\.connections\.writer\.ulr.*Did you mean 'app_db\.connections\.writer\.url'"):
        config.make_wsgi_app()


def test_a_failure_that_may_pass_is_tried_again_by_pyramid_retry(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        app.put("counted")
        tried: list[int] = []

        def count(request: Any) -> Response:
            tried.append(1)
            session = request.dbsession
            session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            session.execute(text("SELECT count(*) FROM items"))
            if len(tried) < 3:
                app.run("UPDATE items SET name = name")
            session.execute(text("UPDATE items SET name = :name"), {"name": f"attempt {len(tried)}"})
            return Response("counted")

        with Configurator(settings={"retry.attempts": 3}) as config:
            config.include("pyramid_retry")
            config.include("pyramid_tm")
            config.include("app_db.integrations.pyramid")
            config.set_app_db(app.container)
            config.add_route("count", "/")
            config.add_view(count, route_name="count")
        assert TestApp(config.make_wsgi_app()).get("/").status_int == 200
        assert (len(tried), app.names()) == (3, ["attempt 3"])
