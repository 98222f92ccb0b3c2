"""What it costs to commit in several databases at once, as a ratio to a plain commit in one of
them.

Only the commit is timed: the rows have been flushed when the clock starts. Beside app_db stands
zope.sqlalchemy, wired by hand with `twophase=True`, which prepares one database after the other and
commits one after the other.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import transaction
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker
from zope.sqlalchemy import register

from app_db import DatabaseSettings, container_of
from contestants import add_first_row
from databases import Databases
from measuring import WARM_UP, Batch, Effort, measure
from schema import Row
from tables import duration, heading, limited, line

if TYPE_CHECKING:
    from app_db import DatabaseContainer

DATABASES = (1, 2, 4, 8)
ROUND_TRIPS = (0.0, 1.0)
ROUNDS = 60
LIMIT = 3.5
"""What eight databases at 1 ms may cost, as a ratio to one."""

ONE, TABLE, FILE, BY_HAND = "plain commit in one", "decisions in a table", "decisions in a file", "zope by hand"

Commit = Callable[[], float]
"""Writes a row in each database, commits, and returns the seconds that the commit took."""


def run(databases: Databases, effort: Effort) -> None:
    """Print the table."""
    heading("A commit in several databases", "databases, round trip", ONE, TABLE, FILE, BY_HAND)
    for round_trip in ROUND_TRIPS:
        with databases.postgres_proxy("psycopg", round_trip=round_trip) as place:
            urls = [place.new() for _ in range(max(DATABASES))]
            for url in urls:
                engine = create_engine(url)
                add_first_row(engine)
                engine.dispose()
            for count in DATABASES:
                _compare(urls[:count], round_trip, effort)


def _compare(urls: list[str], round_trip: float, effort: Effort) -> None:
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "decisions"
        batches = {
            ONE: _repeated(stack.enter_context(_plain(urls[0]))),
            TABLE: _repeated(stack.enter_context(_app_db(urls, None))),
            FILE: _repeated(stack.enter_context(_app_db(urls, f"file:{file}"))),
            BY_HAND: _repeated(stack.enter_context(_zope(urls))),
        }
        for batch in batches.values():
            batch(1 if effort.quick else WARM_UP)
        measured = measure(batches, effort, rounds=ROUNDS, units=1)
    has_limit = len(urls) == max(DATABASES) and round_trip > 0
    ratios = [limited(measured[FILE], LIMIT) if has_limit and name is FILE else str(measured[name]) for name in (TABLE, FILE)]
    line([f"{len(urls)}, {round_trip:g} ms", duration(measured[ONE].seconds), *ratios, str(measured[BY_HAND])])


def _repeated(commit: Commit) -> Batch:
    return lambda units: sum(commit() for _ in range(units))


@contextmanager
def _plain(url: str) -> Iterator[Commit]:
    engine = create_engine(url)
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
    engines = [create_engine(url) for url in urls]
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
