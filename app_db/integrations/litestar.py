"""Litestar: a plugin that gives each request a unit of work, and handlers the sessions of the container.

>>> from litestar import Litestar, post
>>> from litestar.di import NamedDependency
>>> from litestar.params import FromQuery
>>> from sqlalchemy.ext.asyncio import AsyncSession
>>> from app_db import Container
>>> from app_db.integrations.litestar import AppDbPlugin
>>> @post("/orders")
... async def place_order(sku: FromQuery[str], writer_async_session: NamedDependency[AsyncSession]) -> None:
...     ...
>>> app = Litestar([place_order], plugins=[AppDbPlugin(Container())])
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Unpack

from dependency_injector.providers import Provider
from litestar import Litestar
from litestar.config.app import AppConfig
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from litestar.plugins import InitPlugin
from sqlalchemy.orm import Session

from app_db import Connection, DatabaseContainer
from app_db._compat.litestar import answering_errors, own_connection_state
from app_db.errors import InvalidUse
from app_db.integrations._containers import awaited
from app_db.integrations._requests import RequestOptions
from app_db.integrations.asgi import REPEATS, Receive, Scope, Send
from app_db.integrations.asgi import UnitOfWorkMiddleware as AsgiMiddleware

__all__ = ["AppDbPlugin", "UnitOfWorkMiddleware", "provided"]


class AppDbPlugin(InitPlugin):
    """Gives each request of a Litestar application a unit of work, and initializes and closes the container's resources.

    Handlers and dependencies get the sessions of each connection by name: `writer_session` and `writer_async_session` are those
    of the connection `writer`. A dependency of the application's own with that name wins. The options are those of
    `app_db.integrations.asgi.UnitOfWorkMiddleware`. A commit that fails is answered by the exception handlers of the route.
    """

    def __init__(self, container: DatabaseContainer, **options: Unpack[RequestOptions]) -> None:
        self.container = container
        self._options = options

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Install it in an application. Litestar calls this."""
        middleware: Any = UnitOfWorkMiddleware
        app_config.middleware.insert(0, DefineMiddleware(middleware, container=self.container, **self._options))  # the outermost
        app_config.lifespan.insert(0, self._begin)
        app_config.after_exception.insert(0, _raise_if_repeated)
        app_config.on_shutdown.append(self._end)  # after those of the application, which may need the databases
        for name, type_ in _session_types().items():
            app_config.signature_namespace.setdefault(name, type_)
        for name, provider in self.container.providers.items():
            if isinstance(provider, Connection):
                for kind in ("session", "async_session"):
                    self._provide(app_config, f"{name}_{kind}", getattr(provider, kind))
        return app_config

    def _provide(self, app_config: AppConfig, name: str, provider: Provider[Any]) -> None:
        taken = app_config.dependencies.setdefault(name, _Named(provider, self.container))
        if isinstance(taken, _Named) and taken.container is not self.container:
            raise InvalidUse(
                f"Two containers of the application provide {name!r}",
                f"Say which one handlers get: Litestar(dependencies={{{name!r}: provided(container.{name})}})",
            )

    @asynccontextmanager
    async def _begin(self, app: Litestar) -> AsyncGenerator[None]:
        await awaited(self.container.init_resources)
        yield

    async def _end(self) -> None:
        await self.container.shutdown_resources()


async def _raise_if_repeated(error: Exception, scope: Any) -> None:
    """Raise an error because of which the request is answered anew. Litestar calls this before its exception handlers."""
    repeats = scope.get(REPEATS)
    if repeats is not None and repeats(error):
        raise error


def provided(provider: Provider[Any]) -> Provide:
    """Return a dependency on what a provider of the container provides.

    `Litestar(dependencies={"session": provided(container.async_session)})` gives handlers the session that finds its database.
    """

    async def dependency() -> Any:  # a coroutine, because an async session can't be made in a thread
        return await awaited(provider)

    return Provide(dependency)


class _Named(Provide):
    """A dependency that the plugin has named."""

    __slots__ = ("container",)

    def __init__(self, provider: Provider[Any], container: DatabaseContainer) -> None:
        super().__init__(provided(provider).dependency)
        self.container = container


def _session_types() -> dict[str, type]:
    """Return the types of sessions, which annotations may name that are imported for type checkers only."""
    try:
        from sqlalchemy.ext.asyncio import AsyncSession
    except ImportError:  # greenlet is missing
        return {"Session": Session}
    return {"Session": Session, "AsyncSession": AsyncSession}


class UnitOfWorkMiddleware(AsgiMiddleware):
    """The middleware of the plugin. Errors are handled inside it, so that exception handlers may use the unit that aborts."""

    def __init__(self, app: Any, container: DatabaseContainer, **options: Unpack[RequestOptions]) -> None:
        handled = answering_errors(app)

        async def attempt(scope: Scope, receive: Receive, send: Send) -> None:
            # Litestar notes here what it has read of a request, and that the response has begun, before `send` can commit.
            with own_connection_state(scope):
                await handled(scope, receive, send)

        super().__init__(attempt, container, **options)

    def endpoint(self, scope: Scope) -> Callable[..., object] | None:
        """Return the function of the route's handler."""
        function: Callable[..., object] | None = getattr(scope.get("route_handler"), "fn", None)
        return function

    async def respond(self, scope: Scope, receive: Receive, send: Send, failure: Exception) -> bool:
        """Respond to a commit that failed as Litestar does when the handler has raised the error."""

        async def failed(*arguments: object) -> None:
            raise failure

        await answering_errors(failed)(scope, receive, send)
        return True
