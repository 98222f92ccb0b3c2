"""What `import app_db` costs beside importing the libraries it stands on, each in a process of its own."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

from measuring import heading, report

ROUNDS = 15
TIMED = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"
OURS = "import app_db"
DEPENDENCIES = (
    "import sqlalchemy, sqlalchemy.orm, zope.sqlalchemy, transaction, pydantic_settings, "
    "dependency_injector.containers, dependency_injector.providers, dependency_injector.wiring"
)


def run() -> None:
    """Print the table."""
    heading("Import", "ms")
    with tempfile.TemporaryDirectory() as bytecode:
        pairs = _pairs(_writing_bytecode_to(bytecode))
    ratio = statistics.median(one / other for one, other in pairs)
    ours, bare = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    report("import app_db, beside its 5 dependencies", ours=f"{ours:,.0f}", bare=f"{bare:,.0f}", ratio=ratio, at_most=1.10)


def _writing_bytecode_to(directory: str) -> dict[str, str]:
    """Return an environment in which both sides find their bytecode, as installed packages do, whatever this process writes."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {"PYTHONPYCACHEPREFIX": directory}


def _pairs(environment: dict[str, str]) -> list[tuple[float, float]]:
    _seconds(OURS, environment), _seconds(DEPENDENCIES, environment)  # which compile
    return [(_seconds(OURS, environment), _seconds(DEPENDENCIES, environment)) for _ in range(ROUNDS)]


def _seconds(statement: str, environment: dict[str, str]) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
