"""An engine of the application's own is configuration enough: `Connection(engine=…)`, and an override of `writer_engine`."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing, nullcontext
from copy import deepcopy
from math import inf
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import providers
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, StaticPool

from app_db import Connection, Container, DatabaseContainer
from app_db.errors import (
    ConnectionNotConfigured,
    InvalidUse,
    NothingConfigured,
    ReadOnlyViolation,
    SettingsError,
    UnknownConnection,
)
from app_db.testing import isolated
from harness.servers import PostgresServer

SECRET = "s3cr3t-pa55"


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def engine(sqlite_url: str) -> Engine:
    return create_engine(sqlite_url)


def container_with(**connections: Any) -> Any:
    declared = {name: Connection(engine=engine) if engine is not None else Connection() for name, engine in connections.items()}
    make: Any = type(DatabaseContainer)
    return make("Shop", (DatabaseContainer,), declared)()


def use(container: Any, name: str = "writer") -> None:
    with container.transaction():
        getattr(container, f"{name}_session")().execute(text("CREATE TABLE t (n INTEGER)"))
        getattr(container, f"{name}_session")().execute(text("INSERT INTO t VALUES (42)"))
    with container.transaction(read_only=True):
        assert getattr(container, f"{name}_session")().scalar(text("SELECT n FROM t")) == 42


def test_an_engine_that_overrides_works_without_settings(engine: Engine) -> None:
    container: Any = Container()
    container.writer_engine.override(engine)
    use(container)
    assert container.writer_engine() is engine
    assert container.reader_session is not None
    with container.transaction():
        assert container.session().scalar(text("SELECT n FROM t")) == 42


def test_an_engine_in_the_declaration_works_without_settings(engine: Engine) -> None:
    container = container_with(writer=engine)
    use(container)
    assert container.writer_engine() is engine
    assert container.settings().connection("writer").sqlalchemy_url().database == engine.url.database


def test_an_engine_in_memory_works(tmp_path: Path) -> None:
    use(container_with(writer=create_engine("sqlite://", poolclass=StaticPool)))


def test_an_async_engine_works_without_settings(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url.replace("sqlite:", "sqlite+aiosqlite:"))
    container = container_with(writer=engine)

    async def work() -> None:
        async with container.transaction():
            await container.writer_async_session().execute(text("CREATE TABLE t (n INTEGER)"))
            await container.writer_async_session().execute(text("INSERT INTO t VALUES (42)"))
        assert container.writer_async_engine() is engine
        await container.shutdown_resources()
        await engine.dispose()

    asyncio.run(work())


def test_two_engines_commit_together(new_postgres_url: Callable[[], str]) -> None:
    """Two-phase commit is a setting, so that two engines alone can't commit together, and are refused."""
    engines = {name: create_engine(new_postgres_url()) for name in ("writer", "warehouse")}
    container = container_with(**engines)
    with pytest.raises(Exception, match="'warehouse', 'writer', which can't commit together"), container.transaction():
        container.writer_session().execute(text("CREATE TABLE t (n INTEGER)"))
        container.warehouse_session().execute(text("CREATE TABLE t (n INTEGER)"))
    for engine in engines.values():
        engine.dispose()


def test_the_other_connections_come_from_the_environment(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__LOG__URL", f"sqlite:///{tmp_path}/log.db")
    container = container_with(writer=engine, log=None)
    use(container)
    use(container, "log")
    assert str(container.log_engine().url).endswith("log.db")


def test_copies_have_the_engine_itself(engine: Engine) -> None:
    container = container_with(writer=engine)
    assert deepcopy(container).writer_engine() is engine
    nested: Any = providers.deepcopy(container)
    assert nested.writer_engine() is engine


def test_an_override_counts_before_the_declaration(engine: Engine, tmp_path: Path) -> None:
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    container = container_with(writer=engine)
    with container.writer_engine.override(other):
        assert container.writer_engine() is other
    assert container.writer_engine() is engine


def test_an_isolated_test_rolls_back(engine: Engine) -> None:
    container = container_with(writer=engine)
    use(container)
    with isolated(container), container.transaction():
        container.writer_session().execute(text("DELETE FROM t"))
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM t")) == 1


# ---- what is wrong -------------------------------------------------------------------------------------------------------


def test_an_engine_for_another_database_than_the_settings_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "APP_DB_CONNECTIONS__WRITER__URL"
    monkeypatch.setenv(variable, f"postgresql://shop:{SECRET}@db/shop")
    container = container_with(writer=create_engine(f"postgresql+psycopg://shop:{SECRET}@db/other"))
    with pytest.raises(SettingsError) as caught:
        container.settings()
    assert caught.value.message == (
        "The database settings have a problem:\n"
        f"  {variable}: names postgresql+psycopg://shop:***@db/shop, but Connection(engine=…) of 'writer' was given an engine "
        "for postgresql+psycopg://shop:***@db/other. Remove one of them. In a test, override the engine"
    )


def test_an_override_in_a_test_may_lead_elsewhere(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", f"postgresql://shop:{SECRET}@db/shop")
    container: Any = Container()
    with container.writer_engine.override(engine):
        use(container)


def test_without_any_engine_the_error_is_as_before() -> None:
    with pytest.raises(NothingConfigured):
        container_with(writer=None).settings()


def test_a_connection_without_engine_and_settings_is_named(engine: Engine) -> None:
    container = container_with(writer=engine, log=None)
    with pytest.raises(ConnectionNotConfigured, match="APP_DB_CONNECTIONS__LOG__URL"):
        container.log_engine()


def test_what_is_no_engine_is_refused_at_once() -> None:
    with pytest.raises(InvalidUse, match=r"Connection\(engine=…\) is given a str, and no engine.*create_engine"):
        Connection(engine="sqlite://")  # type: ignore[arg-type]  # it is none


# ---- what an engine of one's own does not do by itself --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "override", "async"])
def test_ddl_on_an_own_sqlite_engine_is_rolled_back_and_committed(how: str, tmp_path: Path) -> None:
    """sqlite3 itself commits DDL at once, unless a transaction has begun."""
    url = f"sqlite:///{tmp_path}/own.db"
    engine: Any = create_async_engine(url.replace("sqlite", "sqlite+aiosqlite", 1)) if how == "async" else create_engine(url)
    container = container_with(writer=None if how == "override" else engine)
    if how == "override":
        container.writer_engine.override(engine)

    async def create(table: str) -> None:
        async with container.transaction():
            await container.writer_async_session().execute(text(f"CREATE TABLE {table} (n integer)"))
            if table == "lost":
                raise KeyError

    for table in ("lost", "kept"):
        with pytest.raises(KeyError) if table == "lost" else nullcontext():
            if how == "async":
                asyncio.run(create(table))
            else:
                with container.transaction():
                    container.writer_session().execute(text(f"CREATE TABLE {table} (n integer)"))
                    if table == "lost":
                        raise KeyError
    with closing(sqlite3.connect(tmp_path / "own.db")) as plain:
        assert [name for (name,) in plain.execute("SELECT name FROM sqlite_master")] == ["kept"]
    if how == "async":
        asyncio.run(engine.dispose())
    else:
        engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg", "pymysql"])
def test_an_own_engine_in_autocommit_is_refused_before_it_writes(driver: str, request: pytest.FixtureRequest) -> None:
    new = request.getfixturevalue("new_mariadb_url" if driver == "pymysql" else "new_postgres_url")
    url = make_url(new())
    plain = create_engine(url)
    with plain.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE written (n integer)")
    given = url.set(drivername="postgresql+asyncpg") if driver == "asyncpg" else url
    engine: Any = (create_async_engine if driver == "asyncpg" else create_engine)(given, isolation_level="AUTOCOMMIT")
    container = container_with(writer=engine)

    async def write() -> None:
        try:
            async with container.transaction():
                await container.writer_async_session().execute(text("INSERT INTO written VALUES (1)"))
        finally:
            await engine.dispose()

    with pytest.raises(InvalidUse, match="engine of 'writer' is in autocommit"):
        if driver == "asyncpg":
            asyncio.run(write())
        else:
            with container.transaction():
                container.writer_session().execute(text("INSERT INTO written VALUES (1)"))
    if driver != "asyncpg":
        engine.dispose()
    with plain.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM written").scalar() == 0
    plain.dispose()


def test_a_setting_of_how_an_own_engine_is_used_needs_no_url(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__READ_ONLY", "true")
    container = container_with(writer=engine)
    with pytest.raises(ReadOnlyViolation), container.transaction():
        container.writer_session().execute(text("CREATE TABLE refused (n integer)"))


def test_the_capacity_of_an_own_engine_is_that_of_its_pool(postgres: PostgresServer) -> None:
    url = postgres.url("postgres")
    for arguments, most in (
        ({"pool_size": 2, "max_overflow": 1}, 3),
        ({"poolclass": NullPool}, inf),
        ({"poolclass": StaticPool}, 1),
    ):
        engine = create_engine(url, **arguments)
        container = container_with(writer=engine)
        assert container.capacity(coroutines=False).connections["writer"] == most
        assert container.capacity(threads=False).connections["writer"] == 15, "the pool of coroutines is app_db's"
    with pytest.raises(InvalidUse, match="-1 is no number of processes"):
        container.capacity().for_workers(-1)


def test_no_error_shows_the_secret_of_what_is_no_engine() -> None:
    with pytest.raises(InvalidUse) as refused:
        Connection(engine=f"postgresql://shop:{SECRET}@db/shop")  # type: ignore[arg-type]
    assert SECRET not in str(refused.value)


def test_a_provider_of_a_connection_is_used_in_the_body_of_its_class(engine: Engine) -> None:
    class Repository:
        def __init__(self, session: Session) -> None:
            self.session = session

    class Shop(DatabaseContainer):
        writer = Connection(engine=engine)
        repository = providers.Factory(Repository, session=writer.session)

    container = Shop()
    with container.transaction():
        assert container.repository().session is container.writer_session()


def test_a_misspelt_provider_of_a_connection_is_told_what_there_is(engine: Engine) -> None:
    container: Any = container_with(writer=engine)
    with pytest.raises(UnknownConnection, match=r"connection 'writer' has no 'sesion'\. Did you mean 'session'") as refused:
        container.writer.sesion()
    assert "given_engine" not in str(refused.value)
