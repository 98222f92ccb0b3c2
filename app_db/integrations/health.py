"""Answers to probes of Kubernetes and load balancers, as an ASGI and as a WSGI application.

| path | answer |
|---|---|
| `/livez` | 200 as long as the process answers. No database is asked |
| `/readyz` | 200, or 503 if a required connection is down. The body is `application/health+json` |
| `/poolz` | only with `pools=True`: how full the pools of this process are, and who holds their connections, as JSON |

Mount them in an application of any framework, or serve them alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from http import HTTPStatus
from math import inf
from typing import TYPE_CHECKING

from app_db import DatabaseContainer
from app_db.errors import InvalidUse, SettingsError
from app_db.health import Health
from app_db.integrations._containers import require_container
from app_db.integrations.asgi import Application, Receive, Scope, Send

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["asgi_health", "wsgi_health"]

_LIVE, _READY, _POOLS = "/livez", "/readyz", "/poolz"
_METHODS = ("GET", "HEAD")


def asgi_health(container: DatabaseContainer, *, timeout: float = 2.0, pools: bool = False) -> Application:
    """Return an ASGI application that answers `/livez` and `/readyz`, the latter after at most `timeout` seconds.

    With `pools`, it answers `/poolz` too. That names functions, files and lines of the application.
    """
    require_container(container)
    _require_seconds("asgi_health", timeout)
    paths = _paths("asgi_health", pools)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            path, method = _path_in(scope), scope["method"]
            health: Health | SettingsError | None = None
            if path == _READY and method in _METHODS:
                try:
                    health = await container.async_health(timeout=timeout)
                except SettingsError as error:
                    health = error
            answer = _Answer(container, paths, path, method, health)
            headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers]
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": answer.body})
        else:
            await send({"type": "websocket.close"})

    return application


def wsgi_health(
    container: DatabaseContainer, *, timeout: float = 2.0, pools: bool = False
) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    """Return a WSGI application that answers `/livez` and `/readyz`, the latter after at most `timeout` seconds.

    With `pools`, it answers `/poolz` too. That names functions, files and lines of the application.
    """
    require_container(container)
    _require_seconds("wsgi_health", timeout)
    paths = _paths("wsgi_health", pools)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        health: Health | SettingsError | None = None
        if path == _READY and method in _METHODS:
            try:
                health = container.health(timeout=timeout)
            except SettingsError as error:
                health = error
        answer = _Answer(container, paths, path, method, health)
        start_response(f"{answer.status.value} {answer.status.phrase}", answer.headers)
        return [answer.body]

    return application


def _require_seconds(function: str, timeout: object) -> None:
    """Raise InvalidUse for what `container.health()` would refuse at each request."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= 3600:
        raise InvalidUse(f"{function}(timeout={timeout!r}) gives no time limit", "Give seconds, more than 0 and up to 3600")


def _paths(function: str, pools: object) -> tuple[str, ...]:
    """Return the paths that are answered."""
    if not isinstance(pools, bool):
        raise InvalidUse(f"{function}(pools={pools!r}) is neither True nor False", "Give True to have /poolz answered")
    return (_LIVE, _READY, _POOLS) if pools else (_LIVE, _READY)


def _pools_of(container: DatabaseContainer) -> dict[str, object]:
    """Return what `container.pools()` tells, for JSON. Stacks are left out: they quote the source of the application."""
    pools = {name: asdict(state) for name, state in container.pools().items()}
    for pool in pools.values():
        pool["most"] = None if pool["most"] == inf else pool["most"]
        for holder in pool["holders"]:
            del holder["stack"]
    return {"pid": os.getpid(), "pools": pools}


class _Answer:
    """The answer to one request. `health` is given for a path that asks for it, or the error of settings that are wrong."""

    def __init__(
        self,
        container: DatabaseContainer,
        paths: tuple[str, ...],
        path: str,
        method: str,
        health: Health | SettingsError | None,
    ) -> None:
        self.headers = [("Cache-Control", "no-store"), ("Content-Type", "application/health+json")]
        self.status = HTTPStatus.OK
        document: dict[str, object] = {"status": "pass"}
        if path not in paths:
            self.status = HTTPStatus.NOT_FOUND
            document = {"status": "fail", "output": f"ask {', '.join(paths[:-1])} or {paths[-1]}"}
        elif method not in _METHODS:
            self.status = HTTPStatus.METHOD_NOT_ALLOWED
            document = {"status": "fail", "output": "ask by GET or HEAD"}
            self.headers.append(("Allow", ", ".join(_METHODS)))
        elif isinstance(health, SettingsError):
            self.status = HTTPStatus.SERVICE_UNAVAILABLE
            document = {"status": "fail", "output": str(health)}
        elif health is not None:
            document = health.as_json()
            if health.status == "down":
                self.status = HTTPStatus.SERVICE_UNAVAILABLE
        elif path == _POOLS:
            document = _pools_of(container)
            self.headers[1] = ("Content-Type", "application/json")
        body = json.dumps(document).encode()
        self.headers.append(("Content-Length", str(len(body))))
        self.body = b"" if method == "HEAD" else body


def _path_in(scope: Scope) -> str:
    """Return the path below the one at which the application is mounted.

    By ASGI, `path` begins with `root_path`. Behind a proxy that strips the prefix it does not: there, below a mount of Starlette,
    it begins with what the mounts have added to the root path of the outermost application.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    mounts = root.removeprefix(str(scope.get("app_root_path", "")))
    mounted_at = next((prefix for prefix in (root, mounts) if path.startswith(f"{prefix}/")), "")
    return path[len(mounted_at) :]


async def _live(receive: Receive, send: Send) -> None:
    """Answer a server that begins and ends."""
    while (event := (await receive())["type"].rpartition(".")[2]) == "startup":
        await send({"type": f"lifespan.{event}.complete"})
    await send({"type": f"lifespan.{event}.complete"})
