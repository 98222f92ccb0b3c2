"""A connection that only the session uses which finds its database has no session of its own, and nobody can tell."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from textwrap import dedent
from typing import Any

import pytest
from dependency_injector import providers
from sqlalchemy import create_engine, event, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError, PendingRollbackError
from sqlalchemy.orm import Session
from sqlalchemy.orm.events import SessionEvents

from app_db import errors
from app_db._sessions.sessions import OF_TRANSACTIONS, UnitSession
from app_db._units.commit import AtomicCommit
from app_db._units.off_loop import BranchOffLoop
from app_db.testing import isolated
from harness.paths import PYTHONPATH
from harness.routed import Fact, Item, RoutedApplication, routed

NewUrl = Callable[[], str]


@pytest.fixture
def app(new_sqlite_url: NewUrl) -> Iterator[RoutedApplication]:
    with routed({"writer": new_sqlite_url(), "warehouse": new_sqlite_url()}) as app:
        yield app


@pytest.fixture
def everywhere(new_database_url: NewUrl) -> Iterator[RoutedApplication]:
    with routed({"writer": new_database_url(), "warehouse": new_database_url()}) as app:
        yield app


def sessions(app: RoutedApplication) -> set[str]:
    """Whose sessions the unit has."""
    return set(app.container.core.coordinator().get().sessions)


def write(app: RoutedApplication, name: str) -> None:
    """Write at once, by way of the session that finds its database."""
    app.session.add(Item(name=name))
    app.session.flush()


def write_beside(app: RoutedApplication, name: str) -> None:
    """Write at once, by way of the writer's session."""
    app.container.writer_session().add(Item(name=name))
    app.container.writer_session().flush()


def test_a_connection_has_no_session_until_somebody_asks(app: RoutedApplication) -> None:
    app.put("a")
    with app.unit():
        app.session.add_all([Item(name="b"), Fact(name="b")])
        assert app.session.scalars(select(Item.name).order_by(Item.name)).all() == ["a", "b"]
        assert sessions(app) == {"session"}
        app.container.writer_session()
        assert sessions(app) == {"session", "writer"}
    assert app.names() == ["a", "b"]


def test_the_session_that_somebody_asks_for_goes_on_in_the_transaction(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        write(app, "a")
        assert app.container.writer_session().scalars(select(Item.name)).all() == ["a"]
        write_beside(app, "b")
        assert app.session.connection() is app.container.writer_session().connection()
        assert app.checked_out() == 1
        write(app, "c")
    assert app.names() == ["a", "b", "c"]


def test_the_session_that_goes_on_is_rolled_back_with_its_unit(everywhere: RoutedApplication) -> None:
    app = everywhere
    with pytest.raises(ValueError, match="own"), app.unit():
        write(app, "a")
        write_beside(app, "b")
        raise ValueError("the application's own")
    assert app.names() == []
    assert app.checked_out() == 0


def test_what_the_session_that_goes_on_has_pending_is_committed(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        write(app, "a")
        app.container.writer_session().add(Item(name="b"))
    assert app.names() == ["a", "b"]


def test_the_session_that_goes_on_inside_a_savepoint_is_in_the_whole_transaction(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        write(app, "a")
        with app.session.begin_nested():
            write(app, "b")
            write_beside(app, "c")
        write_beside(app, "d")
    assert app.names() == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="own"), app.unit():
        write(app, "e")
        with app.session.begin_nested():
            write_beside(app, "f")
        raise ValueError("the application's own")
    assert app.names() == ["a", "b", "c", "d"]


def test_a_listener_that_fails_as_a_session_goes_on_loses_no_later_write(app: RoutedApplication) -> None:
    """The session that was to be put in the place is no part of the unit, and says so."""

    def refuse(*_: Any) -> None:
        raise ValueError("the listener's own")

    with app.unit():
        write(app, "a")
        session = app.container.writer_scoped_session().session_factory()
        event.listen(session, "after_transaction_create", refuse)
        with pytest.raises(ValueError, match="own"):
            app.container.writer_scoped_session().registry.set(session)
        assert session.branch is None
        write_beside(app, "b")
    assert app.names() == ["a", "b"]


def test_the_session_that_goes_on_follows_savepoints(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit() as unit:
        write(app, "a")
        savepoint = unit.savepoint()
        write(app, "b")
        lost = Item(name="c")
        app.container.writer_session().add(lost)
        app.container.writer_session().flush()
        savepoint.rollback()
        assert lost not in app.container.writer_session()
        write(app, "d")
        savepoint.rollback()
        write_beside(app, "e")
    assert app.names() == ["a", "e"]


def test_a_savepoint_of_the_session_that_goes_on_undoes_what_the_other_one_writes(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        app.session.execute(insert(Item).values(name="a", amount=0))
        savepoint = app.container.writer_session().begin_nested()
        app.session.execute(insert(Item).values(name="undone", amount=0))
        savepoint.rollback()
        write(app, "b")
    assert app.names() == ["a", "b"]


def test_a_session_that_goes_on_inside_a_savepoint_is_undone_with_it(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        write(app, "a")
        with pytest.raises(ValueError, match="own"), app.session.begin_nested():
            write(app, "b")
            app.container.writer_session().execute(insert(Item).values(name="c", amount=0))
            raise ValueError("the application's own")
        write_beside(app, "d")
    assert app.names() == ["a", "d"]


def test_a_reader_that_goes_on_inside_a_savepoint_has_none(everywhere: RoutedApplication) -> None:
    app = everywhere
    app.put("a")
    with app.unit() as unit:
        assert app.session.scalars(select(Item.name)).all() == ["a"]
        savepoint = unit.savepoint()
        assert app.container.reader_session().scalars(select(Item.name)).all() == ["a"]
        with app.session.begin_nested():
            assert app.session.scalars(select(Item.name)).all() == ["a"]
        savepoint.rollback()
        assert app.session.last_used == "reader"
    assert app.names() == ["a"]


def test_a_savepoint_that_is_rolled_back_leaves_a_connection_that_is_used_first_inside_it(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        app.session.add(Fact(name="a"))
        app.session.flush()
        for number in range(12):  # more often than a unit can have sessions of one connection that it prepares
            with pytest.raises(ValueError, match="own"), app.unit(propagation="nested"):
                write(app, f"undone {number}")
                raise ValueError("the application's own")
        write(app, "b")
        assert sessions(app) == {"session", "warehouse"}
    assert (app.names(), app.names("warehouse")) == (["b"], ["a"])


def test_a_savepoint_older_than_anything_in_the_unit_leaves_a_unit_that_goes_on(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit() as unit:
        savepoint = unit.savepoint()
        write(app, "undone")
        savepoint.rollback()
        assert app.checked_out() == 0
        write(app, "a")
        write_beside(app, "b")
    assert app.names() == ["a", "b"]


@pytest.mark.parametrize("kind", ["read_only", "timeout", "isolation"])
def test_the_session_that_goes_on_keeps_the_units_terms(kind: str, everywhere: RoutedApplication) -> None:
    app = everywhere
    options: dict[str, Any] = {
        "read_only": {"read_only": True},
        "timeout": {"timeout": 30},
        "isolation": {"isolation": "SERIALIZABLE"},
    }
    with app.unit(**options[kind]):
        assert app.session.scalars(select(Item.name)).all() == []
        name = app.session.last_used
        session = getattr(app.container, f"{name}_session")()
        with app.session.using(name):
            assert session.connection() is app.session.connection()
        assert session.scalars(select(Item.name)).all() == []


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_no_work_for_the_garbage_collector(fails: bool, app: RoutedApplication) -> None:
    left: list[weakref.ref[Any]] = []
    gc.disable()
    try:
        with suppress(ValueError), app.unit():
            app.session.add_all([Item(name="a"), Fact(name="a")])
            app.session.flush()
            work = app.container.core.coordinator().get()
            left.extend(weakref.ref(branch) for branch in (*work.connections.values(), *work.branches))
            del work
            write_beside(app, "b")
            if fails:
                raise ValueError("the application's own")
        assert [part() for part in left] == [None] * 4
    finally:
        gc.enable()


# ---- what a unit is told to do with a session --------------------------------------------------------------


def test_a_scoped_session_has_none_yet_and_removes_none(app: RoutedApplication) -> None:
    scoped = app.container.writer_scoped_session()
    with app.unit():
        write(app, "a")
        assert not scoped.registry.has()
        scoped.remove()
        assert sessions(app) == {"session"}
        write(app, "b")
        assert app.checked_out() == 1
    assert app.names() == ["a", "b"]


def test_a_session_that_a_unit_is_given_goes_on_in_the_transaction(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        write(app, "a")
        given = app.container.writer_scoped_session()(expire_on_commit=False)
        assert app.container.writer_session() is given
        assert given.scalars(select(Item.name)).all() == ["a"]
        item = Item(name="b")
        given.add(item)
    assert app.names() == ["a", "b"]
    assert item.name == "b"


def test_a_connection_that_could_not_be_had_is_asked_for_again(app: RoutedApplication) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("the listener's own")

    with app.unit():
        event.listen(app.container.writer_engine(), "begin", refuse)
        with pytest.raises(ValueError, match="own"):
            app.session.connection()
        event.remove(app.container.writer_engine(), "begin", refuse)
        assert app.checked_out() == 0
        write(app, "a")
    with app.unit():
        write(app, "b")
    assert app.names() == ["a", "b"]


@pytest.mark.parametrize("goes_on", [False, True])
def test_it_is_isolated_with_the_others(goes_on: bool, everywhere: RoutedApplication) -> None:
    app = everywhere
    with isolated(app.container):
        with app.unit():
            write(app, "a")
            if goes_on:
                write_beside(app, "b")
        with pytest.raises(ValueError, match="own"), app.unit():
            write(app, "c")
            raise ValueError("the application's own")
        with app.unit() as unit:
            write(app, "d")
            savepoint = unit.savepoint()
            write(app, "e")
            savepoint.rollback()
            assert app.session.scalars(select(Item.name).order_by(Item.name)).all() == ["a", *(["b"] if goes_on else []), "d"]
    assert app.names() == []


def test_what_goes_to_an_autonomous_connection_is_committed_whatever_becomes_of_the_unit(new_postgres_url: NewUrl) -> None:
    own = {"url": new_postgres_url(), "transactional": False}
    with routed({"writer": new_postgres_url(), "warehouse": own}, names=()) as app:
        with pytest.raises(ValueError, match="own"), app.unit():
            app.session.add_all([Item(name="a"), Fact(name="a")])
            app.session.flush()
            assert sessions(app) == {"session"}
            raise ValueError("the application's own")
        assert (app.names(), app.names("warehouse")) == ([], ["a"])


@pytest.mark.parametrize("goes_on", [False, True])
def test_connections_that_share_a_transaction_share_what_stands_for_its_session(goes_on: bool, new_database_url: NewUrl) -> None:
    url = new_database_url()
    with routed({"writer": url, "warehouse": url}, atomicity="strict", names=()) as app:
        with app.unit() as unit:
            app.session.add_all([Item(name="a"), Fact(name="a")])
            app.session.flush()
            app.container.warehouse_session().add(Fact(name="b"))
            assert "writer" not in sessions(app)
            if goes_on:
                write_beside(app, "b")
            savepoint = unit.savepoint()
            app.container.warehouse_session().execute(insert(Fact).values(name="undone"))
            savepoint.rollback()
        assert (app.names(), app.names("warehouse")) == (["a", *(["b"] if goes_on else [])], ["a", "b"])
        with app.unit():
            app.container.warehouse_session().add(Fact(name="c"))
            app.container.warehouse_session().flush()
            assert sessions(app) == {"warehouse"}
            assert app.checked_out() == 1
        assert app.names("warehouse") == ["a", "b", "c"]


# ---- it commits like any other branch ---------------------------------------------------------------------


@pytest.fixture(params=["postgresql", "mariadb"])
def preparing(request: pytest.FixtureRequest) -> Iterator[RoutedApplication]:
    new: NewUrl = request.getfixturevalue({"postgresql": "new_postgres_url", "mariadb": "new_mariadb_url"}[request.param])
    both = {name: {"url": new(), "two_phase": True} for name in ("writer", "warehouse")}
    with routed(both, atomicity="strict", names=()) as app:
        yield app


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been prepared by its xid: a name for each branch."""
    told: list[str] = []
    carry_out = AtomicCommit._commit_prepared

    def note(commit: Any) -> None:
        told.extend(branch.name for branch in commit._prepared if branch.session is None)
        carry_out(commit)

    monkeypatch.setattr(AtomicCommit, "_commit_prepared", note)
    return told


def test_two_databases_prepare_without_a_session_of_either(preparing: RoutedApplication, commits: list[str]) -> None:
    app = preparing
    with app.unit():
        app.session.add_all([Item(name="a"), Fact(name="a")])
    assert len(commits) == 1, "the other one keeps the decision"
    assert (app.names(), app.names("warehouse")) == (["a"], ["a"])
    app.put("b", on="warehouse")
    with pytest.raises(IntegrityError), app.unit():
        app.session.add_all([Item(name="b"), Fact(name="b")])
    assert (app.names(), app.names("warehouse")) == (["a"], ["a", "b"])


def test_two_databases_prepare_what_stands_for_a_session_and_what_went_on(preparing: RoutedApplication) -> None:
    app = preparing
    with app.unit():
        app.session.add_all([Item(name="a"), Fact(name="a")])
        app.session.flush()
        app.container.warehouse_session().add(Fact(name="b"))
        assert sessions(app) == {"session", "warehouse"}
    assert (app.names(), app.names("warehouse")) == (["a"], ["a", "b"])
    with pytest.raises(IntegrityError), app.unit():
        app.session.add_all([Item(name="b"), Fact(name="c")])
        app.session.flush()
        app.container.warehouse_session().add(Fact(name="b"))
    assert (app.names(), app.names("warehouse")) == (["a"], ["a", "b"])


@pytest.mark.parametrize("fails", [False, True])
def test_a_coroutine_ends_it_off_its_loop(fails: bool, preparing: RoutedApplication, commits: list[str]) -> None:
    app = preparing

    async def main() -> None:
        async with app.unit():
            await asyncio.to_thread(write_both, app, "a")
            assert sessions(app) == {"session"}
            assert {type(branch) for branch in app.container.core.coordinator().get().branches} == {BranchOffLoop}
            async with app.unit(propagation="nested"):
                await asyncio.to_thread(write_both, app, "b")
            if fails:
                raise ValueError("the application's own")
        async with app.unit():
            await asyncio.to_thread(write_both, app, "c")

    with suppress(ValueError):
        asyncio.run(main())
    assert len(commits) == (0 if fails else 1)
    assert app.names() == app.names("warehouse") == ([] if fails else ["a", "b", "c"])


def write_both(app: RoutedApplication, name: str) -> None:
    """Write to both databases at once, by way of the session that finds them."""
    app.session.add_all([Item(name=name), Fact(name=name)])
    app.session.flush()


def test_a_commit_that_is_refused_leaves_nothing_in_the_pool(new_sqlite_url: NewUrl) -> None:
    with routed({"writer": new_sqlite_url()}, names=()) as app:
        app.put("seed")
        engine = create_engine(
            app.container.writer_engine().url, connect_args={"timeout": 0}
        )  # whose readers keep writers waiting
        with app.container.writer_engine.override(providers.Object(engine)):
            with engine.connect() as reader:
                reader.exec_driver_sql("BEGIN")
                assert reader.exec_driver_sql("SELECT name FROM items").scalars().all() == ["seed"]
                with pytest.raises(OperationalError, match="locked"), app.unit():
                    write(app, "refused")
            for _ in range(2):
                with app.unit():
                    app.session.scalars(select(Item)).all()
        engine.dispose()
        assert app.names() == ["seed"]


def test_a_connection_that_cannot_be_rolled_back_is_closed(app: RoutedApplication) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("the listener's own")

    engine, closed = app.container.writer_engine(), list[object]()
    event.listen(engine, "rollback", refuse)
    event.listen(engine, "invalidate", lambda *connections: closed.append(connections))
    with pytest.raises(KeyError), app.unit():
        write(app, "undone")
        raise KeyError
    event.remove(engine, "rollback", refuse)
    assert len(closed) == 1
    with app.unit():
        write(app, "a")
    assert app.names() == ["a"]


def test_sqlite_has_its_table_of_decisions_before_it_is_written_to(new_postgres_url: NewUrl, new_sqlite_url: NewUrl) -> None:
    prepared = {"url": new_postgres_url(), "two_phase": True}
    with routed({"writer": prepared, "warehouse": new_sqlite_url()}, decision_log="warehouse", names=()) as app:
        with app.unit():
            write_both(app, "a")
            assert sessions(app) == {"session"}
        assert (app.names(), app.names("warehouse")) == (["a"], ["a"])


# ---- who wants to see the session of a connection, does ----------------------------------------------------


@contextmanager
def heard_by(target: Any, name: str) -> Iterator[list[Any]]:
    """Listen for the length of the block; the first argument of each call."""
    heard: list[Any] = []

    def listener(*arguments: Any) -> None:
        heard.append(arguments[0])

    event.listen(target, name, listener)
    try:
        yield heard
    finally:
        event.remove(target, name, listener)


TARGETS: dict[str, Callable[[Any], Any]] = {
    "every session": lambda container: Session,
    "every session of a unit": lambda container: UnitSession,
    "the writer's sessionmaker": lambda container: container.writer_sessionmaker(),
    "the writer's scoped session": lambda container: container.writer_scoped_session(),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["after_begin", "before_commit", "after_commit"])
def test_listeners_on_the_sessions_of_a_connection_are_told(name: str, target: str, app: RoutedApplication) -> None:
    with app.unit():
        write(app, "before")
    with heard_by(TARGETS[target](app.container), name) as told:
        with app.unit():
            write(app, "a")
        assert "writer" in {session.config.name for session in told}
    with app.unit():
        write(app, "after")
        assert sessions(app) == {"session"}


def test_listeners_to_objects_and_statements_cost_no_session(app: RoutedApplication) -> None:
    with heard_by(Session, "before_flush") as flushed, heard_by(Session, "do_orm_execute"), app.unit():
        write(app, "a")
        assert sessions(app) == {"session"}
    assert [session.config.name for session in flushed] == ["session"]


def test_a_session_without_objects_is_told_of_its_transaction_and_of_nothing_else(app: RoutedApplication) -> None:
    """The fact about SQLAlchemy that decides which listeners would notice that there is no session.

    Whoever listens to one event more, in a later release, had to be given the session.
    """
    names = [name for name, member in vars(SessionEvents).items() if callable(member) and not name.startswith("_")]
    assert set(OF_TRANSACTIONS) < set(names)
    with ExitStack() as stack:
        told = {name: stack.enter_context(heard_by(UnitSession, name)) for name in names}
        for fails in (False, True):
            with suppress(ValueError), app.unit() as unit:
                session = app.container.writer_session()
                session.connection()
                session.flush()
                unit.savepoint().rollback()
                if fails:
                    raise ValueError("the application's own")
        with suppress(PendingRollbackError), app.unit():
            app.container.writer_session().connection().invalidate()
        heard = {name for name, sessions in told.items() if sessions}
    assert heard == set(OF_TRANSACTIONS)


@pytest.mark.exhaustive
def test_a_listener_that_is_older_than_app_db_is_told() -> None:
    program = """
        from sqlalchemy import event, text
        from sqlalchemy.orm import Session

        told = []
        event.listen(Session, "after_commit", told.append)

        from app_db import Container, DatabaseSettings

        container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
        with container.transaction():
            container.session().execute(text("SELECT 1"))
        print(sorted(session.config.name for session in told))
    """
    ended = subprocess.run(
        [sys.executable, "-c", dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert ended.stdout.strip() == "['session', 'writer']"


def test_a_sessionmaker_is_used_as_it_was_configured(app: RoutedApplication) -> None:
    app.container.writer_sessionmaker().configure(info={"tenant": "north"})
    with app.unit():
        write(app, "a")
        assert sessions(app) == {"session", "writer"}


def test_a_session_that_was_put_in_the_place_of_another_is_used(app: RoutedApplication) -> None:
    asked: list[str] = []

    def session() -> Any:
        asked.append("writer")
        return app.container.writer_scoped_session().registry()

    with app.container.writer_session.override(providers.Callable(session)), app.unit():
        write(app, "a")
    assert asked == ["writer"]
    assert app.names() == ["a"]


# ---- what goes wrong ------------------------------------------------------------------------------------


def test_a_connection_that_is_lost_loses_the_unit_and_no_other(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url()}) as app:
        with pytest.raises(PendingRollbackError), app.unit():
            write(app, "a")
            with pytest.raises(OperationalError):
                app.session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        assert app.checked_out() == 0
        with app.unit():
            write(app, "b")
        assert app.names() == ["b"]


def test_a_transaction_that_cannot_begin_leaves_no_connection(app: RoutedApplication) -> None:
    def refuse(_: Any) -> None:
        raise ValueError("the listener's own")

    event.listen(app.container.writer_engine(), "begin", refuse)
    with pytest.raises(ValueError, match="own"), app.unit():
        write(app, "a")
    assert app.checked_out() == 0
    event.remove(app.container.writer_engine(), "begin", refuse)
    with app.unit():
        write(app, "b")
    assert app.names() == ["b"]


def test_a_connection_that_comes_after_the_unit_was_aborted_is_returned(app: RoutedApplication) -> None:
    waits, goes_on = threading.Event(), threading.Event()
    raised: list[Exception] = []

    def wait(*_: Any) -> None:
        waits.set()
        goes_on.wait(30)

    def use(session: Session) -> None:
        try:
            session.execute(insert(Item).values(name="a", amount=0))
        except errors.AppDbError as error:
            raised.append(error)

    event.listen(app.container.writer_engine(), "checkout", wait)
    with pytest.raises(ValueError, match="own"), app.unit():
        thread = threading.Thread(target=copy_context().run, args=(use, app.session))
        thread.start()
        assert waits.wait(30)
        raise ValueError("the application's own")
    goes_on.set()
    thread.join()
    assert [type(error) for error in raised] == [errors.UnitOfWorkEnded]
    assert app.checked_out() == 0
    with app.unit():
        write(app, "b")
    assert app.names() == ["b"]


def test_another_thread_cannot_begin_while_one_waits_for_the_connection(app: RoutedApplication) -> None:
    waits, goes_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        waits.set()
        goes_on.wait(30)

    event.listen(app.container.writer_engine(), "checkout", wait)
    with app.unit():
        session = app.session
        thread = threading.Thread(target=copy_context().run, args=(session.connection,))
        thread.start()
        assert waits.wait(30)
        with pytest.raises(errors.InvalidUse, match="another thread"):
            session.connection()
        with pytest.raises(errors.InvalidUse, match="another thread"):
            app.container.writer_session()
        goes_on.set()
        thread.join()
        write_beside(app, "a")
        write(app, "b")
    assert app.names() == ["a", "b"]


def test_threads_that_ask_at_the_same_time_get_one_session(app: RoutedApplication) -> None:
    """The second of them waits until the first one's session has gone on with the transaction."""
    waits, goes_on = threading.Event(), threading.Event()
    got: list[Session] = []

    def wait(*_: Any) -> None:
        if not waits.is_set():
            waits.set()
            goes_on.wait(30)

    def ask() -> None:
        got.append(app.container.writer_session())

    with app.unit():
        write(app, "a")
        event.listen(UnitSession, "after_transaction_create", wait)
        try:
            threads = [threading.Thread(target=copy_context().run, args=(ask,)) for _ in range(2)]
            threads[0].start()
            assert waits.wait(30)
            threads[1].start()
            threads[1].join(0.2)
            assert got == []
            goes_on.set()
            for thread in threads:
                thread.join()
        finally:
            event.remove(UnitSession, "after_transaction_create", wait)
        assert got == [app.container.writer_session()] * 2
        write_beside(app, "b")
        assert app.checked_out() == 1
    assert app.names() == ["a", "b"]


def test_a_session_that_cannot_go_on_leaves_the_connection_to_the_next_one(app: RoutedApplication) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("the listener's own")

    with app.unit():
        write(app, "a")
        event.listen(UnitSession, "after_transaction_create", refuse)
        try:
            with pytest.raises(ValueError, match="own"):
                app.container.writer_session()
        finally:
            event.remove(UnitSession, "after_transaction_create", refuse)
        write_beside(app, "b")
        write(app, "c")
        assert app.checked_out() == 1
    assert app.names() == ["a", "b", "c"]


def test_who_has_what_stood_for_the_session_gets_its_connection(app: RoutedApplication) -> None:
    with app.unit():
        write(app, "a")
        registry: Any = app.container.writer_scoped_session().registry
        stood = registry.holder()
        connection = stood.begun_connection()
        session = app.container.writer_session()
        assert registry.holder() is session
        assert stood.begun_connection() is session.connection() is connection


def test_a_session_that_is_asked_for_while_the_other_begins_goes_on_with_its_transaction(app: RoutedApplication) -> None:
    """As when two threads do so."""
    engine = app.container.writer_engine()
    begun: list[Any] = []

    def meanwhile() -> Any:
        if not begun:
            begun.append(engine)
            write(app, "a")
        return engine

    with app.container.writer_engine.override(providers.Callable(meanwhile)), app.unit():
        write_beside(app, "b")
        assert app.session.connection() is app.container.writer_session().connection()
        assert app.checked_out() == 1
    assert app.names() == ["a", "b"]
