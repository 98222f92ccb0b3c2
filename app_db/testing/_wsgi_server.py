"""Serves a WSGI application by the standard library, with a thread for each request."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from socket import SHUT_RD
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from app_db._compat.clocks import monotonic
from app_db.errors import LiveServerError

log = logging.getLogger("app_db")

HOST = "127.0.0.1"

_LONGEST_REQUEST_LINE = 65536


@contextmanager
def served_by_wsgiref(application: Callable[..., Any], patience: float) -> Generator[int]:
    """Serve an application while the block lasts. It gives the port."""
    server = _Server((HOST, 0), _Request)
    server.set_app(application)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="live server", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.end(patience)


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread, and knows which are not answered yet."""

    request_queue_size = 128  # a browser opens many connections at once

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's asks the network for the name of this host
        self.server_name, self.server_port = HOST, int(self.server_address[1])
        self.setup_environ()
        self._open: dict[threading.Thread, Any] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="live server, waits", daemon=True
        )
        self._open[thread] = request
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._open[threading.current_thread()]

    def handle_error(self, request: object, client_address: object) -> None:
        """Note what went wrong outside the application: most often, the client has gone."""
        log.debug("A connection to the live server has ended: %r", sys.exception())

    def end(self, patience: float) -> None:
        """Accept nothing more, and wait for the requests that are being answered."""
        give_up = monotonic() + patience
        self.shutdown()
        self.server_close()
        for connection in list(self._open.values()):
            with suppress(OSError):
                connection.shutdown(SHUT_RD)  # an idle one ends, and one that is being answered can still be written to
        for thread in list(self._open):
            thread.join(max(0.0, give_up - monotonic()))
        refuse_running([thread.name for thread in list(self._open)], patience)


def refuse_running(requests: list[str], patience: float) -> None:
    """Raise LiveServerError if there are requests that have not ended."""
    if requests:
        raise LiveServerError(
            f"The live server could not end: {', '.join(requests)} still runs after {patience:g} s",
            "Let the test wait for the answer, or give `live_server` more `patience`",
        )


class _Request(WSGIRequestHandler):
    def handle(self) -> None:
        """Answer one request, as HTTP/1.0 does. wsgiref would say that there are no other threads."""
        self.raw_requestline = self.rfile.readline(_LONGEST_REQUEST_LINE + 1)
        if len(self.raw_requestline) > _LONGEST_REQUEST_LINE:
            self.requestline = self.request_version = self.command = ""
            self.send_error(414)
        elif self.raw_requestline and self.parse_request():
            threading.current_thread().name = f"{self.command} {self.path.partition('?')[0]}"
            answer: Any = self.wfile
            handler = _Handler(self.rfile, answer, sys.stderr, self.get_environ(), multithread=True)
            handler.request_handler = self
            handler.run(self.server.get_app())  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name in the standard library
        log.debug("live server: %s", format % args)


class _Handler(ServerHandler):
    request_handler: _Request

    def log_exception(self, exc_info: Any) -> None:
        """Log an error of the application, so that pytest shows it with the test that fails."""
        log.error("%s raised an error in the live server", threading.current_thread().name, exc_info=exc_info)
