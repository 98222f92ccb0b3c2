"""The tests that app_db brings for an application's migrations pass on sound ones, and each fails on what it is about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Integer, Table

from app_db import errors
from app_db.migrations.testing import _empty_database, migration_tests
from app_db.models import metadata_of
from harness.migrated import Project, new_name
from harness.paths import PYTHONPATH

NAMES = (
    "test_there_is_one_newest_revision",
    "test_all_revisions_can_be_run",
    "test_the_database_is_what_the_models_say",
    "test_each_revision_can_be_undone_and_run_again",
    "test_undoing_all_revisions_leaves_nothing",
)


def failing(project: Project, name: str) -> list[str]:
    """Run the tests as pytest does, and return the names of those that fail."""
    tests: Any = migration_tests(project.new_container, directory=project.folder)
    assert [mark.args for mark in tests.pytestmark] == [("connection", [name])]
    found = []
    for test in NAMES:
        try:
            with _empty_database(project.new_container, name, project.folder) as database:
                getattr(tests(), test)(name if test == NAMES[0] else database)
        except (AssertionError, errors.MigrationError):
            found.append(test)
    return found


@pytest.fixture
def name() -> str:
    name = new_name()
    for letter in "abc":
        Table(f"table_{letter}", metadata_of(name), Column("id", Integer, primary_key=True))
    return name


@pytest.fixture
def project(tmp_path: Path, database_url: str, name: str) -> Project:
    project = Project(tmp_path, **{name: database_url})
    project.write_three(name)
    return project


@pytest.mark.representative("sqlite")
def test_they_pass_on_sound_migrations_and_leave_the_database_empty(project: Project, name: str) -> None:
    assert failing(project, name) == []
    assert project.all_tables(name) == set()


def test_they_pass_on_revisions_that_were_merged(tmp_path: Path, sqlite_url: str, name: str) -> None:
    project = Project(tmp_path, **{name: sqlite_url})
    for revision, down in (("a", None), ("b", "a"), ("c", "a"), ("m", None), ("n", "m")):
        file = project.write(name, revision, down=down, create=f"table_{revision}" if revision in "abc" else "")
        if revision == "m":
            file.write_text(file.read_text().replace("down_revision = None", "down_revision = ('b', 'c')"))
    assert failing(project, name) == []


@pytest.mark.representative("sqlite")
def test_two_newest_revisions_are_found(project: Project, name: str) -> None:
    project.write(name, "d", down="b")
    assert NAMES[0] in failing(project, name)


@pytest.mark.representative("sqlite")
def test_a_revision_that_does_not_run_is_found(project: Project, name: str) -> None:
    project.write(name, "d", "op.execute('SELECT * FROM nowhere')", down="c")
    assert failing(project, name) == [*NAMES[1:]]


@pytest.mark.representative("sqlite")
def test_a_model_without_a_revision_is_found(project: Project, name: str) -> None:
    metadata_of(name).tables["table_a"].append_column(Column("more", Integer))
    assert failing(project, name) == [NAMES[2]]


@pytest.mark.representative("sqlite")
def test_a_revision_that_can_not_be_run_again_is_found(project: Project, name: str) -> None:
    more = "op.execute('CREATE TABLE more (id INTEGER NOT NULL PRIMARY KEY)')"
    project.write(name, "d", more, down="c")
    Table("more", metadata_of(name), Column("id", Integer, primary_key=True))
    assert failing(project, name) == [NAMES[3], NAMES[4]]


@pytest.mark.exhaustive
def test_a_type_that_is_left_behind_is_found(tmp_path: Path, postgres_url: str, name: str) -> None:
    with Project(tmp_path, **{name: postgres_url}) as project:
        project.write_three(name)
        project.write(name, "d", "op.execute(\"CREATE TYPE mood AS ENUM ('fine')\")", down="c")
        assert failing(project, name) == [NAMES[3], NAMES[4]]
        assert failing(project, name) == [NAMES[3], NAMES[4]]  # the first run has cleared the type


@pytest.mark.representative("sqlite")
def test_a_database_with_tables_is_refused(project: Project, name: str) -> None:
    project.execute(name, "CREATE TABLE precious (id INTEGER PRIMARY KEY)")
    with pytest.raises(errors.InvalidUse, match=r"is not empty \(table precious\)"):
        failing(project, name)
    assert project.all_tables(name) == {"precious"}


def test_a_folder_without_migrations_is_refused(tmp_path: Path, sqlite_url: str) -> None:
    project = Project(tmp_path, writer=sqlite_url)
    with pytest.raises(errors.InvalidUse, match="no migrations to test in"):
        migration_tests(project.new_container, directory=tmp_path / "elsewhere")


def test_a_folder_that_is_named_like_no_connection(tmp_path: Path, sqlite_url: str) -> None:
    project = Project(tmp_path, writer=sqlite_url)
    project.write_three("writter")
    with pytest.raises(errors.UnknownConnection, match=r"no 'writter'\. Did you mean 'writer'"):
        failing(project, "writter")


@pytest.mark.exhaustive
def test_pytest_collects_them_for_each_connection(tmp_path: Path) -> None:
    first = Project(tmp_path, a="sqlite://", b="sqlite://")
    for name in "ab":
        first.write(name, "x")
    (tmp_path / "test_shop.py").write_text(
        "from app_db import DatabaseSettings, container_of\n"
        "from app_db.migrations.testing import migration_tests\n"
        "def empty():\n"
        "    given = {name: {'url': 'sqlite://'} for name in 'ab'}\n"
        "    return container_of('a', 'b')(settings=DatabaseSettings(_env_file=None, connections=given))\n"
        "TestMigrations = migration_tests(empty)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shop.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "10 passed" in done.stdout, done.stdout + done.stderr
