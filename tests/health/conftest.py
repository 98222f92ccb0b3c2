"""Containers for tests of their health."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db.settings import _urls


@pytest.fixture
def new_container() -> Iterator[Callable[..., DatabaseContainer]]:
    """`new_container(writer=url, log={...})` makes a container; all are shut down with the test."""
    with ExitStack() as stack:

        def new(**connections: str | Mapping[str, Any]) -> DatabaseContainer:
            given = {name: {"url": what} if isinstance(what, str) else dict(what) for name, what in connections.items()}
            container = container_of(*given)(settings=DatabaseSettings(_env_file=None, connections=given))
            stack.callback(container.shutdown_resources)
            return container

        yield new


@pytest.fixture
def only_for_coroutines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drivers for threads are not installed, as far as app_db can see."""
    for driver in ("psycopg", "pymysql"):
        monkeypatch.setitem(_urls._PACKAGES, driver, ("a_module_that_is_missing", "nothing"))
