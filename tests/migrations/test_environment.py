"""Alembic's own commands, by an env.py that calls app_db."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from app_db import errors
from app_db.migrations import current, upgrade
from harness.migrated import Project

ENV = "from app_db.migrations import run\nfrom shop_of_this_test import container\n\nrun(container)\n"

CONCURRENTLY = """
with op.get_context().autocommit_block():
    op.execute("CREATE INDEX CONCURRENTLY by_id ON table_a (id)")
"""


@contextmanager
def project_with_env(directory: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    with Project(directory, writer=url) as project:
        project.write_three("writer")
        module = types.ModuleType("shop_of_this_test")
        module.container = project.container  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        (project.folder / "writer" / "env.py").write_text(ENV)
        yield project


@pytest.fixture
def project(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    with project_with_env(tmp_path, database_url, monkeypatch) as project:
        yield project


def config(project: Project, name: str = "writer") -> Config:
    found = Config(stdout=io.StringIO(), output_buffer=io.StringIO())
    found.set_main_option("script_location", str(project.folder / name))
    return found


@pytest.mark.representative("sqlite")
def test_its_commands_do_what_app_db_does(project: Project) -> None:
    command.upgrade(config(project), "b")
    assert current(project.container)[0].pending == ("c",)
    upgrade(project.container)
    command.downgrade(config(project), "base")
    assert project.tables("writer") == set()
    command.stamp(config(project), "head")
    assert current(project.container)[0].revision == "c"
    command.current(found := config(project))
    assert isinstance(found.stdout, io.StringIO)
    assert "c (head)" in found.stdout.getvalue()
    command.upgrade(found, "a:c", sql=True)
    assert isinstance(found.output_buffer, io.StringIO)
    assert "CREATE TABLE IF NOT EXISTS table_c" in found.output_buffer.getvalue()


def test_a_revision_that_commits_is_refused(tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with project_with_env(tmp_path, sqlite_url, monkeypatch) as project:
        project.write("writer", "d", "op.get_bind().commit()", down="c")
        with pytest.raises(errors.UnusableMigrations, match=r"it sends COMMIT.*Nothing was changed"):
            command.upgrade(config(project), "head")
        assert project.all_tables("writer") == set()


@pytest.mark.timeout(60)
def test_an_index_is_made_concurrently(tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with project_with_env(tmp_path, postgres_url, monkeypatch) as project:
        project.write("writer", "d", CONCURRENTLY, down="c")
        command.upgrade(config(project), "head")
        assert current(project.container)[0].revision == "d"


@pytest.mark.representative("sqlite")
def test_a_folder_that_is_named_like_no_connection(project: Project) -> None:
    (project.folder / "writer").rename(project.folder / "writter")
    with pytest.raises(errors.UnknownConnection, match="'writter'"):
        command.upgrade(config(project, "writter"), "head")


@pytest.mark.exhaustive
def test_the_files_that_alembic_reads_are_in_the_wheel(installed: Path) -> None:
    files = {path.name for path in (installed / "app_db" / "migrations" / "_environment").iterdir()}
    assert files >= {"env.py", "script.py.mako"}
