"""pytest-asyncio, in both modes."""

from __future__ import annotations

import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncSession

from testing.beside.store import ORDERS, Order, count_orders, count_orders_async, place_order, place_order_async

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def an_order() -> None:
    await place_order_async(1)


@pytest.mark.app_db
async def test_a_coroutine() -> None:
    await place_order_async(1)
    assert await count_orders_async() == 1


@pytest.mark.app_db
async def test_a_fixture(an_order: None) -> None:
    assert await count_orders_async() == 1


async def test_the_session_of_the_test(app_db_async_session: AsyncSession) -> None:
    app_db_async_session.add(Order(number=1))
    await app_db_async_session.flush()
    await place_order_async(2)
    assert await app_db_async_session.scalar(ORDERS) == 2


@pytest.mark.app_db
async def test_both_kinds_of_session() -> None:
    place_order(1)
    await place_order_async(2)
    assert count_orders() == await count_orders_async() == 2
