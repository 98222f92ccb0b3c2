"""What a test needs and this machine may not have: without it the test is skipped, or fails where nothing may be missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NoReturn, TypeVar

import pytest

from servers import Server, ServerMissing

S = TypeVar("S", bound=Server)

REQUIRE_SERVERS = "APP_DB_TEST_REQUIRE_SERVERS"
REQUIRED = os.environ.get(REQUIRE_SERVERS, "") not in ("", "0")
"""Whether what is missing is a failure."""


def started(make: Callable[[], S]) -> S:
    """Make a server and start it."""
    try:
        server = make()
    except ServerMissing as missing:
        _do_without(str(missing))
    try:
        return server.start()
    except BaseException:
        server.close()
        raise


def need(*modules: str) -> None:
    """Go on only where modules of the group `test` are installed."""
    for module in modules:
        if find_spec(module) is None:
            _do_without(f"{module} is not installed: `pip install --group test` does that")


def _do_without(problem: str) -> NoReturn:
    if REQUIRED:
        pytest.fail(f"{problem}; {REQUIRE_SERVERS} is set", pytrace=False)
    pytest.skip(problem)
