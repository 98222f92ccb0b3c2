"""Serves a WSGI application by the standard library, with a thread for each request."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from socket import SHUT_RD, SHUT_RDWR
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from app_db._compat.clocks import monotonic
from app_db.errors import LiveServerError

log = logging.getLogger("app_db")

HOST = "127.0.0.1"

_TO_BREAK_OFF = 0.5
"""Seconds for streams to end after their connections were closed."""

_LONGEST_REQUEST_LINE = 65536


class WsgiServer:
    """A server that runs an application in threads."""

    def __init__(self, application: Callable[..., Any], patience: float) -> None:
        self._patience = patience
        self._server = _Server((HOST, 0), _Request)
        self._server.set_app(application)
        self.port = self._server.server_port
        # Without the context of the test, whose unit of work is not the server's.
        target, arguments = Context().run, (self._server.serve_forever, 0.02)
        threading.Thread(target=target, args=arguments, name="live server", daemon=True).start()

    def end(self) -> None:
        """End the server. Raises LiveServerError if a request has no answer in time."""
        self._server.end(self._patience)


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
        self._shut(SHUT_RD, give_up)  # idle connections end, and the others can still be written to
        self._shut(SHUT_RDWR, give_up + _TO_BREAK_OFF)
        refuse_unanswered([thread.name for thread in list(self._open)], patience)

    def _shut(self, how: int, give_up: float) -> None:
        """Shut the connections that are open, and wait for their threads."""
        for connection in list(self._open.values()):
            with suppress(OSError):
                connection.shutdown(how)
        for thread in list(self._open):
            thread.join(max(0.0, give_up - monotonic()))


def refuse_unanswered(requests: Sequence[str], patience: float) -> None:
    """Raise LiveServerError if there are requests without an answer."""
    if requests:
        raise LiveServerError(
            f"The live server could not end: it had no answer to {', '.join(requests)} within {patience:g} s",
            "Let the test wait for the answer, or give `live_server` more `patience`",
        )


def log_error(request: str, error: BaseException) -> None:
    """Log an error of the application, so that pytest shows it with the test that fails."""
    log.error("%s raised an error in the live server", request, exc_info=error)


class _Request(WSGIRequestHandler):
    def handle(self) -> None:
        """Answer one request, as HTTP/1.0 does. wsgiref would say that there are no other threads."""
        self.raw_requestline = self.rfile.readline(_LONGEST_REQUEST_LINE + 1)
        if len(self.raw_requestline) > _LONGEST_REQUEST_LINE:
            self.requestline = self.request_version = self.command = ""
            self.send_error(414)
        elif not (self.raw_requestline and self.parse_request()):
            return
        elif "Transfer-Encoding" in self.headers:  # wsgiref gives the application an empty body
            self.send_error(411, explain="The live server reads no chunked body. Send the header Content-Length.")
        else:
            threading.current_thread().name = f"{self.command} {self.path.partition('?')[0]}"
            server: Any = self.server
            answer: Any = self.wfile
            handler = _Handler(self.rfile, answer, sys.stderr, self.get_environ(), multithread=True)
            handler.request_handler = self
            handler.run(server.get_app())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name in the standard library
        log.debug("live server: %s", format % args)


class _Handler(ServerHandler):
    request_handler: _Request

    def log_exception(self, exc_info: Any) -> None:
        log_error(threading.current_thread().name, exc_info[1])
