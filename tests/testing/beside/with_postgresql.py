"""pytest-postgresql, with a database of the test's own beside that of the session."""

from __future__ import annotations

import psycopg
import pytest

from app_db.testing import isolated, overridden
from testing.beside.fixtures import url_of
from testing.beside.store import container, count_orders, place_order


def url(connection: psycopg.Connection) -> str:
    info = connection.info
    return url_of(info.host, info.port, info.user, info.dbname, info.password)


@pytest.mark.once
@pytest.mark.parametrize("number", range(2))
def test_a_test_that_commits_for_good(own_database: psycopg.Connection, number: int, tmp_path: object) -> None:
    """It is not isolated, and need not be marked: the other settings begin inside it."""
    with overridden(container, {"writer": url(own_database), "warehouse": f"sqlite:///{tmp_path}/facts.db"}):
        with container.transaction():
            container.writer.session().connection().exec_driver_sql("INSERT INTO orders (number, placed) VALUES (1, now())")
        assert own_database.execute("SELECT count(*) FROM orders").fetchone() == (1,)


@pytest.mark.once
def test_an_isolated_test_on_a_database_of_its_own(own_database: psycopg.Connection) -> None:
    with overridden(container, {"writer": url(own_database)}), isolated(container):
        with container.transaction():
            container.writer.session().connection().exec_driver_sql("INSERT INTO orders (number, placed) VALUES (1, now())")
        assert count_orders() == 1
        assert own_database.execute("SELECT count(*) FROM orders").fetchone() == (0,)


@pytest.mark.app_db
def test_the_database_of_the_session() -> None:
    place_order(1)
    assert count_orders() == 1
