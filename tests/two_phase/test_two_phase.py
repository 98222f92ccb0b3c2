"""A unit that wrote to several databases prepares, decides and commits, in this order, and only where that is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import event, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app_db.errors import InvalidUse, NotAtomic
from harness.applications import Item
from harness.servers import MariaDBServer, PostgresServer
from harness.two_phasing import listening_to_mariadb, listening_to_postgres, sessions_of, two_phasing, without

NewUrl = Callable[[], str]

DECISION = "INSERT INTO app_db_decisions"
PREPARE, COMMIT_PREPARED = "PREPARE TRANSACTION", "COMMIT PREPARED"


def endings(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What was said about how transactions end."""
    return [pair for pair in said if pair[1] in (PREPARE, COMMIT_PREPARED, DECISION, "COMMIT", "ROLLBACK", "ROLLBACK PREPARED")]


# ---- what the servers hear -------------------------------------------------------------------------------------------


def test_one_written_database_gets_a_plain_commit_and_nothing_is_decided(
    postgres: PostgresServer, new_postgres_url: NewUrl
) -> None:
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.container.check()  # makes the decision log, once
        with listening_to_postgres(postgres, app) as heard, app.unit():
            app.add("a", "warehouse")
            assert app.session("writer").scalars(select(Item)).all() == []
        assert endings(heard()) == [("writer", "COMMIT"), ("warehouse", "COMMIT")]
        assert app.everywhere() == {"writer": [], "warehouse": ["a"]}


def test_several_are_prepared_then_it_is_decided_then_they_commit(postgres: PostgresServer, new_postgres_url: NewUrl) -> None:
    urls = {name: new_postgres_url() for name in ("alpha", "beta", "gamma", "journal")}
    with two_phasing("journal", **urls) as app:
        app.container.check()
        with listening_to_postgres(postgres, app) as heard, app.unit():
            app.add_to_each("a", "gamma", "alpha", "beta")
        said = endings(heard())
        assert sorted(said[:3]) == [("alpha", PREPARE), ("beta", PREPARE), ("gamma", PREPARE)]
        assert said[3] == ("journal", DECISION)
        assert sorted(said[4:]) == [("alpha", COMMIT_PREPARED), ("beta", COMMIT_PREPARED), ("gamma", COMMIT_PREPARED)]
        assert app.names("alpha") == app.names("beta") == app.names("gamma") == ["a"]


def test_the_database_that_keeps_the_decisions_is_not_prepared_when_it_takes_part(
    postgres: PostgresServer, new_postgres_url: NewUrl
) -> None:
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.container.check()
        with listening_to_postgres(postgres, app) as heard, app.unit():
            app.add_to_each("a")
        said = endings(heard())
        assert sorted(said[:2]) == [("warehouse", PREPARE), ("writer", DECISION)]
        assert said[2:] == [("writer", "COMMIT"), ("warehouse", COMMIT_PREPARED)]
        [decision] = app.decisions()
        assert (decision.verdict, decision.branches) == ("commit", ("warehouse",))


def test_decisions_may_be_kept_in_a_file(postgres: PostgresServer, new_postgres_url: NewUrl, tmp_path: Path) -> None:
    with two_phasing(f"file:{tmp_path}/decisions", writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        with listening_to_postgres(postgres, app) as heard, app.unit():
            app.add_to_each("a")
        said = endings(heard())
        assert sorted(said[:2]) == [("warehouse", PREPARE), ("writer", PREPARE)]
        assert sorted(said[2:]) == [("warehouse", COMMIT_PREPARED), ("writer", COMMIT_PREPARED)]
        [decision] = app.decisions()
        assert (decision.verdict, decision.branches) == ("commit", ("warehouse", "writer"))


def test_one_that_can_not_prepare_decides_by_its_own_commit(postgres: PostgresServer, new_postgres_url: NewUrl) -> None:
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url(), old=without(new_postgres_url())) as app:
        app.container.core.decision_logs().of("old").ensure()
        app.container.check()
        with listening_to_postgres(postgres, app) as heard, app.unit():
            app.add_to_each("a")
        said = endings(heard())
        assert sorted(said[:3]) == [("old", DECISION), ("warehouse", PREPARE), ("writer", PREPARE)]
        assert said[3] == ("old", "COMMIT")
        assert sorted(said[4:]) == [("warehouse", COMMIT_PREPARED), ("writer", COMMIT_PREPARED)]
        assert app.decisions() == []
        assert [decision.verdict for decision in app.decisions("old")] == ["commit"]


def test_sqlite_decides_by_its_own_commit(postgres: PostgresServer, new_postgres_url: NewUrl, sqlite_url: str) -> None:
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url(), lite=sqlite_url) as app:
        with app.unit():
            app.add_to_each("a")
        assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"], "lite": ["a"]}
        assert [decision.verdict for decision in app.decisions("lite")] == ["commit"]
        assert app.decisions() == []


def test_on_mariadb_one_written_database_commits_in_one_phase(mariadb: MariaDBServer, new_mariadb_url: NewUrl) -> None:
    with two_phasing(writer=new_mariadb_url(), warehouse=new_mariadb_url()) as app:
        app.container.check()
        with listening_to_mariadb(mariadb, app) as heard:
            with app.unit():
                app.add("a")
            assert heard() == ["XA START", "XA END", "XA COMMIT"]
        assert app.names() == ["a"]


def test_on_mariadb_branches_are_prepared_and_then_commit(
    mariadb: MariaDBServer, new_mariadb_url: NewUrl, tmp_path: Path
) -> None:
    with two_phasing(f"file:{tmp_path}/decisions", writer=new_mariadb_url(), warehouse=new_mariadb_url()) as app:
        with listening_to_mariadb(mariadb, app) as heard:
            with app.unit():
                app.add_to_each("a")
            said = heard()
        assert said[:2] == ["XA START", "XA START"]
        assert sorted(said[2:6]) == ["XA END", "XA END", "XA PREPARE", "XA PREPARE"]
        assert said[6:] == ["XA COMMIT", "XA COMMIT"]
        assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"]}


def test_mariadb_and_postgresql_commit_together(new_mariadb_url: NewUrl, new_postgres_url: NewUrl) -> None:
    for log in ("writer", "warehouse"):
        with two_phasing(log, writer=new_mariadb_url(), warehouse=new_postgres_url()) as app:
            with app.unit():
                app.add_to_each("a")
            assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"]}
            assert len(app.decisions()) == 1


def test_readers_are_released_before_anything_is_prepared_and_lockers_when_all_is_done(
    postgres: PostgresServer, new_postgres_url: NewUrl
) -> None:
    urls = {name: new_postgres_url() for name in ("alpha", "beta", "locker", "zreader")}
    with two_phasing("alpha", **urls) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')", on="locker")
        app.container.check()
        with listening_to_postgres(postgres, app) as heard, app.unit():
            assert app.session("zreader").scalars(select(Item)).all() == []
            assert len(app.session("locker").scalars(select(Item).with_for_update()).all()) == 1
            app.add_to_each("a", "alpha", "beta")
        said = endings(heard())
        assert said[0] == ("zreader", "COMMIT")
        assert said[-2:] == [("beta", COMMIT_PREPARED), ("locker", "COMMIT")]


def test_what_was_written_to_an_autonomous_connection_stays_and_is_no_part_of_it(new_postgres_url: NewUrl) -> None:
    autonomous = {"url": new_postgres_url(), "transactional": False, "two_phase": False}
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url(), log=autonomous) as app:
        with app.unit():
            app.add_to_each("a")
        app.run("ALTER TABLE items ADD CONSTRAINT short CHECK (name <> 'b')", on="warehouse")
        with pytest.raises(DBAPIError), app.unit():
            app.add("b", "log")
            app.add("b", "writer")
            app.session("warehouse").add(Item(name="b"))
        assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"], "log": ["a", "b"]}


# ---- two that can't prepare -----------------------------------------------------------------------------------------------


def test_two_that_can_not_prepare_are_refused_by_name_and_nothing_is_committed(new_postgres_url: NewUrl, sqlite_url: str) -> None:
    with two_phasing(writer=new_postgres_url(), old=without(new_postgres_url()), lite=sqlite_url) as app:
        with pytest.raises(NotAtomic) as caught, app.unit():
            app.add_to_each("a")
        assert caught.value.connections == ("lite", "old")
        assert app.everywhere() == {"writer": [], "old": [], "lite": []}


def test_under_best_effort_they_commit_one_by_one(postgres: PostgresServer, new_postgres_url: NewUrl, sqlite_url: str) -> None:
    with two_phasing(None, "best_effort", writer=new_postgres_url(), old=without(new_postgres_url()), lite=sqlite_url) as app:
        app.container.check()
        with listening_to_postgres(postgres, app) as heard, app.unit():
            app.add_to_each("a")
        assert endings(heard()) == [("old", "COMMIT"), ("writer", "COMMIT")]
        assert app.everywhere() == {"writer": ["a"], "old": ["a"], "lite": ["a"]}


def test_under_best_effort_what_can_commit_together_does(new_postgres_url: NewUrl, postgres: PostgresServer) -> None:
    with two_phasing(None, "best_effort", writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.container.check()
        with listening_to_postgres(postgres, app) as heard, app.unit():
            app.add_to_each("a")
        assert ("warehouse", PREPARE) in heard()


# ---- listeners -------------------------------------------------------------------------------------------------------------


def test_what_a_sessions_listener_writes_before_the_commit_is_prepared_with_it(new_postgres_url: NewUrl) -> None:
    """Guards why the branches call the session's own way to prepare: nothing else runs the listeners to before_commit early."""
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.run("ALTER TABLE items ADD CONSTRAINT short CHECK (name <> 'refused')", on="warehouse")
        for name, outcome in (("kept", ["a", "kept"]), ("refused", ["a", "kept"])):

            def write(session: Session, name: str = name) -> None:
                session.add(Item(name=name))

            def work(item: str) -> None:
                app.add(item, "writer")
                session = app.session("warehouse")
                session.add(Item(name=item))
                event.listen(session, "before_commit", write)

            if name == "kept":
                with app.unit():
                    work("a")
            else:
                with pytest.raises(DBAPIError, match="short"), app.unit():
                    work("b")
            assert app.names("warehouse") == outcome
            assert app.names("writer") == ["a"]


def test_a_listener_that_changes_another_session_after_its_last_flush_is_refused(new_postgres_url: NewUrl) -> None:
    with two_phasing(alpha=new_postgres_url(), beta=new_postgres_url()) as app:

        def change(session: Session) -> None:
            app.session("alpha").add(Item(name="late"))

        with pytest.raises(InvalidUse, match="alpha"), app.unit():
            app.add_to_each("a")
            event.listen(app.session("beta"), "before_commit", change)
        assert app.everywhere() == {"alpha": [], "beta": []}


def test_a_listener_may_change_a_session_that_is_flushed_later(new_postgres_url: NewUrl) -> None:
    with two_phasing(alpha=new_postgres_url(), beta=new_postgres_url()) as app:

        def change(session: Session) -> None:
            app.session("beta").add(Item(name="early"))

        with app.unit():
            app.add_to_each("a")
            event.listen(app.session("alpha"), "before_commit", change)
        assert app.everywhere() == {"alpha": ["a"], "beta": ["a", "early"]}


@pytest.mark.parametrize("read", ["plainly", "locking"])
def test_a_session_that_only_read_takes_part_when_its_listener_writes(read: str, new_postgres_url: NewUrl) -> None:

    with two_phasing(alpha=new_postgres_url(), beta=new_postgres_url(), gamma=new_postgres_url()) as app:

        def write(session: Session) -> None:
            app.session("gamma").execute(text("INSERT INTO items (name) VALUES ('late')"))

        with app.unit():
            query = select(Item).with_for_update() if read == "locking" else select(Item)
            app.session("gamma").scalars(query).all()
            app.add("x", "alpha")
            app.add("x", "beta")
            event.listen(app.session("gamma"), "before_commit", write)
        assert app.everywhere() == {"alpha": ["x"], "beta": ["x"], "gamma": ["late"]}
        assert {name for decision in app.decisions() for name in decision.branches} == {"beta", "gamma"}


# ---- hooks -------------------------------------------------------------------------------------------------------------------


def test_hooks_run_before_anything_is_prepared_and_after_everything_has_committed(new_postgres_url: NewUrl) -> None:
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        seen: list[object] = []

        def look(when: str) -> None:
            seen.append((when, app.everywhere(), app.prepared(), app.checked_out()))

        def write() -> None:
            app.add_to_each("from the hook")

        with app.unit() as unit:
            app.add_to_each("a")
            unit.before_commit(write)
            unit.on_commit(look, "committed")
            unit.on_abort(look, "aborted")
        both = ["a", "from the hook"]
        assert seen == [("committed", {"writer": both, "warehouse": both}, [], 0)]


def test_an_aborted_units_hooks_run_when_nothing_is_prepared_any_more(new_postgres_url: NewUrl) -> None:
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.run("ALTER TABLE items ADD CONSTRAINT one UNIQUE (name) DEFERRABLE INITIALLY DEFERRED", on="warehouse")
        app.run("ALTER TABLE items DROP CONSTRAINT items_name_key", on="warehouse")
        app.run("INSERT INTO items (name) VALUES ('a')", on="warehouse")
        seen: list[object] = []
        with pytest.raises(DBAPIError, match="one"), app.unit() as unit:
            app.add_to_each("a")
            unit.on_commit(seen.append, "committed")
            unit.on_abort(lambda: seen.append((app.everywhere(), app.prepared(), app.checked_out())))
        assert seen == [({"writer": [], "warehouse": ["a"]}, [], 0)]


# ---- savepoints, inner units, options --------------------------------------------------------------------------------------


@pytest.fixture(params=["postgresql", "mariadb"])
def new_preparing_url(request: pytest.FixtureRequest) -> NewUrl:
    name = {"postgresql": "new_postgres_url", "mariadb": "new_mariadb_url"}[request.param]
    factory: NewUrl = request.getfixturevalue(name)
    return factory


def test_savepoints_work_in_a_unit_that_prepares(new_preparing_url: NewUrl) -> None:
    with two_phasing(writer=new_preparing_url(), warehouse=new_preparing_url()) as app:
        with app.unit() as unit:
            app.add_to_each("a")
            savepoint = unit.savepoint()
            app.add_to_each("undone")
            savepoint.rollback()
            with app.session("writer").begin_nested():
                app.add("b")
            with pytest.raises(DBAPIError), app.session("warehouse").begin_nested():
                app.session("warehouse").execute(text("INSERT INTO items (name) VALUES ('a')"))
            with pytest.raises(ValueError, match="own"), app.unit("nested"):
                app.add_to_each("nested and undone")
                raise ValueError("own")
            with app.unit("nested"):
                app.add_to_each("nested")
        assert app.everywhere() == {"writer": ["a", "b", "nested"], "warehouse": ["a", "nested"]}


def test_a_connection_may_be_used_first_in_a_nested_part_that_fails_any_number_of_times(new_preparing_url: NewUrl) -> None:
    with two_phasing(writer=new_preparing_url(), warehouse=new_preparing_url()) as app:
        with app.unit():
            app.add("a")
            for number in range(12):
                with pytest.raises(ValueError, match="own"), app.unit("nested"):
                    app.add(f"undone {number}", "warehouse")
                    raise ValueError("own")
            app.add("a", "warehouse")
        assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"]}


def test_a_unit_of_its_own_inside_another_commits_by_itself(new_preparing_url: NewUrl) -> None:
    with two_phasing(writer=new_preparing_url(), warehouse=new_preparing_url()) as app:
        with pytest.raises(ValueError, match="own"), app.unit():
            app.add_to_each("outer")
            with app.unit("requires_new"):
                app.add_to_each("inner")
            raise ValueError("own")
        assert app.everywhere() == {"writer": ["inner"], "warehouse": ["inner"]}
        assert len(app.decisions()) == 1
        with app.unit():
            app.add_to_each("outer")
            with pytest.raises(ZeroDivisionError), app.unit("requires_new"):
                app.add_to_each("b")
                raise ZeroDivisionError
        assert app.everywhere() == {"writer": ["inner", "outer"], "warehouse": ["inner", "outer"]}


@pytest.mark.parametrize("level", ["READ COMMITTED", "SERIALIZABLE"])
def test_an_isolation_level_holds_in_branches_that_prepare(level: str, new_preparing_url: NewUrl) -> None:
    with two_phasing(writer=new_preparing_url(), warehouse=new_preparing_url()) as app:
        query = {"postgresql": "SHOW transaction_isolation", "mysql": "SELECT @@tx_isolation"}
        for _ in range(2):
            with app.unit(isolation=level):
                for name in app.connections:
                    found = app.session(name).scalar(text(query[app.plain_engine(name).dialect.name]))
                    assert str(found).upper().replace("-", " ") == level
                app.add_to_each(f"{len(app.names())}")
        assert app.everywhere() == {"writer": ["0", "1"], "warehouse": ["0", "1"]}


def test_a_read_only_unit_begins_nothing_by_xid(mariadb: MariaDBServer, new_mariadb_url: NewUrl) -> None:
    with two_phasing(writer=new_mariadb_url(), warehouse=new_mariadb_url()) as app:
        with listening_to_mariadb(mariadb, app) as heard:
            with app.unit(read_only=True):
                for name in app.connections:
                    assert app.session(name).scalars(select(Item)).all() == []
            assert [word for word in heard() if word.startswith("XA")] == []
        with app.unit():
            app.add_to_each("a")
        assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"]}


def test_a_timeout_does_not_get_in_the_way_of_preparing(new_preparing_url: NewUrl) -> None:
    with two_phasing(writer=new_preparing_url(), warehouse=new_preparing_url()) as app:
        with app.unit(timeout=20):
            app.add_to_each("a")
        assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"]}


def test_several_sessions_of_one_connection_have_names_of_their_own(new_preparing_url: NewUrl) -> None:
    with two_phasing(writer=new_preparing_url(), warehouse=new_preparing_url()) as app:
        with app.unit():
            app.add_to_each("a")
            for number, session in enumerate(sessions_of(app, "warehouse", 3)):
                session.add(Item(name=f"b{number}"))
                session.flush()
            for number, session in enumerate(sessions_of(app, "writer", 2)):
                session.add(Item(name=f"c{number}"))
        assert app.everywhere() == {"writer": ["a", "c0", "c1"], "warehouse": ["a", "b0", "b1", "b2"]}


def test_more_sessions_than_can_be_told_apart_are_refused(new_preparing_url: NewUrl) -> None:
    with two_phasing(writer=new_preparing_url()) as app:
        with pytest.raises(InvalidUse, match="'writer'"), app.unit():
            for number, session in enumerate(sessions_of(app, "writer", 11)):
                session.add(Item(name=f"{number}"))
                session.flush()
        assert app.names() == []


def test_objects_are_detached_and_usable_afterwards(new_preparing_url: NewUrl) -> None:
    kept = {"session": {"expire_on_commit": False}}
    with two_phasing(writer={"url": new_preparing_url(), **kept}, warehouse={"url": new_preparing_url(), **kept}) as app:
        with app.unit():
            items = [Item(name="a"), Item(name="b")]
            for item, name in zip(items, app.connections, strict=True):
                app.session(name).add(item)
        assert [item.name for item in items] == ["a", "b"]
        assert [item.id for item in items] == [1, 1]
        assert all(inspect(item).detached for item in items)


def test_prepared_statements_and_connections_go_on_to_be_used(new_postgres_url: NewUrl) -> None:
    one = {"pool": {"size": 1, "max_overflow": 0, "timeout": 3}}
    with two_phasing(writer={"url": new_postgres_url(), **one}, warehouse={"url": new_postgres_url(), **one}) as app:
        backends = set()
        for number in range(12):
            with app.unit():
                app.add_to_each(str(number))
                backends.add(tuple(app.session(name).scalar(text("SELECT pg_backend_pid()")) for name in app.connections))
        assert len(backends) == 1
        assert len(app.names()) == len(app.names("warehouse")) == 12


# ---- pools of one ----------------------------------------------------------------------------------------------------------


LAST = {"none": "", "postgresql": "postgres_url", "mariadb": "mariadb_url", "sqlite": "sqlite_url"}


@pytest.mark.representative("postgresql-file-postgresql", "postgresql-journal-none", "postgresql-writer-mariadb")
@pytest.mark.parametrize(
    ("log", "last"),
    [
        *((log, last) for log in ("writer", "warehouse", "journal", "file") for last in LAST),
        *(("last", last) for last in LAST if last != "none"),
    ],
)
def test_a_commit_needs_no_second_connection_of_a_pool_of_one(
    log: str, last: str, new_preparing_url: NewUrl, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    one = {"pool": {"size": 1, "max_overflow": 0, "timeout": 1}}
    connections = {name: {"url": new_preparing_url(), **one} for name in ("warehouse", "writer", "journal")}
    if last != "none":
        connections["last"] = without(request.getfixturevalue(LAST[last]), **one)
    with two_phasing(f"file:{tmp_path}/decisions" if log == "file" else log, **connections) as app:
        names = [name for name in app.connections if name != "journal"]
        for number in range(2):
            with app.unit():
                app.add_to_each(f"{number}", *names)
        assert {name: app.names(name) for name in names} == {name: ["0", "1"] for name in names}
