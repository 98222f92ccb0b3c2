"""Starlette: a unit of work for each request, and the container's resources for the lifespan.

>>> from starlette.applications import Starlette
>>> from starlette.middleware import Middleware
>>> from app_db import Container
>>> from app_db.integrations.starlette import UnitOfWorkMiddleware, lifespan
>>> container = Container()
>>> app = Starlette(lifespan=lifespan(container), middleware=[Middleware(UnitOfWorkMiddleware, container=container)])
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from inspect import isawaitable, iscoroutinefunction
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from app_db import DatabaseContainer
from app_db.integrations.asgi import Receive, Scope, Send
from app_db.integrations.asgi import UnitOfWorkMiddleware as AsgiMiddleware

__all__ = ["UnitOfWorkMiddleware", "lifespan"]

_State = Mapping[str, Any]
_Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]


class UnitOfWorkMiddleware(AsgiMiddleware):
    """Gives each request a unit of work. See `app_db.integrations.asgi.UnitOfWorkMiddleware` for what it does and its options.

    A commit that fails is answered by the application's exception handler for the error's class, or else for `Exception` or 500.
    """

    async def respond(self, scope: Scope, receive: Receive, send: Send, failure: Exception) -> bool:
        """Respond by the application's handler for the error's class. Starlette itself can't, after it has tried to respond."""
        handlers = getattr(scope.get("app"), "exception_handlers", {})
        handler = next((handlers[kind] for kind in type(failure).__mro__ if kind in handlers and kind is not Exception), None)
        if handler is None:
            return False
        request = Request(scope, receive, send)
        if iscoroutinefunction(handler):
            response = await handler(request, failure)
        else:
            response = await run_in_threadpool(handler, request, failure)
        await response(scope, receive, send)
        return True


def lifespan(container: DatabaseContainer, own: _Lifespan | None = None) -> _Lifespan:
    """Return a lifespan that initializes the container's resources, and disposes its engines at the end.

    `own` is the application's own lifespan. It runs inside, and gives the state.
    """

    @asynccontextmanager
    async def run(app: Any) -> AsyncGenerator[_State | None]:
        begun = container.init_resources()
        if isawaitable(begun):
            await begun
        try:
            async with own(app) if own is not None else nullcontext() as state:
                yield state
        finally:
            await container.shutdown_resources()

    return run
