"""The line that sent a statement is the application's, and not that of a package which the application called."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import sqlmodel
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import text

from app_db import Connection, DatabaseContainer, DatabaseSettings


class Shop(DatabaseContainer):
    writer = Connection(session_class=sqlmodel.Session)


def by_sqlmodel(shop: Any) -> None:
    shop.writer.session().exec(text("SELECT 1"))


def by_pandas(shop: Any) -> None:
    pd.read_sql_query("SELECT 1", shop.writer.session().connection())


def by_alembic(shop: Any) -> None:
    Operations(MigrationContext.configure(shop.writer.session().connection())).execute("SELECT 1")


@pytest.mark.parametrize("send", [by_sqlmodel, by_pandas, by_alembic])
def test_a_slow_statement_names_the_line_that_called_the_package(
    send: Callable[[Any], None], sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    connections = {"writer": {"url": sqlite_url, "slow_statement": 1e-9}}
    shop = Shop(settings=DatabaseSettings(_env_file=None, connections=connections))
    with caplog.at_level(logging.WARNING, "app_db"), shop.transaction():
        send(shop)
    shop.shutdown_resources()
    [told] = [message for message in caplog.messages if message.endswith("SELECT 1")]
    assert f" in {send.__name__}: " in told
