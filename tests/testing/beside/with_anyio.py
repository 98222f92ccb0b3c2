"""The plugin of anyio, with asyncio and with trio. SQLAlchemy's async engines can't be used under trio."""

from __future__ import annotations

import pytest
from anyio import create_task_group, to_thread
from sqlalchemy.ext.asyncio import AsyncSession

from app_db.errors import InvalidUse
from app_db.testing import Isolation
from testing.beside.store import Order, container, count_orders, count_orders_async, place_order, place_order_async

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


@pytest.fixture
async def an_order() -> None:
    await to_thread.run_sync(place_order, 1)


async def in_thread(number: int) -> None:
    await to_thread.run_sync(place_order, number)


@pytest.mark.app_db
async def test_sessions_for_threads(an_order: None) -> None:
    place_order(2)
    async with create_task_group() as tasks:
        for number in (3, 4):
            tasks.start_soon(in_thread, number)
    assert count_orders() == 4


async def test_coroutines(app_db_isolation: Isolation, anyio_backend_name: str) -> None:
    if anyio_backend_name == "trio":
        with pytest.raises(InvalidUse, match=r"need asyncio, and this coroutine runs under trio\. Use the sessions for threads"):
            await place_order_async(1)
    else:
        await place_order_async(1)
        assert await count_orders_async() == 1


async def test_the_session_of_the_test(app_db_async_session: AsyncSession, anyio_backend_name: str) -> None:
    app_db_async_session.add(Order(number=1))
    if anyio_backend_name == "trio":
        with pytest.raises(InvalidUse, match="this coroutine runs under trio"):
            await app_db_async_session.flush()
        app_db_async_session.expunge_all()
    else:
        await app_db_async_session.flush()
        assert await count_orders_async() == 1


@pytest.mark.app_db
async def test_engines_and_sessionmakers(anyio_backend_name: str) -> None:
    if anyio_backend_name == "trio":
        with pytest.raises(InvalidUse, match="this coroutine runs under trio"):
            container.writer.async_engine()
        with pytest.raises(InvalidUse, match="this coroutine runs under trio"):
            container.writer.async_sessionmaker()()
    else:
        async with container.writer.async_engine().connect(), container.writer.async_sessionmaker()():
            pass
