"""A statement may end the unit's transaction, or the driver's own methods: it is refused or noticed, where that can be known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app_db.errors import InvalidUse, SessionIsManaged, TransactionLost
from harness.applications import Application, Item, running

NewUrl = Callable[[], str]

PROCEDURES = [
    "CREATE PROCEDURE commits() BEGIN COMMIT; END",
    "CREATE PROCEDURE rolls_back() BEGIN ROLLBACK; END",
    "CREATE PROCEDURE begins_again() BEGIN COMMIT; INSERT INTO items (name) VALUES ('by a procedure'); END",
    "CREATE PROCEDURE creates() BEGIN CREATE TABLE made (id int); DROP TABLE made; END",
    "CREATE PROCEDURE commits_each() BEGIN SET autocommit = 1; END",
    "CREATE PROCEDURE harmless() BEGIN SELECT 1; END",
    "CREATE PROCEDURE writes() BEGIN INSERT INTO items (name) VALUES ('by a procedure'); END",
]


@pytest.fixture
def app(new_mariadb_url: NewUrl) -> Iterator[Application]:
    with running(writer=new_mariadb_url()) as app:
        with app.engine().begin() as connection:
            for procedure in PROCEDURES:
                connection.exec_driver_sql(procedure)
        yield app


def write(session: Session, name: str) -> None:
    session.add(Item(name=name))
    session.flush()


ENDING = {
    "procedure that commits": "CALL commits()",
    "procedure that rolls back": "CALL rolls_back()",
    "procedure that begins again": "CALL begins_again()",
    "procedure that creates": "CALL creates()",
    "immediate": "EXECUTE IMMEDIATE 'COMMIT'",
    "block": "BEGIN NOT ATOMIC COMMIT; END",
    "condition": "IF 1 THEN CALL begins_again(); END IF",
    "case": "CASE 1 WHEN 1 THEN CALL begins_again(); END CASE",
    "loop": "FOR number IN 1..1 DO CALL begins_again(); END FOR",
    "repetition": "REPEAT CALL begins_again(); UNTIL 1 END REPEAT",
    "set statement that creates": "SET STATEMENT max_statement_time = 5 FOR CREATE TABLE made (id int)",
}

AUTOCOMMIT = {
    "immediate": ["EXECUTE IMMEDIATE 'SET autocommit = 1'"],
    "procedure": ["CALL commits_each()"],
    "prepared": ["PREPARE p FROM 'SET autocommit = 1'", "EXECUTE p"],
    "block": ["BEGIN NOT ATOMIC SET autocommit = 1; END"],
}


@pytest.mark.parametrize("kind", ENDING)
@pytest.mark.parametrize("goes_on", ["ends", "writes by a statement", "leaves a write to the commit"])
def test_what_ends_the_transaction_is_noticed(kind: str, goes_on: str, app: Application) -> None:
    with pytest.raises((TransactionLost, InvalidUse, SessionIsManaged)) as caught, app.unit():
        session = app.session()
        write(session, "before")
        session.execute(text(ENDING[kind]))
        if goes_on == "writes by a statement":
            write(session, "after")
        elif goes_on == "leaves a write to the commit":
            session.add(Item(name="after"))
    assert "after" not in app.names()
    if isinstance(caught.value, TransactionLost):
        assert caught.value.ended_by_statement
        assert "may be committed" in str(caught.value)
    else:
        assert app.names() == []


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE made (id int)",
        "TRUNCATE TABLE items",
        "ANALYZE TABLE items",
        "CHECK TABLE items",
        "FLUSH STATUS",
        "INSTALL SONAME 'absent'",
        "RESET QUERY CACHE",
        "# a comment\nALTER TABLE items ADD other int",
        "/*!50000 TRUNCATE */ TABLE items",
        "BEGIN/**/",
        "/*!COMMIT*/",
        "/*M! COMMIT */",
        "# c\nCOMMIT",
        "--\tc\nCOMMIT",
        "SET STATEMENT max_statement_time=1 FOR COMMIT",
        "SET STATEMENT max_statement_time=1 FOR ALTER TABLE items ADD other int",
        "SET @a=1, PASSWORD=PASSWORD('p@ss:w/rd %25#?')",
        "/* ' */ TRUNCATE TABLE items -- '",
        "/*!999999 ' */ TRUNCATE TABLE items -- '",
    ],
)
def test_what_would_commit_by_itself_is_refused_before_it_is_sent(statement: str, app: Application) -> None:
    with pytest.raises(KeyError), app.unit():
        write(app.session(), "before")
        with pytest.raises((InvalidUse, SessionIsManaged)):
            app.session().execute(text(statement))
        raise KeyError
    assert app.names() == []


@pytest.mark.parametrize(
    "statement",
    [
        "SET autocommit=1",
        "SET @@session.autocommit = 1",
        "LOCK TABLES items WRITE",
        "FLUSH TABLES items FOR EXPORT",
        "SET /* x */ AUTOCOMMIT=1",
        "SET @a='-- ', autocommit=1",
        "SET @a='#', autocommit=1",
        "SET @a='/*', autocommit=1, @b='*/'",
        "SET @a='x', SESSION sql_mode=''",
        "SET @a=(SELECT 1), @@autocommit=1",
        "SET STATEMENT max_statement_time=1 FOR SET SESSION sql_mode=''",
    ],
)
def test_what_stays_on_the_connection_is_refused(statement: str, app: Application) -> None:
    with app.unit():
        with pytest.raises(InvalidUse, match="because later units would get it"):
            app.session().execute(text(statement))
        write(app.session(), "kept")
    assert app.names() == ["kept"]


def test_what_does_not_end_the_transaction_is_no_alarm(app: Application) -> None:
    with app.unit() as unit:
        session = app.session()
        session.execute(text("CALL harmless()"))
        session.execute(text("SELECT SLEEP(0)"))
        session.execute(text("CALL writes()"))
        session.execute(text("SET @mine = 1"))
        session.execute(text("BEGIN NOT ATOMIC SELECT 1; END"))
        session.execute(text("CREATE  TEMPORARY\nTABLE passing (id int)"))
        session.execute(text("CREATE OR  REPLACE TEMPORARY TABLE passing (id int)"))
        session.execute(text("INSERT INTO passing VALUES (1)"))
        session.execute(text("DROP /* a comment */ TEMPORARY TABLE passing"))
        savepoint = unit.savepoint()
        write(session, "undone")
        savepoint.rollback()
        write(session, "kept")
        session.execute(text("EXPLAIN SELECT name FROM items"))
        session.execute(text("ANALYZE FORMAT=JSON SELECT name FROM items"))
    assert app.names() == ["by a procedure", "kept"]
    with app.unit():
        app.session().execute(text("CREATE TABLE alone (id int)"))
    with app.unit():
        app.session().execute(text("SELECT name FROM items"))


def test_coroutines_notice_it(app: Application) -> None:
    async def main() -> None:
        with pytest.raises(TransactionLost, match="ended behind the unit of work"):
            async with app.unit():
                session = app.container.writer_async_session()
                session.add(Item(name="before"))
                await session.flush()
                await session.execute(text("CALL commits()"))
        async with app.unit():
            app.container.writer_async_session().add(Item(name="later"))
        await app.container.shutdown_resources()

    asyncio.run(main())
    assert app.names() == ["before", "later"]


@pytest.mark.parametrize("kind", ENDING)
def test_coroutines_notice_each_of_them_before_the_next_write(kind: str, app: Application) -> None:
    async def main() -> None:
        with pytest.raises((TransactionLost, InvalidUse)):
            async with app.unit():
                session = app.container.writer_async_session()
                await session.execute(text("INSERT INTO items (name) VALUES ('before')"))
                await session.execute(text(f"\n  /* a comment */ {ENDING[kind]}"))
                await session.execute(text("INSERT INTO items (name) VALUES ('after')"))
        await app.container.shutdown_resources()

    asyncio.run(main())
    assert "after" not in app.names()


@pytest.mark.parametrize("procedure", ["commits", "rolls_back", "begins_again", "creates"])
@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
def test_it_is_noticed_of_the_first_statement_of_a_unit(driver: str, procedure: str, app: Application) -> None:
    def call() -> None:
        with app.unit():
            app.session().execute(text(f"CALL {procedure}()"))
            write(app.session(), "after")

    async def call_in_coroutine() -> None:
        async with app.unit():
            session = app.container.writer_async_session()
            await session.execute(text(f"CALL {procedure}()"))
            await session.execute(text("INSERT INTO items (name) VALUES ('after')"))

    async def main() -> None:
        try:
            await call_in_coroutine()
        finally:
            await app.container.shutdown_resources()

    with pytest.raises(TransactionLost, match="ended behind the unit of work"):
        call() if driver == "pymysql" else asyncio.run(main())
    assert app.names() == []


def test_a_procedure_that_a_coroutine_calls_first_is_no_alarm(app: Application) -> None:
    async def main() -> None:
        async with app.unit():
            session = app.container.writer_async_session()
            await session.execute(text("CALL harmless()"))
            await session.execute(text("INSERT INTO items (name) VALUES ('kept')"))
        await app.container.shutdown_resources()

    asyncio.run(main())
    assert app.names() == ["kept"]


def test_a_procedure_that_fails_is_no_alarm(app: Application) -> None:
    app.run("CREATE PROCEDURE fails() BEGIN SIGNAL SQLSTATE '45000'; END")
    with app.unit():
        write(app.session(), "before")
        with pytest.raises(DBAPIError, match="1644"):
            app.session().execute(text("CALL fails()"))
        write(app.session(), "after")
    assert app.names() == ["after", "before"]


def test_an_autonomous_session_may_call_what_commits(new_mariadb_url: NewUrl) -> None:
    log = {"url": new_mariadb_url(), "transactional": False}
    with running(writer=new_mariadb_url(), log=log) as app:
        with app.engine("log").begin() as connection:
            for procedure in PROCEDURES:
                connection.exec_driver_sql(procedure)
        with app.unit():
            app.session("log").execute(text("CALL begins_again()"))
        assert app.names("log") == ["by a procedure"]


def set_autocommit(session: Session, kind: str) -> None:
    for statement in AUTOCOMMIT[kind]:
        session.execute(text(statement))


@pytest.fixture
def one_connection(new_mariadb_url: NewUrl) -> Iterator[Application]:
    with running(writer={"url": new_mariadb_url(), "pool": {"size": 1, "max_overflow": 0}}) as app:
        app.run(*PROCEDURES)
        yield app


@pytest.mark.parametrize("kind", AUTOCOMMIT)
@pytest.mark.parametrize("goes_on", ["writes", "raises", "ends"])
def test_autocommit_that_no_text_shows_ends_the_transaction_and_the_connection(
    kind: str, goes_on: str, one_connection: Application
) -> None:
    app = one_connection
    with pytest.raises((TransactionLost, KeyError)), app.unit():
        session = app.session()
        set_autocommit(session, kind)
        if goes_on == "writes":
            session.execute(text("INSERT INTO items (name) VALUES ('after')"))
        elif goes_on == "raises":
            raise KeyError
    assert app.names() == []
    with pytest.raises(KeyError), app.unit():
        assert app.session().scalar(text("SELECT @@autocommit")) == 0
        write(app.session(), "undone")
        raise KeyError
    assert app.names() == []


@pytest.mark.parametrize("kind", AUTOCOMMIT)
def test_a_coroutines_autocommit_ends_the_transaction_and_the_connection(kind: str, one_connection: Application) -> None:
    app = one_connection

    async def main() -> None:
        with pytest.raises(TransactionLost):
            async with app.unit():
                session = app.container.writer_async_session()
                for statement in AUTOCOMMIT[kind]:
                    await session.execute(text(statement))
                await session.execute(text("INSERT INTO items (name) VALUES ('after')"))
        with pytest.raises(KeyError):
            async with app.unit():
                session = app.container.writer_async_session()
                assert await session.scalar(text("SELECT @@autocommit")) == 0
                session.add(Item(name="undone"))
                await session.flush()
                raise KeyError
        await app.container.shutdown_resources()

    asyncio.run(main())
    assert app.names() == []


def test_a_connection_of_the_engine_in_autocommit_does_not_return_to_the_pool(one_connection: Application) -> None:
    engine = one_connection.engine()
    with engine.connect() as connection:
        connection.exec_driver_sql("SET autocommit = 1")
    with engine.connect() as connection:
        number = connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one()
        assert connection.exec_driver_sql("SELECT @@autocommit").scalar_one() == 0
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:  # SQLAlchemy undoes this one
        assert connection.exec_driver_sql("SELECT @@autocommit").scalar_one() == 1
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one() == number


@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
def test_a_connection_whose_isolation_level_is_autocommit_is_no_alarm(driver: str, new_mariadb_url: NewUrl) -> None:
    reader = {"url": new_mariadb_url(), "read_only": True, "isolation_level": "AUTOCOMMIT", "pool": {"size": 1}}
    numbers = set[int]()

    async def read_by_coroutines(app: Application) -> None:
        for _ in range(2):
            async with app.unit():
                session = app.container.reader_async_session()
                numbers.add(await session.scalar(text("SELECT CONNECTION_ID()")))
                assert await session.scalar(text("SELECT @@autocommit")) == 1
        await app.container.shutdown_resources()

    with running(writer=new_mariadb_url(), reader=reader) as app:
        if driver == "asyncmy":
            asyncio.run(read_by_coroutines(app))
        else:
            for _ in range(2):
                with app.unit():
                    numbers.add(app.session("reader").scalar(text("SELECT CONNECTION_ID()")))
                    assert app.session("reader").scalar(text("SELECT @@autocommit")) == 1
    assert len(numbers) == 1


# ---- PostgreSQL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("through", ["driver", "cursor"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_the_end_of_a_transaction_by_the_driver_is_noticed_on_postgresql(
    goes_on: bool, through: str, end: str, new_postgres_url: NewUrl
) -> None:
    with running(writer=new_postgres_url()) as app:
        with pytest.raises(TransactionLost, match="ended behind the unit of work"), app.unit():
            write(app.session(), "before")
            driver = app.session().connection().connection.driver_connection
            assert driver is not None
            getattr(driver, end)() if through == "driver" else driver.cursor().execute(end)
            if goes_on:
                write(app.session(), "after")
        assert app.names() == (["before"] if end == "commit" else [])


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_coroutines_notice_it_on_postgresql(end: str, new_postgres_url: NewUrl) -> None:
    async def main(app: Application) -> None:
        with pytest.raises(TransactionLost, match="ended behind the unit of work"):
            async with app.unit():
                session = app.container.writer_async_session()
                await session.execute(text("INSERT INTO items (name) VALUES ('before')"))
                connection = await (await session.connection()).get_raw_connection()
                assert connection.driver_connection is not None
                await connection.driver_connection.execute(end)
                await session.execute(text("INSERT INTO items (name) VALUES ('after')"))
        await app.container.shutdown_resources()

    with running(writer=new_postgres_url().replace("postgresql+psycopg", "postgresql+asyncpg")) as app:
        asyncio.run(main(app))
        assert "after" not in app.names()


def test_a_first_statement_that_fails_is_no_alarm_on_postgresql(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url()) as app:
        with app.unit():
            with pytest.raises(DBAPIError), app.session().begin_nested():
                app.session().execute(text("SELECT * FROM missing"))
            write(app.session(), "kept")
        assert app.names() == ["kept"]


def test_a_rollback_by_the_driver_at_the_end_of_a_unit_is_noticed_on_sqlite(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url()) as app:
        with pytest.raises(TransactionLost, match="ended behind the unit of work"), app.unit():
            write(app.session(), "lost")
            driver = app.session().connection().connection.driver_connection
            assert driver is not None
            driver.rollback()
        assert app.names() == []
