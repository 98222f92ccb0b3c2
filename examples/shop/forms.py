"""What the web applications are asked for, and how they refuse: the same in each of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, ValidationError

from shop.services import NoSuchGoodsError, OutOfStockError

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40)]
Quantity = Annotated[int, Field(ge=1, le=1_000_000)]


class Delivery(BaseModel):
    """Goods that are delivered."""

    sku: Name
    quantity: Quantity


class NewOrder(Delivery):
    """What a customer orders."""

    customer: Name


def refusal(error: Exception) -> tuple[dict[str, Any], int]:
    """Return what the client is told about an error, and the status: FastAPI's form of it."""
    match error:
        case OutOfStockError():
            return {"detail": f"There is not enough {error} in the warehouse."}, 409
        case NoSuchGoodsError():
            return {"detail": f"The shop does not sell {error}."}, 422
        case ValidationError():
            return {"detail": error.errors(include_url=False, include_context=False, include_input=False)}, 422
        case _:
            raise error
