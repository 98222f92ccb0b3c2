"""Run the benchmarks named on the command line, or all of them, and print their tables in
Markdown.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the tests' servers and their proxy

from databases import Databases
from measuring import Effort, pin_client, pinning

NAMES = (
    "units",
    "async_units",
    "threads",
    "readers",
    "routing",
    "two_phase",
    "isolation",
    "isolated_tests",
    "fresh",
    "imports",
    "building",
    "holders",
    "web",
)
LIBRARIES = (
    "SQLAlchemy",
    "zope.sqlalchemy",
    "transaction",
    "dependency-injector",
    "pydantic-settings",
    "psycopg",
    "asyncpg",
    "aiosqlite",
    "PyMySQL",
    "asyncmy",
    "starlette",
    "fastapi",
    "flask",
    "uvicorn",
    "waitress",
)


def main() -> None:
    """Print what the measuring stood on, then the tables."""
    arguments = _arguments()
    names = arguments.names or NAMES
    effort = Effort(rounds=arguments.rounds, quick=arguments.quick)
    pin_client()
    print(_stood_on(names, effort))
    with Databases() as databases:
        for name in names:
            import_module(name).run(databases, effort)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}; all of them if none is named")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison, instead of each benchmark's own number")
    parser.add_argument("--quick", action="store_true", help="the fewest rounds: to see that all still run, not how fast")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds takes a number of at least 1")
    return arguments


def _stood_on(names: Sequence[str], effort: Effort) -> str:
    """Return the command, the date, what else keeps the machine busy, and the versions."""
    options = (["--quick"] if effort.quick else []) + ([f"--rounds {effort.rounds}"] if effort.rounds else [])
    command = " ".join(["python benchmarks/run.py", *(names if tuple(names) != NAMES else []), *options])
    libraries = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    when = f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {pinning()}, load average {load} at the start"
    return f"`{command}`, {when}.\n\nPython {platform.python_version()}, {libraries}."


if __name__ == "__main__":
    main()
