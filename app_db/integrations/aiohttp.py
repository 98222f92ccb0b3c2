"""aiohttp: a unit of work for each request, and the container's resources for the life of the application.

>>> from aiohttp import web
>>> from app_db import Container
>>> from app_db.integrations.aiohttp import setup
>>> app = web.Application()
>>> setup(app, Container())
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from itertools import count
from typing import Any, Unpack

from aiohttp import web

from app_db import DatabaseContainer, DeferredUnit
from app_db.integrations._containers import awaited
from app_db.integrations._requests import RequestOptions, RequestUnits

__all__ = ["setup"]

_log = logging.getLogger("app_db")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def setup(
    app: web.Application,
    container: DatabaseContainer,
    **options: Unpack[RequestOptions],
) -> None:
    """Give each request of an application a unit of work. It begins when a session is first asked for.

    It ends when the handler has returned or raised, and before the first byte of a response that the handler prepares itself. A
    response below 400 commits, also one that is raised; see `commit_rule`. If the commit fails, its error comes instead of the
    response. Middlewares that the application already has stand outside of the unit: they may answer for that error. Those that
    are added later stand inside. The options are those of `app_db.integrations.asgi.UnitOfWorkMiddleware`. With `attempts`, a
    request whose body the handler has streamed, by `request.content` or `request.multipart()`, is not repeated.
    """
    units = _Requests(RequestUnits(container, awaited=True, **options))

    @web.middleware
    async def in_unit(request: web.Request, handler: _Handler) -> web.StreamResponse:
        return await units.answer(request, handler)

    app.middlewares.append(in_unit)
    app.on_response_prepare.append(units.end)
    app.cleanup_ctx.append(_resources(container))


def _key(name: str, kind: type) -> Any:
    """Return a key for a value of requests. aiohttp has a class for that since 3.14, and warns of other keys."""
    keys = getattr(web, "RequestKey", None)
    return object() if keys is None else keys(name, kind)


_COMMITTED = _key("app_db.committed", list)
"""A request has its units that have committed by this key, of any container. It is not answered anew after that."""


class _Requests:
    """Gives the requests of an application their units."""

    def __init__(self, units: RequestUnits) -> None:
        self.units = units
        self.key = _key("app_db.unit", DeferredUnit)
        """A request has its unit by this key until its response begins."""

    async def answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Answer a request in a unit; anew in another one if that failed with an error that may pass."""
        before: dict[Any, Any] = {**request}
        for attempt in count(1):
            unit = self.units.unit_for(request.method)
            if unit.is_one_too_many:
                break
            try:
                with unit:
                    return await self._attempt(unit, request, handler)
            except Exception as error:
                may_be_repeated = (
                    attempt < self.units.attempts and unit.may_pass and self.key in request and not request.get(_COMMITTED)
                )
                if not (may_be_repeated and await _may_be_repeated(request, self.units.body_limit, error)):
                    raise
            await asyncio.sleep(unit.pause_after(attempt))
            request.clear()
            request.update(before)
        return await handler(request)

    async def _attempt(self, unit: DeferredUnit, request: web.Request, handler: _Handler) -> web.StreamResponse:
        request[self.key] = unit
        try:
            response = await handler(request)
        except web.HTTPException as raised:
            await self.end(request, raised)
            raise
        except BaseException as error:
            if not unit.is_over:
                await unit.end_awaited(error)
            raise
        await self.end(request, response)
        return response

    async def end(self, request: web.Request, response: web.StreamResponse) -> None:
        """End a request's unit, before its response begins."""
        unit: DeferredUnit | None = request.get(self.key)
        if unit is None:
            return
        if not unit.is_over:

            async def client_is_there() -> bool:
                return request.transport is not None and not request.transport.is_closing()

            await self.units.end_awaited(unit, response.status, response.headers.items(), client_is_there)
            if unit.has_committed:
                request.setdefault(_COMMITTED, []).append(unit)
        del request[self.key]


async def _may_be_repeated(request: web.Request, body_limit: int, error: Exception) -> bool:
    """Return whether a handler that is called again can read the body, because `request.read()` returns all of it."""
    length = request.content_length if request.body_exists else 0
    if length is None or length > body_limit or not await _is_kept(request, length):
        _log.warning("A request is not answered anew after %s: its body is not kept as a whole", type(error).__name__)
        return False
    _log.info("A request is answered anew after %s", type(error).__name__)
    return True


async def _is_kept(request: web.Request, length: int) -> bool:
    try:
        return len(await request.read()) == length
    except Exception:  # noqa: BLE001  # the body is larger than the application accepts, or the client has gone
        return False


def _resources(container: DatabaseContainer) -> Callable[[web.Application], AsyncGenerator[None]]:
    async def run(app: web.Application) -> AsyncGenerator[None]:
        await awaited(container.init_resources)
        yield
        await container.shutdown_resources()

    return run
