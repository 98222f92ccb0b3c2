"""Chains of revisions, from nothing to the newest and back, on each database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Integer, String, Table
from sqlalchemy.exc import OperationalError

from app_db import errors
from app_db.migrations import Migrated, Step, check, current, downgrade, history, revision, sql, stamp, upgrade
from app_db.models import metadata_of
from harness.migrated import Project, new_name

NewUrl = Callable[[], str]


def test_all_pending_revisions_are_run_once(tmp_path: Path, database_url: str) -> None:
    with Project(tmp_path, writer=database_url) as project:
        ids = project.write_three("writer")
        assert upgrade(project.container) == (Migrated("writer", None, "c", tuple(ids)),)
        assert project.tables("writer") == {"table_a", "table_b", "table_c"}
        assert upgrade(project.container) == (Migrated("writer", "c", "c", ()),)
        (found,) = current(project.container)
        assert (found.revision, found.head, found.pending) == ("c", "c", ())


@pytest.mark.representative("sqlite")
def test_a_target_is_an_id_or_counted_from_here(tmp_path: Path, database_url: str) -> None:
    with Project(tmp_path, writer=database_url) as project:
        project.write_three("writer")
        assert upgrade(project.container, "+1")[0].revisions == ("a",)
        assert current(project.container)[0].pending == ("b", "c")
        assert upgrade(project.container, "b")[0].revisions == ("b",)
        assert upgrade(project.container, "a")[0].revisions == ()
        assert project.tables("writer") == {"table_a", "table_b"}


def test_revisions_are_undone_in_reverse(tmp_path: Path, database_url: str) -> None:
    with Project(tmp_path, writer=database_url) as project:
        project.write_three("writer")
        upgrade(project.container)
        assert downgrade(project.container, "-1") == (Migrated("writer", "c", "b", ("c",)),)
        assert downgrade(project.container, "base") == (Migrated("writer", "b", None, ("b", "a")),)
        assert project.tables("writer") == set()
        assert upgrade(project.container)[0].after == "c"


def test_a_revision_may_name_its_encoding(tmp_path: Path, sqlite_url: str) -> None:
    with Project(tmp_path, writer=sqlite_url) as project:
        file = project.write("writer", "a", create="table_a")
        file.write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n" + file.read_bytes())
        assert upgrade(project.container)[0].after == "a"


@pytest.mark.representative("sqlite")
def test_a_stamp_runs_nothing(tmp_path: Path, database_url: str) -> None:
    with Project(tmp_path, writer=database_url) as project:
        project.write_three("writer")
        assert stamp(project.container, "b") == (Migrated("writer", None, "b", ()),)
        assert project.tables("writer") == set()
        assert upgrade(project.container)[0].revisions == ("c",)
        assert stamp(project.container, "base")[0].after is None
        assert current(project.container)[0].revision is None


@pytest.mark.representative("sqlite")
def test_each_revision_is_told_when_it_was_run(tmp_path: Path, database_url: str) -> None:
    with Project(tmp_path, writer=database_url) as project:
        project.write_three("writer")
        steps: list[Step] = []
        upgrade(project.container, on_step=steps.append)
        assert steps == [Step("writer", each, number, 3) for number, each in enumerate("abc", 1)]


@pytest.mark.parametrize("more", ["", "autocommit = True"], ids=["together", "each by itself"])
def test_an_error_of_on_step_is_told_with_the_revision_that_was_run(tmp_path: Path, postgres_url: str, more: str) -> None:
    def fail(step: Step) -> None:
        if step.revision == "b":
            raise ValueError("no more ink")

    with Project(tmp_path, writer=postgres_url) as project:
        project.write_three("writer")
        project.write("writer", "d", down="c", more=more)
        match = r"The revision 'b' of 'writer' failed: it was run, and then on_step raised ValueError: no more ink\."
        with pytest.raises(errors.MigrationFailed, match=match) as caught:
            upgrade(project.container, on_step=fail)
        in_database = ["a", "b"] if more else []
        assert caught.value.account.committed == ({"writer": in_database} if more else {})
        assert not caught.value.account.is_partial
        assert current(project.container)[0].revision == (in_database[-1] if more else None)
        assert upgrade(project.container)[0].after == "d"


@pytest.mark.representative("sqlite")
def test_the_history_says_what_was_run(tmp_path: Path, database_url: str) -> None:
    with Project(tmp_path, writer=database_url) as project:
        project.write_three("writer")
        upgrade(project.container, "b")
        found = [(each.revision, each.down_revision, each.is_applied) for each in history(project.container)]
        assert found == [("a", None, True), ("b", "a", True), ("c", "b", False)]


def test_the_history_is_that_of_the_files_if_no_database_answers(tmp_path: Path) -> None:
    for url in ("postgresql://a@127.0.0.1:1/x", "postgresql+asyncpg://a@127.0.0.1:1/x", "mysql+pymysql://a@127.0.0.1:1/x"):
        with Project(tmp_path, writer=url) as project:
            project.write_three("writer")
            assert [(each.revision, each.is_applied) for each in history(project.container)] == [(each, None) for each in "abc"]


def test_sql_is_written_without_a_connection(tmp_path: Path) -> None:
    with Project(
        tmp_path, writer="postgresql://a@127.0.0.1:1/x", log="mysql+pymysql://a@127.0.0.1:1/x", file="sqlite:///none/there.db"
    ) as project:
        for name in ("writer", "log", "file"):
            project.write_three(name)
        texts = sql(project.container)
        assert list(texts) == ["file", "log", "writer"]
        for text in texts.values():
            assert text.index("CREATE TABLE IF NOT EXISTS table_a") < text.index("CREATE TABLE IF NOT EXISTS table_c")
        assert texts["writer"].startswith("BEGIN;")
        (undone,) = sql(project.container, "a", start="c", downgrade=True, connections=["writer"]).values()
        assert "DROP TABLE IF EXISTS table_c" in undone
        assert "table_a" not in undone
        (undone,) = sql(project.container, downgrade=True, connections=["writer"]).values()
        assert undone.index("DROP TABLE IF EXISTS table_c") < undone.index("DROP TABLE IF EXISTS table_a")
        with pytest.raises(errors.UnusableMigrations, match="'nonsense'"):
            sql(project.container, "nonsense")


# ---- from models ----------------------------------------------------------------------------------------------------


def orders_on(name: str, *more: Column[Any]) -> None:
    metadata = metadata_of(name)
    Table("orders", metadata, Column("id", Integer, primary_key=True), *more)


@pytest.mark.representative("sqlite")
def test_revisions_are_written_from_models(tmp_path: Path, database_url: str) -> None:
    """From nothing to three revisions; the database is at each moment what the models say, and `check` says so."""
    name = new_name()
    orders_on(name)
    with Project(tmp_path, **{name: database_url}) as project:
        container = project.container
        assert check(container)[0].drift == ("table orders is missing in the database",)
        written = [*revision(container, "orders")]
        assert check(container)[0].pending == (written[0].revision,)
        upgrade(container)
        assert check(container)[0].is_clean
        assert revision(container, "nothing new") == ()

        metadata = metadata_of(name)
        metadata.tables["orders"].append_column(Column("sku", String(20)))
        assert check(container)[0].drift == ("column orders.sku is missing in the database",)
        written += revision(container, "sku")
        upgrade(container)
        Table("lines", metadata, Column("id", Integer, primary_key=True), Column("order_id", ForeignKey("orders.id")))
        written += revision(container, "lines")
        upgrade(container)
        assert check(container)[0].is_clean
        assert [each.message for each in history(container)] == ["orders", "sku", "lines"]
        for each in reversed(written):
            assert downgrade(container, "-1")[0].revisions == (each.revision,)
            assert upgrade(container, "+1")[0].revisions == (each.revision,)
            downgrade(container, "-1")
        assert project.tables(name) == set()


@pytest.mark.representative("sqlite")
def test_looking_for_differences_changes_nothing(tmp_path: Path, database_url: str) -> None:
    name = new_name()
    orders_on(name)
    with Project(tmp_path, **{name: database_url}) as project:
        check(project.container)
        revision(project.container, "orders")
        current(project.container)
        assert project.all_tables(name) == set()


def test_a_revision_is_not_written_before_the_pending_ones_are_run(tmp_path: Path, sqlite_url: str) -> None:
    name = new_name()
    orders_on(name)
    with Project(tmp_path, **{name: sqlite_url}) as project:
        revision(project.container, "orders")
        with pytest.raises(errors.UnusableMigrations, match=r"has not been run.*upgrade"):
            revision(project.container, "again")


def test_tables_of_models_that_were_not_imported_are_not_dropped(tmp_path: Path, sqlite_url: str) -> None:
    name, other = new_name(), new_name()
    orders_on(name)
    with Project(tmp_path, **{name: sqlite_url, other: f"{sqlite_url}.2"}) as project:
        project.write_three(other)
        upgrade(project.container)
        assert [each.connection for each in revision(project.container, "orders")] == [name]
        with pytest.raises(errors.InvalidUse, match=rf"No models of '{other}' are imported.*would drop all tables.*--empty"):
            revision(project.container, "more", connections=[name, other])
        assert len(revision(project.container, "by hand", autogenerate=False, connections=[other])) == 1


def test_no_revision_is_written_if_one_of_the_databases_is_down(tmp_path: Path, sqlite_url: str) -> None:
    names = new_name(), new_name()
    for name in names:
        orders_on(name)
    nowhere = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"
    with Project(tmp_path, **dict(zip(names, (sqlite_url, nowhere), strict=True))) as project:
        with pytest.raises(OperationalError):
            revision(project.container, "orders")
        assert list(project.folder.rglob("*.py")) == []


def test_an_empty_revision_needs_no_database(tmp_path: Path) -> None:
    name = new_name()
    with Project(tmp_path, **{name: "postgresql://nobody@127.0.0.1:1/nowhere"}) as project:
        (written,) = revision(project.container, "by hand", autogenerate=False, connections=[name], revision_id="first")
        assert (written.revision, written.down_revision) == ("first", None)
        assert Path(written.path).parent == project.folder / name / "versions"


def test_a_message_may_have_backslashes_and_quotes(tmp_path: Path, sqlite_url: str) -> None:
    message = '"move" C:\\users to """home""" and "work"\\'
    name = new_name()
    with Project(tmp_path, **{name: sqlite_url}) as project:
        (written,) = revision(project.container, message, autogenerate=False, connections=[name])
        assert written.message == message
        assert upgrade(project.container)[0].after == written.revision


@pytest.mark.representative("sqlite")
def test_app_dbs_own_tables_and_those_that_are_reflected_are_left_alone(tmp_path: Path, database_url: str) -> None:
    name = new_name()
    orders_on(name)
    with Project(tmp_path, **{name: database_url}) as project:
        project.container.bootstrap(lambda: None, on=name)
        project.container.core.decision_logs().of(name).ensure()
        project.execute(name, "CREATE TABLE legacy (id INTEGER PRIMARY KEY, name VARCHAR(10))")
        Table("legacy", metadata_of(name), info={"app_db_reflected": True})
        assert project.tables(name) == {"app_db_bootstrap", "app_db_decisions", "orders", "legacy"}
        assert check(project.container)[0].drift == ()


@pytest.mark.representative("sqlite")
def test_the_model_of_a_view_is_no_missing_table(tmp_path: Path, database_url: str) -> None:
    name = new_name()
    orders_on(name)
    Table("names", metadata_of(name), Column("id", Integer, primary_key=True))
    with Project(tmp_path, **{name: database_url}) as project:
        project.execute(name, "CREATE TABLE bases (id INTEGER PRIMARY KEY)", "CREATE VIEW names AS SELECT id FROM bases")
        assert [each for each in check(project.container)[0].drift if "names" in each] == []
        (written,) = revision(project.container, "orders")
        source = Path(written.path).read_text()
        assert "create_table('orders'" in source
        assert "names" not in source


def test_sqlite_alters_a_table_and_keeps_the_rows_that_refer_to_it(tmp_path: Path, sqlite_url: str) -> None:
    """The fact guarded: DROP TABLE deletes what refers to it ON DELETE CASCADE, while foreign keys are on."""
    with Project(tmp_path, writer=sqlite_url) as project:
        project.execute(
            "writer",
            "CREATE TABLE parent (id INTEGER PRIMARY KEY, name VARCHAR(5))",
            "CREATE TABLE child (id INTEGER PRIMARY KEY, parent_id INTEGER REFERENCES parent ON DELETE CASCADE)",
            "INSERT INTO parent VALUES (1, 'a')",
            "INSERT INTO child VALUES (1, 1)",
        )
        alter = "with op.batch_alter_table('parent') as batch:\n    batch.alter_column('name', type_=sa.String(50))"
        project.write("writer", "a", alter)
        upgrade(project.container)
        with project.container.writer_engine().connect() as connection:
            assert connection.exec_driver_sql("SELECT parent_id FROM child").scalars().all() == [1]
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000


def test_sqlite_refuses_a_revision_that_breaks_a_foreign_key(tmp_path: Path, sqlite_url: str) -> None:
    with Project(tmp_path, writer=sqlite_url) as project:
        project.execute(
            "writer",
            "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
            "CREATE TABLE child (id INTEGER PRIMARY KEY, parent_id INTEGER REFERENCES parent)",
            "INSERT INTO child VALUES (1, 99)",  # violated before, which is not the fault of the revision
        )
        project.write("writer", "a", "op.execute('INSERT INTO parent VALUES (1)')")
        upgrade(project.container)
        project.write("writer", "b", "op.execute('INSERT INTO child VALUES (2, 98)')", down="a")
        with pytest.raises(errors.MigrationFailed, match=r"FOREIGN KEY constraint failed \(child\).*Nothing was changed"):
            upgrade(project.container)
        assert project.revision_in("writer") == ["a"]


@pytest.mark.representative("sqlite")
def test_bootstrap_fills_what_migrations_have_made(tmp_path: Path, database_url: str) -> None:
    name = new_name()
    orders_on(name)
    with Project(tmp_path, **{name: database_url}) as project:
        revision(project.container, "orders")
        upgrade(project.container)
        calls: list[int] = []
        assert project.container.bootstrap(lambda: calls.append(1), on=name)
        assert not project.container.bootstrap(lambda: calls.append(1), on=name)
        assert calls == [1]
        assert check(project.container)[0].is_clean


# ---- one database, several chains -------------------------------------------------------------------------------------


@pytest.mark.representative("sqlite")
def test_chains_in_one_database_have_version_tables_of_their_own(tmp_path: Path, database_url: str) -> None:
    one, other = new_name(), new_name()
    orders_on(one)
    Table("events", metadata_of(other), Column("id", Integer, primary_key=True))
    with Project(tmp_path, **{one: database_url, other: database_url}) as project:
        written = revision(project.container, "first")
        upgrade(project.container)
        assert all(each.is_clean for each in check(project.container))
        for each in written:
            assert project.revision_in(each.connection, f"alembic_version_{each.connection}") == [each.revision]
        assert project.all_tables(one) == {"orders", "events", f"alembic_version_{one}", f"alembic_version_{other}"}


@pytest.mark.representative("sqlite")
def test_a_version_table_keeps_its_name_when_a_second_chain_comes(tmp_path: Path, database_url: str) -> None:
    with Project(tmp_path, writer=database_url) as alone:
        alone.write_three("writer")
        upgrade(alone.container)
        assert alone.revision_in("writer") == ["c"]
    with Project(tmp_path, writer=database_url, log=database_url) as both:
        both.write("log", "first", create="entries")
        assert [each.revisions for each in upgrade(both.container)] == [("first",), ()]
        assert (both.revision_in("writer"), both.revision_in("writer", "alembic_version_log")) == (["c"], ["first"])
    with Project(tmp_path, log=database_url) as rest:
        assert upgrade(rest.container)[0].before == "first"


@pytest.mark.representative("sqlite")
def test_code_that_is_older_than_the_database_runs_nothing(tmp_path: Path, database_url: str) -> None:
    with Project(tmp_path, writer=database_url, log=database_url) as project:
        project.write_three("writer")
        project.write("log", "first", create="entries")
        upgrade(project.container)
        (project.folder / "writer" / "versions" / "c.py").unlink()
        with pytest.raises(errors.UnusableMigrations, match=r"'writer'.*at the revision c"):
            upgrade(project.container)
    with Project(tmp_path, writer=database_url) as alone, pytest.raises(errors.UnusableMigrations, match="the revision c"):
        current(alone.container)
