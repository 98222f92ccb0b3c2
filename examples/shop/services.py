"""What the shop does. A function asks for the sessions it needs, and leaves the committing to its unit of work."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app_db import Provide, transactional
from shop.container import Container
from shop.models import Entry, Movement, Order

STOCK = select(Movement.sku, func.sum(Movement.quantity)).group_by(Movement.sku).order_by(Movement.sku)
"""How many there are of each."""


class OutOfStockError(Exception):
    """The warehouse has less than was ordered."""


class NoSuchGoodsError(Exception):
    """The shop has never had what was ordered."""


@transactional
def note(text: str, log: Session = Provide[Container.log.session]) -> None:
    """Write a line to the log. Called by another service, it is a part of that one's unit of work."""
    log.add(Entry(text=text))


@transactional
def receive(
    sku: str,
    quantity: int,
    warehouse: Session = Provide[Container.warehouse.session],
) -> None:
    """Put goods into the warehouse."""
    note(f"receive {quantity} {sku}")
    warehouse.add(Movement(sku=sku, quantity=quantity))


@transactional
def place_order(
    sku: str,
    quantity: int,
    session: Session = Provide[Container.writer.session],
    warehouse: Session = Provide[Container.warehouse.session],
) -> None:
    """Take an order, and the goods out of the warehouse."""
    note(f"order {quantity} {sku}")
    session.add(Order(sku=sku, quantity=quantity))
    warehouse.add(Movement(sku=sku, quantity=-quantity))
    if stock(sku) < 0:
        raise OutOfStockError(sku)


@transactional
def stock(sku: str, warehouse: Session = Provide[Container.warehouse.session]) -> int:
    """Return how many there are, counting what the unit of work under way has done."""
    total = select(func.coalesce(func.sum(Movement.quantity), 0)).where(Movement.sku == sku)
    return int(warehouse.scalars(total).one())  # MariaDB says Decimal


@transactional
def goods(warehouse: Session = Provide[Container.warehouse.session]) -> dict[str, int]:
    """Return how many there are of each."""
    return {sku: int(quantity) for sku, quantity in warehouse.execute(STOCK)}


@transactional
def is_sold_here(sku: str, warehouse: Session = Provide[Container.warehouse.session]) -> bool:
    """Return whether there has ever been any."""
    return warehouse.scalars(select(Movement.id).where(Movement.sku == sku).limit(1)).first() is not None


@transactional
def ordered(sku: str, session: Session = Provide[Container.reader.session]) -> int:
    """Return how many have been ordered, as the reader sees it."""
    total = select(func.coalesce(func.sum(Order.quantity), 0)).where(Order.sku == sku)
    return int(session.scalars(total).one())
