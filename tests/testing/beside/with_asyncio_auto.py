"""pytest-asyncio in the mode `auto`, in which coroutine functions need no mark."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from testing.beside.store import ORDERS, count_orders_async, place_order_async


@pytest.fixture
async def an_order() -> None:
    await place_order_async(1)


@pytest.mark.app_db
async def test_a_coroutine(an_order: None) -> None:
    await place_order_async(2)
    assert await count_orders_async() == 2


async def test_the_session_of_the_test(app_db_async_session: AsyncSession, an_order: None) -> None:
    assert await app_db_async_session.scalar(ORDERS) == 1
