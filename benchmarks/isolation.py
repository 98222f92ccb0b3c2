"""Isolated tests: app_db beside SQLAlchemy's own recipe, a session that joins an outer transaction with savepoints."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from measuring import heading
from schema import Row, Shop, prepared
from sqlalchemy.orm import Session
from units import postgres_url

from app_db import DatabaseSettings
from app_db.testing import isolated

TESTS = 300
FLOOR = 2.0
"""Milliseconds more than the recipe that an isolated test may take."""


def run() -> None:
    """Print the table."""
    heading("An isolated test that commits a row", "ms")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as servers:
        _measure("SQLite", f"sqlite:///{Path(directory) / 'shop.db'}")
        _measure("PostgreSQL, psycopg", servers.enter_context(postgres_url()))


def _measure(name: str, url: str) -> None:
    with prepared(url):
        container = Shop(settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": url}}))
        engine = container.writer_engine()

        def recipe() -> None:
            with engine.connect() as connection, connection.begin() as outer:
                with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
                    session.add(Row(text="written"))
                    session.commit()
                outer.rollback()

        def ours() -> None:
            with isolated(container), container.transaction():
                container.writer_session().add(Row(text="written"))

        _report(name, [(_milliseconds(ours), _milliseconds(recipe)) for _ in range(TESTS)][TESTS // 10 :])
        container.shutdown_resources()


def _milliseconds(test: Callable[[], None]) -> float:
    start = time.perf_counter()
    test()
    return 1000 * (time.perf_counter() - start)


def _report(name: str, pairs: list[tuple[float, float]]) -> None:
    ours, recipe = (statistics.median(column) for column in zip(*pairs, strict=True))
    missed = "!" if ours - recipe > FLOOR else ""
    print(f"{name:<44} {ours:>12.3f} {recipe:>12.3f} {ours / recipe:>7.2f}  {ours - recipe:+.3f} ms {missed}".rstrip())


if __name__ == "__main__":
    run()
