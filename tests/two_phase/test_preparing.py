"""Branches are prepared and settled on real servers, by several connections at once, and what is said of each afterwards is true:
done, refused or unknown. Limits of the servers that others rely on are tested here, too."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psycopg
import pymysql
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from app_db._databases.concurrent_statements import Answer, NonBlockingConnection, Outcome, Results, execute_together
from app_db._databases.mysql import MySQLPrepareVerbs
from app_db._databases.postgresql import PostgreSQLPrepareVerbs
from app_db._databases.prepare_verbs import Prepared, PrepareVerbs, Settling
from app_db._databases.registry import database_of
from app_db._two_phase.xids import Xid, new_log_id, new_unit_id
from app_db._units import branch_connections
from harness.choosing import mostly
from harness.proxies import Proxy
from harness.requiring import started
from harness.servers import PASSWORD, USER, MariaDBServer, PostgresServer, Server
from harness.versions import NOTIFIES_IS_DEAF

postgresql, mysql = PostgreSQLPrepareVerbs(), MySQLPrepareVerbs()

DONE = Answer(Outcome.DONE)

NewUrl = Callable[[], str]


def verbs_of(driver_name: str) -> PrepareVerbs | None:
    dialect, _, driver = driver_name.partition("+")
    return database_of(dialect).prepare_verbs(driver)


def all_done(came: Results[Any]) -> bool:
    return all(answer.outcome is Outcome.DONE for answer in came.answers.values())


def new_xid(connection: str = "writer") -> str:
    return str(Xid("shop", new_unit_id(new_log_id()), connection))


# ---- places -------------------------------------------------------------------------------------------------------------


class Place:
    """A database with a table `items`, ways to it, and the verbs that prepare in it."""

    def __init__(self, server: Server, url: str, stack: ExitStack) -> None:
        self.server = server
        self.url = url
        self._stack = stack
        self.engine = self.new_engine(poolclass=NullPool)
        found = verbs_of(self.engine.url.drivername)
        assert found is not None
        self.verbs: PrepareVerbs = found
        self.is_mysql = isinstance(found, MySQLPrepareVerbs)
        with self.settler() as connection:
            connection.exec_driver_sql("CREATE TABLE items (id integer PRIMARY KEY, name varchar(20))")

    def new_engine(self, url: str | None = None, **options: Any) -> Engine:
        engine = create_engine(url or self.url, **options)
        self._stack.callback(engine.dispose)
        return engine

    def driver_connection(self, url: str | None = None) -> Any:
        """A connection of the driver's own, not in autocommit; closed after the test."""
        dialect = self.engine.dialect
        positional, named = dialect.create_connect_args(make_url(url or self.url))
        connection: Any = dialect.connect(*positional, **named)
        self._stack.callback(close, connection)
        return connection

    @contextmanager
    def settler(self) -> Generator[Connection]:
        """A connection in autocommit, as recovery uses it."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection

    def names(self) -> list[str]:
        with self.settler() as connection:
            return list(connection.scalars(text("SELECT name FROM items ORDER BY id")))

    def begin(self, xid: str, *statements: str) -> Any:
        """Begin a branch on a connection of the driver's and execute some statements in it."""
        connection = self.driver_connection()
        execute(connection, *self.verbs.start(xid), *statements)
        return connection

    def prepared(self, xid: str, *statements: str) -> Any:
        """Prepare a branch; return the connection that did."""
        connection = self.begin(xid, *(statements or ["INSERT INTO items VALUES (1, 'a')"]))
        assert self.say(connection, *self.verbs.prepare(xid)) == DONE
        return connection

    def line(self, connection: Any) -> NonBlockingConnection:
        return self.verbs.non_blocking(connection)

    def say(self, connection: Any, *statements: str, regardless: bool = False) -> Answer:
        if not regardless:
            return execute_together({"it": (self.line(connection), statements)}).answers["it"]
        try:
            branch_connections.say(connection, statements, regardless=True)
        except Exception as error:
            return Answer(Outcome.REFUSED, error)
        return DONE

    def in_doubt(self) -> list[Prepared]:
        with self.settler() as connection:
            return [found for found in self.verbs.prepared(connection) if Xid.parse(found.xid) is not None]

    def settle(self, xid: str, *, commit: bool, within: float = 0.0) -> Settling:
        """Settle as recovery would: try again for a while when somebody holds the branch."""
        deadline = time.monotonic() + within
        with self.settler() as connection:
            while True:
                came_to = self.verbs.settle(connection, xid, commit=commit)
                if came_to is not Settling.HELD or time.monotonic() > deadline:
                    return came_to
                time.sleep(0.02)


def close(connection: Any) -> None:
    with suppress(pymysql.err.Error):  # it is closed already
        connection.close()


def execute(connection: Any, *statements: str) -> None:
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


@pytest.fixture(scope="module")
def postgres_16() -> Iterator[PostgresServer]:
    server = started(lambda: PostgresServer(16))
    yield server
    server.close()


@pytest.fixture(params=mostly(["postgres", "postgres_16", "mariadb"], exhaustive="postgres_16"))
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    server: Server = request.getfixturevalue(request.param)
    with server.lend_database() as name, ExitStack() as stack:
        yield Place(server, server.url(name), stack)


@pytest.fixture
def pg(postgres: PostgresServer, postgres_url: str) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(postgres, postgres_url, stack)


@pytest.fixture
def my(mariadb: MariaDBServer, mariadb_url: str) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(mariadb, mariadb_url, stack)


@contextmanager
def interrupted(*delays: float) -> Generator[None]:
    """Press Ctrl-C so many seconds after the block has begun."""
    # To the main thread, which waits: a signal that another thread gets is noticed at the next look around only.
    waiting = threading.main_thread().ident
    timers = [threading.Timer(delay, signal.pthread_kill, [waiting, signal.SIGINT]) for delay in delays]
    for timer in timers:
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()


SLEEP = {"postgresql": "SELECT pg_sleep({})", "mysql": "DO SLEEP({})"}


def sleep(place: Place, seconds: float) -> str:
    return SLEEP[place.engine.dialect.name].format(seconds)


# ---- preparing and settling, everywhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("commit", "names"), [(True, ["a"]), (False, [])])
def test_a_prepared_branch_is_settled_by_the_connection_that_prepared_it(commit: bool, names: list[str], place: Place) -> None:
    xid = new_xid()
    connection = place.prepared(xid)
    assert [branch.xid for branch in place.in_doubt()] == [xid]
    assert place.names() == []
    end = place.verbs.commit_prepared if commit else place.verbs.roll_back_prepared
    assert place.say(connection, *end(xid)) == DONE
    assert (place.names(), place.in_doubt()) == (names, [])


@pytest.mark.parametrize(("commit", "names"), [(True, ["a"]), (False, [])])
def test_a_prepared_branch_outlives_its_connection_and_any_other_settles_it(commit: bool, names: list[str], place: Place) -> None:
    xid = new_xid()
    place.prepared(xid).close()
    assert place.settle(xid, commit=commit, within=5) is Settling.DONE
    assert (place.names(), place.in_doubt()) == (names, [])
    assert place.settle(xid, commit=commit) is Settling.MISSING


@pytest.mark.parametrize("commit", [True, False])
def test_an_unprepared_branch_ends_by_one_exchange(commit: bool, place: Place) -> None:
    xid = new_xid()
    connection = place.begin(xid, "INSERT INTO items VALUES (1, 'a')")
    end = place.verbs.commit_unprepared if commit else place.verbs.roll_back_unprepared
    assert place.say(connection, *end(xid)) == DONE
    assert place.names() == (["a"] if commit else [])


def test_a_branch_whose_connection_dies_before_it_is_prepared_is_rolled_back(place: Place) -> None:
    xid = new_xid()
    connection = place.begin(xid, "INSERT INTO items VALUES (1, 'a')")
    connection.close()
    assert place.settle(xid, commit=True) is Settling.MISSING
    assert (place.names(), place.in_doubt()) == ([], [])


def test_a_connection_serves_on_after_its_branch_has_ended(place: Place) -> None:
    connection = place.driver_connection()
    for number in range(3):
        xid = new_xid()
        execute(connection, *place.verbs.start(xid), f"INSERT INTO items VALUES ({number}, 'n')")
        assert place.say(connection, *place.verbs.prepare(xid), *place.verbs.commit_prepared(xid)) == DONE
        connection.commit()
        connection.rollback()
    execute(connection, "INSERT INTO items VALUES (9, 'z')")
    connection.commit()
    assert place.names() == ["n", "n", "n", "z"]


def test_an_empty_branch_and_one_that_only_read_can_be_prepared_and_committed(place: Place) -> None:
    for statements in ([], ["SELECT * FROM items"]):
        xid = new_xid()
        connection = place.begin(xid, *statements)
        if not statements and not place.is_mysql and connection.info.transaction_status == TransactionStatus.IDLE:
            execute(connection, "SELECT 1")  # nothing has begun otherwise
        assert place.say(connection, *place.verbs.prepare(xid)) == DONE
        assert place.say(connection, *place.verbs.commit_prepared(xid)) == DONE
    assert place.in_doubt() == []


@pytest.mark.parametrize("commit", [True, False])
def test_a_prepared_branch_that_only_read_is_settled_after_its_connection_has_gone(commit: bool, place: Place) -> None:
    """MariaDB answers XA_RBROLLBACK to either verdict then, and forgets the branch."""
    xid = new_xid()
    place.prepared(xid, "SELECT * FROM items").close()
    assert place.settle(xid, commit=commit, within=5) is Settling.DONE
    assert place.in_doubt() == []
    assert place.settle(xid, commit=commit) is Settling.MISSING


def test_savepoints_work_in_a_branch(place: Place) -> None:
    xid = new_xid()
    connection = place.begin(
        xid,
        "INSERT INTO items VALUES (1, 'a')",
        *("SAVEPOINT s", "INSERT INTO items VALUES (2, 'b')", "ROLLBACK TO SAVEPOINT s"),
        *("SAVEPOINT t", "INSERT INTO items VALUES (3, 'c')", "RELEASE SAVEPOINT t"),
    )
    assert place.say(connection, *place.verbs.prepare(xid), *place.verbs.commit_prepared(xid)) == DONE
    assert place.names() == ["a", "c"]


def test_a_prepared_branch_survives_a_crash_of_its_server(
    new_postgres: Callable[..., PostgresServer], new_mariadb: Callable[..., MariaDBServer]
) -> None:
    servers: list[Server] = [new_postgres(18), new_postgres(16), new_mariadb(), new_mariadb(settings={"log_bin": True})]
    for server in servers:
        server.create_database("shop")
        with ExitStack() as stack:
            place = Place(server, server.url("shop"), stack)
            committed, rolled_back = new_xid(), new_xid()
            place.prepared(committed)
            place.prepared(rolled_back, "INSERT INTO items VALUES (2, 'b')")
            server.restart("immediate")
            assert {branch.xid for branch in place.in_doubt()} == {committed, rolled_back}
            assert place.settle(committed, commit=True) is Settling.DONE
            assert place.settle(rolled_back, commit=False) is Settling.DONE
            assert (place.names(), place.in_doubt()) == (["a"], [])


def test_what_is_missing_is_told_from_what_is_wrong(place: Place) -> None:
    connection = place.driver_connection()
    execute(connection, "SELECT 1")
    connection.rollback()
    if place.is_mysql:
        connection.autocommit(True)
    else:
        connection.autocommit = True
    answer = place.say(connection, *place.verbs.commit_prepared(new_xid()))
    assert answer.outcome is Outcome.REFUSED
    assert answer.error is not None
    assert place.verbs.is_missing(answer.error)
    other = place.say(connection, "SELECT nonsense").error
    assert other is not None
    assert not place.verbs.is_missing(other)
    assert not place.verbs.is_missing(OSError())
    with place.settler() as settler, pytest.raises(DBAPIError) as caught:
        settler.exec_driver_sql(place.verbs.commit_prepared(new_xid())[0])
    assert place.verbs.is_missing(caught.value), "SQLAlchemy's error around the driver's"


def test_only_names_of_ours_are_taken_for_ours(place: Place) -> None:
    xid = new_xid()
    foreign = ["'foreign'", "'shop:short:writer'"]
    if place.is_mysql:
        gtrid, _, bqual = xid.rpartition(":")
        foreign += [f"'{gtrid}:','{bqual}'", f"'{new_xid()}','',7", "X'FF00'"]
        steps = [[f"XA START {name}", f"XA END {name}", f"XA PREPARE {name}"] for name in foreign]
        endings = [f"XA ROLLBACK {name}" for name in foreign]
    else:
        foreign += ["'42_c2hvcA==_d3JpdGVy'", "'façade'"]
        steps = [["SELECT 1", f"PREPARE TRANSACTION {name}"] for name in foreign]
        endings = [f"ROLLBACK PREPARED {name}" for name in foreign]
    connections = [place.driver_connection() for _ in foreign]
    for connection, statements in zip(connections, steps, strict=True):
        if not place.is_mysql:
            execute(connection, statements.pop(0))
        assert place.say(connection, *statements) == DONE
    try:
        before = time.time()
        place.prepared(xid).close()
        [found] = place.in_doubt()
        assert found.xid == xid
        if not place.is_mysql:
            assert found.owner == USER
            assert found.prepared_at is not None
            assert before - 1 < found.prepared_at < time.time() + 1
    finally:
        for connection, statement in zip(connections, endings, strict=True):
            assert place.say(connection, statement) == DONE
        assert place.settle(xid, commit=False, within=5) is Settling.DONE


def test_databases_that_are_not_known_to_prepare_have_no_way_to() -> None:
    assert isinstance(verbs_of("postgresql+psycopg"), PostgreSQLPrepareVerbs)
    assert isinstance(verbs_of("mysql+pymysql"), MySQLPrepareVerbs)
    assert isinstance(verbs_of("mariadb+pymysql"), MySQLPrepareVerbs)
    for driver in (
        "sqlite",
        "sqlite+aiosqlite",
        "postgresql+psycopg2",
        "postgresql",
        "mysql+mysqldb",
        "oracle",
    ):
        assert verbs_of(driver) is None


# ---- problems -------------------------------------------------------------------------------------------------------------


def test_a_server_that_can_prepare_has_no_problem(place: Place) -> None:
    with place.engine.connect() as connection:
        assert place.verbs.problem(connection) is None


def test_a_postgresql_that_may_not_prepare_is_told_by_its_setting(new_postgres: Callable[..., PostgresServer]) -> None:
    server = new_postgres(settings={"max_prepared_transactions": 0})
    engine = create_engine(server.url("postgres"), poolclass=NullPool)
    with engine.connect() as connection:
        problem = postgresql.problem(connection)
    assert problem is not None
    for word in ("max_prepared_transactions", "postgresql.conf", "restart"):
        assert word in problem


def test_a_mariadb_that_forgets_what_it_has_prepared_is_told_by_its_setting(new_mariadb: Callable[..., MariaDBServer]) -> None:
    server = new_mariadb(settings={"innodb_flush_log_at_trx_commit": 0})
    engine = create_engine(server.url("mysql"), poolclass=NullPool)
    with engine.connect() as connection:
        assert "innodb_flush_log_at_trx_commit" in str(mysql.problem(connection))


@pytest.mark.parametrize(
    ("is_mariadb", "version", "word"),
    [(True, (10, 4, 30), "MariaDB 10.5"), (False, (5, 7, 44), "MySQL 8.0"), (True, (10, 5, 0), None)],
)
def test_a_server_that_is_too_old_is_told_by_its_version(
    is_mariadb: bool, version: tuple[int, ...], word: str | None, my: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with my.engine.connect() as connection:
        monkeypatch.setattr(connection.dialect, "is_mariadb", is_mariadb)
        monkeypatch.setattr(connection.dialect, "server_version_info", version)
        problem = mysql.problem(connection)
    assert problem is None if word is None else word in str(problem)


# ---- PostgreSQL -----------------------------------------------------------------------------------------------------------


def last_said(place: Place, process: int) -> tuple[str, Any]:
    """The last statement a connection has sent, and when."""
    [(query, at)] = place.server.execute("SELECT query, query_start FROM pg_stat_activity WHERE pid = %s", [process])
    return str(query), at


def test_psycopg_does_nothing_more_for_a_transaction_that_was_prepared_below_it(pg: Place) -> None:
    """Neither its commit() nor its rollback() makes a round trip then, nor does SQLAlchemy's session."""
    xid = new_xid()
    connection = pg.prepared(xid)
    said = last_said(pg, connection.info.backend_pid)
    assert said[0].startswith("PREPARE TRANSACTION")
    assert connection.info.transaction_status == TransactionStatus.IDLE
    connection.commit()
    connection.rollback()
    assert last_said(pg, connection.info.backend_pid) == said

    assert pg.say(connection, *postgresql.roll_back_prepared(xid)) == DONE
    engine = pg.new_engine(pool_size=1)
    with Session(engine) as session:
        session.execute(text("INSERT INTO items VALUES (1, 'a')"))
        driver_connection: Any = session.connection().connection.driver_connection
        assert pg.say(driver_connection, *postgresql.prepare(xid)) == DONE
        said = last_said(pg, driver_connection.info.backend_pid)
        session.commit()
    assert last_said(pg, driver_connection.info.backend_pid) == said
    assert pg.say(driver_connection, *postgresql.commit_prepared(xid)) == DONE
    assert driver_connection.info.transaction_status == TransactionStatus.IDLE, "COMMIT PREPARED was said without a BEGIN"
    assert pg.names() == ["a"]


def test_a_constraint_that_fails_at_prepare_is_the_drivers_own_error(pg: Place) -> None:
    """psycopg's tpc_prepare() would say that there is no such prepared transaction, or that it is in the wrong state."""
    pg.server.execute("CREATE TABLE late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)", database=pg.engine.url.database)
    connection = pg.begin(new_xid(), "INSERT INTO late VALUES (1)", "INSERT INTO late VALUES (1)")
    answer = pg.say(connection, *postgresql.prepare(new_xid()))
    assert answer.outcome is Outcome.REFUSED
    assert isinstance(answer.error, psycopg.errors.UniqueViolation)
    assert answer.error.diag.constraint_name == "late_id_key"
    execute(connection, "INSERT INTO items VALUES (1, 'a')")
    connection.commit()
    assert pg.names() == ["a"], "the connection is as good as before"


def test_a_conflict_that_is_found_at_prepare_can_be_told_as_one(pg: Place) -> None:
    first, second = pg.driver_connection(), pg.driver_connection()
    for connection, number in ((first, 1), (second, 2)):
        execute(connection, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SELECT count(*) FROM items")
        execute(connection, f"INSERT INTO items VALUES ({number}, 'n')")
    xid = new_xid()
    assert pg.say(first, *postgresql.prepare(xid), *postgresql.commit_prepared(xid)) == DONE
    answer = pg.say(second, *postgresql.prepare(new_xid()))
    assert answer.outcome is Outcome.REFUSED
    assert isinstance(answer.error, psycopg.errors.SerializationFailure)


@pytest.mark.parametrize("say", [postgresql.prepare, postgresql.commit_unprepared])
def test_a_transaction_in_which_a_statement_failed_is_refused_although_the_server_says_nothing(
    say: Callable[[str], list[str]], pg: Place
) -> None:
    """PostgreSQL answers COMMIT and PREPARE TRANSACTION of a failed transaction with ROLLBACK, and that is no error to libpq."""
    xid = new_xid()
    connection = pg.begin(xid, "INSERT INTO items VALUES (1, 'a')")
    with pytest.raises(psycopg.errors.DivisionByZero):
        execute(connection, "SELECT 1 / 0")
    answer = pg.say(connection, *say(xid))
    assert answer.outcome is Outcome.REFUSED
    assert isinstance(answer.error, psycopg.errors.InFailedSqlTransaction)
    assert (pg.names(), pg.in_doubt()) == ([], [])
    assert pg.say(connection, "ROLLBACK") == DONE


def test_nothing_is_prepared_where_nothing_has_begun(pg: Place) -> None:
    answer = pg.say(pg.driver_connection(), *postgresql.prepare(new_xid()))
    assert answer.outcome is Outcome.REFUSED
    assert pg.in_doubt() == []


@pytest.mark.parametrize("statement", ["CREATE TEMPORARY TABLE t (id int)", "NOTIFY somebody", "LISTEN somebody"])
def test_postgresql_refuses_to_prepare_what_used_temporary_tables_or_notifications(statement: str, pg: Place) -> None:
    xid = new_xid()
    connection = pg.begin(xid, statement)
    answer = pg.say(connection, *postgresql.prepare(xid))
    assert answer.outcome is Outcome.REFUSED
    assert isinstance(answer.error, psycopg.errors.FeatureNotSupported)


def test_ddl_is_prepared_on_postgresql(pg: Place) -> None:
    xid = new_xid()
    pg.prepared(xid, "CREATE TABLE other (id int)").close()
    assert pg.settle(xid, commit=True) is Settling.DONE
    with pg.settler() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM other").scalar() == 0


deaf = pytest.mark.skipif(
    NOTIFIES_IS_DEAF, reason="psycopg's notifies() hears nothing of what arrived with an answer before 3.2.4"
)


@pytest.mark.parametrize("heard_by", ["a handler", pytest.param("notifies()", marks=deaf)])
def test_copies_notices_and_notifications_do_no_harm(pg: Place, heard_by: str) -> None:
    xid = new_xid()
    connection = pg.driver_connection()
    notices: list[str | None] = []
    heard: list[str] = []

    def note(notice: psycopg.errors.Diagnostic) -> None:
        notices.append(notice.message_primary)

    connection.add_notice_handler(note)
    if heard_by == "a handler":
        connection.add_notify_handler(lambda notification: heard.append(notification.payload))
    execute(connection, "LISTEN bell")
    connection.commit()
    with connection.cursor() as cursor, cursor.copy("COPY items FROM STDIN") as copy:
        copy.write_row([1, "a"])
        copy.write_row([2, "b"])
    pg.server.execute("NOTIFY bell, 'rings'", database=pg.engine.url.database)
    assert pg.say(connection, "DO $$ BEGIN RAISE NOTICE 'said on the way'; END $$", *postgresql.prepare(xid)) == DONE
    pg.server.execute("NOTIFY bell, 'again'", database=pg.engine.url.database)
    assert pg.say(connection, *postgresql.commit_prepared(xid)) == DONE
    assert notices == ["said on the way"]
    if heard_by == "notifies()":
        heard.extend(note.payload for note in connection.notifies(timeout=1, stop_after=2))
    assert heard == ["rings", "again"]
    with connection.cursor() as cursor, cursor.copy("COPY items TO STDOUT") as copy:
        assert list(copy.rows()) == [("1", "a"), ("2", "b")]


def test_a_line_in_the_middle_of_something_else_refuses_to_speak(pg: Place) -> None:
    connection = pg.driver_connection()
    with connection.cursor() as cursor, cursor.copy("COPY items FROM STDIN"):
        answer = pg.say(connection, *postgresql.prepare(new_xid()))
    assert answer.outcome is Outcome.REFUSED
    assert isinstance(answer.error, psycopg.OperationalError)


def test_only_branches_of_this_database_are_listed(pg: Place, new_postgres_url: NewUrl) -> None:
    xid = new_xid()
    with ExitStack() as stack:
        other = Place(pg.server, new_postgres_url(), stack)
        other.prepared(xid)
        assert pg.in_doubt() == []
        assert [branch.xid for branch in other.in_doubt()] == [xid]
        with pytest.raises(DBAPIError, match="belongs to another database"):
            pg.settle(xid, commit=True)
        assert other.settle(xid, commit=True) is Settling.DONE


def test_a_branch_that_another_user_prepared_is_refused_with_the_reason(pg: Place) -> None:
    database = pg.engine.url.database
    user = f"clerk_{database}"
    xid = new_xid()
    pg.server.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'clerk'")
    try:
        pg.prepared(xid)
        clerk = pg.new_engine(pg.server.url(str(database), user=user, password="clerk"), poolclass=NullPool)
        with clerk.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            [found] = postgresql.prepared(connection)
            assert found.owner == USER, "it is listed all the same, with who may settle it"
            with pytest.raises(DBAPIError, match="Must be superuser or the user that prepared the transaction"):
                postgresql.settle(connection, xid, commit=True)
        assert pg.settle(xid, commit=True) is Settling.DONE
    finally:
        pg.server.execute(f"DROP ROLE {user}")


def test_a_branch_that_somebody_else_settles_at_this_moment_is_held(pg: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(psycopg.errors.ObjectNotInPrerequisiteState):
        """As PostgreSQL raises it while another backend has locked the branch: too short a moment to meet it in a test."""

    def busy(*_: object) -> None:
        raise DBAPIError("COMMIT PREPARED", None, Busy())

    with pg.settler() as connection:
        monkeypatch.setattr(connection, "exec_driver_sql", busy)
        assert postgresql.settle(connection, new_xid(), commit=True) is Settling.HELD


# ---- MySQL and MariaDB ------------------------------------------------------------------------------------------------------


def test_a_branch_is_held_while_the_connection_that_prepared_it_is_open(my: Place) -> None:
    """The server calls the xid unknown then, although XA RECOVER lists it: taken for settled, it would be forgotten."""
    xid = new_xid()
    connection = my.prepared(xid)
    for commit in (True, False):
        assert my.settle(xid, commit=commit) is Settling.HELD
    assert [branch.xid for branch in my.in_doubt()] == [xid]
    connection.close()
    assert my.settle(xid, commit=True, within=5) is Settling.DONE
    assert my.names() == ["a"]


def test_killing_the_connection_that_prepared_a_branch_frees_it(my: Place) -> None:
    xid = new_xid()
    connection = my.prepared(xid)
    my.server.execute(f"KILL {connection.thread_id()}")
    assert my.settle(xid, commit=True, within=5) is Settling.DONE
    assert my.names() == ["a"]


def test_any_user_of_mariadb_may_list_and_settle(my: Place) -> None:
    xid = new_xid()
    my.prepared(xid).close()
    my.server.execute("CREATE OR REPLACE USER 'clerk'@'127.0.0.1' IDENTIFIED BY 'clerk'")
    try:
        clerk = my.new_engine(my.server.url("", user="clerk", password="clerk"), poolclass=NullPool)
        with clerk.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            assert [branch.xid for branch in mysql.prepared(connection)] == [xid]
            while mysql.settle(connection, xid, commit=True) is Settling.HELD:
                time.sleep(0.02)
    finally:
        my.server.execute("DROP USER 'clerk'@'127.0.0.1'")
    assert my.names() == ["a"]


def test_branches_are_settled_in_autocommit_only(my: Place) -> None:
    xid = new_xid()
    my.prepared(xid).close()
    with my.engine.connect() as connection, pytest.raises(DBAPIError, match="XAER_OUTSIDE"):
        while mysql.settle(connection, xid, commit=True) is Settling.HELD:
            pass
    assert my.settle(xid, commit=False, within=5) is Settling.DONE


def test_a_branch_that_lost_a_deadlock_is_rolled_back_by_one_exchange(my: Place) -> None:
    """XA END is refused then, which is why the statements are said regardless."""
    my.server.execute("INSERT INTO items VALUES (1, 'a'), (2, 'b'), (3, 'c')", database=my.engine.url.database)
    loser, winner = new_xid(), new_xid()
    first = my.begin(loser, "UPDATE items SET name = 'x' WHERE id = 1")
    second = my.begin(winner, "UPDATE items SET name = 'y' WHERE id >= 2")
    waits = threading.Thread(target=execute, args=[second, "UPDATE items SET name = 'y' WHERE id = 1"])
    waits.start()
    time.sleep(0.2)
    with pytest.raises(pymysql.err.OperationalError) as caught:
        execute(first, "UPDATE items SET name = 'x' WHERE id >= 2")
    waits.join()
    assert caught.value.args[0] == 1213
    for statements in (mysql.prepare(loser), mysql.commit_unprepared(loser), mysql.roll_back_unprepared(loser)):
        answer = my.say(first, *statements)
        assert (answer.outcome, answer.error.args[0] if answer.error else None) == (Outcome.REFUSED, 1399)
    assert my.say(first, *mysql.roll_back_unprepared(loser), regardless=True) == DONE
    assert my.say(second, *mysql.commit_unprepared(winner)) == DONE
    execute(first, *mysql.start(loser), "INSERT INTO items VALUES (4, 'd')")
    assert my.say(first, *mysql.commit_unprepared(loser)) == DONE
    assert my.names() == ["y", "y", "y", "d"]


def test_rolling_back_regardless_ends_a_branch_in_whatever_state_it_is(my: Place) -> None:
    xid = new_xid()
    for ended in ([], mysql.prepare(xid)[:1], mysql.prepare(xid)):
        connection = my.begin(xid, "INSERT INTO items VALUES (1, 'a')")
        assert my.say(connection, *ended) == DONE
        assert my.say(connection, *mysql.roll_back_unprepared(xid), regardless=True) == DONE
    assert (my.names(), my.in_doubt()) == ([], [])


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "BEGIN", "CREATE TABLE other (id int)", "SET autocommit = 1"])
def test_mariadb_refuses_ddl_and_plain_transaction_statements_in_a_branch_which_goes_on(statement: str, my: Place) -> None:
    xid = new_xid()
    connection = my.begin(xid, "INSERT INTO items VALUES (1, 'a')")
    with pytest.raises(pymysql.err.OperationalError, match="XAER_RMFAIL"):
        execute(connection, statement)
    assert my.say(connection, *mysql.prepare(xid), *mysql.commit_prepared(xid)) == DONE
    assert my.names() == ["a"]


def test_nothing_but_its_end_can_follow_on_a_connection_that_has_prepared(my: Place) -> None:
    xid = new_xid()
    connection = my.prepared(xid)
    for statement in ("SELECT * FROM items", "COMMIT", "ROLLBACK"):
        with pytest.raises(pymysql.err.OperationalError, match="PREPARED state"):
            execute(connection, statement)
    assert my.say(connection, *mysql.commit_prepared(xid)) == DONE


def test_a_branch_can_use_temporary_tables_and_read_only_terms(my: Place) -> None:
    xid = new_xid()
    connection = my.begin(
        xid, "CREATE TEMPORARY TABLE t (id int)", "INSERT INTO t VALUES (1)", "INSERT INTO items VALUES (1, 'a')"
    )
    assert my.say(connection, *mysql.prepare(xid)) == DONE
    connection.close()
    assert my.settle(xid, commit=True, within=5) is Settling.DONE
    assert my.names() == ["a"]

    connection = my.driver_connection()
    execute(connection, "SET TRANSACTION READ ONLY", *mysql.start(xid))
    with pytest.raises(pymysql.err.OperationalError) as caught:
        execute(connection, "INSERT INTO items VALUES (2, 'b')")
    assert caught.value.args[0] == 1792
    assert my.say(connection, *mysql.roll_back_unprepared(xid)) == DONE


def test_the_name_of_a_branch_may_have_64_bytes_and_no_more(my: Place) -> None:
    longest = str(Xid("a" * 16, new_unit_id(new_log_id()), "c" * 22 + ".1"))
    assert len(longest) == 64
    connection = my.prepared(longest)
    assert my.say(connection, *mysql.roll_back_prepared(longest)) == DONE
    with pytest.raises(pymysql.err.ProgrammingError):
        execute(connection, f"XA START '{'a' * 65}'")


def test_a_name_that_is_in_use_is_refused(my: Place) -> None:
    xid = new_xid()
    connection = my.begin(xid)
    with pytest.raises(pymysql.err.OperationalError, match="XAER_DUPID"):
        my.begin(xid)
    assert my.say(connection, *mysql.roll_back_unprepared(xid)) == DONE


def test_an_ending_for_which_a_lock_was_missing_is_refused_and_can_be_said_again(my: Place) -> None:
    xid = new_xid()
    connection = my.prepared(xid)
    execute(connection, "SET lock_wait_timeout = 1")
    with my.settler() as backup:
        backup.exec_driver_sql("FLUSH TABLES WITH READ LOCK")
        answer = my.say(connection, *mysql.commit_prepared(xid))
        assert (answer.outcome, answer.error.args[0] if answer.error else None) == (Outcome.REFUSED, 1205)
        backup.exec_driver_sql("UNLOCK TABLES")
    assert [branch.xid for branch in my.in_doubt()] == [xid]
    assert my.say(connection, *mysql.commit_prepared(xid)) == DONE
    assert my.names() == ["a"]


@pytest.mark.parametrize("step", ["prepare", "commit_unprepared"])
def test_a_branch_that_a_missing_lock_kept_from_being_prepared_is_gone(step: str, my: Place) -> None:
    xid = new_xid()
    connection = my.begin(xid, "INSERT INTO items VALUES (1, 'a')", "SET lock_wait_timeout = 1")
    with my.settler() as backup:
        backup.exec_driver_sql("FLUSH TABLES WITH READ LOCK")
        answer = my.say(connection, *getattr(mysql, step)(xid))
        assert (answer.outcome, answer.error.args[0] if answer.error else None) == (Outcome.REFUSED, 1205)
        backup.exec_driver_sql("UNLOCK TABLES")
    connection.close()
    assert my.settle(xid, commit=True) is Settling.MISSING
    assert my.names() == []


def test_a_statement_that_the_server_broke_off_is_unknown_and_its_connection_closed(my: Place) -> None:
    holder, connection = my.driver_connection(), my.driver_connection()
    execute(holder, "INSERT INTO items VALUES (1, 'a')")
    killer = threading.Timer(0.2, my.server.execute, [f"KILL QUERY {connection.thread_id()}"])
    killer.start()
    answer = my.say(connection, "INSERT INTO items VALUES (1, 'b')")
    killer.join()
    assert (answer.outcome, answer.error.args[0] if answer.error else None) == (Outcome.UNKNOWN, 1317)
    assert is_closed(connection)


# ---- several at once --------------------------------------------------------------------------------------------------------


def lines_to(place: Place, count: int) -> dict[int, NonBlockingConnection]:
    return {number: place.line(place.driver_connection()) for number in range(count)}


def outcomes(came: Results[int]) -> list[str]:
    return [came.answers[number].outcome.value for number in sorted(came.answers)]


def test_statements_of_several_lines_run_at_the_same_time(place: Place) -> None:
    lines = lines_to(place, 4)
    begun = time.monotonic()
    came = execute_together({number: (line, [sleep(place, 0.25), sleep(place, 0.25)]) for number, line in lines.items()})
    assert 0.5 <= time.monotonic() - begun < 1.5, "and not 2 s"
    assert all_done(came)
    assert came.interruption is None


def test_a_line_goes_on_while_another_still_waits_for_its_first_answer(place: Place) -> None:
    slow, quick = lines_to(place, 2).values()
    begun = time.monotonic()
    came = execute_together({0: (slow, [sleep(place, 0.8)]), 1: (quick, [sleep(place, 0.2)] * 4)})
    assert time.monotonic() - begun < 1.4, "and not 1.6 s"
    assert all_done(came)


def test_different_kinds_of_databases_speak_in_one_exchange(pg: Place, my: Place) -> None:
    xids = {"writer": new_xid("writer"), "log": new_xid("log")}
    places = {"writer": pg, "log": my}
    connections = {name: places[name].begin(xids[name], "INSERT INTO items VALUES (1, 'a')") for name in places}
    for step in ("prepare", "commit_prepared"):
        came = execute_together(
            {name: (place.line(connections[name]), getattr(place.verbs, step)(xids[name])) for name, place in places.items()}
        )
        assert came.answers == {"writer": DONE, "log": DONE}
    assert (pg.names(), my.names()) == (["a"], ["a"])


def test_every_answer_is_collected_even_if_one_is_an_error(place: Place) -> None:
    connections = [place.driver_connection() for _ in range(3)]
    bad = "SELECT nonsense"
    statements = [[sleep(place, 0.2)], [bad, "INSERT INTO items VALUES (1, 'a')"], [sleep(place, 0.1), bad]]
    came = execute_together({n: (place.line(c), statements[n]) for n, c in enumerate(connections)})
    assert outcomes(came) == ["done", "refused", "refused"]
    assert came.with_outcome(Outcome.REFUSED) == [1, 2]
    assert not all_done(came)
    error = came.answers[1].error
    assert isinstance(error, psycopg.errors.UndefinedColumn | pymysql.err.OperationalError)
    for connection in connections:
        assert place.say(connection, *place.verbs.roll_back_unprepared(new_xid())[-1:]).outcome is not Outcome.UNKNOWN
        connection.rollback()
        execute(connection, "SELECT 1")
    assert place.names() == [], "nothing was said after the refusal"


def test_regardless_of_a_refusal_the_last_answer_counts(my: Place) -> None:
    connection = my.driver_connection()
    assert my.say(connection, "SELECT nonsense", "DO 1", regardless=True) == DONE
    assert my.say(connection, "DO 1", "SELECT nonsense", regardless=True).outcome is Outcome.REFUSED


def test_having_nothing_to_say_is_done_at_once(place: Place) -> None:
    assert place.say(place.driver_connection()) == DONE
    assert execute_together({}).answers == {}


# ---- lost connections -------------------------------------------------------------------------------------------------------


def kill(place: Place, connection: Any) -> None:
    if place.is_mysql:
        place.server.execute(f"KILL {connection.thread_id()}")
    else:
        place.server.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])


def is_closed(connection: Any) -> bool:
    return not connection.open if isinstance(connection, pymysql.connections.Connection) else bool(connection.closed)


def test_a_connection_killed_between_question_and_answer_leaves_the_outcome_unknown(place: Place) -> None:
    connections = [place.driver_connection() for _ in range(3)]
    killer = threading.Timer(0.2, kill, [place, connections[1]])
    killer.start()
    came = execute_together({n: (place.line(c), [sleep(place, 0.5)]) for n, c in enumerate(connections)})
    killer.join()
    assert outcomes(came) == ["done", "unknown", "done"]
    error = came.answers[1].error
    assert isinstance(error, psycopg.errors.AdminShutdown | pymysql.err.OperationalError)
    assert [is_closed(connection) for connection in connections] == [False, True, False]
    assert came.interruption is None


def test_a_connection_killed_before_the_question_leaves_the_outcome_unknown_or_refused(place: Place) -> None:
    connection = place.begin(new_xid(), "INSERT INTO items VALUES (1, 'a')")
    kill(place, connection)
    time.sleep(0.1)
    answers = [place.say(connection, *place.verbs.prepare(new_xid())) for _ in range(2)]
    for answer in answers:
        assert answer.outcome in (Outcome.UNKNOWN, Outcome.REFUSED)
        assert isinstance(answer.error, psycopg.OperationalError | pymysql.err.Error)
    assert answers[-1].outcome is Outcome.REFUSED, "on a closed connection nothing was said"


@pytest.mark.parametrize(("step", "what"), [("prepare", "request"), ("prepare", "answer"), ("commit_prepared", "answer")])
def test_a_network_that_loses_one_lines_request_or_answer_leaves_that_one_unknown(step: str, what: Any, place: Place) -> None:
    mine, other = new_xid(), new_xid()
    with Proxy(place.server) as proxy:
        connection = place.driver_connection(proxy.url(place.url))
        beside = place.driver_connection()
        execute(connection, *place.verbs.start(mine), "INSERT INTO items VALUES (1, 'a')")
        execute(beside, *place.verbs.start(other), "INSERT INTO items VALUES (2, 'b')")
        both = {0: (connection, mine), 1: (beside, other)}
        steps = ["prepare", "commit_prepared"]
        came: Results[int] | None = None
        for now in steps[: steps.index(step) + 1]:
            if now == step:
                proxy.lose(what, to=b"XA (PREPARE|COMMIT)" if place.is_mysql else b"PREPARE")
            came = execute_together({n: (place.line(c), getattr(place.verbs, now)(xid)) for n, (c, xid) in both.items()})
        assert came is not None
        assert outcomes(came) == ["unknown", "done"]
        assert isinstance(came.answers[0].error, psycopg.OperationalError | pymysql.err.OperationalError)
        was_done = place.settle(mine, commit=True, within=5)
        assert (step, what, was_done) in {
            ("prepare", "request", Settling.MISSING),
            ("prepare", "answer", Settling.DONE),
            ("commit_prepared", "answer", Settling.MISSING),
        }
        beside.close()
        place.settle(other, commit=False, within=5)


def test_who_does_not_answer_in_time_is_unknown_and_abandoned(place: Place) -> None:
    slow, quick = place.driver_connection(), place.driver_connection()
    begun = time.monotonic()
    came = execute_together(
        {0: (place.line(slow), [sleep(place, 2)]), 1: (place.line(quick), [sleep(place, 0)])},
        timeout=0.2,
    )
    assert 0.2 <= time.monotonic() - begun < 1.8, "and not 2 s"
    assert outcomes(came) == ["unknown", "done"]
    assert isinstance(came.answers[0].error, TimeoutError)
    assert (is_closed(slow), is_closed(quick)) == (True, False)
    assert came.interruption is None


def test_pymysqls_own_read_timeout_holds(my: Place) -> None:
    engine = my.new_engine(connect_args={"read_timeout": 0.3}, poolclass=NullPool)
    with engine.connect() as connection:
        driver_connection = connection.connection.driver_connection
        begun = time.monotonic()
        answer = my.say(driver_connection, "DO SLEEP(3)")
        assert 0.3 <= time.monotonic() - begun < 2.8, "and not 3 s"
        assert answer.outcome is Outcome.UNKNOWN
        assert isinstance(answer.error, pymysql.err.OperationalError)
        assert answer.error.args[0] == 2013
        connection.invalidate()


# ---- interruptions ------------------------------------------------------------------------------------------------------------


def test_an_interruption_waits_for_the_answers_that_are_under_way(place: Place) -> None:
    connections = [place.driver_connection() for _ in range(3)]
    begun = time.monotonic()
    with interrupted(0.1):
        came = execute_together({n: (place.line(c), [sleep(place, 0.3), sleep(place, 0)]) for n, c in enumerate(connections)})
    assert time.monotonic() - begun < 1
    assert all_done(came)
    assert isinstance(came.interruption, KeyboardInterrupt)
    for connection in connections:
        execute(connection, "SELECT 1")
        connection.rollback()


def test_after_an_interruption_patience_ends(place: Place) -> None:
    slow, quick, bad = (place.driver_connection() for _ in range(3))
    begun = time.monotonic()
    with interrupted(0.1):
        came = execute_together(
            {
                0: (place.line(slow), [sleep(place, 3)]),
                1: (place.line(quick), [sleep(place, 0.2)]),
                2: (place.line(bad), [sleep(place, 0.15), "SELECT nonsense"]),
            },
            patience=0.4,
        )
    assert 0.4 <= time.monotonic() - begun < 2.8, "and not 3 s"
    assert outcomes(came) == ["unknown", "done", "refused"]
    assert isinstance(came.interruption, KeyboardInterrupt)
    assert came.answers[0].error is came.interruption
    assert [is_closed(connection) for connection in (slow, quick, bad)] == [True, False, False]


def test_a_second_interruption_ends_the_wait_at_once(place: Place) -> None:
    slow, quick = place.driver_connection(), place.driver_connection()
    begun = time.monotonic()
    with interrupted(0.2, 0.4):
        came = execute_together(
            {0: (place.line(slow), [sleep(place, 5)]), 1: (place.line(quick), [sleep(place, 0.1)])},
            patience=30,
        )
    assert time.monotonic() - begun < 4, "and not 5 s"
    assert outcomes(came) == ["unknown", "done"]
    assert isinstance(came.interruption, KeyboardInterrupt)


class Stumbling(NonBlockingConnection):
    """A line that raises Ctrl-C at its so many-th step and says what has happened to it; below it is a real one."""

    def __init__(self, below: NonBlockingConnection, at: int) -> None:
        self.below = below
        self.driver_error = below.driver_error
        self.left = at
        self.sent: list[str] = []

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def fileno(self) -> int:
        self.step()
        return self.below.fileno()

    def send(self, statement: str) -> None:
        self.step()
        self.sent.append(statement)
        self.below.send(statement)
        self.step()

    def collect(self, ready: bool) -> Answer | None:
        self.step()
        answer = self.below.collect(ready)
        self.step()
        return answer

    def abandon(self) -> None:
        self.step()
        self.below.abandon()


@pytest.mark.representative("postgres")
def test_an_interruption_at_any_step_claims_nothing_that_is_not_so(place: Place) -> None:
    """The steps are those of a line that prepares, beside another one that is not disturbed."""
    claimed = set()
    for at in range(1, 30):
        mine, other = new_xid(), new_xid()
        connection = place.begin(mine, f"INSERT INTO items VALUES ({at}, 'a')")
        beside = place.begin(other, f"INSERT INTO items VALUES ({at + 100}, 'b')")
        line = Stumbling(place.line(connection), at)
        came = execute_together(
            {
                0: (line, ["SAVEPOINT s", *place.verbs.prepare(mine)]),
                1: (place.line(beside), place.verbs.prepare(other)),
            },
            patience=0.1,
        )
        assert came.answers[1] == DONE
        assert len(line.sent) == len(set(line.sent)), "nothing is said twice"
        outcome = came.answers[0].outcome
        claimed.add(outcome)
        is_prepared = mine in {branch.xid for branch in place.in_doubt()}
        if outcome is not Outcome.UNKNOWN:
            assert is_prepared == (outcome is Outcome.DONE)
        if came.interruption is None:
            assert at > 5
            break
        connection.close()
        beside.close()
        for xid in (mine, other):
            assert place.settle(xid, commit=False, within=5) is not Settling.HELD
    else:
        pytest.fail("the exchange has more steps than the test")
    assert claimed >= {Outcome.DONE, Outcome.UNKNOWN}


def test_passwords_are_in_no_error(place: Place) -> None:
    connection = place.driver_connection()
    kill(place, connection)
    time.sleep(0.1)
    answer = place.say(connection, *place.verbs.prepare(new_xid()))
    assert PASSWORD not in repr(answer)
