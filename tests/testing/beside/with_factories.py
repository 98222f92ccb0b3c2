"""factory_boy, with the session of the test, the session of the unit, and the container's sessionmaker."""

from __future__ import annotations

from typing import Any

import pytest
from factory.alchemy import SQLAlchemyModelFactory
from factory.declarations import Sequence
from factory.faker import Faker
from sqlalchemy.orm import Session

from testing.beside.store import Order, Sale, container, count_orders, count_sales, place_order


class OrderFactory(SQLAlchemyModelFactory):
    class Meta:
        model = Order
        sqlalchemy_session_persistence = "flush"

    number = Sequence(lambda number: number)  # type: ignore[no-untyped-call]


class InUnit(OrderFactory):
    class Meta:
        sqlalchemy_session_factory = container.writer_session


class SaleFactory(SQLAlchemyModelFactory):
    class Meta:
        model = Sale
        sqlalchemy_session_factory = lambda: container.warehouse.sessionmaker()()  # noqa: E731  # of the test that runs
        sqlalchemy_session_persistence = "commit"

    number = Faker("random_int")  # type: ignore[no-untyped-call]


@pytest.fixture
def orders(app_db_session: Session) -> type[OrderFactory]:
    options: Any = OrderFactory._meta
    options.sqlalchemy_session = app_db_session
    return OrderFactory


def test_the_session_of_the_test(orders: type[OrderFactory]) -> None:
    orders.create_batch(3)
    assert count_orders() == 3


@pytest.mark.app_db
def test_the_session_of_the_unit() -> None:
    with container.transaction():
        InUnit.create_batch(2)
    with pytest.raises(LookupError), container.transaction():
        InUnit.create()
        raise LookupError
    assert count_orders() == 2


@pytest.mark.app_db
def test_the_sessionmaker_of_the_container() -> None:
    SaleFactory.create_batch(2)
    place_order(1)
    assert count_sales() == 3
