"""The sessions of coroutines: SQLAlchemy's, around the same `UnitSession` that threads use.

Importing this needs greenlet, which comes with the extra `asyncio`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

from app_db._sessions.sessions import SessionConfig, UnitRegistry, UnitSession
from app_db._units.work import Work
from app_db.errors import AwaitRequired

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


class AsyncSessionConfig(SessionConfig):
    """What the sessions have in common that coroutines use on one connection."""

    asynchronous = True

    def engine_for(self, work: Work) -> Engine:
        if not work.asynchronous:
            advice = "Begin its unit of work with `async with container.transaction():`"
            raise AwaitRequired(f"The {self.name!r} async session", advice)
        return super().engine_for(work)


class AsyncUnitSession(AsyncSession):
    """A session for coroutines that belongs to the unit of work in which it is first used. A `UnitSession` does its work."""

    sync_session_class = UnitSession

    @property
    def config(self) -> SessionConfig:
        """What it has in common with the others of its connection."""
        return cast(UnitSession, self.sync_session).config

    def enter(self, work: Work) -> None:
        """Belong to `work` from now on."""
        cast(UnitSession, self.sync_session).enter(work)


def build_async_sessionmaker(config: AsyncSessionConfig) -> async_sessionmaker[AsyncUnitSession]:
    """Return the maker of the sessions that coroutines use on one connection."""
    settings = config.settings.session
    arguments: Any = {"config": config, "autoflush": settings.autoflush, "expire_on_commit": settings.expire_on_commit}
    return async_sessionmaker(class_=AsyncUnitSession, **arguments)


def build_async_scoped_session(maker: async_sessionmaker[AsyncUnitSession]) -> async_scoped_session[AsyncUnitSession]:
    """Return the proxy that is always the current unit's session for coroutines."""
    scoped: async_scoped_session[AsyncUnitSession] = async_scoped_session(maker, lambda: None)
    scoped.registry = UnitRegistry(maker)
    return scoped
