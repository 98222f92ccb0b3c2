"""The shop's services commit in two databases and a log, in one thread and in several, and each test begins with nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from shop.checkout import check_out, check_out_what_there_is, unload
from shop.models import Entry, Movement, Order
from shop.services import OutOfStockError, ordered, place_order, receive, stock
from sqlalchemy import event, select
from sqlalchemy.orm import Session
from transaction.interfaces import TransientError

pytestmark = pytest.mark.app_db


def test_an_order_takes_goods_out_of_the_warehouse(app_db_session: Session) -> None:
    receive("tea", 10)
    place_order("tea", 3)
    assert (stock("tea"), ordered("tea")) == (7, 3)
    assert app_db_session.scalars(select(Order.sku)).all() == ["tea"]


def test_an_order_for_more_than_there_is_leaves_nothing_but_a_line_in_the_log(app_db_isolation: Any) -> None:
    receive("tea", 1)
    with pytest.raises(OutOfStockError):
        place_order("tea", 3)
    assert (stock("tea"), ordered("tea")) == (1, 0)
    with app_db_isolation.session("log") as log:
        assert log.scalars(select(Entry.text).order_by(Entry.id)).all() == ["receive 1 tea", "order 3 tea"]


def test_the_customer_is_written_to_once_it_is_certain(letters: list[tuple[str, str]]) -> None:
    receive("tea", 3)
    number = check_out("Ann", "tea", 2)
    with pytest.raises(OutOfStockError):
        check_out("Bob", "tea", 2)
    assert letters == [("Ann", f"Your order {number}: 2 tea.")]


def test_what_would_be_sent_can_be_seen_without_sending_it(letters: list[tuple[str, str]], app_db_hooks: Any) -> None:
    receive("tea", 1)
    check_out("Ann", "tea", 1)
    assert letters == []
    assert [hook.args[0] for hook in app_db_hooks] == ["Ann"]


def test_a_sale_that_fails_for_a_moment_is_tried_again(letters: list[tuple[str, str]]) -> None:
    receive("tea", 5)
    failures = [TransientError("another customer was quicker")] * 2

    def fail(mapper: Any, connection: Any, order: Any) -> None:
        if failures:
            raise failures.pop()

    event.listen(Order, "before_insert", fail)
    try:
        check_out("Ann", "tea", 1)
    finally:
        event.remove(Order, "before_insert", fail)
    assert (stock("tea"), ordered("tea"), len(letters)) == (4, 1, 1)


def test_what_is_missing_costs_nobody_the_rest() -> None:
    receive("tea", 1)
    receive("honey", 1)
    assert check_out_what_there_is("Ann", ["tea", "milk", "honey", "tea"]) == ["tea", "honey"]
    assert [ordered(sku) for sku in ("tea", "milk", "honey")] == [1, 0, 1]


def test_a_truck_is_unloaded_by_several_threads() -> None:
    unload([("tea", number) for number in range(1, 11)])
    assert stock("tea") == 55


def test_customers_who_come_at_once_get_no_more_than_there_is() -> None:
    receive("tea", 5)

    def buy(number: int) -> bool:
        try:
            check_out(f"customer {number}", "tea", 1)
        except OutOfStockError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(buy, range(8))) == 5
    assert (stock("tea"), ordered("tea")) == (0, 5)


def test_goods_that_the_test_has_put_there_are_there(app_db_isolation: Any) -> None:
    with app_db_isolation.session("warehouse") as warehouse:
        warehouse.add(Movement(sku="tea", quantity=4))
        warehouse.commit()
    assert stock("tea") == 4


@pytest.mark.parametrize("sku", ["tea", "honey", "milk"])
def test_each_test_begins_with_nothing(sku: str, app_db_session: Session) -> None:
    assert stock(sku) == 0
    assert app_db_session.scalars(select(Order)).all() == []
    receive(sku, 1)
