"""Each test of a package runs on two databases, by itself and isolated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest
from sqlalchemy import MetaData

from app_db import Connection
from harness.shops import NewShop, Shop


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.exhaustive)])
def new_url(request: pytest.FixtureRequest) -> Callable[[], str]:
    name = "new_sqlite_url" if request.param == "sqlite" else "new_postgres_url"
    return cast("Callable[[], str]", request.getfixturevalue(name))


@pytest.fixture(params=["committing", "isolated"])
def new_shop(request: pytest.FixtureRequest, new_url: Callable[[], str]) -> Iterator[NewShop]:
    """Makes shops, whose tests commit or are isolated."""
    with ExitStack() as stack:

        def new(metadata: MetaData, *names: str, connection: Callable[[], Connection] = Connection, **settings: Any) -> Shop:
            urls = {name: new_url() for name in names or ("writer",)}
            shop = Shop(metadata, urls, connection, is_isolated=request.param == "isolated", **settings)
            stack.callback(shop.close)
            return shop

        yield new
