"""The application by Pyramid, with pyramid_tm and without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPConflict, HTTPSeeOther
from pyramid.response import Response
from pyramid.wsgi import wsgiapp2

from harness.frameworks import RAISED, Doings, Handled


def application(  # noqa: C901  # one function for each route
    doings: Doings, inner: Doings | None = None, *, tm: bool = False, attempts: int = 1, **options: Any
) -> Any:
    def add_sync(request: Any) -> Any:
        doings.put(request.params["name"])
        response = Response(json={}, status=int(request.params.get("status", "201")))
        if "tm" in request.params:
            response.headers["X-Tm"] = request.params["tm"]
        return response

    def fail(request: Any) -> Any:
        add_sync(request)
        kind = request.params["kind"]
        raise HTTPConflict if kind == "http" else RAISED[kind]

    def redirect(request: Any) -> Any:
        add_sync(request)
        return HTTPSeeOther("/elsewhere")

    def doom(request: Any) -> Any:
        add_sync(request)
        request.unit.doom()
        return Response(json={})

    def stream(request: Any) -> Any:
        add_sync(request)

        def parts() -> Iterator[bytes]:
            yield b"first;"
            yield doings.refused().encode()

        return Response(app_iter=parts())

    def in_background(request: Any) -> Any:
        add_sync(request)
        name = request.params["name"]

        def afterwards(request: Any) -> None:
            if request.exception is None:  # Pyramid calls this also if COMMIT has failed
                doings.work_afterwards(name)

        request.add_finished_callback(afterwards)
        return Response(json={})

    def count(request: Any) -> Any:
        return Response(json={"attempts": doings.count(request.params["name"]), "bytes": len(request.body)})

    def slow(request: Any) -> Any:
        add_sync(request)
        doings.wait()
        return Response(json={})

    def two(request: Any) -> Any:
        doings.put_into_two(request.params["name"])
        return Response(json={}, status=int(request.params.get("status", "201")))

    def nothing(request: Any) -> Any:
        return Response(json={})

    def on_handled(error: Any, request: Any) -> Any:
        return Response(json={"names": doings.names()}, status=409)

    def on_error(error: Any, request: Any) -> Any:
        return Response(json={"handled": type(error).__name__}, status=500)

    with Configurator(settings={"retry.attempts": attempts}) as config:
        config.include("pyramid_retry")
        if tm:
            config.include("pyramid_tm")
        config.include("app_db.integrations.pyramid")
        config.set_app_db(doings.container)
        for view in (add_sync, fail, redirect, doom, stream, in_background, count, slow, two, nothing):
            name = view.__name__.replace("_", "-")
            config.add_route(name, f"/{name}")
            config.add_view(view, route_name=name)
        config.add_exception_view(on_handled, context=Handled)
        config.add_exception_view(on_error, context=Exception)
        if inner is not None:
            config.add_route("inner", "/inner/*subpath")
            config.add_view(wsgiapp2(application(inner, tm=tm)), route_name="inner")
    return config.make_wsgi_app()
