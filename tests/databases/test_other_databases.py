"""A database that app_db has never heard of works by SQLAlchemy's means alone; and SQLite's and PostgreSQL's rarer means."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, OperationalError

from app_db import DatabaseSettings, container_of
from app_db._databases.database import Database
from app_db._databases.registry import database_of
from app_db._databases.sqlite import _use_wal
from app_db.errors import ReadOnlyViolation, SettingsError, UnitOfWorkTimeout
from app_db.settings._urls import for_coroutines
from harness.applications import Application, running


class Otherlite(SQLiteDialect_pysqlite):
    """SQLite under a name that app_db does not know, so that it gets nothing of what app_db does for SQLite."""

    name = "otherlite"
    supports_statement_cache = True


@pytest.fixture
def other(sqlite_url: str) -> Iterator[Application]:
    registry.register("otherlite", __name__, "Otherlite")
    url = make_url(sqlite_url).set(drivername="otherlite").render_as_string()
    with running(writer=url, reader={"mirror": "writer", "read_only": True}) as app:
        yield app


def test_an_unknown_database_commits_and_rolls_back(other: Application) -> None:
    assert type(database_of(other.engine().dialect.name)) is Database
    with other.unit():
        other.add("a")
    with pytest.raises(LookupError), other.unit():
        other.add("b")
        raise LookupError
    assert other.names() == ["a"]


def test_an_unknown_database_is_read_only_as_far_as_app_db_can_see(other: Application) -> None:
    with pytest.raises(ReadOnlyViolation), other.unit():
        other.session("reader").execute(text("INSERT INTO items (name) VALUES ('a')"))
    with pytest.raises(ReadOnlyViolation), other.unit(read_only=True):
        other.session().execute(text("INSERT INTO items (name) VALUES ('a')"))
    assert other.names() == []


def test_an_unknown_database_takes_isolation_and_timeout(other: Application) -> None:
    with pytest.raises(UnitOfWorkTimeout), other.unit(isolation="SERIALIZABLE", timeout=0.05):
        other.add("a")
        time.sleep(0.1)
        other.session().execute(text("SELECT 1"))
    assert other.names() == []


def test_a_swallowed_error_of_an_unknown_database_is_its_own_business(other: Application) -> None:
    with other.unit():
        other.add("a")
        with pytest.raises(OperationalError):
            other.session().execute(text("SELECT * FROM nowhere"))
    with pytest.raises(IntegrityError), other.unit(read_only=False):
        other.session().execute(text("INSERT INTO items (name) VALUES ('a')"))
    assert other.names() == ["a"]


def test_a_read_only_error_by_the_unknown_database_itself_goes_on_as_it_is(
    other: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other.unit(), pytest.raises(OperationalError, match="nowhere"):
        other.session("reader").execute(text("SELECT * FROM nowhere"))


def test_statements_without_parameters_are_seen_as_well(sqlite_url: str) -> None:
    with running(writer=sqlite_url, reader={"mirror": "writer", "read_only": True}) as app:
        with pytest.raises(ReadOnlyViolation), app.unit():
            connection = app.session("reader").connection(execution_options={"no_parameters": True})
            connection.exec_driver_sql("INSERT INTO items (name) VALUES ('100%')")
        assert app.names() == []


def test_connections_that_race_for_wal_all_get_it(tmp_path: Path) -> None:
    """Two connections that change the journal mode at once can lock each other out, and SQLite then fails without waiting."""
    racers = 8
    together = threading.Barrier(racers)

    def switch(path: Path) -> None:
        connection: Any = sqlite3.connect(path, timeout=5)
        with closing(connection):
            together.wait()
            _use_wal(connection)

    with ThreadPoolExecutor(racers) as threads:
        for number in range(200):
            path = tmp_path / f"{number}.db"
            with closing(sqlite3.connect(path)) as connection:
                connection.execute("CREATE TABLE items (name TEXT)")
            list(threads.map(switch, [path] * racers))
            with closing(sqlite3.connect(path)) as connection:
                assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_timed_unit_reads_through_a_read_only_connection_in_a_transaction(postgres_url: str) -> None:
    """A limit for one transaction needs a transaction, where a read-only connection otherwise runs in autocommit."""
    with running(writer=postgres_url, reader={"mirror": "writer", "read_only": True}) as app:
        began = time.monotonic()
        with pytest.raises(UnitOfWorkTimeout), app.unit(timeout=0.3):
            app.session("reader").execute(text("SELECT pg_sleep(5)"))
        assert time.monotonic() - began < 3
        with app.unit():
            assert app.session("reader").execute(text("SHOW statement_timeout")).scalar() == "0"


# ---- PyMySQL's arguments, on asyncmy ---------------------------------------------------------------------------------------


TLS = {"ssl_ca": "/ca.pem", "ssl_cert": "/cert.pem", "ssl_key": "/key.pem"}
FILES = {"ca": "/ca.pem", "cert": "/cert.pem", "key": "/key.pem"}


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({**TLS, "ssl_verify_cert": True}, {"ssl": {**FILES, "verify_mode": True, "check_hostname": False}}),
        (
            {"ssl_ca": "/ca.pem", "ssl_verify_identity": "true"},
            {"ssl": {"ca": "/ca.pem", "verify_mode": False, "check_hostname": True}},
        ),
        ({**TLS, "ssl_disabled": "true"}, {}),
        ({"write_timeout": 3, "read_timeout": 4}, {"read_timeout": 4}),
        ({"ssl_verify_cert": False}, {}),
        ({"collation": "utf8mb4_bin", "defer_connect": False}, {}),
    ],
)
@pytest.mark.parametrize("by_url", [False, True], ids=["connect_args", "URL"])
def test_asyncmy_gets_the_arguments_of_pymysql_in_its_own_words(
    given: dict[str, Any], passed: dict[str, Any], by_url: bool
) -> None:
    query = "&".join(f"{key}={value}" for key, value in given.items()) if by_url else ""
    settings = DatabaseSettings(
        _env_file=None,
        connections={"writer": {"url": f"mysql+pymysql://a:b@h/d?{query}", "connect_args": {} if by_url else given}},
    )
    connection = settings.connection("writer")
    url = for_coroutines(connection.sqlalchemy_url())
    database = database_of("mysql")
    arguments = database.connect_args(url, "shop", connection)
    arguments.pop("password")
    assert {key: value for key, value in arguments.items() if key != "read_timeout" or not by_url} == {
        key: value for key, value in passed.items() if key != "read_timeout" or not by_url
    }
    assert not set(TLS).intersection(database.url(url, connection).query)


def test_asyncmy_connects_with_the_arguments_of_pymysql(new_mariadb_url: Callable[[], str]) -> None:
    given = {"url": new_mariadb_url(), "connect_args": {"ssl_disabled": True, "write_timeout": 5}}
    container = container_of("writer")(settings=DatabaseSettings(_env_file=None, connections={"writer": given}))

    async def main() -> int:
        async with container.transaction():
            answer = await container.writer_async_session().scalar(text("SELECT 42"))
        await container.shutdown_resources()
        return int(answer)

    assert asyncio.run(main()) == 42
    with container.transaction():
        assert container.writer_session().scalar(text("SELECT 42")) == 42
    container.shutdown_resources()


def test_the_collation_of_a_url_is_used_by_both_drivers(new_mariadb_url: Callable[[], str]) -> None:
    given = {"url": f"{new_mariadb_url()}?charset=utf8mb4&collation=utf8mb4_estonian_ci"}
    container = container_of("writer")(settings=DatabaseSettings(_env_file=None, connections={"writer": given}))
    ask = text("SELECT @@collation_connection")

    async def main() -> str:
        async with container.transaction():
            answer = await container.writer_async_session().scalar(ask)
        await container.shutdown_resources()
        return str(answer)

    assert asyncio.run(main()) == "utf8mb4_estonian_ci"
    with container.transaction():
        assert container.writer_session().scalar(ask) == "utf8mb4_estonian_ci"
    container.shutdown_resources()


def test_an_address_that_asyncmy_cannot_bind_to_is_refused(new_mariadb_url: Callable[[], str]) -> None:
    given = {"url": new_mariadb_url(), "connect_args": {"bind_address": "127.0.0.1"}}
    container = container_of("writer")(settings=DatabaseSettings(_env_file=None, connections={"writer": given}))
    with container.transaction():
        assert container.writer_session().scalar(text("SELECT 42")) == 42
    with pytest.raises(SettingsError, match=r"WRITER__CONNECT_ARGS: has bind_address, which asyncmy does not know"):
        container.writer_async_engine()
    container.shutdown_resources()
