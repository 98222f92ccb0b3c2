"""However a unit of work fails, nothing of it stays behind: no connection in use, no transaction open, no row; and the error
says what happened. The next unit works."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from sqlalchemy import create_engine, event, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from app_db.errors import NotAtomic, OutcomeUnknown, ReadOnlyViolation, TransactionLost, UnitOfWorkDoomed, UnitOfWorkEnded
from harness.applications import DEFER_UNIQUENESS, Application, Item, read_lock, running
from harness.servers import MariaDBServer, PostgresServer, Server

NewUrl = Callable[[], str]


class Broken(Exception):
    """The application's own error."""


@dataclass
class Place:
    """A database to fail in, and the server it is on if it is on one."""

    url: str
    server: Server | None

    def check_rest(self, app: Application) -> None:
        """Assert that nothing is under way in the database."""
        assert app.checked_out() == 0
        if self.server is not None:
            database = make_url(self.url).database
            assert database is not None
            assert self.server.open_transactions(database, within=2.0) == []
            return
        pooled = app.engine().raw_connection()
        try:
            driver_connection: Any = pooled.driver_connection
            assert not driver_connection.in_transaction
        finally:
            pooled.close()
        probe = create_engine(self.url, connect_args={"timeout": 0})
        with probe.connect() as connection:
            connection.exec_driver_sql("BEGIN EXCLUSIVE")  # refused while anybody writes
        probe.dispose()

    def check_recovery(self, app: Application, *expected: str) -> None:
        """Assert that nothing is under way, that these items are there, and that the next unit works."""
        self.check_rest(app)
        assert app.names() == sorted(expected)
        with app.unit():
            app.add("next")
        self.check_rest(app)
        assert app.names() == sorted([*expected, "next"])


def place_on(name: str, request: pytest.FixtureRequest) -> Place:
    fixture = {"postgresql": "postgres"}.get(name, name)
    server: Server | None = None if name == "sqlite" else request.getfixturevalue(fixture)
    return Place(request.getfixturevalue(f"{fixture}_url"), server)


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def place(request: pytest.FixtureRequest) -> Place:
    return place_on(request.param, request)


@pytest.fixture
def on_postgres(postgres: PostgresServer, postgres_url: str) -> Place:
    return Place(postgres_url, postgres)


@pytest.fixture
def on_mariadb(mariadb: MariaDBServer, mariadb_url: str) -> Place:
    return Place(mariadb_url, mariadb)


class OtherManager:
    """Another zope data manager, which takes part in the unit and fails at one step."""

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at

    def sortKey(self) -> str:
        return "another"

    def _step(self, name: str) -> None:
        if name == self.fails_at:
            raise Broken(name)

    def tpc_begin(self, transaction: object) -> None:
        self._step("tpc_begin")

    def commit(self, transaction: object) -> None:
        self._step("commit")

    def tpc_vote(self, transaction: object) -> None:
        self._step("tpc_vote")

    def tpc_finish(self, transaction: object) -> None:
        self._step("tpc_finish")

    def tpc_abort(self, transaction: object) -> None:
        self._step("tpc_abort")

    def abort(self, transaction: object) -> None:
        self._step("abort")


# ---- every step at which a unit can fail -------------------------------------------------------------------------------


def test_a_body_that_raises_leaves_nothing_behind(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(Broken), app.unit():
            app.add("a")
            raise Broken
        place.check_recovery(app)


def test_a_flush_that_fails_leaves_nothing_behind(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(IntegrityError), app.unit():
            app.add("a")
            app.add("a")
        place.check_recovery(app)


def test_a_flush_that_fails_in_the_commit_leaves_nothing_behind(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(IntegrityError), app.unit():
            app.add("a")
            app.session().add(Item(name="a"))
        place.check_recovery(app)


def test_a_deferred_unique_constraint_that_fails_at_commit_leaves_nothing_behind(on_postgres: Place) -> None:
    with running(writer=on_postgres.url) as app:
        app.run(*DEFER_UNIQUENESS)
        with pytest.raises(IntegrityError, match="one_of_each"), app.unit():
            app.add("a")
            app.add("taken")
        on_postgres.check_recovery(app, "taken")


def test_a_deferred_foreign_key_that_fails_at_commit_leaves_nothing_behind(request: pytest.FixtureRequest) -> None:
    place = place_on("sqlite", request)
    with running(writer=place.url) as app:
        app.run("CREATE TABLE parts (item INTEGER REFERENCES items (id) DEFERRABLE INITIALLY DEFERRED)")
        with pytest.raises(IntegrityError, match="FOREIGN KEY"), app.unit():
            app.add("a")
            app.session().execute(text("INSERT INTO parts VALUES (4711)"))
        place.check_recovery(app)


def test_a_commit_that_waits_for_a_lock_in_vain_leaves_nothing_behind(on_mariadb: Place) -> None:
    with running(writer=on_mariadb.url) as app, app.plain_engine().connect() as administrator:
        try:
            with pytest.raises(OperationalError, match="1205"), app.unit() as unit:
                app.session().execute(text("SET SESSION lock_wait_timeout = 1"))
                app.add("a")
                unit.before_commit(administrator.exec_driver_sql, "FLUSH TABLES WITH READ LOCK")
        finally:
            administrator.exec_driver_sql("UNLOCK TABLES")
            administrator.rollback()
        on_mariadb.check_recovery(app)


def test_a_hook_that_fails_before_the_commit_leaves_nothing_behind(place: Place) -> None:
    def fail() -> None:
        raise Broken

    with running(writer=place.url) as app:
        with pytest.raises(Broken), app.unit() as unit:
            app.add("a")
            unit.before_commit(app.add, "b")
            unit.before_commit(fail)
        place.check_recovery(app)


@pytest.mark.parametrize("step", ["tpc_begin", "commit", "tpc_vote"])
def test_another_data_manager_that_fails_before_anything_is_committed_leaves_nothing_behind(step: str, place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(Broken, match=step), app.unit() as unit:
            unit.transaction.join(OtherManager(step))
            app.add("a")
        place.check_recovery(app)


def test_another_data_manager_that_fails_when_all_is_committed_leaves_nothing_open(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(Broken, match="tpc_finish"), app.unit() as unit:
            unit.transaction.join(OtherManager("tpc_finish"))
            app.add("a")
        place.check_recovery(app, "a")


def test_a_refused_commit_leaves_nothing_behind_in_any_of_the_databases(place: Place, new_sqlite_url: NewUrl) -> None:
    with running(writer=place.url, warehouse=new_sqlite_url()) as app:
        with pytest.raises(NotAtomic), app.unit():
            app.add("a")
            app.add("a", "warehouse")
        place.check_recovery(app)


def test_a_doomed_unit_leaves_nothing_behind(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(UnitOfWorkDoomed), app.unit() as unit:
            app.add("a")
            unit.doom()
        place.check_recovery(app)


@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_a_server_that_crashes_in_mid_transaction_leaves_nothing_behind(kind: str, request: pytest.FixtureRequest) -> None:
    settings = {"synchronous_commit": True} if kind == "postgres" else {}
    server: Server = request.getfixturevalue(f"new_{kind}")(settings=settings)
    server.create_database("shop")
    place = Place(server.url("shop"), server)
    with running(writer=place.url) as app:
        # The statement after the crash fails.
        with pytest.raises(DBAPIError), app.unit():
            app.add("a")
            server.stop("immediate")
            app.add("b")
        assert app.checked_out() == 0
        server.start()
        place.check_recovery(app)

        # The application gives up after the crash: its error is not hidden by those of the rollback.
        with pytest.raises(Broken), app.unit():
            app.add("c")
            server.restart("immediate")
            raise Broken
        app.run("DELETE FROM items")
        place.check_recovery(app)

        # The server is away when the unit begins.
        server.stop("immediate")
        with pytest.raises(DBAPIError), app.unit():
            app.add("d")
        assert app.checked_out() == 0
        server.start()
        app.run("DELETE FROM items")
        place.check_recovery(app)


# ---- what is no Exception ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_aborts_the_unit(kind: type[BaseException], place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(kind), app.unit():
            app.add("a")
            raise kind
        place.check_recovery(app)


def test_an_interruption_in_a_hook_before_the_commit_aborts_the_unit(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(KeyboardInterrupt), app.unit() as unit:
            app.add("a")
            unit.before_commit(signal.raise_signal, signal.SIGINT)
        place.check_recovery(app)


@pytest.mark.parametrize("step", ["tpc_begin", "commit", "tpc_vote"])
def test_an_interruption_inside_the_commit_aborts_the_unit(step: str, place: Place) -> None:
    class Interrupted(OtherManager):
        def _step(self, name: str) -> None:
            if name == self.fails_at:
                signal.raise_signal(signal.SIGINT)

    with running(writer=place.url) as app:
        with pytest.raises(KeyboardInterrupt), app.unit() as unit:
            unit.transaction.join(Interrupted(step))
            app.add("a")
        place.check_recovery(app)


def test_an_interruption_while_a_statement_runs_aborts_the_unit(on_postgres: Place) -> None:
    with running(writer=on_postgres.url) as app:
        timer = threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
        with pytest.raises(KeyboardInterrupt), app.unit():
            app.add("a")
            timer.start()
            app.session().execute(text("SELECT pg_sleep(30)"))
        timer.join()
        on_postgres.check_recovery(app)


def test_an_interrupted_unit_is_not_run_again(sqlite_url: str) -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    with running(writer=sqlite_url) as app:
        with pytest.raises(KeyboardInterrupt):
            app.unit(attempts=3, backoff=0).run(work)
        assert len(calls) == 1


# ---- errors on the way out ---------------------------------------------------------------------------------------------


def test_an_error_of_the_abort_does_not_hide_the_one_it_is_for(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with running(writer=place.url) as app:
        with caplog.at_level(logging.ERROR), pytest.raises(Broken, match="the first"), app.unit() as unit:
            unit.transaction.join(OtherManager("abort"))
            app.add("a")
            raise Broken("the first")
        assert "Aborting" in caplog.text
        place.check_recovery(app)


@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_a_connection_that_died_does_not_hide_the_error_of_the_application(kind: str, request: pytest.FixtureRequest) -> None:
    place = place_on(kind if kind == "mariadb" else "postgresql", request)
    with running(writer=place.url) as app:
        with pytest.raises(Broken), app.unit():
            app.add("a")
            kill_backend(place, app)
            raise Broken
        place.check_recovery(app)


def kill_backend(place: Place, app: Application) -> None:
    """End the connection that the writer's session uses, from the server's side."""
    assert place.server is not None
    if isinstance(place.server, PostgresServer):
        pid = app.session().scalar(text("SELECT pg_backend_pid()"))
        place.server.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    else:
        place.server.execute(f"KILL {app.session().scalar(text('SELECT CONNECTION_ID()'))}")


# ---- swallowed errors ----------------------------------------------------------------------------------------------------


def swallow(function: Callable[..., object], *args: object) -> SQLAlchemyError:
    """Call a function whose database error nobody hears of, as applications will."""
    with pytest.raises(SQLAlchemyError) as caught:
        function(*args)
    return caught.value


def execute(app: Application, statement: str) -> None:
    app.session().execute(text(statement))


def test_postgresql_a_swallowed_statement_error_is_told_at_the_commit(on_postgres: Place) -> None:
    with running(writer=on_postgres.url) as app:
        with pytest.raises(TransactionLost) as caught, app.unit():
            app.add("a")
            swallow(execute, app, "INSERT INTO items (name) VALUES ('a')")
        assert caught.value.connection == "writer"
        assert "'writer'" in str(caught.value)
        assert "begin_nested" in str(caught.value)
        on_postgres.check_recovery(app)


def test_postgresql_it_is_told_as_well_when_the_failed_statement_came_first(on_postgres: Place) -> None:
    with running(writer=on_postgres.url) as app:
        with pytest.raises(TransactionLost), app.unit():
            swallow(execute, app, "SELECT 1/0")
            swallow(execute, app, "INSERT INTO items (name) VALUES ('a')")
        on_postgres.check_recovery(app)


def test_postgresql_a_swallowed_error_of_one_database_commits_none_of_the_others(
    on_postgres: Place, new_postgres_url: NewUrl
) -> None:
    with running("best_effort", archive=new_postgres_url(), writer=on_postgres.url) as app:
        with pytest.raises(TransactionLost) as caught, app.unit():
            app.add("a", "archive")
            app.add("a")
            swallow(execute, app, "SELECT nothing FROM nowhere")
        assert caught.value.connection == "writer"
        assert app.names("archive") == []
        on_postgres.check_recovery(app)


def test_postgresql_a_swallowed_error_of_a_database_that_was_only_read_does_not_matter(
    on_postgres: Place, new_postgres_url: NewUrl
) -> None:
    with running(archive=new_postgres_url(), writer=on_postgres.url) as app:
        with app.unit():
            app.add("a")
            swallow(app.session("archive").execute, text("SELECT nothing FROM nowhere"))
        on_postgres.check_recovery(app, "a")


def test_postgresql_a_swallowed_error_that_lost_the_locks_of_the_unit_is_told_at_the_commit(
    on_postgres: Place, new_postgres_url: NewUrl
) -> None:
    with running(archive=new_postgres_url(), writer=on_postgres.url) as app:
        with pytest.raises(TransactionLost) as caught, app.unit():
            app.session("archive").execute(text("SELECT name FROM items FOR UPDATE"))
            swallow(app.session("archive").execute, text("SELECT nothing FROM nowhere"))
            app.add("guarded by locks that are gone")
        assert caught.value.connection == "archive"
        on_postgres.check_recovery(app)


def test_postgresql_a_unit_whose_transaction_was_lost_is_not_run_again(on_postgres: Place) -> None:
    calls: list[int] = []

    def work(app: Application) -> None:
        calls.append(1)
        app.add("a")
        swallow(execute, app, "SELECT 1/0")

    with running(writer=on_postgres.url) as app:
        with pytest.raises(TransactionLost):
            app.unit(attempts=3, backoff=0).run(work, app)
        assert len(calls) == 1
        on_postgres.check_recovery(app)


def in_session_savepoint(app: Application, statement: str) -> None:
    with app.session().begin_nested():
        execute(app, statement)


def in_nested_unit(app: Application, statement: str) -> None:
    with app.unit("nested"):
        execute(app, statement)


def in_unit_savepoint(app: Application, statement: str) -> None:
    savepoint = app.container.unit().savepoint()
    try:
        execute(app, statement)
    except SQLAlchemyError:
        savepoint.rollback()
        raise


SAVEPOINTS = [in_session_savepoint, in_nested_unit, in_unit_savepoint]


@pytest.mark.parametrize("guard", SAVEPOINTS, ids=lambda guard: guard.__name__)
@pytest.mark.parametrize("statement", ["INSERT INTO items (name) VALUES ('a')", "SELECT nothing FROM nowhere"])
def test_behind_a_savepoint_a_statement_may_fail_and_the_unit_goes_on(
    guard: Callable[[Application, str], None], statement: str, place: Place
) -> None:
    with running(writer=place.url) as app:
        with app.unit():
            app.add("a")
            swallow(guard, app, statement)
            app.add("b")
            swallow(guard, app, statement)
        place.check_recovery(app, "a", "b")


def test_a_statement_error_outside_of_a_savepoint_is_told_although_others_were_inside(on_postgres: Place) -> None:
    with running(writer=on_postgres.url) as app:
        with pytest.raises(TransactionLost), app.unit():
            app.add("a")
            swallow(in_session_savepoint, app, "SELECT 1/0")
            swallow(execute, app, "SELECT 1/0")
        on_postgres.check_recovery(app)


def test_where_the_database_goes_on_after_a_failed_statement_so_does_the_unit(request: pytest.FixtureRequest) -> None:
    for name in ("sqlite", "mariadb"):
        place = place_on(name, request)
        with running(writer=place.url) as app:
            with app.unit():
                app.add("a")
                swallow(execute, app, "INSERT INTO items (name) VALUES ('a')")
                app.add("b")
            place.check_recovery(app, "a", "b")


def test_a_swallowed_flush_error_is_told_at_the_commit(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(TransactionLost) as caught, app.unit():
            app.add("a")
            swallow(app.add, "a")
        assert caught.value.connection == "writer"
        place.check_recovery(app)


def test_a_swallowed_error_of_the_first_flush_is_told_at_the_commit(place: Place) -> None:
    with running(writer=place.url) as app:
        app.run("INSERT INTO items (name) VALUES ('a')")
        with pytest.raises(TransactionLost), app.unit():
            swallow(app.add, "a")
        place.check_recovery(app, "a")


def test_a_swallowed_flush_error_with_more_work_after_it_is_never_a_success(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(TransactionLost), app.unit():
            app.add("a")
            swallow(app.add, "a")
            app.session().add(Item(name="b"))
        place.check_recovery(app)


def test_a_swallowed_flush_error_behind_a_savepoint_undoes_that_part_only(place: Place) -> None:
    def add_again(app: Application) -> None:
        with app.session().begin_nested():
            app.add("a")

    with running(writer=place.url) as app:
        with app.unit():
            app.add("a")
            swallow(add_again, app)
            app.add("b")
        place.check_recovery(app, "a", "b")


def test_a_swallowed_flush_error_behind_a_savepoint_that_is_left_open_is_told_at_the_commit(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(TransactionLost), app.unit():
            app.add("a")
            with app.unit(propagation="nested"):
                swallow(app.add, "a")
        place.check_recovery(app)


@pytest.mark.parametrize("statement", ["INSERT INTO items (id, name) VALUES (1, 'a'), (1, 'b')", "ROLLBACK"])
def test_postgresql_what_the_drivers_own_cursor_did_to_the_transaction_is_told_at_the_commit(
    statement: str, on_postgres: Place
) -> None:
    with running(writer=on_postgres.url) as app:
        with pytest.raises(TransactionLost), app.unit():
            app.add("a")
            with suppress(Exception):
                app.session().connection().connection.cursor().execute(statement)
        on_postgres.check_recovery(app)


def test_a_session_that_joins_while_another_commits_is_refused(new_sqlite_url: NewUrl) -> None:
    """Nobody would commit it, nor return its connection."""
    with running(writer=new_sqlite_url(), log=new_sqlite_url()) as app:
        refused: list[BaseException] = []

        def add(_: Any) -> None:
            try:
                app.add("late", "log")
            except UnitOfWorkEnded as error:
                refused.append(error)

        with app.unit():
            event.listen(app.session(), "after_commit", add)
            app.add("a")
        assert len(refused) == 1
        assert app.checked_out() == 0


# ---- MariaDB: a deadlock takes the whole transaction back, a lock waited for in vain only the statement -----------------


PLACES = [
    "CREATE TABLE places (id INTEGER PRIMARY KEY, visits INTEGER NOT NULL)",
    "INSERT INTO places VALUES " + ", ".join(f"({number}, 0)" for number in range(1, 51)),
]
VISIT_FIRST = "UPDATE places SET visits = visits + 1 WHERE id = 1"
VISIT_SECOND = "UPDATE places SET visits = visits + 1 WHERE id = 2"
WAITING = f"SELECT COUNT(*) FROM information_schema.processlist WHERE info = '{VISIT_FIRST}' AND time_ms > 50"


@contextmanager
def rival(app: Application) -> Iterator[Callable[[], None]]:
    """Somebody who has visited all places but the first, and goes there once the function is called, to wait for us.

    Having changed more than we, he survives a deadlock.
    """
    app.run(*PLACES)
    engine = create_engine(app.plain_engine().url)
    threads: list[threading.Thread] = []
    with engine.connect() as connection, engine.connect() as onlooker:
        connection.exec_driver_sql("UPDATE places SET visits = visits + 1 WHERE id BETWEEN 2 AND 50")

        def collide() -> None:
            threads.append(threading.Thread(target=connection.exec_driver_sql, args=[VISIT_FIRST]))
            threads[0].start()
            while not onlooker.exec_driver_sql(WAITING).scalar():
                time.sleep(0.02)

        try:
            yield collide
        finally:
            for thread in threads:
                thread.join()
            connection.rollback()
    engine.dispose()


def test_mariadb_a_swallowed_deadlock_is_told_at_the_commit_and_nothing_is_committed(on_mariadb: Place) -> None:
    with running(writer=on_mariadb.url) as app:
        with pytest.raises(TransactionLost) as caught, rival(app) as collide, app.unit():
            app.add("before the deadlock")
            execute(app, VISIT_FIRST)
            collide()
            assert "1213" in str(swallow(execute, app, VISIT_SECOND))
            app.add("after the deadlock")
        assert caught.value.connection == "writer"
        on_mariadb.check_recovery(app)


@pytest.mark.parametrize("guard", SAVEPOINTS, ids=lambda guard: guard.__name__)
def test_mariadb_a_deadlock_behind_a_savepoint_is_never_a_success(
    guard: Callable[[Application, str], None], on_mariadb: Place
) -> None:
    with running(writer=on_mariadb.url) as app:
        with pytest.raises((TransactionLost, UnitOfWorkDoomed)), rival(app) as collide, app.unit():
            app.add("before the deadlock")
            execute(app, VISIT_FIRST)
            collide()
            swallow(guard, app, VISIT_SECOND)
        on_mariadb.check_recovery(app)


def test_mariadb_a_deadlock_that_is_not_swallowed_is_tried_again(on_mariadb: Place) -> None:
    with running(writer=on_mariadb.url) as app, ExitStack() as stack:
        collide = stack.enter_context(rival(app))
        calls: list[int] = []

        def work() -> None:
            calls.append(1)
            app.add("a")
            execute(app, VISIT_FIRST)
            if len(calls) == 1:
                collide()
                try:
                    execute(app, VISIT_SECOND)
                finally:
                    stack.close()  # the rival goes away

        app.unit(attempts=2, backoff=0).run(work)
        assert len(calls) == 2
        on_mariadb.check_recovery(app, "a")


def test_mariadb_a_lock_waited_for_in_vain_undoes_its_statement_only(on_mariadb: Place) -> None:
    with running(writer=on_mariadb.url) as app, rival(app), app.unit():
        execute(app, "SET SESSION innodb_lock_wait_timeout = 1")
        app.add("a")
        assert "1205" in str(swallow(execute, app, VISIT_SECOND))
        app.add("b")
    with running(writer=on_mariadb.url) as app:
        on_mariadb.check_recovery(app, "a", "b")


def test_mariadb_a_lock_waited_for_in_vain_is_told_at_the_commit_where_it_undoes_all(
    new_mariadb: Callable[..., MariaDBServer],
) -> None:
    server = new_mariadb(settings={"innodb_rollback_on_timeout": True, "innodb_lock_wait_timeout": 1})
    server.create_database("shop")
    place = Place(server.url("shop"), server)
    with running(writer=place.url) as app:
        with pytest.raises(TransactionLost), rival(app), app.unit():
            app.add("a")
            assert "1205" in str(swallow(execute, app, VISIT_SECOND))
            app.add("b")
        place.check_recovery(app)


# ---- SQLite: a COMMIT that is refused leaves its transaction open ---------------------------------------------------------


def test_sqlite_a_refused_commit_goes_back_to_the_pool_without_its_transaction(request: pytest.FixtureRequest) -> None:
    place = place_on("sqlite", request)
    with running(writer=place.url) as app:
        with read_lock(app), pytest.raises(OperationalError, match="locked"), app.unit():
            app.add("refused")
        # The pool has this one connection, and the next unit gets it: were it inside the old transaction, it would commit it.
        place.check_recovery(app, "seed")


def test_sqlite_a_refused_commit_is_tried_again(request: pytest.FixtureRequest) -> None:
    place = place_on("sqlite", request)
    with running(writer=place.url) as app, ExitStack() as lock:
        lock.enter_context(read_lock(app))
        calls: list[int] = []

        def work() -> None:
            calls.append(1)
            if len(calls) == 3:
                lock.close()
            app.add("a")

        app.unit(attempts=3, backoff=0).run(work)
        assert len(calls) == 3
        place.check_recovery(app, "a", "seed")


# ---- a connection lost during COMMIT -------------------------------------------------------------------------------------


class Cutter:
    """A proxy in front of a server that cuts a connection at its COMMIT: before the server gets it, or before it has answered."""

    def __init__(self, url: str, cut: Literal["before the server", "before the answer"]) -> None:
        target = make_url(url)
        assert target.host is not None
        assert target.port is not None
        self._target = (target.host, target.port)
        self._cut = cut
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = target.set(port=self._listener.getsockname()[1]).render_as_string(hide_password=False)
        self.armed = False
        self.cuts = 0
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._start(self._accept)

    def _start(self, function: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=function, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            committing, answered = threading.Event(), threading.Event()
            self._start(self._pass_requests, client, server, committing, answered)
            self._start(self._pass_answers, client, server, committing, answered)

    def _pass_requests(
        self, client: socket.socket, server: socket.socket, committing: threading.Event, answered: threading.Event
    ) -> None:
        while data := received(client):
            if self.armed and data.rstrip(b"\0").endswith(b"COMMIT"):
                self.cuts += 1
                committing.set()
                if self._cut == "before the answer":
                    sent(server, data)
                    answered.wait(10)
                break
            sent(server, data)
        hang_up(client, server)

    def _pass_answers(
        self, client: socket.socket, server: socket.socket, committing: threading.Event, answered: threading.Event
    ) -> None:
        while data := received(server):
            if committing.is_set():
                answered.set()  # and nobody will know
                break
            sent(client, data)
        hang_up(client, server)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        hang_up(*self._sockets)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()


def sent(end: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # it has hung up, which its receiver notices
        end.sendall(data)


def received(end: socket.socket) -> bytes:
    try:
        return end.recv(65536)
    except OSError:
        return b""


def hang_up(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):  # it has hung up already
            end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("name", ["postgresql", "mariadb"])
@pytest.mark.parametrize(("cut", "left"), [("before the server", []), ("before the answer", ["a"])])
def test_a_connection_lost_during_commit_is_an_unknown_outcome_and_is_not_tried_again(
    name: str, cut: Literal["before the server", "before the answer"], left: list[str], request: pytest.FixtureRequest
) -> None:
    place = place_on(name, request)
    cutter = Cutter(place.url, cut)
    calls: list[int] = []
    try:
        with running(writer=place.url) as direct, running(writer=cutter.url) as app:
            cutter.armed = True  # not before: the tables were made through it

            def work() -> None:
                calls.append(1)
                app.add("a")

            with pytest.raises(OutcomeUnknown) as caught:
                app.unit(attempts=3, backoff=0).run(work)
            assert (caught.value.connection, caught.value.committed) == ("writer", ())
            assert isinstance(caught.value.__cause__, DBAPIError)
            assert (len(calls), cutter.cuts) == (1, 1)
            cutter.armed = False
            place.check_rest(app)
            assert direct.names() == left, "the same error, although the outcomes differ: that is what it says"
            place.check_recovery(app, *left)
    finally:
        cutter.close()


@pytest.mark.parametrize("name", ["postgresql", "mariadb"])
def test_a_connection_lost_before_the_commit_is_tried_again(name: str, request: pytest.FixtureRequest) -> None:
    place = place_on(name, request)
    with running(writer=place.url) as app:
        calls: list[int] = []

        def work() -> None:
            calls.append(1)
            app.add("a")
            if len(calls) == 1:
                kill_backend(place, app)
                app.add("b")

        app.unit(attempts=2, backoff=0).run(work)
        assert len(calls) == 2
        place.check_recovery(app, "a")


@pytest.mark.parametrize("name", ["postgresql", "mariadb"])
def test_a_connection_that_only_read_and_was_lost_during_commit_is_tried_again(name: str, request: pytest.FixtureRequest) -> None:
    place = place_on(name, request)
    with running(writer=place.url) as app:
        calls: list[int] = []

        def work() -> None:
            calls.append(1)
            app.session().scalars(select(Item)).all()
            if len(calls) == 1:
                kill_backend(place, app)

        app.unit(attempts=2, backoff=0).run(work)
        assert len(calls) == 2
        place.check_recovery(app)


def test_a_read_only_violation_leaves_nothing_behind(place: Place) -> None:
    with running(writer=place.url) as app:
        with pytest.raises(ReadOnlyViolation), app.unit(read_only=True):
            app.session().scalars(select(Item)).all()
            app.add("a")
        place.check_recovery(app)
