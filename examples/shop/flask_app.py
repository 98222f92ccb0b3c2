"""The shop as a Flask application. `waitress-serve --call shop.flask_app:create_app` starts it.

Each request is a unit of work. It commits if the response is below 400, before the client hears of it.
"""

from __future__ import annotations

import atexit
from typing import Any

from flask import Blueprint, Flask, request
from pydantic import ValidationError

from app_db.integrations.flask import AppDb
from shop import checkout, services
from shop.container import container
from shop.forms import Delivery, NewOrder, refusal
from shop.opening import open_shop

shop = Blueprint("shop", __name__)


def create_app() -> Flask:
    """Return the application. The databases are closed when the process ends."""
    open_shop()
    container.init_resources()
    atexit.register(container.shutdown_resources)
    app = Flask(__name__)
    AppDb(container, attempts=3, read_only_methods=("GET",)).init_app(app)
    app.register_blueprint(shop)
    return app


@shop.app_errorhandler(services.OutOfStockError)
@shop.app_errorhandler(services.NoSuchGoodsError)
@shop.app_errorhandler(ValidationError)
def refuse(error: Exception) -> tuple[dict[str, Any], int]:
    """Say why not. The response is an error, so that nothing is kept."""
    return refusal(error)


@shop.post("/orders")
def post_order() -> tuple[dict[str, int], int]:
    """Sell to a customer."""
    wanted = NewOrder.model_validate_json(request.get_data())
    return {"order": checkout.check_out(wanted.customer, wanted.sku, wanted.quantity)}, 201


@shop.post("/deliveries")
def post_delivery() -> tuple[dict[str, int], int]:
    """Take in what was delivered."""
    delivered = Delivery.model_validate_json(request.get_data())
    services.receive(delivered.sku, delivered.quantity)
    return {"quantity": services.stock(delivered.sku)}, 201


@shop.get("/stock")
def get_stock() -> dict[str, int]:
    """Say how many there are of each."""
    return services.goods()
