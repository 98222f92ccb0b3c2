"""Runs an application on a real port, in a thread of the process that tests it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from app_db.errors import InvalidUse, LiveServerError

Interface = Literal["asgi", "wsgi"]

_PARAMETERS: dict[Interface, int] = {"asgi": 3, "wsgi": 2}
"""How many arguments an application is called with."""


@dataclass(frozen=True)
class LiveServer:
    """A server that runs the application."""

    port: int

    @property
    def url(self) -> str:
        """The address, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def live_server(
    application: Callable[..., Any], *, interface: Interface | None = None, patience: float = 3.0
) -> Generator[LiveServer]:
    """Run an ASGI or WSGI application on a free port of 127.0.0.1, in a thread of this process, while the block lasts.

    It gives a `LiveServer`, whose `url` is for browsers and clients, when the application has
    started. Inside `isolated(container)`, the units of its requests share the connections of the
    test, and are rolled back with it.

    ASGI applications are run by uvicorn, with their lifespan, and WSGI applications by wsgiref with a
    thread for each request. The number of arguments tells which it is, or `interface`. At the end,
    idle connections are closed, and requests have `patience` seconds to end. Then streams and
    websockets are cancelled. Raises LiveServerError if the application does not start or end, or if
    a request has no answer by then.

    >>> import urllib.request
    >>> from app_db.testing._live_server import live_server
    >>> def application(environ, start_response):
    ...     start_response("200 OK", [("Content-Type", "text/plain")])
    ...     return [b"Hello"]
    >>> with live_server(application) as server, urllib.request.urlopen(server.url) as response:
    ...     response.read()
    b'Hello'
    """
    server = _served(application, _interface(application, interface), patience)
    try:
        yield LiveServer(server.port)
    except BaseException as error:
        try:
            server.end()
        except LiveServerError as unanswered:
            error.add_note(f"app_db: {unanswered.message}")
        raise
    server.end()


class _Running(Protocol):
    port: int

    def end(self) -> None: ...


def _served(application: Callable[..., Any], interface: Interface, patience: float) -> _Running:
    """Return a server that has started."""
    if interface == "wsgi":
        from app_db.testing._wsgi_server import WsgiServer

        return WsgiServer(application, patience)
    try:
        from app_db.testing._asgi_server import AsgiServer
    except ImportError as error:
        raise LiveServerError(
            f"A live server for an ASGI application needs uvicorn ({error})", "pip install 'app-db[live-server]'"
        ) from None
    return AsgiServer(application, patience)


def _interface(application: Callable[..., Any], given: Interface | None) -> Interface:
    """Return the interface that was given, or the one whose arguments the application takes."""
    if given is not None:
        if given not in _PARAMETERS:
            raise InvalidUse(f"There is no interface {given!r}", "Use 'asgi' or 'wsgi'")
        return given
    found: list[Interface] = [interface for interface, number in _PARAMETERS.items() if _takes(application, number)]
    if len(found) == 2 and _is_awaited(application):
        return "asgi"
    if len(found) == 1:
        return found[0]
    raise InvalidUse(
        f"{_described(application)} is not seen to be an ASGI or a WSGI application: it does not take the arguments of one, or "
        "those of both",
        'Give the application itself, and not the function that makes it, or say which it is: interface="asgi"',
    )


def _takes(application: object, number: int) -> bool:
    if not callable(application):
        return False
    try:
        inspect.signature(application).bind(*range(number))
    except (TypeError, ValueError):  # ValueError: a callable written in C has no signature
        return False
    return True


def _is_awaited(application: Callable[..., Any]) -> bool:
    return any(map(inspect.iscoroutinefunction, (application, type(application).__call__)))


def _described(application: object) -> str:
    return f"The function {application.__qualname__}" if inspect.isfunction(application) else f"A {type(application).__name__}"
