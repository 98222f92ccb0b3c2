"""Several connections: together where their databases can undo DDL, and one by one, with an account, where they can't."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from app_db import DatabaseContainer, errors
from app_db.migrations import Migrated, Step, current, downgrade, upgrade
from harness.crashing import Steps
from harness.migrated import Child, Project, at_once

NewUrl = Callable[[], str]

FAIL = "op.execute('SELECT * FROM nowhere')"


@pytest.fixture(params=["sqlite", "postgres"])
def new_transactional_url(request: pytest.FixtureRequest) -> NewUrl:
    found: NewUrl = request.getfixturevalue(f"new_{request.param}_url")
    return found


# ---- together ------------------------------------------------------------------------------------------------------------


def test_a_failure_in_the_second_leaves_the_first_unchanged(tmp_path: Path, new_transactional_url: NewUrl) -> None:
    with Project(tmp_path, first=new_transactional_url(), second=new_transactional_url()) as project:
        project.write_three("first")
        project.write("second", "x", create="made")
        project.write("second", "y", FAIL, down="x")
        with pytest.raises(errors.MigrationFailed, match=r"'y' of 'second' failed: .*nowhere") as caught:
            upgrade(project.container)
        assert caught.value.account == errors.MigrationAccount({}, ["first", "second"], [])
        assert "Nothing was changed" in str(caught.value)
        assert project.all_tables("first") == project.all_tables("second") == set()
        project.write("second", "y", down="x")
        assert [each.after for each in upgrade(project.container)] == ["c", "y"]


def merged(project: Project, name: str, upgrade: str = "pass") -> None:
    """Write two revisions after one, and one that merges them."""
    for revision, down in (("a", None), ("b", "a"), ("c", "a")):
        project.write(name, revision, down=down, create=f"table_{revision}")
    file = project.write(name, "m", upgrade)
    file.write_text(file.read_text().replace("down_revision = None", "down_revision = ('b', 'c')"))


def test_databases_of_two_kinds_are_one(tmp_path: Path, postgres_url: str, sqlite_url: str) -> None:
    with Project(tmp_path, first=postgres_url, second=sqlite_url) as project:
        project.write_three("first")
        project.write("second", "x", FAIL)
        with pytest.raises(errors.MigrationFailed, match="'x' of 'second'"):
            upgrade(project.container)
        assert project.all_tables("first") == project.all_tables("second") == set()


def test_a_commit_that_fails_says_what_was_committed(tmp_path: Path, new_postgres_url: NewUrl) -> None:
    deferred = """
op.execute("CREATE TABLE one (id integer PRIMARY KEY, other integer REFERENCES one DEFERRABLE INITIALLY DEFERRED)")
op.execute("INSERT INTO one VALUES (1, 2)")
"""
    with Project(tmp_path, a=new_postgres_url(), b=new_postgres_url(), c=new_postgres_url()) as project:
        project.write_three("a")
        project.write("b", "x", deferred)
        project.write_three("c")
        with pytest.raises(
            errors.MigrationFailed, match="The COMMIT of the migrations of 'b' failed: ForeignKeyViolation"
        ) as caught:
            upgrade(project.container)
        assert caught.value.account == errors.MigrationAccount({"a": ["a", "b", "c"]}, ["b", "c"], [])
        assert (project.tables("b"), project.tables("c")) == (set(), set())
        assert len(project.tables("a")) == 3


@pytest.mark.representative("sqlite", "postgresql")
def test_two_connections_to_one_database_share_a_transaction(tmp_path: Path, database_url: str) -> None:
    """Two transactions would wait for each other's locks without an end: the second refers to a table that the first has made."""
    with Project(tmp_path, first=database_url, second=database_url) as project:
        project.write("first", "a", create="parents")
        project.write(
            "second",
            "x",
            "op.create_table('children', sa.Column('id', sa.Integer, sa.ForeignKey('parents.id'), primary_key=True))",
            "op.drop_table('children')",
        )
        assert [each.after for each in upgrade(project.container)] == ["a", "x"]
        assert project.tables("first") == {"parents", "children"}
        downgrade(project.container, "base", connections=["second"])
        downgrade(project.container, "base", connections=["first"])
        assert project.tables("first") == set()


def test_connections_with_two_urls_of_one_database_do_not_wait_for_each_other(tmp_path: Path, postgres_url: str) -> None:
    """As of two users: they can't share a transaction, so the first commits before the second begins."""
    given = {"url": f"{postgres_url}?application_name=other", "statement_timeout": 2}
    with Project(tmp_path, first=postgres_url, second=given) as project:
        project.write("first", "a", create="parents")
        upgrade(project.container)
        project.write("first", "b", "op.add_column('parents', sa.Column('name', sa.String))", down="a")
        refers = "op.create_table('children', sa.Column('id', sa.Integer, sa.ForeignKey('parents.id'), primary_key=True))"
        project.write("second", "x", f"{refers}\n{FAIL}")
        with pytest.raises(errors.MigrationFailed, match="'x' of 'second' failed: UndefinedTable") as caught:
            upgrade(project.container)
        assert caught.value.account == errors.MigrationAccount({"first": ["b"]}, ["second"], [])
        project.write("second", "x", refers)
        assert [each.after for each in upgrade(project.container)] == ["b", "x"]


@pytest.mark.representative("postgresql")
def test_processes_with_several_connections_wait_for_each_other(tmp_path: Path, new_database_url: NewUrl) -> None:
    with Project(tmp_path, first=new_database_url(), second=new_database_url()) as project:
        project.write_three("first")
        project.write_three("second")

        def work(container: DatabaseContainer) -> object:
            return upgrade(container, directory=project.folder)

        reports = at_once(project, 3, work)
        assert [report for report in reports if "error" in report] == []
        assert [each.pending for each in current(project.container)] == [(), ()]


def test_locks_are_taken_in_one_order_whatever_the_order_of_the_names(tmp_path: Path, new_postgres_url: NewUrl) -> None:
    """Otherwise two processes could each hold what the other one waits for."""
    with Project(tmp_path, first=new_postgres_url(), second=new_postgres_url()) as project:
        taken: list[str] = []
        for name in ("first", "second"):
            project.write_three(name)

            def note(*arguments: Any, name: str = name) -> None:
                if "advisory" in arguments[2]:
                    taken.append(name)

            event.listen(project.container.providers[f"{name}_engine"](), "before_cursor_execute", note)
        done = upgrade(project.container, connections=["second", "first"])
        assert [each.connection for each in done] == ["second", "first"]
        assert taken == ["first", "second"]


# ---- one by one ----------------------------------------------------------------------------------------------------------


def test_mariadb_comes_after_what_can_be_rolled_back_and_the_account_says_what_is_there(
    tmp_path: Path, new_mariadb_url: NewUrl, postgres_url: str
) -> None:
    with Project(tmp_path, a=new_mariadb_url(), b=new_mariadb_url(), c=postgres_url) as project:
        project.write("a", "x", create="made")
        project.write("a", "y", f"op.execute('CREATE TABLE half (id INTEGER)')\n{FAIL}", down="x")
        project.write_three("b")
        project.write("c", "p", create="made")
        steps: list[Step] = []
        with pytest.raises(errors.MigrationFailed, match="'y' of 'a' failed") as caught:
            upgrade(project.container, on_step=steps.append)
        assert caught.value.account == errors.MigrationAccount({"c": ["p"], "a": ["x"]}, [], ["b"], is_partial=True)
        assert "a part of it may have stayed" in str(caught.value)
        assert "`app-db stamp --connection a y`" in str(caught.value)
        assert "`app-db migrate --check`" in str(caught.value)
        assert [(step.connection, step.revision) for step in steps] == [("c", "p"), ("a", "x")]
        assert (project.tables("a"), project.revision_in("a")) == ({"made", "half"}, ["x"])
        assert project.tables("b") == set()
        assert project.tables("c") == {"made"}


def test_a_merge_that_failed_is_run_by_the_next_process(tmp_path: Path, mariadb_url: str) -> None:
    """The database is at both of the merged revisions meanwhile."""
    with Project(tmp_path, writer=mariadb_url) as project:
        merged(project, "writer", FAIL)
        with pytest.raises(errors.MigrationFailed, match="'m' of 'writer' failed"):
            upgrade(project.container)
        [found] = current(project.container)
        assert (found.revision, found.pending) == ("b, c", ("m",))
        merged(project, "writer")
        assert upgrade(project.container) == (Migrated("writer", "b, c", "m", ("m",)),)


def test_an_interruption_says_what_may_have_stayed(tmp_path: Path, mariadb_url: str) -> None:
    with Project(tmp_path, writer=mariadb_url) as project:
        project.write("writer", "x", "op.execute('CREATE TABLE half (id INTEGER)')\nraise KeyboardInterrupt")
        with pytest.raises(KeyboardInterrupt) as caught:
            upgrade(project.container)
        [note] = caught.value.__notes__
        assert note.startswith(
            "The revision 'x' of 'writer' failed: it was interrupted. Not all statements of 'x' can be rolled back"
        )
        assert project.tables("writer") == {"half"}


def test_a_failure_in_what_can_be_rolled_back_leaves_mariadb_unchanged(
    tmp_path: Path, mariadb_url: str, postgres_url: str
) -> None:
    with Project(tmp_path, a=mariadb_url, c=postgres_url) as project:
        project.write_three("a")
        project.write("c", "p", FAIL)
        with pytest.raises(errors.MigrationFailed, match=r"Not begun: 'a'\. Nothing was changed"):
            upgrade(project.container)
        assert project.all_tables("a") == project.all_tables("c") == set()


# ---- autocommit blocks ---------------------------------------------------------------------------------------------------

INDEX = """
op.execute("INSERT INTO table_a VALUES (1)")
with op.get_context().autocommit_block():
    op.execute("CREATE INDEX CONCURRENTLY by_id ON table_a (id)")
op.execute("INSERT INTO table_a VALUES (2)")
"""

DROP_INDEX = """
with op.get_context().autocommit_block():
    op.execute("DROP INDEX CONCURRENTLY by_id")
op.execute("DELETE FROM table_a")
"""


def indexes(project: Project, name: str) -> set[str]:
    with project.container.providers[f"{name}_engine"]().connect() as connection:
        return {*connection.execute(text("SELECT indexname FROM pg_indexes WHERE indexname = 'by_id'")).scalars()}


@pytest.mark.timeout(60)
def test_an_index_is_made_concurrently(tmp_path: Path, postgres_url: str) -> None:
    with Project(tmp_path, writer=postgres_url) as project:
        project.write_three("writer")
        project.write("writer", "d", INDEX, DROP_INDEX, down="c")
        assert upgrade(project.container)[0].revisions == ("a", "b", "c", "d")
        assert indexes(project, "writer") == {"by_id"}
        downgrade(project.container, "c")
        assert indexes(project, "writer") == set()


def test_a_pool_without_a_second_connection_for_the_lock_is_told(tmp_path: Path, postgres_url: str) -> None:
    with Project(tmp_path, writer={"url": postgres_url, "pool": {"size": 1, "max_overflow": 0}}) as project:
        project.write_three("writer")
        project.write("writer", "d", INDEX, DROP_INDEX, down="c")
        with pytest.raises(errors.UnusableMigrations, match=r"needs a second connection.*Raise POOL__SIZE or POOL__MAX_OVERFLOW"):
            upgrade(project.container)
        assert project.all_tables("writer") == set()
        assert upgrade(project.container, "c")[0].after == "c"


@pytest.mark.timeout(60)
def test_processes_that_wait_for_the_lock_do_not_hinder_it(tmp_path: Path, postgres_url: str) -> None:
    with Project(tmp_path, writer=postgres_url) as project:
        project.write_three("writer")
        project.write("writer", "d", INDEX, DROP_INDEX, down="c")

        def work(container: DatabaseContainer) -> object:
            return upgrade(container, directory=project.folder)

        reports = at_once(project, 5, work)
        assert [report for report in reports if "error" in report] == []
        assert indexes(project, "writer") == {"by_id"}


@pytest.mark.exhaustive
def test_a_failure_after_an_autocommit_block_says_that_a_part_has_stayed(tmp_path: Path, new_postgres_url: NewUrl) -> None:
    with Project(tmp_path, first=new_postgres_url(), second=new_postgres_url()) as project:
        project.write_three("first")
        project.write("first", "d", INDEX + FAIL, down="c")
        project.write_three("second")
        with pytest.raises(errors.MigrationFailed, match="'d' of 'first' failed") as caught:
            upgrade(project.container)
        committed = {"second": ["a", "b", "c"], "first": ["a", "b", "c"]}
        assert caught.value.account == errors.MigrationAccount(committed, [], [], is_partial=True)
        assert project.revision_in("first") == ["c"]
        assert indexes(project, "first") == {"by_id"}


@pytest.mark.exhaustive
def test_a_hidden_autocommit_block_is_refused_and_may_be_announced(tmp_path: Path, postgres_url: str) -> None:
    usual, other = "op.get_context().autocommit_block()", "getattr(op.get_context(), 'autocommit' + '_block')()"
    hidden, undo = INDEX.replace(usual, other), DROP_INDEX.replace(usual, other)
    with Project(tmp_path, writer=postgres_url) as project:
        project.write_three("writer")
        project.write("writer", "d", hidden, undo, down="c")
        with pytest.raises(errors.MigrationFailed, match=r"Write `autocommit = True` into the file\..*Nothing was changed"):
            upgrade(project.container)
        project.write("writer", "d", hidden, undo, down="c", more="autocommit = True")
        assert upgrade(project.container)[0].after == "d"


def test_sqlite_refuses_an_autocommit_block(tmp_path: Path, sqlite_url: str) -> None:
    with Project(tmp_path, writer=sqlite_url) as project:
        project.write("writer", "a", "with op.get_context().autocommit_block():\n    op.execute('VACUUM')")
        with pytest.raises(errors.UnusableMigrations, match="'a' has an autocommit_block"):
            upgrade(project.container)
        assert project.all_tables("writer") == set()


def test_mariadb_has_autocommit_blocks_too(tmp_path: Path, mariadb_url: str) -> None:
    block = "with op.get_context().autocommit_block():\n    op.execute('CREATE TABLE made (id INTEGER)')"
    with Project(tmp_path, writer=mariadb_url) as project:
        project.write("writer", "a", block)
        assert upgrade(project.container)[0].after == "a"
        assert project.tables("writer") == {"made"}


# ---- two-phase -----------------------------------------------------------------------------------------------------------


def die_before_second_commit(container: DatabaseContainer) -> None:
    """Have this process die when the first of its databases has committed."""

    @event.listens_for(container.second_engine(), "commit")
    def die(connection: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.exhaustive
def test_without_two_phase_a_kill_between_the_commits_is_made_good_by_the_next_process(
    tmp_path: Path, new_postgres_url: NewUrl
) -> None:
    with Project(tmp_path, first=new_postgres_url(), second=new_postgres_url()) as project:
        project.write_three("first")
        project.write_three("second")

        def work(container: DatabaseContainer) -> object:
            die_before_second_commit(container)
            return upgrade(container, directory=project.folder)

        assert Child(project, work).result() == {}
        assert [each.revision for each in current(project.container)] == ["c", None]
        assert [each.revisions for each in upgrade(project.container)] == [(), ("a", "b", "c")]


@pytest.fixture
def prepared(tmp_path: Path, new_postgres_url: NewUrl) -> Iterator[Project]:
    """Two databases whose connections are two-phase, with three revisions each."""
    given = {name: {"url": new_postgres_url(), "two_phase": True} for name in ("first", "second")}
    with Project(tmp_path, **given) as project:
        project.write_three("first")
        project.write_three("second")
        yield project
        project.container.recovery().settle(grace=0)


def test_two_phase_connections_are_one_unit_of_work(prepared: Project) -> None:
    prepared.write("second", "d", FAIL, down="c")
    with pytest.raises(errors.MigrationFailed, match=r"'d' of 'second' failed.*Nothing was changed"):
        upgrade(prepared.container)
    assert prepared.tables("first") == prepared.tables("second") == set()
    prepared.write("second", "d", down="c")
    assert [each.after for each in upgrade(prepared.container)] == ["c", "d"]
    assert [each.before for each in downgrade(prepared.container, "base", connections=["first", "second"])] == ["c", "d"]


def test_a_commit_that_fails_in_a_unit_changes_nothing(prepared: Project) -> None:
    deferred = """
op.execute("CREATE TABLE one (id integer PRIMARY KEY, other integer REFERENCES one DEFERRABLE INITIALLY DEFERRED)")
op.execute("INSERT INTO one VALUES (1, 2)")
"""
    prepared.write("second", "d", deferred, down="c")
    with pytest.raises((errors.MigrationFailed, errors.CommitError)):
        upgrade(prepared.container)
    assert prepared.tables("first") | prepared.tables("second") == {"app_db_decisions"}


def test_processes_with_a_unit_wait_for_each_other(prepared: Project) -> None:
    reports = at_once(prepared, 3, lambda container: upgrade(container, directory=prepared.folder))
    assert [report for report in reports if "error" in report] == []
    assert [each.pending for each in current(prepared.container)] == [(), ()]


@pytest.mark.representative("20")
@pytest.mark.parametrize("step", range(16, 32))
def test_a_process_may_be_killed_at_each_step_of_the_commit(prepared: Project, step: int) -> None:
    """Recovery settles what was prepared, and both databases agree. Before that, the error of the lock says what to do."""

    def work(container: DatabaseContainer) -> object:
        steps = Steps(step, None)
        steps.watch()

        def arm(done: Step) -> None:
            steps.armed = (done.connection, done.revision) == ("second", "c")

        return upgrade(container, directory=prepared.folder, on_step=arm)

    assert "error" not in Child(prepared, work).result()
    found = current(prepared.container)
    if any(each.pending for each in found) and is_in_doubt(prepared):
        with pytest.raises(errors.MigrationLockTimeout, match="a prepared transaction, which `app-db recover` settles"):
            upgrade(prepared.container, lock_timeout=0)
    prepared.container.recovery().settle(grace=0)
    assert len({each.revision for each in current(prepared.container)}) == 1
    assert {each.after for each in upgrade(prepared.container)} == {"c"}


def is_in_doubt(project: Project) -> bool:
    """Return whether the databases have prepared transactions, when the server has noticed that the process is gone."""
    with project.container.first_engine().connect() as connection:
        count = "SELECT count(*) FROM pg_prepared_xacts WHERE database IN (:first, :second)"
        names = {name: project.container.settings().connection(name).sqlalchemy_url().database for name in ("first", "second")}
        return bool(connection.scalar(text(count), names))
