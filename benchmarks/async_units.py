"""Units of work of coroutines, one at a time in one event loop."""

from __future__ import annotations

import asyncio

from async_contestants import checked_units, contestants, repeated
from contestants import can_do
from databases import Databases, Place
from measuring import Effort, measure
from units import heading_of_units, report_units
from workloads import MEASURED

ROUNDS = 100


def run(databases: Databases, effort: Effort) -> None:
    """Print a table for each driver and place."""
    for place in (databases.sqlite_memory("aiosqlite"), databases.sqlite_file("aiosqlite")):
        with place as given:
            _compare(given, effort)
    for driver in ("psycopg", "asyncpg"):
        for place in (databases.postgres_socket(driver), databases.postgres_proxy(driver)):
            with place as given:
                _compare(given, effort)
    with databases.mariadb("asyncmy") as mariadb:
        if mariadb is not None:
            _compare(mariadb, effort)


def _compare(place: Place, effort: Effort) -> None:
    with asyncio.Runner() as runner, contestants(place, runner) as taking_part:
        heading_of_units(f"{place.title}, coroutines")
        for workload in MEASURED:
            batches = {
                name: repeated(checked_units(name, unit_of, workload, effort, runner), runner)
                for name, unit_of in taking_part.items()
                if can_do(name, workload, place)
            }
            report_units(workload.title, batches, measure(batches, effort, rounds=ROUNDS))
