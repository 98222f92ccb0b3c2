"""What the shop's tests need: its container. Everything else is the plugin's.

    pytest examples/shop_tests
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

from shop import checkout, mail, services, web
from shop.container import Container


@pytest.fixture(scope="session")
def app_db_container() -> Iterator[Container]:
    """The shop's container, wired; its databases are SQLite's unless the environment or an option says otherwise."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("WRITER", "WAREHOUSE", "LOG"):
            os.environ.setdefault(f"APP_DB_CONNECTIONS__{name}__URL", f"sqlite:///{directory}/{name.lower()}.db")
        os.environ.setdefault("APP_DB_CONNECTIONS__LOG__TRANSACTIONAL", "false")
        os.environ.setdefault("APP_DB_ATOMICITY", "best_effort")
        container = Container()
        container.wire(modules=[services, checkout, web])
        yield container
        container.unwire()
        container.shutdown_resources()


@pytest.fixture(autouse=True)
def letters() -> Iterator[list[tuple[str, str]]]:
    """The letters that the shop has sent in the test."""
    yield mail.sent
    mail.sent.clear()
