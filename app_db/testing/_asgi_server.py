"""Serves an ASGI application by uvicorn, in an event loop of its own. It imports uvicorn: import it on demand."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from importlib import import_module
from socket import create_server, socket
from typing import Any

import uvicorn
from uvicorn.server import logger as log_of_uvicorn

from app_db._compat.clocks import monotonic
from app_db.errors import LiveServerError
from app_db.testing._wsgi_server import HOST, log_error, refuse_unanswered

with warnings.catch_warnings():
    # Here, and not in the server's thread: releases of uvicorn before 0.50 import what websockets has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import_module("uvicorn.protocols.websockets.auto")

_TO_ACCEPT = 0.01
"""Seconds in which an event loop hands an accepted connection to its protocol."""

_TO_CANCEL = 1.0
"""Seconds for requests and the lifespan to end after they were cancelled."""


_FAILED: tuple[dict[str, Any], ...] = (
    {"type": "http.response.start", "status": 500, "headers": [(b"content-type", b"text/plain; charset=utf-8")]},
    {"type": "http.response.body", "body": b"Internal Server Error"},
)
"""The answer to a request whose error the application has not handled."""


class AsgiServer:
    """A server that runs an application in an event loop of its own."""

    def __init__(self, application: Callable[..., Any], patience: float) -> None:
        self._patience = patience
        self._watched = _Watched(application)
        self._server = server = _Server(self._watched, patience)
        with create_server((HOST, 0), backlog=128) as listening:
            self.port = int(listening.getsockname()[1])
            # Without the context of the test, whose unit of work is not the server's.
            target, arguments = Context().run, (server.run_until_end, listening.dup())
            self._thread = threading.Thread(target=target, args=arguments, name="live server", daemon=True)
        self._thread.start()
        server.answered.wait()
        if not server.started:
            cause = server.error or self._watched.error
            raise LiveServerError("The application did not start", "The error above, or the log of uvicorn, says why") from cause

    def end(self) -> None:
        """End the server. Raises LiveServerError if something in the application did not end in time."""
        self._server.end()
        self._thread.join(self._patience + _TO_CANCEL)
        self._watched.refuse_unanswered(self._patience)
        if self._thread.is_alive():
            raise LiveServerError(
                f"The application did not end within {self._patience:g} s", "Look at what its lifespan waits for"
            )


if sys.platform == "win32":
    _UsualLoop = asyncio.ProactorEventLoop
else:
    _UsualLoop = asyncio.SelectorEventLoop


class _Loop(_UsualLoop):
    """An event loop whose clock goes on in tests that make time stand still."""

    def time(self) -> float:
        return monotonic()


class _Server(uvicorn.Server):
    """uvicorn's server, which tells other threads that it has started, and ends as soon as it is told to."""

    def __init__(self, application: _Watched, patience: float) -> None:
        # Without a configuration of uvicorn's own, what it logs goes where the test's log goes.
        graceful: Any = patience  # typed as whole seconds
        super().__init__(uvicorn.Config(application, log_config=None, timeout_graceful_shutdown=graceful))
        self.answered = threading.Event()
        """Set when the application has started, and when it can't."""
        self.error: BaseException | None = None
        self.end: Callable[[], object] = lambda: None

    def run_until_end(self, listening: socket) -> None:
        """Serve until `end` is called."""
        try:
            with listening, asyncio.Runner(loop_factory=_Loop) as runner:
                runner.run(self.serve(sockets=[listening]))
        except SystemExit:
            """So uvicorn ends a process whose application does not start."""
        except BaseException as error:  # noqa: BLE001  # it becomes the cause of an error in the test's thread
            self.error = error
        finally:
            self.answered.set()

    async def main_loop(self) -> None:
        """Wait for the end. uvicorn's own looks every 0.1 s whether it has come."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self.end = partial(loop.call_soon_threadsafe, ended.set)
        await self.on_tick(0)
        self.answered.set()
        await ended.wait()
        # Accept nothing more, and give the loop time for what it has accepted: asyncio leaves a connection open whose server is
        # closed meanwhile.
        for listening in (each for server in self.servers for each in server.sockets):
            with suppress(NotImplementedError):  # Windows
                loop.remove_reader(listening)
        await asyncio.sleep(_TO_ACCEPT)


class _Watched:
    """An application, its requests that have no answer yet, and the error by which it did not start."""

    def __init__(self, application: Callable[..., Any]) -> None:
        self._application = application
        self._unanswered: dict[int, str] = {}
        self.error: Exception | None = None

    async def __call__(self, scope: dict[str, Any], receive: object, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "lifespan":
            try:
                await self._application(scope, receive, send)
            except Exception as error:
                self.error = error
                raise
            return

        request = f"{scope.get('method', scope['type'])} {scope['path']}"
        logged: list[BaseException] = []
        is_answered = False

        async def answer(message: Any) -> None:
            nonlocal is_answered
            is_answered = True
            self._unanswered.pop(id(scope), None)
            error = sys.exception()
            if error is not None and message["type"] == "http.response.start" and message["status"] >= 500:
                logged.append(error)
                log_error(request, error)  # uvicorn logs it after the answer, when the test may be over
            await send(message)

        self._unanswered[id(scope)] = request
        try:
            await self._application(scope, receive, answer)
        except Exception as error:
            self._unanswered.pop(id(scope), None)
            if error in logged:
                return
            is_uvicorns = is_answered or scope["type"] != "http"
            if not is_uvicorns or not log_of_uvicorn.isEnabledFor(logging.ERROR):
                log_error(request, error)  # uvicorn does not: the application may have switched its log off
            if is_uvicorns:  # which ends the connection
                raise
            for message in _FAILED:
                await send(message)

    def refuse_unanswered(self, patience: float) -> None:
        """Raise LiveServerError if uvicorn has cancelled a request. A thread that works for it may go on."""
        refuse_unanswered([*self._unanswered.values()], patience)
