"""Serves an ASGI application by uvicorn, in an event loop of its own. It imports uvicorn: import it on demand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from socket import create_server, socket
from typing import Any

import uvicorn

from app_db.errors import LiveServerError
from app_db.testing._wsgi_server import HOST, refuse_running

_TO_ACCEPT = 0.01
"""Seconds in which an event loop hands an accepted connection to its protocol."""

_TO_CANCEL = 1.0
"""Seconds for requests and the lifespan to end after they were cancelled."""


@contextmanager
def served_by_uvicorn(application: Callable[..., Any], patience: float) -> Generator[int]:
    """Serve an application while the block lasts. It gives the port."""
    watched = _Watched(application)
    server = _Server(watched, patience)
    with create_server((HOST, 0), backlog=128) as listening:
        port = int(listening.getsockname()[1])
        # Without the context of the test, whose unit of work is not the server's.
        thread = threading.Thread(target=Context().run, args=(server.run_until_end, listening), name="live server", daemon=True)
        thread.start()
        server.answered.wait()
        if not server.started:
            raise LiveServerError("The application did not start", "The error above, or the log of uvicorn, says why") from (
                server.error or watched.error
            )
        try:
            yield port
        finally:
            server.end()
            thread.join(patience + _TO_CANCEL)
            if thread.is_alive():
                refuse_running(watched.running or ["the lifespan of the application"], patience)


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
            asyncio.run(self.serve(sockets=[listening]))
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
    """An application, the requests that it answers, and the error by which it did not start."""

    def __init__(self, application: Callable[..., Any]) -> None:
        self._application = application
        self.running: list[str] = []
        self.error: Exception | None = None

    async def __call__(self, scope: dict[str, Any], receive: object, send: object) -> None:
        if scope["type"] == "lifespan":
            try:
                await self._application(scope, receive, send)
            except Exception as error:
                self.error = error
                raise
            return
        request = f"{scope.get('method', scope['type'])} {scope['path']}"
        self.running.append(request)
        try:
            await self._application(scope, receive, send)
        finally:
            self.running.remove(request)
