"""A revision can't end the transaction that a failure must be able to undo; where each commits by itself, it may."""

from __future__ import annotations

from pathlib import Path

import pytest

from app_db import errors
from app_db.migrations import upgrade
from harness.migrated import Project

ENDS = {
    "COMMIT": "op.execute('COMMIT')",
    "commit()": "op.get_bind().commit()",
    "rollback()": "op.get_bind().rollback()",
    "session": "from sqlalchemy.orm import Session\nsession = Session(op.get_bind())\nsession.connection()\nsession.rollback()",
}


@pytest.mark.representative("*-postgresql")
@pytest.mark.parametrize("database", ["sqlite", "postgres"], ids=["sqlite", "postgresql"])
@pytest.mark.parametrize("ending", ENDS)
def test_a_revision_that_ends_the_transaction_is_refused_and_nothing_is_changed(
    tmp_path: Path, request: pytest.FixtureRequest, database: str, ending: str
) -> None:
    with Project(tmp_path, writer=request.getfixturevalue(f"{database}_url")) as project:
        project.write_three("writer")
        project.write("writer", "d", ENDS[ending], down="c")
        verb = "ROLLBACK" if "rollback" in ENDS[ending] else "COMMIT"
        with pytest.raises(errors.MigrationFailed, match=rf"'d' of 'writer' failed: it sends {verb}.*Nothing was changed"):
            upgrade(project.container)
        assert project.all_tables("writer") == set()
        project.write("writer", "d", down="c")
        assert upgrade(project.container)[0].after == "d"


def test_foreign_keys_are_on_after_a_refused_commit(tmp_path: Path, sqlite_url: str) -> None:
    with Project(tmp_path, writer=sqlite_url) as project:
        project.write("writer", "a", ENDS["commit()"])
        with pytest.raises(errors.MigrationFailed):
            upgrade(project.container)
        with project.container.writer_engine().connect() as connection:
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_session_and_a_savepoint_in_a_revision_are_part_of_the_transaction(tmp_path: Path, database_url: str) -> None:
    body = """
from sqlalchemy.orm import Session
with Session(op.get_bind()) as session:
    session.execute(sa.text("INSERT INTO table_a VALUES (1)"))
    session.commit()
with op.get_bind().begin_nested():
    op.execute("INSERT INTO table_a VALUES (2)")
"""
    with Project(tmp_path, writer=database_url) as project:
        project.write("writer", "a", create="table_a")
        project.write("writer", "b", body, down="a")
        assert upgrade(project.container)[0].after == "b"
        assert project.revision_in("writer") == ["b"]


IN_PORTIONS = """
for number in (1, 2):
    op.execute(f"INSERT INTO table_a VALUES ({number})")
    op.get_bind().commit()
op.execute("INSERT INTO table_a VALUES (3)")
"""


@pytest.mark.parametrize(("database", "more"), [("mariadb", ""), ("postgres", "autocommit = True")])
def test_a_revision_that_commits_by_itself_may_commit_in_its_middle(
    tmp_path: Path, request: pytest.FixtureRequest, database: str, more: str
) -> None:
    with Project(tmp_path, writer=request.getfixturevalue(f"{database}_url")) as project:
        project.write("writer", "a", create="table_a")
        project.write("writer", "b", IN_PORTIONS, down="a", more=more)
        assert upgrade(project.container)[0].after == "b"
        assert project.revision_in("writer") == ["b"]
        with project.container.writer_engine().connect() as connection:
            assert connection.exec_driver_sql("SELECT id FROM table_a ORDER BY id").scalars().all() == [1, 2, 3]
