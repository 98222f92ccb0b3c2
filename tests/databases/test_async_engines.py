"""Engines of coroutines: from the same settings as those of threads, tuned in the same way, one for each event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool, StaticPool

from app_db import ConnectionSettings, Container, DatabaseSettings, PoolSettings
from app_db._databases.disposal import begin_to_retire, wait_outside
from app_db._databases.engines import build_async_engine, build_engine
from app_db.errors import AppDbError, InvalidUse, SettingsError
from app_db.settings._urls import for_coroutines, for_threads
from harness.choosing import mostly
from harness.paths import ROOT
from harness.proxies import Proxy
from harness.servers import MariaDBServer, PostgresServer

R = TypeVar("R")
_numbers = count(1)

DRIVERS = ("sqlite+aiosqlite", "postgresql+psycopg", "postgresql+asyncpg", "mysql+asyncmy")
ON_POSTGRESQL = ("postgresql+psycopg", "postgresql+asyncpg")


@pytest.fixture
def new_url(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """`new_url("postgresql+asyncpg")` is the URL of an empty database by this driver."""

    def new(driver: str) -> str:
        name = {"postgresql": "new_postgres_url", "mysql": "new_mariadb_url"}.get(driver.partition("+")[0], "new_sqlite_url")
        url: str = request.getfixturevalue(name)()
        return f"{driver}:{url.partition(':')[2]}"

    return new


@pytest.fixture(params=mostly(DRIVERS, exhaustive="postgresql+psycopg"))
def url(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> str:
    return new_url(request.param)


@pytest.fixture(params=mostly(ON_POSTGRESQL, exhaustive="postgresql+psycopg"))
def pg_url(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> str:
    return new_url(request.param)


def settings_of(url: str | None, *, application: str = "app_db", **usage: Any) -> DatabaseSettings:
    return DatabaseSettings(application=application, connections={"writer": ConnectionSettings(url=url, **usage)})


def with_engine(url: str | None, work: Callable[[AsyncEngine], Awaitable[R]], **usage: Any) -> R:
    """Run `work` with a new engine in an event loop of its own."""

    async def run() -> R:
        engine = build_async_engine("writer", settings_of(url, **usage))
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return asyncio.run(run())


async def scalar(engine: AsyncEngine, sql: str) -> Any:
    async with engine.connect() as connection:
        return await connection.scalar(text(sql))


async def execute(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as connection:
        for sql in statements:
            await connection.execute(text(sql))


def ask(url: str | None, *statements: str, **usage: Any) -> list[Any]:
    async def work(engine: AsyncEngine) -> list[Any]:
        return [await scalar(engine, sql) for sql in statements]

    return with_engine(url, work, **usage)


def create(url: str, *statements: str) -> None:
    with_engine(url, lambda engine: execute(engine, *statements))


# ---- drivers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "threads", "coroutines"),
    [
        ("sqlite://", "sqlite+pysqlite", "sqlite+aiosqlite"),
        ("sqlite+pysqlite://", "sqlite+pysqlite", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite://", "sqlite+pysqlite", "sqlite+aiosqlite"),
        ("postgres://h/d", "postgresql+psycopg", "postgresql+psycopg"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg", "postgresql+psycopg"),
        ("postgresql+asyncpg://h/d", "postgresql+psycopg", "postgresql+asyncpg"),
        ("mysql://h/d", "mysql+pymysql", "mysql+asyncmy"),
        ("mariadb://h/d", "mariadb+pymysql", "mariadb+asyncmy"),
        ("mysql+asyncmy://h/d", "mysql+pymysql", "mysql+asyncmy"),
        ("mariadb+asyncmy://h/d", "mariadb+pymysql", "mariadb+asyncmy"),
    ],
)
def test_both_engines_come_from_one_url(named: str, threads: str, coroutines: str) -> None:
    settings = settings_of(named)
    engine, async_engine = build_engine("writer", settings), build_async_engine("writer", settings)
    assert f"{engine.dialect.name}+{engine.dialect.driver}" in (threads, threads.replace("mariadb", "mysql"))
    assert f"{async_engine.dialect.name}+{async_engine.dialect.driver}" in (coroutines, coroutines.replace("mariadb", "mysql"))
    assert (engine.dialect.is_async, async_engine.dialect.is_async) == (False, True)
    assert engine.url.set(drivername="x") == async_engine.url.set(drivername="x")


@pytest.mark.parametrize(
    ("named", "threads", "coroutines"),
    [
        ("postgresql+psycopg2://h/d", "postgresql+psycopg2", "postgresql+asyncpg"),
        ("postgresql+pg8000://h/d", "postgresql+pg8000", "postgresql+asyncpg"),
        ("mysql+mysqldb://h/d", "mysql+mysqldb", "mysql+asyncmy"),
        ("mysql+aiomysql://h/d", "mysql+pymysql", "mysql+aiomysql"),
        ("mssql+pyodbc://h/d", "mssql+pyodbc", "mssql+aioodbc"),
        ("oracle+oracledb://h/d", "oracle+oracledb", "oracle+oracledb"),
    ],
)
def test_drivers_that_are_not_installed_here_have_their_counterparts(named: str, threads: str, coroutines: str) -> None:
    assert for_threads(make_url(named)).drivername == threads
    assert for_coroutines(make_url(named)).drivername == coroutines


def test_a_driver_that_app_db_does_not_know_and_that_is_missing_is_named() -> None:
    with pytest.raises(SettingsError, match=r"WRITER__URL: needs the driver pg8000, which can't be imported \(No module named"):
        settings_of("postgresql+pg8000://shop@h/d")


def test_a_missing_driver_says_what_to_install_when_the_engine_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    container: Any = Container(settings=settings_of("sqlite://"))
    monkeypatch.setattr("app_db.settings._urls.find_spec", lambda module: None)
    variable = "APP_DB_CONNECTIONS__WRITER__URL"
    with pytest.raises(
        SettingsError, match=rf"{variable}: needs a driver that is not installed: pip install 'app-db\[asyncio\]'"
    ):
        container.writer_async_engine()
    with container.transaction():
        assert container.writer_session().scalar(text("SELECT 1")) == 1, "who doesn't use coroutines needs no driver for them"
    container.shutdown_resources()


@pytest.mark.parametrize(
    ("url", "extra"), [("postgresql+psycopg2://h/d", "asyncpg"), ("mysql+pymysql://h/d", "asyncmy"), ("sqlite://", "asyncio")]
)
def test_a_missing_driver_is_named_by_its_extra(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from app_db.settings._urls import dialect_of

    monkeypatch.setattr("app_db.settings._urls.find_spec", lambda module: None)
    assert f"pip install 'app-db[{extra}]'" in str(dialect_of(for_coroutines(make_url(url))))


def test_a_driver_that_coroutines_cannot_use_is_refused_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app_db.settings._urls._FOR_COROUTINES", {})
    with pytest.raises(SettingsError, match=r"__URL: names the driver pymysql, which coroutines can't use\. Name one"):
        build_async_engine("writer", settings_of("mysql://h/d"))
    with pytest.raises(SettingsError, match="__DRIVER: names the driver pymysql"):
        build_async_engine("writer", settings_of(None, driver="mysql", host="h"))


WITHOUT_GREENLET = """
import asyncio, sys
sys.modules["greenlet"] = None
from sqlalchemy import text
from app_db import Container, DatabaseSettings, transactional
from app_db.errors import InvalidUse

container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
with container.transaction():
    assert container.writer_session().scalar(text("SELECT 1")) == 1

@transactional
async def decorated():
    raise SystemExit("ran")

container.wire(modules=[__name__])

async def block():
    async with container.transaction():
        raise SystemExit("entered")

def refused(ask):
    try:
        ask()
    except InvalidUse as error:
        print(error)
    else:
        raise SystemExit("not refused")

refused(container.writer_async_engine)
refused(container.writer_async_sessionmaker)
refused(container.writer_async_scoped_session)
refused(container.writer_async_session)
refused(lambda: asyncio.run(block()))
refused(lambda: asyncio.run(decorated()))
container.shutdown_resources()
"""


def test_without_greenlet_threads_work_and_coroutines_are_told_what_to_install() -> None:
    done = run_program(WITHOUT_GREENLET)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {
        "Coroutines need greenlet, which is not installed. pip install 'app-db[asyncio]'.",
        f"See {AppDbError.pages_at}/errors/invalid-use.html",
    }


def run_program(source: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *options, "-c", source]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


# ---- SQLite --------------------------------------------------------------------------------------------------------------


def test_sqlite_files_are_in_wal_mode_with_foreign_keys_and_a_busy_timeout(sqlite_url: str) -> None:
    pragmas = ("journal_mode", "foreign_keys", "query_only")
    assert ask(sqlite_url, *(f"PRAGMA {name}" for name in pragmas)) == ["wal", 1, 0]
    assert ask(sqlite_url, *(f"PRAGMA {name}" for name in pragmas), read_only=True) == ["wal", 1, 1]
    assert ask(sqlite_url, "PRAGMA busy_timeout")[0] >= 1000
    assert ask(sqlite_url, "PRAGMA busy_timeout", connect_args={"timeout": 0.05}) == [50]


def test_a_read_only_connection_is_held_to_it_by_the_database(url: str) -> None:
    create(url, "CREATE TABLE a (id INTEGER)")

    async def work(engine: AsyncEngine) -> None:
        for _ in range(2):  # the second time with a connection from the pool
            with pytest.raises(DBAPIError, match=r"readonly|read-only|1792"):
                await execute(engine, "INSERT INTO a VALUES (1)")
        assert await scalar(engine, "SELECT count(*) FROM a") == 0

    with_engine(url, work, read_only=True)


def test_a_writable_sqlite_connection_takes_the_lock_when_it_begins(sqlite_url: str) -> None:
    create(sqlite_url, "CREATE TABLE a (id INTEGER)")

    async def work(engine: AsyncEngine) -> None:
        hurried = build_async_engine("writer", settings_of(sqlite_url, connect_args={"timeout": 0.05}))
        reader = build_async_engine("writer", settings_of(sqlite_url, read_only=True))
        async with engine.begin() as connection:
            await connection.execute(text("SELECT count(*) FROM a"))
            with pytest.raises(OperationalError, match="locked"):
                await scalar(hurried, "SELECT count(*) FROM a")
            await connection.execute(text("INSERT INTO a VALUES (1)"))
            assert await scalar(reader, "SELECT count(*) FROM a") == 0, "readers are not held up"
        assert await scalar(reader, "SELECT count(*) FROM a") == 1
        await hurried.dispose()
        await reader.dispose()

    with_engine(sqlite_url, work)


def test_ddl_on_sqlite_is_part_of_the_transaction_and_savepoints_are_savepoints(sqlite_url: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(LookupError):
            async with engine.begin() as connection:
                await connection.execute(text("CREATE TABLE undone (id INTEGER)"))
                raise LookupError
        await execute(engine, "CREATE TABLE kept (id INTEGER)")
        async with engine.begin() as connection:
            savepoint = await connection.begin_nested()
            await connection.execute(text("INSERT INTO kept VALUES (1)"))
            await savepoint.rollback()
            async with connection.begin_nested():
                await connection.execute(text("INSERT INTO kept VALUES (2)"))
        assert await scalar(engine, "SELECT group_concat(name) FROM sqlite_master") == "kept"
        assert await scalar(engine, "SELECT group_concat(id) FROM kept") == "2"

    with_engine(sqlite_url, work)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite+aiosqlite:///:memory:", "sqlite:///file:shop?mode=memory&uri=true"])
def test_a_memory_database_is_one_for_threads_coroutines_and_mirrors(url: str) -> None:
    container: Any = Container(settings=settings_of(url))
    with container.transaction():
        container.writer_session().execute(text("CREATE TABLE a (id INTEGER)"))

    async def insert() -> Any:
        async with container.transaction():
            await container.writer_async_session().execute(text("INSERT INTO a VALUES (1)"))
            assert await container.reader_async_session().scalar(text("SELECT count(*) FROM a")) == 0
        async with container.transaction():
            seen = await container.reader_async_session().scalar(text("SELECT group_concat(id) FROM a"))
        await container.shutdown_resources()
        return seen

    assert asyncio.run(insert()) == "1"
    with container.transaction():
        assert container.writer_session().scalar(text("SELECT group_concat(id) FROM a")) == "1"
    container.shutdown_resources()


# ---- statement timeouts, isolation -----------------------------------------------------------------------------------------

FOREVER = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(10)",
    "mysql": "SELECT SLEEP(10)",
}


def test_a_long_statement_is_stopped_and_keeps_nobody_waiting(url: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        start = time.monotonic()
        if engine.dialect.name == "mysql":  # MariaDB's SLEEP ends early and says so by its answer
            with pytest.raises(DBAPIError, match="max_statement_time"):
                await scalar(engine, "SELECT SLEEP(10) FROM information_schema.tables")
        else:
            with pytest.raises(DBAPIError, match=r"interrupted|statement timeout"):
                await scalar(engine, FOREVER[engine.dialect.name])
        assert 0.15 < time.monotonic() - start < 8
        assert await scalar(engine, "SELECT 1") == 1

    with_engine(url, work, statement_timeout=0.2)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_the_isolation_level_reaches_postgresql(pg_url: str, level: str) -> None:
    assert ask(pg_url, "SHOW transaction_isolation", isolation_level=level) == [level.lower()]
    asked = ("SHOW transaction_isolation", "SHOW transaction_read_only")
    assert ask(pg_url, *asked, isolation_level=level, read_only=True) == [level.lower(), "on"]


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_the_isolation_level_reaches_mariadb(new_url: Callable[[str], str], level: str) -> None:
    assert ask(new_url("mysql+asyncmy"), "SELECT @@SESSION.tx_isolation", isolation_level=level) == [level.replace(" ", "-")]


# ---- PostgreSQL ----------------------------------------------------------------------------------------------------------


def test_postgresql_sees_the_applications_name(pg_url: str) -> None:
    assert ask(pg_url, "SHOW application_name", application="shop") == ["shop"]
    assert ask(f"{pg_url}?application_name=other", "SHOW application_name") == ["other"]
    assert ask(pg_url, "SHOW application_name", connect_args={"application_name": "given"}) == ["given"]


def test_what_the_url_says_to_one_driver_the_other_is_told_in_its_words(postgres_url: str) -> None:
    in_libpqs_words = f"{postgres_url}?sslmode=disable&connect_timeout=7&application_name=both"
    in_asyncpgs_words = in_libpqs_words.replace("+psycopg", "+asyncpg").replace("sslmode", "ssl").replace("connect_", "")
    for url in (in_libpqs_words, in_libpqs_words.replace("+psycopg", "+asyncpg"), in_asyncpgs_words):
        assert ask(url, "SHOW application_name") == ["both"], url
        engine = build_engine("writer", settings_of(url))
        with engine.connect() as connection:
            assert connection.scalar(text("SHOW application_name")) == "both", url
        engine.dispose()


def test_what_is_asyncpgs_alone_does_not_keep_threads_from_connecting(new_url: Callable[[str], str]) -> None:
    usage: dict[str, Any] = {
        "connect_args": {"statement_cache_size": 0, "server_settings": {"application_name": "named", "work_mem": "4MB"}}
    }
    url = f"{new_url('postgresql+asyncpg')}?prepared_statement_cache_size=0"
    asked = ("SHOW application_name", "SHOW work_mem")
    assert ask(url, *asked, **usage) == ["named", "4MB"]
    engine = build_engine("writer", settings_of(url, **usage))
    with engine.connect() as connection:
        assert [connection.scalar(text(sql)) for sql in asked] == ["named", "4MB"]
    engine.dispose()


def test_a_read_on_a_read_only_postgresql_connection_begins_no_transaction(pg_url: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.rollback()  # a parameter set inside a transaction would go with it
            assert await connection.scalar(text("SHOW default_transaction_read_only")) == "on"
            driver: Any = (await connection.get_raw_connection()).driver_connection
            in_transaction = (
                driver.is_in_transaction() if hasattr(driver, "is_in_transaction") else driver.info.transaction_status
            )
            assert not in_transaction, "a read is one round trip"

    with_engine(pg_url, work, read_only=True)


def test_rows_can_be_streamed_from_a_read_only_connection(url: str) -> None:
    create(url, "CREATE TABLE a (id INTEGER)", "INSERT INTO a VALUES (1), (2), (3)")
    container: Any = Container(settings=settings_of(url))

    async def stream(name: str) -> list[int]:
        async with container.transaction():
            rows = await getattr(container, f"{name}_async_session")().stream_scalars(text("SELECT id FROM a ORDER BY id"))
            return [row async for row in rows]

    async def both() -> list[list[int]]:
        answers = [await stream("writer"), await stream("reader")]
        await container.shutdown_resources()
        return answers

    assert asyncio.run(both()) == [[1, 2, 3], [1, 2, 3]]


# ---- connections that died -----------------------------------------------------------------------------------------------

IDENTITY = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}


@pytest.mark.parametrize("driver", DRIVERS[1:])
def test_an_idle_connection_that_was_killed_is_replaced_without_a_word(
    driver: str, new_url: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    url = new_url(driver)

    async def work(engine: AsyncEngine) -> None:
        pings, ping = [0], engine.dialect.do_ping

        def counted(connection: Any) -> bool:
            pings[0] += 1
            return ping(connection)

        engine.dialect.do_ping = counted  # type: ignore[method-assign, assignment]
        identity = IDENTITY[engine.dialect.name]
        before = await scalar(engine, identity)
        assert await scalar(engine, identity) == before
        assert pings == [0], "one used a moment ago is not pinged"
        kill(request, engine.dialect.name, before)
        await asyncio.sleep(0.4)
        assert await scalar(engine, identity) != before
        assert pings == [1]

    with_engine(url, work, pool=PoolSettings(alive_window=0.3))


def kill(request: pytest.FixtureRequest, kind: str, identity: int) -> None:
    if kind == "mysql":
        request.getfixturevalue("mariadb").execute(f"KILL {identity}")
    else:
        request.getfixturevalue("postgres").execute("SELECT pg_terminate_backend(%s, 5000)", [identity])


# ---- passwords -------------------------------------------------------------------------------------------------------------


class Rotating:
    """A password store whose password changes."""

    password = ""
    threads: ClassVar[list[int]] = []

    @classmethod
    def current(cls) -> str:
        cls.threads.append(threading.get_ident())
        return cls.password


def test_a_password_provider_is_asked_for_each_new_connection_and_not_by_the_event_loop(
    pg_url: str, postgres: PostgresServer
) -> None:
    role = f"async_role_{next(_numbers)}"
    postgres.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'first'")
    url = make_url(pg_url)._replace(username=role, password=None).render_as_string()
    Rotating.password, Rotating.threads = "first", []

    async def work(engine: AsyncEngine) -> None:
        for _ in range(3):
            assert await scalar(engine, "SELECT current_user") == role
        assert len(Rotating.threads) == 1
        Rotating.password = "second"
        await asyncio.to_thread(postgres.execute, f"ALTER ROLE {role} PASSWORD 'second'")
        assert await scalar(engine, "SELECT current_user") == role, "a connection that is open stays open"
        await engine.dispose()
        assert await scalar(engine, "SELECT current_user") == role
        assert len(Rotating.threads) == 2
        assert threading.get_ident() not in Rotating.threads

    try:
        with_engine(url, work, password_provider=f"{__name__}:Rotating.current")
    finally:
        postgres.execute(f"DROP ROLE {role}")


AWKWARD = ["p@ss:w/rd %25#?", "quote'\"`", "back\\slash\\n", " spaces around ", "100%", "a+b&c=d;e", "${HOME}$1{x}"]
AWKWARD += ["%(percent)s %s", "[x]@[::1]", "ünï©ødé ✓"]


@pytest.mark.parametrize("driver", DRIVERS[1:])
@pytest.mark.parametrize("by", ["url", "parts", "provider"])
def test_awkward_passwords_log_in_on_every_driver(
    driver: str, by: str, new_url: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    url = make_url(new_url(driver))
    server: Any = request.getfixturevalue("postgres" if driver.startswith("postgresql") else "mariadb")
    for password in AWKWARD:
        user = f"async_user_{next(_numbers)}"
        dropping = create_user(server, user, password, str(url.database))
        try:
            given: dict[str, Any] = {"url": None, "driver": driver, "user": user, "host": url.host, "port": url.port}
            given["database"] = url.database
            if by == "url":
                given = {"url": f"{driver}://{user}:{quote(password, safe='')}@{url.host}:{url.port}/{url.database}"}
            elif by == "parts":
                given["password"] = password
            else:
                Rotating.password = password
                given["password_provider"] = f"{__name__}:Rotating.current"
            assert str(ask(given.pop("url"), "SELECT current_user", **given)[0]).partition("@")[0] == user, password
        finally:
            server.execute(dropping)


def create_user(server: PostgresServer | MariaDBServer, user: str, password: str, database: str) -> str:
    """Create it, and return the statement that drops it."""
    quoted = password.replace("'", "''")
    if isinstance(server, PostgresServer):
        server.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{quoted}'")
        return f"DROP ROLE {user}"
    quoted = quoted.replace("\\", "\\\\")
    server.execute(f"CREATE USER {user}@'127.0.0.1' IDENTIFIED BY '{quoted}'")
    server.execute(f"GRANT ALL ON `{database}`.* TO {user}@'127.0.0.1'")
    return f"DROP USER {user}@'127.0.0.1'"


def test_a_password_in_a_urls_query_is_not_shown_by_the_engine() -> None:
    engine = build_async_engine("writer", settings_of("postgresql+psycopg://me@127.0.0.1:1/shop?password=hunter2"))
    assert "hunter2" not in f"{engine!r} {engine.url!r} {engine.url}"


# ---- the pool --------------------------------------------------------------------------------------------------------------


class PoolOfOurOwn(QueuePool):
    """Named by an import string, and made for threads."""


class AsyncPoolOfOurOwn(AsyncAdaptedQueuePool):
    """Named by an import string, and made for coroutines."""


@pytest.mark.parametrize(
    ("name", "pool_class"),
    [
        (None, AsyncAdaptedQueuePool),
        ("queue", AsyncAdaptedQueuePool),
        ("null", NullPool),
        ("static", StaticPool),
        ("sqlalchemy.pool:AsyncAdaptedQueuePool", AsyncAdaptedQueuePool),
        (f"{__name__}:AsyncPoolOfOurOwn", AsyncPoolOfOurOwn),
        (f"{__name__}:PoolOfOurOwn", PoolOfOurOwn),
    ],
)
def test_the_class_of_a_pool_can_be_chosen(sqlite_url: str, name: str | None, pool_class: type) -> None:
    async def work(engine: AsyncEngine) -> None:
        assert type(engine.pool).__name__ == pool_class.__name__
        assert isinstance(engine.pool, AsyncAdaptedQueuePool) == issubclass(pool_class, QueuePool)
        await execute(engine, "CREATE TABLE a (id INTEGER)", "INSERT INTO a VALUES (1)")
        assert await scalar(engine, "SELECT count(*) FROM a") == 1

    with_engine(sqlite_url, work, pool=PoolSettings(class_=name))


def test_a_pool_class_made_for_coroutines_serves_threads_as_a_queue(sqlite_url: str) -> None:
    engine = build_engine("writer", settings_of(sqlite_url, pool=PoolSettings(class_="sqlalchemy.pool:AsyncAdaptedQueuePool")))
    assert isinstance(engine.pool, QueuePool)
    assert not isinstance(engine.pool, AsyncAdaptedQueuePool)
    engine.dispose()


def test_the_settings_of_a_pool_reach_it(pg_url: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        pool: Any = engine.pool
        assert (pool.size(), pool._max_overflow, pool.timeout(), pool._recycle) == (1, 1, 0.1, 77)
        async with engine.connect(), engine.connect():
            start = time.monotonic()
            with pytest.raises(PoolTimeout):
                await engine.connect()
            assert 0.05 < time.monotonic() - start < 5

    with_engine(pg_url, work, pool=PoolSettings(size=1, max_overflow=1, timeout=0.1, recycle=77, use_lifo=False))


def test_echo_logs_statements_under_the_connections_name(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(sqlite_url, "SELECT 'quiet'") == ["quiet"]
    assert ask(sqlite_url, "SELECT 'loud'", echo=True) == ["loud"]
    messages = [(record.name, record.getMessage()) for record in caplog.records]
    assert ("sqlalchemy.engine.Engine.writer", "SELECT 'loud'") in messages
    assert not [message for _, message in messages if "quiet" in message]


def test_an_engine_in_autocommit_keeps_each_statement(url: str) -> None:
    async def work(engine: AsyncEngine) -> Any:
        await execute(engine, "CREATE TABLE kept (id INTEGER)")
        async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            await connection.execute(text("INSERT INTO kept VALUES (1)"))
        return await scalar(engine, "SELECT count(*) FROM kept")

    assert with_engine(url, work) == 1


def test_a_driver_that_begins_nothing_is_not_in_autocommit(new_url: Callable[[str], str]) -> None:
    async def work(engine: AsyncEngine) -> Any:
        await execute(engine, "CREATE TABLE kept (id INTEGER)")
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO kept VALUES (1)"))
        return await scalar(engine, "SELECT count(*) FROM kept")

    assert with_engine(new_url("sqlite+aiosqlite"), work, connect_args={"isolation_level": None}) == 0


# ---- loops -----------------------------------------------------------------------------------------------------------------


class Resources:
    """The sockets and threads of this process, counted."""

    def __init__(self) -> None:
        gc.collect()
        self.before = self.now()

    def now(self) -> tuple[int, int]:
        names = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # that of the directory itself has gone
                names.append(str(descriptor.readlink()))
        kept = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
        return sum(name.startswith("socket:") or name.endswith(".db") for name in names), len(kept)

    def settle(self, allowed: int = 0) -> None:
        """Require that nothing is left, waiting a little for threads to end."""
        for _ in range(200):
            if self.now()[0] <= self.before[0] + allowed and self.now()[1] <= self.before[1] + allowed:
                return
            time.sleep(0.02)
        pytest.fail(f"sockets and threads before {self.before}, afterwards {self.now()}")


@pytest.fixture
def resources() -> Resources:
    return Resources()


@pytest.fixture
def container(url: str, resources: Resources) -> Iterator[Any]:
    yield (container := Container(settings=settings_of(url)))
    container.shutdown_resources()
    resources.settle()


LEFT_OPEN = (
    "The connection 'writer' was left open in an event loop that has ended or does not answer. DBAPI connections closed at their "
    "sockets: {}. Write `await container.shutdown_resources()` in that loop, before it ends"
)


def left_open() -> Any:
    """A block in which app_db warns of a connection that was left open in its event loop."""
    return pytest.warns(ResourceWarning, match=r"^The connection 'writer' was left open in an event loop")


async def use(container: Any, number: int = 3) -> AsyncEngine:
    """Have so many connections open and idle in the pool of the running loop."""

    async def one(barrier: asyncio.Barrier) -> None:
        async with container.transaction(read_only=True):
            assert await container.writer_async_session().scalar(text("SELECT 1")) == 1
            await barrier.wait()

    barrier = asyncio.Barrier(number)
    async with asyncio.TaskGroup() as group:
        for _ in range(number):
            group.create_task(one(barrier))
    engine: AsyncEngine = container.writer_async_engine()
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (number, 0)
    return engine


async def test_nothing_is_made_before_it_is_asked_for(container: Any) -> None:
    assert not container.writer_async_engine.is_built
    async with container.transaction():
        session = container.reader_async_session
        assert not container.writer_async_engine.is_built
    engine = container.writer_async_engine()
    assert engine is container.writer_async_engine() is container.writer.async_engine()
    assert engine.pool.checkedin() == 0
    assert not container.writer_engine.is_built
    assert session is container.reader.async_session


def test_one_loop_after_the_other_has_an_engine_of_its_own_and_nothing_accumulates(container: Any, resources: Resources) -> None:
    engines = [asyncio.run(use(container)) for _ in range(4)]
    assert len(set(map(id, engines))) == 4
    resources.settle(allowed=3)  # the last loop's three connections, which nothing has shut down
    with left_open():
        container.shutdown_resources()


def test_loops_in_threads_at_once_have_engines_of_their_own(container: Any) -> None:
    barrier = threading.Barrier(4)
    engines: list[AsyncEngine] = []

    async def work() -> None:
        barrier.wait(10)
        engines.append(await use(container))
        for _ in range(5):
            assert await use(container) is container.writer_async_engine()
        barrier.wait(30)  # shutting down is for all loops
        await container.shutdown_resources()

    threads = [threading.Thread(target=lambda: asyncio.run(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(map(id, engines))) == 4


def test_an_engine_asked_for_outside_a_loop_is_the_first_loops(container: Any) -> None:
    outside = container.writer_async_engine()
    assert container.writer_async_engine() is outside

    async def ask_inside() -> Any:
        return container.writer_async_engine()

    assert asyncio.run(ask_inside()) is outside
    assert asyncio.run(ask_inside()) is not outside


# ---- the end of it ---------------------------------------------------------------------------------------------------------


def test_shutting_down_inside_the_loop_has_closed_everything_when_it_returns(container: Any, resources: Resources) -> None:
    async def work() -> None:
        await use(container)
        await container.shutdown_resources()
        resources.settle(allowed=2)  # the loop's own
        assert not container.writer_async_engine.is_built
        await use(container, 1)
        await container.shutdown_resources()

    asyncio.run(work())
    resources.settle()


async def test_shutting_down_may_be_awaited_where_there_is_nothing_to_wait_for(container: Any) -> None:
    await container.shutdown_resources()
    container.writer_engine()
    await container.shutdown_resources()
    assert not container.writer_engine.is_built


def test_an_engine_is_disposed_in_a_loop_that_stands_still(container: Any, resources: Resources) -> None:
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(use(container))
        container.shutdown_resources()
        resources.settle(allowed=2)  # the loop's own
    finally:
        loop.close()


def test_so_it_is_where_the_loops_own_thread_has_ended(container: Any, resources: Resources) -> None:
    loop = asyncio.new_event_loop()
    try:
        thread = threading.Thread(target=lambda: loop.run_until_complete(use(container)))
        thread.start()
        thread.join(30)
        container.shutdown_resources()
        resources.settle(allowed=2)  # the loop's own
    finally:
        loop.close()


@pytest.mark.representative("postgresql+asyncpg")
def test_a_loop_that_stands_still_in_another_thread_is_not_run_here(container: Any, resources: Resources) -> None:
    ready, shut_down = threading.Event(), threading.Event()
    went_on: list[Any] = []

    def own() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(use(container))
        ready.set()
        shut_down.wait(30)
        went_on.append(loop.run_until_complete(asyncio.sleep(0.1, "went on")))  # the sockets close here
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=own)
    thread.start()
    assert ready.wait(30)
    start = time.monotonic()
    with left_open():
        container.shutdown_resources()
    assert time.monotonic() - start < 4
    shut_down.set()
    thread.join(30)
    assert went_on == ["went on"]
    resources.settle()


@pytest.mark.representative("postgresql+asyncpg")
def test_a_loop_that_is_closed_before_it_could_close_a_socket_leaves_none_open(container: Any, resources: Resources) -> None:
    ready, shut_down = threading.Event(), threading.Event()

    def own() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(use(container))
        ready.set()
        shut_down.wait(30)
        loop.close()  # what another thread has asked of it since then is forgotten

    thread = threading.Thread(target=own)
    thread.start()
    assert ready.wait(30)
    with left_open():
        container.shutdown_resources()
    shut_down.set()
    thread.join(30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    assert list(map(str, caught)) == []
    resources.settle()


def test_a_loop_that_stands_still_is_not_waited_for_in_another_one_of_its_thread(container: Any, resources: Resources) -> None:
    other = asyncio.new_event_loop()
    try:
        other.run_until_complete(use(container))

        async def shut_down() -> float:
            await use(container)
            start = time.monotonic()
            await container.shutdown_resources()
            return time.monotonic() - start

        with left_open():
            assert asyncio.run(shut_down()) < 4
        other.run_until_complete(asyncio.sleep(0.1))  # where the sockets that were shut down are closed
        resources.settle(allowed=2)  # the loop's own
    finally:
        other.close()


def test_a_blocked_loop_is_waited_for_a_while_and_its_server_hears_that_nobody_is_there(
    pg_url: str, postgres: PostgresServer, resources: Resources, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("app_db._databases.disposal._LONGEST_WAIT", 0.3)
    container: Any = Container(settings=settings_of(pg_url, application="blocked"))
    ready, shut_down = threading.Event(), threading.Event()

    async def work() -> None:
        await use(container)
        ready.set()
        shut_down.wait(30)  # blocks the loop
        await asyncio.sleep(0.1)
        await use(container)
        await container.shutdown_resources()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert ready.wait(30)
    start = time.monotonic()
    with left_open():
        container.shutdown_resources()
    assert 0.2 < time.monotonic() - start < 4
    alive = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'blocked'"
    for pause in a_while(lambda: postgres.execute(alive)[0][0] == 0):
        time.sleep(pause)
    assert postgres.execute(alive)[0][0] == 0
    shut_down.set()
    thread.join(30)
    resources.settle()
    assert caplog.records == []


def test_an_engine_is_disposed_from_another_thread_in_its_own_loop(container: Any, resources: Resources) -> None:
    async def work() -> None:
        pool: Any = (await use(container)).pool
        await asyncio.to_thread(container.shutdown_resources)
        assert pool.checkedin() == 0
        assert not container.writer_async_engine.is_built

    asyncio.run(work())
    resources.settle()


def test_an_engine_whose_loop_was_closed_is_closed_at_the_socket_and_named_once(
    container: Any, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(use(container))
        container.shutdown_resources()
        resources.settle()
        gc.collect()
    assert [(warning.category, str(warning.message)) for warning in caught] == [(ResourceWarning, LEFT_OPEN.format(3))]
    assert caplog.records == []


def test_an_engine_without_a_loop_is_closed_at_the_socket(url: str, resources: Resources) -> None:
    container: Any = Container(settings=settings_of(url))
    engine = container.writer_async_engine()  # outside a loop, and nothing inside one asks the container
    assert asyncio.run(scalar(engine, "SELECT 1")) == 1
    with left_open():
        container.shutdown_resources()
    resources.settle()


def test_an_engine_that_is_dropped_after_its_loop_was_closed_is_closed_and_named(url: str, resources: Resources) -> None:
    container: Any = Container(settings=settings_of(url))
    asyncio.run(use(container))
    with left_open():
        del container
        gc.collect()
    resources.settle()


ENDING = """
import asyncio
from sqlalchemy import text
from app_db import DatabaseSettings, container_of

settings = DatabaseSettings(connections={{name: {{"url": f"sqlite:///{folder}/{{name}}.db"}} for name in ("writer", "log")}})
container = container_of("writer", "log")(settings=settings)

async def work():
    for name in ("writer", "log"):
        async with container.transaction(read_only=True):
            await getattr(container, name + "_async_session")().execute(text("SELECT 1"))
    {inside}

asyncio.run(work())
{outside}
print("end", not container.writer_async_engine.is_built, flush=True)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("action", ["always", "error"])
@pytest.mark.parametrize("outside", ["container.shutdown_resources()", ""], ids=["shut down too late", "never shut down"])
def test_a_program_is_told_each_connection_it_left_open_and_goes_on(tmp_path: Path, outside: str, action: str) -> None:
    source = ENDING.format(folder=tmp_path, inside="", outside=outside)
    done = run_program(source, "-W", f"{action}::ResourceWarning")
    assert (done.returncode, done.stdout) == (0, f"end {bool(outside)}\n"), done.stderr
    for name in ("writer", "log"):
        assert done.stderr.count(f"ResourceWarning: The connection '{name}' was left open") == 1, done.stderr
    assert "was deleted before being closed" not in done.stderr, "the driver complains of what was not closed"


def test_a_program_that_shuts_down_in_its_loop_is_told_nothing(tmp_path: Path) -> None:
    source = ENDING.format(folder=tmp_path, inside="await container.shutdown_resources()", outside="")
    done = run_program(source, "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end True\n", "")


def test_a_server_hears_that_nobody_is_there_any_more(pg_url: str, postgres: PostgresServer) -> None:
    container: Any = Container(settings=settings_of(pg_url, application="hanging_up"))

    def alive() -> int:
        return int(postgres.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'hanging_up'")[0][0])

    asyncio.run(use(container))
    assert alive() == 3
    with left_open():
        container.shutdown_resources()
    give_up = time.monotonic() + 10
    while alive() and time.monotonic() < give_up:
        time.sleep(0.02)
    assert alive() == 0


def test_a_reset_inside_the_loop_lets_units_under_way_finish(container: Any, resources: Resources) -> None:
    async def work() -> None:
        old = await use(container)
        async with container.transaction():
            session = container.writer_async_session()
            assert await session.scalar(text("SELECT 1")) == 1
            container.reset_singletons()
            assert await session.scalar(text("SELECT 2")) == 2
            assert container.writer_async_engine() is not old
            if "sqlite" not in str(old.url):  # which has one writer at a time
                async with container.transaction(propagation="requires_new"):
                    assert await container.writer_async_session().scalar(text("SELECT 3")) == 3
        for _ in range(200):
            pool: Any = old.pool
            if pool.checkedin() == pool.checkedout() == 0:
                break
            await asyncio.sleep(0.02)
        assert (pool.checkedin(), pool.checkedout()) == (0, 0)
        await container.shutdown_resources()

    asyncio.run(work())
    resources.settle()


@pytest.mark.representative("postgresql+asyncpg")
def test_a_reset_as_the_last_thing_in_a_loop_still_closes_the_connections(container: Any, resources: Resources) -> None:
    async def work() -> None:
        await use(container)
        container.writer_async_engine.reset()  # asyncio.run() cancels what this has begun

    asyncio.run(work())
    resources.settle()


class SlowlyClosed(sqlite3.Connection):
    """A connection that takes its time to close, in its thread."""

    closing: ClassVar = threading.Event()
    closed: ClassVar = threading.Event()

    def close(self) -> None:
        self.closing.set()
        time.sleep(0.2)
        super().close()
        self.closed.set()


@pytest.fixture
def slow_url(new_sqlite_url: Callable[[], str], caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """A database of slowly closed connections: the test has to close them, without a word in the log or from a thread."""
    SlowlyClosed.closing.clear()
    SlowlyClosed.closed.clear()
    yield new_sqlite_url()
    assert SlowlyClosed.closed.is_set()
    gc.collect()
    assert caplog.get_records("call") == []  # pytest itself fails a test in whose threads something was raised


def a_while(condition: Callable[[], bool]) -> Iterator[float]:
    """Small pauses until a condition holds, for at most 10 s."""
    give_up = time.monotonic() + 10
    while not condition() and time.monotonic() < give_up:
        yield 0.002


def retire(engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
    wait_outside(begin_to_retire(engine, loop))


async def connected_slowly(url: str) -> tuple[AsyncEngine, threading.Thread]:
    """An engine with a connection that is closed slowly, and the thread of another loop, say, that will retire it."""
    engine = build_async_engine("writer", settings_of(url, connect_args={"factory": SlowlyClosed}))
    assert await scalar(engine, "SELECT 1") == 1
    return engine, threading.Thread(target=retire, args=(engine, asyncio.get_running_loop()))


def test_a_loop_that_ends_lets_a_connection_close_that_another_thread_has_retired(slow_url: str) -> None:
    async def work() -> threading.Thread:
        _, thread = await connected_slowly(slow_url)
        thread.start()
        for pause in a_while(SlowlyClosed.closing.is_set):
            await asyncio.sleep(pause)
        return thread

    thread = asyncio.run(work())  # cancels all tasks in the middle of the closing
    assert SlowlyClosed.closed.is_set()
    thread.join(10)


def test_so_does_a_loop_that_has_already_cancelled_its_tasks(slow_url: str) -> None:
    kept: list[Any] = []

    async def lasting() -> AsyncIterator[threading.Thread]:
        _, thread = await connected_slowly(slow_url)
        try:
            yield thread
        finally:  # asyncio.run() closes generators after tasks
            thread.start()
            for pause in a_while(SlowlyClosed.closing.is_set):
                await asyncio.sleep(pause)

    async def work() -> threading.Thread:
        kept.append(generator := lasting())
        return await anext(generator)

    thread = asyncio.run(work())
    assert SlowlyClosed.closed.is_set()
    thread.join(10)


def test_a_loop_without_an_executor_any_more_closes_at_the_socket_at_once(slow_url: str) -> None:
    async def work() -> threading.Thread:
        _, thread = await connected_slowly(slow_url)
        await asyncio.get_running_loop().shutdown_default_executor()  # the last thing that asyncio.run() does
        thread.start()
        for pause in a_while(SlowlyClosed.closed.is_set):
            await asyncio.sleep(pause)
        return thread

    loop = asyncio.new_event_loop()
    with left_open():
        thread = loop.run_until_complete(work())
        loop.close()
        thread.join(10)


@pytest.mark.representative("sqlite+aiosqlite")
@pytest.mark.filterwarnings("ignore:The connection 'writer' was left open:ResourceWarning")
def test_at_whatever_moment_of_its_loops_end_an_engine_is_closed(
    url: str, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    """The right thing or a ResourceWarning, but never an exception, a line in the log, or a wait."""
    failures: list[BaseException] = []

    def shut_down(container: Any, delay: float) -> None:
        time.sleep(delay)
        try:
            container.shutdown_resources()
        except BaseException as error:  # reported below
            failures.append(error)

    async def work(container: Any, delay: float) -> threading.Thread:
        await use(container, 1)
        thread = threading.Thread(target=shut_down, args=(container, delay))
        thread.start()
        return thread

    for step in range(60):
        container: Any = Container(settings=settings_of(url))
        start = time.monotonic()
        thread = asyncio.run(work(container, step * 0.000_05))
        thread.join(10)
        assert time.monotonic() - start < 4
    resources.settle()
    assert failures == []
    assert caplog.records == []


@pytest.mark.parametrize("how", ["awaited", "begun inside", "run outside"])
def test_a_server_that_does_not_say_good_bye_is_waited_for_a_moment_only(
    how: str, postgres: PostgresServer, new_url: Callable[[str], str], resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app_db._databases.disposal._LONGEST_DISPOSAL", 0.5)
    with Proxy(postgres) as proxy:
        container: Any = Container(settings=settings_of(proxy.url(new_url("postgresql+asyncpg"))))
        start = time.monotonic()

        async def work() -> None:
            nonlocal start
            await use(container, 2)
            proxy.lose("request", to=rb"^X\x00\x00\x00\x04", then="stall")
            start = time.monotonic()
            if how == "awaited":
                await container.shutdown_resources()
            elif how == "begun inside":
                container.reset_singletons()  # for which the end of the loop waits

        with left_open(), asyncio.Runner() as runner:
            runner.run(work())
            if how == "run outside":
                container.shutdown_resources()
        assert 0.4 < time.monotonic() - start < 4
        resources.settle()


def test_two_loops_that_reset_at_once_do_not_wait_for_each_other(container: Any, resources: Resources) -> None:
    both, done = threading.Barrier(2), threading.Barrier(2)

    async def work() -> None:
        for _ in range(5):
            await use(container, 1)
            both.wait(10)
            container.reset_singletons()
            done.wait(10)
        await asyncio.sleep(0.2)

    threads = [threading.Thread(target=lambda: asyncio.run(work())) for _ in range(2)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert time.monotonic() - start < 9
    container.shutdown_resources()
    resources.settle()


async def test_an_overridden_engine_is_used_by_the_next_unit(url: str, new_url: Callable[[str], str]) -> None:
    container: Any = Container(settings=settings_of(url))
    other = new_url(url.partition(":")[0])

    async def where() -> str:
        async with container.transaction():
            session = container.writer_async_session()
            await session.execute(text("SELECT 1"))
            return str(session.get_bind().url.database)

    assert await where() == make_url(url).database
    own = create_async_engine(other)
    with container.writer_async_engine.override(own):
        assert await where() == make_url(other).database
    assert await where() == make_url(url).database
    await own.dispose()
    await container.shutdown_resources()


@pytest.mark.exhaustive
def test_a_child_of_a_fork_leaves_its_parents_connections_and_loops_alone(url: str) -> None:
    done = run_program(FORKING.format(url=url), "-X", "dev")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child 1 True", "parent 1 True"], done.stderr
    assert "Traceback" not in done.stderr


FORKING = """
import asyncio, os, sys, warnings
from sqlalchemy import text
from app_db import Container, DatabaseSettings

warnings.simplefilter("error")
container = Container(settings=DatabaseSettings(connections={{"writer": {{"url": {url!r}}}}}))

async def ask():
    async with container.transaction():
        return await container.writer_async_session().scalar(text("SELECT 1"))

async def child():
    answer = await ask()
    await container.shutdown_resources()
    return answer

async def parent():
    assert await ask() == 1
    mine = container.writer_async_engine()
    pid = os.fork()
    if pid == 0:
        assert not container.writer_async_engine.is_built, "those of a loop that does not run here"
        print("child", asyncio.run(child()), container.writer_async_engine() is not mine, flush=True)
        container.shutdown_resources()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    answer = await ask()
    print("parent", answer, container.writer_async_engine() is mine, flush=True)
    await container.shutdown_resources()

asyncio.run(parent())
"""


# ---- settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "driver", ["postgresql+psycopg", "postgresql+asyncpg", "mysql+asyncmy", "mysql+pymysql", "mariadb+asyncmy"]
)
def test_two_phase_may_be_set_whichever_of_its_drivers_the_url_names(driver: str) -> None:
    assert settings_of(f"{driver}://h/d", two_phase=True).connection("writer").two_phase


def test_a_provider_called_on_a_class_is_refused() -> None:
    for kind in ("async_engine", "async_sessionmaker"):
        with pytest.raises(InvalidUse, match="on a container class"):
            getattr(Container, f"writer_{kind}")()
