"""The scripts of `app-db completion` make real shells complete verbs, options, their values and connection names."""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from harness.commands import app_db
from harness.requiring import need, need_program
from harness.schemas import validated

SETTINGS = {"APP_DB_CONNECTIONS__WRITER__URL": "sqlite://", "APP_DB_CONNECTIONS__WAREHOUSE__URL": "sqlite://"}
NAMES = "warehouse\nwriter\n"


def script_for(shell: str, place: Path) -> Path:
    """Return a file with the completions, and a function `app-db` that says what the program would when names are wanted."""
    need_program(shell, shell)
    file = place / f"completion.{shell}"
    own, names = "printf 'workshop\\n'", "printf 'warehouse\\nwriter\\n'"
    function = (
        f"function app-db; if contains -- --container=shop:own $argv; {own}; else; {names}; end; end"
        if shell == "fish"
        else f'function app-db {{ case "$*" in *--container=shop:own*) {own};; *) {names};; esac; }}'
    )
    file.write_text(f"{function}\n{app_db('completion', shell).stdout}")
    return file


def said(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_bash_completes_what_fits(tmp_path: Path) -> None:
    file = script_for("bash", tmp_path)

    def completed(*words: str) -> list[str]:
        typed = " ".join(map(repr, words))
        line = f"COMP_LINE={' '.join(words)!r}"
        program = f"source {file}; {line}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _app_db; echo ${{COMPREPLY[*]}}"
        return " ".join(said("bash", "-c", program)).split()

    assert completed("app-db", "sh") == ["show", "shell"]
    assert completed("app-db", "--json", "graph", "--format", "") == ["text", "mermaid", "svg"]
    assert completed("app-db", "recover", "--d") == ["--dry-run"]
    assert completed("app-db", "dbshell", "w") == ["warehouse", "writer"]
    assert completed("app-db", "migrate", "--connection", "w") == ["warehouse", "writer"]
    assert completed("app-db", "completion", "f") == ["fish"]
    for option in (("--container", "shop:own"), ("--container=shop:own",)):
        assert completed("app-db", *option, "ping", "w") == ["workshop"]
        assert completed("app-db", "migrate", *option, "--connection", "w") == ["workshop"]


def test_fish_completes_what_fits(tmp_path: Path) -> None:
    file = script_for("fish", tmp_path)

    def completed(line: str) -> list[str]:
        return [found.split("\t")[0] for found in said("fish", "--no-config", "-c", f"source {file}; complete -C '{line}'")]

    assert completed("app-db sh") == ["shell", "show"]
    assert completed("app-db graph --format ") == ["mermaid", "svg", "text"]
    assert "--dry-run" in completed("app-db recover --")
    assert completed("app-db dbshell w") == ["warehouse", "writer"]
    assert completed("app-db migrate --connection w") == ["warehouse", "writer"]
    for option in ("--container shop:own", "--container=shop:own"):
        assert completed(f"app-db {option} ping w") == ["workshop"]
        assert completed(f"app-db migrate {option} --connection w") == ["workshop"]


@pytest.mark.exhaustive
def test_zsh_completes_what_fits(tmp_path: Path) -> None:
    file = script_for("zsh", tmp_path)
    need("pexpect")
    pexpect: Any = import_module("pexpect")
    shell = pexpect.spawn("zsh", ["-f", "-i"], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "TERM": "dumb"}, timeout=20)
    try:
        shell.sendline(f"PS1='> '; autoload -Uz compinit && compinit -u -d {tmp_path}/dump; source {file}; echo READY$((1+1))")
        shell.expect("READY2")
        for typed, completed in (
            ("rec\t", "app-db recover"),
            ("recover --dr\t", "app-db recover --dry-run"),
            ("dbshell wa\t", "dbshell warehouse"),
            ("migrate --connection wa\t", "migrate --connection warehouse"),
            ("--container shop:own ping w\t", "ping workshop"),
            ("ping --container=shop:own w\t", "own workshop"),
        ):
            shell.send(f"app-db {typed}")
            shell.expect_exact(completed)
            shell.sendcontrol("u")
    finally:
        shell.close(force=True)


def test_the_names_are_those_of_the_settings() -> None:
    assert app_db("completion", "names", environment=SETTINGS).stdout == NAMES


def test_where_there_is_no_container_no_name_is_completed() -> None:
    done = app_db("completion", "names")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_in_the_json(shell: str) -> None:
    data = validated("completion", app_db("completion", shell, "--json").stdout)
    assert data["script"] == app_db("completion", shell).stdout.rstrip("\n")
