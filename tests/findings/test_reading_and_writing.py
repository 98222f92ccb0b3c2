"""Whether readers can read and writers can write: `check` reads privileges and settings, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import make_url

from harness.findings import GOODS, found, matters, run, user
from harness.servers import MariaDBServer, PostgresServer, PostgresStandby, Server

FEW = {"size": 1, "max_overflow": 0}


@pytest.fixture(params=["postgres", "mariadb"])
def server(request: pytest.FixtureRequest) -> Server:
    given: Server = request.getfixturevalue(request.param)
    return given


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    """A database with the table of the models."""
    with server.lend_database() as database:
        url = server.url(database)
        run(url, GOODS)
        yield url


# ---- writers --------------------------------------------------------------------------------------------------------------


def test_a_standby_that_is_given_as_writer(standby: PostgresStandby) -> None:
    [finding] = found(main={"url": standby.url("postgres"), "pool": FEW})
    assert (finding.matter, finding.severity) == ("writes-refused", "error")
    assert "standby" in finding.what


def test_a_user_whose_transactions_are_read_only_by_default(postgres_url: str) -> None:
    database = make_url(postgres_url).database
    run(postgres_url, f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
    [finding] = found(main=postgres_url)
    assert finding.matter == "writes-refused"
    assert "default_transaction_read_only" in finding.remedy


def test_a_server_of_mariadb_that_is_read_only(mariadb: MariaDBServer, mariadb_url: str) -> None:
    mariadb.execute("SET GLOBAL read_only = ON")
    try:
        assert matters(found(main=mariadb_url)) == [("writes-refused", "main")]
    finally:
        mariadb.execute("SET GLOBAL read_only = OFF")


def test_a_writer_without_the_privilege_to_insert(server: Server, url: str) -> None:
    with user(server, url, "SELECT ON goods") as plain:
        [finding] = found(goods=plain)
        assert (finding.matter, finding.connection, finding.severity) == ("no-privilege", "goods", "error")
        assert finding.what.startswith("The user lacks INSERT on goods")
    with user(server, url, "SELECT, INSERT ON goods") as plain:
        assert found(goods=plain) == []


def test_privileges_on_a_schema_of_its_own(postgres: PostgresServer, postgres_url: str) -> None:
    run(postgres_url, "CREATE SCHEMA ware", "CREATE TABLE ware.stock (id INTEGER PRIMARY KEY)")
    with user(postgres, postgres_url, "INSERT ON ware.stock") as plain:
        [finding] = found(stocks=plain)
        assert finding.matter == "no-privilege"
        assert "INSERT on ware.stock" in finding.what
    with user(postgres, postgres_url, "INSERT ON ware.stock", "USAGE ON SCHEMA ware") as plain:
        assert found(stocks=plain) == []


def test_the_check_writes_nothing(postgres: PostgresServer, postgres_url: str) -> None:
    run(postgres_url, GOODS)
    database = make_url(postgres_url).database
    counted = "SELECT tup_inserted + tup_updated + tup_deleted FROM pg_stat_database WHERE datname = %s"
    run(postgres_url, "SELECT pg_stat_force_next_flush()")
    before = postgres.execute(counted, [database])
    last = postgres.execute("SELECT txid_snapshot_xmax(txid_current_snapshot())", database=database)
    assert found(goods=postgres_url) == []
    assert postgres.execute("SELECT txid_snapshot_xmax(txid_current_snapshot())", database=database) == last
    assert postgres.execute(counted, [database]) == before


# ---- readers --------------------------------------------------------------------------------------------------------------


def test_a_reader_whose_user_could_write(server: Server, url: str) -> None:
    with user(server, url, "SELECT, DELETE ON goods") as plain:
        [finding] = found(goods={"url": plain, "read_only": True})
        assert (finding.matter, finding.severity) == ("reader-may-write", "hint")
    with user(server, url, "SELECT ON goods") as plain:
        assert found(goods={"url": plain, "read_only": True}) == []


def test_a_reader_without_the_privilege_to_read(server: Server, url: str) -> None:
    with user(server, url, "INSERT ON goods") as plain:
        what = found(goods={"url": plain, "read_only": True})
    assert matters(what) == [("no-privilege", "goods"), ("reader-may-write", "goods")]
    assert "lacks SELECT on goods" in what[0].what


def test_a_replica_needs_to_read_the_tables_of_its_owners_models(postgres: PostgresServer, postgres_url: str) -> None:
    run(postgres_url, GOODS, "CREATE TABLE others (id INTEGER)")
    with user(postgres, postgres_url, "SELECT ON others") as plain:
        what = found(goods=postgres_url, copy={"url": plain, "read_only": True, "replica_of": "goods"})
    assert [finding for finding in matters(what) if finding[0] == "no-privilege"] == [("no-privilege", "copy")]


def test_a_mirror_is_not_asked_a_second_time(postgres_url: str) -> None:
    run(postgres_url, GOODS)
    assert found(goods=postgres_url, copy={"mirror": "goods", "read_only": True}) == []


# ---- replicas -------------------------------------------------------------------------------------------------------------


def test_a_standby_is_a_sound_replica(small: PostgresServer, standby: PostgresStandby) -> None:
    copy = {"url": standby.url("postgres"), "read_only": True, "replica_of": "main", "pool": FEW}
    assert found(main={"url": small.url("postgres"), "pool": FEW}, copy=copy) == []


def test_a_replica_that_follows_nothing(postgres_url: str, small: PostgresServer) -> None:
    with user(small, small.url("postgres"), "CONNECT ON DATABASE postgres") as plain:
        copy = {"url": plain, "read_only": True, "replica_of": "main", "pool": FEW}
        [finding] = found(main=postgres_url, copy=copy)
    assert (finding.matter, finding.connection, finding.severity) == ("not-a-replica", "copy", "warning")


@pytest.mark.exhaustive
def test_a_replica_that_follows_another_server(new_postgres: Callable[[int], PostgresServer], standby: PostgresStandby) -> None:
    other = new_postgres(16)  # servers of one version are copies here, and have the same system identifier
    copy = {"url": standby.url("postgres"), "read_only": True, "replica_of": "main", "pool": FEW}
    assert matters(found(main=other.url("postgres"), copy=copy)) == [("not-a-replica", "copy")]


def test_a_logical_replica_of_postgresql_is_one(postgres: PostgresServer, postgres_url: str, small: PostgresServer) -> None:
    with small.lend_database() as database:
        subscribing = small.url(database)
        run(subscribing, "CREATE SUBSCRIPTION follows CONNECTION 'host=nowhere.invalid' PUBLICATION p WITH (connect = false)")
        try:
            copy = {"url": subscribing, "read_only": True, "replica_of": "main", "pool": FEW}
            assert found(main=postgres_url, copy=copy) == []
        finally:
            run(
                subscribing,
                "ALTER SUBSCRIPTION follows DISABLE",
                "ALTER SUBSCRIPTION follows SET (slot_name = NONE)",
                "DROP SUBSCRIPTION follows",
            )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_replica_that_is_the_same_database(postgres_url: str, host: str) -> None:
    """By another name of the host, too: the servers say which they are."""
    url = make_url(postgres_url).set(host=host)
    if host == "localhost":
        url = url.update_query_dict({"hostaddr": "127.0.0.1"})
    copy = {"url": url.render_as_string(hide_password=False), "read_only": True, "replica_of": "main"}
    assert matters(found(main=postgres_url, copy=copy)) == [("replica-is-owner", "copy")]


def test_a_replica_of_mariadb_that_accepts_writes(mariadb: MariaDBServer, mariadb_url: str) -> None:
    run(mariadb_url, GOODS)
    mariadb.execute("CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT=1, MASTER_USER='nobody'")
    try:
        with user(mariadb, mariadb_url, "SELECT ON goods") as plain:
            assert found(goods={"url": plain, "read_only": True}) == [], "this user may not ask, so that nothing is said"
        what = found(goods={"url": mariadb_url, "read_only": True})
        assert matters(what) == [("replica-writable", "goods"), ("reader-may-write", "goods")]
        mariadb.execute("SET GLOBAL read_only = ON")
        assert found(goods={"url": mariadb_url, "read_only": True}) == []
    finally:
        mariadb.execute("SET GLOBAL read_only = OFF")
        mariadb.execute("RESET SLAVE ALL")


# ---- one database under two names -------------------------------------------------------------------------------------------


def test_two_connections_to_one_database_that_share_no_transaction(postgres_url: str) -> None:
    what = found(main=postgres_url, copy={"url": postgres_url, "isolation_level": "SERIALIZABLE"})
    assert matters(what) == [("separate-rows", "copy")]
    assert found(main=postgres_url, copy=postgres_url) == []
    assert found(main=postgres_url, copy={"url": postgres_url, "isolation_level": "SERIALIZABLE", "transactional": False}) == []
