"""The routes of every program for Pyramid besides `/place` and `/both`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pyramid.httpexceptions as http
from pyramid.response import Response
from shared import COLLISION, Boom, Handled, Item, is_first_try
from sqlalchemy import select, text

gate = threading.Event()


def passed() -> None:
    """Wait until the gate opens."""
    gate.clear()
    gate.wait()


def parts(*, waits: bool) -> Iterator[bytes]:
    """Return the parts of a stream."""
    yield b"first"
    if waits:
        passed()
    yield b"second"


def added(request: Any) -> Any:
    """Add the item of a request, and return the session."""
    request.dbsession.add(Item(name=request.params["name"]))
    return request.dbsession


def add(request: Any) -> Response:
    added(request)
    response = Response("{}", int(request.params.get("status", "201")))
    if "tm" in request.params:
        response.headers["X-Tm"] = request.params["tm"]
    return response


def fail(request: Any) -> Response:
    added(request).flush()
    if request.params["kind"] == "http":
        raise http.HTTPConflict
    raise {"boom": Boom, "handled": Handled}[request.params["kind"]]


def on_handled(error: Handled, request: Any) -> Response:
    return Response(str(len(request.dbsession.scalars(select(Item.name)).all())), 409)


def redirect(request: Any) -> Response:
    added(request)
    return http.HTTPSeeOther("/nothing")


def veto(request: Any) -> Response:
    added(request).flush()
    doom(request)
    return Response("{}")


def doom(request: Any) -> None:
    """Have the request's transaction abort."""
    if hasattr(request, "tm"):
        request.tm.doom()
    else:
        request.unit.doom()


def stream(request: Any) -> Response:
    added(request)
    return Response(app_iter=parts(waits="free" not in request.params), status=201)


def wait(request: Any) -> Response:
    added(request).flush()
    passed()
    return Response("{}", 201)


def retry(request: Any) -> Response:
    name = request.json_body["name"]
    if is_first_try(name):
        request.dbsession.execute(text(COLLISION))
    request.dbsession.add(Item(name=name))
    return Response("{}", 201)


def nothing(request: Any) -> Response:
    return Response("{}")


def release(request: Any) -> Response:
    gate.set()
    return Response("{}")


def add_routes(config: Any, *more: Any) -> None:
    """Add the routes, and those of more views."""
    for view in (*more, add, fail, redirect, veto, stream, wait, retry, nothing, release):
        config.add_route(view.__name__, f"/{view.__name__}")
        config.add_view(view, route_name=view.__name__)
    config.add_exception_view(on_handled, context=Handled)
