"""What it costs to commit in several databases at once, as a ratio to a plain commit in one of them.

Only the commit is timed: the rows have been flushed when the clock starts. Beside app_db stands zope.sqlalchemy, wired by hand
with `twophase=True`, which prepares one database after the other and commits one after the other.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import transaction
from schema import Base, Row, bare_engine
from sqlalchemy.orm import Session, sessionmaker
from zope.sqlalchemy import register

from app_db import DatabaseSettings, container_of

if TYPE_CHECKING:
    from app_db import DatabaseContainer
    from servers import PostgresServer

DATABASES = (1, 2, 4, 8)
ROUND_TRIPS = (0.0, 1.0)
ROUNDS = 41
FLOOR = 3.5
"""What eight databases at 1 ms may cost, as a ratio to one."""

Commit = Callable[[], float]
"""Writes a row in each database, commits, and returns the seconds that the commit took."""


def run() -> None:
    """Print the table."""
    from proxies import Proxy
    from servers import PostgresServer

    print("\nA commit in several databases: ratio to a plain commit in one")
    print(f"{'databases, round trip':<24}{'one':>10}{'table log':>12}{'file log':>12}{'zope by hand':>14}  floor")
    server = PostgresServer(settings={"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"})
    server.start()
    try:
        urls = [_created(server, f"shop{number}") for number in range(max(DATABASES))]
        for round_trip in ROUND_TRIPS:
            with Proxy(server, rtt=round_trip) as proxy:
                for count in DATABASES:
                    _measure([proxy.url(url) for url in urls[:count]], round_trip)
    finally:
        server.close()


def _created(server: PostgresServer, name: str) -> str:
    server.create_database(name)
    url = server.url(name)
    engine = bare_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()
    return url


def _measure(urls: list[str], round_trip: float) -> None:
    with ExitStack() as stack:
        one = stack.enter_context(_plain(urls[0]))
        others = [
            stack.enter_context(_app_db(urls, None)),
            stack.enter_context(_app_db(urls, f"file:{Path(stack.enter_context(tempfile.TemporaryDirectory())) / 'decisions'}")),
            stack.enter_context(_zope(urls)),
        ]
        rounds = [(one(), *(other() for other in others)) for _ in range(ROUNDS)][1:]
    plain = statistics.median(seconds for seconds, *_ in rounds)
    ratios = [statistics.median(row[column] / row[0] for row in rounds) for column in range(1, 4)]
    floor = f"≤ {FLOOR}{'  !' if min(ratios[:2]) > FLOOR else ''}" if len(urls) == max(DATABASES) and round_trip else ""
    cells = "".join(f"{ratio:>{width}.2f}" for ratio, width in zip(ratios, (12, 12, 14), strict=True))
    print(f"{f'{len(urls)}, {round_trip:g} ms':<24}{plain * 1000:>7.2f} ms{cells}  {floor}".rstrip())


@contextmanager
def _plain(url: str) -> Iterator[Commit]:
    engine = bare_engine(url)
    maker = sessionmaker(engine)

    def commit() -> float:
        with maker() as session:
            session.add(Row(text="written"))
            session.flush()
            began = time.perf_counter()
            session.commit()
            return time.perf_counter() - began

    yield commit
    engine.dispose()


@contextmanager
def _app_db(urls: list[str], decision_log: str | None) -> Iterator[Commit]:
    names = [f"shop{number}" for number in range(len(urls))]
    connections = {name: {"url": url, "two_phase": True} for name, url in zip(names, urls, strict=True)}
    settings = DatabaseSettings(_env_file=None, connections=connections, decision_log=decision_log)
    container: DatabaseContainer = container_of(*names)(settings=settings)
    container.check()

    def commit() -> float:
        with container.transaction():
            for name in names:
                session: Session = getattr(container, f"{name}_session")()
                session.add(Row(text="written"))
                session.flush()
            began = time.perf_counter()
        return time.perf_counter() - began

    yield commit
    container.shutdown_resources()


@contextmanager
def _zope(urls: list[str]) -> Iterator[Commit]:
    engines = [bare_engine(url) for url in urls]
    manager = transaction.TransactionManager(explicit=True)
    makers = [sessionmaker(engine, twophase=len(urls) > 1) for engine in engines]
    for maker in makers:
        register(maker, transaction_manager=manager)

    def commit() -> float:
        with manager:
            for maker in makers:
                session = maker()
                session.add(Row(text="written"))
                session.flush()
            began = time.perf_counter()
        return time.perf_counter() - began

    yield commit
    for engine in engines:
        engine.dispose()
