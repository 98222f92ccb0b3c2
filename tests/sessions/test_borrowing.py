"""Connections with the same URL are one database, and a unit that uses several of them has one transaction there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select, text

from app_db import DatabaseSettings
from app_db.errors import NotAtomic, SessionIsManaged, UnitOfWorkEnded
from app_db.testing import isolated
from harness.applications import Application, Boom, Item, running


@pytest.fixture(params=["the same URL", "a mirror"])
def app(request: pytest.FixtureRequest, new_database_url: Callable[[], str]) -> Iterator[Application]:
    """A writer and a warehouse in one database, where nothing but being one database makes them commit together."""
    url = new_database_url()
    with running(writer=url, warehouse=url if request.param == "the same URL" else {"mirror": "writer"}) as application:
        yield application


def test_a_unit_that_writes_by_both_commits_both_or_neither(app: Application) -> None:
    with app.unit():
        app.add("a", "warehouse")
        app.add("b")
        app.add("c", "warehouse")
    with pytest.raises(Boom), app.unit():
        app.add("d")
        app.add("e", "warehouse")
        raise Boom
    assert app.names() == ["a", "b", "c"]


def test_what_was_only_added_is_flushed_and_committed(app: Application) -> None:
    with app.unit():
        app.session("warehouse").add(Item(name="a"))
        app.session().add(Item(name="b"))
    assert app.names() == ["a", "b"]


def test_one_sees_what_the_other_has_written_and_their_objects_are_their_own(app: Application) -> None:
    with app.unit():
        app.add("a")
        found = app.session("warehouse").scalars(select(Item)).one()
        assert found not in app.session()
        assert found in app.session("warehouse")
        found.name = "changed"
    assert app.names() == ["changed"]


def test_savepoints_and_nested_units_are_of_both(app: Application) -> None:
    with app.unit() as unit:
        app.add("kept", "warehouse")
        savepoint = unit.savepoint()
        app.add("undone")
        app.add("undone too", "warehouse")
        savepoint.rollback()
        with pytest.raises(Boom), app.unit("nested"):
            app.add("nested", "warehouse")
            raise Boom
        with app.session("warehouse").begin_nested():
            app.add("inner", "warehouse")
    assert app.names() == ["inner", "kept"]


def test_it_is_a_session_of_the_unit_like_any_other(app: Application) -> None:
    with app.unit():
        session = app.session("warehouse")
        assert session is app.session("warehouse")
        for ending in (session.commit, session.rollback, session.close):
            with pytest.raises(SessionIsManaged):
                ending()
        app.add("a", "warehouse")
    with pytest.raises(UnitOfWorkEnded):
        session.execute(text("SELECT 1"))
    assert app.names() == ["a"]


def test_it_is_isolated_with_the_lender(app: Application) -> None:
    with isolated(app.container):
        with app.unit():
            app.add("a", "warehouse")
            app.add("b")
        with app.unit():
            assert app.session("warehouse").scalars(select(Item.name).order_by(Item.name)).all() == ["a", "b"]
    assert app.names() == []


async def test_coroutines_have_it_so_too(app: Application) -> None:
    container: Any = app.container
    async with container.transaction():
        await container.warehouse_async_session().execute(text("INSERT INTO items (name) VALUES ('a')"))
        container.writer_async_session().add(Item(name="b"))
        container.warehouse_async_session().add(Item(name="c"))
    with pytest.raises(Boom):
        async with container.transaction():
            container.warehouse_async_session().add(Item(name="d"))
            raise Boom
    await container.shutdown_resources()
    assert app.names() == ["a", "b", "c"]


def test_a_log_that_is_committed_whatever_becomes_of_the_unit_has_a_transaction_of_its_own(
    new_postgres_url: Callable[[], str],
) -> None:
    url = new_postgres_url()
    with running(writer=url, log={"url": url, "transactional": False}) as app:
        with pytest.raises(Boom), app.unit():
            app.add("a")
            app.add("tried", "log")
            raise Boom
        assert app.names() == ["tried"]


def test_what_differs_in_how_it_is_used_shares_no_transaction(new_postgres_url: Callable[[], str]) -> None:
    url = new_postgres_url()
    with running(writer=url, strict={"url": url, "isolation_level": "SERIALIZABLE"}) as app, pytest.raises(NotAtomic), app.unit():
        app.add("a")
        app.add("b", "strict")


def test_with_another_database_it_commits_by_two_phases_in_two_branches(new_postgres_url: Callable[[], str]) -> None:
    url, prepared = new_postgres_url(), {"two_phase": True}
    with running(
        writer={"url": url, **prepared}, warehouse={"mirror": "writer"}, archive={"url": new_postgres_url(), **prepared}
    ) as app:
        with app.unit():
            for name in ("writer", "warehouse", "archive"):
                app.add(name, name)
        assert app.names() == ["warehouse", "writer"]
        assert app.names("archive") == ["archive"]


@pytest.mark.parametrize(
    ("connections", "lenders"),
    [
        ({"writer": {"url": "sqlite:///a.db"}, "log": {"url": "sqlite:///a.db"}}, {"log": "writer"}),
        ({"log": {"url": "sqlite:///a.db"}, "archive": {"mirror": "log"}}, {"archive": "log"}),
        ({"writer": {"url": "sqlite:///a.db"}, "log": {"url": "sqlite:///b.db"}}, {}),
        ({"writer": {"url": "sqlite://"}, "log": {"url": "sqlite://"}}, {}),
        ({"writer": {"url": "sqlite://"}, "log": {"mirror": "writer"}}, {"log": "writer"}),
        ({"writer": {"url": "sqlite:///a.db"}, "log": {"mirror": "writer", "read_only": True}}, {}),
        ({"writer": {"url": "postgresql://a@h/d"}, "log": {"url": "postgresql://b@h/d"}}, {}),
        ({"writer": {"url": "postgresql://a@h/d"}, "log": {"url": "postgresql://a@h/d", "statement_timeout": 1}}, {}),
        (
            {
                "writer": {"url": "postgresql://a@h/d"},
                "log": {"url": "postgresql://a@h/d", "connect_args": {"options": "-crole=b"}},
            },
            {},
        ),
        (
            {
                name: {"url": "postgresql://a@h/d", "connect_args": {"options": "-crole=b", "n": [1]}}
                for name in ("writer", "log")
            },
            {"log": "writer"},
        ),
    ],
)
def test_who_shares_whose_transaction(connections: dict[str, Any], lenders: dict[str, str]) -> None:
    settings = DatabaseSettings(connections=connections, _env_file=None)
    assert settings.lenders([*connections, "reader", "unknown"]) == lenders
