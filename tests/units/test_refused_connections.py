"""An error of a connection that can't be made says which connection was wanted, where it is, and which variable says so."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import certifi
import pytest
from dependency_injector.wiring import Provide
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import app_db
from app_db import DatabaseContainer, DatabaseSettings, container_of, transactional
from harness.servers import PASSWORD, USER, MariaDBServer, PostgresServer

DRIVERS = ["postgresql+psycopg", "postgresql+asyncpg", "mysql+pymysql", "mysql+asyncmy"]
FOR_COROUTINES = ("asyncpg", "asyncmy", "aiosqlite")
PACKAGE = str(Path(app_db.__file__).parent)
PARTS = {"username": "user", "password": "password", "host": "host", "port": "port", "database": "database"}


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(driver: str, request: pytest.FixtureRequest) -> PostgresServer | MariaDBServer:
    found: PostgresServer | MariaDBServer = request.getfixturevalue("postgres" if "postgres" in driver else "mariadb")
    return found


@pytest.fixture
def free_port() -> Iterator[int]:
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@transactional
def used(session: Session = Provide["warehouse_session"]) -> None:
    session.execute(text("SELECT 1"))


@transactional
async def used_awaited(session: AsyncSession = Provide["warehouse_async_session"]) -> None:
    await session.execute(text("SELECT 1"))


def failing(driver: str, settings: dict[str, Any]) -> BaseException:
    """Return the error of a unit that can't connect."""
    container: DatabaseContainer = container_of("warehouse")(
        settings=DatabaseSettings(_env_file=None, connections={"warehouse": settings})
    )
    container.wire(modules=[__name__])

    async def main() -> None:
        before = threading.enumerate()
        try:
            await used_awaited()
        finally:
            await container.shutdown_resources()
            for thread in {*threading.enumerate()}.difference(before):
                if "asyncio" not in thread.name:
                    await asyncio.to_thread(thread.join)  # that of aiosqlite still answers to the loop

    try:
        with pytest.raises(Exception) as caught:
            if driver.endswith(FOR_COROUTINES):
                asyncio.run(main())
            else:
                used()
        return caught.value
    finally:
        container.unwire()
        container.shutdown_resources()


def url_of(driver: str, server: Any, **parts: Any) -> str:
    url = make_url(server.url("postgres" if "postgres" in driver else "mysql")).set(drivername=driver, **parts)
    return url.render_as_string(hide_password=False)


def by_url(url: str) -> dict[str, Any]:
    return {"url": url}


def by_parts(url: str) -> dict[str, Any]:
    made = make_url(url)
    parts = {setting: getattr(made, part) for part, setting in PARTS.items()}
    return {"driver": made.drivername, **parts, **({"query": dict(made.query)} if made.query else {})}


@pytest.fixture(params=[by_url, by_parts])
def given(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    found: Callable[[str], dict[str, Any]] = request.param
    return found


def require_told(error: BaseException, settings: dict[str, Any], mistake: str, *places: str, secret: str = PASSWORD) -> None:
    """See that an error says where the mistake is, hides the password everywhere, and is not buried in frames of app_db."""
    said = "\n".join([str(error), *getattr(error, "__notes__", ())])
    assert "'warehouse'" in said
    for place in places:
        assert place in said
    assert f"APP_DB_CONNECTIONS__WAREHOUSE__{'URL' if 'url' in settings else mistake.upper()}" in said
    shown = [*traceback.format_exception(error), *map(repr, chain(error)), *map(str, chain(error))]
    shown += [repr(each.args) for each in chain(error)]
    assert not [line for line in shown if secret in line or quote(secret, safe="") in line]
    ours = [entry for entry in traceback.format_exception(error) if re.match(rf'\s*File "{re.escape(PACKAGE)}', entry)]
    lines = sum(len(entry.splitlines()) for entry in ours)
    assert 0 < lines <= 30, "".join(ours)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    if error is not None:
        yield error
        yield from chain(error.__cause__)
        yield from chain(error.__context__)


def test_a_refused_connection_is_named(driver: str, server: Any, free_port: int, given: Callable[[str], dict[str, Any]]) -> None:
    settings = given(url_of(driver, server, port=free_port))
    require_told(failing(driver, settings), settings, "port", f"127.0.0.1:{free_port}/")


def test_a_wrong_password_is_told_of_with_the_connection_and_without_the_password(
    driver: str, server: Any, given: Callable[[str], dict[str, Any]]
) -> None:
    settings = given(url_of(driver, server, password="wr0ng-pass"))
    database = make_url(url_of(driver, server)).database
    require_told(failing(driver, settings), settings, "password", f"127.0.0.1:{server.port}/{database}", secret="wr0ng-pass")


def test_an_unknown_user_is_named(driver: str, server: Any, given: Callable[[str], dict[str, Any]]) -> None:
    settings = given(url_of(driver, server, username="n0body"))
    require_told(failing(driver, settings), settings, "user", "n0body", f"127.0.0.1:{server.port}/")


def test_an_unknown_host_is_named(driver: str, server: Any, given: Callable[[str], dict[str, Any]]) -> None:
    settings = given(url_of(driver, server, host="nowhere.invalid"))
    require_told(failing(driver, settings), settings, "host", "nowhere.invalid")


def test_an_unknown_database_is_named(driver: str, server: Any, given: Callable[[str], dict[str, Any]]) -> None:
    settings = given(url_of(driver, server, database="n0where"))
    require_told(failing(driver, settings), settings, "database", f"127.0.0.1:{server.port}/n0where")


# ---- TLS ------------------------------------------------------------------------------------------------------------------

TLS = {
    "postgresql+psycopg": {"sslmode": "require"},
    "postgresql+asyncpg": {"ssl": "require"},
    "mysql+pymysql": {"ssl_ca": certifi.where()},
    "mysql+asyncmy": {"ssl_ca": certifi.where()},
}


def test_a_server_without_the_tls_that_is_wanted_is_named(
    driver: str, server: Any, given: Callable[[str], dict[str, Any]]
) -> None:
    settings = given(url_of(driver, server, query=TLS[driver]))
    require_told(failing(driver, settings), settings, "query", f"127.0.0.1:{server.port}/")


@pytest.fixture
def only_by_tls(driver: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server that refuses connections without TLS: all on a PostgreSQL of the test's own, and those of a user on MariaDB."""
    if "postgres" in driver:
        server = request.getfixturevalue("new_postgres")()
        rules = server.data / "pg_hba.conf"
        rules.write_text("hostnossl all all 127.0.0.1/32 reject\n" + rules.read_text())
        server.execute("SELECT pg_reload_conf()")
        yield server
        return
    server = request.getfixturevalue("mariadb")
    server.execute(f"CREATE USER by_tls@'127.0.0.1' IDENTIFIED BY '{PASSWORD}' REQUIRE SSL")
    yield server
    server.execute("DROP USER by_tls@'127.0.0.1'")


def test_a_server_that_wants_tls_is_named(driver: str, only_by_tls: Any, given: Callable[[str], dict[str, Any]]) -> None:
    settings = given(url_of(driver, only_by_tls, username=USER if "postgres" in driver else "by_tls"))
    require_told(failing(driver, settings), settings, "host", f"127.0.0.1:{only_by_tls.port}/")


# ---- SQLite ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"], ids=["sqlite3", "aiosqlite"])
def test_an_sqlite_file_that_can_not_be_opened_is_named(driver: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "shop.db"  # a file is no directory, not even for root
    settings = {"url": f"{driver}:///{path}"}
    require_told(failing(driver, settings), settings, "url", str(path))
