"""The tables come from the revisions of Alembic."""

from __future__ import annotations

import pytest
from sqlalchemy import inspect

from app_db.migrations import check
from testing.beside.fixtures import MIGRATIONS
from testing.beside.store import container, count_orders, place_order


@pytest.mark.app_db
def test_the_tables_are_those_of_the_revisions() -> None:
    assert set(inspect(container.writer.engine()).get_table_names()) == {"alembic_version", "orders"}
    place_order(1)
    assert count_orders() == 1


@pytest.mark.once
@pytest.mark.app_db(isolation=False)
@pytest.mark.usefixtures("app_db_tables")
def test_they_are_what_the_models_say() -> None:
    assert check(container, directory=MIGRATIONS)
