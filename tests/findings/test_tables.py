"""Tables that are not as the models say, and tables without transactions, are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, String, Table

from app_db import metadata_of
from app_db.migrations import check, upgrade
from harness.findings import GOODS, found, matters, run
from harness.migrated import Project


@pytest.fixture
def mirrored(database_url: str) -> dict[str, Any]:
    return {"main": database_url, "goods": {"mirror": "main"}}


def test_a_table_that_does_not_exist(database_url: str) -> None:
    run(database_url, "CREATE TABLE others (id INTEGER)")
    [finding] = found(goods=database_url)
    assert (finding.matter, finding.connection, finding.severity) == ("no-table", "goods", "error")
    assert finding.where == "the table 'goods' in metadata_of('goods')"
    assert "container.create_all('goods')" in finding.remedy


def test_a_table_of_a_mirrors_models_that_does_not_exist(mirrored: dict[str, Any]) -> None:
    run(mirrored["main"], "CREATE TABLE others (id INTEGER)")
    assert matters(found(**mirrored)) == [("no-table", "goods")]
    run(mirrored["main"], GOODS)
    assert found(**mirrored) == []


def test_a_column_that_the_table_does_not_have(database_url: str) -> None:
    run(database_url, GOODS.replace("name", "title"))
    what = found(goods=database_url)
    assert matters(what) == [("no-column", "goods"), ("unknown-column", "goods")]
    assert "the columns name of its model" in what[0].what


def test_a_column_that_needs_a_value_and_that_the_model_does_not_have(database_url: str) -> None:
    run(database_url, GOODS.replace("NOT NULL)", "NOT NULL, colour VARCHAR(9) NOT NULL, size INTEGER)"))
    assert matters(found(goods=database_url)) == [("unknown-column", "goods")]


def test_columns_that_fill_themselves_are_no_fault(database_url: str) -> None:
    run(database_url, GOODS.replace("NOT NULL)", "NOT NULL, colour VARCHAR(9) NOT NULL DEFAULT 'red', size INTEGER)"))
    assert found(goods=database_url) == []


def test_tables_of_mariadb_that_have_no_transactions(mariadb_url: str) -> None:
    run(mariadb_url, GOODS, "CREATE TABLE `select` (name VARCHAR(20)) ENGINE=MyISAM")
    [finding] = found(goods=mariadb_url)
    assert (finding.matter, finding.severity) == ("no-transactions", "warning")
    assert finding.remedy == "ALTER TABLE `select` ENGINE=InnoDB gives it some."


REVISION = """
from alembic import op
import sqlalchemy as sa

revision, down_revision = "one", None


def upgrade():
    op.create_table("goods", sa.Column("name", sa.String(20), primary_key=True))


def downgrade():
    op.drop_table("goods")
"""


def test_migrations_that_have_not_been_run(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    versions = tmp_path / "migrations" / "goods" / "versions"
    versions.mkdir(parents=True)
    (versions / "one.py").write_text(REVISION)
    run(database_url, GOODS)
    [finding] = found(goods=database_url)
    assert (finding.matter, finding.severity, finding.where) == ("pending-migrations", "warning", f"the folder {versions}")
    assert "one" in finding.what
    (versions / "other.py").write_text(REVISION.replace('"one"', '"other"'))
    [finding] = found(goods=database_url)
    assert finding.matter == "pending-migrations"
    assert finding.what.startswith("The migrations of 'goods' can't be used: "), "it has two heads"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_url: str) -> Iterator[Project]:
    """A connection with the table of the models, and a migration that has been run."""
    monkeypatch.chdir(tmp_path)
    with Project(tmp_path, goods=database_url) as project:
        project.write("goods", "one", f"op.execute({GOODS!r})")
        upgrade(project.container)
        yield project


def test_differences_that_only_alembic_finds(project: Project, database_url: str) -> None:
    """The lines are those of `app-db migrate --check`."""
    assert found(goods=database_url) == []
    project.execute("goods", "ALTER TABLE goods ADD COLUMN hand INTEGER", "CREATE TABLE stray (id INTEGER)")
    [finding] = found(goods=database_url)
    assert (finding.matter, finding.connection, finding.severity) == ("drift", "goods", "warning")
    head, *lines = finding.what.splitlines()
    assert head == "The models and the database differ:"
    assert sorted(lines) == [
        "column goods.hand is in the database, and in no model.",
        "table stray is in the database, and in no model.",
    ]
    assert sorted(lines) == sorted(f"{line}." for line in check(project.container)[0].drift)
    project.folder.rename("elsewhere")
    assert found(goods=database_url) == [], "without migrations, other tables and columns are no fault"


def test_differences_are_found_once(project: Project, database_url: str) -> None:
    project.execute("goods", "ALTER TABLE goods RENAME COLUMN name TO title")
    project.execute("goods", "ALTER TABLE goods ADD COLUMN colour VARCHAR(9)")
    what = found(goods=database_url)
    assert matters(what) == [("no-column", "goods"), ("unknown-column", "goods"), ("drift", "goods")]
    assert what[2].what.splitlines()[1:] == ["column goods.colour is in the database, and in no model."]
    project.execute("goods", "DROP TABLE goods")
    assert matters(found(goods=database_url)) == [("no-table", "goods")]


def test_the_model_of_a_view_does_not_differ(project: Project, database_url: str) -> None:
    project.execute("goods", "CREATE VIEW names AS SELECT name FROM goods")
    table = Table("names", metadata_of("goods"), Column("name", String(40), primary_key=True))
    try:
        assert found(goods=database_url) == []
    finally:
        table.metadata.remove(table)


def test_migrations_of_a_connection_that_does_not_exist(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stray = tmp_path / "migrations" / "godos" / "versions"
    stray.mkdir(parents=True)
    run(sqlite_url, GOODS)
    [finding] = found(goods=sqlite_url)
    assert (finding.matter, finding.severity, finding.where) == ("stray-migrations", "warning", f"the folder {stray}")
    assert "The connections are: goods." in finding.remedy
    stray.parent.rename(tmp_path / "migrations" / "goods")
    assert found(goods=sqlite_url) == []
