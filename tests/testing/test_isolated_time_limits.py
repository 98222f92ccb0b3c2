"""The time limit of a unit in an isolated test ends with the unit, although the connection goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from sqlalchemy import text

from app_db.testing import isolated
from harness.applications import running

LONG = text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT count(*) FROM n")


@pytest.mark.representative("sqlite")
def test_a_limit_does_not_stop_what_comes_after_its_unit(new_database_url: Callable[[], str]) -> None:
    with running(writer=new_database_url()) as app:
        with isolated(app.container):
            with app.unit(timeout=0.2):
                app.session().execute(text("SELECT 1"))
            time.sleep(0.3)
            with app.unit():
                assert app.session().scalar(LONG if app.engine().dialect.name == "sqlite" else text("SELECT 1")) is not None
        with app.unit():  # by the same connection
            assert app.session().scalar(LONG if app.engine().dialect.name == "sqlite" else text("SELECT 1")) is not None
