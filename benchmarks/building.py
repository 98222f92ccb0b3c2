"""Building named connections, and the memory of an idle one, beside a bare engine plus sessionmaker. Nothing connects."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

from measuring import Comparison, compare, heading, report
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from app_db import DatabaseSettings, container_of

URL = "postgresql+psycopg://shop:secret@db.example/shop{}"
FLOOR = 1.50


COUNTS = (1, 10, 100)


def run() -> None:
    """Print the tables."""
    heading("Build named connections", "ms")
    for count in COUNTS:
        made = Containers(count)
        result = compare(made.build, bare(count), calls=1, rounds=41, before_round=made.renew)
        report_times(f"{count}: engine and sessionmaker", result, at_most=FLOOR)
    for count in COUNTS:
        report_times(
            f"{count}: the container itself as well", compare(Containers(count).build_anew, bare(count), calls=1, rounds=41)
        )
    heading("Memory of an idle connection", "KiB")
    made = Containers(100)
    mine, plain, whole = (_kibibytes(build, made.renew) / 100 for build in (made.build, bare(100), made.build_anew))
    report("1 of 100: engine and sessionmaker", ours=f"{mine:,.1f}", bare=f"{plain:,.1f}", ratio=mine / plain, at_most=FLOOR)
    report(
        "1 of 100: the container itself as well", ours=f"{whole:,.1f}", bare=f"{plain:,.1f}", ratio=whole / plain, at_most=FLOOR
    )


def report_times(what: str, result: Comparison, *, at_most: float | None = None) -> None:
    """Print how long both take."""
    report(what, ours=f"{result.ours * 1000:,.2f}", bare=f"{result.bare * 1000:,.2f}", ratio=result.ratio, at_most=at_most)


class Containers:
    """Makes containers with so many connections, and has them build an engine and a sessionmaker for each."""

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
