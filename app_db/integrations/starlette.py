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
from inspect import iscoroutinefunction
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request

from app_db import DatabaseContainer
from app_db.integrations._containers import awaited, require_container
from app_db.integrations.asgi import REPEATS, Receive, Scope, Send
from app_db.integrations.asgi import UnitOfWorkMiddleware as AsgiMiddleware

__all__ = ["UnitOfWorkMiddleware", "lifespan"]

_State = Mapping[str, Any]
_Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]


class UnitOfWorkMiddleware(AsgiMiddleware):
    """Gives each request a unit of work. See `app_db.integrations.asgi.UnitOfWorkMiddleware` for what it does and its options.

    A commit that fails is answered by the application's exception handler for the error's class, or else for `Exception` or 500.
    With `attempts`, handlers get the error of the last attempt only.
    """

    _handlers_may_repeat = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if not self._handlers_may_repeat and "app" in scope:
            self._let_handlers_repeat(scope["app"])
        await super().__call__(scope, receive, send)

    def _let_handlers_repeat(self, application: Any) -> None:
        """Have the application's exception handlers leave an error alone because of which a request is answered anew."""
        self._handlers_may_repeat = True
        handling: Any = self.app
        while handling is not None and not isinstance(handling, ExceptionMiddleware):
            handling = getattr(handling, "app", None)
        for kind, handler in application.exception_handlers.items():
            if handling is not None and isinstance(kind, type) and kind is not Exception:
                handling.add_exception_handler(kind, _unless_repeated(handler))

    async def respond(self, scope: Scope, receive: Receive, send: Send, failure: Exception) -> bool:
        """Respond by the application's handler for the error's class. Starlette itself can't, after it has tried to respond."""
        handlers = getattr(scope.get("app"), "exception_handlers", {})
        handler = next((handlers[kind] for kind in type(failure).__mro__ if kind in handlers and kind is not Exception), None)
        if handler is None:
            return False
        response = await _called(handler, Request(scope, receive, send), failure)
        await response(scope, receive, send)
        return True


def _unless_repeated(handler: Any) -> Any:
    async def handle(request: Request, error: Exception) -> Any:
        repeats = request.scope.get(REPEATS)
        if repeats is not None and repeats(error):
            raise error
        return await _called(handler, request, error)

    return handle


async def _called(handler: Any, request: Request, error: Exception) -> Any:
    """Call an exception handler as Starlette does: a plain function in a thread."""
    if iscoroutinefunction(handler) or iscoroutinefunction(getattr(handler, "__call__", None)):  # noqa: B004  # a callable object
        return await handler(request, error)
    return await run_in_threadpool(handler, request, error)


def lifespan(container: DatabaseContainer, own: _Lifespan | None = None) -> _Lifespan:
    """Return a lifespan that initializes the container's resources, and disposes its engines at the end.

    `own` is the application's own lifespan. It runs inside, and gives the state.
    """
    require_container(container)

    @asynccontextmanager
    async def run(app: Any) -> AsyncGenerator[_State | None]:
        await awaited(container.init_resources)
        try:
            async with own(app) if own is not None else nullcontext() as state:
                yield state
        finally:
            await container.shutdown_resources()

    return run
