"""Whatever fails while several databases commit, the unit is in all of them or in none; and the error that is raised is true."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import transaction
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ResourceClosedError
from sqlalchemy.orm import Session

from app_db._databases.concurrent_statements import Results, execute_together
from app_db._two_phase import decision_database
from app_db._units.manager import retryable
from app_db.errors import AbortedByRecovery, CommitUnconfirmed, DecisionFileUnusable, HookFailed, InvalidUse, OutcomeUnknown
from harness.applications import DEFER_UNIQUENESS, Item, read_lock
from harness.choosing import mostly
from harness.paths import run_python
from harness.servers import PostgresServer
from harness.two_phasing import (
    TwoPhaseApplication,
    backend_of,
    between,
    kill_backend,
    listening_to_postgres,
    two_phasing,
    without,
)

NewUrl = Callable[[], str]

SLOW_COMMIT = (
    """
    CREATE FUNCTION doze() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$
    """,
    "CREATE CONSTRAINT TRIGGER dozing AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION doze()",
)
"""On PostgreSQL: makes PREPARE, or COMMIT, take a second."""

NOTHING: dict[str, list[str]] = {"writer": [], "warehouse": [], "archive": []}


@pytest.fixture(params=mostly(["in the writer", "elsewhere", "file"], exhaustive="elsewhere"))
def app(request: pytest.FixtureRequest, new_postgres_url: NewUrl, tmp_path: Path) -> Iterator[TwoPhaseApplication]:
    """Three databases and a log: in one of them, in a fourth, in a file."""
    urls: dict[str, Any] = {name: new_postgres_url() for name in NOTHING}
    log = {"in the writer": "writer", "elsewhere": "journal", "file": f"file:{tmp_path}/decisions"}[request.param]
    if log == "journal":
        urls["journal"] = without(new_postgres_url())
    with two_phasing(log, **urls) as app:
        app.container.check()
        yield app


def add_everywhere(app: TwoPhaseApplication, item: str) -> None:
    app.add_to_each(item, *NOTHING)


def all_at_once(*acts: Callable[[], object]) -> None:
    threads = [threading.Thread(target=act) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def until(end: float, act: Callable[[str], object], thread: int, errors: list[BaseException]) -> None:
    """Do something again and again, each time with a name of its own, until then."""
    for number in count():
        if time.monotonic() > end:
            return
        try:
            act(f"{thread}-{number}")
        except BaseException as error:
            errors.append(error)


def seen(app: TwoPhaseApplication) -> dict[str, list[str]]:
    return {name: app.names(name) for name in NOTHING}


def each(*items: str) -> dict[str, list[str]]:
    return {name: sorted(items) for name in NOTHING}


# ---- refused at PREPARE ------------------------------------------------------------------------------------------------


@pytest.mark.representative("in the writer-writer", "file-archive")
@pytest.mark.parametrize("failing", NOTHING)
def test_a_deferred_constraint_leaves_nothing_anywhere(failing: str, app: TwoPhaseApplication) -> None:
    app.run(*DEFER_UNIQUENESS, on=failing)
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        add_everywhere(app, "a")
        app.add("taken", failing)

    with pytest.raises(IntegrityError, match="one_of_each") as caught:
        app.unit(attempts=3, backoff=0).run(work)
    assert len(calls) == 1
    assert getattr(caught.value.orig, "sqlstate", None) == "23505"
    assert seen(app) == {**NOTHING, failing: ["taken"]}
    assert app.leftovers() == []


def test_several_that_are_refused_raise_one_of_their_errors(app: TwoPhaseApplication) -> None:
    for name in NOTHING:
        app.run(*DEFER_UNIQUENESS, on=name)
    with pytest.raises(IntegrityError, match="one_of_each"), app.unit():
        add_everywhere(app, "taken")
    assert seen(app) == each("taken")


def test_a_serialization_failure_at_prepare_is_tried_again(app: TwoPhaseApplication) -> None:
    for name in NOTHING:
        app.run("INSERT INTO items (name) VALUES ('seed')", on=name)
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        session = app.session("warehouse")
        count = len(session.scalars(select(Item)).all())
        if len(calls) == 1:
            with app.unit("requires_new", isolation="SERIALIZABLE"):
                other = app.session("warehouse")
                assert len(other.scalars(select(Item)).all()) == 1
                other.add(Item(name="beside"))
        add_everywhere(app, f"after {count}")

    app.unit(isolation="SERIALIZABLE", attempts=3, backoff=0).run(work)
    assert len(calls) == 2
    assert app.names("warehouse") == ["after 2", "beside", "seed"]
    assert app.names("archive") == ["after 2", "seed"]


def test_a_temporary_table_keeps_a_branch_from_being_prepared_and_the_server_says_so(app: TwoPhaseApplication) -> None:
    with pytest.raises(DBAPIError, match="temporary") as caught, app.unit():
        add_everywhere(app, "a")
        app.session("archive").execute(text("CREATE TEMPORARY TABLE scratch (id integer)"))
    assert getattr(caught.value.orig, "sqlstate", None) == "0A000"
    assert seen(app) == NOTHING


# ---- refused by the last resource ----------------------------------------------------------------------------------------


def test_a_last_resource_whose_commit_is_refused_by_a_deferred_constraint_leaves_nothing(new_postgres_url: NewUrl) -> None:
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url(), old=without(new_postgres_url())) as app:
        app.run(*DEFER_UNIQUENESS, on="old")
        with pytest.raises(IntegrityError, match="one_of_each"), app.unit():
            app.add_to_each("a")
            app.add("taken", "old")
        assert app.everywhere() == {"writer": [], "warehouse": [], "old": ["taken"]}
        assert app.leftovers() == []
        assert app.decisions("old") == []


def test_a_last_resource_that_is_busy_leaves_nothing_and_is_tried_again(new_postgres_url: NewUrl, sqlite_url: str) -> None:
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url(), lite=sqlite_url) as app:
        calls: list[int] = []
        with read_lock(app, "lite"):
            app.run("SELECT 1", on="writer")

            def work() -> None:
                calls.append(1)
                app.add_to_each("a")

            with pytest.raises(OperationalError, match="locked") as caught:
                app.unit(attempts=2, backoff=0).run(work)
            assert retryable(caught.value)
            assert app.leftovers() == []
        assert len(calls) == 2
        assert app.everywhere() == {"writer": [], "warehouse": [], "lite": ["seed"]}
        with app.unit():
            app.add_to_each("b")
        assert app.everywhere() == {"writer": ["b"], "warehouse": ["b"], "lite": ["b", "seed"]}


# ---- after the commit --------------------------------------------------------------------------------------------------


def test_a_hook_that_fails_afterwards_is_told_as_such(app: TwoPhaseApplication) -> None:
    with pytest.raises(HookFailed) as caught, app.unit() as unit:
        add_everywhere(app, "a")
        unit.on_commit(lambda: 1 / 0)
    assert isinstance(caught.value.errors[0], ZeroDivisionError)
    assert seen(app) == each("a")


@pytest.mark.representative("in the writer-*")
@pytest.mark.parametrize("hook_fails", [False, True])
def test_a_database_that_does_not_confirm_is_told_once_and_the_unit_is_not_repeated(
    hook_fails: bool, app: TwoPhaseApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    backends: list[int] = []
    between(monkeypatch, 2, lambda: kill_backend(app, "archive", backends[-1]))
    monkeypatch.setattr(
        "app_db._units.branches.Branch.settle_elsewhere", lambda self, commit: False
    )  # nor when it is asked again

    def work() -> None:
        calls.append(1)
        add_everywhere(app, "a")
        backends.append(backend_of(app, "archive"))
        if hook_fails:
            app.container.unit().on_commit(lambda: 1 / 0)

    with pytest.raises(HookFailed if hook_fails else CommitUnconfirmed) as caught:
        app.unit(attempts=3, backoff=0).run(work)
    if isinstance(caught.value, HookFailed):
        assert [type(error) for error in caught.value.errors] == [CommitUnconfirmed, ZeroDivisionError]
    else:
        assert isinstance(caught.value, CommitUnconfirmed)
        assert caught.value.connections == ("archive",)
    assert len(calls) == 1
    assert seen(app) == {**each("a"), "archive": []}
    assert len(app.prepared()) == 1
    assert not app.recover().left
    assert seen(app) == each("a")


def test_a_listener_to_the_sessions_after_commit_that_fails_does_not_change_that_it_has_committed(
    app: TwoPhaseApplication,
) -> None:
    def fail(session: Session) -> None:
        raise ZeroDivisionError

    for name in NOTHING:
        with pytest.raises(HookFailed), app.unit():
            add_everywhere(app, name)
            event.listen(app.session(name), "after_commit", fail)
    assert seen(app) == each(*NOTHING)


# ---- backends that are terminated ------------------------------------------------------------------------------------


@pytest.mark.representative(
    "in the writer-before PREPARE-writer",
    "in the writer-after PREPARE-warehouse",
    "file-after COMMIT PREPARED-archive",
    "file-before the commit-writer",
)
@pytest.mark.parametrize("victim", NOTHING)
@pytest.mark.parametrize("moment", ["before the commit", "before PREPARE", "after PREPARE", "after COMMIT PREPARED"])
def test_a_connection_that_is_lost_leaves_all_or_nothing(
    moment: str, victim: str, app: TwoPhaseApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends: list[int] = []

    def kill() -> None:
        kill_backend(app, victim, backends[0])

    if moment == "before PREPARE":
        between(monkeypatch, 1, kill)
    elif moment == "after PREPARE":
        between(monkeypatch, 1, kill, after=True)
    elif moment == "after COMMIT PREPARED":
        between(monkeypatch, 2, kill, after=True)
    caught: list[BaseException] = []
    try:
        with app.unit() as unit:
            add_everywhere(app, "a")
            backends.append(backend_of(app, victim))
            if moment == "before the commit":
                unit.before_commit(kill)
    except DBAPIError as error:
        caught.append(error)
    assert all(map(retryable, caught))
    assert app.leftovers() == [], "without recovery"
    assert seen(app) == (NOTHING if caught else each("a"))
    if moment.endswith("PREPARED"):
        assert not caught
    if moment.startswith("before"):
        assert caught
    app.unit(attempts=3, backoff=0).run(add_everywhere, app, "b")  # what was lost when it was idle is found out by its next user
    assert seen(app) == each(*([] if caught else ["a"]), "b")


@pytest.mark.parametrize("log", ["writer", "journal"])
def test_a_log_that_is_lost_at_the_decision_is_asked_what_became_of_it(
    log: str, new_postgres_url: NewUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls: dict[str, Any] = {name: new_postgres_url() for name in ("writer", "warehouse", "archive")}
    with two_phasing(log, **urls, **({"journal": without(new_postgres_url())} if log == "journal" else {})) as app:
        app.container.check()

        def lose_log() -> None:
            app.run(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid()",
                on=log,
            )

        between(monkeypatch, 1, lose_log, after=True)
        caught: list[BaseException] = []
        try:
            with app.unit():
                add_everywhere(app, "a")
        except OperationalError as error:
            caught.append(error)
        assert bool(caught) == (log == "writer"), "a lost last resource has not committed; a log is asked again"
        assert all(map(retryable, caught))
        assert seen(app) == (NOTHING if caught else each("a"))
        assert app.leftovers() == []


# ---- recovery that comes between --------------------------------------------------------------------------------------


def test_a_recovery_between_prepare_and_decision_aborts_the_unit_which_can_be_repeated(
    app: TwoPhaseApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    recover_before_the_decision(app, monkeypatch)
    with pytest.raises(AbortedByRecovery) as caught, app.unit():
        add_everywhere(app, "a")
    assert retryable(caught.value)
    assert seen(app) == NOTHING
    assert app.leftovers() == []
    monkeypatch.undo()
    with app.unit():
        add_everywhere(app, "b")
    assert seen(app) == each("b")


def recover_before_the_decision(app: TwoPhaseApplication, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have recovery come when the branches are prepared.

    Where the decision is a row of the last resource's, that is said while they are prepared: here it is said afterwards.
    """
    if not app.container.core.decision_logs().are_in("writer"):
        between(monkeypatch, 1, app.recover, after=True)
        return

    def in_two_steps(lines: Any, **options: Any) -> Any:
        if not any(statement.startswith("INSERT") for _, said in lines.values() for statement in said):
            return execute_together(lines, **options)
        first = {key: line for key, line in lines.items() if not line[1][0].startswith("INSERT")}
        answers = execute_together(first, **options)
        app.recover()
        others = execute_together({key: line for key, line in lines.items() if key not in first}, **options)
        return type(answers)({**answers.answers, **others.answers}, answers.interruption or others.interruption)

    monkeypatch.setattr("app_db._units.commit.execute_together", in_two_steps)


def test_a_unit_that_recovery_has_aborted_succeeds_when_it_is_tried_again(
    app: TwoPhaseApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        monkeypatch.undo()
        if len(calls) == 1:
            recover_before_the_decision(app, monkeypatch)
        add_everywhere(app, "a")

    app.unit(attempts=3, backoff=0).run(work)
    assert len(calls) == 2
    assert seen(app) == each("a")


def test_a_recovery_between_the_row_of_the_last_resource_and_its_commit_lets_it_be_or_aborts_it(
    new_postgres_url: NewUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery waits for the row, and gives up after a while: the unit is not settled over its committer's head."""
    with two_phasing(writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.container.check()
        monkeypatch.setattr(app.container.core.decision_logs().of("writer"), "_lock_wait", 0.3)
        found: list[Any] = []
        between(monkeypatch, 1, lambda: found.append(app.recover()), after=True)
        with app.unit():
            app.add_to_each("a")
        assert found[0].left
        assert found[0].units[0].verdict is None
        assert "app_db_decisions" in found[0].units[0].reason
        assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"]}


def test_a_recovery_after_the_decision_finishes_what_the_committer_finds_finished(
    app: TwoPhaseApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    between(monkeypatch, 2, app.recover)
    with app.unit():
        add_everywhere(app, "a")
    assert seen(app) == each("a")


# ---- logs that can't be reached ----------------------------------------------------------------------------------------


def test_a_log_that_could_never_be_reached_gives_its_own_error_before_anything_is_prepared(
    new_postgres_url: NewUrl, postgres: PostgresServer
) -> None:
    urls: dict[str, Any] = {name: new_postgres_url() for name in NOTHING}
    with two_phasing("journal", **urls, journal=without(new_postgres_url())) as app:
        app.override_engine("journal", create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing"))
        with listening_to_postgres(postgres, app, *NOTHING) as heard, pytest.raises(OperationalError), app.unit():
            add_everywhere(app, "a")
        assert "PREPARE TRANSACTION" not in [word for _, word in heard()]
        assert seen(app) == NOTHING
        with app.unit():
            app.add("alone", "warehouse")  # needs no decision, and so no log
        assert app.names("warehouse") == ["alone"]


def test_a_log_that_goes_away_in_the_middle_leaves_the_outcome_to_recovery_and_says_so(
    new_postgres_url: NewUrl, new_postgres: Callable[..., PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_postgres()
    server.create_database("journal")
    urls: dict[str, Any] = {name: new_postgres_url() for name in NOTHING}
    with two_phasing("journal", **urls, journal=without(server.url("journal"))) as app:
        with app.unit():
            add_everywhere(app, "a")
        between(monkeypatch, 1, lambda: server.stop("immediate"), after=True)
        with pytest.raises(OutcomeUnknown) as caught, app.unit():
            add_everywhere(app, "b")
        assert caught.value.prepared == ("archive", "warehouse", "writer")
        assert not retryable(caught.value)
        assert isinstance(caught.value.__cause__, DBAPIError)
        assert app.checked_out() == 0
        server.start()
        assert len(app.prepared()) == 3
        assert not app.recover().left
        assert seen(app) == each("a")


def test_a_last_resource_that_can_keep_no_decisions_is_good_for_units_that_need_none(
    new_postgres_url: NewUrl, sqlite_url: str
) -> None:
    with two_phasing(writer=new_postgres_url(), lite=sqlite_url) as app:
        app.run("CREATE VIEW app_db_decisions AS SELECT 1 AS one", on="lite")
        with app.unit():
            app.add("alone", "lite")
        with pytest.raises(DBAPIError), app.unit():
            app.add_to_each("both")
        assert app.everywhere() == {"writer": [], "lite": ["alone"]}


def test_a_log_that_is_replaced_after_a_branch_was_named_by_it_is_no_place_for_a_decision(
    new_mariadb_url: NewUrl, new_postgres_url: NewUrl
) -> None:
    """Whoever finds the branch would ask the one that it is named by."""
    urls = {name: new_mariadb_url() for name in ("writer", "warehouse")}
    another = create_engine(new_postgres_url())
    with two_phasing("journal", **urls, journal=without(new_postgres_url())) as app:
        with pytest.raises(InvalidUse, match="log was replaced"), app.unit():
            app.add_to_each("a", *urls)
            app.override_engine("journal", another)
        assert app.names("writer") == app.names("warehouse") == []
        with app.unit():
            app.add_to_each("b", *urls)
        assert app.names("writer") == app.names("warehouse") == ["b"]
    another.dispose()


# ---- a decision file that can't be used ---------------------------------------------------------------------------------


def move_away(path: Path, log: Any) -> Callable[[], object]:
    kept = path.rename(path.with_name("kept"))
    return lambda: kept.rename(path)


def forbid_writing(path: Path, log: Any) -> Callable[[], object]:
    log._database._connection.execute("PRAGMA query_only = ON")
    return lambda: log._database._connection.execute("PRAGMA query_only = OFF")


def block(path: Path, log: Any) -> Callable[[], object]:
    log._lock_wait = 0.2
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other.close


@pytest.mark.parametrize("harm", [move_away, forbid_writing, block])
def test_a_unit_whose_decision_file_can_not_be_used_leaves_nothing_prepared(
    harm: Callable[[Path, Any], Callable[[], object]], new_postgres_url: NewUrl, tmp_path: Path
) -> None:
    path = tmp_path / "decisions"
    with two_phasing(f"file:{path}", writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.container.check()
        put_right = harm(path, app.container.core.decision_logs().configured)
        with pytest.raises(DecisionFileUnusable), app.unit():
            app.add_to_each("lost")
        assert app.prepared() == []
        put_right()
        with app.unit():
            app.add_to_each("a")
        assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"]}


def test_a_unit_whose_decision_file_is_moved_while_it_decides_stays_prepared_until_it_can_be_read(
    new_postgres_url: NewUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = tmp_path / "decisions", tmp_path / "kept"
    with two_phasing(f"file:{path}", writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.container.check()
        real = decision_database.DecisionDatabase._execute

        def move(database: Any, statement: str, give_up: float) -> list[Any]:
            if statement == "COMMIT":
                path.rename(kept)
            return real(database, statement, give_up)

        with monkeypatch.context() as patched:
            patched.setattr(decision_database.DecisionDatabase, "_execute", move)
            with pytest.raises(OutcomeUnknown, match=r"recover` can read the decision") as caught, app.unit():
                app.add_to_each("a")
        assert caught.value.prepared == ("warehouse", "writer")
        assert len(app.prepared()) == 2
        assert app.recover().left
        kept.rename(path)
        assert not app.recover().left
        assert app.everywhere() == {"writer": ["a"], "warehouse": ["a"]}


# ---- pools of one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", ["writer", "file"])
def test_a_branch_that_is_asked_again_needs_no_second_connection_of_a_pool_of_one(
    log: str, new_postgres_url: NewUrl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = {"pool": {"size": 1, "max_overflow": 0, "timeout": 1}}
    urls = {name: {"url": new_postgres_url(), **one} for name in NOTHING}
    with two_phasing("writer" if log == "writer" else f"file:{tmp_path}/decisions", **urls) as app:
        app.container.check()
        backends: list[int] = []
        between(monkeypatch, 2, lambda: kill_backend(app, "archive", backends[0]))
        with app.unit():
            add_everywhere(app, "a")
            backends.append(backend_of(app, "archive"))
        assert seen(app) == each("a")


def test_a_last_resource_that_is_lost_at_its_commit_is_asked_although_its_pool_has_one_connection(
    new_postgres_url: NewUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"pool": {"size": 1, "max_overflow": 0, "timeout": 1}}
    with two_phasing(**{name: {"url": new_postgres_url(), **one} for name in NOTHING}) as app:
        app.container.check()
        backends: list[int] = []
        between(monkeypatch, 1, lambda: kill_backend(app, "writer", backends[0]), after=True)
        with pytest.raises(OperationalError) as caught, app.unit():
            add_everywhere(app, "a")
            backends.append(backend_of(app, "writer"))
        assert retryable(caught.value)
        assert seen(app) == NOTHING


# ---- MariaDB -------------------------------------------------------------------------------------------------------------


def test_on_mariadb_a_deadlock_victim_is_rolled_back_and_its_connection_kept(new_mariadb_url: NewUrl) -> None:
    with two_phasing(writer=new_mariadb_url(), warehouse=new_mariadb_url()) as app:
        app.run("INSERT INTO items (name) VALUES ('one'), ('two')")
        pids: list[int] = []
        met = threading.Barrier(2, timeout=20)

        def lock(first: int, second: int) -> None:
            with app.unit():
                pids.append(backend_of(app, "writer"))
                app.add(f"{first}", "warehouse")
                app.session().execute(text(f"UPDATE items SET name = CONCAT(name, '!') WHERE id = {first}"))
                met.wait()
                app.session().execute(text(f"UPDATE items SET name = CONCAT(name, '!') WHERE id = {second}"))

        errors: list[BaseException] = []

        def locking(first: int, second: int) -> None:
            try:
                lock(first, second)
            except DBAPIError as error:
                errors.append(error)

        all_at_once(partial(locking, 1, 2), partial(locking, 2, 1))
        assert len(errors) == 1
        assert retryable(errors[0])
        assert app.names("writer") == ["one!", "two!"]
        assert len(app.names("warehouse")) == 1
        assert set(pids) <= connection_ids(app)


def connection_ids(app: TwoPhaseApplication) -> set[int]:
    with app.plain_engine("writer").connect() as connection:
        return set(connection.exec_driver_sql("SELECT id FROM information_schema.processlist").scalars())


@pytest.mark.representative("writer-after COMMIT", "file-after PREPARE")
@pytest.mark.parametrize("moment", ["before PREPARE", "after PREPARE", "after COMMIT"])
@pytest.mark.parametrize("log", ["writer", "archive", "file"])
def test_on_mariadb_a_connection_that_is_lost_leaves_all_or_nothing(
    moment: str, log: str, new_mariadb_url: NewUrl, postgres_url: str, *, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    urls = {"writer": new_mariadb_url(), "warehouse": new_mariadb_url(), "archive": postgres_url}
    with two_phasing(f"file:{tmp_path}/decisions" if log == "file" else log, **urls) as app:
        app.container.check()
        backends: list[int] = []
        number = 2 if moment == "after COMMIT" else 1
        between(monkeypatch, number, lambda: kill_backend(app, "warehouse", backends[0]), after=moment.startswith("after"))
        caught: list[BaseException] = []
        try:
            with app.unit():
                add_everywhere(app, "a")
                backends.append(backend_of(app, "warehouse"))
        except OperationalError as error:
            caught.append(error)
        assert bool(caught) == (moment == "before PREPARE")
        assert all(map(retryable, caught))
        app.recover()
        assert app.leftovers() == []
        assert seen(app) == (NOTHING if caught else each("a"))


# ---- interruptions -------------------------------------------------------------------------------------------------------


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Press Ctrl-C once, some time from now."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.representative("in the writer")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_at_any_moment_leaves_all_or_nothing(app: TwoPhaseApplication) -> None:
    chance = random.Random(5)
    started = time.monotonic()
    for number in range(5):
        with app.unit():
            add_everywhere(app, f"warm {number}")
    usual = (time.monotonic() - started) / 5
    interrupted = 0
    known = {f"warm {number}" for number in range(5)}
    for number in range(60):
        returned = False
        try:
            with interrupted_after(chance.uniform(0, 1.3 * usual)):
                with app.unit():
                    add_everywhere(app, f"{number}")
                returned = True
                time.sleep(2 * usual + 0.02)  # until it comes
        except (KeyboardInterrupt, ResourceClosedError) as error:
            # SQLAlchemy's own, if the interruption landed when a flush had closed its transaction and had not returned.
            if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
                raise
            interrupted += 1
        if returned:
            known.add(f"{number}")
    assert interrupted > 50, "Python itself swallows one that comes in a destructor"
    assert app.checked_out() == 0
    assert not app.recover().left
    names = seen(app)
    assert names["writer"] == names["warehouse"] == names["archive"]
    assert known <= set(names["writer"])


@pytest.mark.representative("in the writer-writer", "file-archive")
@pytest.mark.parametrize("slow", NOTHING)
def test_an_interruption_while_a_database_takes_its_time_to_prepare_leaves_all_or_nothing(
    slow: str, app: TwoPhaseApplication
) -> None:
    with app.unit():
        add_everywhere(app, "connected")  # so that the interruption finds no driver that connects, which would lose its socket
    app.run(*SLOW_COMMIT, on=slow)
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.4), app.unit():
        add_everywhere(app, "a")
    assert app.checked_out() == 0
    deadline = time.monotonic() + 5
    while app.open() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not app.recover().left
    names = seen(app)
    assert names["writer"] == names["warehouse"] == names["archive"]


def test_an_interruption_after_the_decision_is_raised_when_all_have_committed(
    app: TwoPhaseApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(lines: Any, **options: Any) -> Any:
        if not any(said[0].startswith("COMMIT PREPARED") for _, said in lines.values()):
            return execute_together(lines, **options)
        return Results(execute_together(lines, **options).answers, KeyboardInterrupt())

    monkeypatch.setattr("app_db._units.commit.execute_together", interrupted)
    with pytest.raises(KeyboardInterrupt), app.unit():
        add_everywhere(app, "a")
    assert seen(app) == each("a")


# ---- zope's own manager ------------------------------------------------------------------------------------------------


class Voter:
    """Another data manager, which refuses at some point."""

    def __init__(self, fails_at: str = "", key: str = "another") -> None:
        self.transaction_manager = transaction.manager
        self._fails_at = fails_at
        self._key = key
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._fails_at:
            raise ZeroDivisionError(name)

    def sortKey(self) -> str:
        return self._key

    def tpc_begin(self, transaction: object) -> None:
        self._call("tpc_begin")

    def commit(self, transaction: object) -> None:
        self._call("commit")

    def tpc_vote(self, transaction: object) -> None:
        self._call("tpc_vote")

    def tpc_finish(self, transaction: object) -> None:
        self._call("tpc_finish")

    def tpc_abort(self, transaction: object) -> None:
        self.calls.append("tpc_abort")

    def abort(self, transaction: object) -> None:
        self.calls.append("abort")


@pytest.fixture
def with_zope(app: TwoPhaseApplication) -> Iterator[TwoPhaseApplication]:
    app.container.transaction_manager.override(transaction.manager)
    app.container.reset_singletons()
    transaction.manager.begin()
    yield app
    transaction.manager.abort()


def test_zopes_own_commit_commits_all(with_zope: TwoPhaseApplication) -> None:
    add_everywhere(with_zope, "a")
    transaction.commit()
    assert seen(with_zope) == each("a")
    assert with_zope.leftovers() == []


def test_another_data_manager_that_votes_no_does_so_before_anything_is_prepared(
    with_zope: TwoPhaseApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges = between(monkeypatch, 0, lambda: None)
    add_everywhere(with_zope, "a")
    transaction.get().join(Voter("tpc_vote"))
    with pytest.raises(ZeroDivisionError):
        transaction.commit()
    assert exchanges == []
    transaction.abort()
    assert seen(with_zope) == NOTHING


def test_another_data_manager_that_fails_to_finish_does_not_undo_what_has_committed(with_zope: TwoPhaseApplication) -> None:
    add_everywhere(with_zope, "a")
    transaction.get().join(Voter("tpc_finish"))
    with pytest.raises(ZeroDivisionError):
        transaction.commit()
    transaction.abort()
    assert seen(with_zope) == each("a")
    assert with_zope.leftovers() == []


def test_another_data_manager_hears_when_the_databases_refuse(with_zope: TwoPhaseApplication) -> None:
    with_zope.run(*DEFER_UNIQUENESS, on="archive")
    voter = Voter()
    add_everywhere(with_zope, "taken")
    transaction.get().join(voter)
    with pytest.raises(IntegrityError):
        transaction.commit()
    transaction.abort()
    assert "tpc_finish" not in voter.calls
    assert "tpc_abort" in voter.calls
    assert seen(with_zope) == {**NOTHING, "archive": ["taken"]}


# ---- processes -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import logging, os
from harness.two_phasing import two_phasing
from sqlalchemy.exc import IntegrityError
with two_phasing({log!r}, **{urls!r}) as app:
    assert_ = lambda fact: fact or os._exit(7)
    with app.unit():
        app.add_to_each("a")
    {fork}
    try:
        with app.unit():
            app.add_to_each("b")
            app.add("a", "warehouse")
    except IntegrityError:
        pass
    else:
        os._exit(8)
    with app.unit():
        app.add_to_each("c" if {forks!r} is False else f"c {{os.getpid()}}")
    if {forks!r} and pid == 0:
        os._exit(0)
    if {forks!r}:
        assert_(os.waitpid(pid, 0)[1] == 0)
"""


@pytest.mark.representative("-O")
@pytest.mark.parametrize("how", ["-O", "fork"])
def test_it_is_the_same_without_assertions_and_in_forked_children(
    how: str, new_postgres_url: NewUrl, new_mariadb_url: NewUrl, tmp_path: Path
) -> None:
    urls = {"writer": new_postgres_url(), "warehouse": new_postgres_url(), "archive": new_mariadb_url()}
    log = f"file:{tmp_path}/decisions" if how == "fork" else "writer"
    program = PROGRAM.format(log=log, urls=urls, forks=how == "fork", fork="pid = os.fork()" if how == "fork" else "")
    options = ["-O"] if how == "-O" else []
    run_python(*options, "-W", "ignore::DeprecationWarning", "-c", program)
    with two_phasing(log, **urls) as app:
        names = [app.names(name) for name in NOTHING]
        assert names[0] == names[1] == names[2]
        assert len(names[0]) == (3 if how == "fork" else 2)


# ---- many at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_many_units_at_once_on_two_clusters_are_all_or_nothing(
    new_postgres_url: NewUrl, new_postgres: Callable[..., PostgresServer]
) -> None:
    other = new_postgres()
    other.create_database("other")
    big = {"pool": {"size": 16, "max_overflow": 4}}
    with two_phasing(writer={"url": new_postgres_url(), **big}, warehouse={"url": other.url("other"), **big}) as app:
        app.run(*DEFER_UNIQUENESS, on="warehouse")
        committed: list[str] = []
        refused: list[str] = []

        def work(thread: int) -> None:
            chance = random.Random(thread)
            for number in range(100):
                item = f"{thread}-{number}"
                try:
                    with app.unit():
                        app.add(item, "writer")
                        app.add("taken" if chance.random() < 0.1 else item, "warehouse")
                except IntegrityError:
                    refused.append(item)
                else:
                    committed.append(item)

        all_at_once(*(partial(work, number) for number in range(16)))
        assert len(committed) + len(refused) == 1600
        assert refused
        assert app.names("writer") == sorted(committed)
        assert app.names("warehouse") == sorted([*committed, "taken"])
        assert app.leftovers() == []
        assert len(app.decisions()) < 400, "most have been forgotten by now"
        app.container.core.decision_logs().forget_acknowledged()
        assert app.decisions() == []


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
@pytest.mark.parametrize("log", ["writer", "journal", "file", "lite"])
def test_recoveries_without_any_grace_never_roll_back_what_has_committed(
    log: str, new_postgres_url: NewUrl, tmp_path: Path, sqlite_url: str
) -> None:
    urls: dict[str, Any] = {name: new_postgres_url() for name in ("writer", "warehouse")}
    if log == "journal":
        urls["journal"] = without(new_postgres_url())
    if log == "lite":
        urls["lite"] = sqlite_url
    chosen = {"file": f"file:{tmp_path}/decisions", "lite": "writer"}.get(log, log)
    taking_part = [name for name in urls if name != "journal"]
    with two_phasing(chosen, **urls) as app:
        app.container.check()
        committed: list[str] = []
        unexpected: list[BaseException] = []

        def commit(item: str) -> None:
            try:
                with app.unit():
                    app.add_to_each(item, *taking_part)
            except (AbortedByRecovery, OperationalError):
                return
            except CommitUnconfirmed:
                pass
            committed.append(item)

        def recover(item: str) -> None:
            app.recover()

        acts = [commit, commit, commit, commit, recover, recover]
        all_at_once(*(partial(until, time.monotonic() + 4, act, thread, unexpected) for thread, act in enumerate(acts)))
        app.recover()
        assert unexpected == []
        for name in taking_part:
            assert app.names(name) == sorted(committed)
        assert committed
