"""What happens when a customer buys: tried again if another one was quicker, confirmed by a letter once it is certain."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from dependency_injector.wiring import inject
from sqlalchemy.orm import Session

from app_db import Provide, UnitOfWork, transactional
from shop.container import Container
from shop.models import Movement, Order
from shop.services import NoSuchGoodsError, OutOfStockError, is_sold_here, receive, stock

Post = Callable[[str, str], object]
"""Sends a customer a letter."""


@transactional(attempts=3, backoff=0.01)
def check_out(
    customer: str,
    sku: str,
    quantity: int,
    *,
    session: Session = Provide[Container.writer.session],
    warehouse: Session = Provide[Container.warehouse.session],
    unit: UnitOfWork = Provide[Container.unit],
    post: Post = Provide[Container.post],
) -> int:
    """Sell to a customer, and return the number of the order."""
    if not is_sold_here(sku):
        raise NoSuchGoodsError(sku)
    warehouse.add(Movement(sku=sku, quantity=-quantity))
    if stock(sku) < 0:
        raise OutOfStockError(sku)
    order = Order(sku=sku, quantity=quantity)
    session.add(order)
    session.flush()
    unit.on_commit(post, customer, f"Your order {order.id}: {quantity} {sku}.")
    return order.id


@transactional
def check_out_what_there_is(
    customer: str,
    skus: Iterable[str],
    *,
    unit: UnitOfWork = Provide[Container.unit],
    post: Post = Provide[Container.post],
) -> list[str]:
    """Sell one of each, as far as there is one, and return what was sold. What is missing costs nobody the rest."""
    sold: list[str] = []
    for sku in skus:
        savepoint = unit.savepoint()
        try:
            _sell(sku)
        except OutOfStockError:
            savepoint.rollback()
        else:
            sold.append(sku)
    unit.on_commit(post, customer, f"Sold: {', '.join(sold)}.")
    return sold


@inject
def _sell(
    sku: str,
    session: Session = Provide[Container.writer.session],
    warehouse: Session = Provide[Container.warehouse.session],
) -> None:
    session.add(Order(sku=sku, quantity=1))
    warehouse.add(Movement(sku=sku, quantity=-1))
    if stock(sku) < 0:
        raise OutOfStockError(sku)


def unload(deliveries: Iterable[tuple[str, int]], workers: int = 4) -> None:
    """Put a truck's deliveries into the warehouse, several at a time, each in a unit of work of its own."""
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(receive, sku, quantity) for sku, quantity in deliveries]:
            done.result()
