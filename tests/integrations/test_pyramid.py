"""Pyramid, with pyramid_tm and without it: what the client hears is what the database holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.response import Response
from sqlalchemy import text
from sqlalchemy.orm import Mapped, mapped_column
from transaction import TransactionManager
from webtest import TestApp

from app_db import orm_base
from app_db.errors import InvalidUse, SettingsError
from harness.applications import Application, Item, running

NewUrl = Callable[[], str]


def configured(**settings: Any) -> Configurator:
    """Return the configuration of an application whose view adds an item, without the integration."""

    def add(request: Any) -> Response:
        request.dbsession.add(Item(name=request.params["name"]))
        return Response("added", status=201)

    config = Configurator(settings=settings)
    config.add_route("add", "/add")
    config.add_view(add, route_name="add")
    return config


def test_the_container_is_made_from_the_ini_file(new_sqlite_url: NewUrl) -> None:
    settings = {"app_db.connections.writer.url": new_sqlite_url(), "unrelated": "1"}
    config = configured(**settings)
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
    config = configured(**{"app_db.connections.writer.url": new_postgres_url()})
    config.include("app_db.integrations.pyramid")
    config.enable_sql_two_phase_commit()
    config.make_wsgi_app()
    assert config.registry["app_db.container"].settings().connections["writer"].two_phase


def test_a_wrong_key_of_the_ini_file_is_told_when_the_application_is_made() -> None:
    config = configured(**{"app_db.connections.writer.ulr": "sqlite://"})
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


def test_a_subrequest_takes_part_in_the_unit_of_its_request(new_postgres_url: NewUrl) -> None:
    """Whichever of them asks for a session first."""
    with running(writer=new_postgres_url()) as app:
        config = configured()
        config.include("app_db.integrations.pyramid")
        config.set_app_db(app.container)

        def outer(request: Any) -> Response:
            if "before" in request.params:
                request.dbsession.add(Item(name="outer"))
            answer = request.invoke_subrequest(Request.blank("/add?name=inner"), use_tweens=True)
            assert answer.status_int == 201
            return Response("done", status=int(request.params["status"]))

        config.add_route("outer", "/outer")
        config.add_view(outer, route_name="outer")
        asking = TestApp(config.make_wsgi_app())
        asking.get("/outer?status=409", status=409)
        asking.get("/outer?status=409&before=1", status=409)
        assert app.names() == []
        asking.get("/outer?status=200&before=1")
        assert app.names() == ["inner", "outer"]


def test_a_directive_that_would_have_no_effect_is_refused_when_the_application_is_made(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url()) as app:
        config = configured()
        config.include("app_db.integrations.pyramid")
        config.set_app_db(app.container)
        config.enable_sql_two_phase_commit()
        with pytest.raises(InvalidUse, match=r"the application gave a container\. Prepare the container's connections"):
            config.make_wsgi_app()
        with pytest.raises(InvalidUse, match=r"is no database container\. Give an instance"):
            config.set_app_db(type(app.container))
        config = configured(**{"app_db.two_phase": "false"})  # of the ini file, which the container does not read
        config.include("app_db.integrations.pyramid")
        config.set_app_db(app.container)
        config.make_wsgi_app()


def with_tm(app: Application, **settings: Any) -> Any:
    config = configured(**settings)
    config.include("pyramid_tm")
    config.include("app_db.integrations.pyramid")
    config.set_app_db(app.container)
    return config.make_wsgi_app()


def test_a_hook_of_the_applications_own_may_give_the_containers_manager(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        hook = {"tm.manager_hook": lambda request: app.container.transaction_manager()}
        assert TestApp(with_tm(app, **hook)).get("/add?name=kept").status_int == 201
        assert app.names() == ["kept"]


def test_another_manager_is_refused(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        asking = TestApp(with_tm(app, **{"tm.manager_hook": "pyramid_tm.explicit_manager"}))
        with pytest.raises(InvalidUse, match=r"uses a TransactionManager that is not the container's"):
            asking.get("/add?name=lost")
        assert app.names() == []


def test_tests_of_the_cookiecutter_roll_back_with_the_containers_manager(new_postgres_url: NewUrl) -> None:
    """As its conftest.py does: the test begins and dooms the transaction, and the application takes part."""
    with running(writer=new_postgres_url()) as app:
        whole = with_tm(app)
        tm = app.container.transaction_manager()
        tm.begin()
        tm.doom()
        asking = TestApp(whole, extra_environ={"tm.active": True, "tm.manager": tm})
        assert asking.get("/add?name=seen").status_int == 201
        assert app.container.writer_session().scalars(text("SELECT name FROM items")).all() == ["seen"]
        tm.abort()
        assert app.names() == []
        foreign = TransactionManager(explicit=True)
        foreign.begin()
        with pytest.raises(InvalidUse, match=r"takes container\.transaction_manager\(\)"):
            TestApp(whole, extra_environ={"tm.active": True, "tm.manager": foreign}).get("/add?name=lost")
        assert app.names() == []
