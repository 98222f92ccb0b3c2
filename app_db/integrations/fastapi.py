"""FastAPI: sessions as dependencies, a unit of work for each request, and the container's resources for the lifespan.

>>> from typing import Annotated
>>> from fastapi import FastAPI
>>> from sqlalchemy.ext.asyncio import AsyncSession
>>> from app_db import Container
>>> from app_db.integrations.fastapi import UnitOfWorkMiddleware, lifespan, provided
>>> container = Container()
>>> Writer = Annotated[AsyncSession, provided(container.writer.async_session)]
>>> app = FastAPI(lifespan=lifespan(container))
>>> app.add_middleware(UnitOfWorkMiddleware, container=container)
>>> @app.post("/orders", status_code=201)
... async def place_order(sku: str, session: Writer) -> None:
...     ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from dependency_injector.providers import Provider
from fastapi import Depends

from app_db.integrations._containers import awaited
from app_db.integrations.starlette import UnitOfWorkMiddleware, lifespan

__all__ = ["UnitOfWorkMiddleware", "dependency_of", "lifespan", "provided"]


def provided(provider: Provider[Any]) -> Any:
    """Return a dependency on what a provider of the container provides. Nothing has to be wired.

    `Annotated[Session, provided(container.writer.session)]` is the session of the request's unit.
    """
    return Depends(dependency_of(provider))


def dependency_of(provider: Provider[Any]) -> Callable[[], Awaitable[Any]]:
    """Return the key of a provider in `app.dependency_overrides`."""
    return _Dependency(provider)


class _Dependency:
    """Calls a provider in a coroutine: FastAPI calls functions in threads, where no async session can be made."""

    def __init__(self, provider: Provider[Any]) -> None:
        self._provider = provider

    async def __call__(self) -> Any:
        return await awaited(self._provider)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Dependency) and other._provider is self._provider  # of its own kind

    def __hash__(self) -> int:
        return hash(self._provider)
