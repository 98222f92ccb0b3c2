"""The session of coroutines that finds its database: a `RoutingSession` does its work.

Importing this needs greenlet, which comes with the extra `asyncio`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker

from app_db._sessions.async_sessions import AsyncUnitSession
from app_db._sessions.routing import OverlayConfig, RoutingConfig, RoutingSession
from app_db._sessions.sessions import UnitRegistry

if TYPE_CHECKING:
    from app_db.settings import SessionSettings


class AsyncRoutingSession(AsyncUnitSession):
    """A session for coroutines that goes to the connection of the model, table or statement that it is given."""

    sync_session_class: Any = RoutingSession

    def using(self, name: str) -> AbstractContextManager[None]:
        """Have statements in the block go to the connection `name`, as `RoutingSession.using` does. Nothing in it is awaited."""
        return cast(RoutingSession, self.sync_session).using(name)


def build_async_routing_sessionmaker(config: OverlayConfig, settings: SessionSettings) -> async_sessionmaker[AsyncRoutingSession]:
    """Return the maker of the sessions that coroutines use of a config."""
    arguments: Any = {"config": config, "autoflush": settings.autoflush, "expire_on_commit": settings.expire_on_commit}
    return async_sessionmaker(class_=AsyncRoutingSession, **arguments)


def build_async_routing_session(config: RoutingConfig, settings: SessionSettings) -> async_scoped_session[AsyncRoutingSession]:
    """Return the proxy that is always the current unit's session for coroutines."""
    maker = build_async_routing_sessionmaker(config, settings)
    scoped: async_scoped_session[AsyncRoutingSession] = async_scoped_session(maker, lambda: None)
    scoped.registry = UnitRegistry(maker)
    return scoped
