"""The test servers keep what they promise to the other tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, inspect, make_url, text

from harness import servers
from harness.paths import PYTHONPATH, TESTS
from harness.servers import PASSWORD, MariaDBServer, PostgresServer, Server, ServerFailed

NewPostgres = Callable[..., PostgresServer]
NewMariaDB = Callable[..., MariaDBServer]


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Server:
    found = request.getfixturevalue({"postgresql": "postgres"}.get(request.param, request.param))
    assert isinstance(found, Server)
    return found


@pytest.fixture(params=["postgresql", "mariadb"])
def own_server(request: pytest.FixtureRequest) -> Server:
    found = request.getfixturevalue({"postgresql": "new_postgres"}.get(request.param, f"new_{request.param}"))()
    assert isinstance(found, Server)
    return found


def test_fresh_databases_are_empty_and_separate(new_database_url: Callable[[], str]) -> None:
    first, second = new_database_url(), new_database_url()
    with connected(first) as connection:
        connection.execute(text("CREATE TABLE here_only (id INTEGER PRIMARY KEY)"))
        connection.commit()
        assert inspect(connection).get_table_names() == ["here_only"]
    with connected(second) as connection:
        assert inspect(connection).get_table_names() == []


def test_a_database_that_was_lent_is_as_good_as_new_for_the_next_who_asks(server: Server) -> None:
    with server.lend_database() as first, connected(server.url(first)) as connection:
        connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))
        connection.execute(text("CREATE VIEW v AS SELECT id FROM t"))
        if server.name == "postgresql":
            connection.execute(text("CREATE SCHEMA s CREATE TABLE u (id INTEGER PRIMARY KEY)"))
            connection.execute(text(f"ALTER DATABASE {first} SET statement_timeout = '7s'"))
        connection.commit()
    with server.lend_database() as second, connected(server.url(second)) as connection:
        assert (second == first) == (server.name == "postgresql")  # which takes long to make one
        looked = inspect(connection)
        assert [*looked.get_table_names(), *looked.get_view_names()] == []
        assert "s" not in looked.get_schema_names()
        if server.name == "postgresql":
            assert connection.scalar(text("SHOW statement_timeout")) == "0"
        connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))


def test_nobody_is_lent_a_database_that_somebody_may_still_use(server: Server) -> None:
    with server.lend_database() as first:
        engine = create_engine(server.url(first))
        engine.connect().close()  # and stays in the pool
    with server.lend_database() as second:
        assert second != first
    engine.dispose()


def test_a_database_is_dropped_although_it_is_in_use_and_holds_a_prepared_transaction(server: Server) -> None:
    with server.lend_database() as name, connected(server.url(name)) as connection:
        connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))
        connection.commit()
        prepared = connection.begin_twophase("shop:1:in_use")
        connection.execute(text("INSERT INTO t VALUES (1)"))
        prepared.prepare()
        assert len(server.prepared_transactions(name)) == 1
        connection.invalidate()
        # Somebody else is still there, in the middle of a transaction, when the block drops the database.
        leftover = create_engine(server.url(name)).connect()
        leftover.execute(text("SELECT 1"))
    assert server.prepared_transactions(name) == []
    leftover.invalidate()
    leftover.close()


def test_open_transactions_are_seen_until_they_end(server: Server) -> None:
    with server.lend_database() as name, connected(server.url(name)) as connection:
        connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))
        connection.commit()
        assert server.open_transactions(name) == []
        connection.execute(text("INSERT INTO t VALUES (1)"))
        assert len(server.open_transactions(name)) == 1
        connection.commit()
        assert server.open_transactions(name) == []


def test_a_server_survives_an_immediate_stop_with_what_was_committed_and_prepared(own_server: Server) -> None:
    own_server.create_database("shop")
    with connected(own_server.url("shop")) as connection:
        connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))
        connection.execute(text("INSERT INTO t VALUES (1)"))
        connection.commit()
        prepared = connection.begin_twophase("kept")
        connection.execute(text("INSERT INTO t VALUES (2)"))
        prepared.prepare()
        own_server.stop("immediate")
        assert not own_server.running
        connection.invalidate()
    with pytest.raises(Exception, match=r"(?i)refused|can't connect"):
        own_server.execute("SELECT 1")
    own_server.start()
    assert own_server.execute("SELECT id FROM t", database="shop") == [(1,)]
    assert len(own_server.prepared_transactions("shop")) == 1


def test_a_closed_server_leaves_nothing_behind(own_server: Server) -> None:
    pid = own_server.pid
    own_server.close()
    own_server.close()
    assert not own_server.directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_server_is_never_root_and_listens_to_this_machine_only(server: Server) -> None:
    status = Path(f"/proc/{server.pid}/status").read_text()
    uids = next(line.split()[1:] for line in status.splitlines() if line.startswith("Uid:"))
    assert "0" not in uids
    assert make_url(server.url("x")).host == "127.0.0.1"


def test_urls_quote_their_awkward_password(server: Server) -> None:
    url = server.url("x")
    assert PASSWORD not in url
    assert make_url(url).password == PASSWORD


def test_a_wrong_password_is_refused(server: Server) -> None:
    with pytest.raises(Exception, match=r"(?i)password"), connected(server.url("postgres", password="wrong")):
        pass


def test_settings_are_the_servers(new_postgres: NewPostgres, new_mariadb: NewMariaDB) -> None:
    postgres = new_postgres(settings={"max_prepared_transactions": 0, "log_statement": "all"})
    assert postgres.execute("SHOW max_prepared_transactions") == [("0",)]
    assert any("SHOW max_prepared_transactions" in line for line in postgres.log_lines())
    assert new_mariadb(settings={"max_connections": 17}).execute("SELECT @@max_connections") == [(17,)]


@pytest.mark.parametrize("version", sorted(PostgresServer.folders))
def test_postgresql_comes_in_several_versions(new_postgres: NewPostgres, version: int) -> None:
    [(found,)] = new_postgres(version).execute("SHOW server_version")
    assert found.split(".")[0] == str(version)


def test_a_server_that_can_not_start_says_why(new_postgres: NewPostgres) -> None:
    with pytest.raises(ServerFailed, match="no_such_setting"):
        new_postgres(settings={"no_such_setting": 1})


def test_a_killed_test_process_takes_its_server_along(postgres: PostgresServer) -> None:
    """`postgres` is asked for only so that this is skipped where PostgreSQL is missing."""
    program = f"""
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from harness.servers import PostgresServer
server = PostgresServer().start()
print(server.pid, server.directory, flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        pid, directory = child.stdout.readline().split()
        child.send_signal(signal.SIGKILL)
        child.wait()
    deadline = time.monotonic() + 10
    while (Path(directory).exists() or _alive(int(pid))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(directory).exists()
    assert not _alive(int(pid))
    assert postgres.running


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    # An orphan waits for init to bury it: dead all the same.
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


WITHOUT_MARIADB = """
from harness import servers

def missing():
    raise servers.ServerMissing("MariaDB", "no mariadbd here", "Install it.")

servers.mariadb_program = missing
"""


SKIPPING = """
import pytest

def test_it(mariadb_url): ...

def test_it_again(mariadb_url): ...

def test_another():
    pytest.skip("it is no weather for this")
"""


@pytest.mark.representative("1")
@pytest.mark.parametrize("required", ["", "1"])
def test_a_missing_server_is_announced_in_one_line_and_a_failure_where_it_is_required(tmp_path: Path, required: str) -> None:
    (tmp_path / "without_mariadb.py").write_text(WITHOUT_MARIADB)
    (tmp_path / "test_it.py").write_text(SKIPPING)
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    path = [PYTHONPATH, str(tmp_path)]
    environment = {**os.environ, "APP_DB_TEST_REQUIRE_SERVERS": required, "PYTHONPATH": os.pathsep.join(path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-ra",
        "-p",
        "without_mariadb",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",  # it would import trio, which warns
        "--rootdir",
        str(tmp_path),
    ]
    report = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    *lines, closing = report.stdout.splitlines()
    assert "mariadb    MISSING, not found: no mariadbd here" in report.stdout.partition("collected")[0]
    assert "test_it.py:9: it is no weather for this" in report.stdout
    if required:
        assert report.returncode == 1
        assert "1 skipped, 2 errors" in closing
        assert "no mariadbd here. Install it. APP_DB_TEST_REQUIRE_SERVERS is set, so this is a failure." in report.stdout
    else:
        assert report.returncode == 0
        assert "1 skipped, 2 without MariaDB" in closing
        assert lines[-1] == "2 tests were skipped, because MariaDB is missing: no mariadbd here. Install it."
        assert report.stdout.count("Install it.") == 1


@pytest.mark.parametrize("hidden", ["postgresql", "mariadb"])
def test_a_server_can_be_hidden_from_the_tests(hidden: str, tmp_path: Path, postgres: object) -> None:
    """`postgres` is asked for only so that this is skipped where PostgreSQL is missing."""
    program = tmp_path / "mariadbd"
    program.write_text("#!/bin/sh\necho mariadbd Ver 99.1.2-MariaDB")
    program.chmod(0o755)

    def found(**variables: str) -> dict[str, str]:
        path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, **variables}
        command = [sys.executable, servers.__file__]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        return dict(line.split(": ", 1) for line in said.splitlines())

    there = found()
    assert there["mariadb"] == "99.1.2"
    assert there["postgresql"].startswith("18.")
    assert found(APP_DB_TEST_WITHOUT=hidden) == {**there, hidden: f"not found: APP_DB_TEST_WITHOUT={hidden} hides it"}


def test_no_setting_of_the_developers_reaches_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [variable for variable in os.environ if variable.startswith("APP_DB_") or variable == "DATABASE_URL"]
    assert not Path(".env").exists()
