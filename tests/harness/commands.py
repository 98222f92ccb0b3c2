"""`python -m app_db …` for tests that run it again and again.

    done = app_db("recover", "--grace", "0", environment={"APP_DB_CONNECTIONS__WRITER__URL": url})
    assert done.returncode == 0

Each command is run as the main module of a process of its own, with an environment, a working directory and output of its own.
That process is a fork of one that has imported app_db and the drivers, which takes longer than what most commands do; with
`afresh=True` it is a new one.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from harness.paths import PYTHONPATH, ROOT
from harness.terminals import Screen, Terminal

_forking: dict[int, subprocess.Popen[bytes]] = {}
"""The process that forks, by the id of the one that uses it: a fork of that begins another one."""


def app_db(
    *arguments: str, environment: Mapping[str, str] | None = None, afresh: bool = False, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command with these variables beside those of this process, and a text as its stdin."""
    command = [sys.executable, "-m", "app_db", *arguments]
    given = {**os.environ, "PYTHONPATH": PYTHONPATH, **(environment or {})}
    if afresh:
        return subprocess.run(command, input=stdin, env=given, capture_output=True, text=True, check=False, timeout=60)
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory, name) for name in ("in", "out", "err")]
        files[0].write_text(stdin)
        code = _ask(command[2:], given, files)
        return subprocess.CompletedProcess(command, code, files[1].read_text(), files[2].read_text())


def in_terminal(*arguments: str, environment: Mapping[str, str] | None = None, typed: str = "") -> Screen:
    """Run a command in a terminal of 100 columns, into which `typed` is typed."""
    given = {**os.environ, "PYTHONPATH": PYTHONPATH, "TERM": "xterm-256color", "COLUMNS": "100", **(environment or {})}
    with Terminal() as terminal:
        terminal.type(typed)
        code = _ask(["app_db", *arguments], given, [terminal.path] * 3)
        return Screen(code, terminal.read())


def _ask(command: list[str], environment: Mapping[str, str], files: Sequence[Path | str]) -> int:
    """Run a command whose stdin, stdout and stderr are these files."""
    what = {"command": command, "environment": environment, "place": str(Path.cwd()), "files": [*map(str, files)]}
    process = _forking.get(os.getpid())
    if process is None:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.commands"],
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        _forking[os.getpid()] = process
        atexit.register(_end)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(what).encode() + b"\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def _end() -> None:
    process = _forking.pop(os.getpid(), None)
    if process is not None:
        process.communicate()  # nothing more, which ends it


# ---- the process that forks ------------------------------------------------------------------------------------------------


def _run(command: list[str], environment: dict[str, str], place: str, files: list[str]) -> int:
    """Be `python -m` in a fork; return the exit code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    for number, path in enumerate(files):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOCTTY)
        os.dup2(file, number)
        os.close(file)
    module, *sys.argv[1:] = command
    sys.path[0] = place  # as `-m` has it, instead of the directory of this file
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _main() -> None:
    for name in (
        "app_db.container",
        *(f"app_db.cli.{path.stem}" for path in (ROOT / "app_db" / "cli").glob("_[a-z]*.py")),
        "app_db.migrations",
        "psycopg",
        "pymysql",
        *(f"sqlalchemy.dialects.{name}" for name in ("mysql", "postgresql", "sqlite")),
    ):
        import_module(name)
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            code = _run(**json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _main()
