"""The proxy between tests and servers takes the time it should, and loses what it should and nothing else."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
import pymysql
import pytest
from sqlalchemy import make_url

from harness.paths import TESTS
from harness.proxies import Proxy
from harness.servers import MariaDBServer, PostgresServer, Server

NewUrl = Callable[[], str]


@contextmanager
def connected(url: str) -> Iterator[psycopg.Connection]:
    parts = make_url(url)
    connection = psycopg.connect(
        host=parts.host, port=parts.port, user=parts.username, password=parts.password, dbname=parts.database, autocommit=True
    )
    try:
        yield connection
    finally:
        connection.close()  # its own `with` would commit


def least_ms(connection: psycopg.Connection, statement: bytes = b"SELECT 1", calls: int = 300) -> float:
    """Milliseconds a statement takes when nobody else keeps the machine busy for a moment."""
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        connection.pgconn.exec_(statement)
        times.append(time.perf_counter() - began)
    return min(times) * 1000


def rows(url: str) -> list[int]:
    with connected(url) as outside:
        return [number for (number,) in outside.execute("SELECT id FROM t ORDER BY id")]


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[Proxy]:
    with Proxy(postgres) as proxy:
        yield proxy


@pytest.fixture
def table_url(postgres_url: str) -> str:
    """A database with a table."""
    with connected(postgres_url) as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    return postgres_url


# ---- forwarding ---------------------------------------------------------------------------------------------------------


def test_both_kinds_of_server_are_reached_by_its_url(
    postgres_url: str, mariadb_url: str, postgres: Server, mariadb: Server
) -> None:
    with Proxy(postgres) as one, Proxy(mariadb) as other:
        assert make_url(one.url(postgres_url)).port == one.port != postgres.port
        with connected(one.url(postgres_url)) as connection:
            assert connection.execute("SELECT 42").fetchone() == (42,)
        parts = make_url(other.url(mariadb_url))
        with (
            pymysql.connect(
                host=parts.host, port=parts.port or 0, user=parts.username, password=parts.password or ""
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SELECT 43")
            assert cursor.fetchone() == (43,)


@pytest.mark.parametrize("rtt", [0.0, 2.0])
def test_large_answers_and_requests_come_through_whole(rtt: float, postgres: PostgresServer, postgres_url: str) -> None:
    large = "x" * 5_000_000
    with Proxy(postgres, rtt=rtt) as proxy, connected(proxy.url(postgres_url)) as connection:
        assert connection.execute("SELECT %s::text", [large]).fetchone() == (large,)


def test_a_client_that_hangs_up_is_gone_for_the_server(proxy: Proxy, postgres: PostgresServer, table_url: str) -> None:
    with connected(proxy.url(table_url)) as connection:
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (1)")
        assert len(postgres.open_transactions(database_of(table_url))) == 1
    assert postgres.open_transactions(database_of(table_url), within=5) == []
    assert rows(table_url) == []


def test_a_server_that_is_down_is_down_for_the_client_and_comes_back(new_postgres: Callable[[], PostgresServer]) -> None:
    server = new_postgres()
    with Proxy(server) as proxy:
        url = proxy.url(server.url("postgres"))
        with connected(url) as connection:
            server.stop("immediate")
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError), connected(url):
            pass
        server.start()
        with connected(url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_it_ends_with_its_block_and_with_the_test_process(postgres: PostgresServer) -> None:
    with Proxy(postgres) as proxy:
        port = proxy.port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    program = "from harness.proxies import Proxy; p = Proxy(sys); p.__enter__(); print(p.port, flush=True); time.sleep(60)"
    program = f"import sys, time; sys.path.insert(0, {str(TESTS)!r}); sys.host, sys.port = 'localhost', 1; {program}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        socket.create_connection(("127.0.0.1", port), 5).close()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    with pytest.raises(ConnectionRefusedError):
        while time.monotonic() < deadline:
            socket.create_connection(("127.0.0.1", port), 5).close()
            time.sleep(0.01)


# ---- time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtt", [1.0, 5.0])
def test_a_round_trip_takes_what_was_asked_for_and_little_more(rtt: float, postgres: PostgresServer, postgres_url: str) -> None:
    with Proxy(postgres, rtt=rtt) as proxy, connected(postgres_url) as direct, connected(proxy.url(postgres_url)) as proxied:
        added = least_ms(proxied) - least_ms(direct)
    assert rtt - 0.05 <= added <= rtt + 0.5


def test_connections_wait_side_by_side(postgres: PostgresServer, postgres_url: str) -> None:
    with Proxy(postgres, rtt=20) as proxy, connected(proxy.url(postgres_url)) as one, connected(proxy.url(postgres_url)) as other:
        took: list[float] = []
        for _ in range(10):  # others may keep the machine busy for a moment
            began = time.perf_counter()
            for connection in (one, other):
                connection.pgconn.send_query(b"SELECT 1")
            for connection in (one, other):
                while connection.pgconn.get_result() is not None:
                    pass
            took.append(time.perf_counter() - began)
        assert 0.020 <= min(took) < 0.036


# ---- losses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["close", "stall"])
@pytest.mark.parametrize(("word", "is_done"), [("answer", [1]), ("request", [])])
def test_a_lost_answer_is_to_a_request_that_was_done_and_a_lost_request_was_not(
    word: str, is_done: list[int], then: str, proxy: Proxy, table_url: str
) -> None:
    with connected(proxy.url(table_url)) as connection:
        lost = proxy.lose(word, to=rb"INSERT", then=then)  # type: ignore[arg-type]  # each one of two words
        with failing(connection, b"INSERT INTO t VALUES (1)", proxy, stalls=then == "stall"):
            lost.wait()
            time.sleep(0.05)
            assert rows(table_url) == is_done
    assert rows(table_url) == is_done


def test_an_answer_is_lost_only_when_the_server_gives_it(proxy: Proxy, table_url: str) -> None:
    with connected(table_url) as other, connected(proxy.url(table_url)) as connection, other.transaction():
        other.execute("LOCK TABLE t")
        lost = proxy.lose("answer", to=rb"INSERT")
        with failing(connection, b"INSERT INTO t VALUES (1)", proxy, stalls=False):
            time.sleep(0.1)
            assert not lost.happened
            other.execute("COMMIT")
            lost.wait()
    assert rows(table_url) == [1]


def test_a_lost_answer_to_prepare_leaves_the_transaction_prepared(proxy: Proxy, postgres: PostgresServer, table_url: str) -> None:
    with connected(proxy.url(table_url)) as connection:
        connection.execute("BEGIN; INSERT INTO t VALUES (1)")
        proxy.lose("answer", to=rb"PREPARE TRANSACTION")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("PREPARE TRANSACTION 'one'")
    assert postgres.prepared_transactions(database_of(table_url)) == ["one"]


def test_what_the_pattern_does_not_match_passes(proxy: Proxy, table_url: str) -> None:
    with connected(proxy.url(table_url)) as connection:
        lost = proxy.lose("answer", to=rb"COMMIT(?! PREPARED)")
        connection.execute("BEGIN; INSERT INTO t VALUES (1)")
        connection.execute("PREPARE TRANSACTION 'one'")
        connection.execute("COMMIT PREPARED 'one'")
        connection.execute("BEGIN; INSERT INTO t VALUES (2)")
        assert not lost.happened
        with pytest.raises(psycopg.OperationalError):
            connection.execute("COMMIT")
        assert lost.happened
    assert rows(table_url) == [1, 2]


def test_it_loses_once_and_on_one_connection_after_as_many_as_it_was_told(proxy: Proxy, table_url: str) -> None:
    url = proxy.url(table_url)
    with connected(url) as one, connected(url) as other:
        proxy.lose("request", to=rb"INSERT", after=2)
        one.execute("INSERT INTO t VALUES (1)")
        other.execute("INSERT INTO t VALUES (2)")
        with pytest.raises(psycopg.OperationalError):
            one.execute("INSERT INTO t VALUES (3)")
        other.execute("INSERT INTO t VALUES (4)")
    with connected(url) as another:
        another.execute("INSERT INTO t VALUES (5)")
    assert rows(table_url) == [1, 2, 4, 5]


@dataclass
class Listener:
    """A server that only listens."""

    host: str
    port: int


def test_a_request_in_pieces_is_recognised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy(Listener(*server.getsockname())) as proxy:
        lost = proxy.lose("request", to=rb"PREPARE.TRANSACTION")
        with socket.create_connection((proxy.host, proxy.port), 5) as client, server.accept()[0] as accepted:
            for piece in (b"PREP", b"ARE TRANS", b"ACT"):
                client.sendall(piece)
                assert accepted.recv(100) == piece
            assert not lost.happened
            client.sendall(b"ION")
            assert accepted.recv(100) == b""
            assert lost.happened


def test_a_server_is_not_told_that_the_client_of_a_stalled_connection_is_gone(
    proxy: Proxy, postgres: PostgresServer, table_url: str
) -> None:
    with connected(proxy.url(table_url)) as connection:
        connection.execute("BEGIN; INSERT INTO t VALUES (1)")
        lost = proxy.lose("request", to=rb"COMMIT", then="stall")
        connection.pgconn.send_query(b"COMMIT")
        lost.wait()
    time.sleep(0.1)
    assert len(postgres.open_transactions(database_of(table_url))) == 1
    proxy.cut()
    assert postgres.open_transactions(database_of(table_url), within=5) == []
    assert rows(table_url) == []


def test_cutting_closes_every_connection_and_forgets_what_was_to_be_lost(proxy: Proxy, table_url: str) -> None:
    url = proxy.url(table_url)
    with connected(url) as one, connected(url) as other:
        proxy.lose("request", to=rb"INSERT")
        proxy.cut()
        for connection in (one, other):
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
    with connected(url) as another:
        another.execute("INSERT INTO t VALUES (1)")
    assert rows(table_url) == [1]


def test_mariadb_loses_its_answers_too(mariadb: MariaDBServer, mariadb_url: str) -> None:
    parts = make_url(mariadb_url)
    name, password = str(parts.database), parts.password or ""
    mariadb.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)", database=name)
    with Proxy(mariadb) as proxy:
        connection = pymysql.connect(host=proxy.host, port=proxy.port, user=parts.username, password=password, database=name)
        with connection.cursor() as cursor:
            for statement in ("XA START 'one'", "INSERT INTO t VALUES (1)", "XA END 'one'"):
                cursor.execute(statement)
            proxy.lose("answer", to=rb"XA PREPARE")
            with pytest.raises(pymysql.OperationalError):
                cursor.execute("XA PREPARE 'one'")
    deadline = time.monotonic() + 5  # it notices late that the client is gone, and only then lets others settle the branch
    while True:
        try:
            mariadb.execute("XA COMMIT 'one'")
            break
        except pymysql.Error:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert mariadb.execute("SELECT id FROM t", database=name) == [(1,)]


def database_of(url: str) -> str:
    return str(make_url(url).database)


@contextmanager
def failing(connection: psycopg.Connection, statement: bytes, proxy: Proxy, *, stalls: bool) -> Iterator[None]:
    """Send a statement that fails, at once or when the proxy is told to cut the connection, and run a block meanwhile."""
    results: list[int] = []

    def send() -> None:
        results.append(connection.pgconn.exec_(statement).status)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    if stalls:
        thread.join(0.1)
        assert thread.is_alive()
        proxy.cut()
    thread.join(5)
    assert not thread.is_alive()
    assert results == [psycopg.pq.ExecStatus.FATAL_ERROR]
