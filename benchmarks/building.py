"""Building named connections, and the memory of an idle one, beside a bare engine plus sessionmaker. Nothing connects."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

from measuring import compare, heading, report
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
        report_times(f"{count}: engine and sessionmaker", ours(count), bare(count), count, at_most=FLOOR)
    for count in COUNTS:
        report_times(f"{count}: the container itself as well", ours(count, anew=True), bare(count), count)
    heading("Memory of an idle connection", "KiB")
    mine, plain = (_kibibytes(build) / 100 for build in (ours(100), bare(100)))
    report("1 of 100: engine and sessionmaker", ours=f"{mine:,.1f}", bare=f"{plain:,.1f}", ratio=mine / plain, at_most=FLOOR)
    whole = _kibibytes(ours(100, anew=True)) / 100
    report("1 of 100: with its share of the container", ours=f"{whole:,.1f}", bare=f"{plain:,.1f}", ratio=whole / plain)


def report_times(
    what: str, mine: Callable[[], Any], plain: Callable[[], Any], count: int, *, at_most: float | None = None
) -> None:
    """Print how long both take."""
    result = compare(mine, plain, calls=max(1, 20 // count), rounds=15)
    report(what, ours=f"{result.ours * 1000:,.2f}", bare=f"{result.bare * 1000:,.2f}", ratio=result.ratio, at_most=at_most)


def ours(count: int, *, anew: bool = False) -> Callable[[], Any]:
    """Return a function that has a container build an engine and a sessionmaker for every connection; `anew`, a new container."""
    names = [f"shop_{number}" for number in range(count)]
    settings = DatabaseSettings(_env_file=None, connections={name: {"url": URL.format(name)} for name in names})
    container_class = container_of(*names)
    kept = container_class(settings=settings)

    def build() -> Any:
        container = container_class(settings=settings) if anew else kept
        container.reset_singletons()
        made = [(container.providers[f"{name}_engine"](), container.providers[f"{name}_sessionmaker"]()) for name in names]
        return container, made

    return build


def bare(count: int) -> Callable[[], Any]:
    """Return a function that makes as many engines and sessionmakers by hand."""

    def build() -> Any:
        made: list[Any] = []
        for number in range(count):
            engine = create_engine(URL.format(number))
            made.append((engine, sessionmaker(engine)))
        return made

    return build


def _kibibytes(build: Callable[[], Any]) -> float:
    build()
    gc.collect()
    tracemalloc.start()
    kept = build()
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return used / 1024
