"""aiohttp: a unit of work for each request, and the container's resources for the life of the application.

>>> from aiohttp import web
>>> from app_db import Container
>>> from app_db.integrations.aiohttp import setup
>>> app = web.Application()
>>> setup(app, Container())
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from inspect import isawaitable
from typing import Any

from aiohttp import web

from app_db import DatabaseContainer, DeferredUnit
from app_db.integrations._rule import CommitRule, commit_rule

__all__ = ["setup"]

_log = logging.getLogger("app_db")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def setup(
    app: web.Application,
    container: DatabaseContainer,
    *,
    read_only_methods: Iterable[str] = (),
    rule: CommitRule = commit_rule,
    isolation: str | None = None,
    timeout: float | None = None,
) -> None:
    """Give each request of an application a unit of work. It begins when a session is first asked for.

    It ends when the handler has returned or raised, and before the first byte of a response that the handler prepares itself. A
    response below 400 commits, also one that is raised; see `commit_rule`. If the commit fails, its error comes instead of the
    response. Middlewares that the application already has stand outside of the unit: they may answer for that error. Those that
    are added later stand inside. The options are those of `app_db.integrations.asgi.UnitOfWorkMiddleware`.
    """
    reading = frozenset(method.upper() for method in read_only_methods)
    units = {is_reading: _unit(container, is_reading, isolation, timeout) for is_reading in (False, True)}

    key = _key()

    async def end(request: web.Request, response: web.StreamResponse) -> None:
        unit: DeferredUnit | None = request.get(key)
        if unit is None or unit.is_over:
            return
        headers = {name.lower(): value for name, value in response.headers.items()}
        client_is_there = request.transport is not None and not request.transport.is_closing()
        try:
            await unit.end_awaited(commit=client_is_there and not unit.is_doomed and rule(response.status, headers, None))
        except Exception:
            if not unit.has_committed:
                raise
            _log.exception("A request has committed, and then something failed")  # the client must hear that it is done

    @web.middleware
    async def in_unit(request: web.Request, handler: _Handler) -> web.StreamResponse:
        unit = units[request.method in reading].anew()
        if unit.is_one_too_many:
            return await handler(request)
        with unit:
            request[key] = unit
            try:
                response = await handler(request)
            except web.HTTPException as raised:
                await end(request, raised)
                raise
            except BaseException as error:
                if not unit.is_over:
                    await unit.end_awaited(error)
                raise
            await end(request, response)
            return response

    app.middlewares.append(in_unit)
    app.on_response_prepare.append(end)
    app.cleanup_ctx.append(_resources(container))


def _unit(container: DatabaseContainer, read_only: bool, isolation: str | None, timeout: float | None) -> DeferredUnit:
    options: dict[str, Any] = {"read_only": True} if read_only else {}
    return container.deferred_unit(awaited=True, isolation=isolation, timeout=timeout, **options)


def _key() -> Any:
    """Return a key for a value of requests. aiohttp has a class for that since 3.14, and warns of other keys."""
    kind = getattr(web, "RequestKey", None)
    return object() if kind is None else kind("app_db.unit", DeferredUnit)


def _resources(container: DatabaseContainer) -> Callable[[web.Application], AsyncGenerator[None]]:
    async def run(app: web.Application) -> AsyncGenerator[None]:
        begun = container.init_resources()
        if isawaitable(begun):
            await begun
        yield
        await container.shutdown_resources()

    return run
