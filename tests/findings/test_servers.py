"""What a server's settings would do to units of work: its clock, its time limits, and its room for connections."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import make_url

from harness.findings import found, matters, run
from harness.servers import MariaDBServer, PostgresServer

FEW = {"size": 1, "max_overflow": 0}


@pytest.mark.parametrize(("ours", "says"), [(-100, "100 s ahead of"), (100, "100 s behind")])
@pytest.mark.parametrize("database", ["postgres_url", "mariadb_url"])
def test_a_clock_that_differs(request: pytest.FixtureRequest, database: str, ours: float, says: str) -> None:
    url = request.getfixturevalue(database)
    [finding] = found(main=url, now=lambda: time.time() + ours)
    assert (finding.matter, finding.severity) == ("clock", "warning")
    assert says.partition(" ")[2] in finding.what
    assert 98 <= float(finding.what.split(" is ")[1].split(" s ")[0]) <= 102
    assert found(main=url, now=lambda: time.time() + ours / 5) == []


def test_a_server_that_ends_units_that_pause(postgres_url: str) -> None:
    run(postgres_url, f'ALTER DATABASE "{make_url(postgres_url).database}" SET idle_in_transaction_session_timeout = "5s"')
    [finding] = found(main=postgres_url)
    assert finding.matter == "kills-units"
    assert "idle_in_transaction_session_timeout is 5 s" in finding.what
    run(postgres_url, f'ALTER DATABASE "{make_url(postgres_url).database}" SET idle_in_transaction_session_timeout = "60s"')
    assert found(main=postgres_url) == []


def test_a_server_of_mariadb_that_ends_units_that_pause(mariadb: MariaDBServer, mariadb_url: str) -> None:
    mariadb.execute("SET GLOBAL idle_transaction_timeout = 5")
    try:
        assert matters(found(main=mariadb_url)) == [("kills-units", "main")]
    finally:
        mariadb.execute("SET GLOBAL idle_transaction_timeout = 0")


def test_a_server_that_ends_connections_that_the_pool_takes_for_alive(postgres_url: str) -> None:
    run(postgres_url, f'ALTER DATABASE "{make_url(postgres_url).database}" SET idle_session_timeout = "20s"')
    assert matters(found(main=postgres_url)) == [("kills-idle", "main")]
    assert found(main={"url": postgres_url, "pool": {"alive_window": 10}}) == []


def test_a_server_of_mariadb_that_ends_connections_that_the_pool_takes_for_alive(
    mariadb: MariaDBServer, mariadb_url: str
) -> None:
    mariadb.execute("SET GLOBAL wait_timeout = 20")
    try:
        assert matters(found(main=mariadb_url)) == [("kills-idle", "main")]
    finally:
        mariadb.execute("SET GLOBAL wait_timeout = 28800")


def test_waits_for_locks_that_nothing_limits(postgres_url: str) -> None:
    endless = {"url": postgres_url, "statement_timeout": None}
    [finding] = found(main=endless)
    assert (finding.matter, finding.severity) == ("waits-for-ever", "hint")
    run(postgres_url, f'ALTER DATABASE "{make_url(postgres_url).database}" SET lock_timeout = "10s"')
    assert found(main=endless) == []


def test_pools_that_can_open_more_connections_than_the_server_accepts(small: PostgresServer) -> None:
    url = small.url("postgres")
    [finding] = found(main={"url": url, "pool": {"size": 9, "max_overflow": 0}}, copy={"mirror": "main", "pool": {"size": 9}})
    assert (finding.matter, finding.connection, finding.severity) == ("too-many-connections", None, "warning")
    assert "'main', 'copy' can open 28 connections in one process, and the server accepts 17" in finding.what
    assert found(main={"url": url, "pool": {"size": 17, "max_overflow": 0}}) == []


def test_a_pool_without_a_limit(postgres_url: str) -> None:
    [finding] = found(main={"url": postgres_url, "pool": {"max_overflow": -1}})
    assert (finding.matter, finding.severity) == ("pool-without-limit", "hint")
