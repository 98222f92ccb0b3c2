"""The shop as a Pyramid application. `pserve pyramid.ini http_port=8000` starts it.

Each request is a unit of work, which pyramid_tm commits if the response is below 400. pyramid_retry answers a request anew if
another customer was quicker.
"""

from __future__ import annotations

import atexit
from typing import Any

from pydantic import ValidationError
from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.response import Response

from shop import checkout, services
from shop.container import container
from shop.forms import Delivery, NewOrder, refusal
from shop.opening import open_shop


def main(global_config: dict[str, str], **settings: Any) -> Any:
    """Return the application: what pyramid.ini calls. The databases are closed when the process ends."""
    open_shop()
    container.init_resources()
    atexit.register(container.shutdown_resources)
    with Configurator(settings=settings) as config:
        config.include("pyramid_retry")
        config.include("pyramid_tm")
        config.include("app_db.integrations.pyramid")
        config.set_app_db(container)
        for path, method, view in VIEWS:
            config.add_route(view.__name__, path, request_method=method)
            config.add_view(view, route_name=view.__name__)
        for kind in (services.OutOfStockError, services.NoSuchGoodsError, ValidationError):
            config.add_exception_view(refuse, context=kind)
    return config.make_wsgi_app()


def refuse(error: Exception, request: Request) -> Response:
    """Say why not. The response is an error, so that nothing is kept."""
    content, status = refusal(error)
    return Response(json_body=content, status=status)


def post_order(request: Request) -> Response:
    """Sell to a customer."""
    wanted = NewOrder.model_validate_json(request.body)
    return Response(json_body={"order": checkout.check_out(wanted.customer, wanted.sku, wanted.quantity)}, status=201)


def post_delivery(request: Request) -> Response:
    """Take in what was delivered."""
    delivered = Delivery.model_validate_json(request.body)
    services.receive(delivered.sku, delivered.quantity)
    return Response(json_body={"quantity": services.stock(delivered.sku)}, status=201)


def get_stock(request: Request) -> Response:
    """Say how many there are of each."""
    return Response(json_body=services.goods())


VIEWS = (("/orders", "POST", post_order), ("/deliveries", "POST", post_delivery), ("/stock", "GET", get_stock))
