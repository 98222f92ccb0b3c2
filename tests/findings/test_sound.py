"""The shop of the examples has no findings on PostgreSQL with a standby, on MariaDB and on SQLite, as a terminal shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app_db.cli import main
from harness.commands import app_db
from harness.findings import run, user
from harness.paths import ROOT, TESTS
from harness.schemas import validated
from harness.servers import PASSWORD, MariaDBServer, PostgresServer, PostgresStandby

OPENED = """
import sys
sys.path.insert(0, {examples!r})
from shop.container import container
from shop.opening import open_shop

def opened():
    open_shop()
    return container
"""

Settings = dict[str, dict[str, str]]


@pytest.fixture
def sound(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Settings]:
    """Returns the settings of the shop on a kind of database."""

    def on_sqlite() -> Settings:
        return {name: {"url": f"sqlite:///{tmp_path}/shop.db"} for name in ("writer", "warehouse", "log")}

    def on_postgresql() -> Settings:
        small: PostgresServer = request.getfixturevalue("small")
        standby: PostgresStandby = request.getfixturevalue("standby")
        names = {name: request.getfixturevalue("lent")(small) for name in ("writer", "warehouse", "log")}
        few = {"pool__size": "1", "pool__max_overflow": "0", "statement_timeout": "30"}
        settings: Settings = {name: {"url": small.url(database), "two_phase": "true", **few} for name, database in names.items()}
        standby.catch_up()
        return settings | {"reader": {"url": standby.url(names["writer"]), "read_only": "true", **few}}

    def on_mariadb() -> Settings:
        mariadb: MariaDBServer = request.getfixturevalue("mariadb")
        names = {name: request.getfixturevalue("lent")(mariadb) for name in ("writer", "warehouse", "log")}
        few = {"pool__size": "1", "pool__max_overflow": "0"}
        return {name: {"url": mariadb.url(database), "two_phase": "true", **few} for name, database in names.items()}

    return lambda kind: {"sqlite": on_sqlite, "postgresql": on_postgresql, "mariadb": on_mariadb}[kind]()


def variables(settings: Settings) -> dict[str, str]:
    return {
        f"APP_DB_CONNECTIONS__{name}__{field}".upper(): value for name, own in settings.items() for field, value in own.items()
    }


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
def test_a_sound_shop_has_no_findings(sound: Callable[[str], Settings], kind: str, tmp_path: Path) -> None:
    settings = sound(kind)
    (tmp_path / "opened.py").write_text(OPENED.format(examples=str(ROOT / "examples")))
    arguments = ("check", "--container", "opened:opened", "--strict", "--modules", "shop.services", "shop.checkout")
    done = app_db(*arguments, environment=variables(settings))
    assert (done.stdout, done.stderr, done.returncode) == (f"Nothing is wrong with {', '.join(settings)}.\n", "", 0)


def test_what_is_found_is_printed_by_connection(postgres: PostgresServer, postgres_url: str) -> None:
    run(postgres_url, "CREATE TABLE t (id INTEGER)")
    with user(postgres, postgres_url, "SELECT, DELETE ON t") as plain:
        given = variables(
            {
                "main": {"url": plain, "read_only": "true"},
                "copy": {"url": "postgresql+psycopg://app_db:s3cr3t@127.0.0.1:1/nowhere"},
            }
        )
        done = app_db("check", environment=given)
        as_json = app_db("check", "--json", environment=given)
    lines = done.stdout.splitlines()
    assert (done.returncode, as_json.returncode, done.stderr) == (1, 1, "")
    assert lines[0] == "main"
    assert lines[1].startswith("  hint: The user may write")
    assert lines[2:4] == [
        "    where: APP_DB_CONNECTIONS__MAIN__URL (environment)",
        "    to do: Give the connection a user that has only SELECT.",
    ]
    assert lines[4] == "copy"
    assert lines[5].startswith("  error: The server can't be reached: OperationalError: ")
    assert lines[-2:] == ["", "1 error, 1 hint."]
    assert "s3cr3t" not in done.stdout + as_json.stdout
    assert PASSWORD not in done.stdout + as_json.stdout
    listed = validated("check", as_json.stdout)
    assert [(finding["matter"], finding["connection"]) for finding in listed] == [
        ("reader-may-write", "main"),
        ("unreachable", "copy"),
    ]
    assert {*listed[0]} == {"matter", "severity", "connection", "what", "where", "remedy"}


def test_hints_fail_only_a_strict_check(postgres: PostgresServer, postgres_url: str) -> None:
    given = variables({"main": {"url": postgres_url, "pooler": "transaction", "statement_timeout": "9"}})
    lax, strict = app_db("check", environment=given), app_db("check", "--strict", environment=given)
    assert (lax.returncode, strict.returncode) == (0, 1)
    assert lax.stdout == strict.stdout
    assert lax.stdout.endswith("1 hint.\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [("[tool.app_db]\nmodules = 'shop'", "no list of texts"), ("[tool.app_db", "not valid TOML"), ("tool = 7", "no table")],
)
def test_a_list_of_modules_that_can_not_be_read_is_one_clear_error(sqlite_url: str, text: str, says: str) -> None:
    Path("pyproject.toml").write_text(text)
    done = app_db("check", environment=variables({"main": {"url": sqlite_url}}))
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "pyproject.toml" in done.stderr


def test_the_modules_in_pyproject_toml_are_checked(sqlite_url: str) -> None:
    Path("pyproject.toml").write_text("[tool.app_db]\nmodules = ['no_such_shop']")
    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    done = app_db("check", environment=variables({"main": {"url": sqlite_url}}))
    assert done.returncode == 1
    assert "The module 'no_such_shop' can't be imported" in done.stdout


def test_the_models_of_modules_that_the_containers_module_does_not_import_are_compared(sqlite_url: str) -> None:
    Path("only_models.py").write_text(
        "from sqlalchemy import Column, Integer, Table\nfrom app_db import metadata_of\n"
        "Table('boxes', metadata_of('main'), Column('id', Integer, primary_key=True))\n"
    )
    Path("pyproject.toml").write_text("[tool.app_db]\nmodules = ['only_models']")
    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    done = app_db("check", environment=variables({"main": {"url": sqlite_url}}))
    assert "The table boxes of the models does not exist." in done.stdout
    assert done.returncode == 1


def test_modules_in_the_working_directory_are_found(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(Path.cwd()))])
    monkeypatch.setenv("APP_DB_CONNECTIONS__MAIN__URL", sqlite_url)
    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    Path("shop_that_is_here.py").write_text("")
    assert main(["check", "--modules", "shop_that_is_here"]) == 0
    assert capsys.readouterr().out == "Nothing is wrong with main.\n"


def test_each_matter_is_planted_by_a_test() -> None:
    from app_db._findings.matters import MATTERS

    tests = "".join(path.read_text() for path in (TESTS / "findings").glob("test_*.py"))
    assert [matter.name for matter in MATTERS if f'"{matter.name}"' not in tests] == []
    assert len(MATTERS) >= 20
