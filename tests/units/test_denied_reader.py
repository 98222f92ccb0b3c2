"""A reader that was denied lets its unit go on: what it was denied is gone, and what others wrote is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import ForeignKey, String, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from app_db.errors import ReadOnlyViolation, SessionIsManaged, TransactionLost
from harness.applications import Application, Item, running
from harness.servers import PostgresServer
from harness.two_phasing import two_phasing

NewUrl = Callable[[], str]


@pytest.fixture
def app(new_database_url: NewUrl) -> Iterator[Application]:
    url = new_database_url()
    with running(writer=url) as app:
        app.put("there")
    with running(writer=new_database_url(), reader={"url": url, "read_only": True}) as app:
        yield app


def add(session: Session) -> None:
    session.add(Item(name="denied"))


def change(session: Session) -> None:
    session.scalars(select(Item)).one().name = "denied"


def delete(session: Session) -> None:
    session.delete(session.scalars(select(Item)).one())


@pytest.mark.parametrize("rolls_back", [True, False])
@pytest.mark.parametrize("attempt", [add, change, delete])
def test_a_reader_forgets_what_it_was_denied(attempt: Callable[[Session], None], rolls_back: bool, app: Application) -> None:
    with app.unit():
        app.add("a", "writer")
        reader = app.session("reader")
        attempt(reader)
        with pytest.raises(ReadOnlyViolation):
            reader.flush()
        if rolls_back:
            reader.rollback()
        assert [item.name for item in reader.scalars(select(Item))] == ["there"]
        assert not reader.new
        app.add("b", "writer")
    assert (app.names("writer"), app.names("reader")) == (["a", "b"], ["there"])


def test_a_statement_that_a_reader_was_denied_lets_the_unit_go_on(app: Application) -> None:
    for rolls_back in (True, False):
        with app.unit():
            app.add(f"by {rolls_back}", "writer")
            with pytest.raises(ReadOnlyViolation):
                app.session("reader").execute(text("INSERT INTO items (name) VALUES ('denied')"))
            if rolls_back:
                app.session("reader").rollback()
                assert app.session("reader").scalars(select(Item.name)).all() == ["there"]
    assert (app.names("writer"), app.names("reader")) == (["by False", "by True"], ["there"])


def test_a_reader_that_failed_by_itself_lets_the_unit_go_on(app: Application) -> None:
    with app.unit():
        app.add("a", "writer")
        with pytest.raises(DBAPIError):
            app.session("reader").execute(text("SELECT nothing FROM nowhere"))
    assert app.names("writer") == ["a"]


def test_a_writer_may_still_not_be_rolled_back_by_itself(app: Application) -> None:
    with app.unit():
        app.add("a", "writer")
        with pytest.raises(SessionIsManaged):
            app.session("writer").rollback()
    assert app.names("writer") == ["a"]


def test_coroutines_roll_a_reader_back(app: Application) -> None:
    async def main() -> None:
        async with app.unit():
            app.container.writer_async_session().add(Item(name="a"))
            reader = app.container.reader_async_session()
            reader.add(Item(name="denied"))
            with pytest.raises(ReadOnlyViolation):
                await reader.flush()
            await reader.rollback()
            assert (await reader.scalars(select(Item.name))).all() == ["there"]
        await app.container.shutdown_resources()

    asyncio.run(main())
    assert (app.names("writer"), app.names("reader")) == (["a"], ["there"])


class FamilyBase(DeclarativeBase):
    pass


class Parent(FamilyBase):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    children: Mapped[list[Child]] = relationship(cascade="all, delete-orphan", back_populates="parent")


class Child(FamilyBase):
    __tablename__ = "children"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[int] = mapped_column(ForeignKey("items.id"))
    parent: Mapped[Parent] = relationship(back_populates="children")


@pytest.mark.parametrize("attempt", ["add", "delete"])
def test_a_reader_forgets_what_a_cascade_has_added(attempt: str, app: Application) -> None:
    app.run("CREATE TABLE children (id integer PRIMARY KEY, item integer)", "INSERT INTO children VALUES (1, 1)", on="reader")
    with app.unit():
        app.add("a", "writer")
        reader = app.session("reader")
        if attempt == "add":
            reader.add(Parent(name="denied", children=[Child(), Child()]))
        else:
            reader.delete(reader.scalars(select(Parent)).one())
        with pytest.raises(ReadOnlyViolation):
            reader.flush()
        assert [item.name for item in reader.scalars(select(Item))] == ["there"]
    assert (app.names("writer"), app.names("reader")) == (["a"], ["there"])


BULK: dict[str, Callable[[Session], object]] = {
    "save": lambda session: session.bulk_save_objects([Item(name="denied")]),
    "insert": lambda session: session.bulk_insert_mappings(inspect(Item), [{"name": "denied"}]),
    "update": lambda session: session.bulk_update_mappings(inspect(Item), [{"id": 1, "name": "denied"}]),
}


@pytest.mark.parametrize("method", BULK)
@pytest.mark.parametrize("whole", [True, False], ids=["read-only unit", "reader"])
def test_a_reader_goes_on_after_a_bulk_method(whole: bool, method: str, app: Application) -> None:
    name = "writer" if whole else "reader"
    with app.unit(read_only=whole):
        session = app.session(name)
        with pytest.raises(ReadOnlyViolation):
            BULK[method](session)
        assert len(session.scalars(select(Item)).all()) == (0 if whole else 1)
        session.rollback()
        assert len(session.scalars(select(Item)).all()) == (0 if whole else 1)
    assert (app.names("writer"), app.names("reader")) == ([], ["there"])


# ---- denied by the database's own role -------------------------------------------------------------------------------


@pytest.fixture
def limited(postgres: PostgresServer, new_postgres_url: NewUrl) -> Iterator[Application]:
    """The connection `other` may read, by its role, and write to `own` only."""
    with postgres.lend_database() as database, running(writer=new_postgres_url(), other=postgres.url(database)) as app:
        with app.engine("other").begin() as connection:
            for statement in (
                "CREATE TABLE own (name text)",
                "DROP ROLE IF EXISTS looker",
                "CREATE ROLE looker",
                "GRANT SELECT ON items TO looker",
                "GRANT ALL ON own TO looker",
                "GRANT looker TO CURRENT_USER",
            ):
                connection.exec_driver_sql(statement)
        yield app
        with app.engine("other").begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY looker")
            connection.exec_driver_sql("DROP ROLE looker")


def as_looker(app: Application) -> Any:
    session = app.session("other")
    session.execute(text("SET LOCAL ROLE looker"))
    return session


def test_a_read_that_a_role_denies_dooms_nothing(limited: Application) -> None:
    app = limited
    with app.unit():
        app.add("a", "writer")
        with pytest.raises(DBAPIError, match="permission denied"):
            as_looker(app).execute(text("SELECT rolpassword FROM pg_authid"))
    assert app.names("writer") == ["a"]


@pytest.mark.parametrize("by", ["flush", "statement", "statement after a read", "flush after a lock"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_write_that_a_role_denies_dooms_nothing(goes_on: bool, by: str, limited: Application) -> None:
    app = limited
    with app.unit():
        app.add("a", "writer")
        session = as_looker(app)
        if "after" in by:
            session.execute(text("SELECT name FROM own" + (" FOR UPDATE" if "lock" in by else "")))
        if "flush" in by:
            add(session)
        with pytest.raises(DBAPIError, match="permission denied"):
            session.flush() if "flush" in by else session.execute(text("INSERT INTO items (name) VALUES ('denied')"))
        if goes_on:
            app.add("b", "writer")
    assert (app.names("writer"), app.names("other")) == (["a", "b"] if goes_on else ["a"], [])


def test_a_write_that_a_role_denies_dooms_nothing_under_two_phase(postgres: PostgresServer, limited: Application) -> None:
    app = limited
    urls = {name: app.engine(name).url.render_as_string(hide_password=False) for name in ("writer", "other")}
    with two_phasing(**{name: {"url": url, "two_phase": True} for name, url in urls.items()}) as both:
        with both.unit():
            both.add("kept", "writer")
            session = both.session("other")
            session.execute(text("SET LOCAL ROLE looker"))
            with pytest.raises(DBAPIError, match="permission denied"):
                session.execute(text("INSERT INTO items (name) VALUES ('denied')"))
        assert (both.names("writer"), both.names("other")) == (["kept"], [])


def test_a_coroutines_write_that_a_role_denies_dooms_nothing(limited: Application) -> None:
    app = limited

    async def main() -> None:
        async with app.unit():
            app.container.writer_async_session().add(Item(name="a"))
            session = app.container.connection("other").async_session()
            await session.execute(text("SET LOCAL ROLE looker"))
            with pytest.raises(DBAPIError, match="permission denied"):
                await session.execute(text("INSERT INTO items (name) VALUES ('denied')"))
        await app.container.shutdown_resources()

    asyncio.run(main())
    assert (app.names("writer"), app.names("other")) == (["a"], [])


def test_the_only_write_of_a_unit_that_a_role_denies_is_told(limited: Application) -> None:
    with pytest.raises(TransactionLost), limited.unit(), pytest.raises(DBAPIError, match="permission denied"):
        as_looker(limited).execute(text("INSERT INTO items (name) VALUES ('denied')"))


def test_a_denial_after_a_savepoint_loses_no_later_write(limited: Application) -> None:
    app = limited
    with pytest.raises(TransactionLost), app.unit():
        session = as_looker(app)
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(text("SELECT rolpassword FROM pg_authid"))
        session.execute(text("INSERT INTO own (name) VALUES ('lost')"))
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT rolpassword FROM pg_authid"))


def test_what_a_role_denies_inside_a_savepoint_dooms_nothing(limited: Application) -> None:
    app = limited
    with app.unit():
        as_looker(app).execute(text("INSERT INTO own (name) VALUES ('kept')"))
        with pytest.raises(DBAPIError, match="permission denied"), app.session("other").begin_nested():
            app.session("other").execute(text("INSERT INTO items (name) VALUES ('denied')"))
    with app.engine("other").connect() as connection:
        assert connection.exec_driver_sql("SELECT name FROM own").scalars().all() == ["kept"]


def test_what_was_written_before_a_denial_is_never_lost_silently(limited: Application) -> None:
    app = limited
    with pytest.raises(TransactionLost), app.unit():
        as_looker(app).execute(text("INSERT INTO own (name) VALUES ('lost')"))
        with pytest.raises(DBAPIError, match="permission denied"):
            app.session("other").execute(text("INSERT INTO items (name) VALUES ('denied')"))


def test_an_error_that_is_no_denial_still_dooms(limited: Application) -> None:
    app = limited
    with pytest.raises(TransactionLost), app.unit():
        app.add("a", "writer")
        with pytest.raises(DBAPIError):
            app.session("other").execute(text("INSERT INTO items (id) VALUES ('no number')"))
    assert app.names("writer") == []


def test_what_the_driver_has_rolled_back_dooms_the_others(limited: Application) -> None:
    app = limited
    with pytest.raises(TransactionLost), app.unit():
        app.add("a", "writer")
        connection = app.session("other").connection().connection
        app.session("other").execute(text("SELECT name FROM items FOR UPDATE"))
        connection.cursor().execute("INSERT INTO own (name) VALUES ('lost')")
        connection.rollback()
    assert app.names("writer") == []
