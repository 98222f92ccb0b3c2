"""A writer and a reader that are a real PostgreSQL server and its streaming replica, which can be told to stand still.

While it stands still, it hasn't what was written since: what a statement reads shows where it was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app_db import errors
from app_db.integrations.starlette import UnitOfWorkMiddleware, lifespan
from harness.requiring import started
from harness.routed import Item, RoutedApplication, routed
from harness.servers import PostgresServer, PostgresStandby
from harness.webs import client, serving

DATABASE = "shop"


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[PostgresServer, PostgresStandby]]:
    with ExitStack() as stack:
        primary = started(PostgresServer)
        stack.callback(primary.close)
        primary.create_database(DATABASE)
        standby = started(lambda: PostgresStandby(primary))
        stack.callback(standby.close)
        yield primary, standby


@pytest.fixture
def standby(pair: tuple[PostgresServer, PostgresStandby]) -> Iterator[PostgresStandby]:
    """The replica, which stands still by now at a moment at which there was one item, "before"."""
    primary, standby = pair
    with routed({"writer": primary.url(DATABASE)}, names=()) as app:
        app.run("DELETE FROM items")
        app.put("before")
    standby.start()
    standby.pause()
    yield standby
    standby.start()
    standby.resume()


@pytest.fixture
def app(standby: PostgresStandby) -> Iterator[RoutedApplication]:
    """An application whose writer has the item "since" as well."""
    reader = {"url": standby.url(DATABASE), "read_only": True, "connect_args": {"connect_timeout": 10}}
    with routed({"writer": standby.primary.url(DATABASE), "reader": reader}, copies=("reader",)) as app:
        app.put("since")
        yield app


def names(app: RoutedApplication) -> list[str]:
    return list(app.session.scalars(select(Item.name).order_by(Item.name)))


def test_reads_land_on_the_replica(app: RoutedApplication) -> None:
    with app.unit():
        assert names(app) == ["before"]
        assert app.session.scalar(select(Item).where(Item.name == "since")) is None


def test_a_read_only_unit_reads_from_the_replica(app: RoutedApplication) -> None:
    with app.unit(read_only=True):
        assert names(app) == ["before"]
        assert app.session.scalar(text("SELECT count(*) FROM items")) == 1
        assert app.session.scalar(text("SELECT pg_is_in_recovery()"))


def test_a_unit_reads_what_it_has_written(app: RoutedApplication) -> None:
    with app.unit():
        assert names(app) == ["before"]
        app.session.add(Item(name="now"))
        assert names(app) == ["before", "now", "since"]
        app.session.execute(update(Item).where(Item.name == "now").values(name="changed"))
        assert names(app) == ["before", "changed", "since"]
    assert app.names() == ["before", "changed", "since"]
    with app.unit():
        assert names(app) == ["before"]


def test_a_unit_reads_where_it_has_locked(app: RoutedApplication) -> None:
    with app.unit():
        assert len(app.session.scalars(select(Item).with_for_update()).all()) == 2
        assert names(app) == ["before", "since"]


def test_text_lands_on_the_primary(app: RoutedApplication) -> None:
    with app.unit():
        for statement in ("SELECT count(*) FROM items", "SELECT count(*) FROM items WHERE id = ANY (SELECT id FROM items)"):
            assert app.session.scalar(text(statement)) == 2
        assert names(app) == ["before"], "text has changed nothing"
        with app.session.using("reader"):
            assert app.session.scalar(text("SELECT count(*) FROM items")) == 1
            assert app.session.scalar(text("SELECT pg_is_in_recovery()"))
        assert not app.session.scalar(text("SELECT pg_is_in_recovery()"))


def test_a_block_that_uses_the_writer_reads_what_is_there_now(app: RoutedApplication) -> None:
    with app.unit():
        with app.session.using("writer"):
            assert names(app) == ["before", "since"]
        assert names(app) == ["before"]


def test_nothing_is_written_to_a_replica(app: RoutedApplication) -> None:
    with app.unit(), app.session.using("reader"), pytest.raises(errors.ReadOnlyViolation, match="'reader'"):
        app.session.execute(insert(Item).values(name="a", amount=0))
    with app.unit(), app.session.using("reader"), pytest.raises(errors.ReadOnlyViolation, match="'reader'"):
        app.session.execute(text("SELECT setval(pg_get_serial_sequence('items', 'id'), 100)"))


async def test_coroutines_read_from_the_replica(app: RoutedApplication) -> None:
    async with app.unit():
        session = app.container.async_session()
        assert (await session.scalars(select(Item.name))).all() == ["before"]
        session.add(Item(name="now"))
        assert len((await session.scalars(select(Item.name))).all()) == 3
    await app.container.shutdown_resources()
    assert app.names() == ["before", "now", "since"]


def test_a_replica_that_is_away_is_named_and_the_writer_goes_on(app: RoutedApplication, standby: PostgresStandby) -> None:
    with app.unit():
        assert names(app) == ["before"]
    standby.stop("immediate")
    app.container.reader_engine().dispose()
    with app.unit():
        app.session.add(Item(name="written"))
        assert names(app) == ["before", "since", "written"]
    with app.unit():
        with pytest.raises(errors.ReplicaUnavailable, match=r"'reader'.*'writer'.*READER__REPLICA_OF") as refused:
            names(app)
        assert isinstance(refused.value.__cause__, OperationalError)
        with app.session.using("writer"):
            assert names(app) == ["before", "since", "written"]
        app.session.add(Item(name="more"))
    assert app.names() == ["before", "more", "since", "written"]


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_coroutines_are_told_of_a_replica_that_is_away(driver: str, standby: PostgresStandby) -> None:
    urls = [server.url(DATABASE, driver=f"postgresql+{driver}") for server in (standby.primary, standby)]

    async def main(app: RoutedApplication) -> None:
        async with app.unit():
            session = app.container.async_session()
            with pytest.raises(errors.ReplicaUnavailable, match="'reader'"):
                await session.scalars(select(Item.name))
            session.add(Item(name="written"))
        await app.container.shutdown_resources()

    with routed({"writer": urls[0], "reader": {"url": urls[1], "read_only": True}}, copies=("reader",)) as app:
        standby.stop("immediate")
        asyncio.run(main(app))
        assert app.names() == ["before", "written"]


def test_a_replica_that_goes_away_while_it_is_read_leaves_nothing_behind(
    app: RoutedApplication, standby: PostgresStandby
) -> None:
    with pytest.raises(DBAPIError), app.unit():
        assert names(app) == ["before"]
        standby.stop("immediate")
        app.session.scalars(select(Item.amount)).all()
    with app.unit():
        app.session.add(Item(name="written"))
    assert app.names() == ["before", "since", "written"]


def test_a_unit_is_tried_again_on_another_replica(standby: PostgresStandby) -> None:
    away = {"url": PostgresStandby(standby.primary).url(DATABASE), "read_only": True, "replica_of": "writer"}
    there = {"url": standby.url(DATABASE), "read_only": True, "replica_of": "writer"}
    connections: dict[str, Any] = {"writer": standby.primary.url(DATABASE), "away": away, "there": there}
    with routed(connections, names=(), copies=("away", "there")) as app:
        app.put("since")
        for _ in range(4):
            seen: list[str] = app.container.transaction(attempts=2, backoff=0).run(lambda: names(app))
            assert seen == ["before"]


# ---- requests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
def test_requests_with_a_method_that_reads_read_from_the_replica(is_async: bool, app: RoutedApplication) -> None:
    def read(request: Request) -> Response:
        if request.method == "POST":
            app.session.add(Item(name="new"))
        return JSONResponse(names(app))

    async def read_awaited(request: Request) -> Response:
        if request.method == "POST":
            app.container.async_session().add(Item(name="new"))
        found = await app.container.async_session().scalars(select(Item.name).order_by(Item.name))
        return JSONResponse(found.all())

    web = Starlette(
        routes=[Route("/", read_awaited if is_async else read, methods=["GET", "POST"])],
        middleware=[Middleware(UnitOfWorkMiddleware, container=app.container, read_only_methods=("GET",))],
        lifespan=lifespan(app.container),
    )
    with serving(web) as address, client(address) as asking:
        assert asking.get("/").json() == ["before"]
        assert asking.post("/").json() == ["before", "new", "since"]
