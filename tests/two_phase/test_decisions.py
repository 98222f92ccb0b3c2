"""A decision in a table stands for everybody as soon as it is committed, and the first one wins."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from app_db._databases.engines import build_engine
from app_db._two_phase.decision_table import TableLog
from app_db._two_phase.decisions import Verdict
from app_db._two_phase.xids import new_log_id, new_unit_id
from app_db.settings import DatabaseSettings
from harness.paths import run_python
from harness.servers import MariaDBServer, PostgresServer

COMMIT, ABORT = Verdict.COMMIT, Verdict.ABORT

NewEngine = Callable[..., Engine]


@pytest.fixture
def new_engine() -> Iterator[NewEngine]:
    engines = []

    def new(url: str, **settings: Any) -> Engine:
        engine = build_engine("writer", DatabaseSettings(connections={"writer": {"url": url, **settings}}))
        engines.append(engine)
        return engine

    yield new
    for engine in engines:
        engine.dispose()


NewLog = Callable[..., TableLog]


@pytest.fixture
def new_log(new_engine: NewEngine) -> NewLog:
    """A log with an engine of its own, that waits one second for others."""

    def new(url: str, **settings: Any) -> TableLog:
        if url.startswith("sqlite"):
            settings = {"connect_args": {"timeout": 1}, **settings}
        engine = new_engine(url, **settings)
        return TableLog("writer", lambda: engine, lock_wait=1.0)

    return new


def seen(*arguments: str) -> Any:
    """Run a scenario of deciding.py in a process of its own."""
    return json.loads(run_python("-m", "harness.deciding", *arguments).stdout)


def patient(url: str) -> dict[str, Any]:
    """Settings with which many writers of one SQLite file get their turn."""
    return {"connect_args": {"timeout": 30}} if url.startswith("sqlite") else {}


def is_sqlite(connection: Connection) -> bool:
    return connection.dialect.name == "sqlite"


# ---- the first one wins --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", [None, "SERIALIZABLE", "AUTOCOMMIT"])
def test_threads_that_decide_differently_get_the_same_answer(database_url: str, isolation: str | None, new_log: NewLog) -> None:
    settings = {"isolation_level": isolation, "transactional": isolation != "AUTOCOMMIT", **patient(database_url)}
    log = new_log(database_url, **settings)
    units = [new_unit_id(log.id) for _ in range(3)]
    together = threading.Barrier(32)

    def decide(number: int) -> list[Verdict]:
        together.wait(20)
        return [log.decide(unit, ABORT if number % 2 else COMMIT, ["writer"]) for unit in units]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(decide, range(32)))
    assert answers == [[log.find(unit) for unit in units]] * 32


@pytest.mark.representative("sqlite")
def test_processes_that_decide_differently_get_the_same_answer(database_url: str, new_log: NewLog) -> None:
    units = [new_unit_id("Log123") for _ in range(25)]
    answers = seen("race", database_url, "6", *units)
    found = {decision.unit: str(decision.verdict) for decision in new_log(database_url).decisions()}
    assert answers == [found] * 6
    assert sorted(found) == sorted(units)


def test_a_decision_is_kept_as_it_was_made_until_it_is_forgotten(database_url: str, new_log: NewLog) -> None:
    log, other = new_log(database_url), new_log(database_url)
    first, second, third = (new_unit_id(log.id) for _ in range(3))
    assert log.find(first) is None
    assert log.decide(first, COMMIT, ["warehouse", "writer"]) is COMMIT
    assert log.decide(second, ABORT, []) is ABORT
    assert other.decide(first, ABORT, []) is COMMIT
    assert other.decide(second, COMMIT, ["writer"]) is ABORT
    kept = [(decision.unit, decision.verdict, decision.branches) for decision in other.decisions()]
    assert kept == [(first, COMMIT, ("warehouse", "writer")), (second, ABORT, ())]
    assert all(abs(decision.decided_at - time.time()) < 60 for decision in other.decisions())
    log.forget([first, third])
    assert (other.find(first), other.find(second)) == (None, ABORT)
    assert other.decide(first, ABORT, []) is ABORT
    log.forget([])
    log.forget([new_unit_id(log.id) for _ in range(1200)] + [first, second])
    assert other.decisions() == []


def test_units_that_differ_in_case_only_are_different(database_url: str, new_log: NewLog) -> None:
    """MySQL takes 'a' for 'A' in a table that does not ask for something else."""
    log = new_log(database_url)
    lower, upper = "a" * 22, "A" * 22
    assert log.decide(lower, COMMIT, []) is COMMIT
    assert log.find(upper) is None
    assert log.decide(upper, ABORT, []) is ABORT
    log.forget([upper])
    assert log.find(lower) is COMMIT


# ---- inside another transaction ------------------------------------------------------------------------------------------


@pytest.mark.representative("postgresql")
def test_a_decision_under_way_makes_others_wait_no_longer_than_they_are_told_to(database_url: str, new_log: NewLog) -> None:
    log, other = new_log(database_url), new_log(database_url)
    unit = new_unit_id(log.id)
    other.ensure()
    with log._engine().connect() as connection:
        log.decide_within(connection, unit, ["warehouse", "writer"])
        began = time.monotonic()
        with pytest.raises(DBAPIError):
            other.decide(unit, ABORT, [])
        assert 0.5 < time.monotonic() - began < 5
        assert other.find(unit) is None
        connection.commit()
    assert other.decide(unit, ABORT, []) is COMMIT
    assert [decision.branches for decision in other.decisions()] == [("warehouse", "writer")]


@pytest.mark.representative("postgresql-*")
@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_all_who_wait_for_a_decision_under_way_get_the_same_answer(ends: str, database_url: str, new_log: NewLog) -> None:
    """InnoDB makes victims of some of those who wait for a row that is rolled back; their turn comes again."""
    log, other = new_log(database_url, **patient(database_url)), new_log(database_url, **patient(database_url))
    other._lock_wait = 20.0
    unit = new_unit_id(log.id)
    other.ensure()
    with log._engine().connect() as connection, ThreadPoolExecutor(8) as pool:
        log.decide_within(connection, unit, [])
        waiting = [pool.submit(other.decide, unit, [ABORT, COMMIT][number % 2], []) for number in range(8)]
        time.sleep(0.4)
        assert not any(decided.done() for decided in waiting)
        getattr(connection, ends)()
        answers = {decided.result(30) for decided in waiting}
    assert answers == {other.find(unit)}
    assert ends == "rollback" or answers == {COMMIT}


@pytest.mark.parametrize("isolation", [None, "SERIALIZABLE"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_transaction_cannot_commit_where_abort_stands(
    when: str, isolation: str | None, database_url: str, new_log: NewLog
) -> None:
    log, other = new_log(database_url), new_log(database_url)
    unit = new_unit_id(log.id)
    with log._engine().connect() as connection:
        if isolation:
            connection.execution_options(isolation_level=isolation)
        if when == "before" or is_sqlite(connection):  # nobody else writes while somebody writes to a SQLite file
            other.decide(unit, ABORT, [])
        assert connection.scalar(text("SELECT count(*) FROM app_db_decisions")) is not None
        if when == "meanwhile" and not is_sqlite(connection):
            if isolation == "SERIALIZABLE" and connection.dialect.name == "mysql":
                connection.rollback()  # to read is to lock there
            other.decide(unit, ABORT, [])
        with pytest.raises(IntegrityError):
            log.decide_within(connection, unit, ["writer"])
        connection.rollback()
    assert log.find(unit) is ABORT


def test_the_statement_is_what_a_transaction_needs_to_decide(database_url: str, new_log: NewLog) -> None:
    log = new_log(database_url)
    unit = new_unit_id(log.id)
    statement = log.statement(unit, ["warehouse", "writer"])
    assert statement.startswith("INSERT INTO app_db_decisions ")
    connection = log._engine().raw_connection()
    cursor = connection.cursor()
    cursor.execute(statement)
    assert cursor.description is None, "it answers with no rows"
    cursor.close()
    assert log.find(unit) is None
    connection.commit()
    connection.close()
    [decision] = log.decisions()
    assert (decision.unit, decision.verdict, decision.branches) == (unit, COMMIT, ("warehouse", "writer"))


# ---- making the log --------------------------------------------------------------------------------------------------------


def test_threads_that_make_the_log_at_the_same_time_make_one(new_database_url: Callable[[], str], new_log: NewLog) -> None:
    for _ in range(3):
        url = new_database_url()
        logs = [new_log(url, **patient(url)) for _ in range(8)]
        together = threading.Barrier(8)

        def ask(log: TableLog, together: threading.Barrier = together) -> str:
            together.wait(20)
            return log.id

        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(ask, logs))
        assert ids == [new_log(url).id] * 8


@pytest.mark.exhaustive
def test_processes_that_make_the_log_at_the_same_time_make_one(database_url: str, new_log: NewLog) -> None:
    ids = seen("create", database_url, "8")
    assert ids == [new_log(database_url).id] * 8
    assert re.fullmatch("[A-Za-z0-9]{6}", ids[0])


def test_the_id_survives_what_happens_to_decisions(database_url: str, new_log: NewLog) -> None:
    log = new_log(database_url)
    unit = new_unit_id(log.id)
    log.decide(unit, COMMIT, [])
    log.forget([decision.unit for decision in log.decisions()])
    assert (new_log(database_url).id, log.decisions()) == (log.id, [])


def test_looking_makes_no_log(database_url: str, new_log: NewLog) -> None:
    log = new_log(database_url)
    assert (log.find("u" * 22), log.decisions()) == (None, [])
    with log._engine().connect() as connection, pytest.raises(DBAPIError):
        connection.execute(text("SELECT * FROM app_db_decisions"))


def test_a_log_is_asked_for_again_when_its_engine_was_replaced(
    new_database_url: Callable[[], str], new_engine: NewEngine
) -> None:
    engines = [new_engine(new_database_url()), new_engine(new_database_url())]
    log = TableLog("writer", lambda: engines[0])
    log.ensure()
    engines.reverse()
    assert log.decide("u" * 22, COMMIT, []) is COMMIT


def test_the_id_is_that_of_the_database_that_the_engine_leads_to(
    new_database_url: Callable[[], str], new_engine: NewEngine, new_log: NewLog
) -> None:
    urls = [new_database_url(), new_database_url()]
    engines = [new_engine(url) for url in urls]
    log = TableLog("writer", lambda: engines[0])
    ids = [log.id]
    engines.reverse()
    ids.append(log.id)
    assert ids == [new_log(url).id for url in urls]
    assert ids[0] != ids[1]


def test_applications_that_share_a_log_have_ids_of_their_own(database_url: str, new_engine: NewEngine) -> None:
    engine = new_engine(database_url)
    shop, billing, again = (TableLog("writer", lambda: engine, name) for name in ("shop", "billing", "shop"))
    assert shop.id == again.id != billing.id
    assert (shop.id_if_made(), billing.id_if_made()) == (shop.id, billing.id)


def test_a_log_made_while_a_transaction_is_under_way_does_not_end_it(
    new_database_url: Callable[[], str], new_log: NewLog
) -> None:
    """CREATE TABLE commits on MySQL; on SQLite, nobody else can make one meanwhile."""
    url = new_database_url()
    if url.startswith("sqlite"):
        return
    log, other = new_log(url, pool={"size": 1, "max_overflow": 0, "timeout": 1}), new_log(url)
    with other._engine().begin() as connection:
        connection.execute(text("CREATE TABLE item (name VARCHAR(9))"))
    with log._engine().connect() as connection:
        connection.execute(text("INSERT INTO item VALUES ('a')"))
        assert log.id == other.id_if_made()
        connection.rollback()
        assert connection.scalar(text("SELECT count(*) FROM item")) == 0


def test_a_table_that_was_made_by_hand_needs_no_right_to_make_one(
    postgres: PostgresServer, postgres_url: str, new_log: NewLog
) -> None:
    """PostgreSQL asks for that right even where IF NOT EXISTS finds the table."""
    url = make_url(postgres_url)
    maker = new_log(postgres_url)
    maker.ensure()
    postgres.execute("DELETE FROM app_db_decisions", database=url.database)
    clerk = f"clerk_{time.monotonic_ns()}"
    postgres.execute(f"CREATE ROLE {clerk} LOGIN PASSWORD 'clerk'")
    try:
        postgres.execute(f"GRANT ALL ON app_db_decisions TO {clerk}", database=url.database)
        postgres.execute("REVOKE CREATE ON SCHEMA public FROM public", database=url.database)
        log = new_log(url.set(username=clerk, password="clerk").render_as_string(False))
        assert log.id == new_log(postgres_url).id
        log._engine().dispose()
    finally:
        postgres.execute(f"DROP OWNED BY {clerk}", database=url.database)
        postgres.execute(f"DROP ROLE {clerk}")


@pytest.mark.representative("sqlite")
def test_who_makes_a_log_waits_for_a_maker_that_was_stopped_no_longer_than_it_is_told_to(
    new_database_url: Callable[[], str], new_engine: NewEngine, new_log: NewLog
) -> None:
    url = new_database_url()
    maker, engine = new_log(url), new_engine(url)
    maker.ensure()
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM app_db_decisions"))
        if engine.dialect.name == "postgresql":
            connection.execute(text("DROP TABLE app_db_decisions"))
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("CREATE TABLE app_db_decisions (unit varchar(32) PRIMARY KEY)"))
        else:
            connection.execute(text("INSERT INTO app_db_decisions VALUES ('log', 'id', 'abc123', 0)"))
        log = new_log(url)
        began = time.monotonic()
        assert log.id_if_made() is None, "looking waits for nobody"
        assert time.monotonic() - began < 0.5
        with pytest.raises(DBAPIError):
            log.ensure()
        assert time.monotonic() - began < 5
        connection.rollback()


def test_a_sqlite_file_that_is_not_there_is_not_made_by_looking(sqlite_url: str, new_log: NewLog) -> None:
    log = new_log(sqlite_url)
    path = Path(str(make_url(sqlite_url).database))
    assert log.id_if_made() is None
    assert not path.exists()
    path.touch()
    assert log.id_if_made() is None, "an empty file has no id"


# ---- units that have moved ---------------------------------------------------------------------------------------------------


def test_a_unit_may_be_decided_in_another_log_and_no_longer_here(database_url: str, new_log: NewLog) -> None:
    log, other = new_log(database_url), new_log(database_url)
    unit, elsewhere = new_unit_id(log.id), new_log_id()
    assert log.decide(unit, Verdict.MOVED, [elsewhere, "warehouse", "writer"]) is Verdict.MOVED
    assert other.decide(unit, ABORT, []) is Verdict.MOVED
    found = other.decision(unit)
    assert found is not None
    assert (found.verdict, found.moved_to, found.connections) == (Verdict.MOVED, elsewhere, ("warehouse", "writer"))
    aborted = new_unit_id(log.id)
    log.decide(aborted, ABORT, [])
    assert other.decide(aborted, Verdict.MOVED, [elsewhere]) is ABORT
    for bad in ([], ["warehouse", elsewhere], ["x'--", "writer"]):  # `writer` could be a log's id
        with pytest.raises(ValueError, match="can't be the"):
            log.decide(new_unit_id(log.id), Verdict.MOVED, bad)


def test_a_unit_that_moves_needs_no_second_connection_of_a_pool_of_one(database_url: str, new_log: NewLog) -> None:
    log = new_log(database_url, pool={"size": 1, "max_overflow": 0, "timeout": 1})
    unit = new_unit_id(log.id)
    with log._engine().connect() as connection:
        if is_sqlite(connection):
            return
        connection.execute(text("SELECT 1"))
        assert log.decide(unit, Verdict.MOVED, [new_log_id(), "writer"]) is Verdict.MOVED


# ---- what is in the rows -----------------------------------------------------------------------------------------------------


def test_rows_are_of_harmless_characters_only(database_url: str, new_log: NewLog) -> None:
    log = new_log(database_url)
    log.decide(new_unit_id(log.id), COMMIT, ["warehouse_2", "writer", "writer.2"])
    log.decide(new_unit_id(log.id), ABORT, [])
    with log._engine().connect() as connection:
        rows = connection.execute(text("SELECT unit, verdict, branches FROM app_db_decisions")).all()
    assert len(rows) == 3
    assert all(re.fullmatch("[A-Za-z0-9_.,]*", word) for row in rows for word in row)


@pytest.mark.parametrize("bad", ["x'--", "x" * 21 + "'", "x" * 21 + "%", "x" * 21 + "\n", "", "é" * 22, "log"])
def test_anything_else_is_refused_before_it_is_sql(bad: str, sqlite_url: str, new_log: NewLog) -> None:
    log = new_log(sqlite_url)
    good = new_unit_id(log.id)
    with log._engine().connect() as connection:
        uses: list[Callable[[], object]] = [
            lambda: log.decide(bad, COMMIT, []),
            lambda: log.decide_within(connection, bad, []),
            lambda: log.statement(bad, []),
            lambda: log.find(bad),
            lambda: log.forget([good, bad]),
        ]
        if bad != "log":
            uses += [lambda: log.decide(good, COMMIT, ["writer", bad]), lambda: log.statement(good, [bad])]
        for use in uses:
            with pytest.raises(ValueError, match=r"can't be the (unit|connection) of an xid"):
                use()
    assert log.id == new_log(sqlite_url).id


# ---- what databases do behind one's back -----------------------------------------------------------------------------------


def test_a_lost_connection_does_not_keep_a_decision_from_being_made(
    new_postgres_url: Callable[[], str], new_mariadb_url: Callable[[], str], new_log: NewLog
) -> None:
    for url, who, kill in (
        (new_postgres_url(), "SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        (new_mariadb_url(), "SELECT CONNECTION_ID()", "KILL {}"),
    ):
        log, other = new_log(url), new_log(url)
        unit = new_unit_id(log.id)
        with log._engine().connect() as connection:
            lost = connection.scalar(text(who))
        with other._engine().connect() as connection:
            connection.execute(text(kill.format(lost)))
        time.sleep(0.1)
        assert log.decide(unit, COMMIT, []) is COMMIT


def test_the_id_of_a_log_outlives_the_server_whatever_it_thinks_of_durability(
    new_postgres: Callable[..., PostgresServer], new_log: NewLog
) -> None:
    server = new_postgres(settings={"synchronous_commit": "off", "wal_writer_delay": "10s"})
    server.create_database("shop")
    server.execute("CHECKPOINT")
    time.sleep(0.3)
    log = new_log(server.url("shop"))
    made = log.id
    server.restart("immediate")
    log._engine().dispose()
    assert log.id_if_made() == made


@pytest.mark.parametrize("how", ["decide", "decide_within"])
def test_a_decision_outlives_the_server_whatever_it_thinks_of_durability(
    how: str, new_postgres: Callable[..., PostgresServer], new_log: NewLog
) -> None:
    """With `synchronous_commit = off`, PostgreSQL answers before a commit is written, and forgets it when it is killed."""
    server = new_postgres(settings={"synchronous_commit": "off", "wal_writer_delay": "10s"})
    server.create_database("shop")
    log = new_log(server.url("shop"))
    log.ensure()
    server.execute("CHECKPOINT")
    time.sleep(0.3)
    for _ in range(3):
        unit = new_unit_id(log.id)
        if how == "decide":
            log.decide(unit, COMMIT, [])
        else:
            with log._engine().begin() as connection:
                log.decide_within(connection, unit, [])
        server.restart("immediate")
        log._engine().dispose()
        assert log.find(unit) is COMMIT


def test_the_table_is_one_with_transactions(mariadb_url: str, new_log: NewLog) -> None:
    """A MySQL or MariaDB whose default engine is MyISAM would keep a decision that was rolled back."""
    log = new_log(mariadb_url, connect_args={"init_command": "SET default_storage_engine = MyISAM"})
    unit = new_unit_id(log.id)
    with log._engine().connect() as connection:
        log.decide_within(connection, unit, [])
        connection.rollback()
    assert log.find(unit) is None


def test_waiting_for_others_is_bounded_on_mysql_too_and_its_sessions_stay_as_they_were(
    mariadb_url: str, new_log: NewLog, mariadb: MariaDBServer
) -> None:
    """MySQL has no SET STATEMENT."""
    log, other = new_log(mariadb_url), new_log(mariadb_url)
    unit = new_unit_id(log.id)
    with other._engine().connect() as connection:
        usual = connection.scalar(text("SELECT @@innodb_lock_wait_timeout"))
    other._engine().dialect.is_mariadb = False  # type: ignore[attr-defined]
    with log._engine().connect() as connection:
        log.decide_within(connection, unit, [])
        with pytest.raises(DBAPIError):
            other.decide(unit, ABORT, [])
        connection.commit()
    assert other.decide(unit, ABORT, []) is COMMIT
    with other._engine().connect() as connection:
        assert connection.scalar(text("SELECT @@innodb_lock_wait_timeout")) == usual != 1


def test_who_looks_does_not_wait_for_who_writes(database_url: str, new_log: NewLog) -> None:
    """SQLAlchemy begins a transaction for whatever it executes, and app_db's are ones that write on SQLite."""
    log, other = new_log(database_url), new_log(database_url)
    unit = new_unit_id(log.id)
    log.decide(unit, COMMIT, [])
    with log._engine().connect() as connection:
        log.decide_within(connection, new_unit_id(log.id), [])
        began = time.monotonic()
        assert (other.id, other.find(unit), len(other.decisions())) == (log.id, COMMIT, 1)
        assert time.monotonic() - began < 0.5


def test_a_decision_is_one_round_trip_on_postgresql(postgres_url: str, new_log: NewLog, tmp_path: Path) -> None:
    log = new_log(postgres_url)
    unit = new_unit_id(log.id)
    with (tmp_path / "trace").open("w+") as trace:
        with log._engine().connect() as connection:
            libpq = connection.connection.driver_connection.pgconn  # type: ignore[union-attr]
            libpq.trace(trace.fileno())
        log.decide(unit, COMMIT, ["writer"])
        libpq.untrace()
        trace.seek(0)
        said = [line.split("\t")[1:] for line in trace.read().splitlines()]
    assert [words[2] for words in said if words[0] == "F"] == ["Query"]


def test_a_decision_is_two_round_trips_on_mariadb(mariadb_url: str, new_log: NewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    import pymysql

    log = new_log(mariadb_url)
    unit = new_unit_id(log.id)
    assert log.find(unit) is None  # and is connected
    sent: list[object] = []
    real = pymysql.connections.Connection._execute_command

    def note(connection: Any, kind: int, statement: str) -> Any:
        sent.append(statement)
        return real(connection, kind, statement)

    monkeypatch.setattr(pymysql.connections.Connection, "_execute_command", note)
    log.decide(unit, COMMIT, ["writer"])
    assert len(sent) == 2, sent


def test_a_log_says_where_it_is(sqlite_url: str, new_log: NewLog) -> None:
    assert new_log(sqlite_url).place == "the table app_db_decisions of 'writer'"
