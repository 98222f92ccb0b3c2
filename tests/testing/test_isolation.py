"""What an isolated test has written is gone at its end, and until then all is as it would be otherwise."""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from contextvars import copy_context
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import transaction
from dependency_injector import providers
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session
from transaction.interfaces import TransientError

from app_db import DatabaseSettings, container_of
from app_db.errors import (
    AlreadyInUnitOfWork,
    CannotIsolate,
    HookFailed,
    InvalidUse,
    IsolationBroken,
    IsolationTimeout,
    NotAtomic,
    ReadOnlyViolation,
    TransactionLost,
    UnitOfWorkTimeout,
)
from app_db.testing import isolated
from harness.applications import DEFER_UNIQUENESS, Application, Base, Boom, Item, running
from harness.servers import PostgresServer

ITEMS = Base.metadata.tables["items"]


@pytest.fixture
def app(new_database_url: Callable[[], str]) -> Iterator[Application]:
    """A writer with its reader, a warehouse, and a log that keeps what units write that abort."""
    with running(
        atomicity="best_effort",
        writer=new_database_url(),
        reader={"mirror": "writer", "read_only": True},
        warehouse=new_database_url(),
        log={"url": new_database_url(), "transactional": False},
    ) as application:
        yield application
        for name in ("writer", "warehouse", "log"):
            assert application.names(name) == [], f"rows were left in {name}"


@pytest.fixture
def postgres_app(new_postgres_url: Callable[[], str]) -> Iterator[Application]:
    """Two databases whose units commit by two phases outside tests."""
    two_phase = {"two_phase": True}
    with running(
        writer={"url": new_postgres_url(), **two_phase},
        reader={"mirror": "writer", "read_only": True},
        warehouse={"url": new_postgres_url(), **two_phase},
    ) as application:
        yield application


def seen(app: Application, connection: str = "reader") -> list[str]:
    """What a later unit of work reads."""
    with app.unit():
        return sorted(app.session(connection).scalars(select(Item.name)))


def dialect_of(app: Application) -> str:
    return app.plain_engine("writer").dialect.name


# ---- units of work ---------------------------------------------------------------------------------------------------------


def test_what_a_unit_committed_later_units_see_and_nobody_else_and_it_is_gone_afterwards(app: Application) -> None:
    for _ in range(2):
        with isolated(app.container):
            with app.unit():
                app.add("a")
                app.add("b", "warehouse")
            assert seen(app) == ["a"]
            assert seen(app, "warehouse") == ["b"]
            assert app.names() == app.names("warehouse") == []
        assert app.names() == app.names("warehouse") == []


def test_a_unit_that_raises_leaves_nothing_in_either_database(app: Application) -> None:
    with isolated(app.container):
        with pytest.raises(Boom), app.unit():
            app.add("a")
            app.add("b", "warehouse")
            raise Boom
        assert seen(app) == seen(app, "warehouse") == []


def test_nested_units_and_savepoints_undo_their_own_part(app: Application) -> None:
    with isolated(app.container):
        with app.unit() as unit:
            app.add("kept")
            with pytest.raises(IntegrityError), app.unit("nested"):
                app.add("undone", "warehouse")
                app.add("kept")
            savepoint = unit.savepoint()
            for name in ("once", "twice"):
                app.add(name)
                app.add(name, "warehouse")
                savepoint.rollback()
            with app.session().begin_nested():
                app.add("nested")
        assert seen(app) == ["kept", "nested"]
        assert seen(app, "warehouse") == []


def test_savepoints_of_two_sessions_that_began_at_different_times_are_each_kept_to(app: Application) -> None:
    """Both sessions are of one database, whose savepoints are a stack: the older one is given up while the newer one is there."""
    with isolated(app.container):
        with app.unit():
            app.add("a")
            inner = app.session().begin_nested()
            app.add("b")
            assert app.session("reader").scalars(select(Item.name).order_by(Item.name)).all() == ["a", "b"]
            inner.rollback()
            assert app.session("reader").scalars(select(Item.name)).all() == ["a"]
            with app.session().begin_nested():
                assert app.session("reader").scalars(select(Item.name)).all() == ["a"]
                app.add("c")
        assert seen(app) == ["a", "c"]


def test_a_transaction_that_began_inside_anothers_savepoint_goes_on_when_that_is_rolled_back(app: Application) -> None:
    with isolated(app.container):
        with app.engine().begin() as outer, app.engine().connect() as inner:
            outer.execute(ITEMS.insert().values(name="kept"))
            savepoint = outer.begin_nested()
            inner.execute(select(ITEMS.c.name))
            savepoint.rollback()
            inner.execute(ITEMS.insert().values(name="undone"))
            inner.rollback()
        assert seen(app) == ["kept"]


def test_a_unit_is_tried_again_with_nothing_left_of_the_first_attempt(app: Application) -> None:
    attempts: list[list[str]] = []

    def work() -> None:
        attempts.append(list(app.session().scalars(select(Item.name))))
        app.add("a")
        if len(attempts) < 3:
            raise TransientError

    with isolated(app.container):
        app.unit(attempts=3, backoff=0).run(work)
        assert attempts == [[], [], []]
        assert seen(app) == ["a"]


def test_hooks_run_after_the_commit_and_see_it(app: Application) -> None:
    told: list[Any] = []
    with isolated(app.container):
        with app.unit() as unit:
            app.add("a")
            unit.on_commit(lambda: told.append(seen(app)))
        with pytest.raises(Boom), app.unit() as unit:
            unit.on_abort(lambda: told.append("aborted"))
            raise Boom
        assert told == [["a"], "aborted"]
        with pytest.raises(HookFailed), app.unit() as unit:
            unit.on_commit(lambda: 1 / 0)


def test_an_autonomous_log_keeps_what_the_aborted_unit_wrote_until_the_test_ends(app: Application) -> None:
    with isolated(app.container):
        with pytest.raises(Boom), app.unit():
            app.add("a")
            app.add("tried", "log")
            raise Boom
        assert seen(app) == []
        assert seen(app, "log") == ["tried"]


def test_every_way_to_write_is_rolled_back(app: Application) -> None:
    with isolated(app.container):
        with app.unit():
            session = app.session()
            session.execute(insert(Item), [{"name": "a"}, {"name": "b"}])
            session.bulk_save_objects([Item(name="c")])
            session.execute(text("INSERT INTO items (name) VALUES ('d')"))
            session.connection().execute(ITEMS.insert().values(name="e"))
        assert seen(app) == list("abcde")


def test_a_unit_begins_its_own_inside_another_and_that_outlives_it(app: Application) -> None:
    with isolated(app.container):
        with pytest.raises(Boom), app.unit():
            assert app.session().scalars(select(Item.name)).all() == []
            with app.unit("requires_new"):
                app.add("inner")
            assert app.session("reader").scalars(select(Item.name)).all() == ["inner"]
            app.add("outer")
            raise Boom
        assert seen(app) == ["inner"]


def test_a_unit_sees_what_one_around_it_has_written_whatever_its_isolation(app: Application) -> None:
    with isolated(app.container), app.unit():
        app.add("outer")
        with app.unit("requires_new", isolation="SERIALIZABLE"):
            assert app.session("reader").scalars(select(Item.name)).all() == ["outer"]


def test_an_inner_commit_that_is_undone_with_the_outer_unit_is_said_so(app: Application) -> None:
    """One connection can't do that; outside a test the inner unit's row would stay."""
    if dialect_of(app) == "sqlite":
        pytest.skip("outside tests SQLite lets only one of them write")
    with (
        pytest.raises(IsolationBroken, match="what was committed inside another unit") as caught,
        isolated(app.container),
        pytest.raises(Boom),
        app.unit(),
    ):
        app.add("outer")
        with app.unit("requires_new"):
            app.add("inner")
        raise Boom
    assert caught.value.problems[0].startswith("writer: ")


def test_options_of_units_do_what_they_do_otherwise_or_nothing(app: Application) -> None:
    with isolated(app.container):
        with app.unit(isolation="SERIALIZABLE", timeout=5):
            app.add("a")
        with app.unit(read_only=True), pytest.raises(ReadOnlyViolation):
            app.session().execute(insert(Item).values(name="b"))
        with pytest.raises(AlreadyInUnitOfWork), app.unit(), app.unit("never"):
            pass
        with pytest.raises(UnitOfWorkTimeout), app.unit(timeout=0.01):
            threading.Event().wait(0.02)
            app.add("c")
        assert seen(app) == ["a"]


def test_a_units_time_limit_ends_with_the_unit(app: Application) -> None:
    """Otherwise a server's limit ends with the transaction, and this one goes on."""
    asked = {"postgresql": "SHOW statement_timeout", "mysql": "SELECT @@SESSION.max_statement_time"}.get(dialect_of(app))
    if asked is None:
        pytest.skip("SQLite has no limit of its own")
    with isolated(app.container):
        with app.unit():
            before = app.session().scalar(text(asked))
        with app.unit(timeout=60):
            app.add("a")
            assert app.session().scalar(text(asked)) != before
        with app.unit():
            assert app.session().scalar(text(asked)) == before


def test_it_works_under_zopes_own_manager(new_database_url: Callable[[], str]) -> None:
    url = new_database_url()
    settings = DatabaseSettings(connections={"writer": {"url": url}})
    container: Any = container_of("writer")(settings=settings, transaction_manager=providers.Object(transaction.manager))
    with running(writer=url) as outside:
        with isolated(container):
            container.writer_session().execute(text("INSERT INTO items (name) VALUES ('a')"))
            transaction.commit()
            assert container.writer_session().scalar(text("SELECT count(*) FROM items")) == 1
            transaction.abort()
        assert outside.names() == []
    container.shutdown_resources()


# ---- errors ----------------------------------------------------------------------------------------------------------------


def test_a_constraint_aborts_the_unit_and_no_other(app: Application) -> None:
    with isolated(app.container):
        with app.unit():
            app.add("a")
        with pytest.raises(IntegrityError), app.unit():
            app.add("b", "warehouse")
            app.add("a")
        assert seen(app) == ["a"]
        assert seen(app, "warehouse") == []


def test_a_swallowed_error_costs_the_unit_its_commit_where_it_does_otherwise(app: Application) -> None:
    def work() -> None:
        with app.unit():
            app.add("a")
            with pytest.raises(DBAPIError):
                app.session().execute(text("SELECT nothing FROM nowhere"))

    with isolated(app.container):
        if dialect_of(app) == "postgresql":
            with pytest.raises(TransactionLost):
                work()
            assert seen(app) == []
        else:
            work()
            assert seen(app) == ["a"]


def test_a_reader_whose_statement_fails_costs_the_writer_nothing(app: Application) -> None:
    with isolated(app.container):
        with app.unit():
            app.add("a")
            with pytest.raises(DBAPIError):
                app.session("reader").execute(text("SELECT nothing FROM nowhere"))
            app.add("b")
        assert seen(app) == ["a", "b"]


@pytest.mark.parametrize("connection", ["writer", "warehouse"])
def test_a_constraint_that_is_checked_at_the_commit_is(postgres_app: Application, connection: str) -> None:
    postgres_app.run(*DEFER_UNIQUENESS, on=connection)
    with isolated(postgres_app.container):
        with pytest.raises(IntegrityError), postgres_app.unit():
            postgres_app.add("a")
            postgres_app.add("b", "warehouse")
            postgres_app.add("taken", connection)
        others = {"writer", "warehouse"} - {connection}
        assert seen(postgres_app, connection) == ["taken"]
        assert [seen(postgres_app, other) for other in others] == [[]]
        with postgres_app.unit():
            postgres_app.add("c", connection)
        assert seen(postgres_app, connection) == ["c", "taken"]


def test_a_foreign_key_of_sqlite_that_is_checked_at_the_commit_is(new_sqlite_url: Callable[[], str]) -> None:
    with running(writer=new_sqlite_url()) as app:
        app.run("CREATE TABLE parts (item INTEGER REFERENCES items (id) DEFERRABLE INITIALLY DEFERRED)")
        with isolated(app.container):
            with pytest.raises(IntegrityError, match="FOREIGN KEY"), app.unit():
                app.session().execute(text("INSERT INTO parts VALUES (7)"))
            with app.unit():
                app.session().execute(text("INSERT INTO parts VALUES (7)"))
                app.session().execute(text("INSERT INTO items VALUES (7, 'a')"))
            assert seen(app, "writer") == ["a"]


def test_a_function_that_writes_is_refused_on_a_reader_where_the_database_can(app: Application) -> None:
    app.define_writing_function()
    if dialect_of(app) == "mysql":  # it can't make a part of a transaction read-only, and app_db sees a query
        with isolated(app.container), app.unit():
            app.session("reader").execute(text("SELECT add_item('a')"))
            with pytest.raises(ReadOnlyViolation):
                app.session("reader").execute(text("INSERT INTO items (name) VALUES ('b')"))
        return
    with isolated(app.container):
        with app.unit(), pytest.raises((ReadOnlyViolation, DBAPIError)):
            app.session("reader").execute(text("SELECT add_item('a')"))
        with app.unit(read_only=True), pytest.raises((ReadOnlyViolation, DBAPIError)):
            app.session().execute(text("SELECT add_item('a')"))
        with app.unit():
            app.session().execute(text("SELECT add_item('b')"))
        assert seen(app) == ["b"]


def test_what_strict_refuses_it_refuses_in_a_test(new_database_url: Callable[[], str]) -> None:
    with running(writer=new_database_url(), warehouse=new_database_url()) as app, isolated(app.container):
        with pytest.raises(NotAtomic), app.unit():
            app.add("a")
            app.add("b", "warehouse")
        assert seen(app, "writer") == seen(app, "warehouse") == []


@pytest.mark.parametrize("database", ["postgres", "mariadb"])
def test_two_phase_units_commit_together_without_preparing(database: str, request: pytest.FixtureRequest) -> None:
    new_url: Callable[[], str] = request.getfixturevalue(f"new_{database}_url")
    connections = {name: {"url": new_url(), "two_phase": True} for name in ("writer", "warehouse")}
    with running(writer=connections["writer"], warehouse=connections["warehouse"]) as app:
        with isolated(app.container):
            with app.unit():
                app.add("a")
                app.add("b", "warehouse")
            assert seen(app, "writer") == ["a"]
            assert seen(app, "warehouse") == ["b"]
        assert app.names() == app.names("warehouse") == []
        with app.unit():  # and afterwards it prepares again
            app.add("a")
            app.add("b", "warehouse")
        assert app.names() == ["a"]


# ---- engines ---------------------------------------------------------------------------------------------------------------


def test_engines_that_are_used_directly_are_isolated(app: Application) -> None:
    with isolated(app.container):
        with app.engine().begin() as connection:
            connection.execute(ITEMS.insert().values(name="a"))
        with app.engine().connect() as connection:
            connection.execute(ITEMS.insert().values(name="b"))  # which nobody commits
        with app.engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(ITEMS.insert().values(name="c"))
        assert seen(app) == ["a", "c"]


def test_what_would_end_the_transaction_around_the_test_is_refused(app: Application) -> None:
    with isolated(app.container), app.engine().connect() as connection:
        for statement in ("COMMIT", "ROLLBACK", " /* now */ commit"):
            with pytest.raises(CannotIsolate, match="writer"):
                connection.execute(text(statement))
        connection.execute(ITEMS.insert().values(name="a"))


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE others (id INTEGER)", "ALTER TABLE items ADD COLUMN more INTEGER", "TRUNCATE TABLE items"]
)
def test_ddl_is_rolled_back_or_refused_where_the_server_would_commit(app: Application, statement: str) -> None:
    if dialect_of(app) == "sqlite" and statement.startswith("TRUNCATE"):
        pytest.skip("SQLite has no TRUNCATE")
    with isolated(app.container), app.unit():
        app.add("a")
        if dialect_of(app) == "mysql":
            with pytest.raises(CannotIsolate, match="commit before it"):
                app.session().execute(text(statement))
        else:
            app.session().execute(text(statement))
    with app.engine().connect() as connection:
        assert connection.dialect.has_table(connection, "others") is False
        assert "more" not in connection.execute(text("SELECT * FROM items")).keys()  # noqa: SIM118  # a result is no mapping


def test_a_temporary_table_of_mariadb_is_none_of_it(new_mariadb_url: Callable[[], str]) -> None:
    with running(writer=new_mariadb_url()) as app, isolated(app.container), app.unit():
        app.session().execute(text("CREATE TEMPORARY TABLE passing (id INTEGER)"))
        app.session().execute(text("DROP TEMPORARY TABLE passing"))


def test_a_commit_by_the_drivers_own_connection_is_found_out(new_database_url: Callable[[], str]) -> None:
    with running(writer=new_database_url()) as app:
        with pytest.raises(DBAPIError) as caught, isolated(app.container), app.engine().connect() as connection:
            connection.execute(ITEMS.insert().values(name="a"))
            driver: Any = connection.connection.driver_connection
            driver.commit()
        assert any("ended inside it" in note for note in caught.value.__notes__)
        with isolated(app.container):  # the next test is not disturbed
            assert seen(app, "writer") == ["a"]


def test_another_process_can_not_write_to_a_file_of_sqlite_that_the_test_has_used(new_sqlite_url: Callable[[], str]) -> None:
    with running(writer=new_sqlite_url()) as app:
        with closing(sqlite3.connect(str(app.plain_engine().url.database), timeout=0, isolation_level=None)) as other:
            write = "INSERT INTO items (name) VALUES (?)"
            with isolated(app.container):
                other.execute(write, ["before"])
                assert seen(app, "writer") == ["before"]
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    other.execute(write, ["meanwhile"])
            other.execute(write, ["later"])
        assert app.names() == ["before", "later"]


def test_rows_are_streamed_while_others_write(app: Application) -> None:
    """A cursor that is read bit by bit would keep everybody else from the one connection."""
    with isolated(app.container):
        with app.unit():
            app.session().add_all(Item(name=f"{number:03}") for number in range(100))
        with app.unit():
            rows = app.session("reader").execute(select(Item.name).order_by(Item.name).execution_options(yield_per=10))
            for (name,) in rows:
                app.add(name, "warehouse")
                if name == "050":
                    app.add("middle")
        assert len(seen(app, "warehouse")) == 100
        assert len(seen(app)) == 101


def test_retired_engines_do_not_disturb_a_test(app: Application) -> None:
    with isolated(app.container):
        with app.unit():
            app.add("a")
        app.container.reset_singletons()
        assert seen(app) == ["a"]
        app.container.shutdown_resources()
        with app.unit():
            app.add("b")
        assert seen(app) == ["a", "b"]


def test_an_engine_kept_for_longer_than_the_test_is_refused(new_sqlite_url: Callable[[], str]) -> None:
    with running(writer=new_sqlite_url()) as app:
        with isolated(app.container):
            engine = app.engine()
        with pytest.raises(CannotIsolate, match="has ended"):
            engine.connect()
        assert app.engine() is not engine


def test_what_was_left_open_reaches_nothing_after_the_test(app: Application) -> None:
    """The connection is back in its pool by then, or another test's."""
    with pytest.raises(IsolationBroken), isolated(app.container):
        connection = app.engine().connect()
        connection.execute(ITEMS.insert().values(name="a"))
    for ahead in (isolated(app.container), nullcontext()):
        with ahead:
            with pytest.raises(CannotIsolate, match="has ended"):
                connection.execute(ITEMS.insert().values(name="late"))
            connection.rollback()
    connection.close()


def test_only_the_connections_named_are_isolated(new_sqlite_url: Callable[[], str]) -> None:
    with running("best_effort", writer=new_sqlite_url(), warehouse=new_sqlite_url()) as app:
        with isolated(app.container, ["writer"]) as isolation, app.unit():
            assert isolation.names == ["writer"]
            app.add("a")
            app.add("b", "warehouse")
        assert app.names() == []
        assert app.names("warehouse") == ["b"]
        with pytest.raises(InvalidUse, match="'writer'"):
            isolated(app.container, ["writr"])


@pytest.mark.parametrize("named", ["writer", "reader", "backup"])
def test_all_connections_to_the_database_of_the_one_that_is_named_are_isolated(
    new_sqlite_url: Callable[[], str], named: str
) -> None:
    url = new_sqlite_url()
    reading = {"reader": {"mirror": "writer", "read_only": True}, "backup": {"url": url, "read_only": True}}
    with running("best_effort", writer=url, **reading, warehouse=new_sqlite_url()) as app:
        with isolated(app.container, [named]) as isolation:
            assert isolation.names == ["backup", "reader", "writer"]
            with app.unit():
                app.add("a")
            with app.unit():
                assert app.session("reader").scalars(select(Item.name)).all() == ["a"]
                assert app.session("backup").scalars(select(Item.name)).all() == ["a"]
        assert app.names() == []


def test_a_database_that_no_connection_writes_is_read_as_it_is(new_sqlite_url: Callable[[], str]) -> None:
    url = new_sqlite_url()
    with running(writer=url) as app:
        app.put("a")
    with running(writer=new_sqlite_url(), facts={"url": url, "read_only": True}) as app, isolated(app.container) as isolation:
        assert isolation.names == ["writer"]
        with app.unit():
            assert app.session("facts").scalars(select(Item.name)).all() == ["a"]
        with pytest.raises(InvalidUse, match="'facts' is not isolated"):
            isolation.session("facts")


def test_a_two_phase_session_of_sqlalchemy_is_refused(new_postgres_url: Callable[[], str]) -> None:
    with running(writer=new_postgres_url()) as app, isolated(app.container), Session(app.engine(), twophase=True) as session:
        session.add(Item(name="a"))
        with pytest.raises(CannotIsolate, match=r"Two-phase commit can't be isolated on 'writer'.*fresh=True"):
            session.commit()


def test_a_connection_that_nobody_configured_is_left_alone(new_sqlite_url: Callable[[], str]) -> None:
    settings = DatabaseSettings(connections={"writer": {"url": new_sqlite_url()}}, _env_file=None)
    container: Any = container_of("writer", "warehouse")(settings=settings)
    with isolated(container) as isolation:
        assert isolation.names == ["writer"]
        with container.transaction():
            assert container.writer_session().scalar(text("SELECT 1")) == 1
    container.shutdown_resources()


# ---- the session to prepare and check with -----------------------------------------------------------------------------------


def test_what_its_session_flushes_units_see_at_once_and_it_sees_what_they_commit(app: Application) -> None:
    with isolated(app.container) as isolation, isolation.session() as session:
        session.add(Item(name="prepared"))
        session.commit()
        assert seen(app) == ["prepared"]
        with app.unit():
            app.add("made")
        assert sorted(session.scalars(select(Item.name))) == ["made", "prepared"]
        with pytest.raises(IntegrityError):
            session.execute(insert(Item).values(name="made"))
        session.rollback()
        assert sorted(session.scalars(select(Item.name))) == ["made", "prepared"]


def test_its_session_keeps_no_other_thread_waiting(app: Application) -> None:
    def work() -> None:
        with app.unit():
            app.add("made")

    with isolated(app.container, patience=2) as isolation, isolation.session() as session:
        assert session.scalars(select(Item.name)).all() == []  # which begins what SQLAlchemy calls a transaction
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work).result(10)
        assert session.scalars(select(Item.name)).all() == ["made"]


def test_a_session_of_a_connection_that_is_not_isolated_is_refused(new_sqlite_url: Callable[[], str]) -> None:
    with (
        running(writer=new_sqlite_url()) as app,
        isolated(app.container) as isolation,
        pytest.raises(InvalidUse, match="Those that are: writer"),
    ):
        isolation.session("writr")


# ---- threads ---------------------------------------------------------------------------------------------------------------


def test_units_of_many_threads_run_one_after_the_other(app: Application) -> None:
    def work(number: int) -> None:
        for turn in range(5):
            try:
                with app.unit():
                    app.add(f"{number}-{turn}")
                    app.add(f"{number}-{turn}", "warehouse")
                    if turn % 2:
                        raise Boom
            except Boom:
                pass

    with isolated(app.container, patience=30):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        expected = sorted(f"{number}-{turn}" for number in range(8) for turn in (0, 2, 4))
        assert seen(app) == seen(app, "warehouse") == expected


def test_a_thread_that_works_for_a_unit_takes_part_in_it_and_begins_its_own_inside_it(app: Application) -> None:
    def work() -> None:
        app.add("part")
        with app.unit("requires_new"):
            assert app.session("reader").scalars(select(Item.name)).all() in ([], ["part"], ["before", "part"], ["before"])
            app.add("own", "warehouse")

    with isolated(app.container):
        with app.unit(), ThreadPoolExecutor(1) as pool:
            app.add("before")
            pool.submit(copy_context().run, work).result(10)
        assert seen(app) == ["before", "part"]
        assert seen(app, "warehouse") == ["own"]


def test_who_waits_in_vain_is_told_for_whom(app: Application) -> None:
    def work() -> None:
        with app.unit():
            app.add("never", "warehouse")

    with isolated(app.container, patience=0.2), app.unit(), ThreadPoolExecutor(1, "worker") as pool:
        app.add("a")
        with pytest.raises(IsolationTimeout, match=r"'warehouse'.*MainThread.*'writer'"):
            pool.submit(work).result(10)


# ---- leaks -----------------------------------------------------------------------------------------------------------------


def test_a_unit_left_open_is_reported_and_aborted(app: Application) -> None:
    with (
        pytest.raises(IsolationBroken, match="still under way, in the thread 'MainThread', which uses 'writer'"),
        isolated(app.container),
    ):
        left_open = app.unit()
        left_open.__enter__()
        app.add("a")
    with isolated(app.container):
        assert seen(app) == []


def test_a_connection_left_open_is_reported(app: Application) -> None:
    with pytest.raises(IsolationBroken, match="writer: a unit of work or transaction is still open"), isolated(app.container):
        connection = app.engine().connect()
        connection.execute(ITEMS.insert().values(name="a"))
    connection.close()
    with isolated(app.container):
        assert seen(app) == []


def test_an_error_of_the_test_is_raised_and_what_leaked_is_noted(new_sqlite_url: Callable[[], str]) -> None:
    with running(writer=new_sqlite_url()) as app:
        with pytest.raises(Boom) as caught, isolated(app.container):
            left_open = app.unit()
            left_open.__enter__()
            raise Boom
        assert any("still under way" in note for note in caught.value.__notes__)


def test_a_test_is_not_isolated_inside_a_unit(new_sqlite_url: Callable[[], str]) -> None:
    with running(writer=new_sqlite_url()) as app, app.unit(), pytest.raises(InvalidUse, match="around the unit"):
        isolated(app.container).__enter__()


def test_an_isolation_inside_another_undoes_its_own_part(app: Application) -> None:
    with isolated(app.container) as outer:
        with app.unit():
            app.add("outer")
        for _ in range(2):
            with isolated(app.container) as inner, inner.session() as session:
                session.add(Item(name="inner"))
                session.commit()
                with app.unit():
                    app.add("unit")
                assert seen(app) == ["inner", "outer", "unit"]
            assert seen(app) == ["outer"]
        with outer.session() as session:
            assert session.scalars(select(Item.name)).all() == ["outer"]


def test_what_an_outer_isolations_session_writes_inside_an_inner_one_is_undone_with_that_and_said_so(app: Application) -> None:
    said = "writer: what a session of the outer `isolated` block committed inside an inner one was rolled back"
    with pytest.raises(IsolationBroken, match=said), isolated(app.container) as outer:
        with isolated(app.container), outer.session() as session:
            with app.unit():
                app.add("unit")
            session.execute(insert(Item).values(name="a"))
            session.commit()
            assert seen(app) == ["a", "unit"]
        assert seen(app) == []


def test_the_session_of_an_outer_isolation_may_have_begun_before_an_inner_one(app: Application) -> None:
    said = "writer: what a session of the outer `isolated` block committed inside an inner one was rolled back"
    with pytest.raises(IsolationBroken, match=said), isolated(app.container) as outer, outer.session() as session:
        assert session.scalars(select(Item.name)).all() == []
        with isolated(app.container):
            assert seen(app) == []
            session.add(Item(name="a"))
            session.commit()


@pytest.mark.representative("sqlite")
def test_two_hundred_isolations_leave_nothing_in_the_process_or_on_the_server(app: Application) -> None:
    def once() -> None:
        with isolated(app.container) as isolation, isolation.session() as session:
            with app.unit():
                app.add("a")
                app.add("b", "warehouse")
            assert session.scalars(select(Item.name)).all() == ["a"]

    def count() -> tuple[int, int, int]:
        gc.collect()
        engines = sum(type(found).__name__ == "Engine" for found in gc.get_objects())
        return len(os.listdir("/proc/self/fd")), threading.active_count(), engines  # noqa: PTH208  # links that may be gone

    once()
    before = count()
    for _ in range(200):
        once()
    assert all(now <= then for now, then in zip(count(), before, strict=True))


def test_an_isolation_does_not_keep_its_engines_alive(tmp_path: Path) -> None:
    settings = DatabaseSettings(connections={"writer": {"url": f"sqlite:///{tmp_path}/shop.db"}})
    container = container_of("writer")(settings=settings)
    with isolated(container), container.transaction():
        container.providers["writer_session"]().execute(text("SELECT 1"))
    engine = ref(container.providers["writer_engine"]())
    container.shutdown_resources()
    del container
    gc.collect()
    assert engine() is None


def test_a_server_that_stops_in_mid_test_fails_the_test_and_not_the_next(new_postgres: Callable[..., PostgresServer]) -> None:
    server = new_postgres()
    server.create_database("shop")
    with running(writer=server.url("shop")) as app:
        app.run("CHECKPOINT")
        with pytest.raises((DBAPIError, IsolationBroken)), isolated(app.container):
            with app.unit():
                app.add("a")
            server.restart("immediate")
            with app.unit():
                app.add("b")
        with isolated(app.container):
            with app.unit():
                app.add("c")
            assert seen(app, "writer") == ["c"]
        assert app.names() == []
