"""Behind PgBouncer in transaction mode nothing is set on a session, and what is promised holds all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, OperationalError

from app_db import DatabaseSettings, container_of
from app_db.cli import main
from app_db.errors import ReadOnlyViolation, SettingsError, UnitOfWorkTimeout
from app_db.testing import isolated
from harness.applications import Application, Item, running
from harness.pooled_load import HIDDEN_WRITE, SESSION_SETTINGS, USES, Load
from harness.poolers import PgBouncer
from harness.requiring import made
from harness.servers import PASSWORD, PostgresServer


@pytest.fixture(scope="module")
def pooler(postgres: PostgresServer) -> Iterator[PgBouncer]:
    pooler = made(lambda: PgBouncer(postgres))
    yield pooler
    pooler.close()


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    with postgres.lend_database() as name:
        yield name


@pytest.fixture(params=["psycopg", "asyncpg"])
def driver(request: pytest.FixtureRequest) -> str:
    """That of coroutines; threads use psycopg."""
    return f"postgresql+{request.param}"


@pytest.fixture
def app(pooler: PgBouncer, database: str, driver: str) -> Iterator[Application]:
    pooled = {"url": pooler.url(database, driver), "pooler": "transaction"}
    with running(writer=pooled, reader={**pooled, "read_only": True}) as app:
        yield app
        for connection in session_settings(pooler, database):
            assert connection == [], "a server connection keeps what a session has set"


def session_settings(pooler: PgBouncer, database: str) -> list[list[tuple[Any, ...]]]:
    """Return what is set on each server connection that the pooler has for a database, by asking all of them at once."""
    with pooler.plain(database) as one, pooler.plain(database) as other:
        return [connection.execute(SESSION_SETTINGS).fetchall() for connection in (one, other)]


async def finished(app: Application) -> None:
    await app.container.shutdown_resources()


def test_a_reader_and_a_writer_share_server_connections_and_neither_notices(
    app: Application, pooler: PgBouncer, database: str
) -> None:
    for number in range(6):
        with app.unit():
            app.add(f"item {number}", "writer")
        with app.unit():
            assert len(app.session("reader").scalars(select(Item)).all()) == number + 1
            with pytest.raises(ReadOnlyViolation):
                app.session("reader").execute(text("INSERT INTO items (name) VALUES ('denied')"))
        with pooler.plain(database) as plain:
            plain.execute("CREATE TABLE IF NOT EXISTS plain (id serial)")
            plain.execute("INSERT INTO plain DEFAULT VALUES")
    assert app.names("writer") == [f"item {number}" for number in range(6)]


def test_a_reader_is_refused_by_the_server(app: Application) -> None:
    for options in ({}, {"isolation": "SERIALIZABLE"}, {"timeout": 30}):
        with pytest.raises(ReadOnlyViolation), app.unit(**options):
            app.session("reader").execute(text(HIDDEN_WRITE))
    with pytest.raises(ReadOnlyViolation), app.unit(read_only=True):
        app.session("writer").execute(text(HIDDEN_WRITE))
    with app.unit():
        app.session("writer").execute(text(HIDDEN_WRITE))
    assert app.names("writer") == ["denied"]


OPTIONS: list[dict[str, Any]] = [{"isolation_level": "AUTOCOMMIT"}, {"postgresql_readonly": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_execution_option_makes_a_reader_writable(options: dict[str, Any], app: Application) -> None:
    with pytest.raises(ReadOnlyViolation), app.unit():
        app.session("reader").connection(execution_options=options)
        app.session("reader").execute(text(HIDDEN_WRITE))
    with (
        pytest.raises((ReadOnlyViolation, DBAPIError)),
        app.engine("reader").execution_options(**options).connect() as connection,
    ):
        connection.execute(text(HIDDEN_WRITE))
    with pytest.raises(ReadOnlyViolation), app.unit():
        app.session("reader").execute(text(HIDDEN_WRITE))

    async def main() -> None:
        with pytest.raises(ReadOnlyViolation):
            async with app.unit():
                session = app.container.reader_async_session()
                await session.connection(execution_options=options)
                await session.execute(text(HIDDEN_WRITE))
        await finished(app)

    asyncio.run(main())
    assert app.names("writer") == []


def test_a_reader_in_autocommit_is_refused(pooler: PgBouncer, database: str) -> None:
    reader = {"url": pooler.url(database), "pooler": "transaction", "read_only": True, "isolation_level": "AUTOCOMMIT"}
    settings = DatabaseSettings(_env_file=None, connections={"writer": {"url": "sqlite://"}, "reader": reader})
    container = container_of("writer", "reader")(settings=settings)
    with pytest.raises(
        SettingsError, match="READER__ISOLATION_LEVEL: can't be AUTOCOMMIT on a reader behind a transaction pooler"
    ):
        container.connection("reader").engine()
    container.shutdown_resources()


def test_the_first_two_phase_units_do_not_wait_for_each_other(pooler: PgBouncer, postgres: PostgresServer) -> None:
    """Each unit has all server connections that the pooler gives it, so that the decision log can't have one of its own."""
    with postgres.lend_database() as one, postgres.lend_database() as other:
        pooled = {name: {"url": pooler.url(name), "pooler": "transaction", "two_phase": True} for name in (one, other)}
        with running(writer=pooled[one], warehouse=pooled[other]) as app:
            for number in range(2):
                started = Barrier(2)

                def write(item: str, started: Barrier = started) -> None:
                    with app.unit(timeout=10):
                        app.add(item, "writer")
                        started.wait()
                        app.add(item, "warehouse")

                with ThreadPoolExecutor(2) as threads:
                    list(threads.map(write, [f"{number}a", f"{number}b"]))
            assert app.names("writer") == app.names("warehouse") == ["0a", "0b", "1a", "1b"]


def test_coroutines_read_and_write(app: Application) -> None:
    async def main() -> None:
        for number in range(8):
            async with app.unit():
                app.container.writer_async_session().add(Item(name=f"item {number}"))
            async with app.unit():
                found = await app.container.reader_async_session().scalars(select(Item))
                assert len(found.all()) == number + 1
            with pytest.raises(ReadOnlyViolation):
                async with app.unit():
                    await app.container.reader_async_session().execute(text(HIDDEN_WRITE))
        await finished(app)

    asyncio.run(main())


def test_time_limits_and_isolation_go_with_the_transaction(pooler: PgBouncer, database: str) -> None:
    limited = {
        "url": pooler.url(database),
        "pooler": "transaction",
        "statement_timeout": 0.2,
        "isolation_level": "REPEATABLE READ",
    }
    with running(writer=limited) as app:
        with app.unit():
            session = app.session("writer")
            assert session.scalar(text("SHOW statement_timeout")) == "200ms"
            assert session.scalar(text("SHOW transaction_isolation")) == "repeatable read"
        with pytest.raises(OperationalError, match="statement timeout"), app.unit():
            app.session("writer").execute(text("SELECT pg_sleep(5)"))
        with pytest.raises(UnitOfWorkTimeout), app.unit(timeout=0.1):
            app.session("writer").execute(text("SELECT pg_sleep(5)"))
        with app.unit(isolation="SERIALIZABLE"):
            assert app.session("writer").scalar(text("SHOW transaction_isolation")) == "serializable"
        assert session_settings(pooler, database) == [[], []]


@pytest.mark.parametrize("log", ["writer", "journal"])
def test_two_phase_commit_and_recovery_work_through_the_pooler(log: str, pooler: PgBouncer, postgres: PostgresServer) -> None:
    with postgres.lend_database() as one, postgres.lend_database() as two, postgres.lend_database() as three:
        pooled = {
            name: {"url": pooler.url(database), "pooler": "transaction", "two_phase": name != "journal"}
            for name, database in {"writer": one, "warehouse": two, "journal": three}.items()
        }
        with Application(pooled, "strict", decision_log=log) as app:
            app.container.check()
            for number in range(4):
                with app.unit():
                    app.add(f"item {number}", "writer")
                    app.add(f"item {number}", "warehouse")
            assert len(app.names("writer")) == len(app.names("warehouse")) == 4
            with app.engine("writer").connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("SELECT 1")
            settled = app.container.recovery().settle()
            assert (settled.units, settled.unreachable) == ([], {})
        assert session_settings(pooler, one) == [[], []]


def test_isolated_tests_roll_back_through_the_pooler(app: Application) -> None:
    with isolated(app.container):
        for name in ("a", "b"):
            with app.unit():
                app.add(name, "writer")
        with app.unit():
            assert len(app.session("writer").scalars(select(Item)).all()) == 2
    assert app.names("writer") == []


# ---- many at once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["transaction", pytest.param("session", marks=pytest.mark.exhaustive)])
def test_many_threads_and_tasks_at_once(mode: str, driver: str, postgres: PostgresServer) -> None:
    """The same for longer is a part of `make soak`: tests/poolers_under_load.py."""
    pooler = made(lambda: PgBouncer(postgres, mode=mode))
    try:
        seen = Load(driver.partition("+")[2], mode, postgres, pooler).run(seconds=2)
    finally:
        pooler.close()
    assert seen.wrong == []
    assert set(seen.done) >= {*USES, "plain program", "recovery"}


@pytest.mark.exhaustive
def test_what_many_at_once_see_of_a_pooler_that_the_settings_deny(postgres: PostgresServer) -> None:
    """The fact guarded: the load does see what is set on sessions of server connections that are anybody's next."""
    pooler = made(lambda: PgBouncer(postgres, mode="transaction"))
    try:
        seen = Load("psycopg", "session", postgres, pooler).run(seconds=2)
    finally:
        pooler.close()
    assert any("ReadOnly" in line for line in seen.wrong), seen
    assert any("a server connection keeps" in line for line in seen.wrong), seen


# ---- where the settings don't say so ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"read_only": True}, {"statement_timeout": 3}, {}], ids=["reader", "time limit", "writer"])
def test_a_pooler_is_refused_at_the_first_connection(
    settings: dict[str, Any], pooler: PgBouncer, database: str, driver: str
) -> None:
    async def main(app: Application) -> None:
        try:
            async with app.unit():
                await app.container.warehouse_async_session().execute(text("SELECT 1"))
        finally:
            await finished(app)

    with running(warehouse={"url": pooler.url(database, driver), **settings}) as app:
        for _ in range(2):
            with pytest.raises(SettingsError, match=r"APP_DB_CONNECTIONS__WAREHOUSE__POOLER.*transaction.*none"), app.unit():
                app.session("warehouse").execute(text("SELECT 1"))
        with pytest.raises(SettingsError, match="APP_DB_CONNECTIONS__WAREHOUSE__POOLER"):
            asyncio.run(main(app))
    assert session_settings(pooler, database) == [[], []]


def test_the_check_of_the_command_line_says_so_beforehand(
    pooler: PgBouncer, database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", pooler.url(database))
    assert main(["check"]) != 0
    told = capsys.readouterr()
    assert "APP_DB_CONNECTIONS__WRITER__POOLER" in told.out
    assert PASSWORD not in told.out + told.err
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__POOLER", "transaction")
    assert main(["check"]) == 0


def test_session_pooling_works_as_without_a_pooler(postgres: PostgresServer, database: str) -> None:
    pooler = made(lambda: PgBouncer(postgres, mode="session", size=6))
    try:
        pooled = {"url": pooler.url(database), "pooler": "none"}
        with running(writer=pooled, reader={**pooled, "read_only": True, "statement_timeout": 3}) as app:
            for number in range(3):
                with app.unit():
                    app.add(f"item {number}", "writer")
                with pytest.raises(ReadOnlyViolation), app.unit():
                    app.session("reader").execute(text(HIDDEN_WRITE))
            assert len(app.names("writer")) == 3
    finally:
        pooler.close()


def test_a_pooler_is_for_postgresql() -> None:
    with pytest.raises(SettingsError, match="POOLER: is for poolers of PostgreSQL, and this is sqlite"):
        running(writer={"url": "sqlite://", "pooler": "transaction"}).__enter__()


def test_without_a_pooler_the_setting_changes_no_promise(postgres: PostgresServer, database: str) -> None:
    direct = {"url": postgres.url(database), "pooler": "transaction"}
    with running(writer=direct, reader={**direct, "read_only": True}) as app:
        with app.unit():
            app.add("a", "writer")
        with pytest.raises(ReadOnlyViolation), app.unit():
            app.session("reader").execute(text(HIDDEN_WRITE))
        assert app.names("writer") == ["a"]


def test_what_a_session_setting_does_to_other_programs(pooler: PgBouncer, database: str) -> None:
    """The fact guarded: a setting stays on a server connection, which is anybody's next."""
    with pooler.plain(database) as careless:
        careless.autocommit = True
        for _ in range(2):
            careless.execute("SET default_transaction_read_only = on")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), pooler.plain(database) as other:
            for _ in range(4):
                other.execute("CREATE TABLE refused (id int)")
                other.rollback()
        careless.execute("RESET ALL")
