"""What keeps a database from being reached is found, by its real cause, and doesn't keep the others from being asked."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url

from app_db import Connection, DatabaseContainer, DatabaseSettings, container_of
from app_db._findings.find import find
from app_db.settings import _urls
from harness.findings import GOODS, found, matters, run, user
from harness.poolers import PgBouncer
from harness.proxies import Aftermath, Proxy
from harness.requiring import made
from harness.servers import MariaDBServer, PostgresServer, Server

NewUrl = Callable[[], str]

NOWHERE = "postgresql+psycopg://app_db:s3cr3t@127.0.0.1:1/nowhere"


@pytest.fixture(params=["postgres", "mariadb"])
def server(request: pytest.FixtureRequest) -> Server:
    given: Server = request.getfixturevalue(request.param)
    return given


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg", "mysql+pymysql"])
def test_a_server_that_is_down(driver: str) -> None:
    assert matters(found(main=NOWHERE.replace("postgresql+psycopg", driver))) == [("unreachable", "main")]


def test_a_host_that_does_not_exist() -> None:
    [finding] = found(main="postgresql+psycopg://app_db:s3cr3t@nowhere.invalid/shop")
    assert finding.matter == "unreachable"
    assert "host and port" in finding.remedy


@contextmanager
def silent() -> Iterator[int]:
    """A port that accepts connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.mark.representative("postgresql+psycopg")
@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql"])
def test_a_server_that_is_silent_does_not_keep_others_from_being_asked(driver: str, tmp_path: Path) -> None:
    with silent() as port:
        what = found(
            main={"url": f"{driver}://app_db:s3cr3t@127.0.0.1:{port}/shop"},
            copy={"url": f"sqlite:///{tmp_path}/copy.db"},
            patience=0.5,
        )
    assert matters(what) == [("silent", "main"), ("no-file", "copy")]


def test_a_wrong_password(server: Server) -> None:
    database = "postgres" if isinstance(server, PostgresServer) else "mysql"
    assert matters(found(main=server.url(database, password="s3cr3t"))) == [("login", "main")]


def test_a_user_that_does_not_exist(server: Server) -> None:
    database = "postgres" if isinstance(server, PostgresServer) else "mysql"
    assert matters(found(main=server.url(database, user="nobody_knows"))) == [("login", "main")]


def test_a_password_that_is_the_name_of_the_user_is_not_disclosed(server: Server) -> None:
    database = "postgres" if isinstance(server, PostgresServer) else "mysql"
    [finding] = found(main=server.url(database, user="nobody", password="nobody"))
    assert finding.matter == "login"
    assert "nobody" not in finding.what
    assert "***" not in finding.what
    assert "OperationalError" in finding.what


def test_a_password_provider_that_fails_shows_none_of_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secrets_of_mine.py").write_text("def password():\n    raise ValueError('s3cr3t')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    url = "postgresql+psycopg://app_db@127.0.0.1:1/nowhere"
    [finding] = found(main={"url": url, "password_provider": "secrets_of_mine:password"})
    assert finding.matter == "settings"
    assert "ValueError" in finding.what
    assert "APP_DB_CONNECTIONS__MAIN__PASSWORD_PROVIDER" in finding.where
    assert "s3cr3t" not in str(finding)


@pytest.mark.parametrize(
    ("settings", "variable"),
    [
        ({"pool": {"class": "nowhere:Pool"}}, "URL"),
        ({"session": {"class": "nowhere:Session"}}, "SESSION__CLASS"),
        ({"session": {"async_class": "harness.findings:Good"}}, "SESSION__ASYNC_CLASS"),
        ({"password_provider": "nowhere:password"}, "PASSWORD_PROVIDER"),
        ({"connect_args": {"nonsense": 1}}, "CONNECT_ARGS"),
    ],
)
def test_settings_that_no_connection_can_be_made_of(settings: dict[str, object], variable: str, sqlite_url: str) -> None:
    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    what = found(main={"url": "postgresql+psycopg://app_db@127.0.0.1:1/nowhere", **settings}, copy=sqlite_url)
    assert matters(what) == [("settings", "main")]
    assert f"APP_DB_CONNECTIONS__MAIN__{variable}" in what[0].where


def test_a_database_that_does_not_exist(server: Server) -> None:
    assert matters(found(main=server.url("no_such_database"))) == [("no-database", "main")]


def test_a_database_that_the_user_may_not_enter(mariadb: MariaDBServer, mariadb_url: str) -> None:
    with user(mariadb, mariadb_url) as url:
        assert matters(found(main=url)) == [("no-database", "main")]


@pytest.mark.representative("transaction")
@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_a_pooler_that_the_settings_do_not_name(postgres: PostgresServer, postgres_url: str, mode: str) -> None:
    pooler = made(lambda: PgBouncer(postgres, mode))
    try:
        database = str(make_url(postgres_url).database)
        [finding] = found(main=pooler.url(database))
        assert (finding.matter, finding.connection) == ("pooler-not-named", "main")
        assert finding.where == "APP_DB_CONNECTIONS__MAIN__POOLER"
        assert "transaction" in finding.remedy
        assert found(main={"url": pooler.url(database), "pooler": "transaction" if mode == "transaction" else "none"}) == []
    finally:
        pooler.close()


def test_what_a_pooler_refuses(postgres: PostgresServer, postgres_url: str) -> None:
    pooler = made(lambda: PgBouncer(postgres))
    try:
        url = make_url(pooler.url(str(make_url(postgres_url).database)))
        for refused, matter in (
            (url.set(password="s3cr3t"), "login"),
            (url.set(username="nobody_knows"), "login"),
            (url.set(database="nowhere"), "no-database"),
        ):
            given = {"url": refused.render_as_string(hide_password=False), "pooler": "transaction"}
            assert matters(found(main=given)) == [(matter, "main")]
    finally:
        pooler.close()


def test_a_pooler_that_is_named_and_not_there(postgres_url: str) -> None:
    assert matters(found(main={"url": postgres_url, "pooler": "transaction"})) == [("no-pooler", "main")]


def test_a_connection_to_another_host_that_is_not_encrypted(postgres_url: str) -> None:
    url = make_url(postgres_url).set(host="db.example", query={"hostaddr": "127.0.0.1"}).render_as_string(hide_password=False)
    assert matters(found(main=url)) == [("not-encrypted", "main")]


@pytest.mark.parametrize(("file", "says"), [("shop.db", "The file"), ("nowhere/shop.db", "The directory")])
def test_an_sqlite_file_that_does_not_exist_is_not_made(tmp_path: Path, file: str, says: str) -> None:
    [finding] = found(main=f"sqlite:///{tmp_path}/{file}")
    assert finding.matter == "no-file"
    assert finding.what.startswith(says)
    assert list(tmp_path.iterdir()) == []


def test_an_isolation_level_that_the_database_does_not_have(tmp_path: Path) -> None:
    run(f"sqlite:///{tmp_path}/main.db", "CREATE TABLE t (id INTEGER)")
    [finding] = found(main={"url": f"sqlite:///{tmp_path}/main.db", "isolation_level": "REPEATABLE READ"})
    assert finding.matter == "isolation-level"
    assert "SERIALIZABLE" in finding.remedy


def test_settings_that_can_not_be_read_are_findings_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__MAIN__URL", "mysql+mysqldb://app_db:s3cr3t@db/shop")
    container = container_of("main")()
    [finding] = find(container)
    assert (finding.matter, finding.severity) == ("settings", "error")
    assert finding.what == "APP_DB_CONNECTIONS__MAIN__URL needs a driver that is not installed: pip install mysqlclient."
    assert "s3cr3t" not in str(finding)


def test_a_connection_of_the_container_that_has_no_settings(sqlite_url: str) -> None:
    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    [finding] = found(main=sqlite_url, declared=["main", "copy"])
    assert (finding.matter, finding.connection) == ("not-configured", "copy")
    assert finding.where == "APP_DB_CONNECTIONS__COPY__URL"


def test_where_says_the_source_of_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__MAIN__URL", NOWHERE)
    container = container_of("main")(settings=DatabaseSettings())
    [finding] = find(container)
    assert finding.where == "APP_DB_CONNECTIONS__MAIN__URL (environment)"
    container.shutdown_resources()


def test_a_question_that_is_refused_is_a_finding_and_the_others_are_asked(postgres: PostgresServer) -> None:
    database = "half_asked"
    postgres.create_database(database)
    try:
        whole = postgres.url(database)
        run(whole, "REVOKE EXECUTE ON FUNCTION pg_catalog.pg_is_in_recovery() FROM public", "CREATE TABLE t (id INTEGER)")
        with user(postgres, whole, "INSERT ON t") as url:
            what = found(main={"url": url, "statement_timeout": None, "two_phase": True})
            assert ("unasked", "main") in matters(what)
            assert ("waits-for-ever", "main") in matters(what)
            assert "the server" in what[[finding.matter for finding in what].index("unasked")].what
    finally:
        postgres.drop_database(database)


@pytest.mark.parametrize(("then", "matter"), [("close", "unreachable"), ("stall", "silent")])
def test_a_server_that_goes_away_in_the_middle(
    postgres: PostgresServer, postgres_url: str, sqlite_url: str, then: Aftermath, matter: str
) -> None:
    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    with Proxy(postgres) as proxy:
        lost = proxy.lose("answer", to=b"pg_settings WHERE unit", then=then)
        assert matters(found(main=proxy.url(postgres_url), copy=sqlite_url, patience=1)) == [(matter, "main")]
        assert lost.happened


def test_a_missing_driver_for_threads_is_said_where_coroutines_have_theirs(
    monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    monkeypatch.setitem(_urls._PACKAGES, "psycopg", ("no_such_driver", "'psycopg[binary]'"))
    [finding] = found(main=postgres_url.replace("+psycopg", "+asyncpg"))
    assert (finding.matter, finding.severity) == ("unasked", "warning")
    assert "needs a driver that is not installed: pip install 'psycopg[binary]'" in finding.what


def test_an_engine_of_the_applications_own_is_asked_and_left_as_it_was(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(GOODS)

    class Container(DatabaseContainer):
        goods = Connection(engine=engine)

    container = Container()
    assert find(container) == []
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO goods VALUES (1, 'tea')")
    container.shutdown_resources()
    engine.dispose()


@pytest.mark.parametrize(("timeout", "patience"), [(30, 0.2), (0.1, 5)])
def test_a_full_pool_does_not_hold_up_the_check(sqlite_url: str, timeout: float, patience: float) -> None:
    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    pool = {"size": 1, "max_overflow": 0, "timeout": timeout}
    settings = DatabaseSettings(_env_file=None, connections={"main": {"url": sqlite_url, "pool": pool}})
    container = container_of("main")(settings=settings)
    with container.transaction():
        container.main_session().connection()
        assert matters(find(container, patience=patience)) == [("silent", "main")]
    assert find(container) == []
    container.shutdown_resources()
