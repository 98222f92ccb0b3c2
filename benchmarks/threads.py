"""Units of work of 8 threads on one pool. The threads share an interpreter, so the share is that of
the processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from contestants import BARE, checked_units, contestants
from databases import Databases
from measuring import WARM_UP, Batch, Effort, measure
from tables import duration, heading, line
from workloads import INSERT, SELECT

THREADS = 8
ROUNDS = 40
BATCH = 0.03


def run(databases: Databases, effort: Effort) -> None:
    """Print the table."""
    with (
        databases.postgres_socket("psycopg") as place,
        contestants(place, pool_size=THREADS) as taking_part,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        heading(f"{THREADS} threads on one pool, {place.title}", "unit of work", *taking_part)
        for workload in (SELECT, INSERT):
            batches = {
                name: _in_threads(pool, checked_units(name, unit_of, workload, effort)) for name, unit_of in taking_part.items()
            }
            for batch in batches.values():
                batch(1 if effort.quick else WARM_UP)  # which connects each thread
            measured = measure(batches, effort, rounds=ROUNDS, seconds=BATCH)
            ratios = [str(result) for name, result in measured.items() if name != BARE]
            line([workload.title, duration(measured[BARE].seconds / THREADS), *ratios])


def _in_threads(pool: ThreadPoolExecutor, unit: Callable[[], object]) -> Batch:
    """Return what has each thread do so many units."""

    def batch(units: int) -> float:
        def work(_: int) -> None:
            for _ in range(units):
                unit()

        began = time.perf_counter()
        list(pool.map(work, range(THREADS)))
        return time.perf_counter() - began

    return batch
