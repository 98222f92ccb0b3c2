"""Engines: tuned for their database, checked after idling, given passwords as they change, and retired gently."""

from __future__ import annotations

import gc
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import AssertionPool, NullPool, QueuePool, SingletonThreadPool, StaticPool

from app_db import ConnectionSettings, Container, DatabaseSettings, PoolSettings, container_of, retryable, transactional
from app_db._databases.engines import build_engine, retire
from harness.paths import run_python
from harness.servers import MariaDBServer, PostgresServer

_numbers = count(1)


@pytest.fixture
def new_engine() -> Iterator[Callable[..., Engine]]:
    """`new_engine(url, read_only=True)` makes an engine from the settings of a connection, and disposes it after the test."""
    made: list[Engine] = []

    def new(url: str, *, application: str = "app_db", **usage: Any) -> Engine:
        settings = DatabaseSettings(application=application, connections={"writer": ConnectionSettings(url=url, **usage)})
        made.append(build_engine("writer", settings))
        return made[-1]

    yield new
    for engine in made:
        engine.dispose()


def scalar(engine: Engine, sql: str) -> Any:
    with engine.connect() as connection:
        return connection.scalar(text(sql))


def execute(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for sql in statements:
            connection.execute(text(sql))


# ---- SQLite --------------------------------------------------------------------------------------------------------------


def test_a_sqlite_file_can_be_written_by_a_unit_that_has_read_it_first(tmp_path: Path) -> None:
    """A file that somebody else made is not in WAL mode, and can't be put into it while it is read."""
    file = tmp_path / "made.db"
    with closing(sqlite3.connect(file)) as made:
        made.execute("CREATE TABLE t (x)")
    settings = DatabaseSettings(_env_file=None, connections={"writer": {"url": f"sqlite:///{file}"}})
    container = Container(settings=settings)
    with container.transaction():
        assert container.reader_session().execute(text("SELECT x FROM t")).all() == []
        container.writer_session().execute(text("INSERT INTO t VALUES (1)"))
    container.shutdown_resources()


def test_sqlite_files_are_in_wal_mode_with_foreign_keys_and_a_busy_timeout(
    new_engine: Callable[..., Engine], sqlite_url: str
) -> None:
    engine = new_engine(sqlite_url)
    assert scalar(engine, "PRAGMA journal_mode") == "wal"
    assert scalar(engine, "PRAGMA foreign_keys") == 1
    assert scalar(engine, "PRAGMA query_only") == 0
    assert scalar(engine, "PRAGMA busy_timeout") >= 1000
    execute(engine, "CREATE TABLE a (id INTEGER PRIMARY KEY)", "CREATE TABLE b (id INTEGER REFERENCES a)")
    with pytest.raises(DBAPIError, match="FOREIGN KEY"):
        execute(engine, "INSERT INTO b VALUES (1)")


def test_a_read_only_sqlite_connection_refuses_writes_itself(new_engine: Callable[..., Engine], sqlite_url: str) -> None:
    execute(new_engine(sqlite_url), "CREATE TABLE a (id INTEGER)")
    engine = new_engine(sqlite_url, read_only=True)
    assert scalar(engine, "PRAGMA query_only") == 1
    assert scalar(engine, "SELECT count(*) FROM a") == 0
    for sql in ("INSERT INTO a VALUES (1)", "CREATE TABLE b (id INTEGER)", "DROP TABLE a"):
        with pytest.raises(DBAPIError, match="readonly"):
            execute(engine, sql)


def test_a_writable_sqlite_connection_takes_the_lock_when_it_begins(new_engine: Callable[..., Engine], sqlite_url: str) -> None:
    """A transaction that begins with a read and then writes would otherwise fail at once when somebody else has written."""
    first, second = new_engine(sqlite_url), new_engine(sqlite_url, connect_args={"timeout": 0.05})
    reader = new_engine(sqlite_url, read_only=True)
    execute(first, "CREATE TABLE a (id INTEGER)")
    with first.begin() as connection:
        connection.execute(text("SELECT count(*) FROM a"))
        with pytest.raises(OperationalError, match="locked"):
            scalar(second, "SELECT count(*) FROM a")
        assert scalar(reader, "SELECT count(*) FROM a") == 0, "readers are not held up"
        connection.execute(text("INSERT INTO a VALUES (1)"))
        assert scalar(reader, "SELECT count(*) FROM a") == 0
    assert scalar(second, "SELECT count(*) FROM a") == 1


def test_a_busy_sqlite_database_is_waited_for(new_engine: Callable[..., Engine], sqlite_url: str) -> None:
    engine = new_engine(sqlite_url)
    execute(engine, "CREATE TABLE a (id INTEGER)")
    began, waited = threading.Event(), []

    def write() -> None:
        began.wait(10)
        start = time.monotonic()
        execute(engine, "INSERT INTO a VALUES (2)")
        waited.append(time.monotonic() - start)

    thread = threading.Thread(target=write)
    thread.start()
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO a VALUES (1)"))
        began.set()
        time.sleep(0.3)
    thread.join(30)
    assert scalar(engine, "SELECT count(*) FROM a") == 2
    assert waited[0] > 0.2


@pytest.mark.parametrize("database", ["sqlite", "postgres", "mariadb"])
def test_an_engine_in_autocommit_keeps_each_statement(
    new_engine: Callable[..., Engine], database: str, request: pytest.FixtureRequest
) -> None:
    engine = new_engine(request.getfixturevalue(f"{database}_url"))
    execute(engine, "CREATE TABLE kept (id INTEGER)")
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("INSERT INTO kept VALUES (1)"))
    with engine.connect() as connection:  # the same one of the pool, and no longer in autocommit
        connection.execute(text("INSERT INTO kept VALUES (2)"))
    assert scalar(engine, "SELECT sum(id) FROM kept") == 1


def test_a_driver_that_begins_nothing_is_not_in_autocommit(new_engine: Callable[..., Engine], sqlite_url: str) -> None:
    engine = new_engine(sqlite_url, connect_args={"isolation_level": None})
    execute(engine, "CREATE TABLE kept (id INTEGER)")
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO kept VALUES (1)"))
        connection.rollback()
        assert connection.scalar(text("SELECT count(*) FROM kept")) == 0


def test_ddl_on_sqlite_is_part_of_the_transaction(new_engine: Callable[..., Engine], sqlite_url: str) -> None:
    """The fact guarded: the driver by itself begins no transaction before DDL, so that a rollback leaves the table."""
    engine = new_engine(sqlite_url)
    execute(engine, "CREATE TABLE kept (id INTEGER)")
    with pytest.raises(LookupError), engine.begin() as connection:
        connection.execute(text("CREATE TABLE undone (id INTEGER)"))
        connection.execute(text("INSERT INTO undone VALUES (1)"))
        connection.execute(text("ALTER TABLE kept ADD COLUMN more INTEGER"))
        connection.execute(text("DROP TABLE kept"))
        raise LookupError
    assert scalar(engine, "SELECT group_concat(sql) FROM sqlite_master") == "CREATE TABLE kept (id INTEGER)"


def test_savepoints_on_sqlite_undo_what_came_after_them(new_engine: Callable[..., Engine], sqlite_url: str) -> None:
    engine = new_engine(sqlite_url)
    execute(engine, "CREATE TABLE a (id INTEGER)")
    with engine.begin() as connection:
        savepoint = connection.begin_nested()
        connection.execute(text("INSERT INTO a VALUES (1)"))
        savepoint.rollback()
        with connection.begin_nested():
            connection.execute(text("INSERT INTO a VALUES (2)"))
    with pytest.raises(LookupError), engine.begin() as connection:
        with connection.begin_nested():
            connection.execute(text("INSERT INTO a VALUES (3)"))
        raise LookupError("a released savepoint is still the transaction's")
    assert scalar(engine, "SELECT group_concat(id) FROM a") == "2"


def test_reads_of_one_sqlite_transaction_see_one_state(new_engine: Callable[..., Engine], sqlite_url: str) -> None:
    engine, reader = new_engine(sqlite_url), new_engine(sqlite_url, read_only=True)
    execute(engine, "CREATE TABLE a (id INTEGER)")
    with reader.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM a")) == 0
        execute(engine, "INSERT INTO a VALUES (1)")
        assert connection.scalar(text("SELECT count(*) FROM a")) == 0
    assert scalar(reader, "SELECT count(*) FROM a") == 1


def test_a_long_sqlite_statement_is_interrupted(new_engine: Callable[..., Engine], sqlite_url: str) -> None:
    engine = new_engine(sqlite_url, statement_timeout=0.2)
    forever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    start = time.monotonic()
    with pytest.raises(OperationalError, match="interrupted"):
        scalar(engine, forever)
    assert 0.15 < time.monotonic() - start < 10
    assert scalar(engine, "SELECT 1") == 1


# ---- :memory: ------------------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:", "sqlite:///file:shop?mode=memory&uri=true"]
)
def memory(request: pytest.FixtureRequest) -> Iterator[Any]:
    container: Any = container_of("writer", "reader", "log")(
        settings=DatabaseSettings(
            connections={"writer": ConnectionSettings(url=request.param), "log": ConnectionSettings(url=request.param)}
        )
    )
    with container.transaction():
        container.writer_session().execute(text("CREATE TABLE a (id INTEGER)"))
    yield container
    container.shutdown_resources()


def ids(container: Any, name: str = "writer") -> str | None:
    with container.transaction():
        found: str | None = getattr(container, f"{name}_session")().scalar(text("SELECT group_concat(id) FROM a"))
        return found


def in_thread(function: Callable[[], Any]) -> Any:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    thread.join(30)
    return answers[0]


def test_a_memory_database_is_shared_by_threads_and_mirrors(memory: Any) -> None:
    def insert() -> None:
        with memory.transaction():
            memory.writer_session().execute(text("INSERT INTO a VALUES (1)"))

    in_thread(insert)
    assert (
        ids(memory) == ids(memory, "reader") == in_thread(lambda: ids(memory)) == in_thread(lambda: ids(memory, "reader")) == "1"
    )


def test_units_on_a_memory_database_are_isolated(memory: Any) -> None:
    with memory.transaction():
        memory.writer_session().execute(text("INSERT INTO a VALUES (1)"))
        assert in_thread(lambda: ids(memory, "reader")) is None
        assert memory.reader_session().scalar(text("SELECT count(*) FROM a")) == 0
    assert ids(memory, "reader") == "1"
    with pytest.raises(LookupError), memory.transaction():
        memory.writer_session().execute(text("INSERT INTO a VALUES (2)"))
        raise LookupError
    assert ids(memory) == "1"


def test_a_mirror_of_a_memory_database_is_read_only(memory: Any) -> None:
    with pytest.raises(DBAPIError, match="readonly"):
        execute(memory.reader_engine(), "INSERT INTO a VALUES (1)")


def test_memory_databases_of_two_connections_or_two_settings_are_two(memory: Any) -> None:
    with pytest.raises(OperationalError, match="no such table"):
        ids(memory, "log")
    other = Container(settings=DatabaseSettings(connections={"writer": ConnectionSettings(url="sqlite://")}))
    with pytest.raises(OperationalError, match="no such table"):
        ids(other)
    other.shutdown_resources()


def test_a_memory_database_outlives_its_engine(memory: Any) -> None:
    execute(memory.writer_engine(), "INSERT INTO a VALUES (1)")
    memory.shutdown_resources()
    assert ids(memory) == "1"


def test_the_file_behind_a_memory_database_goes_with_its_settings() -> None:
    settings = DatabaseSettings(connections={"writer": ConnectionSettings(url="sqlite://")})
    engine = build_engine("writer", settings)
    execute(engine, "CREATE TABLE a (id INTEGER)")
    path = Path(engine.url.database or "")
    assert path.exists()
    engine.dispose()
    del engine
    gc.collect()
    assert path.exists(), "the settings still stand for it"
    del settings
    gc.collect()
    assert not path.parent.exists()


FORKING = """
import os, sys
from pathlib import Path
from sqlalchemy import event, text
from app_db import Container, DatabaseSettings

container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
with container.transaction():
    container.writer_session().execute(text("CREATE TABLE a (id INTEGER)"))
path = Path(container.writer_engine().url.database)
child = os.fork()
if child == 0:
    with container.transaction():
        container.writer_session().execute(text("INSERT INTO a VALUES (1)"))
    sys.exit()  # with all that runs at an exit
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
with container.transaction():
    assert container.writer_session().scalar(text("SELECT count(*) FROM a")) == 1
print(path.exists(), path.parent)
"""


def test_a_childs_exit_leaves_its_parents_memory_database_and_the_parents_own_removes_it() -> None:
    existed, path = run_python("-c", FORKING).stdout.split()
    assert existed == "True"
    assert not Path(path).exists()


# ---- PostgreSQL ----------------------------------------------------------------------------------------------------------


def test_postgresql_sees_the_applications_name(new_engine: Callable[..., Engine], postgres_url: str) -> None:
    assert scalar(new_engine(postgres_url, application="shop"), "SHOW application_name") == "shop"
    assert scalar(new_engine(f"{postgres_url}?application_name=other"), "SHOW application_name") == "other"
    by_arguments = new_engine(postgres_url, connect_args={"application_name": "given"})
    assert scalar(by_arguments, "SHOW application_name") == "given"


def test_a_read_only_postgresql_connection_is_held_to_it_by_the_server(
    new_engine: Callable[..., Engine], postgres_url: str
) -> None:
    execute(new_engine(postgres_url), "CREATE TABLE a (id INTEGER)")
    engine = new_engine(postgres_url, read_only=True)
    with engine.connect() as connection:
        connection.rollback()  # a parameter set inside a transaction would go with it
        assert connection.scalar(text("SHOW default_transaction_read_only")) == "on"
        driver_connection: Any = connection.connection.driver_connection
        assert driver_connection.autocommit is True, "a read is one round trip"
    for _ in range(2):  # the second time with a connection from the pool
        with pytest.raises(DBAPIError, match="read-only transaction"):
            execute(engine, "INSERT INTO a VALUES (1)")


def test_a_long_postgresql_statement_is_stopped_by_the_server(new_engine: Callable[..., Engine], postgres_url: str) -> None:
    engine = new_engine(postgres_url, statement_timeout=0.2)
    for _ in range(2):
        with pytest.raises(OperationalError, match="statement timeout"):
            scalar(engine, "SELECT pg_sleep(10)")
        assert scalar(engine, "SHOW statement_timeout") == "200ms"


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_the_isolation_level_reaches_postgresql(new_engine: Callable[..., Engine], postgres_url: str, level: str) -> None:
    assert scalar(new_engine(postgres_url, isolation_level=level), "SHOW transaction_isolation") == level.lower()
    read_only = new_engine(postgres_url, isolation_level=level, read_only=True)
    assert scalar(read_only, "SHOW transaction_isolation") == level.lower()
    assert scalar(read_only, "SHOW transaction_read_only") == "on"


# ---- MariaDB -------------------------------------------------------------------------------------------------------------


def test_a_read_only_mariadb_connection_is_held_to_it_by_the_server(new_engine: Callable[..., Engine], mariadb_url: str) -> None:
    execute(new_engine(mariadb_url), "CREATE TABLE a (id INTEGER)")
    engine = new_engine(mariadb_url, read_only=True)
    for _ in range(2):
        with pytest.raises(DBAPIError, match="1792"):
            execute(engine, "INSERT INTO a VALUES (1)")
    assert scalar(engine, "SELECT count(*) FROM a") == 0


def test_the_isolation_level_reaches_mariadb(new_engine: Callable[..., Engine], mariadb_url: str) -> None:
    for level in ("READ COMMITTED", "SERIALIZABLE"):
        assert scalar(new_engine(mariadb_url, isolation_level=level), "SELECT @@tx_isolation") == level.replace(" ", "-")


def test_a_long_mariadb_statement_is_stopped_by_the_server(new_engine: Callable[..., Engine], mariadb_url: str) -> None:
    engine = new_engine(mariadb_url, statement_timeout=0.25)
    assert float(scalar(engine, "SELECT @@max_statement_time")) == 0.25
    start = time.monotonic()
    with pytest.raises(OperationalError, match="1969"):
        scalar(engine, "SELECT SLEEP(10)")
    assert time.monotonic() - start < 5
    assert scalar(engine, "SELECT 1") == 1


# ---- connections that have been idle ---------------------------------------------------------------------------------------


class Pings:
    """How often a pool asked whether a connection is alive."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        ping = engine.dialect.do_ping

        def counted(connection: Any) -> bool:
            self.count += 1
            return ping(connection)

        monkeypatch.setattr(engine.dialect, "do_ping", counted)


def pids(engine: Engine, number: int = 1) -> set[int]:
    """The server's processes of so many connections that are in use at the same time."""
    connections = [engine.connect() for _ in range(number)]
    try:
        return {int(connection.scalar(text("SELECT pg_backend_pid()"))) for connection in connections}
    finally:
        for connection in connections:
            connection.close()


def kill(postgres: PostgresServer, processes: set[int]) -> None:
    for process in processes:
        postgres.execute("SELECT pg_terminate_backend(%s, 5000)", [process])


def test_an_idle_connection_that_was_killed_is_replaced_without_a_word(
    new_engine: Callable[..., Engine], postgres: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(postgres_url, pool=PoolSettings(alive_window=0.05))
    pings = Pings(engine, monkeypatch)
    before = pids(engine)
    assert pings.count == 0, "a new connection is not pinged"
    time.sleep(0.1)
    assert pids(engine) == before
    assert pings.count == 1
    kill(postgres, before)
    time.sleep(0.1)
    after = pids(engine)
    assert pings.count == 2
    assert after.isdisjoint(before)


def test_a_connection_used_a_moment_ago_is_not_pinged_and_its_loss_can_be_retried(
    postgres: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DatabaseSettings(connections={"writer": ConnectionSettings(url=postgres_url, pool=PoolSettings(alive_window=60))})
    container = Container(settings=settings)
    engine = container.writer_engine()
    pings = Pings(engine, monkeypatch)
    kill(postgres, pids(engine))
    with pytest.raises(OperationalError) as caught, container.transaction():
        container.writer_session().execute(text("SELECT 1"))
    assert retryable(caught.value)
    assert scalar(engine, "SELECT 1") == 1

    attempts: list[int] = []

    @transactional(attempts=2, backoff=0)
    def work() -> None:
        attempts.append(container.writer_session().scalar(text("SELECT pg_backend_pid()")) or 0)

    container.wire(modules=[__name__])
    kill(postgres, pids(engine))
    work()
    assert len(attempts) == 1, "the first attempt failed before it had an answer, the second one had it"
    assert pings.count == 0
    container.unwire()
    container.shutdown_resources()


def test_one_dead_connection_makes_the_pool_renew_all_that_are_as_old(
    new_engine: Callable[..., Engine], postgres: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(postgres_url, pool=PoolSettings(alive_window=0.05))
    pings = Pings(engine, monkeypatch)
    before = pids(engine, 4)
    kill(postgres, before)
    time.sleep(0.1)
    after = pids(engine, 4)
    assert len(after) == 4
    assert after.isdisjoint(before)
    assert pings.count == 1


def test_sqlite_is_never_pinged(new_engine: Callable[..., Engine], sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(sqlite_url, pool=PoolSettings(alive_window=0))
    pings = Pings(engine, monkeypatch)
    for _ in range(3):
        assert scalar(engine, "SELECT 1") == 1
    assert pings.count == 0


def test_an_idle_mariadb_connection_that_was_killed_is_replaced(
    new_engine: Callable[..., Engine], mariadb: MariaDBServer, mariadb_url: str
) -> None:
    engine = new_engine(mariadb_url, pool=PoolSettings(alive_window=0.05))
    before = scalar(engine, "SELECT CONNECTION_ID()")
    mariadb.execute(f"KILL {before}")
    time.sleep(0.1)
    assert scalar(engine, "SELECT CONNECTION_ID()") != before


# ---- passwords -------------------------------------------------------------------------------------------------------------


class Rotating:
    """A password store whose password changes."""

    password = ""
    calls = 0

    @classmethod
    def current(cls) -> str:
        cls.calls += 1
        return cls.password


def quoted(password: str, backslash: str = "\\") -> str:
    return "'" + password.replace("\\", backslash).replace("'", "''") + "'"


@pytest.fixture
def role(postgres: PostgresServer) -> Iterator[str]:
    name = f"role_{next(_numbers)}"
    postgres.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    postgres.execute(f"DROP ROLE {name}")


def test_a_password_provider_is_asked_for_each_new_connection(
    new_engine: Callable[..., Engine], postgres: PostgresServer, postgres_url: str, role: str
) -> None:
    database = postgres_url.rpartition("/")[2]
    Rotating.password, Rotating.calls = "first", 0
    postgres.execute(f"ALTER ROLE {role} PASSWORD 'first'")
    url = f"postgresql+psycopg://{role}@{postgres.host}:{postgres.port}/{database}"
    engine = new_engine(url, password_provider=f"{__name__}:Rotating.current", pool=PoolSettings(alive_window=60))
    for _ in range(3):
        assert scalar(engine, "SELECT current_user") == role
    assert Rotating.calls == 1
    assert len(pids(engine, 3)) == 3
    assert Rotating.calls == 3

    Rotating.password = "second"
    postgres.execute(f"ALTER ROLE {role} PASSWORD 'second'")
    assert scalar(engine, "SELECT current_user") == role, "a connection that is open stays open"
    assert Rotating.calls == 3
    engine.dispose()
    assert scalar(engine, "SELECT current_user") == role
    assert Rotating.calls == 4

    Rotating.password = "first"
    engine.dispose()
    with pytest.raises(OperationalError, match="password authentication failed"):
        scalar(engine, "SELECT 1")


AWKWARD = ["p@ss:w/rd %25#?", "quote'\"`", "back\\slash\\n", " spaces around ", "100%", "a+b&c=d;e", "${HOME}$1{x}"]
AWKWARD += ["%(percent)s %s", "[x]@[::1]", "ünï©ødé ✓"]


@pytest.mark.representative("*-p@ss:w/rd %25#?", "provider-100%")
@pytest.mark.parametrize("password", AWKWARD)
@pytest.mark.parametrize("by", ["url", "parts", "provider"])
def test_awkward_passwords_log_in_on_postgresql(
    new_engine: Callable[..., Engine], postgres: PostgresServer, postgres_url: str, role: str, *, password: str, by: str
) -> None:
    postgres.execute(f"ALTER ROLE {role} PASSWORD {quoted(password)}")
    place = {"host": postgres.host, "port": postgres.port, "database": postgres_url.rpartition("/")[2]}
    check_login(new_engine, by, driver="postgresql+psycopg", user=role, password=password, place=place)


@pytest.mark.representative("*-p@ss:w/rd %25#?")
@pytest.mark.parametrize("password", AWKWARD)
@pytest.mark.parametrize("by", ["url", "parts", "provider"])
def test_awkward_passwords_log_in_on_mariadb(
    new_engine: Callable[..., Engine], mariadb: MariaDBServer, mariadb_url: str, password: str, by: str
) -> None:
    user = f"user_{next(_numbers)}"
    database = mariadb_url.rpartition("/")[2]
    mariadb.execute(f"CREATE USER {user}@'127.0.0.1' IDENTIFIED BY {quoted(password, chr(92) * 2)}")
    mariadb.execute(f"GRANT ALL ON `{database}`.* TO {user}@'127.0.0.1'")
    try:
        place = {"host": mariadb.host, "port": mariadb.port, "database": database}
        check_login(new_engine, by, driver="mysql+pymysql", user=user, password=password, place=place)
    finally:
        mariadb.execute(f"DROP USER {user}@'127.0.0.1'")


def check_login(
    new_engine: Callable[..., Engine], by: str, *, driver: str, user: str, password: str, place: dict[str, Any]
) -> None:
    if by == "url":
        engine = new_engine(f"{driver}://{user}:{quote(password, safe='')}@{place['host']}:{place['port']}/{place['database']}")
    else:
        Rotating.password = password
        secret = {"password": password} if by == "parts" else {"password_provider": f"{__name__}:Rotating.current"}
        engine = new_engine(None, driver=driver, user=user, **place, **secret)
    assert scalar(engine, "SELECT current_user").partition("@")[0] == user
    assert password not in repr(engine)


# ---- the pool --------------------------------------------------------------------------------------------------------------


def test_the_settings_of_a_pool_reach_it(new_engine: Callable[..., Engine], sqlite_url: str) -> None:
    pool: Any = new_engine(sqlite_url, pool=PoolSettings(size=2, max_overflow=1, timeout=0.1, recycle=77, use_lifo=False)).pool
    assert isinstance(pool, QueuePool)
    assert (pool.size(), pool._max_overflow, pool.timeout(), pool._recycle, pool._pool.use_lifo) == (2, 1, 0.1, 77, False)
    defaults: Any = new_engine(sqlite_url).pool
    assert (defaults.size(), defaults._max_overflow, defaults.timeout(), defaults._recycle, defaults._pool.use_lifo) == (
        5,
        10,
        30,
        -1,
        True,
    )


def test_a_full_pool_refuses_after_its_timeout(new_engine: Callable[..., Engine], postgres_url: str) -> None:
    engine = new_engine(postgres_url, pool=PoolSettings(size=1, max_overflow=1, timeout=0.1))
    with engine.connect(), engine.connect():
        start = time.monotonic()
        with pytest.raises(PoolTimeout):
            engine.connect()
        assert 0.05 < time.monotonic() - start < 5
    engine.connect().close()


@pytest.mark.parametrize("use_lifo", [True, False])
def test_the_pool_gives_out_what_came_back_last_or_first(
    new_engine: Callable[..., Engine], postgres_url: str, use_lifo: bool
) -> None:
    engine = new_engine(postgres_url, pool=PoolSettings(use_lifo=use_lifo))
    first, second = engine.connect(), engine.connect()
    of_first, of_second = (connection.scalar(text("SELECT pg_backend_pid()")) for connection in (first, second))
    first.close()
    second.close()
    assert scalar(engine, "SELECT pg_backend_pid()") == (of_second if use_lifo else of_first)


def test_a_connection_is_recycled_when_it_is_old(new_engine: Callable[..., Engine], postgres_url: str) -> None:
    engine = new_engine(postgres_url, pool=PoolSettings(recycle=0.2))
    before = pids(engine)
    assert pids(engine) == before
    time.sleep(0.3)
    assert pids(engine) != before


@pytest.mark.parametrize(
    ("name", "pool_class"),
    [
        (None, QueuePool),
        ("queue", QueuePool),
        ("null", NullPool),
        ("static", StaticPool),
        ("sqlalchemy.pool:AssertionPool", AssertionPool),
        ("sqlalchemy.pool:SingletonThreadPool", SingletonThreadPool),
        (f"{__name__}:PoolOfOurOwn", "PoolOfOurOwn"),
    ],
)
def test_the_class_of_a_pool_can_be_chosen(
    new_engine: Callable[..., Engine], sqlite_url: str, name: str | None, pool_class: Any
) -> None:
    engine = new_engine(sqlite_url, pool=PoolSettings(class_=name))
    assert type(engine.pool).__name__ == (pool_class if isinstance(pool_class, str) else pool_class.__name__)
    execute(engine, "CREATE TABLE a (id INTEGER)", "INSERT INTO a VALUES (1)")
    assert scalar(engine, "SELECT count(*) FROM a") == 1


class PoolOfOurOwn(QueuePool):
    """Named by an import string."""


def test_without_a_pool_no_connection_is_kept(new_engine: Callable[..., Engine], postgres_url: str) -> None:
    engine = new_engine(postgres_url, pool=PoolSettings(class_="null"))
    assert pids(engine) != pids(engine)


def test_echo_logs_statements_under_the_connections_name(
    new_engine: Callable[..., Engine], sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert scalar(new_engine(sqlite_url), "SELECT 'quiet'") == "quiet"
    assert scalar(new_engine(sqlite_url, echo=True), "SELECT 'loud'") == "loud"
    messages = [(record.name, record.getMessage()) for record in caplog.records]
    assert ("sqlalchemy.engine.Engine.writer", "SELECT 'loud'") in messages
    assert not [message for _, message in messages if "quiet" in message]


# ---- retiring --------------------------------------------------------------------------------------------------------------


def test_a_retired_engine_closes_idle_connections_now_and_those_in_use_when_they_come_back(
    new_engine: Callable[..., Engine], postgres: PostgresServer, postgres_url: str
) -> None:
    engine = new_engine(postgres_url, application="retiring")

    def alive() -> int:
        return int(postgres.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'retiring'")[0][0])

    def becomes(wanted: int) -> bool:
        for _ in range(200):
            if alive() == wanted:
                return True
            time.sleep(0.02)
        return False

    with engine.connect() as in_use:
        pids(engine, 2)
        assert becomes(3)
        retire(engine)
        assert becomes(1)
        assert in_use.scalar(text("SELECT 1")) == 1
    assert becomes(0)
    assert scalar(engine, "SELECT 1") == 1, "a retired engine still works, and keeps nothing"
    assert becomes(0)


def test_a_retired_sqlite_engine_closes_what_is_in_use_when_it_comes_back(
    new_engine: Callable[..., Engine], sqlite_url: str
) -> None:
    """Cleaning a connection up and closing it both happen when it comes back, in this order."""
    engine = new_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE a (id INTEGER)"))
        driver_connection = connection.connection.driver_connection
        retire(engine)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        driver_connection.execute("SELECT 1")  # type: ignore[union-attr]
    assert scalar(engine, "SELECT count(*) FROM a") == 0


@pytest.mark.parametrize("options", [{"read_only": True}, {"timeout": 30}, {}], ids=str)
def test_an_engine_reset_in_mid_unit_lets_the_unit_end_as_it_would(database_url: str, options: dict[str, Any]) -> None:
    """What a unit changed on its connection is taken back when that comes back, which must not hit one that is closed already."""
    container = Container(settings=DatabaseSettings(connections={"writer": ConnectionSettings(url=database_url)}))
    with container.transaction(**options):
        session = container.writer_session()
        assert session.scalar(text("SELECT 1")) == 1
        container.writer.engine.reset()
        assert session.scalar(text("SELECT 2")) == 2
    with container.transaction():
        container.writer_session().execute(text("CREATE TABLE a (id INTEGER)"))
    container.shutdown_resources()


def test_a_password_in_a_urls_query_is_not_shown_by_the_engine() -> None:
    settings = DatabaseSettings(
        connections={"writer": {"url": "postgresql+psycopg://me@127.0.0.1:1/shop?password=hunter2&connect_timeout=3"}}
    )
    engine = build_engine("writer", settings)
    assert "hunter2" not in f"{engine!r} {engine.url!r} {engine.url}"
    assert engine.url.query == {"connect_timeout": "3"}
    arguments: list[dict[str, Any]] = []
    event.listen(engine, "do_connect", lambda dialect, record, positional, named: arguments.append(named))
    with pytest.raises(OperationalError):
        engine.connect()
    assert arguments[0]["password"] == "hunter2"
