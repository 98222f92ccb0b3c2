"""What app_db relies on of drivers, and of SQLAlchemy's adapters for them, that is not public, on real servers."""

from __future__ import annotations

import asyncio
import selectors
import socket
import sqlite3
from pathlib import Path
from typing import Any

import psycopg
import pymysql as driver
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util.concurrency import greenlet_spawn

from app_db._compat import aiosqlite, asyncmy, asyncpg, pymysql
from app_db._compat.psycopg import async_view
from app_db._compat.sqlalchemy_asyncpg import adapted_error, note_ended_transaction


def connect(url: str) -> Any:
    there = make_url(url)
    return driver.connect(
        host=there.host, port=there.port or 3306, user=there.username, password=str(there.password or ""), database=there.database
    )


# ---- PyMySQL ------------------------------------------------------------------------------------------------------------


def test_pymysqls_query_can_be_taken_apart(mariadb_url: str) -> None:
    """`_execute_command`, `_read_query_result`, `_sock`: without them, branches could not be prepared at the same time."""
    connection = connect(mariadb_url)
    pymysql.send(connection, "SELECT SLEEP(0.1)")
    assert not pymysql.has_decrypted(connection)
    with selectors.DefaultSelector() as selector:
        selector.register(pymysql.descriptor_of(connection), selectors.EVENT_READ)
        assert selector.select(0) == []
        assert selector.select(5) != []
    pymysql.receive(connection)
    pymysql.send(connection, "SELECT nothing")
    with pytest.raises(driver.err.OperationalError, match="nothing"):
        pymysql.receive(connection)
    connection.close()


def test_pymysqls_time_limit_is_known(mariadb_url: str) -> None:
    """`_read_timeout`: without it, a server that is silent would be waited for without an end."""
    there = make_url(mariadb_url)
    options: Any = {"host": there.host, "port": there.port, "user": there.username, "password": str(there.password or "")}
    limited = driver.connect(**options, read_timeout=7)
    assert pymysql.read_timeout_of(limited) == 7
    limited.close()


def test_pymysqls_time_limit_can_be_changed(mariadb_url: str) -> None:
    """`_read_timeout`: without it, an attempt to connect that took too long for its unit would be waited for in its thread."""
    connection = connect(mariadb_url)
    assert [pymysql.is_pymysql(each) for each in (connection, object())] == [True, False]
    pymysql.set_read_timeout(connection, 1)
    with pytest.raises(driver.err.OperationalError, match="timed out"):
        connection.query("SELECT SLEEP(5)")
    assert not connection.open


def test_pymysql_hangs_up_without_a_word(mariadb_url: str) -> None:
    """`_force_close`: close() would send COM_QUIT, and wait where the socket is stuck."""
    connection = connect(mariadb_url)
    pymysql.close_at_once(connection)
    assert not connection.open
    with pytest.raises(driver.err.Error):
        connection.query("SELECT 1")


# ---- sockets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "mysql+asyncmy"])
async def test_the_socket_of_an_async_connection_is_known(scheme: str, request: pytest.FixtureRequest) -> None:
    """`_transport`: without it, a server that stands still would be waited for beyond the time limit of the unit."""
    url = request.getfixturevalue("postgres_url" if "postgresql" in scheme else "mariadb_url")
    descriptor_of: Any = asyncpg.descriptor_of if "postgresql" in scheme else asyncmy.descriptor_of
    sleep = "SELECT pg_sleep(5)" if "postgresql" in scheme else "SELECT SLEEP(5)"
    engine = create_async_engine(f"{scheme}:{url.partition(':')[2]}")
    async with engine.connect() as connection:
        own = (await connection.get_raw_connection()).driver_connection
        with socket.fromfd(descriptor_of(own), socket.AF_INET, socket.SOCK_STREAM) as duplicate:
            sleeping = asyncio.create_task(connection.execute(text(sleep)))
            await asyncio.sleep(0.1)
            duplicate.shutdown(socket.SHUT_RDWR)
            with pytest.raises((DBAPIError, ConnectionError)):
                await asyncio.wait_for(sleeping, 3)
        await connection.invalidate()
        assert descriptor_of(own) is None
    await engine.dispose()


# ---- asyncpg, as SQLAlchemy adapts it -------------------------------------------------------------------------------------


async def test_asyncpgs_adapter_begins_anew_after_a_transaction_that_was_ended_below_it(postgres_url: str) -> None:
    """`_transaction`, `_top_xact`, `_started`: without them, the next unit would begin no transaction, and commit as it goes."""
    engine = create_async_engine(make_url(postgres_url).set(drivername="postgresql+asyncpg"))
    async with engine.connect() as connection:
        await connection.execute(text("CREATE TABLE items (name text)"))
        await connection.commit()
        await connection.execute(text("INSERT INTO items VALUES ('a')"))
        adapted: Any = (await connection.get_raw_connection()).dbapi_connection
        await adapted.driver_connection.execute("COMMIT")
        note_ended_transaction(adapted)
        await connection.rollback()
        await connection.execute(text("INSERT INTO items VALUES ('b')"))
        await connection.rollback()
        names = (await connection.execute(text("SELECT name FROM items"))).scalars().all()
    await engine.dispose()
    assert names == ["a"]


async def test_asyncpgs_adapter_gives_the_error_that_applications_know(postgres_url: str) -> None:
    """`_handle_exception`: without it, an application would see asyncpg's own errors for what a two-phase unit refuses."""
    engine = create_async_engine(make_url(postgres_url).set(drivername="postgresql+asyncpg"))
    async with engine.connect() as connection:
        adapted: Any = (await connection.get_raw_connection()).dbapi_connection
        with pytest.raises(Exception, match="nowhere") as caught:
            await adapted.driver_connection.execute("SELECT * FROM nowhere")
        found = await greenlet_spawn(adapted_error, adapted, caught.value)
        assert isinstance(found, adapted.dbapi.Error)
        assert getattr(found, "sqlstate", None) == "42P01"
    await engine.dispose()


# ---- one connection for threads and coroutines ------------------------------------------------------------------------------


async def test_psycopg_takes_one_libpq_connection_for_threads_and_coroutines(postgres_url: str) -> None:
    """`_adapters`, `_pool`: without them, isolated tests could not share one transaction between threads and coroutines."""
    there = make_url(postgres_url)
    options: Any = {"host": there.host, "port": there.port, "user": there.username, "password": str(there.password or "")}
    with psycopg.connect(dbname=there.database, **options) as connection:
        connection.execute("CREATE TEMPORARY TABLE items (name text)")
        view = await async_view(connection)
        await view.execute("INSERT INTO items VALUES (%s)", ("a",))
        assert connection.execute("SELECT name FROM items").fetchall() == [("a",)]
        connection.rollback()
        del view


async def test_aiosqlite_takes_an_open_connection_and_leaves_it_open(tmp_path: Path) -> None:
    """`_connection`, `_tx`, `_thread`: without them, isolated tests could not share one transaction of SQLite."""
    connection = sqlite3.connect(tmp_path / "shop.db", check_same_thread=False)
    connection.execute("CREATE TABLE items (name TEXT)")
    view = await aiosqlite.async_view(connection)
    assert aiosqlite.is_view(view)
    assert not aiosqlite.is_view(connection)
    await view.execute("INSERT INTO items VALUES ('a')")
    await view.create_function("twice", 1, lambda value: value * 2)  # which SQLAlchemy asks of every new connection
    aiosqlite.leave_open(view)
    await view.close()
    assert connection.execute("SELECT name FROM items").fetchall() == [("a",)]
    connection.close()
