"""freezegun and time-machine: the time of rows is theirs, and limits go by the real clock."""

from __future__ import annotations

from datetime import datetime

import pytest
import time_machine
from freezegun import freeze_time
from sqlalchemy import select
from sqlalchemy.orm import Session

from app_db.testing import Isolation
from testing.beside.store import Order, container, count_orders, place_order, place_order_async

MOMENT = "2001-02-03 04:05:06"


@freeze_time(MOMENT)
def test_freezegun_as_a_decorator(app_db_session: Session) -> None:
    place_order(1)
    assert app_db_session.scalar(select(Order.placed)) == datetime.fromisoformat(MOMENT)


@pytest.mark.app_db
def test_freezegun_as_a_block() -> None:
    with freeze_time(MOMENT) as clock:
        place_order(1)
        clock.tick(86400)
        with container.transaction(timeout=5):
            place_order(2)
            orders = container.writer.session().scalars(select(Order.placed).order_by(Order.number)).all()
    assert [order.day for order in orders] == [3, 4]


@time_machine.travel(MOMENT, tick=False)
def test_time_machine(app_db_session: Session) -> None:
    with container.transaction(timeout=5):
        place_order(1)
    assert app_db_session.scalar(select(Order.placed)) == datetime.fromisoformat(MOMENT)


@pytest.mark.asyncio
async def test_freezegun_and_coroutines(app_db_isolation: Isolation) -> None:
    with freeze_time(MOMENT, real_asyncio=True):
        await place_order_async(1)
        assert count_orders() == 1
