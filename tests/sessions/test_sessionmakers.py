"""`NAME_sessionmaker` is SQLAlchemy's sessionmaker, and the unit's sessions are made of its class and its arguments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import pytest
import sqlmodel
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

from app_db import Connection, DatabaseContainer, DatabaseSettings
from app_db.errors import InvalidUse, SettingsError
from app_db.testing import isolated
from harness.applications import Application, Item, running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url"))


@pytest.fixture
def app(url: str) -> Iterator[Application]:
    with running(writer=url) as app:
        yield app


class Tagged(Session):
    """A session class of the application's own."""

    def tag(self) -> str:
        return f"{self.info['tag']} of {type(self).__name__}"


class AsyncTagged(AsyncSession):
    sync_session_class = Tagged

    def tag(self) -> Any:
        return self.sync_session.tag()  # type: ignore[attr-defined]


# ---- for work that is no unit ------------------------------------------------------------------------------------------


def test_a_sessionmaker_is_used_as_sqlalchemy_documents_it(app: Application) -> None:
    maker = app.container.writer_sessionmaker()
    session = maker()
    session.add(Item(name="called"))
    session.commit()
    session.close()
    with maker() as session:
        session.add(Item(name="with"))
        session.commit()
    with maker() as session:
        session.add(Item(name="not committed"))
    with maker.begin() as session:
        session.add(Item(name="begun"))
    with pytest.raises(ValueError, match="mine"), maker.begin() as session:
        session.add(Item(name="rolled back"))
        raise ValueError("mine")
    with maker(info={"tag": "x"}) as session, session.begin():
        session.add(Item(name=session.info["tag"]))
        with session.begin_nested() as savepoint:
            session.add(Item(name="undone"))
            savepoint.rollback()
    assert isinstance(maker, sessionmaker)
    assert app.names() == ["begun", "called", "with", "x"]


def test_an_async_sessionmaker_is_used_as_sqlalchemy_documents_it(app: Application, url: str) -> None:
    maker = app.container.writer_async_sessionmaker()

    async def work() -> None:
        async with maker() as session:
            session.add(Item(name="with"))
            await session.commit()
        async with maker.begin() as session:
            session.add(Item(name="begun"))
        async with maker() as session:
            session.add(Item(name="not committed"))
            await session.flush()
        await app.container.shutdown_resources()

    asyncio.run(work())
    assert isinstance(maker, async_sessionmaker)
    assert app.names() == ["begun", "with"]


def test_a_sessionmakers_objects_expire_at_commit_as_sqlalchemys_do_unless_it_is_set(app: Application, url: str) -> None:
    for settings, expires in (({}, True), ({"session": {"expire_on_commit": False}}, False)):
        with running(writer={"url": url, **settings}) as other, other.container.writer_sessionmaker()() as session:
            assert session.expire_on_commit is expires
            with other.unit():
                assert other.session().expire_on_commit is False


def test_configure_counts_for_the_maker_and_for_units(app: Application) -> None:
    maker = app.container.writer_sessionmaker()
    maker.configure(autoflush=False, info={"tag": "configured"})
    with maker() as session:
        assert (session.autoflush, session.info["tag"]) == (False, "configured")
    with app.unit():
        assert (app.session().autoflush, app.session().info["tag"]) == (False, "configured")


def test_a_copy_of_the_maker_is_configured_by_itself(app: Application) -> None:
    maker, async_maker = app.container.writer_sessionmaker(), app.container.writer_async_sessionmaker()
    maker.configure(info={"tag": "all"})
    copied, async_copied = copy(maker), copy(async_maker)
    heard: list[str] = []
    event.listen(maker, "before_flush", lambda *_: heard.append("maker"))
    event.listen(copied, "before_flush", lambda *_: heard.append("copy"))
    for each in (copied, async_copied):
        each.configure(autoflush=False, expire_on_commit=False)
    with isolated(app.container):
        with copied.begin() as session:
            assert (session.autoflush, session.expire_on_commit, session.info["tag"]) == (False, False, "all")
            session.add(Item(name="by the copy"))
        assert heard == ["maker", "copy"]
        with maker() as session:
            assert (session.autoflush, session.expire_on_commit) == (True, True)
        with app.unit():
            assert app.session().autoflush
            assert app.session().scalars(select(Item.name)).all() == ["by the copy"]
            app.add("in a unit")
        assert heard == ["maker", "copy", "maker"]
    assert (async_maker().sync_session.autoflush, async_copied().sync_session.autoflush) == (True, False)
    assert app.names() == []


def test_a_session_of_the_maker_is_independent_of_the_unit_around_it(postgres_url: str) -> None:
    with running(writer=postgres_url) as app:
        maker = app.container.writer_sessionmaker()
        with pytest.raises(ValueError, match="mine"), app.unit():
            app.add("in the unit")
            with maker.begin() as session:
                assert session.scalars(select(Item.name)).all() == []
                session.add(Item(name="on its own"))
            raise ValueError("mine")
        assert app.names() == ["on its own"]


def test_an_isolated_test_rolls_back_what_the_maker_committed(app: Application) -> None:
    with isolated(app.container):
        with app.container.writer_sessionmaker().begin() as session:
            session.add(Item(name="a"))
        with app.container.writer_sessionmaker()() as session:
            session.add(Item(name="b"))
            session.commit()
            session.add(Item(name="c"))
            session.rollback()
        with app.unit():
            assert app.session().scalars(select(Item.name).order_by(Item.name)).all() == ["a", "b"]
    assert app.names() == []


def test_the_maker_of_a_reader_cannot_write(url: str) -> None:
    with running(writer=url, reader={"url": url, "read_only": True}) as app:
        with app.container.reader_sessionmaker()() as session:
            session.add(Item(name="a"))
            with pytest.raises(DBAPIError, match=r"(?i)read-?only"):
                session.commit()
        assert app.names() == []


def test_the_makers_statements_have_the_connections_time_limit(postgres_url: str) -> None:
    with running(writer={"url": postgres_url, "statement_timeout": 0.2}) as app:
        began = time.monotonic()
        with app.container.writer_sessionmaker()() as session, pytest.raises(OperationalError, match="timeout"):
            session.execute(text("SELECT pg_sleep(20)"))
        assert time.monotonic() - began < 10


def test_the_maker_uses_the_engine_that_the_connection_has(app: Application, sqlite_url: str, tmp_path: Any) -> None:
    maker = app.container.writer_sessionmaker()
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    with app.container.writer_engine.override(other), maker() as session:
        assert session.get_bind() is other
    with maker() as session:
        assert session.get_bind() is app.engine()


# ---- what units make of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used_before", [False, True])
def test_a_maker_that_overrides_ours_gives_units_its_class_and_arguments(app: Application, used_before: bool) -> None:
    if used_before:
        with app.unit():
            app.add("before")
    own = sessionmaker(class_=Tagged, info={"tag": "mine"}, autoflush=False)
    with app.container.writer_sessionmaker.override(own), app.unit():
        session: Any = app.session()
        assert isinstance(session, Tagged)
        assert session.tag().startswith("mine of ")
        assert not session.autoflush
        app.add("in the unit")
        with pytest.raises(Exception, match="unit of work"):
            session.commit()
    with app.unit():
        assert not isinstance(app.session(), Tagged)
    assert "in the unit" in app.names()


def test_listeners_to_the_maker_and_to_its_class_hear_of_units(app: Application) -> None:
    heard: list[str] = []
    event.listen(app.container.writer_sessionmaker(), "before_flush", lambda *_: heard.append("maker"))
    with app.unit():
        app.add("a")
    assert heard == ["maker"]


def test_a_maker_for_another_engine_is_refused_by_name(app: Application, tmp_path: Any) -> None:
    own = sessionmaker(create_engine(f"sqlite:///{tmp_path}/other.db"))
    with app.container.writer_sessionmaker.override(own), app.unit(), pytest.raises(InvalidUse, match="writer_engine"):
        app.session()


def test_what_is_no_maker_is_refused_by_name(app: Application) -> None:
    with (
        app.container.writer_sessionmaker.override(lambda: Session()),
        app.unit(),
        pytest.raises(InvalidUse, match="sessionmaker"),
    ):
        app.session()


# ---- a session class of one's own --------------------------------------------------------------------------------------


def container_with(url: str, connection: Callable[[], Connection], **session: Any) -> Any:
    class Container(DatabaseContainer):
        writer = connection()

    return Container(settings=DatabaseSettings(connections={"writer": {"url": url, "session": session}}))


DECLARED = {
    "settings": (Connection, {"class": "sqlmodel:Session", "async_class": "sqlmodel.ext.asyncio.session:AsyncSession"}),
    "container": (lambda: Connection(session_class=sqlmodel.Session, async_session_class=SQLModelAsyncSession), {}),
}


@pytest.mark.parametrize("where", DECLARED)
def test_sessions_of_a_unit_have_the_class_that_is_declared(where: str, app: Application, url: str) -> None:
    connection, session = DECLARED[where]
    container = container_with(url, connection, **session)
    with container.transaction():
        for each in (container.writer_session(), container.session()):
            each.add(Item(name=f"item {type(each).__name__} {id(each)}"))
            each.flush()
            assert isinstance(each, sqlmodel.Session)
            assert len(each.exec(sqlmodel.select(Item)).all()) >= 1
    with container.writer_sessionmaker()() as plain:
        assert len(plain.exec(sqlmodel.select(Item)).all()) == 2

    async def work() -> None:
        async with container.transaction():
            for each in (container.writer_async_session(), container.async_session()):
                assert isinstance(each, SQLModelAsyncSession)
                assert isinstance(each.sync_session, sqlmodel.Session)
                assert len((await each.exec(sqlmodel.select(Item))).all()) == 2
        async with container.writer_async_sessionmaker()() as plain:
            assert len((await plain.exec(sqlmodel.select(Item))).all()) == 2
        await container.shutdown_resources()

    asyncio.run(work())
    container.shutdown_resources()


def test_a_session_class_alone_is_inside_the_async_session_too(app: Application, url: str) -> None:
    container = container_with(url, lambda: Connection(session_class=Tagged))
    container.writer_async_sessionmaker().configure(info={"tag": "x"})

    async def work() -> str:
        async with container.transaction():
            return str(container.writer_async_session().sync_session.tag())

    assert asyncio.run(work()).startswith("x of ")


def test_a_class_that_is_no_session_is_refused_by_its_variable(url: str) -> None:
    for given, says in (
        ("decimal:Decimal", "does not name a subclass of sqlalchemy.orm.session.Session"),
        ("app_db.nowhere:Session", "can't be imported"),
    ):
        container = container_with(url, Connection, **{"class": given})
        with container.transaction(), pytest.raises(SettingsError, match=f"(?s)WRITER__SESSION__CLASS.*{says}"):
            container.writer_session()
    with pytest.raises(InvalidUse, match="session_class"):
        Connection(session_class=AsyncTagged)  # type: ignore[type-var]  # it is none
    with pytest.raises(InvalidUse, match="async_session_class"):
        Connection(async_session_class=Tagged)  # type: ignore[type-var]  # it is none
