"""Units of work a second of 8 threads on one pool."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from measuring import heading, report
from schema import bare_engine, prepared
from sqlalchemy.orm import sessionmaker
from units import insert, postgres_url

THREADS = 8
UNITS = 60
ROUNDS = 9


def run() -> None:
    """Print the table."""
    heading("8 threads on one pool", "units/s")
    with postgres_url() as url, prepared(url, pool_size=THREADS) as container:
        engine = bare_engine(url, pool_size=THREADS)
        bare = sessionmaker(engine)
        ours, plain = insert(container, bare)
        with ThreadPoolExecutor(THREADS) as pool:
            _rate(pool, ours), _rate(pool, plain)
            pairs = [(_rate(pool, ours), _rate(pool, plain)) for _ in range(ROUNDS)]
        engine.dispose()
    share = statistics.median(one / other for one, other in pairs)
    rates = [statistics.median(rates) for rates in zip(*pairs, strict=True)]
    report("PostgreSQL: INSERT (share of bare)", ours=f"{rates[0]:,.0f}", bare=f"{rates[1]:,.0f}", ratio=share, at_least=0.95)


def _rate(pool: ThreadPoolExecutor, unit: Callable[[], object]) -> float:
    def work(_: int) -> None:
        for _ in range(UNITS):
            unit()

    began = time.perf_counter()
    list(pool.map(work, range(THREADS)))
    return THREADS * UNITS / (time.perf_counter() - began)
