"""Web servers on real ports, for ASGI and WSGI applications."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import httpx
import uvicorn


def client(address: str = "") -> httpx.Client:
    """Return a client that heeds no variables, such as those of proxies and certificates."""
    return httpx.Client(base_url=address, timeout=20, trust_env=False)


def post(url: str, **arguments: Any) -> httpx.Response:
    with client() as one:
        return one.post(url, **arguments)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an ASGI application by uvicorn for the length of the block, which gets its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, args=([listening],), name="uvicorn")
        thread.start()
        while not server.started:
            thread.join(0.01)
            if not thread.is_alive():
                raise RuntimeError("uvicorn did not start")
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name in the standard library
        """Say nothing."""


@contextmanager
def serving_wsgi(app: Callable[..., Any]) -> Iterator[str]:
    """Serve a WSGI application by the standard library's server."""
    with make_server("127.0.0.1", 0, app, WSGIServer, _Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="wsgi")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
