"""What fails for a reason that may pass is run again, from its start, in a new unit of work, and nothing else is."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
import pymysql
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm.exc import StaleDataError
from transaction.interfaces import TransientError

from app_db import DatabaseContainer, retryable, transactional
from app_db._units.manager import current
from app_db.errors import HookFailed, OutcomeUnknown, UnitOfWorkDoomed
from harness.applications import running
from harness.items import Databases, Item, database_name, opened
from harness.servers import MariaDBServer, PostgresServer

T = TypeVar("T")
Run = Callable[[DatabaseContainer, Callable[[], T]], T]

# ---- the two ways to ask for attempts ---------------------------------------------------------------------------------


def run_by_method(container: DatabaseContainer, function: Callable[[], T]) -> T:
    result: T = container.transaction(attempts=4, backoff=0.001).run(function)
    return result


@transactional(attempts=4, backoff=0.001)
def decorated(function: Callable[[], T]) -> T:
    return function()


def run_by_decorator(container: DatabaseContainer, function: Callable[[], T]) -> T:
    container.wire(modules=[sys.modules[__name__]])
    try:
        return decorated(function)
    finally:
        container.unwire()


both_ways = pytest.mark.parametrize("run", [run_by_method, run_by_decorator])


# ---- real reasons -----------------------------------------------------------------------------------------------------


class Scene:
    """Databases, and a function that fails in the first attempt for a real reason."""

    def __init__(self, databases: Databases) -> None:
        self.databases = databases
        self.attempts = 0

    def fail_at_first(self) -> None:
        """Add 1 to the amount of "a"."""
        raise NotImplementedError

    def expected(self) -> int:
        return 1


class UpdateConflict(Scene):
    """REPEATABLE READ: the row has been changed since the transaction began to look."""

    def fail_at_first(self) -> None:
        self.attempts += 1
        item = self.databases.session().get_one(Item, "a")
        if self.attempts == 1:
            self.databases.rival("UPDATE item SET amount = amount + 10 WHERE name = 'a'")
        item.amount += 1

    def expected(self) -> int:
        return 11


class WriteSkew(Scene):
    """SERIALIZABLE: two transactions read what the other writes. It is COMMIT that fails."""

    def fail_at_first(self) -> None:
        self.attempts += 1
        session = self.databases.session()
        session.execute(text("SELECT sum(amount) FROM item"))
        session.execute(text("UPDATE item SET amount = amount + 1 WHERE name = 'a'"))
        if self.attempts == 1:
            with self.databases.outside().execution_options(isolation_level="SERIALIZABLE").begin() as rival:
                rival.execute(text("SELECT sum(amount) FROM item"))
                rival.execute(text("UPDATE item SET amount = 7 WHERE name = 'b'"))


class Killed(Scene):
    """The connection is lost before COMMIT is sent."""

    postgres: PostgresServer

    def fail_at_first(self) -> None:
        self.attempts += 1
        session = self.databases.session()
        session.execute(text("UPDATE item SET amount = amount + 1 WHERE name = 'a'"))
        if self.attempts == 1:
            self.postgres.execute("SELECT pg_terminate_backend(%s, 5000)", [self.databases.backend_id()])
        session.execute(text("SELECT 1"))


class Locked(Scene):
    """SQLite, with somebody else writing for longer than the busy timeout."""

    rival: sqlite3.Connection

    def fail_at_first(self) -> None:
        self.attempts += 1
        if self.attempts == 3:
            self.rival.rollback()
        self.databases.session().execute(text("UPDATE item SET amount = amount + 1 WHERE name = 'a'"))


@contextmanager
def update_conflict(request: pytest.FixtureRequest) -> Iterator[Scene]:
    url = request.getfixturevalue("postgres_url")
    with opened({"writer": url}, each={"isolation_level": "REPEATABLE READ"}) as databases:
        yield UpdateConflict(databases)


@contextmanager
def write_skew(request: pytest.FixtureRequest) -> Iterator[Scene]:
    url = request.getfixturevalue("postgres_url")
    with opened({"writer": url}, each={"isolation_level": "SERIALIZABLE"}) as databases:
        yield WriteSkew(databases)


@contextmanager
def killed(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with opened({"writer": request.getfixturevalue("postgres_url")}) as databases:
        scene = Killed(databases)
        scene.postgres = request.getfixturevalue("postgres")
        yield scene


@contextmanager
def locked(request: pytest.FixtureRequest) -> Iterator[Scene]:
    url = request.getfixturevalue("sqlite_url")
    with opened({"writer": url}, each={"connect_args": {"timeout": 0.05}}) as databases:
        scene = Locked(databases)
        databases.put("a")
        databases.items()
        databases.engine().connect().close()  # connecting itself would wait for the rival
        scene.rival = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        scene.rival.execute("BEGIN IMMEDIATE")
        try:
            yield scene
        finally:
            scene.rival.close()


SCENES = {scene.__name__: scene for scene in (update_conflict, write_skew, killed, locked)}


@pytest.fixture(params=SCENES)
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with SCENES[request.param](request) as scene:
        if request.param != "locked":
            scene.databases.put("a", "b")
        yield scene


@both_ways
def test_a_real_failure_passes_at_a_later_attempt(scene: Scene, run: Run[None]) -> None:
    run(scene.databases.container, scene.fail_at_first)
    assert scene.attempts == (3 if isinstance(scene, Locked) else 2)
    assert scene.databases.amount("a") == scene.expected()


def fail_and_flush(scene: Scene) -> None:
    scene.fail_at_first()
    scene.databases.session().flush()


@both_ways
def test_inside_an_outer_unit_nothing_is_tried_again(scene: Scene, run: Run[Any]) -> None:
    """The database has given up the whole transaction: a second attempt would only work on a half of it."""
    container = scene.databases.container
    with pytest.raises(DBAPIError) as raised, container.transaction():
        run(container, lambda: fail_and_flush(scene))
        assert isinstance(scene, WriteSkew)  # which only fails at COMMIT
    assert retryable(raised.value)  # the original error, so that whoever repeats the whole can tell
    assert scene.attempts == 1
    if not isinstance(scene, WriteSkew):
        (note,) = raised.value.__notes__
        assert "outermost" in note
        assert "attempts" in note


@pytest.mark.parametrize("scene", ["update_conflict", "killed", "locked"], indirect=True)
def test_the_outer_unit_of_one_that_was_not_tried_again_cannot_commit(scene: Scene) -> None:
    container = scene.databases.container
    with pytest.raises(UnitOfWorkDoomed), container.transaction(), pytest.raises(DBAPIError):
        run_by_method(container, lambda: fail_and_flush(scene))
    assert scene.attempts == 1
    assert scene.databases.amount("a") in (0, 10)


def test_an_outer_unit_with_attempts_repeats_the_whole(scene: Scene) -> None:
    container = scene.databases.container
    outer = 0

    def whole() -> None:
        nonlocal outer
        outer += 1
        run_by_method(container, scene.fail_at_first)

    container.transaction(attempts=4, backoff=0.001).run(whole)
    assert outer == scene.attempts == (3 if isinstance(scene, Locked) else 2)
    assert scene.databases.amount("a") == scene.expected()


@pytest.mark.representative("run_by_method-postgres", "run_by_decorator-mariadb")
@pytest.mark.parametrize("server", ["postgres", "mariadb"])
@both_ways
def test_the_victim_of_a_deadlock_is_run_again(server: str, run: Run[None], request: pytest.FixtureRequest) -> None:
    with opened({"writer": request.getfixturevalue(f"{server}_url")}) as databases:
        databases.put("a", "b")
        runs: list[str] = []
        errors: list[BaseException] = []
        meeting = threading.Barrier(2)

        def transfer(first: str, second: str) -> None:
            def once() -> None:
                runs.append(first)
                session = databases.session()
                statement = text("UPDATE item SET amount = amount + 1 WHERE name = :name")
                session.execute(statement, {"name": first})
                if runs.count(first) == 1:
                    meeting.wait(30)
                session.execute(statement, {"name": second})

            try:
                container.transaction(attempts=4, backoff=0.001).run(once) if run is run_by_method else decorated(once)
            except BaseException as error:
                errors.append(error)

        container = databases.container
        container.wire(modules=[sys.modules[__name__]])
        threads = [threading.Thread(target=transfer, args=names) for names in (("a", "b"), ("b", "a"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        container.unwire()
        assert errors == []
        assert 3 <= len(runs) <= 8  # on a busy machine both can fall victim
        assert (databases.amount("a"), databases.amount("b")) == (2, 2)


@both_ways
def test_a_connection_lost_during_commit_is_not_tried_again(postgres: PostgresServer, postgres_url: str, run: Run[None]) -> None:
    """Nobody knows whether the COMMIT was carried out, so a second attempt might do everything twice."""
    with opened({"writer": postgres_url}) as databases:
        runs: list[int] = []

        def function() -> None:
            runs.append(1)
            databases.add("a")
            postgres.execute("SELECT pg_terminate_backend(%s, 5000)", [databases.backend_id()])

        with pytest.raises(OutcomeUnknown):
            run(databases.container, function)
        assert runs == [1]
        with databases.container.transaction():
            databases.add("b")
        assert databases.items() == ["b"]


# ---- where it fails ---------------------------------------------------------------------------------------------------


class Passing(Exception):
    """An application's own error, which one of its data managers vouches for."""


class DataManager:
    """A data manager of the application that votes against the first attempt."""

    def __init__(self, error: Exception, *, vouches: bool) -> None:
        self.error = error
        if vouches:
            self.should_retry = lambda error: isinstance(error, Passing)

    def sortKey(self) -> str:
        return "~~~last"

    def tpc_vote(self, transaction: Any) -> None:
        raise self.error

    def nothing(self, transaction: Any) -> None: ...

    abort = tpc_begin = commit = tpc_finish = tpc_abort = nothing


def in_the_function(databases: Databases) -> None:
    databases.add("first attempt")
    raise TransientError


def in_the_flush(databases: Databases) -> None:
    databases.session().get_one(Item, "a").amount += 1
    databases.rival("UPDATE item SET amount = amount + 10 WHERE name = 'a'")


def in_the_commit(databases: Databases) -> None:
    session = databases.session()
    session.execute(text("SELECT sum(amount) FROM item"))
    session.execute(text("UPDATE item SET amount = amount + 1 WHERE name = 'a'"))
    with databases.outside().execution_options(isolation_level="SERIALIZABLE").begin() as rival:
        rival.execute(text("SELECT sum(amount) FROM item"))
        rival.execute(text("UPDATE item SET amount = 7 WHERE name = 'b'"))


def in_a_hook(databases: Databases) -> None:
    def fail() -> None:
        databases.add("in the hook")
        raise TransientError

    databases.add("first attempt")
    databases.container.unit().before_commit(fail)


def in_a_vote(databases: Databases) -> None:
    # Sorted before the databases: what votes after them votes too late.
    manager = DataManager(TransientError(), vouches=False)
    manager.sortKey = lambda: "a"  # type: ignore[method-assign]
    databases.add("first attempt")
    databases.container.unit().transaction.join(manager)


def in_a_vote_that_is_vouched_for(databases: Databases) -> None:
    manager = DataManager(Passing(), vouches=True)
    manager.sortKey = lambda: "a"  # type: ignore[method-assign]
    databases.add("first attempt")
    databases.container.unit().transaction.join(manager)


STEPS = (in_the_function, in_the_flush, in_the_commit, in_a_hook, in_a_vote, in_a_vote_that_is_vouched_for)


@pytest.mark.parametrize("step", STEPS)
@both_ways
def test_no_attempt_begins_before_the_one_before_it_has_ended(
    step: Callable[[Databases], None], run: Run[str], postgres: PostgresServer, postgres_url: str
) -> None:
    with opened({"writer": postgres_url}, each={"isolation_level": "SERIALIZABLE"}) as databases:
        databases.put("a", "b")
        manager = databases.container.transaction_manager()
        transactions: list[Any] = []

        def function() -> str:
            transaction = current(manager)
            assert transaction is not None
            assert all(transaction is not before for before in transactions)
            transactions.append(transaction)
            assert databases.checked_out() == 0
            assert postgres.open_transactions(database_name(postgres_url)) == []
            if len(transactions) == 1:
                step(databases)
            else:
                databases.add("second attempt")
            return "done"

        assert run(databases.container, function) == "done"
        assert len(transactions) == 2
        assert databases.items() == ["a", "b", "second attempt"]
        assert databases.amount("a") in (0, 10)


# ---- what is not tried again ------------------------------------------------------------------------------------------


@both_ways
def test_when_no_attempt_is_left_the_error_of_the_last_is_raised(sqlite_url: str, run: Run[None]) -> None:
    with opened({"writer": sqlite_url}) as databases:
        errors: list[TransientError] = []

        def function() -> None:
            databases.add("a")
            errors.append(TransientError(f"attempt {len(errors) + 1}"))
            raise errors[-1]

        with pytest.raises(TransientError) as raised:
            run(databases.container, function)
        assert len(errors) == 4
        assert raised.value is errors[-1]
        assert databases.items() == []


@both_ways
def test_what_would_fail_again_is_run_once(database_url: str, run: Run[None]) -> None:
    with opened({"writer": database_url}) as databases:
        databases.put("a")
        runs: list[int] = []

        def add_twice() -> None:
            runs.append(1)
            databases.session().add(Item(name="a"))

        with pytest.raises(IntegrityError):
            run(databases.container, add_twice)
        assert runs == [1]
        assert databases.items() == ["a"]


@both_ways
def test_a_hook_that_fails_after_the_commit_repeats_nothing(sqlite_url: str, run: Run[None]) -> None:
    with opened({"writer": sqlite_url}) as databases:
        runs: list[int] = []

        def fail() -> None:
            raise TransientError

        def function() -> None:
            runs.append(1)
            databases.add(f"attempt {len(runs)}")
            databases.container.unit().on_commit(fail)

        with pytest.raises(HookFailed):
            run(databases.container, function)
        assert runs == [1]
        assert databases.items() == ["attempt 1"]


def test_one_attempt_is_what_a_unit_has_unless_told_otherwise(sqlite_url: str) -> None:
    with opened({"writer": sqlite_url}) as databases:
        runs: list[int] = []

        def function() -> None:
            runs.append(1)
            raise TransientError

        with pytest.raises(TransientError) as raised:
            databases.container.transaction().run(function)
        assert runs == [1]
        assert not hasattr(raised.value, "__notes__")


def test_an_exception_that_is_no_error_is_not_tried_again(sqlite_url: str) -> None:
    with opened({"writer": sqlite_url}) as databases:
        runs: list[int] = []

        def function() -> None:
            runs.append(1)
            databases.add("a")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_by_method(databases.container, function)
        assert runs == [1]
        assert databases.items() == []


def test_arguments_and_results_pass_through(sqlite_url: str) -> None:
    with opened({"writer": sqlite_url}) as databases:

        def function(*args: int, **kwargs: int) -> tuple[tuple[int, ...], dict[str, int]]:
            return args, kwargs

        assert databases.container.transaction(attempts=2).run(function, 1, 2, three=3) == ((1, 2), {"three": 3})


# ---- pauses -----------------------------------------------------------------------------------------------------------


def pauses(databases: Databases, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[float]:
    slept: list[float] = []

    def function() -> None:
        raise TransientError

    with monkeypatch.context() as patched:
        patched.setattr("app_db._units.transactions.time.sleep", slept.append)
        with pytest.raises(TransientError):
            databases.container.transaction(**options).run(function)
    return slept


def test_the_pauses_between_attempts_are_random_grow_and_have_a_bound(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened({"writer": sqlite_url}) as databases:
        rounds = [pauses(databases, monkeypatch, attempts=10, backoff=0.05) for _ in range(60)]
        assert {len(slept) for slept in rounds} == {9}
        for number, pause in enumerate(zip(*rounds, strict=True)):
            bound = min(1.0, 0.05 * 2**number)
            assert 0 <= min(pause) < bound / 2 < max(pause) <= bound  # 60 tosses of a coin don't all fall alike
            assert len(set(pause)) > 30


def test_without_backoff_there_is_no_pause(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened({"writer": sqlite_url}) as databases:
        assert set(pauses(databases, monkeypatch, attempts=5, backoff=0)) <= {0}


# ---- which errors are worth another attempt -----------------------------------------------------------------------------


def driver_error(module: str, *args: object, **attributes: object) -> Exception:
    """An error as a driver raises it that is not installed: known by its module, its arguments and its attributes."""
    kind = type("OperationalError", (Exception,), {"__module__": module})
    error: Exception = kind(*args)
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


def sqlite_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("the text does not matter")
    error.sqlite_errorcode = code
    return error


class OracleCode:
    """What oracledb and cx_Oracle give their errors as the only argument."""

    def __init__(self, code: int) -> None:
        self.code = code


DRIVER_ERRORS: list[tuple[str, Exception, bool]] = [
    ("psycopg: serialization failure", psycopg.errors.SerializationFailure(), True),
    ("psycopg: deadlock", psycopg.errors.DeadlockDetected(), True),
    ("psycopg: unique violation", psycopg.errors.UniqueViolation(), False),
    ("psycopg: statement timeout", psycopg.errors.QueryCanceled(), False),
    ("psycopg: no SQLSTATE", psycopg.OperationalError("connection refused"), False),
    ("psycopg2: serialization failure", driver_error("psycopg2.errors", pgcode="40001"), True),
    ("psycopg2: unique violation", driver_error("psycopg2.errors", pgcode="23505"), False),
    ("asyncpg: serialization failure", driver_error("sqlalchemy.dialects.postgresql.asyncpg", "", sqlstate="40001"), True),
    ("asyncpg: deadlock", driver_error("sqlalchemy.dialects.postgresql.asyncpg", "", sqlstate="40P01"), True),
    ("asyncpg: unique violation", driver_error("sqlalchemy.dialects.postgresql.asyncpg", "", sqlstate="23505"), False),
    ("PyMySQL: deadlock", pymysql.err.OperationalError(1213, "Deadlock found"), True),
    ("PyMySQL: lock wait timeout", pymysql.err.OperationalError(1205, "Lock wait timeout exceeded"), True),
    ("PyMySQL: changed since read", pymysql.err.OperationalError(1020, "Record has changed"), True),
    ("PyMySQL: duplicate", pymysql.err.IntegrityError(1062, "Duplicate entry"), False),
    ("PyMySQL: too many connections", pymysql.err.OperationalError(1040, "Too many connections"), True),
    ("PyMySQL: a Galera node that is not ready", pymysql.err.OperationalError(1047, "WSREP has not yet prepared node"), True),
    (
        "PyMySQL: a server that went read-only",
        pymysql.err.OperationalError(1290, "The MariaDB server is running with the --read-only option"),
        True,
    ),
    ("PyMySQL: another option", pymysql.err.OperationalError(1290, "running with the --secure-file-priv option"), False),
    ("PyMySQL: without arguments", pymysql.err.OperationalError(), False),
    ("mysqlclient: deadlock", driver_error("MySQLdb", 1213, "Deadlock found"), True),
    ("mysqlclient: deadlock, by its inner module", driver_error("MySQLdb._exceptions", 1213, "Deadlock found"), True),
    ("mysqlclient: lock wait timeout", driver_error("MySQLdb", 1205, "Lock wait timeout exceeded"), True),
    ("mysqlclient: duplicate", driver_error("MySQLdb", 1062, "Duplicate entry"), False),
    ("asyncmy: deadlock", driver_error("asyncmy.errors", 1213, "Deadlock found"), True),
    ("oracledb: can't serialize", driver_error("oracledb.exceptions", OracleCode(8177)), True),
    ("oracledb: deadlock", driver_error("oracledb.exceptions", OracleCode(60)), True),
    ("oracledb: unique", driver_error("oracledb.exceptions", OracleCode(1)), False),
    ("cx_Oracle: can't serialize", driver_error("cx_Oracle", OracleCode(8177)), True),
    ("SQLite: busy", sqlite_error(sqlite3.SQLITE_BUSY), True),
    ("SQLite: locked", sqlite_error(sqlite3.SQLITE_LOCKED), True),
    ("SQLite: busy snapshot", sqlite_error(517), True),
    ("SQLite: locked in shared cache", sqlite_error(262), True),
    ("SQLite: constraint", sqlite_error(sqlite3.SQLITE_CONSTRAINT), False),
    ("SQLite: full", sqlite_error(sqlite3.SQLITE_FULL), False),
    ("another driver with a number that means something elsewhere", driver_error("acme", 1213, "no such table"), False),
]


@pytest.mark.parametrize(("error", "expected"), [case[1:] for case in DRIVER_ERRORS], ids=[case[0] for case in DRIVER_ERRORS])
def test_errors_of_every_driver_are_told_apart(error: Exception, expected: bool) -> None:
    assert retryable(DBAPIError("SELECT 1", {}, error)) is expected
    assert retryable(OperationalError("SELECT 1", {}, error)) is expected


@pytest.mark.parametrize("asynchronous", [False, True], ids=["PyMySQL", "asyncmy"])
def test_a_packet_that_is_too_large_is_not_sent_again(asynchronous: bool, new_mariadb: Callable[..., MariaDBServer]) -> None:
    """The server closes the connection without a word, which otherwise is worth another attempt."""
    server, tried = new_mariadb(settings={"max_allowed_packet": 2**20}), list[int]()
    server.start()
    with server.lend_database() as database, running(writer=server.url(database)) as app:
        large = text("INSERT INTO items (name) VALUES (:name)"), {"name": "x" * (2**20 + 1)}

        def send() -> None:
            tried.append(1)
            app.session("writer").execute(*large)

        async def send_awaited() -> None:
            tried.append(1)
            await app.container.writer_async_session().execute(*large)

        async def main() -> None:
            try:
                await app.container.transaction(attempts=3, backoff=0).run(send_awaited)
            finally:
                await app.container.shutdown_resources()

        with pytest.raises(OperationalError) as raised:
            asyncio.run(main()) if asynchronous else app.container.transaction(attempts=3, backoff=0).run(send)
    assert tried == [1]
    assert not retryable(raised.value)


def test_a_lost_connection_is_worth_another_attempt_whatever_the_driver_says() -> None:
    assert retryable(DBAPIError("SELECT 1", {}, driver_error("acme", "gone"), connection_invalidated=True))


@pytest.mark.parametrize("error", [TransientError(), StaleDataError()])
def test_conflicts_seen_by_zope_or_the_orm_are_worth_another_attempt(error: Exception) -> None:
    assert retryable(error)


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), UnitOfWorkDoomed("why"), OutcomeUnknown("writer")])
def test_other_errors_are_not(error: BaseException) -> None:
    assert not retryable(error)


def test_a_row_that_somebody_else_deleted_is_tried_again(sqlite_url: str) -> None:
    with opened({"writer": sqlite_url}) as databases:
        databases.put("a")
        runs: list[int] = []

        def function() -> None:
            runs.append(1)
            session = databases.session()
            item = session.get(Item, "a")
            if item is not None:
                session.execute(text("DELETE FROM item"))
                item.amount += 1
                session.flush()

        with pytest.raises(StaleDataError):
            run_by_method(databases.container, function)
        assert len(runs) == 4
        assert databases.items() == ["a"]
