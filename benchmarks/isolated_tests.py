"""Isolated tests under pytest: the plugin of app_db beside SQLAlchemy's recipe and beside pytest-django's `django_db`.

Each figure is one run of pytest, without its start. `isolated_project/` is what it runs, on PostgreSQL. pytest-django is
installed into build/isolated_tests.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from databases import Databases
from measuring import Effort
from tables import duration, heading, line

PROJECT = Path(__file__).parent / "isolated_project"
VENV = Path(__file__).parents[1] / "build" / "isolated_tests"
RUNS = 3
KINDS = {"nothing": (1000, "tests that do nothing"), "writes": (400, "tests that write a row on each connection")}
CONNECTIONS = (1, 3, 10)
LIMIT = 1.10
"""What a test that does nothing may take, beside the recipe."""

RECIPE, OURS, DJANGO, NONE = "recipe", "app_db", "django", "none"
TITLES = {RECIPE: "SQLAlchemy's recipe", OURS: "app_db", DJANGO: "pytest-django", NONE: "no database"}
_HELD_OFF = ("asyncio", "randomly", "cacheprovider", "anyio", "hypothesispytest", "timeout")
OFF = [part for name in _HELD_OFF for part in ("-p", f"no:{name}")]

_numbers = count(1)


@dataclass(frozen=True)
class Case:
    """So many tests of one kind, on so many connections."""

    kind: str
    tests: int
    connections: int

    def __str__(self) -> str:
        return f"{self.tests:,} {KINDS[self.kind][1]}, {self.connections} connection{'s' if self.connections > 1 else ''}"


def run(databases: Databases, effort: Effort) -> None:
    """Print the table."""
    ways = [RECIPE, OURS, *([] if effort.quick else [DJANGO]), NONE]
    heading("Isolated tests under pytest", "tests", *(TITLES[way] for way in ways), "seconds of each run")
    with databases.postgres_socket("psycopg") as place, tempfile.TemporaryDirectory() as directory:
        for kind, (tests, _) in KINDS.items():
            for connections in CONNECTIONS[: 1 if effort.quick else None]:
                case = Case(kind, 5 if effort.quick else tests, connections)
                urls = {way: [place.new() for _ in range(connections)] for way in ways}
                _show(case, _measured(case, urls, Path(directory), 1 if effort.quick else RUNS))


def _measured(case: Case, urls: dict[str, list[str]], directory: Path, runs: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {way: [] for way in urls}
    for _ in range(runs):  # in turns
        for way, own in urls.items():
            taken[way].append(_seconds(way, case, own, directory))
    return taken


def _show(case: Case, taken: dict[str, list[float]]) -> None:
    ratios = {
        way: statistics.median(one / other for one, other in zip(seconds, taken[RECIPE], strict=True))
        for way, seconds in taken.items()
    }
    cells = {way: f"{ratio:.2f}" for way, ratio in ratios.items() if way != RECIPE}
    if case.kind == "nothing":
        cells[OURS] += f" of at most {LIMIT:.2f}{' **!**' if ratios[OURS] > LIMIT else ''}"
    runs = "; ".join(f"{TITLES[way]} {', '.join(f'{each:.2f}' for each in seconds)}" for way, seconds in taken.items())
    line([str(case), duration(statistics.median(taken[RECIPE])), *cells.values(), runs])


def _seconds(way: str, case: Case, urls: list[str], directory: Path) -> float:
    """Run pytest, and return how long its tests took."""
    seconds = directory / f"seconds{next(_numbers)}"
    given = {"WAY": way, "KIND": case.kind, "TESTS": str(case.tests), "URLS": json.dumps(urls), "SECONDS": str(seconds)}
    plugins = ["--ds=django_settings", "-p", "no:app_db"] if way == DJANGO else ["-p", "no:django"]
    command = [str(_python(way)), "-m", "pytest", "-q", "--rootdir", str(PROJECT), "-c", os.devnull, *OFF, *plugins, str(PROJECT)]
    environment = {**os.environ, **given, "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return float(seconds.read_text())


def _python(way: str) -> Path:
    if way != DJANGO:
        return Path(sys.executable)
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "django", "pytest-django", "psycopg[binary]"], check=True)
    return python
