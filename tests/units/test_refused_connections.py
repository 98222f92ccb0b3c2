"""An error of a connection that can't be made says which connection was wanted, where it is, and which variable says so."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import make_url, text

from app_db import DatabaseContainer, DatabaseSettings, container_of
from harness.servers import MariaDBServer, PostgresServer

DRIVERS = ["postgresql+psycopg", "postgresql+asyncpg", "mysql+pymysql", "mysql+asyncmy"]
SYNC = {"postgresql+asyncpg": "postgresql+psycopg", "mysql+asyncmy": "mysql+pymysql"}


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


def failing(by: str, **settings: Any) -> BaseException:
    """Return the error of a unit that can't connect."""
    container: DatabaseContainer = container_of("warehouse")(
        settings=DatabaseSettings(_env_file=None, connections={"warehouse": settings})
    )

    async def main() -> None:
        try:
            async with container.transaction():
                await container.warehouse_async_session().execute(text("SELECT 1"))
        finally:
            await container.shutdown_resources()

    with pytest.raises(Exception) as caught:
        if by in SYNC:
            asyncio.run(main())
        else:
            with container.transaction():
                container.warehouse_session().execute(text("SELECT 1"))
    return caught.value


def told(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def url_of(driver: str, server: Any, **parts: Any) -> str:
    url = make_url(server.url("postgres" if "postgres" in driver else "mysql")).set(drivername=driver, **parts)
    return url.render_as_string(hide_password=False)


def test_a_refused_connection_is_named(driver: str, server: Any, free_port: int) -> None:
    said = told(failing(driver, url=url_of(driver, server, port=free_port)))
    assert "'warehouse'" in said
    assert f"127.0.0.1:{free_port}" in said
    assert "APP_DB_CONNECTIONS__WAREHOUSE__URL" in said
    assert str(make_url(server.url("x")).password) not in said


def test_a_wrong_password_is_told_of_with_the_connection_and_without_the_password(driver: str, server: Any) -> None:
    said = told(failing(driver, url=url_of(driver, server, password="wr0ng-pass")))
    assert "'warehouse'" in said
    assert "APP_DB_CONNECTIONS__WAREHOUSE__URL" in said
    assert "wr0ng-pass" not in said


def test_an_unknown_host_is_named_by_the_variable_that_sets_it(driver: str) -> None:
    parts = {"host": "nowhere.invalid", "port": 1, "user": "u", "password": "p4ssw0rd", "database": "d"}
    said = told(failing(driver, driver=driver, **parts))
    assert "'warehouse'" in said
    assert "nowhere.invalid" in said
    assert "APP_DB_CONNECTIONS__WAREHOUSE__HOST" in said
    assert "p4ssw0rd" not in said
