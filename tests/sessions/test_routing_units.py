"""The session that finds its database is a part of its unit: it commits, aborts, nests and ends with it, and by nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transaction
from sqlalchemy import event, func, insert, select, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session, object_session

from app_db import RoutingSession, errors
from app_db.testing import isolated
from harness.applications import DEFER_UNIQUENESS
from harness.routed import Base, Fact, Item, RoutedApplication, routed
from harness.servers import PostgresServer

NewUrl = Callable[[], str]

items = Base.metadata.tables["items"]


def two(new_url: NewUrl) -> Iterator[RoutedApplication]:
    with routed({"writer": new_url(), "warehouse": new_url()}) as app:
        yield app


@pytest.fixture
def app(new_sqlite_url: NewUrl) -> Iterator[RoutedApplication]:
    yield from two(new_sqlite_url)


@pytest.fixture
def everywhere(new_database_url: NewUrl) -> Iterator[RoutedApplication]:
    yield from two(new_database_url)


# ---- commit and abort -----------------------------------------------------------------------------------

WRITE_PATHS: dict[str, Callable[[Session], object]] = {
    "ORM add": lambda session: session.add_all([Item(name="a"), Item(name="b")]),
    "ORM bulk insert": lambda session: session.execute(insert(Item), [{"name": "a"}, {"name": "b"}]),
    "query update": lambda session: [
        session.query(Item).filter_by(name=f"seed {name}").update({"name": name}) for name in ("a", "b")
    ],
    "Core insert": lambda session: session.execute(insert(items), [{"name": "a"}, {"name": "b"}]),
    "text": lambda session: session.execute(text("INSERT INTO items (name, amount) VALUES ('a', 0), ('b', 0)")),
    "the session's connection": lambda session: session.connection().execute(insert(items), [{"name": "a"}, {"name": "b"}]),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Item(name="a"), Item(name="b")]),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Item.__mapper__, [{"name": "a"}, {"name": "b"}]),
    "a merge": lambda session: [session.merge(Item(name=name)) for name in "ab"],
}


def prepare(write: object, app: RoutedApplication) -> set[str]:
    seeds = ["seed a", "seed b"] if write is WRITE_PATHS["query update"] else []
    app.put(*seeds)
    return set(seeds)


@pytest.mark.parametrize("write", WRITE_PATHS.values(), ids=WRITE_PATHS)
def test_what_was_written_is_there_after_the_unit(write: Callable[[Session], object], everywhere: RoutedApplication) -> None:
    prepare(write, everywhere)
    with everywhere.unit():
        write(everywhere.session)
    assert everywhere.names() == ["a", "b"]


@pytest.mark.parametrize("write", WRITE_PATHS.values(), ids=WRITE_PATHS)
def test_what_was_written_is_gone_when_the_unit_raised(write: Callable[[Session], object], app: RoutedApplication) -> None:
    before = prepare(write, app)
    with pytest.raises(ValueError, match="the application's own"), app.unit():
        write(app.session)
        assert set(app.session.scalars(select(Item.name))) == {"a", "b"}, "there was something to undo"
        raise ValueError("the application's own")
    assert set(app.names()) == before


def test_a_function_that_writes_is_committed(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url()}) as app:
        app.run(
            "CREATE FUNCTION add_item(name text) RETURNS integer LANGUAGE plpgsql AS "
            "$$ BEGIN INSERT INTO items (name, amount) VALUES (name, 0); RETURN 1; END $$"
        )
        with app.unit():
            assert app.session.scalar(select(func.add_item("a"))) == 1
        assert app.names() == ["a"]


def test_two_databases_that_cannot_commit_together_are_refused(new_database_url: NewUrl) -> None:
    with routed({"writer": new_database_url(), "warehouse": new_database_url()}, atomicity="strict") as app:
        with pytest.raises(errors.NotAtomic, match="'warehouse', 'writer'"), app.unit():
            app.session.add_all([Item(name="a"), Fact(name="a")])
        assert app.names() == app.names("warehouse") == []


@pytest.mark.parametrize("new_url", ["new_postgres_url", "new_mariadb_url"])
def test_two_databases_that_can_prepare_commit_together(new_url: str, request: pytest.FixtureRequest) -> None:
    new: NewUrl = request.getfixturevalue(new_url)
    both = {name: {"url": new(), "two_phase": True} for name in ("writer", "warehouse")}
    with routed(both, atomicity="strict") as app:
        with app.unit():
            app.session.add_all([Item(name="a"), Fact(name="a")])
        assert app.names() == app.names("warehouse") == ["a"]


def test_two_databases_that_can_prepare_are_left_alone_together(new_postgres_url: NewUrl) -> None:
    both = {name: {"url": new_postgres_url(), "two_phase": True} for name in ("writer", "warehouse")}
    with routed(both, atomicity="strict") as app:
        app.run(
            *(
                line.replace("(name)", "(name, amount)", 1).replace("('taken')", "('taken', 0)")
                if line.startswith("INSERT")
                else line
                for line in DEFER_UNIQUENESS
            )
        )
        with pytest.raises(IntegrityError), app.unit():
            app.session.add_all([Item(name="taken"), Fact(name="a")])
        assert (app.names(), app.names("warehouse")) == (["taken"], [])


def test_the_sessions_of_the_connections_are_in_the_same_transaction(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        app.session.add(Item(name="a"))
        app.container.writer_session().add(Item(name="b"))
        app.container.writer_session().flush()
        app.session.flush()
        assert set(app.session.scalars(select(Item.name))) == {"a", "b"}
        assert set(app.container.writer_session().scalars(select(Item.name))) == {"a", "b"}
        one = app.session.scalars(select(Item).where(Item.name == "a")).one()
        other = app.container.writer_session().scalars(select(Item).where(Item.name == "a")).one()
        assert one is not other, "each session has objects of its own"
    assert app.names() == ["a", "b"]


def test_objects_are_detached_after_the_commit_and_keep_their_values(app: RoutedApplication) -> None:
    with app.unit():
        item = Item(name="a")
        app.session.add(item)
    assert (object_session(item), item.name) == (None, "a")


def test_objects_forget_their_values_where_the_settings_say_so(sqlite_url: str) -> None:
    with routed({"writer": {"url": sqlite_url, "session": {"expire_on_commit": True}}}) as app:
        with app.unit():
            item = Item(name="a")
            app.session.add(item)
        assert object_session(item) is None
        assert "name" not in vars(item)


def test_an_object_of_a_unit_that_aborted_is_inserted_by_the_next(app: RoutedApplication) -> None:
    item = Item(name="a")
    with pytest.raises(ValueError, match="own"), app.unit():
        app.session.add(item)
        app.session.flush()
        raise ValueError("the application's own")
    with app.unit():
        app.session.add(item)
    assert app.names() == ["a"]


def test_zopes_own_manager_ends_the_session_as_well(new_sqlite_url: NewUrl) -> None:
    manager = transaction.TransactionManager()
    given = {name: {"url": new_sqlite_url()} for name in ("writer", "warehouse")}
    with routed(given, manager=manager) as app:
        with manager:
            app.session.add_all([Item(name="a"), Fact(name="a")])
        with pytest.raises(ValueError, match="own"), manager:
            app.session.add_all([Item(name="b"), Fact(name="b")])
            app.session.flush()
            raise ValueError("the application's own")
        assert app.names() == app.names("warehouse") == ["a"]


def test_a_unit_is_tried_again_from_its_start(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url()}) as app:
        app.put("a")
        tries: list[int] = []

        def change() -> None:
            tries.append(1)
            amount = app.session.scalars(select(Item.amount)).one()
            if len(tries) == 1:
                app.run("UPDATE items SET amount = 5")
            app.session.execute(text("UPDATE items SET amount = :to"), {"to": amount + 1})

        app.container.transaction(attempts=2, isolation="repeatable read").run(change)
        with app.unit():
            assert app.session.scalars(select(Item.amount)).all() == [6]
        assert len(tries) == 2


# ---- what a session refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["commit", "rollback", "close", "begin", "prepare", "reset", "invalidate"])
def test_what_the_unit_does_the_session_refuses(method: str, app: RoutedApplication) -> None:
    with app.unit():
        app.session.add(Item(name="a"))
        with pytest.raises(errors.SessionIsManaged, match=method):
            getattr(app.session, method)()
        with pytest.raises(errors.SessionIsManaged):
            app.session.execute(text("COMMIT"))
    assert app.names() == ["a"]


def test_its_connection_commits_nothing_by_itself(app: RoutedApplication) -> None:
    with pytest.raises(errors.SessionIsManaged), app.unit():
        app.session.add(Item(name="a"))
        app.session.connection().commit()
    assert app.names() == []


def test_the_sessions_own_transaction_can_be_ended_by_nobody(app: RoutedApplication) -> None:
    with pytest.raises(errors.TransactionLost), app.unit():
        app.session.add(Item(name="a"))
        app.session.flush()
        app.session.get_transaction().rollback()  # type: ignore[union-attr]
    with pytest.raises(errors.SessionIsManaged), app.unit():
        app.session.add(Item(name="a"))
        app.session.get_transaction().commit()  # type: ignore[union-attr]
    assert app.names() == []


def test_the_session_cannot_be_taken_into_autocommit(app: RoutedApplication) -> None:
    with app.unit(), pytest.raises(errors.InvalidUse, match="autocommit"):
        app.session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})


def test_the_session_takes_no_engine_beside_its_unit(app: RoutedApplication) -> None:
    with app.unit():
        bind = {"bind": app.container.writer_engine()}
        with pytest.raises(errors.InvalidUse, match=r"session\.using\(\)"):
            app.session.execute(text("SELECT 1"), bind_arguments=bind)
        with pytest.raises(errors.InvalidUse, match=r"session\.using\(\)"):
            app.session.connection(bind)


def test_there_is_no_session_outside_a_unit(app: RoutedApplication) -> None:
    with pytest.raises(errors.NoUnitOfWork):
        app.container.session()


@pytest.mark.parametrize("end", ["committed", "aborted"])
def test_a_session_kept_from_a_unit_that_has_ended_is_refused(end: str, app: RoutedApplication) -> None:
    kept: RoutingSession | None = None
    with pytest.raises(ValueError, match="own") if end == "aborted" else app.unit(), app.unit():
        kept = app.session
        kept.add(Item(name="a"))
        if end == "aborted":
            raise ValueError("the application's own")
    assert kept is not None
    with pytest.raises(errors.UnitOfWorkEnded), app.unit():
        kept.add(Item(name="b"))
    with pytest.raises(errors.UnitOfWorkEnded), app.unit():
        kept.execute(text("SELECT 1"))


def test_a_session_is_used_by_its_units_owner_alone(app: RoutedApplication) -> None:
    refusals: list[Exception] = []

    def use(session: RoutingSession) -> None:
        try:
            session.add(Item(name="b"))
        except errors.ForeignUnitOfWork as error:
            refusals.append(error)

    with app.unit():
        thread = threading.Thread(target=use, args=(app.session,))
        thread.start()
        thread.join()
    assert len(refusals) == 1


def test_a_unit_of_its_own_has_a_session_of_its_own(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url()}) as app:
        with app.unit():
            outer = app.session
            outer.add(Item(name="a"))
            with pytest.raises(ValueError, match="own"), app.unit(propagation="requires_new"):
                assert app.session is not outer
                app.session.add(Item(name="b"))
                app.session.flush()
                raise ValueError("the application's own")
            assert app.session is outer
        assert app.names() == ["a"]


# ---- savepoints -----------------------------------------------------------------------------------------


def test_a_nested_block_that_fails_undoes_its_own_part(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        app.session.add_all([Item(name="a"), Fact(name="a")])
        with pytest.raises(ValueError, match="own"), app.unit(propagation="nested"):
            app.session.add_all([Item(name="b"), Fact(name="b")])
            app.session.flush()
            raise ValueError("the application's own")
        assert set(app.session.scalars(select(Item.name))) == {"a"}
        with app.unit(propagation="nested"):
            app.session.add_all([Item(name="c"), Fact(name="c")])
    assert app.names() == app.names("warehouse") == ["a", "c"]


def test_what_was_pending_before_a_savepoint_survives_its_rollback(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit() as unit:
        app.session.add(Item(name="a"))
        savepoint = unit.savepoint()
        app.session.add(Item(name="b"))
        app.session.flush()
        savepoint.rollback()
        app.session.add(Item(name="c"))
        savepoint.rollback()
        app.session.add(Item(name="d"))
    assert app.names() == ["a", "d"]


def test_what_joined_after_a_savepoint_begins_anew(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit() as unit:
        savepoint = unit.savepoint()
        lost = Item(name="b")
        app.session.add_all([lost, Fact(name="b")])
        app.session.flush()
        savepoint.rollback()
        assert lost not in app.session
        app.session.add(Item(name="c"))
    assert (app.names(), app.names("warehouse")) == (["c"], [])


def test_a_database_that_joined_after_a_savepoint_is_left(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit() as unit:
        app.session.add(Item(name="a"))
        savepoint = unit.savepoint()
        app.session.add(Fact(name="b"))
        app.session.flush()
        savepoint.rollback()
        assert app.session.scalars(select(Fact.name)).all() == []
        app.session.add(Fact(name="c"))
    assert (app.names(), app.names("warehouse")) == (["a"], ["c"])


def test_the_sessions_own_savepoint_undoes_what_was_done_in_it(everywhere: RoutedApplication) -> None:
    app = everywhere
    app.put("taken")
    with app.unit():
        app.session.add(Item(name="a"))
        with pytest.raises(IntegrityError), app.session.begin_nested():
            app.session.add(Item(name="b"))
            app.session.flush()
            app.session.add(Item(name="taken"))
            app.session.flush()
        with app.session.begin_nested():
            app.session.add_all([Item(name="c"), Fact(name="c")])
        with app.session.begin_nested() as nested:
            app.session.add(Item(name="d"))
            app.session.flush()
            nested.rollback()
    assert (app.names(), app.names("warehouse")) == (["a", "c", "taken"], ["c"])


def test_savepoints_within_savepoints(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit() as unit:
        app.session.add(Item(name="a"))
        first = unit.savepoint()
        app.session.add(Item(name="b"))
        with app.session.begin_nested():
            app.session.add(Item(name="c"))
            with pytest.raises(ValueError, match="own"), app.unit(propagation="nested"):
                app.container.writer_session().add(Item(name="d"))
                app.session.add(Item(name="e"))
                app.session.flush()
                raise ValueError("the application's own")
        assert set(app.session.scalars(select(Item.name))) == {"a", "b", "c"}
        first.rollback()
        assert set(app.session.scalars(select(Item.name))) == {"a"}
        app.session.add(Item(name="f"))
    assert app.names() == ["a", "f"]


def test_the_session_of_a_connection_and_this_one_undo_their_savepoints_together(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit() as unit:
        app.container.writer_session().add(Item(name="a"))
        savepoint = unit.savepoint()
        app.session.add(Item(name="b"))
        app.session.flush()
        app.container.writer_session().add(Item(name="c"))
        app.container.writer_session().flush()
        savepoint.rollback()
        app.session.add(Item(name="d"))
    assert app.names() == ["a", "d"]


def test_a_savepoint_of_a_connections_session_is_one_of_this_session_too(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        app.session.execute(insert(Item).values(name="a", amount=0))
        with pytest.raises(ValueError, match="own"), app.container.writer_session().begin_nested():
            app.session.execute(insert(Item).values(name="b", amount=0))
            raise ValueError("the application's own")
        app.session.execute(insert(Item).values(name="c", amount=0))
    assert app.names() == ["a", "c"]


def test_a_reader_is_read_inside_a_savepoint(everywhere: RoutedApplication) -> None:
    """On PostgreSQL it is in autocommit, where there can be no savepoint."""
    app = everywhere
    app.put("a")
    with app.unit() as unit:
        with app.session.begin_nested():
            assert app.session.scalars(select(Item.name)).all() == ["a"]
        savepoint = unit.savepoint()
        assert app.session.scalars(select(Item.name)).all() == ["a"]
        savepoint.rollback()
        with app.unit(propagation="nested"), app.session.begin_nested():
            assert app.session.scalars(select(Item.name)).all() == ["a"]
            assert app.session.last_used == "reader"


# ---- what fails -----------------------------------------------------------------------------------------


def test_a_flush_that_failed_and_was_swallowed_loses_the_unit(everywhere: RoutedApplication) -> None:
    app = everywhere
    app.put("taken")
    with pytest.raises(errors.TransactionLost, match="'writer'"), app.unit():
        app.session.add(Fact(name="a"))
        app.session.flush()
        app.session.add(Item(name="taken"))
        with pytest.raises(IntegrityError):
            app.session.flush()
    assert (app.names(), app.names("warehouse")) == (["taken"], [])


def test_nothing_is_sent_where_the_flush_of_a_connections_session_has_failed(everywhere: RoutedApplication) -> None:
    app = everywhere
    app.put("taken")
    with pytest.raises(errors.TransactionLost, match="'writer'"), app.unit():
        app.session.execute(insert(Item).values(name="a", amount=0))
        app.container.writer_session().add(Item(name="taken"))
        with pytest.raises(IntegrityError):
            app.container.writer_session().flush()
        with pytest.raises(PendingRollbackError):
            app.session.execute(insert(Item).values(name="b", amount=0))
    assert app.names() == ["taken"]


def test_a_flush_that_failed_in_an_open_savepoint_loses_the_unit(app: RoutedApplication) -> None:
    app.put("taken")
    with pytest.raises(errors.TransactionLost, match="'writer'"), app.unit():
        app.session.begin_nested()
        app.session.add(Item(name="taken"))
        with pytest.raises(IntegrityError):
            app.session.flush()
    assert app.names() == ["taken"]


def test_a_statement_that_failed_and_was_swallowed_loses_the_unit(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url()}) as app:
        app.put("taken")
        with pytest.raises(errors.TransactionLost, match="'writer'"), app.unit():
            app.session.execute(insert(Item).values(name="a", amount=0))
            with pytest.raises(IntegrityError):
                app.session.execute(insert(Item).values(name="taken", amount=0))
        assert app.names() == ["taken"]


def test_a_commit_that_fails_leaves_nothing(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url()}) as app:
        app.put("taken")
        app.run(*DEFER_UNIQUENESS[:2])
        with pytest.raises(IntegrityError), app.unit():
            app.session.add(Item(name="taken"))
        with app.unit():
            app.session.add(Item(name="a"))
        assert app.names() == ["a", "taken"]


def test_an_inner_failure_dooms_the_unit(app: RoutedApplication) -> None:
    with pytest.raises(errors.UnitOfWorkDoomed), app.unit():
        app.session.add(Item(name="a"))
        with pytest.raises(ValueError, match="own"), app.unit():
            raise ValueError("the application's own")
    assert app.names() == []


def test_a_statement_is_stopped_when_the_units_time_is_over(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url()}) as app:
        with pytest.raises(errors.UnitOfWorkTimeout), app.unit(timeout=0.3):
            app.session.execute(text("SELECT pg_sleep(20)"))
        with pytest.raises(errors.UnitOfWorkTimeout), app.unit(timeout=0.3):
            app.session.execute(select(Item.id, func.pg_sleep(20)))
            app.session.execute(text("SELECT pg_sleep(20)"))


def test_a_read_that_comes_too_late_is_not_blamed_on_the_replica(new_postgres_url: NewUrl) -> None:
    with (
        routed({"writer": new_postgres_url()}) as app,
        pytest.raises(errors.UnitOfWorkTimeout),
        app.unit(timeout=0.01),
    ):
        time.sleep(0.05)
        app.session.scalars(select(Item)).all()


# ---- hooks and listeners --------------------------------------------------------------------------------


def test_what_a_hook_adds_before_the_commit_is_committed(app: RoutedApplication) -> None:
    with app.unit() as unit:
        app.session.add(Item(name="a"))
        unit.before_commit(lambda: app.session.add_all([Item(name="b"), Fact(name="b")]))
    with app.unit() as unit:
        unit.before_commit(lambda: app.session.add(Item(name="c")))
    assert (app.names(), app.names("warehouse")) == (["a", "b", "c"], ["b"])


def test_what_a_listener_adds_before_the_commit_is_committed(app: RoutedApplication) -> None:
    with app.unit():
        session = app.session
        session.add(Item(name="a"))

        @event.listens_for(session, "before_commit")
        def add(session: Session) -> None:
            session.add(Fact(name="b"))

    assert (app.names(), app.names("warehouse")) == (["a"], ["b"])


def test_what_a_flush_of_another_session_adds_is_committed(app: RoutedApplication) -> None:
    with app.unit():
        session, other = app.session, app.container.writer_session()
        other.add(Item(name="a"))

        @event.listens_for(other, "after_flush")
        def add(*_: Any) -> None:
            session.add(Fact(name="b"))

    assert (app.names(), app.names("warehouse")) == (["a"], ["b"])


def test_what_is_added_too_late_is_refused_instead_of_lost(app: RoutedApplication) -> None:
    with pytest.raises(errors.InvalidUse, match="after their last flush"), app.unit():
        session, other = app.session, app.container.writer_session()
        session.add(Item(name="a"))
        other.add(Item(name="b"))

        @event.listens_for(other, "before_commit")
        def add(_: Session) -> None:
            session.add(Fact(name="c"))

    assert app.names() == app.names("warehouse") == []


def test_a_listener_that_fails_after_the_commit_takes_nothing_back(app: RoutedApplication) -> None:
    with pytest.raises(errors.HookFailed), app.unit():
        session = app.session
        session.add(Item(name="a"))

        @event.listens_for(session, "after_commit")
        def fail(_: Session) -> None:
            raise ValueError("the listener's own")

    assert app.names() == ["a"]


# ---- what it costs the databases ------------------------------------------------------------------------


def test_a_read_through_the_reader_begins_no_transaction(postgres: PostgresServer, new_postgres_url: NewUrl) -> None:
    url = new_postgres_url()
    with routed({"writer": url}) as app, app.unit():
        assert app.session.scalars(select(Item.name)).all() == []
        assert postgres.open_transactions(url.rsplit("/", 1)[1]) == []
        assert app.checked_out() == 1


def test_what_only_reads_prepares_nothing(new_postgres_url: NewUrl) -> None:
    both = {name: {"url": new_postgres_url(), "two_phase": True} for name in ("writer", "warehouse")}
    with routed(both, atomicity="strict", names=()) as app:
        app.put("a")
        seen: list[str] = []
        event.listen(app.container.writer_engine(), "commit", lambda _: seen.append("commit"))
        with app.unit():
            app.session.add(Fact(name=app.session.scalars(select(Item.name)).one()))
        assert seen == ["commit"]
        assert app.names("warehouse") == ["a"]


# ---- in an isolated test ---------------------------------------------------------------------------------------------------


def test_what_it_writes_in_an_isolated_test_is_rolled_back_in_every_database(new_database_url: NewUrl) -> None:
    with routed({"writer": new_database_url(), "warehouse": new_database_url()}) as app:
        with isolated(app.container):
            with app.unit():
                app.session.add_all([Item(name="a"), Fact(name="a")])
            with pytest.raises(ZeroDivisionError), app.unit():
                app.session.add_all([Item(name="b"), Fact(name="b")])
                raise ZeroDivisionError
            with app.unit() as unit:
                assert app.session.scalars(select(Item.name)).all() == ["a"]
                found = app.session.scalars(select(Fact)).one()
                savepoint = unit.savepoint()
                found.name = "undone"
                savepoint.rollback()
                app.session.add(Item(name="c"))
                assert sorted(app.session.scalars(select(Item.name))) == ["a", "c"]
            with app.unit():
                assert app.session.scalars(select(Fact.name)).all() == ["a"]
        assert app.names() == app.names("warehouse") == []
