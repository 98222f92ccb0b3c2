"""A test says how many statements a block sends, and is told which were sent, by which lines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ForeignKey, create_engine, delete, func, insert, literal, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.pool import NullPool

from app_db.errors import InvalidUse, UnexpectedStatements
from app_db.testing import StatementCounts, expecting, isolated, overridden
from harness.applications import Application, Boom, Item, running
from harness.coroutines import DRIVERS, opened_awaited, url_for, with_driver

Perhaps = Callable[[Application], Any]
"""Returns a block, for `with` and `async with`."""

READER = {"mirror": "writer", "read_only": True}


@pytest.fixture
def app(new_database_url: Callable[[], str]) -> Iterator[Application]:
    with running(atomicity="best_effort", writer=new_database_url(), reader=READER, warehouse=new_database_url()) as application:
        yield application


@pytest.fixture
def shop(new_sqlite_url: Callable[[], str]) -> Iterator[Application]:
    """As `app`, where the database makes no difference."""
    urls = {"writer": new_sqlite_url(), "warehouse": new_sqlite_url()}
    with running(atomicity="best_effort", **urls, reader=READER) as application:
        yield application


@pytest.fixture(params=["isolated", "not isolated"])
def perhaps_isolated(request: pytest.FixtureRequest) -> Perhaps:
    return lambda app: isolated(app.container) if request.param == "isolated" else nullcontext()


# ---- what counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.representative("sqlite-*", "postgresql-isolated")
def test_all_that_sessions_and_engines_of_the_container_send_counts(app: Application, perhaps_isolated: Perhaps) -> None:
    expected = {"writer": 5, "reader": 2, "warehouse": 1}
    with perhaps_isolated(app), expecting(app.container, statements=expected, insert=2) as counted:
        with app.unit():
            app.session().add(Item(name="by the ORM"))
            app.session("reader").scalar(select(func.count()).select_from(Item))
            app.session("warehouse").execute(text("SELECT 1"))
        with app.unit():
            app.session().execute(insert(Item).values(name="by Core"))
            app.session().execute(update(Item).values(name=Item.name + "!"))
        with app.engine().connect() as connection:
            connection.exec_driver_sql("SELECT 2")
        with app.engine("reader").connect() as connection, connection.begin():
            connection.execute(select(literal(3)))
        with app.unit():
            app.session().execute(delete(Item))
    kinds = [(sent.connection, sent.kind) for sent in counted.statements]
    assert kinds == [
        ("reader", "select"),
        ("warehouse", "select"),
        ("writer", "insert"),
        ("writer", "insert"),
        ("writer", "update"),
        ("writer", "select"),
        ("reader", "select"),
        ("writer", "delete"),
    ]


@pytest.mark.representative("sqlite-*", "postgresql-isolated")
def test_savepoints_and_the_ends_of_transactions_do_not_count(app: Application, perhaps_isolated: Perhaps) -> None:
    with perhaps_isolated(app), expecting(app.container, statements=2):
        with app.unit():
            session = app.session()
            with session.begin_nested(), pytest.raises(Boom), session.begin_nested():
                session.execute(text("SELECT 1"))
                raise Boom
        with app.engine().begin() as connection, connection.begin_nested():
            connection.execute(text("SELECT 2"))


@pytest.mark.exhaustive
def test_what_app_db_sends_by_itself_does_not_count(
    new_postgres_url: Callable[[], str], new_mariadb_url: Callable[[], str], perhaps_isolated: Perhaps
) -> None:
    """Who wrote, time limits, decisions, PREPARE and its kin."""
    urls = {"writer": new_postgres_url(), "warehouse": new_postgres_url(), "facts": new_mariadb_url()}
    two_phase: dict[str, Any] = {name: {"url": url, "two_phase": True} for name, url in urls.items()}
    with running(**two_phase) as app, perhaps_isolated(app):
        assert app.names() == []
        with expecting(app.container, statements={"writer": 2, "warehouse": 1, "facts": 2}), app.unit(timeout=30):
            app.session().execute(text("SELECT 1"))
            for name in urls:
                app.session(name).add(Item(name=name))
            app.session("facts").execute(text("SELECT 1"))


@pytest.mark.representative("*-aiosqlite", "isolated-psycopg")
@pytest.mark.parametrize("driver", DRIVERS)
def test_coroutines_count(driver: str, request: pytest.FixtureRequest, perhaps_isolated: Perhaps) -> None:
    app = opened_awaited(url_for(driver, request), driver)

    async def main() -> None:
        async with perhaps_isolated(app), expecting(app.container, {"writer": 3}, insert=1) as counted:
            async with app.block():
                await app.say("SELECT 1")
                await app.write("a")
            async with app.awaited_engine().connect() as connection:
                await connection.execute(text("SELECT 42"))
        assert [sent.line for sent in counted.statements if sent.kind == "select"][1:] == [
            f"{_line('SELECT 42')} in {_name(main)}"
        ]

    app.in_a_loop(main)
    app.close()


def _name(function: Any) -> str:
    return str(function.__qualname__)


def _line(content: str) -> str:
    """Where this file has a line with this content, as app_db shows it."""
    here = Path(__file__)
    number = next(number for number, line in enumerate(here.read_text().splitlines(), 1) if content in line)
    shown = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here
    return f"{shown}:{number}"


def test_what_threads_send_while_the_block_lasts_counts(shop: Application) -> None:
    def read() -> None:
        with shop.unit():
            shop.session().execute(text("SELECT 1"))

    with expecting(shop.container, statements=3):
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    read()


@pytest.mark.exhaustive
def test_many_blocks_begin_and_end_while_threads_send(shop: Application) -> None:
    end, errors = threading.Event(), []

    def read() -> None:
        try:
            with shop.engine().connect() as connection:
                while not end.is_set():
                    connection.exec_driver_sql("SELECT 1")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        with expecting(shop.container):
            pass
    end.set()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_connection_that_was_opened_before_counts(shop: Application) -> None:
    with shop.engine().connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        with expecting(shop.container, statements=1):
            connection.exec_driver_sql("SELECT 2")
        with expecting(shop.container, statements=1):
            connection.execution_options(app="its own").exec_driver_sql("SELECT 3")
    with expecting(shop.container, 1), shop.engine().execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql("SELECT 4")


def test_what_other_engines_and_containers_send_does_not_count(shop: Application, new_sqlite_url: Callable[[], str]) -> None:
    with (
        running(writer=new_sqlite_url()) as other,
        isolated(other.container),
        isolated(shop.container),
        expecting(shop.container, statements=0),
        expecting(other.container, statements=1),
    ):
        with other.unit():
            other.session().execute(text("SELECT 1"))
        with shop.plain_engine().connect() as connection:
            connection.execute(text("SELECT 1"))


def test_engines_of_the_application_and_of_overridden_settings_count(
    shop: Application, new_sqlite_url: Callable[[], str], perhaps_isolated: Perhaps
) -> None:
    with overridden(shop.container, {"writer": new_sqlite_url()}), expecting(shop.container, {"writer": 1}), shop.unit():
        shop.session().execute(text("SELECT 1"))
    shop.override_engine("writer", create_engine(new_sqlite_url(), poolclass=NullPool))
    with perhaps_isolated(shop), expecting(shop.container, {"writer": 1}), shop.unit():
        shop.session().execute(text("SELECT 1"))
    own = create_async_engine(with_driver(new_sqlite_url(), "aiosqlite"), poolclass=NullPool)
    shop.container.warehouse_async_engine.override(own)

    async def main() -> None:
        async with expecting(shop.container, {"warehouse": 1}), own.connect() as connection:
            await connection.execute(text("SELECT 1"))

    asyncio.run(main())


def test_counting_makes_no_engine(shop: Application) -> None:
    shop.container.reset_singletons()
    with expecting(shop.container), shop.plain_engine().connect() as connection:
        connection.execute(text("SELECT 1"))
    assert shop.container.core.holder().state.objects == {}


def test_a_statement_that_fails_counts(shop: Application) -> None:
    with expecting(shop.container, statements=1), pytest.raises(DBAPIError), shop.unit():
        shop.session().execute(text("SELECT * FROM nowhere"))


def test_an_executemany_counts_once(shop: Application) -> None:
    rows = [{"name": name} for name in "abc"]
    with expecting(shop.container, insert=2) as counted, shop.unit():
        shop.session().connection().execute(insert(Item), rows)
        shop.session().scalars(insert(Item).returning(Item.id), [{"name": f"{number}"} for number in range(50)])
    assert [sent.executions for sent in counted.statements] == [3, 1]


def test_a_block_may_be_entered_again(shop: Application) -> None:
    limit = expecting(shop.container, statements=1)
    for _ in range(2):
        with limit, shop.engine().connect() as connection:
            connection.execute(text("SELECT 1"))


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("/* SELECT */ insert into items (name) values ('SELECT')", "insert"),
        ("VALUES (1)", "select"),
        ("WITH n AS (SELECT 1 AS i) INSERT INTO items (name) SELECT i FROM n", "insert"),
        ("WITH n AS (SELECT (1) AS i) SELECT i FROM n WHERE i IN (SELECT 1)", "select"),
        ('WITH "delete" AS (SELECT 1 AS i) SELECT i FROM "delete"', "select"),
        ("REPLACE INTO items (id, name) VALUES (1, 'a')", "insert"),
        ("PRAGMA user_version", "other"),
        ("CREATE TABLE other_items (id INTEGER)", "other"),
    ],
)
def test_the_kind_of_a_text_is_its_verb(shop: Application, statement: str, kind: str) -> None:
    with expecting(shop.container, **{kind: 1}), shop.engine().begin() as connection:
        connection.exec_driver_sql(statement)


# ---- what is expected -----------------------------------------------------------------------------------------------------


def read(app: Application, *connections: str) -> None:
    with app.unit():
        for name in connections:
            app.session(name).execute(text("SELECT 1"))


@pytest.mark.parametrize(
    ("expected", "problems"),
    [
        ({"statements": 2}, ["3 statements were sent, and 2 were expected."]),
        ({"statements": 4}, ["3 statements were sent, and 4 were expected."]),
        ({"statements": 0}, ["3 statements were sent, and none was expected."]),
        ({"at_most": 2}, ["3 statements were sent, and at most 2 were expected."]),
        ({"at_most": {"writer": 1, "warehouse": 9}}, ["2 statements were sent on 'writer', and at most 1 was expected."]),
        (
            {"statements": {"writer": 1, "reader": 1}},
            [
                "No statements were sent on 'reader', and 1 was expected.",
                "1 statement was sent on 'warehouse', and none was expected.",
                "2 statements were sent on 'writer', and 1 was expected.",
            ],
        ),
        (
            {"select": 1, "insert": 1, "other": 0},
            ["3 SELECT statements were sent, and 1 was expected.", "No INSERT statements were sent, and 1 was expected."],
        ),
        ({"statements": 3, "select": 3, "delete": 0, "update": 0}, []),
        ({"at_most": 3}, []),
        ({"at_most": 4}, []),
        ({"at_most": {"writer": 2, "warehouse": 2, "reader": 1}}, []),
        ({}, []),
    ],
)
def test_a_number_that_differs_fails(shop: Application, expected: Any, problems: list[str]) -> None:
    raises: Any = pytest.raises(AssertionError) if problems else nullcontext()
    with raises as caught, expecting(shop.container, **expected):
        read(shop, "writer", "warehouse", "writer")
    if problems:
        assert isinstance(caught.value, UnexpectedStatements)
        assert [*caught.value.problems] == problems


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"statements": -1}, "statements=-1 is no number of statements. Give a number, or numbers by connection, from 0 on"),
        ({"select": True}, "select=True is no number of statements. Give a number, from 0 on"),
        ({"select": {"writer": 1}}, "select={'writer': 1} is no number"),
        ({"at_most": {"writer": "3"}}, "at_most={'writer': '3'} is no number of statements"),
        ({"statements": 1, "at_most": 2}, "statements= and at_most= exclude each other. Give the exact number or the limit"),
        ({"statements": {"writr": 1}}, "There is no connection 'writr' to count statements of. Did you mean 'writer'?"),
    ],
)
def test_what_is_no_number_is_refused(shop: Application, wrong: Any, message: str) -> None:
    with pytest.raises(InvalidUse) as caught:
        expecting(shop.container, **wrong)
    assert message in caught.value.message


def test_numbers_are_given_by_name_but_for_the_first(shop: Application) -> None:
    with expecting(shop.container, 1):
        read(shop, "writer")
    assert StatementCounts(1) == StatementCounts(statements=1)
    assert StatementCounts().is_empty


def test_blocks_count_independently(shop: Application) -> None:
    with expecting(shop.container, 3):
        read(shop, "writer")
        with expecting(shop.container, 1), expecting(shop.container) as recorder:
            read(shop, "reader")
        read(shop, "writer")
    assert len(recorder.statements) == 1


def test_an_error_of_the_block_goes_on(shop: Application) -> None:
    with pytest.raises(Boom), expecting(shop.container, 7):
        raise Boom


# ---- what the failure shows -------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    lines: Mapped[list[Line]] = relationship()


class Line(Base):
    __tablename__ = "lines"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))


def total(app: Application) -> int:
    with app.unit():
        found = 0
        for order in app.session().scalars(select(Order).order_by(Order.id)):
            found += len(order.lines)
        return found


def test_repeated_statements_of_one_line_are_folded(shop: Application) -> None:
    Base.metadata.create_all(shop.engine())
    with shop.unit():
        shop.session().add_all([Order(lines=[Line(), Line()]) for _ in range(12)])
    with pytest.raises(UnexpectedStatements) as caught, expecting(shop.container, at_most=2):
        assert total(shop) == 24
    [first, second] = caught.value.sent
    assert (
        first == f"'writer' from {_line('for order in app.session()')} in total: SELECT orders.id FROM orders ORDER BY orders.id"
    )
    place = f"{_line('found += len(order')} in total"
    assert second.startswith(f"'writer', sent 12 times from {place}: N+1? SELECT lines.id")
    assert caught.value.message.startswith(
        "13 statements were sent, and at most 2 were expected.\n"
        "The statements are, in the order in which they were sent:\n  1. 'writer' from "
    )


def test_parameters_are_not_shown(shop: Application) -> None:
    with pytest.raises(UnexpectedStatements) as caught, expecting(shop.container, 0) as counted, shop.unit():
        shop.session().execute(select(Item).where(Item.name == "secret"))
        shop.session().connection().execute(insert(Item), [{"name": "secret"}, {"name": "secret2"}])
    assert "secret" not in f"{caught.value} {counted.statements}"


def test_long_lists_and_texts_are_cut(shop: Application) -> None:
    with pytest.raises(UnexpectedStatements) as caught, expecting(shop.container, 0), shop.engine().connect() as connection:
        for number in range(60):
            connection.exec_driver_sql(f"SELECT {number}, '{'x' * 600}'")
    assert len(caught.value.sent) == 51
    assert caught.value.sent[-1] == "(and 10 more)"
    assert max(map(len, caught.value.sent)) < 700


def test_nothing_sent_is_said(shop: Application) -> None:
    with pytest.raises(UnexpectedStatements) as caught, expecting(shop.container, 1):
        pass
    assert caught.value.message == "No statements were sent, and 1 was expected.\nNo statement was sent."
