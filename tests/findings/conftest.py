"""Servers that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from harness.requiring import started
from harness.servers import PostgresServer, PostgresStandby, Server


@pytest.fixture(scope="package")
def small() -> Iterator[PostgresServer]:
    """A server that accepts 20 connections, 17 of them from ordinary users, and can prepare 5 transactions."""
    server = started(lambda: PostgresServer(settings={"max_connections": 20, "max_prepared_transactions": 5}))
    yield server
    server.close()


@pytest.fixture(scope="package")
def standby(small: PostgresServer) -> Iterator[PostgresStandby]:
    """A streaming replica of the small server."""
    server = started(lambda: PostgresStandby(small))
    yield server
    server.close()


@pytest.fixture
def lent() -> Iterator[Callable[[Server], str]]:
    """`lent(server)` is the name of an empty database, until the test ends."""
    with ExitStack() as stack:
        yield lambda server: stack.enter_context(server.lend_database())
