"""ping and pool: what databases tell about themselves, and about who is connected."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from time import monotonic

import pytest
from sqlalchemy import create_engine, make_url, text

from app_db.cli import _pools, main
from harness.commands import app_db, in_terminal
from harness.poolers import PgBouncer
from harness.requiring import made
from harness.schemas import validated
from harness.servers import PASSWORD, PostgresServer, PostgresStandby

NewUrl = Callable[[], str]

NOWHERE = "postgresql+psycopg://shop:s3cr3t@127.0.0.1:1/shop"


def variables(connections: Mapping[str, dict[str, str]]) -> dict[str, str]:
    return {
        f"APP_DB_CONNECTIONS__{name}__{field}".upper(): value
        for name, given in connections.items()
        for field, value in given.items()
    }


@contextmanager
def in_transaction(url: str) -> Iterator[None]:
    """Hold a transaction open, as another process would."""
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        yield
    engine.dispose()


# ---- ping ------------------------------------------------------------------------------------------------------------------


def test_each_database_answers(database_url: str) -> None:
    with in_transaction(database_url):
        """Makes the file, if it is one."""
    done = app_db("ping", "--json", environment=variables({"main": {"url": database_url}}))
    [told] = validated("ping", done.stdout)["connections"]
    assert (done.returncode, told["name"], told["status"], told["reason"]) == (0, "main", "up", "")
    assert told["milliseconds"] > 0
    assert told["version"]


def test_a_standby_tells_its_role_and_its_lag(
    new_postgres: Callable[..., PostgresServer], new_standby: Callable[[PostgresServer], PostgresStandby]
) -> None:
    primary = new_postgres()
    standby = new_standby(primary)
    given = {"writer": {"url": primary.url("postgres")}, "copy": {"url": standby.url("postgres"), "read_only": "true"}}
    done = app_db("ping", "writer", "copy", environment=variables(given))
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert done.returncode == 0
    assert " primary " in lines["writer"]
    assert " replica, 0.0 s behind " in lines["copy"]


def test_a_connection_of_the_container_without_settings_is_told(sqlite_url: str) -> None:
    Path("shop.py").write_text(
        "from app_db import Connection, DatabaseContainer\n"
        "class Shop(DatabaseContainer):\n    main = Connection()\n    nowhere = Connection()\n"
    )
    given = variables({"main": {"url": sqlite_url}})
    with in_transaction(sqlite_url):
        """Makes the file."""
    done = app_db("ping", "--json", "--container", "shop:Shop", environment=given)
    main_, nowhere = validated("ping", done.stdout)["connections"]
    assert (done.returncode, main_["status"], nowhere["status"]) == (1, "up", "down")
    assert nowhere["reason"] == "it has no settings. Set APP_DB_CONNECTIONS__NOWHERE__URL"
    assert app_db("ping", "main", "--container", "shop:Shop", environment=given).returncode == 0


@pytest.mark.parametrize("problem", ["down", "wrong password"])
def test_a_database_that_does_not_answer_is_down_and_no_secret_is_shown(problem: str, postgres_url: str) -> None:
    url = NOWHERE
    if problem == "wrong password":
        server = make_url(postgres_url)
        url = server.set(username="nobody_of_that_name", password="s3cr3t").render_as_string(hide_password=False)
    done = in_terminal("ping", environment=variables({"main": {"url": url}}))
    assert done.code == 1
    assert " down " in done.text
    assert "s3cr3t" not in done.raw


def test_a_pooler_is_told(postgres: PostgresServer, postgres_url: str) -> None:
    pooler = made(lambda: PgBouncer(postgres))
    try:
        url = pooler.url(str(make_url(postgres_url).database))
        done = app_db("ping", "--json", environment=variables({"main": {"url": url, "pooler": "transaction"}}))
    finally:
        pooler.close()
    [told] = validated("ping", done.stdout)["connections"]
    assert (done.returncode, told["pooler"]) == (0, True)
    assert PASSWORD not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ping", "mian"], "There is no connection 'mian'. Did you mean 'main'?"),
        (["pool", "mian"], "There is no connection 'mian'. Did you mean 'main'?"),
        (["ping", "--timeout", "0"], "--timeout 0: give more than 0 seconds"),
        (["ping", "--timeout", "soon"], "argument --timeout: 'soon' is no number of seconds. Give 0 or more"),
    ],
)
def test_what_can_not_be_asked_is_one_clear_error(arguments: list[str], says: str, sqlite_url: str) -> None:
    done = app_db(*arguments, environment=variables({"main": {"url": sqlite_url}}))
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


# ---- pool ------------------------------------------------------------------------------------------------------------------


def test_who_holds_a_transaction_open_is_listed_first(postgres_url: str) -> None:
    named = f"{postgres_url}{'&' if '?' in postgres_url else '?'}application_name=nightly"
    idle = create_engine(postgres_url)
    with in_transaction(named), idle.connect() as connection:
        connection.rollback()
        done = app_db("pool", "--json", environment=variables({"main": {"url": postgres_url}}))
        shown = app_db("pool", environment=variables({"main": {"url": postgres_url}}))
    idle.dispose()
    [told] = validated("pool", done.stdout)["connections"]
    assert (done.returncode, told["error"]) == (0, None)
    assert (told["sessions"][0]["client"], told["sessions"][0]["state"]) == ("nightly", "idle in transaction")
    assert told["sessions"][0]["in_transaction"] >= 0
    assert [each["in_transaction"] for each in told["sessions"] if each["state"] == "idle"] == [None]
    assert "nightly" in shown.stdout.splitlines()[1]


def test_a_mirror_has_the_connections_of_what_it_mirrors(postgres_url: str) -> None:
    """A reader that is not configured is one of the writer."""
    Path("shop.py").write_text(
        "from app_db import Connection, DatabaseContainer\n"
        "class Shop(DatabaseContainer):\n    writer, reader = Connection(), Connection()\n"
    )
    with in_transaction(postgres_url):
        done = app_db(
            "pool", "reader", "--json", "--container", "shop:Shop", environment=variables({"writer": {"url": postgres_url}})
        )
    [told] = validated("pool", done.stdout)["connections"]
    assert (done.returncode, told["name"], len(told["sessions"])) == (0, "writer", 1)


def test_connections_of_mariadb_are_listed(mariadb_url: str) -> None:
    engine = create_engine(mariadb_url)
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE goods (name VARCHAR(20)) ENGINE=InnoDB"))
        connection.execute(text("INSERT INTO goods VALUES ('pen')"))
        done = app_db("pool", "--json", environment=variables({"main": {"url": mariadb_url}}))
    engine.dispose()
    [told] = validated("pool", done.stdout)["connections"]
    assert (done.returncode, len(told["sessions"])) == (0, 1)
    assert told["sessions"][0]["state"] == "Sleep"


@pytest.mark.parametrize("server", ["postgres_url", "mariadb_url"])
def test_a_session_that_waits_for_a_lock_names_the_one_that_holds_it(server: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(server)
    engine = create_engine(url)
    own_id = text("SELECT pg_backend_pid()" if server == "postgres_url" else "SELECT CONNECTION_ID()")
    change = text("UPDATE goods SET name = 'ink'")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE goods (name VARCHAR(20))"))
        connection.execute(text("INSERT INTO goods VALUES ('pen')"))
    with engine.connect() as holder, engine.connect() as waiter:
        holding, waiting = holder.scalar(own_id), waiter.scalar(own_id)
        holder.execute(change)
        thread = Thread(target=waiter.execute, args=(change,))
        thread.start()
        deadline = monotonic() + 20
        blocked: dict[int, list[int]] = {}
        while not any(blocked.values()) and monotonic() < deadline:
            done = app_db("pool", "--json", environment=variables({"main": {"url": url}}))
            [told] = validated("pool", done.stdout)["connections"]
            blocked = {each["id"]: each["blocked_by"] for each in told["sessions"]}
        shown = app_db("pool", environment=variables({"main": {"url": url}})).stdout.splitlines()
        holder.rollback()
        thread.join()
    engine.dispose()
    assert blocked == {holding: [], waiting: [holding]}
    assert shown[0].endswith("  waits for")
    assert [line.split()[1] for line in shown if line.endswith(f"  {holding}")] == [str(waiting)]


def test_a_server_without_other_connections_is_told(postgres_url: str) -> None:
    done = app_db("pool", environment=variables({"main": {"url": postgres_url}}))
    assert (done.returncode, done.stdout) == (0, "main: there is no other connection that its user may see\n")


def test_a_file_has_no_server_and_a_server_that_is_down_is_told(sqlite_url: str) -> None:
    done = app_db("pool", environment=variables({"file": {"url": sqlite_url}, "gone": {"url": NOWHERE}}))
    assert done.returncode == 1
    assert "file: SQLite has no server that lists connections; container.pools() lists those of its own process" in done.stdout
    assert not Path(make_url(sqlite_url).database or "").exists()
    assert "gone: " in done.stdout
    assert "s3cr3t" not in done.stdout + done.stderr


def test_a_database_that_can_not_be_asked_keeps_no_other_from_being_listed(
    postgres: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_pools, "_PATIENCE", 1.0)
    monkeypatch.syspath_prepend(".")
    Path("passwords.py").write_text("def fail():\n    raise ValueError('s3cr3t')\n")
    pooler = made(lambda: PgBouncer(postgres))
    with socket.socket() as silent, in_transaction(postgres_url):
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        given = {
            "main": {"url": postgres_url},
            "pooled": {"url": pooler.url(make_url(postgres_url).database or "")},
            "secret": {"url": NOWHERE.replace(":s3cr3t", ""), "password_provider": "passwords:fail"},
            "silent": {"url": NOWHERE.replace(":1/", f":{silent.getsockname()[1]}/")},
        }
        for variable, value in variables(given).items():
            monkeypatch.setenv(variable, value)
        try:
            assert main(["pool", "--json"]) == 1
        finally:
            pooler.close()
    shown = capsys.readouterr()
    told = {each["name"]: each for each in validated("pool", shown.out)["connections"]}
    assert "s3cr3t" not in shown.out + shown.err
    assert told["main"]["sessions"][0]["state"] == "idle in transaction"
    assert told["pooled"]["error"].startswith("APP_DB_CONNECTIONS__POOLED__POOLER: is not set, and a pooler")
    assert told["secret"]["error"] == "ValueError"
    assert told["silent"]["error"] == "no answer within 1 s"
