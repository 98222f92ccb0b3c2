"""A unit that wrote to several databases commits in all of them, or is refused before any commits; or, where the application
chose `best_effort`, says exactly where it committed and where it did not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, aliased

from app_db._units.manager import retryable
from app_db.errors import NotAtomic, OutcomeUnknown, PartialCommit
from harness.applications import DEFER_UNIQUENESS, Application, Item, read_lock, running
from harness.servers import MariaDBServer, PostgresServer, Server

NewUrl = Callable[[], str]

other = aliased(Item)
READS = {
    "rows": lambda session: session.scalars(select(Item)).all(),
    "get": lambda session: session.get(Item, 1),
    "count": lambda session: session.scalar(select(func.count()).select_from(Item)),
    "join": lambda session: session.execute(select(Item.id, other.id).join(other, Item.id == other.id)).all(),
    "subquery": lambda session: session.scalars(select(Item).where(Item.id.in_(select(other.id)))).all(),
    "cte": lambda session: session.execute(select(select(Item.id).cte("ids"))).all(),
    "text": lambda session: session.execute(text("/* UPDATE */ SELECT name FROM items WHERE name <> 'DELETE FROM items'")).all(),
    "query": lambda session: session.query(Item).filter(Item.name.like("s%")).order_by(Item.id).first(),
    "lock": lambda session: session.scalars(select(Item).with_for_update()).all(),
}


@contextmanager
def commits_of(app: Application) -> Iterator[list[str]]:
    """Note the names of the connections in the order in which they commit."""
    order: list[str] = []
    with ExitStack() as stack:
        for name in app.connections:

            def note(connection: Connection, name: str = name) -> None:
                order.append(name)

            engine = app.engine(name)
            event.listen(engine, "commit", note)
            stack.callback(event.remove, engine, "commit", note)
        yield order


def write_to_each(app: Application, *names: str) -> None:
    for name in names:
        app.add(f"by {name}", name)


# ---- strict --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("writer", "warehouse"), ("warehouse", "writer")], ids="-".join)
def test_two_written_databases_are_refused_with_nothing_committed_in_either(
    order: tuple[str, str], new_database_url: NewUrl
) -> None:
    with running(writer=new_database_url(), warehouse=new_database_url()) as app, commits_of(app) as commits:
        with pytest.raises(NotAtomic) as caught, app.unit():
            write_to_each(app, *order)
        assert caught.value.connections == ("warehouse", "writer")
        for word in ("'warehouse'", "'writer'", "APP_DB_ATOMICITY"):
            assert word in str(caught.value)
        assert commits == [], "not one COMMIT was sent"
        assert (app.names("writer"), app.names("warehouse")) == ([], [])


def test_writes_that_only_the_commit_flushes_are_seen_in_time(new_database_url: NewUrl) -> None:
    with running(writer=new_database_url(), warehouse=new_database_url()) as app:
        with pytest.raises(NotAtomic), app.unit():
            app.session("writer").add(Item(name="a"))
            app.session("warehouse").add(Item(name="a"))
        assert (app.names("writer"), app.names("warehouse")) == ([], [])


def test_a_flush_of_one_session_that_writes_through_another_is_seen_in_time(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url(), warehouse=new_sqlite_url()) as app:

        def copy_to_warehouse(session: Session, context: object) -> None:
            for item in session.new:
                app.session("warehouse").add(Item(name=item.name))

        with pytest.raises(NotAtomic), app.unit():
            app.session("warehouse").scalars(select(Item)).all()
            session = app.session("writer")
            session.add(Item(name="a"))
            event.listen(session, "after_flush", copy_to_warehouse)
        assert (app.names("writer"), app.names("warehouse")) == ([], [])


def test_a_refused_unit_is_not_run_again(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url(), warehouse=new_sqlite_url()) as app:
        calls: list[int] = []

        def work() -> None:
            calls.append(1)
            write_to_each(app, "writer", "warehouse")

        with pytest.raises(NotAtomic):
            app.unit(attempts=3, backoff=0).run(work)
        assert len(calls) == 1


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_database_that_is_only_read_does_not_count(read: Callable[[Session], object], new_database_url: NewUrl) -> None:
    with running(writer=new_database_url(), warehouse=new_database_url()) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')", on="warehouse")
        with app.unit():
            app.add("a")
            assert read(app.session("warehouse"))
        assert app.names("writer") == ["a"]


def test_a_select_of_a_function_nobody_vouches_for_counts_as_a_write(new_database_url: NewUrl) -> None:
    with running(writer=new_database_url(), warehouse=new_database_url()) as app:
        app.define_writing_function("warehouse")
        with pytest.raises(NotAtomic) as caught, app.unit():
            app.add("a")
            assert app.session("warehouse").scalar(select(func.add_item("b"))) == 1
        assert caught.value.connections == ("warehouse", "writer")
        assert (app.names("writer"), app.names("warehouse")) == ([], [])


def test_a_write_inside_a_query_counts_as_a_write(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')", on="warehouse")
        changing = "WITH changed AS (UPDATE items AS i SET name = 'x' RETURNING i.id) SELECT * FROM changed"
        with pytest.raises(NotAtomic), app.unit():
            app.add("a")
            app.session("warehouse").execute(text(changing))
        assert (app.names("writer"), app.names("warehouse")) == ([], ["seed"])


def test_locks_of_a_database_that_is_only_read_are_held_until_the_others_have_committed(new_postgres_url: NewUrl) -> None:
    with running(archive=new_postgres_url(), writer=new_postgres_url()) as app, commits_of(app) as commits:
        app.run("INSERT INTO items (name) VALUES ('seed')", on="archive")
        with app.unit():
            app.session("archive").scalars(select(Item).with_for_update()).all()
            app.add("a")
        assert commits == ["writer", "archive"]


def test_a_read_only_mirror_of_a_written_database_does_not_count(database_url: str) -> None:
    with running(writer=database_url, reader={"mirror": "writer", "read_only": True}) as app:
        with app.unit():
            app.add("a")
            assert app.session("reader").scalars(select(Item)).all() == []
        assert app.names() == ["a"]


# ---- best effort -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("writer", "warehouse"), ("warehouse", "writer")], ids="-".join)
def test_under_best_effort_both_commit_in_the_order_of_their_names(order: tuple[str, str], new_database_url: NewUrl) -> None:
    with running("best_effort", writer=new_database_url(), warehouse=new_database_url()) as app, commits_of(app) as commits:
        with app.unit():
            write_to_each(app, *order)
        assert commits == ["warehouse", "writer"]
        assert (app.names("writer"), app.names("warehouse")) == (["by writer"], ["by warehouse"])


def test_under_best_effort_an_error_before_the_commit_leaves_nothing_anywhere(new_database_url: NewUrl) -> None:
    with running("best_effort", writer=new_database_url(), warehouse=new_database_url()) as app:
        with pytest.raises(ValueError, match="own"), app.unit():
            write_to_each(app, "writer", "warehouse")
            raise ValueError("own")
        assert (app.names("writer"), app.names("warehouse")) == ([], [])


# The connections commit in this order, and one of them can't.
NAMES = ("alpha", "beta", "gamma")
OUTCOMES = {
    "beta": (("alpha",), ("gamma",)),
    "gamma": (("alpha", "beta"), ()),
}


def check_outcome(app: Application, error: PartialCommit, failing: str, before: list[str]) -> None:
    committed, rolled_back = OUTCOMES[failing]
    assert (error.committed, error.failed, error.rolled_back) == (committed, failing, rolled_back)
    for name in NAMES:
        assert f"'{name}'" in str(error)
        expected = before if name == failing else []
        assert app.names(name) == sorted([*expected, f"by {name}"] if name in committed else expected)


@pytest.mark.parametrize("failing", OUTCOMES)
def test_a_deferred_constraint_that_fails_the_commit_of_one_is_a_partial_commit(failing: str, new_postgres_url: NewUrl) -> None:
    with running("best_effort", **{name: new_postgres_url() for name in NAMES}) as app:
        app.run(*DEFER_UNIQUENESS, on=failing)
        with pytest.raises(PartialCommit) as caught, app.unit():
            write_to_each(app, *reversed(NAMES))
            app.add("taken", failing)
        assert "one_of_each" in str(caught.value.__cause__)
        check_outcome(app, caught.value, failing, ["taken"])


def test_a_first_commit_that_fails_is_no_partial_commit(new_postgres_url: NewUrl) -> None:
    with running("best_effort", alpha=new_postgres_url(), beta=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS, on="alpha")
        with pytest.raises(DBAPIError, match="one_of_each"), app.unit():
            write_to_each(app, "beta", "alpha")
            app.add("taken", "alpha")
        assert (app.names("alpha"), app.names("beta")) == (["taken"], [])


@pytest.mark.parametrize("failing", OUTCOMES)
def test_a_readers_lock_that_fails_the_commit_of_one_is_a_partial_commit(failing: str, new_sqlite_url: NewUrl) -> None:
    with running("best_effort", **{name: new_sqlite_url() for name in NAMES}) as app:
        with read_lock(app, failing), pytest.raises(PartialCommit) as caught, app.unit():
            write_to_each(app, *reversed(NAMES))
        assert "locked" in str(caught.value.__cause__)
        check_outcome(app, caught.value, failing, ["seed"])


@pytest.mark.representative("beta")
@pytest.mark.parametrize("failing", OUTCOMES)
def test_a_locked_server_that_fails_the_commit_of_one_is_a_partial_commit(
    failing: str, new_sqlite_url: NewUrl, mariadb_url: str
) -> None:
    urls = {name: mariadb_url if name == failing else new_sqlite_url() for name in NAMES}
    with running("best_effort", **urls) as app, app.plain_engine(failing).connect() as administrator:

        def lock() -> None:
            administrator.exec_driver_sql("FLUSH TABLES WITH READ LOCK")

        try:
            with pytest.raises(PartialCommit) as caught, app.unit():
                app.session(failing).execute(text("SET SESSION lock_wait_timeout = 1"))
                write_to_each(app, *reversed(NAMES))
                app.container.unit().before_commit(lock)
        finally:
            administrator.exec_driver_sql("UNLOCK TABLES")
        check_outcome(app, caught.value, failing, [])


def test_a_partial_commit_is_not_run_again_although_its_cause_would_be(new_sqlite_url: NewUrl) -> None:
    with running("best_effort", alpha=new_sqlite_url(), beta=new_sqlite_url()) as app, read_lock(app, "beta"):
        calls: list[int] = []

        def work() -> None:
            calls.append(1)
            write_to_each(app, "alpha", "beta")

        with pytest.raises(PartialCommit) as caught:
            app.unit(attempts=3, backoff=0).run(work)
        assert isinstance(caught.value.__cause__, OperationalError)
        assert retryable(caught.value.__cause__)
        assert len(calls) == 1
        assert app.names("alpha") == ["by alpha"]


def test_a_first_commit_that_fails_for_a_reason_that_may_pass_is_run_again(new_sqlite_url: NewUrl) -> None:
    with running("best_effort", alpha=new_sqlite_url(), beta=new_sqlite_url()) as app, ExitStack() as lock:
        lock.enter_context(read_lock(app, "alpha"))
        calls: list[int] = []

        def work() -> None:
            calls.append(1)
            if len(calls) == 2:
                lock.close()
            write_to_each(app, "alpha", "beta")

        app.unit(attempts=3, backoff=0).run(work)
        assert len(calls) == 2
        assert (app.names("alpha"), app.names("beta")) == (["by alpha", "seed"], ["by beta"])


def kill_connection(server: Server, session: Session) -> None:
    if isinstance(server, PostgresServer):
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        server.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    else:
        server.execute(f"KILL {session.scalar(text('SELECT CONNECTION_ID()'))}")


@pytest.mark.parametrize("kind", [PostgresServer, MariaDBServer], ids=["postgresql", "mariadb"])
def test_a_connection_lost_after_another_has_committed_says_which_did(
    kind: type[Server], request: pytest.FixtureRequest, new_sqlite_url: NewUrl
) -> None:
    name = "postgres" if kind is PostgresServer else "mariadb"
    server: Server = request.getfixturevalue(name)
    with running("best_effort", alpha=new_sqlite_url(), beta=request.getfixturevalue(f"{name}_url")) as app:
        calls: list[int] = []

        def work() -> None:
            calls.append(1)
            write_to_each(app, "alpha", "beta")
            app.container.unit().before_commit(kill_connection, server, app.session("beta"))

        with pytest.raises(OutcomeUnknown) as caught:
            app.unit(attempts=3, backoff=0).run(work)
        assert (caught.value.connection, caught.value.committed) == ("beta", ("alpha",))
        assert len(calls) == 1
        assert (app.names("alpha"), app.names("beta")) == (["by alpha"], [])


# ---- autonomous connections ----------------------------------------------------------------------------------------------


def test_what_was_written_to_an_autonomous_connection_stays_when_the_unit_fails(new_database_url: NewUrl) -> None:
    with running(writer=new_database_url(), log={"url": new_database_url(), "transactional": False}) as app:
        with pytest.raises(ValueError, match="own"), app.unit():
            app.add("a")
            app.add("tried a", "log")
            raise ValueError("own")
        assert (app.names("writer"), app.names("log")) == ([], ["tried a"])


def test_it_stays_too_when_the_unit_is_refused_by_its_commit(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url(), log={"url": new_postgres_url(), "transactional": False}) as app:
        app.run(*DEFER_UNIQUENESS)
        with pytest.raises(DBAPIError, match="one_of_each"), app.unit():
            app.add("taken")
            app.add("tried", "log")
        assert (app.names("writer"), app.names("log")) == (["taken"], ["tried"])


def test_it_is_committed_with_the_unit_and_does_not_count_for_atomicity(new_database_url: NewUrl) -> None:
    with running(writer=new_database_url(), log={"url": new_database_url(), "transactional": False}) as app:
        with app.unit():
            app.add("did a", "log")
            app.add("a")
        assert (app.names("writer"), app.names("log")) == (["a"], ["did a"])


def test_objects_that_were_only_added_to_an_autonomous_session_are_kept_when_the_unit_fails(new_database_url: NewUrl) -> None:
    with running(writer=new_database_url(), log={"url": new_database_url(), "transactional": False}) as app:
        with pytest.raises(ValueError, match="own"), app.unit():
            app.session("log").add(Item(name="tried a"))
            raise ValueError("own")
        assert app.names("log") == ["tried a"]


def test_an_autonomous_connection_that_can_not_commit_does_not_change_how_a_failed_unit_ends(new_postgres_url: NewUrl) -> None:
    with running(writer=new_postgres_url(), log={"url": new_postgres_url(), "transactional": False}) as app:
        app.run(*DEFER_UNIQUENESS, on="log")
        with pytest.raises(ValueError, match="own"), app.unit():
            app.add("a")
            app.add("taken", "log")
            raise ValueError("own")
        assert (app.names("writer"), app.names("log")) == ([], ["taken"])


def test_one_written_database_costs_one_commit(new_database_url: NewUrl) -> None:
    with running(writer=new_database_url(), warehouse=new_database_url()) as app, commits_of(app) as commits:
        with app.unit():
            app.add("a")
        assert commits == ["writer"]
