"""What the report says of each kind of database."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, make_url

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db.errors import SettingsError
from app_db.health import ConnectionHealth, Health
from harness.poolers import PgBouncer
from harness.requiring import made, need_command
from harness.servers import PASSWORD, MariaDBServer, PostgresServer, PostgresStandby, quick_tempdir, unprivileged
from harness.stranded import stranded

NewUrl = Callable[[], str]
NewContainer = Callable[..., DatabaseContainer]


def wait_until(holds: Callable[[], bool], within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def health_of(container: DatabaseContainer, name: str = "writer") -> ConnectionHealth:
    """The health of a connection, with a limit that no machine is too slow for."""
    return container.health(timeout=20).connections[name]


# ---- PostgreSQL ---------------------------------------------------------------------------------------------------------


def check_postgresql(told: ConnectionHealth) -> None:
    assert (told.status, told.reason, told.required) == ("up", "", True)
    assert (told.role, told.lag, told.pooler, told.tls, told.galera) == ("primary", None, False, "", None)
    assert told.version is not None
    assert told.version.startswith("18.")
    assert told.milliseconds is not None
    assert told.milliseconds > 0


def test_postgresql_tells_its_version_role_and_that_there_is_no_tls(new_container: NewContainer, postgres_url: str) -> None:
    check_postgresql(health_of(new_container(writer=postgres_url)))


@pytest.mark.usefixtures("only_for_coroutines")
def test_an_application_that_has_only_drivers_for_coroutines_is_told_the_same(
    new_container: NewContainer, postgres_url: str, mariadb_url: str, sqlite_url: str
) -> None:
    maria = mariadb_url.replace("pymysql", "asyncmy")
    container = new_container(writer=postgres_url.replace("psycopg", "asyncpg"), maria=maria, log=sqlite_url)
    with pytest.raises(SettingsError, match="not installed"):
        container.writer_engine()
    asyncio.run(_connect(container))
    report = container.health(timeout=20)
    check_postgresql(report.connections["writer"])
    assert (report.status, report.connections["maria"].role, report.connections["maria"].tls) == ("up", "primary", "")
    assert asyncio.run(_asked(container)).status == "up"


async def _connect(container: DatabaseContainer) -> None:
    async with container.log_async_engine().connect():
        pass
    await container.shutdown_resources()


async def _asked(container: DatabaseContainer) -> Health:
    return await container.async_health(timeout=20)


def test_nothing_is_left_on_the_server(new_container: NewContainer, postgres: PostgresServer, postgres_url: str) -> None:
    database = make_url(postgres_url).database
    container = new_container(writer=postgres_url)
    assert container.health(timeout=20).status == "up"
    sessions = "SELECT pid FROM pg_stat_activity WHERE datname = %s"
    wait_until(lambda: not postgres.execute(sessions, [database]))  # a server notices late that a client has gone


def test_a_replica_tells_its_lag_and_is_not_required(
    new_container: NewContainer, new_postgres: Callable[..., PostgresServer], new_standby: Callable[..., PostgresStandby]
) -> None:
    primary = new_postgres(settings={"synchronous_commit": True})  # otherwise the standby is sent what is written much later
    primary.create_database("shop")
    standby = new_standby(primary)
    primary.execute("CREATE TABLE earlier ()", database="shop")
    standby.catch_up()
    follows = {"url": standby.url("shop"), "read_only": True}
    container = new_container(
        writer=primary.url("shop"), reader=follows, strict={**follows, "replica_of": "writer", "max_lag": 1e-6}
    )
    told = health_of(container, "reader")
    assert (told.status, told.role, told.lag, told.required) == ("up", "replica", 0.0, False)
    assert health_of(container, "strict").status == "up"
    assert health_of(container).role == "primary"

    standby.execute("ALTER SYSTEM SET recovery_min_apply_delay = '1h'")
    standby.execute("SELECT pg_reload_conf()")
    primary.execute("CREATE TABLE later ()", database="shop")
    standby.receive()
    wait_until(lambda: (health_of(container, "reader").lag or 0) > 0)
    assert health_of(container, "reader").status == "up", "there is no limit"
    late = health_of(container, "strict")
    assert late.status == "degraded"
    assert re.fullmatch(r"it is \d+\.\d s behind its primary, and APP_DB_CONNECTIONS__STRICT__MAX_LAG is 1e-06", late.reason)
    checks: Any = container.health(timeout=20).as_json()["checks"]
    assert [checks[f"{name}:replicationLag"][0]["status"] for name in ("reader", "strict")] == ["pass", "warn"]
    standby.execute("ALTER SYSTEM RESET recovery_min_apply_delay")
    standby.execute("SELECT pg_reload_conf()")
    standby.catch_up()

    standby.pause()
    primary.execute("CREATE TABLE last ()", database="shop")
    standby.receive()
    behind = health_of(container, "reader")
    assert behind.lag is not None
    assert behind.lag > 0
    assert (behind.status, behind.reason) == (
        "degraded",
        "replication has stopped: it does not apply what it receives, until SELECT pg_wal_replay_resume()",
    )

    os.kill(standby.pid, signal.SIGKILL)
    standby.stop()
    report = container.health(timeout=20)
    assert (report.status, report.connections["reader"].status, report.connections["writer"].status) == ("degraded", "down", "up")
    assert "refused" in report.connections["reader"].reason
    assert "\n" not in report.connections["reader"].reason
    standby.start()
    assert container.health(timeout=20).connections["reader"].status == "up"


@pytest.mark.exhaustive
def test_a_replica_that_has_lost_its_primary_is_degraded(
    new_container: NewContainer, new_postgres: Callable[..., PostgresServer], new_standby: Callable[..., PostgresStandby]
) -> None:
    primary = new_postgres(settings={"synchronous_commit": True})
    primary.create_database("shop")
    standby = new_standby(primary)
    primary.execute("CREATE TABLE t ()", database="shop")
    standby.catch_up()
    container = new_container(reader={"url": standby.url("shop"), "read_only": True})
    assert health_of(container, "reader").status == "up"
    os.kill(primary.pid, signal.SIGKILL)
    primary.stop()
    wait_until(lambda: health_of(container, "reader").status == "degraded")
    assert health_of(container, "reader").reason == "replication has stopped: it receives nothing from its primary"
    primary.start()
    wait_until(lambda: health_of(container, "reader").status == "up")


def test_a_required_replica_that_is_dead_takes_the_whole_down(new_container: NewContainer, sqlite_url: str) -> None:
    dead = {"url": "postgresql://app_db:s3cr3t@127.0.0.1:1/nowhere", "read_only": True}
    for required, whole in ((True, "down"), (False, "degraded")):
        made_here = new_container(writer=sqlite_url, reader={**dead, "required": required})
        made_here.writer_engine().connect().close()
        report = made_here.health(timeout=20)
        assert (report.status, report.connections["reader"].required) == (whole, required)


def check_wrong_password(container: NewContainer, right: str, driver: str, said: str) -> None:
    secret = "not th€ p@ssw:rd"
    url = make_url(right).set(password=secret, drivername=driver)
    report = container(writer=url.render_as_string(hide_password=False)).health(timeout=20)
    assert report.status == "down"
    assert said in report.connections["writer"].reason
    shown = f"{report!r} {report.as_json()}"
    assert secret not in shown
    assert url.render_as_string(hide_password=False) not in shown


def test_a_wrong_password_is_told_and_not_shown(new_container: NewContainer, postgres_url: str, mariadb_url: str) -> None:
    check_wrong_password(new_container, postgres_url, "postgresql+psycopg", "password authentication failed")
    check_wrong_password(new_container, mariadb_url, "mysql+pymysql", "Access denied")


@pytest.mark.usefixtures("only_for_coroutines")
def test_a_wrong_password_is_told_by_drivers_for_coroutines_too(
    new_container: NewContainer, postgres_url: str, mariadb_url: str
) -> None:
    check_wrong_password(new_container, postgres_url, "postgresql+asyncpg", "password authentication failed")
    check_wrong_password(new_container, mariadb_url, "mysql+asyncmy", "Access denied")


def leak() -> str:
    raise ValueError("the vault answered s3cr3t")


def quote() -> str:
    raise OSError("s3cr3t and p@ss are on their way")


def test_the_error_of_a_password_function_is_told_by_its_class(new_container: NewContainer) -> None:
    url = "postgresql://app_db@127.0.0.1:1/nowhere"
    told = health_of(new_container(writer={"url": url, "password_provider": f"{__name__}:leak"}))
    assert (told.status, told.reason) == ("down", "ValueError")


def test_an_error_that_quotes_a_secret_is_told_by_its_class(new_container: NewContainer) -> None:
    given = {
        "url": "postgresql://app_db@127.0.0.1:1/nowhere",
        "password_provider": f"{__name__}:quote",
        "connect_args": {"sslpassword": "s3cr3t", "token": "p@ss"},
    }
    told = health_of(new_container(writer=given))
    assert (told.status, told.reason) == ("down", "OSError")


@pytest.mark.parametrize("password", ["o", "app_db", "Operational"])
def test_a_password_that_is_in_the_words_of_the_driver_is_not_disclosed_by_a_mask(
    password: str, new_container: NewContainer, postgres_url: str
) -> None:
    url = make_url(postgres_url).set(username="app_db", password=password)
    told = health_of(new_container(writer=url.render_as_string(hide_password=False)))
    assert (told.status, told.reason) == ("down", "OperationalError")


def test_what_the_user_may_not_ask_is_left_out(new_container: NewContainer, postgres: PostgresServer, postgres_url: str) -> None:
    url = make_url(postgres_url)
    database = str(url.database)
    postgres.execute("REVOKE EXECUTE ON FUNCTION pg_is_in_recovery() FROM PUBLIC", database=database)
    postgres.execute("CREATE ROLE clerk LOGIN PASSWORD 'clerk'")
    try:
        told = health_of(new_container(writer=url.set(username="clerk", password="clerk").render_as_string(hide_password=False)))
        assert (told.status, told.role, told.tls) == ("up", None, None)
        assert str(told.version).startswith("18")
    finally:
        postgres.execute("GRANT EXECUTE ON FUNCTION pg_is_in_recovery() TO PUBLIC", database=database)
        postgres.execute("DROP ROLE clerk")


# ---- PgBouncer ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bouncer(postgres: PostgresServer) -> Iterator[PgBouncer]:
    with closing(made(lambda: PgBouncer(postgres))) as pooler:
        yield pooler


def test_a_pooler_in_front_is_shown_and_keeps_nothing(new_container: NewContainer, bouncer: PgBouncer, postgres_url: str) -> None:
    database = str(make_url(postgres_url).database)
    told = health_of(new_container(writer={"url": bouncer.url(database), "pooler": "transaction"}))
    assert (told.status, told.pooler, told.tls, told.role) == ("up", True, "", "primary")
    with bouncer.plain(database) as other:
        assert other.execute("SHOW default_transaction_read_only").fetchone() == ("off",)
        other.execute("CREATE TABLE t ()")


@pytest.mark.exhaustive
@pytest.mark.usefixtures("only_for_coroutines")
def test_a_pooler_is_shown_by_drivers_for_coroutines_too(
    new_container: NewContainer, bouncer: PgBouncer, postgres_url: str
) -> None:
    url = bouncer.url(str(make_url(postgres_url).database), "postgresql+asyncpg")
    told = health_of(new_container(writer={"url": url, "pooler": "transaction"}))
    assert (told.status, told.pooler, told.tls, told.role) == ("up", True, None, "primary")


def test_a_pooler_that_the_settings_do_not_name_is_down_as_it_is_for_the_application(
    new_container: NewContainer, bouncer: PgBouncer, postgres_url: str
) -> None:
    told = health_of(new_container(writer=bouncer.url(str(make_url(postgres_url).database))))
    assert (told.status, told.pooler) == ("down", True)
    assert told.reason == "a pooler stands before the server, and APP_DB_CONNECTIONS__WRITER__POOLER is not set"


# ---- MariaDB ------------------------------------------------------------------------------------------------------------


def test_mariadb_tells_its_version_and_role(new_container: NewContainer, mariadb_url: str) -> None:
    told = health_of(new_container(writer=mariadb_url, reader={"mirror": "writer", "read_only": True}))
    assert (told.status, told.reason, told.role, told.lag, told.galera) == ("up", "", "primary", None, None)
    assert told.tls == ""
    assert str(told.version).startswith("10.")


def test_a_mariadb_that_is_read_only_is_a_replica_and_one_that_does_not_follow_is_degraded(
    new_container: NewContainer, new_mariadb: Callable[..., MariaDBServer]
) -> None:
    server = new_mariadb(settings={"server_id": 7})
    server.create_database("shop")
    container = new_container(writer=server.url("shop"))
    server.execute("SET GLOBAL read_only = ON")
    assert (health_of(container).role, health_of(container).status) == ("replica", "up")
    server.execute("SET GLOBAL read_only = OFF")
    assert health_of(container).role == "primary"
    server.execute("CHANGE MASTER TO master_host = '127.0.0.1', master_port = 1, master_user = 'x'")
    told = health_of(container)
    assert (told.role, told.lag, told.status) == ("replica", None, "degraded")
    assert told.reason == "replication has stopped (Slave_IO_Running is No, Slave_SQL_Running is No)"
    server.execute("START SLAVE")  # nothing listens on port 1, as when the primary is dead
    told = health_of(container)
    assert (told.lag, told.status) == (None, "degraded")
    assert told.reason.startswith("replication has stopped (Slave_IO_Running is ")


@pytest.fixture
def certificate() -> Iterator[tuple[Path, Path]]:
    """A key and a certificate that nobody trusts, which servers can read."""
    need_command("openssl", "version")
    owner = unprivileged()
    with TemporaryDirectory(prefix="app_db-tls-", dir=quick_tempdir(owner)) as directory:
        key, certificate = Path(directory, "key.pem"), Path(directory, "certificate.pem")
        arguments = (
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
        )
        command = ["openssl", "req", "-x509", *arguments, "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True)
        for path in (Path(directory), key, certificate):
            if owner is not None:
                os.chown(path, owner.pw_uid, owner.pw_gid)
        yield key, certificate


def test_tls_is_shown(
    new_container: NewContainer, new_mariadb: Callable[..., MariaDBServer], certificate: tuple[Path, Path]
) -> None:
    server = new_mariadb(settings={"ssl_key": str(certificate[0]), "ssl_cert": str(certificate[1])})
    server.create_database("shop")
    encrypted = {"url": server.url("shop"), "connect_args": {"ssl": {"ca": str(certificate[1]), "check_hostname": False}}}
    container = new_container(writer=encrypted, plain={"url": server.url("shop"), "connect_args": {"ssl_disabled": True}})
    assert health_of(container).tls in ("TLSv1.3", "TLSv1.2")
    assert health_of(container, "plain").tls == ""


def test_tls_to_a_pooler_is_shown(
    new_container: NewContainer, postgres: PostgresServer, postgres_url: str, certificate: tuple[Path, Path]
) -> None:
    with closing(made(lambda: PgBouncer(postgres, tls=certificate))) as bouncer:
        url = bouncer.url(str(make_url(postgres_url).database))
        encrypted = {"url": f"{url}?sslmode=require", "pooler": "transaction"}
        plain = {"url": f"{url}?sslmode=disable", "pooler": "transaction"}
        container = new_container(writer=encrypted, plain=plain)
        assert (health_of(container).tls, health_of(container, "plain").tls) == ("TLS", "")


GALERA = Path("/usr/lib/galera/libgalera_smm.so")


@pytest.mark.skipif(not GALERA.exists(), reason="Galera is missing: apt-get install galera-4")
def test_a_node_of_galera_tells_its_state(new_container: NewContainer, new_mariadb: Callable[..., MariaDBServer]) -> None:
    cluster = {
        "wsrep_on": True,
        "wsrep_provider": str(GALERA),
        "wsrep_cluster_address": "gcomm://",
        "wsrep_provider_options": "gmcast.listen_addr=tcp://127.0.0.1:0;pc.recovery=FALSE",
        "wsrep_node_address": "127.0.0.1",
        "binlog_format": "ROW",
        "innodb_autoinc_lock_mode": 2,
    }
    server = new_mariadb(settings=cluster)
    server.create_database("shop")
    container = new_container(writer=server.url("shop"))
    told = health_of(container)
    assert (told.galera, told.status) == ("Synced", "up")
    server.execute("SET GLOBAL wsrep_desync = ON")
    told = health_of(container)
    assert (told.galera, told.status) == ("Donor/Desynced", "degraded")
    assert told.reason == "the Galera node is Donor/Desynced, and not Synced"


# ---- SQLite -------------------------------------------------------------------------------------------------------------


def test_a_file_of_sqlite_that_is_missing_is_down_and_stays_missing(new_container: NewContainer, tmp_path: Path) -> None:
    file = tmp_path / "shop.db"
    container = new_container(writer=f"sqlite:///{file}")
    told = health_of(container)
    assert (told.status, told.reason) == ("down", f"FileNotFoundError: the file {file} does not exist")
    assert not file.exists()
    container.writer_engine().connect().close()
    assert (health_of(container).status, health_of(container).version is None) == ("up", False)


def test_a_file_that_is_no_database_is_down(new_container: NewContainer, tmp_path: Path) -> None:
    file = tmp_path / "shop.db"
    file.write_text("this is no database, although it is long enough to be one" * 100)
    told = health_of(new_container(writer=f"sqlite:///{file}"))
    assert (told.status, told.reason) == ("down", "DatabaseError: file is not a database")


def test_a_file_that_another_process_writes_is_up(new_container: NewContainer, sqlite_url: str) -> None:
    container = new_container(writer=sqlite_url)
    with container.writer_engine().begin() as writing:
        writing.exec_driver_sql("CREATE TABLE t (id int)")
        assert health_of(container).status == "up"


def test_asking_does_not_change_a_file(new_container: NewContainer, tmp_path: Path) -> None:
    file = tmp_path / "shop.db"
    plain = create_engine(f"sqlite:///{file}", poolclass=NullPool)
    with plain.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (id int)")
    before = file.read_bytes()
    assert health_of(new_container(writer=f"sqlite:///{file}")).status == "up"
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["shop.db"]


def test_a_report_can_not_be_changed_and_can_be_copied(new_container: NewContainer) -> None:
    report = new_container(writer="sqlite://").health()
    connections: Any = report.connections
    for change, given in (("clear", ()), ("update", ({},)), ("__setitem__", ("x", 1)), ("__delitem__", ("writer",))):
        with pytest.raises(TypeError, match="A report can't be changed"):
            getattr(connections, change)(*given)
    assert pickle.loads(pickle.dumps(report)) == deepcopy(report) == report
    assert asdict(report)["connections"]["writer"]["status"] == "up"


def test_a_database_in_memory_is_up(new_container: NewContainer) -> None:
    assert health_of(new_container(writer="sqlite://")).status == "up"


# ---- branches in doubt --------------------------------------------------------------------------------------------------


def test_the_oldest_branch_in_doubt_is_told_and_degrades_when_recovery_would_settle_it(
    monkeypatch: pytest.MonkeyPatch, new_postgres_url: NewUrl, new_mariadb_url: NewUrl
) -> None:
    monkeypatch.setattr("app_db.health._rounds.GRACE", 3600.0)
    with stranded(writer=new_postgres_url(), maria=new_mariadb_url()) as scene:
        container = scene.container
        assert {each.oldest_in_doubt for each in container.health(timeout=20).connections.values()} == {None}
        scene.make_tables()
        scene.prepare(scene.new_unit(), "writer", "maria")
        young = container.health(timeout=20)
        assert young.status == "up"
        assert all(0 <= (each.oldest_in_doubt or -1) < 60 for each in young.connections.values())
        monkeypatch.setattr("app_db.health._rounds.GRACE", -1.0)
        report = container.health(timeout=20)
        assert [each.status for each in report.connections.values()] == ["degraded", "degraded"]
        assert "`python -m app_db recover`" in report.connections["writer"].reason
        scene.recover(grace=0)
        assert container.health(timeout=20).status == "up"


# ---- own engines, isolated tests, coroutines -----------------------------------------------------------------------------


def test_an_engine_of_the_applications_own_is_asked_by_a_connection_of_its_own_making(postgres_url: str) -> None:
    engine = create_engine(postgres_url, pool_size=1, max_overflow=0)
    container = container_of("writer")()
    container.writer_engine.override(engine)
    with engine.connect():
        told = health_of(container)
    assert (told.status, told.role) == ("degraded", "primary")
    assert told.pool is not None
    assert (told.pool.in_use, told.pool.most, told.pool.is_full) == (1, 1, True)
    engine.dispose()


def test_an_async_engine_of_the_applications_own_is_asked(postgres_url: str) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    async def ask() -> Health:
        engine = create_async_engine(postgres_url.replace("psycopg", "asyncpg"), pool_size=2, max_overflow=0)
        container = container_of("writer")()
        container.writer_async_engine.override(engine)
        async with engine.connect():
            report = await container.async_health(timeout=20)
        await engine.dispose()
        return report

    told = asyncio.run(ask()).connections["writer"]
    assert (told.status, told.role) == ("up", "primary")
    assert told.pool is not None
    assert (told.pool.in_use, told.pool.most) == (1, 2)


def test_in_an_isolated_test_the_database_is_asked_beside_the_shared_connection(postgres_url: str) -> None:
    from app_db.testing import isolated

    container = container_of("writer")(settings=DatabaseSettings(connections={"writer": {"url": postgres_url}}))
    with isolated(container), container.transaction():
        container.writer_session().connection().exec_driver_sql("CREATE TABLE t (id int)")
        assert health_of(container).status == "up"
        assert container.writer_session().connection().exec_driver_sql("SELECT count(*) FROM t").scalar() == 0
    container.shutdown_resources()


def test_the_password_is_awkward_and_never_shown(new_container: NewContainer, postgres_url: str, mariadb_url: str) -> None:
    report = new_container(writer=postgres_url, maria=mariadb_url).health(timeout=20)
    assert report.status == "up"
    assert PASSWORD not in f"{report!r} {report.as_json()}"
