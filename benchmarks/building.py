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


def run() -> None:
    """Print the tables."""
    heading("Build named connections", "ms")
    for count in (1, 10, 100):
        result = compare(ours(count), bare(count), calls=max(1, 20 // count), rounds=11)
        report(f"{count} connections", f"{result.ours * 1000:,.2f}", f"{result.bare * 1000:,.2f}", result.ratio, f"≤ {FLOOR:.2f}", result.ratio <= FLOOR)
    heading("Memory of an idle connection", "KiB")
    mine, plain = (_kibibytes(build(100)) / 100 for build in (ours, bare))
    report("1 connection (of 100)", f"{mine:,.1f}", f"{plain:,.1f}", mine / plain, f"≤ {FLOOR:.2f}", mine / plain <= FLOOR)


def ours(count: int) -> Callable[[], Any]:
    """Return a function that makes a container and has it build an engine and a sessionmaker for every connection."""
    names = [f"shop_{number}" for number in range(count)]
    settings = DatabaseSettings(_env_file=None, connections={name: {"url": URL.format(name)} for name in names})
    container_class = container_of(*names)

    def build() -> Any:
        container = container_class(settings=settings)
        return container, [(container.providers[f"{name}_engine"](), container.providers[f"{name}_sessionmaker"]()) for name in names]

    return build


def bare(count: int) -> Callable[[], Any]:
    """Return a function that makes as many engines and sessionmakers by hand."""

    def build() -> Any:
        made = []
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
