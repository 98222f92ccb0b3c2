"""The routes of every program for Flask besides `/place` and `/both`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from flask import Flask, Response, abort, jsonify, redirect, request
from shared import COLLISION, Boom, Handled, is_first_try
from sqlalchemy import select, text
from sqlalchemy.orm import Session

gate = threading.Event()


def passed() -> None:
    """Wait until the gate opens."""
    gate.clear()
    gate.wait()


def parts(*, waits: bool) -> Iterator[str]:
    """Return the parts of a stream."""
    yield "first"
    if waits:
        passed()
    yield "second"


def add_routes(  # noqa: C901  # one function for each route
    app: Flask,
    get_session: Callable[[], Session],
    Item: Any,  # noqa: N803  # a type
    commit: Callable[[], object] = lambda: None,
    doom: Callable[[], object] | None = None,
) -> None:
    """Add the routes.

    `commit` is what an endpoint calls at its successful end, where the peer leaves that to it; `doom` is the peer's way to have a
    request not commit.
    """

    def added() -> Session:
        session = get_session()
        session.add(Item(name=request.args["name"]))
        return session

    @app.post("/add")
    def add() -> tuple[Response, int, dict[str, str]]:
        added()
        status = int(request.args.get("status", "201"))
        if status < 400:
            commit()
        return jsonify({}), status, {"X-Tm": request.args["tm"]} if "tm" in request.args else {}

    @app.post("/fail")
    def fail() -> None:
        added().flush()
        if request.args["kind"] == "http":
            abort(409)
        raise {"boom": Boom, "handled": Handled}[request.args["kind"]]

    @app.errorhandler(Handled)
    def on_handled(error: Handled) -> tuple[Response, int]:
        return jsonify({"names": len(get_session().scalars(select(Item.name)).all())}), 409

    @app.post("/redirect")
    def go_on() -> Any:
        added()
        commit()
        return redirect("/nothing", 303)

    @app.post("/veto")
    def veto() -> Response:
        session = added()
        session.flush()
        if doom is not None:
            doom()
        else:
            session.rollback()
        return jsonify({})

    @app.post("/stream")
    def stream() -> tuple[Iterator[str], int]:
        added()
        commit()
        return parts(waits="free" not in request.args), 201

    @app.post("/wait")
    def wait() -> tuple[Response, int]:
        added().flush()
        passed()
        commit()
        return jsonify({}), 201

    @app.post("/retry")
    def retry() -> tuple[Response, int]:
        name = request.get_json()["name"]
        if is_first_try(name):
            get_session().execute(text(COLLISION))
        get_session().add(Item(name=name))
        commit()
        return jsonify({}), 201

    @app.get("/nothing")
    def nothing() -> Response:
        return jsonify({})

    @app.post("/release")
    def release() -> Response:
        gate.set()
        return jsonify({})
