"""The application by Flask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flask import Flask, abort, jsonify, redirect, request, stream_with_context
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from app_db.integrations.flask import AppDb
from harness.frameworks import RAISED, Doings, Handled


def application(  # noqa: C901  # one function for each route
    doings: Doings, inner: Doings | None = None, **options: Any
) -> Flask:
    flask = Flask("shop")

    def answer() -> tuple[str, int, dict[str, str]]:
        tm = {"X-Tm": request.args["tm"]} if "tm" in request.args else {}
        return "{}", int(request.args.get("status", "201")), tm

    def put() -> None:
        doings.put(request.args["name"])

    @flask.post("/add-sync")
    def add_sync() -> Any:
        put()
        return answer()

    @flask.post("/add-async")
    async def add_async() -> Any:
        put()  # by a session for threads: the loop of an async view ends before the request does
        return answer()

    @flask.post("/fail")
    def fail() -> str:
        put()
        if request.args["kind"] == "http":
            abort(409)
        raise RAISED[request.args["kind"]]

    @flask.post("/redirect")
    def elsewhere() -> Any:
        put()
        return redirect("/elsewhere", 303)

    @flask.post("/doom")
    def doom() -> str:
        put()
        doings.container.unit().doom()
        return "{}"

    @flask.post("/stream")
    def stream() -> Any:
        put()

        def parts() -> Iterator[str]:
            yield "first;"
            yield doings.refused()

        return stream_with_context(parts()), 200

    @flask.post("/in-background")
    def in_background() -> Any:
        put()
        response, name = jsonify({}), request.args["name"]
        response.call_on_close(lambda: doings.work_afterwards(name))
        return response

    @flask.post("/count")
    def count() -> Any:
        body = request.get_data()
        return jsonify({"attempts": doings.count(request.args["name"]), "bytes": len(body)})

    @flask.post("/slow")
    def slow() -> str:
        put()
        doings.wait()
        return "{}"

    @flask.post("/two")
    def two() -> Any:
        doings.put_into_two(request.args["name"])
        return answer()

    @flask.route("/nothing", methods=["GET", "POST"])
    def nothing() -> str:
        return "{}"

    @flask.errorhandler(Handled)
    def on_handled(error: Handled) -> Any:
        return jsonify({"names": doings.names()}), 409

    @flask.errorhandler(500)
    def on_error(error: Any) -> Any:
        return jsonify({"handled": type(error.original_exception).__name__}), 500

    AppDb(doings.container, **options).init_app(flask)
    if inner is not None:
        mounts: dict[str, Any] = {"/inner": application(inner)}
        flask.wsgi_app = DispatcherMiddleware(flask.wsgi_app, mounts)  # type: ignore[method-assign]
    return flask
