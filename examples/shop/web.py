"""The shop as a web service. Its functions are coroutines, with sessions for coroutines, in the same units of work."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from app_db import Provide, UnitOfWork, transactional
from shop import mail
from shop.container import Container
from shop.models import Movement, Order
from shop.services import OutOfStockError


@transactional(attempts=3, backoff=0.01)
async def sell(
    customer: str,
    sku: str,
    quantity: int,
    *,
    session: AsyncSession = Provide[Container.writer.async_session],
    warehouse: AsyncSession = Provide[Container.warehouse.async_session],
    unit: UnitOfWork = Provide[Container.unit],
) -> int:
    """Sell to a customer, and return the number of the order."""
    warehouse.add(Movement(sku=sku, quantity=-quantity))
    if await in_stock(sku) < 0:
        raise OutOfStockError(sku)
    order = Order(sku=sku, quantity=quantity)
    session.add(order)
    await session.flush()
    unit.on_commit(mail.send, customer, f"Your order {order.id}: {quantity} {sku}.")
    return order.id


@transactional
async def deliver(sku: str, quantity: int, warehouse: AsyncSession = Provide[Container.warehouse.async_session]) -> None:
    """Put goods into the warehouse."""
    warehouse.add(Movement(sku=sku, quantity=quantity))


@transactional
async def in_stock(sku: str, warehouse: AsyncSession = Provide[Container.warehouse.async_session]) -> int:
    """Return how many there are, counting what the unit of work under way has done."""
    total = select(func.coalesce(func.sum(Movement.quantity), 0)).where(Movement.sku == sku)
    return int((await warehouse.scalars(total)).one())


async def post_order(request: Request) -> JSONResponse:
    """Sell what the request asks for, or say that there is not enough of it."""
    wanted = await request.json()
    try:
        number = await sell(wanted["customer"], wanted["sku"], wanted["quantity"])
    except OutOfStockError:
        return JSONResponse({"missing": wanted["sku"]}, status_code=409)
    return JSONResponse({"order": number}, status_code=201)


async def post_delivery(request: Request) -> JSONResponse:
    """Take in what was delivered."""
    delivered = await request.json()
    await deliver(delivered["sku"], delivered["quantity"])
    return JSONResponse({}, status_code=201)


async def get_stock(request: Request) -> JSONResponse:
    """Say how many there are."""
    return JSONResponse({"quantity": await in_stock(request.path_params["sku"])})


app = Starlette(
    routes=[
        Route("/orders", post_order, methods=["POST"]),
        Route("/deliveries", post_delivery, methods=["POST"]),
        Route("/stock/{sku}", get_stock),
    ]
)
