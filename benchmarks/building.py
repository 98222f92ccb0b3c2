"""Building named connections, and the memory of an idle one, beside a bare engine plus
sessionmaker. Nothing connects.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from app_db import DatabaseSettings, container_of
from databases import Databases
from measuring import Batch, Effort, measure
from tables import duration, heading, limited, line

URL = "postgresql+psycopg://shop:secret@db.example/shop{}"
LIMIT = 1.50
COUNTS = (1, 10, 100)
ROUNDS = 40


def run(databases: Databases, effort: Effort) -> None:
    """Print the tables. No database is used."""
    heading("Build named connections", "connections", "bare", "engine and sessionmaker", "the container as well")
    for count in COUNTS:
        made = Containers(count)
        batches = {
            "bare": _timed(bare(count)),
            "built": _timed(made.build, made.renew),
            "anew": _timed(made.build_anew),
        }
        for batch in batches.values():
            batch(1)
        measured = measure(batches, effort, rounds=ROUNDS, units=1)
        line([str(count), duration(measured["bare"].seconds), limited(measured["built"], LIMIT), str(measured["anew"])])
    heading("Memory of an idle connection", "what", "bare", "engine and sessionmaker", "the container as well")
    made = Containers(100)
    plain, mine, whole = (_kibibytes(build, made.renew) / 100 for build in (bare(100), made.build, made.build_anew))
    mark = " **!**" if mine / plain > LIMIT else ""
    line(["1 of 100", f"{plain:,.1f} KiB", f"{mine / plain:.2f} of at most {LIMIT:.2f}{mark}", f"{whole / plain:.2f}"])


class Containers:
    """Makes containers with so many connections, and has them build an engine and a sessionmaker
    for each.
    """

    def __init__(self, count: int) -> None:
        self._names = [f"shop_{number}" for number in range(count)]
        self._settings = DatabaseSettings(_env_file=None, connections={name: {"url": URL.format(name)} for name in self._names})
        self._class = container_of(*self._names)
        self._container = self._class(settings=self._settings)

    def renew(self) -> None:
        """Take a container that has built nothing yet."""
        self._container = self._class(settings=self._settings)

    def build(self) -> Any:
        """Build everything of the container."""
        container = self._container
        return [(container.providers[f"{name}_engine"](), container.providers[f"{name}_sessionmaker"]()) for name in self._names]

    def build_anew(self) -> Any:
        """Build everything, and the container before."""
        self.renew()
        return self.build()


def bare(count: int) -> Callable[[], Any]:
    """Return a function that makes as many engines and sessionmakers by hand."""

    def build() -> Any:
        made: list[Any] = []
        for number in range(count):
            engine = create_engine(URL.format(number))
            made.append((engine, sessionmaker(engine)))
        return made

    return build


def _timed(build: Callable[[], Any], before: Callable[[], object] = lambda: None) -> Batch:
    """Return what builds, without the time of what it needs before."""

    def batch(units: int) -> float:
        seconds = 0.0
        for _ in range(units):
            before()
            gc.collect()  # the garbage of that is not the build's
            began = time.perf_counter()
            build()
            seconds += time.perf_counter() - began
        return seconds

    return batch


def _kibibytes(build: Callable[[], Any], before: Callable[[], object]) -> float:
    build()
    before()
    gc.collect()
    tracemalloc.start()
    kept = build()
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return used / 1024
