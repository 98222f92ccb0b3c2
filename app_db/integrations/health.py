"""Answers to probes of Kubernetes and load balancers, as an ASGI and as a WSGI application.

| path | answer |
|---|---|
| `/livez` | 200 as long as the process answers. No database is asked |
| `/readyz` | 200, or 503 if a required connection is down. The body is `application/health+json` |

Mount them in an application of any framework, or serve them alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING

from app_db import DatabaseContainer
from app_db.errors import InvalidUse
from app_db.health import Health
from app_db.integrations._containers import require_container
from app_db.integrations.asgi import Application, Receive, Scope, Send

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["asgi_health", "wsgi_health"]

_LIVE, _READY = "/livez", "/readyz"
_METHODS = ("GET", "HEAD")


def asgi_health(container: DatabaseContainer, *, timeout: float = 2.0) -> Application:
    """Return an ASGI application that answers `/livez` and `/readyz`, the latter after at most `timeout` seconds."""
    require_container(container)
    _require_seconds("asgi_health", timeout)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            path, method = _path_in(scope), scope["method"]
            asks = path == _READY and method in _METHODS
            answer = _Answer(path, method, await container.async_health(timeout=timeout) if asks else None)
            headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers]
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": answer.body})
        else:
            await send({"type": "websocket.close"})

    return application


def wsgi_health(
    container: DatabaseContainer, *, timeout: float = 2.0
) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    """Return a WSGI application that answers `/livez` and `/readyz`, the latter after at most `timeout` seconds."""
    require_container(container)
    _require_seconds("wsgi_health", timeout)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        asks = path == _READY and method in _METHODS
        answer = _Answer(path, method, container.health(timeout=timeout) if asks else None)
        start_response(f"{answer.status.value} {answer.status.phrase}", answer.headers)
        return [answer.body]

    return application


def _require_seconds(function: str, timeout: object) -> None:
    """Raise InvalidUse for what `container.health()` would refuse at each request."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= 3600:
        raise InvalidUse(f"{function}(timeout={timeout!r}) gives no time limit", "Give seconds, more than 0 and up to 3600")


class _Answer:
    """The answer to one request. `health` is given for a path that asks for it."""

    def __init__(self, path: str, method: str, health: Health | None) -> None:
        self.headers = [("Cache-Control", "no-store"), ("Content-Type", "application/health+json")]
        self.status = HTTPStatus.OK
        document: dict[str, object] = {"status": "pass"}
        if path not in (_LIVE, _READY):
            self.status = HTTPStatus.NOT_FOUND
            document = {"status": "fail", "output": f"ask {_LIVE} or {_READY}"}
        elif method not in _METHODS:
            self.status = HTTPStatus.METHOD_NOT_ALLOWED
            document = {"status": "fail", "output": "ask by GET or HEAD"}
            self.headers.append(("Allow", ", ".join(_METHODS)))
        elif health is not None:
            document = health.as_json()
            if health.status == "down":
                self.status = HTTPStatus.SERVICE_UNAVAILABLE
        body = json.dumps(document).encode()
        self.headers.append(("Content-Length", str(len(body))))
        self.body = b"" if method == "HEAD" else body


def _path_in(scope: Scope) -> str:
    """Return the path below the one at which the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if path.startswith(f"{root}/") else path


async def _live(receive: Receive, send: Send) -> None:
    """Answer a server that begins and ends."""
    while (event := (await receive())["type"].rpartition(".")[2]) == "startup":
        await send({"type": f"lifespan.{event}.complete"})
    await send({"type": f"lifespan.{event}.complete"})
