"""Tests with nothing but app_db's fixtures, each alike, so that what one leaves makes another fail."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy.orm import Session

from app_db.testing import CapturedHook, CapturedHooks, Isolation
from testing.beside.store import ORDERS, Order, container, count_orders, count_sales, place_order


@pytest.mark.app_db
@pytest.mark.parametrize("number", range(4))
def test_orders(number: int) -> None:
    for _ in range(number):
        place_order(number)
    assert (count_orders(), count_sales()) == (number, number)


def test_the_session_of_the_test(app_db_session: Session) -> None:
    app_db_session.add(Order(number=1))
    app_db_session.flush()
    place_order(2)
    assert app_db_session.scalar(ORDERS) == count_orders() == 2


def test_a_thread(app_db_isolation: Isolation) -> None:
    thread = threading.Thread(target=place_order, args=(1,))
    thread.start()
    thread.join()
    assert count_orders() == 1


def test_hooks(app_db_isolation: Isolation, app_db_hooks: CapturedHooks) -> None:
    with container.transaction() as unit:
        unit.on_commit(print, "A-1")
    assert app_db_hooks == [CapturedHook(print, "A-1")]


def test_an_error_rolls_back(app_db_isolation: Isolation) -> None:
    with pytest.raises(LookupError), container.transaction():
        place_order(1)
        raise LookupError
    assert (count_orders(), count_sales()) == (0, 0)
