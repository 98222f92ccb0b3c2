"""Databases with a table of items, for tests of units of work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from app_db import DatabaseContainer
from harness.choosing import mostly
from harness.coroutines import DRIVERS, Either, opened_either, url_for
from harness.items import Databases, opened


@pytest.fixture
def databases(sqlite_url: str) -> Iterator[Databases]:
    with opened({"writer": sqlite_url}) as databases:
        yield databases


@pytest.fixture
def container(databases: Databases) -> DatabaseContainer:
    return databases.container


@pytest.fixture(params=["sqlite", *mostly(DRIVERS, exhaustive="psycopg")])
def either(request: pytest.FixtureRequest) -> Iterator[Either]:
    """Databases of threads, or of coroutines."""
    with opened_either({"writer": url_for(request.param, request)}, request.param) as databases:
        yield databases


@pytest.fixture
def ran() -> list[Any]:
    """What hooks and attempts note down."""
    return []
