"""What the shop's tests need: its container. Everything else is the plugin's.

    pytest examples/shop_tests
    pytest examples/shop_tests/test_flask_app.py
    pytest examples/shop_tests --app-db-url writer=postgresql://... --app-db-url warehouse=postgresql://...

The services commit, and nothing is left in any database: each test is isolated, because `pytestmark` in its module says so.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from dependency_injector import providers
from shop import checkout, services
from shop.container import Container, container


@pytest.fixture(scope="session")
def app_db_container() -> Iterator[Container]:
    """The shop's container, wired; its databases are SQLite's unless the environment or an option says otherwise."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("WRITER", "WAREHOUSE", "LOG"):
            os.environ.setdefault(f"APP_DB_CONNECTIONS__{name}__URL", f"sqlite:///{directory}/{name.lower()}.db")
        os.environ.setdefault("APP_DB_CONNECTIONS__LOG__TRANSACTIONAL", "false")
        os.environ.setdefault("APP_DB_ATOMICITY", "best_effort")
        container.wire(modules=[services, checkout])
        yield container
        container.unwire()
        container.shutdown_resources()


@pytest.fixture(autouse=True)
def letters() -> Iterator[list[tuple[str, str]]]:
    """The letters that the shop would have sent in the test: it has another post office."""
    kept: list[tuple[str, str]] = []

    def keep(customer: str, text: str) -> None:
        kept.append((customer, text))

    with container.post.override(providers.Object(keep)):
        yield kept
