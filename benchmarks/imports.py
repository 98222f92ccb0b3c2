"""What `import app_db` costs beside importing the libraries it stands on, each in a process of its
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from databases import Databases
from measuring import Batch, Effort, measure
from tables import duration, heading, limited, line

ROUNDS = 15
LIMIT = 1.10
TIMED = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"
OURS = "import app_db"
DEPENDENCIES = (
    "import sqlalchemy, sqlalchemy.orm, zope.sqlalchemy, transaction, pydantic_settings, "
    "dependency_injector.containers, dependency_injector.providers, dependency_injector.wiring"
)


def run(databases: Databases, effort: Effort) -> None:
    """Print the table. No database is used."""
    heading("Import", "what", "its 5 dependencies", "`import app_db`")
    with tempfile.TemporaryDirectory() as bytecode:
        environment = _writing_bytecode_to(bytecode)
        batches = {"dependencies": _imports(DEPENDENCIES, environment), "app_db": _imports(OURS, environment)}
        for batch in batches.values():
            batch(1)  # which compiles
        measured = measure(batches, effort, rounds=ROUNDS, units=1)
    line(["import", duration(measured["dependencies"].seconds), limited(measured["app_db"], LIMIT)])


def _writing_bytecode_to(directory: str) -> dict[str, str]:
    """Return an environment in which both sides find their bytecode, as installed packages do,
    whatever this process writes.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {"PYTHONPYCACHEPREFIX": directory}


def _imports(statement: str, environment: dict[str, str]) -> Batch:
    """Return what imports in new processes, which don't look for app_db in the working
    directory.
    """
    command = [sys.executable, "-P", "-c", TIMED.format(statement)]

    def batch(units: int) -> float:
        done = [subprocess.run(command, check=True, capture_output=True, text=True, env=environment) for _ in range(units)]
        return sum(float(one.stdout) for one in done)

    return batch
