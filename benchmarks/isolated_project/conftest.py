"""The tests of `isolated_tests.py`, in whichever way WAY names. It writes into SECONDS how long the tests alone took."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WAY, KIND, TESTS, URLS = os.environ["WAY"], os.environ["KIND"], int(os.environ["TESTS"]), json.loads(os.environ["URLS"])
_began = 0.0


def pytest_collection_finish() -> None:
    global _began  # noqa: PLW0603  # between two hooks
    _began = time.perf_counter()


def pytest_sessionfinish() -> None:
    Path(os.environ["SECONDS"]).write_text(str(time.perf_counter() - _began))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("number", range(TESTS))


if WAY in ("app_db", "recipe"):
    from shop import container, models
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    @pytest.fixture(scope="session")
    def app_db_container() -> Any:
        return container

    @pytest.fixture(scope="session")
    def engines() -> Iterator[list[Any]]:
        made = [create_engine(url) for url in URLS]
        for engine, model in zip(made, models, strict=True):
            model.metadata.create_all(engine)
        yield made
        for engine in made:
            engine.dispose()

    @pytest.fixture
    def sessions(engines: list[Any]) -> Iterator[list[Session]]:
        """SQLAlchemy's recipe: sessions that join an outer transaction with savepoints."""
        connections = [engine.connect() for engine in engines]
        outer = [connection.begin() for connection in connections]
        made = [Session(bind=connection, join_transaction_mode="create_savepoint") for connection in connections]
        yield made
        for session, transaction, connection in zip(made, outer, connections, strict=True):
            session.close()
            transaction.rollback()
            connection.close()
