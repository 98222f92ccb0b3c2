"""The shop as a FastAPI application. `uvicorn shop.fastapi_app:app` starts it.

Each request is a unit of work. It commits if the response is below 400, before the client hears of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from sqlalchemy.ext.asyncio import AsyncSession

from app_db.integrations.fastapi import UnitOfWorkMiddleware, lifespan, provided
from shop import checkout, services
from shop.container import container
from shop.forms import Delivery, NewOrder, refusal
from shop.opening import open_shop

AsyncWarehouse = Annotated[AsyncSession, provided(container.warehouse.async_session)]


@asynccontextmanager
async def opened(app: FastAPI) -> AsyncGenerator[None]:
    """Open the shop when the server starts."""
    open_shop()
    yield


app = FastAPI(title="Shop", lifespan=lifespan(container, opened))  # it disposes the engines when the server stops
app.add_middleware(UnitOfWorkMiddleware, container=container, attempts=3, read_only_methods=("GET",))


@app.exception_handler(services.OutOfStockError)
@app.exception_handler(services.NoSuchGoodsError)
def refuse(request: Request, error: Exception) -> JSONResponse:
    """Say why not. The response is an error, so that nothing is kept."""
    content, status = refusal(error)
    return JSONResponse(content, status)


@app.get("/", include_in_schema=False)
def page() -> FileResponse:
    """Show the page."""
    return FileResponse(Path(__file__).with_name("page.html"))


@app.post("/orders", status_code=201)
def post_order(wanted: NewOrder) -> dict[str, int]:
    """Sell to a customer. A plain function runs in a thread, in the unit of its request."""
    return {"order": checkout.check_out(wanted.customer, wanted.sku, wanted.quantity)}


@app.post("/deliveries", status_code=201)
def post_delivery(delivered: Delivery) -> dict[str, int]:
    """Take in what was delivered."""
    services.receive(delivered.sku, delivered.quantity)
    return {"quantity": services.stock(delivered.sku)}


@app.get("/stock")
async def get_stock(warehouse: AsyncWarehouse) -> dict[str, int]:
    """Say how many there are of each. A coroutine has a session for coroutines, in the unit of its request, too."""
    return {sku: int(quantity) for sku, quantity in await warehouse.execute(services.STOCK)}
