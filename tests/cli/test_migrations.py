"""The verbs of migrations, run as `python -m app_db`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app_db.cli import main
from app_db.cli._printing import Printer
from harness.commands import app_db
from harness.findings import run as execute
from harness.migrated import Project
from harness.schemas import validated

MODULE = """
from app_db import Connection, DatabaseContainer
from app_db.models import orm_base
from sqlalchemy.orm import Mapped, mapped_column

class Order(orm_base("writer")):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)

class Container(DatabaseContainer):
    writer = Connection()
"""


@pytest.fixture
def url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", database_url)
    Path("shop.py").write_text(MODULE)
    return database_url


def run(*arguments: str, code: int = 0) -> str:
    done = app_db(*arguments, "--container", "shop:Container")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code < 2 else done.stderr


def data(*arguments: str, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code))


@pytest.mark.exhaustive
def test_from_models_to_tables_and_back(url: str) -> None:
    assert run("migrate", "--check", code=1) == "writer: table orders is missing in the database\n"
    (written,) = data("revision", "-m", "orders")
    revision = written["revision"]
    assert Path(written["path"]).name == f"{revision}_orders.py"
    assert run("current", code=1) == "writer: no revision, 1 pending\n"
    assert run("history") == f"writer: {revision} orders (pending)\n"
    assert "CREATE TABLE orders" in run("sql")
    assert run("migrate") == f"writer: no revision -> {revision}, 1 run\n"
    assert data("migrate") == [{"connection": "writer", "before": revision, "after": revision, "revisions": []}]
    assert run("migrate", "--check") == "writer: nothing to do\n"
    assert run("revision", "-m", "more").startswith("Nothing was written")
    assert run("downgrade", "-1") == f"writer: {revision} -> no revision, 1 run\n"
    run("migrate")
    assert data("downgrade", "base")[0]["after"] is None
    assert run("stamp") == f"writer: no revision -> {revision}\n"
    assert run("current") == f"writer: {revision}, none pending\n"


def test_models_in_modules_of_their_own_are_imported(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each of their tables looks as if its model was deleted, and a revision would drop it."""
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", sqlite_url)
    models, container = MODULE.split("class Container")
    Path("models_apart.py").write_text(models)
    Path("shop.py").write_text(f"from app_db import Connection, DatabaseContainer\nclass Container{container}")
    Path("pyproject.toml").write_text('[tool.app_db]\nmodules = ["models_apart"]\n')
    (written,) = data("revision", "-m", "orders")
    run("migrate")
    assert run("migrate", "--check") == "writer: nothing to do\n"
    assert run("revision", "-m", "again").startswith("Nothing was written")
    assert "create_table('orders'" in Path(written["path"]).read_text()


def test_tables_that_exist_before_the_first_revision_are_told(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", sqlite_url)
    Path("shop.py").write_text(MODULE)
    execute(sqlite_url, "CREATE TABLE orders (id INTEGER NOT NULL PRIMARY KEY)")
    says = "writer: no revision creates orders, because the database has them already. "
    said = run("revision", "-m", "first").splitlines()
    assert [line.startswith(text) for line, text in zip(said, ("Nothing was written", says), strict=True)] == [True, True]
    assert data("revision", "-m", "first") == []
    run("revision", "-m", "first", "--empty")
    run("stamp")
    assert run("revision", "-m", "second") == "Nothing was written: models and databases agree.\n"


def test_what_may_take_long_shows_progress(sqlite_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", sqlite_url)
    Project(tmp_path, writer=sqlite_url).write_three("writer")
    shown: list[tuple[object, ...]] = []

    @contextmanager
    def progress(printer: Printer, doing: str) -> Iterator[Callable[..., None]]:
        shown.append((doing,))
        yield lambda *step: shown.append(step)

    monkeypatch.setattr(Printer, "progress", progress)
    for arguments in (["migrate"], ["downgrade", "a"], ["stamp", "c"], ["migrate", "--check"]):
        main(arguments)
    assert shown == [
        ("Migrating",),
        *[(number, 3, f"writer {each}") for number, each in enumerate("abc", 1)],
        ("Undoing migrations",),
        *[(number, 2, f"writer {each}") for number, each in enumerate("cb", 1)],
        ("Stamping the databases",),
        ("Comparing models and databases",),
    ]


def test_check_lists_the_differences_too(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", sqlite_url)
    Path("shop.py").write_text(MODULE)
    run("revision", "-m", "orders")
    run("migrate")
    execute(sqlite_url, "CREATE TABLE stray (id INTEGER)", "ALTER TABLE orders ADD COLUMN hand INTEGER")
    lines = run("check", code=1).splitlines()
    assert lines[:2] == ["writer", "  warning: The models and the database differ:"]
    assert [f"writer: {line.strip()[:-1]}" for line in lines[2:4]] == run("migrate", "--check", code=1).splitlines()
    assert lines[4].startswith("    where: metadata_of('writer'), and the folder ")


@pytest.mark.parametrize("verb", ["migrate", "current", "migrate --check"])
def test_a_database_that_is_down_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "postgresql+psycopg://a:secret@127.0.0.1:1/x")
    Path("shop.py").write_text(MODULE)
    Project(tmp_path, writer="sqlite://").write_three("writer")
    said = run(*verb.split(), code=2)
    assert "the connection 'writer' to postgresql+psycopg://a:***@127.0.0.1:1/x could not be made" in said
    assert "Look at APP_DB_CONNECTIONS__WRITER__URL." in said
    assert "secret" not in said


def test_the_history_is_listed_if_the_database_is_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "postgresql+psycopg://a:secret@127.0.0.1:1/x")
    Path("shop.py").write_text(MODULE)
    Project(tmp_path, writer="sqlite://").write_three("writer")
    assert run("history", code=1).count("(unknown: the database can't be asked)") == 3
    assert [each["is_applied"] for each in validated("history", run("history", "--json", code=1))] == [None] * 3


def test_what_can_not_run_says_why_and_exits_with_2(sqlite_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", sqlite_url)
    Path("shop.py").write_text(MODULE)
    assert "no migrations in" in run("migrate", code=2)
    Project(tmp_path, writer=sqlite_url).write_three("writer")
    assert "there is no revision 'nonsense'" in run("migrate", "nonsense", code=2)
    assert "no revision can be written into /proc/nope/writer/versions (" in run(
        "revision", "-m", "orders", "--directory", "/proc/nope", code=2
    )
    assert "Leave out 'b', or --check" in run("migrate", "b", "--check", code=2)
    assert "'writter'" in run("migrate", "--connection", "writter", code=2)
    (tmp_path / "migrations" / "writer" / "versions" / "bad.py").write_text("revision = ")
    assert "bad.py can't be loaded (SyntaxError" in run("current", code=2)
    Path("pyproject.toml").write_text("[tool.app_db")
    assert "no valid TOML" in run("history", code=2)
