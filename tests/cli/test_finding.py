"""Which container the command line uses, and what it says where there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from app_db import DatabaseSettings
from harness.commands import app_db
from harness.schemas import validated

SHOP = """
from app_db import Connection, DatabaseContainer, DatabaseSettings

class Shop(DatabaseContainer):
    {name} = Connection()

container = Shop(settings=DatabaseSettings(application={name!r}, connections={{{name!r}: {{"url": "sqlite://"}}}}))
"""


def write(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


def found(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """Return the application's name of the container that a command uses."""
    done = app_db("recover", *arguments, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("'")[1]


def refused(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """Return the only line that a command prints, which can't run."""
    done = app_db(*arguments, environment={"APP_DB_CONNECTIONS__WRITER__URL": "sqlite://", **(environment or {})})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr.rstrip("\n")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with three containers, one of which its pyproject.toml names."""
    for name in ("first", "second", "third"):
        write(tmp_path / f"{name}.py", SHOP.format(name=name))
    write(tmp_path / "pyproject.toml", '[tool.app_db]\ncontainer = "third:container"\n')
    return tmp_path


def test_the_option_comes_before_the_variable_and_that_before_the_project(project: Path) -> None:
    variable = {"APP_DB_CONTAINER": "second:container"}
    assert found("--container", "first:container", environment=variable) == "first"
    assert found(environment=variable) == "second"
    assert found() == "third"


def test_the_nearest_project_above_counts_and_its_modules_are_imported_from_there(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = project / "src" / "deep"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert found() == "third"
    write(below.parent / "pyproject.toml", "[project]\nname = 'other'\n")
    assert found(environment={"APP_DB_CONNECTIONS__WRITER__URL": "sqlite://"}) == "app_db"


@pytest.mark.parametrize("verb", ["show", "current"])
def test_an_env_file_beside_the_project_above_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    shop = "from app_db import Connection, DatabaseContainer\nclass Shop(DatabaseContainer):\n    writer = Connection()\n"
    write(tmp_path / "plain.py", shop)
    write(tmp_path / "pyproject.toml", '[tool.app_db]\ncontainer = "plain:Shop"\n')
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    hint = f"There is a .env in {tmp_path}: run the command there.\n"
    assert "There is a .env" not in app_db(verb).stderr
    write(tmp_path / ".env", "APP_DB_CONNECTIONS__WRITER__URL=sqlite://\n")
    done = app_db(verb)
    assert "APP_DB_CONNECTIONS__WRITER__URL: is not set" in done.stderr
    assert (done.returncode, done.stderr.endswith(hint)) == (2, True)
    write(tmp_path / "src" / ".env", "\n")
    assert "There is a .env" not in app_db(verb).stderr, "the one here is read"


def test_options_may_stand_before_and_after_the_verb(project: Path) -> None:
    assert found("--container", "first:container") == "first"
    shown = [
        app_db(*arguments).stdout
        for arguments in (
            ("--json", "--container", "first:container", "in-doubt"),
            ("in-doubt", "--container=first:container", "--json"),
            ("--container", "first:container", "in-doubt", "--json"),
            ("--grace", "5", "--json", "in-doubt", "--container", "first:container"),
        )
    ]
    assert {json.loads(each)["application"] for each in shown} == {"first"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[tool.app_db", "it is not valid TOML"),
        ("[tool.app_db]\ncontainer = 7", "container in [tool.app_db] is no text"),
        ("[tool]\napp_db = 's3cr3t'", "tool.app_db is no table"),
        ("tool = 's3cr3t'", "tool is no table"),
        ("[tool.app_db]\ncontainer = ''", "the module is missing"),
        ("[tool.app_db]\ncontainer = 'nowhere:x'", "there is no module 'nowhere'"),
        ("[tool.app_db]\ncontainer = 'first:x'", "there is no 'x'"),
        ("[tool.app_db]\ncontainer = 'first:DatabaseSettings'", "it is no database container"),
        (b"\xff\xfe", "it can't be read (UnicodeDecodeError)"),
    ],
)
def test_a_corrupt_project_is_explained_in_one_line(project: Path, content: str | bytes, says: str) -> None:
    file = project / "pyproject.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("recover")
    assert line.startswith(f"{file}: ")
    assert says in line
    assert "s3cr3t" not in line


def test_a_container_of_the_variable_that_is_none_is_explained_in_one_line(project: Path) -> None:
    write(project / "broken.py", "raise ValueError('s3cr3t')")
    line = refused("recover", environment={"APP_DB_CONTAINER": "broken:container"})
    assert line.startswith("APP_DB_CONTAINER=broken:container: the module 'broken' can't be imported (ValueError)")


def test_the_variable_is_no_misspelt_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONTAINER", "shop:container")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite://")
    assert [*DatabaseSettings().connections] == ["writer"]
    assert [*DatabaseSettings.from_mapping(os.environ).connections] == ["writer"]


def test_the_version_is_printed_as_text_and_as_json() -> None:
    text, data = app_db("--version").stdout, app_db("--version", "--json").stdout
    assert text == f"app-db {validated('version', data)['version']}\n"


def test_an_unknown_command_is_explained_in_one_line() -> None:
    assert refused("recvoer").startswith("There is no command 'recvoer'. Did you mean 'recover'? There are: ")
    done = app_db("--json", "xyz")
    assert (done.returncode, done.stdout) == (2, "")
    assert json.loads(done.stderr)["error"].startswith("There is no command 'xyz'. There are: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "python -m app_db: error: the following arguments are required: COMMAND"),
        (("migrate", "head", "x"), "python -m app_db migrate: error: unrecognized arguments: x\n"),
        (("recover", "--nonsense"), "python -m app_db recover: error: unrecognized arguments: --nonsense"),
        (("recover", "--container"), "python -m app_db: error: argument --container: expected one argument"),
        (("graph", "--format", "png"), "python -m app_db graph: error: argument --format: invalid choice: 'png'"),
        (("dbshell",), "python -m app_db dbshell: error: the following arguments are required: NAME\n"),
    ],
)
def test_what_argparse_refuses_has_the_exit_code_2(arguments: Any, says: str) -> None:
    done = app_db(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usage: {says.partition(': error')[0]} ")
    assert says in done.stderr
    done = app_db("--json", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert json.loads(done.stderr)["error"].startswith(says.strip())
