"""Whatever is sent on a read-only connection, or in a read-only unit: nothing is written, and the next unit is as protected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from app_db.errors import AppDbError
from harness.applications import Application, running

NewUrl = Callable[[], str]

INSERT = "INSERT INTO items (name) VALUES ('written')"

POSTGRESQL = [
    INSERT,
    "SELECT writes()",
    "SELECT i.touched FROM (SELECT 1) AS one, writes() AS i(touched)",
    f"WITH new AS ({INSERT} RETURNING name) SELECT name FROM new",
    f"EXPLAIN ANALYZE {INSERT}",
    f"DO $$ BEGIN {INSERT}; END $$",
    f"DO $$ BEGIN SET transaction_read_only = off; {INSERT}; END $$",
    f"DO $$ BEGIN COMMIT; SET default_transaction_read_only = off; COMMIT; {INSERT}; END $$",
    "CALL lifts()",
    "SET default_transaction_read_only = off",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "SET/**/SESSION CHARACTERISTICS AS TRANSACTION READ/**/WRITE",
    "SET TRANSACTION READ/* */WRITE",
    'SET "default_transaction_read_only" = off',
    "SET LOCAL transaction_read_only = off",
    "RESET default_transaction_read_only",
    "RESET ALL",
    "DISCARD ALL",
    "SELECT set_config('default_transaction_read_only', 'off', false)",
    "SELECT set_config('default_' || 'transaction_read_only', 'off', false)",
    "SELECT set_config(E'default_transaction_read\\137only', 'off', false)",
    "SELECT pg_catalog.\"set_config\"('default_transaction_read_only', 'off', false)",
    "SELECT lifts_it()",
    f"SET default_transaction_read_only = off; {INSERT}",
    f"SELECT 1; {INSERT}",
    f"SELECT 1; SET transaction_read_only = off; {INSERT}",
    f"SELECT 1; COMMIT; SET default_transaction_read_only = off; {INSERT}",
    f"BEGIN READ WRITE; {INSERT}; COMMIT",
    f"START TRANSACTION READ WRITE; {INSERT}; COMMIT",
    f"COMMIT; BEGIN READ WRITE; {INSERT}; COMMIT",
    f"-- a comment\nSET default_transaction_read_only = off;\n{INSERT}",
    f"/* a /* nested */ comment */ {INSERT}",
    f"PREPARE writing AS {INSERT}",
    "EXECUTE writing",
    "COPY items (name) FROM PROGRAM 'echo written'",
    "CREATE TABLE written (id int)",
    "TRUNCATE items",
    "ALTER ROLE CURRENT_USER SET default_transaction_read_only = off",
    "LOCK TABLE items IN EXCLUSIVE MODE",
    "REFRESH MATERIALIZED VIEW nothing",
    "COMMENT ON TABLE items IS 'written'",
    "VACUUM items",
]

MARIADB = [
    INSERT,
    "SELECT writes()",
    "CALL writing()",
    "CALL lifts()",
    "SET SESSION TRANSACTION READ WRITE",
    "SET/**/SESSION TRANSACTION READ/**/WRITE",
    "SET TRANSACTION READ WRITE",
    "SET SESSION tx_read_only = 0",
    "SET @@session.tx_read_only = 0",
    "SET @@tx_read_only := 0",
    "SET @a = 1, SESSION tx_read_only = 0",
    "SET STATEMENT tx_read_only = 0 FOR INSERT INTO items (name) VALUES ('written')",
    f"SET STATEMENT max_statement_time = 1 FOR {INSERT}",
    "/*!SET SESSION TRANSACTION READ WRITE*/",
    "/*M! SET SESSION tx_read_only = 0 */",
    f"/*!50000 {INSERT} */",
    f"# a comment\n{INSERT}",
    f"-- a comment\n{INSERT}",
    f'EXECUTE IMMEDIATE "{INSERT}"',
    "EXECUTE IMMEDIATE 'SET SESSION TRANSACTION READ WRITE'",
    "PREPARE lifting FROM 'SET SESSION TRANSACTION READ WRITE'",
    "EXECUTE lifting",
    f"BEGIN NOT ATOMIC SET SESSION TRANSACTION READ WRITE; COMMIT; {INSERT}; COMMIT; END",
    "START TRANSACTION READ WRITE",
    "BEGIN",
    "COMMIT",
    "DO writes()",
    "HANDLER items OPEN",
    "REPLACE INTO items (name) VALUES ('written')",
    "LOAD DATA INFILE '/etc/hostname' INTO TABLE items (name)",
    "CREATE TABLE written (id int)",
    "TRUNCATE TABLE items",
    "LOCK TABLES items WRITE",
    "ANALYZE TABLE items",
    "OPTIMIZE TABLE items",
    "SELECT name INTO @x FROM items",
    "SET autocommit = 1",
]

SQLITE = [
    INSERT,
    f"/* c */ {INSERT}",
    f"-- c\n{INSERT}",
    f"EXPLAIN {INSERT}",
    "PRAGMA query_only = OFF",
    "PRAGMA query_only(0)",
    "PRAGMA/**/query_only/**/=/**/OFF",
    'pragma "query_only" = 0',
    "PRAGMA main.query_only = 0",
    "PRAGMA user_version = 7",
    "PRAGMA application_id = 7",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA foreign_keys = OFF",
    "CREATE TABLE written (id int)",
    "CREATE TEMP TABLE written (id int)",
    "REPLACE INTO items (name) VALUES ('written')",
    f"WITH one AS (SELECT 1) {INSERT}",
    "COMMIT",
    "END -- it",
    "ROLLBACK",
    "BEGIN IMMEDIATE",
    "DELETE FROM items",
    "DROP TABLE items",
    "REINDEX",
    "VACUUM",
    "ATTACH DATABASE ':memory:' AS other",
]

PREPARED = {
    "postgresql": [
        f"CREATE FUNCTION writes() RETURNS text LANGUAGE plpgsql AS $$ BEGIN {INSERT}; RETURN 'written'; END $$",
        (
            "CREATE FUNCTION lifts_it() RETURNS text LANGUAGE sql AS "
            "$$ SELECT set_config('default_transaction_read_only', 'off', false) $$"
        ),
        (
            "CREATE PROCEDURE lifts() LANGUAGE plpgsql AS $$ BEGIN COMMIT; SET default_transaction_read_only = off; COMMIT; "
            f"{INSERT}; COMMIT; END $$"
        ),
    ],
    "mariadb": [
        f"CREATE FUNCTION writes() RETURNS text BEGIN {INSERT}; RETURN 'written'; END",
        f"CREATE PROCEDURE writing() BEGIN {INSERT}; COMMIT; END",
        f"CREATE PROCEDURE lifts() BEGIN COMMIT; SET SESSION TRANSACTION READ WRITE; {INSERT}; COMMIT; END",
    ],
    "sqlite": [],
}
CASES = [
    (database, statement)
    for database, statements in {"postgresql": POSTGRESQL, "mariadb": MARIADB, "sqlite": SQLITE}.items()
    for statement in statements
]
FACTORIES = {"postgresql": "new_postgres_url", "mariadb": "new_mariadb_url", "sqlite": "new_sqlite_url"}


@pytest.fixture(params=FACTORIES)
def prepared(request: pytest.FixtureRequest) -> Iterator[tuple[str, Application]]:
    """A database with a seed, and an application that has one pooled connection for each of writer and reader."""
    url = request.getfixturevalue(FACTORIES[request.param])()
    pool = {"pool": {"size": 1, "max_overflow": 0}}
    with running(writer={"url": url, **pool}) as app:
        app.put("seed")
        with app.engine().begin() as connection:
            for statement in PREPARED[request.param]:
                connection.exec_driver_sql(statement)
        with running(writer={"url": url, **pool}, reader={"url": url, "read_only": True, **pool}) as both:
            yield request.param, both


def write_unseen(app: Application, name: str, database: str) -> None:
    """Write in a way that no check of texts sees, so that only the database can refuse it."""
    connection = app.session(name).connection()
    if database == "sqlite":
        connection.connection.cursor().execute(INSERT)
    else:
        connection.exec_driver_sql("SELECT writes() AS harmless")


def send(app: Application, name: str, statement: str, database: str) -> None:
    """Send a statement and a write in one unit, and a write in the next."""
    with suppress(Exception), app.unit():
        with suppress(AppDbError, DBAPIError):
            app.session(name).connection().exec_driver_sql(statement)
        write_unseen(app, name, database)
    with suppress(Exception), app.unit():
        app.session(name).connection().connection.cursor().execute(INSERT)


def statements_of(database: str) -> list[str]:
    return [statement for kind, statement in CASES if kind == database]


def test_a_reader_writes_nothing_and_stays_protected(prepared: tuple[str, Application]) -> None:
    database, app = prepared
    for statement in statements_of(database):
        send(app, "reader", statement, database)
        assert app.names() == ["seed"], statement
        with pytest.raises(Exception, match=r"(?i)read.?only"), app.unit():  # the driver's own error
            app.session("reader").connection().connection.cursor().execute(INSERT)
    assert app.names() == ["seed"]


def test_a_read_only_unit_writes_nothing_and_leaves_a_writer_as_it_was(prepared: tuple[str, Application]) -> None:
    database, app = prepared
    for statement in statements_of(database):
        with suppress(Exception), app.unit(read_only=True):
            with suppress(AppDbError, DBAPIError):
                app.session("writer").connection().exec_driver_sql(statement)
            write_unseen(app, "writer", database)
        assert app.names() == ["seed"], statement
    with app.unit():
        app.session("writer").execute(text(INSERT))
    with pytest.raises(KeyError), app.unit():
        app.session("writer").execute(text("INSERT INTO items (name) VALUES ('undone')"))
        raise KeyError
    assert app.names() == ["seed", "written"]


def test_a_coroutines_reader_writes_nothing(prepared: tuple[str, Application]) -> None:
    database, app = prepared

    async def main() -> None:
        for statement in statements_of(database):
            with suppress(AppDbError, SQLAlchemyError):
                async with app.unit():
                    connection = await app.container.reader_async_session().connection()
                    await connection.exec_driver_sql(statement)
            with suppress(AppDbError, SQLAlchemyError):
                async with app.unit():
                    connection = await app.container.reader_async_session().connection()
                    await connection.exec_driver_sql("SELECT writes()" if database != "sqlite" else INSERT)
            assert app.names() == ["seed"], statement
        await app.container.shutdown_resources()

    asyncio.run(main())
