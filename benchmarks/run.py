"""Run the benchmarks named on the command line, or all of them."""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

NAMES = ("units", "routing", "async_units", "threads", "two_phase", "isolation", "imports", "building")
LIBRARIES = (
    "SQLAlchemy",
    "zope.sqlalchemy",
    "transaction",
    "dependency-injector",
    "pydantic-settings",
    "psycopg",
    "asyncpg",
    "aiosqlite",
)


def main(names: list[str]) -> None:
    """Print what the measuring stood on, then the tables."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the tests' PostgreSQL server
    print(f"Python {platform.python_version()}, " + ", ".join(f"{library} {version(library)}" for library in LIBRARIES))
    for name in names or NAMES:
        import_module(name).run()


if __name__ == "__main__":
    main(sys.argv[1:])
