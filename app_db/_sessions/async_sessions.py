"""The async sessions of a unit of work: SQLAlchemy's AsyncSession around a `UnitSession`.

Importing this needs greenlet, which comes with the extra `asyncio`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

from app_db._sessions.registry import UnitRegistry
from app_db._sessions.sessions import SessionConfig, UnitSession
from app_db._units.work import Work
from app_db.errors import AwaitRequired

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from app_db._units.interfaces import BranchedWork


S = TypeVar("S", bound="AsyncUnitSession")


class AsyncSessionConfig(SessionConfig):
    """The configuration that the async sessions of one connection share."""

    asynchronous = True

    def engine_for(self, work: BranchedWork) -> Engine:
        if not work.asynchronous:
            advice = "Begin its unit of work with `async with container.transaction():`"
            raise AwaitRequired(f"The {self.name!r} async session", advice)
        return super().engine_for(work)


class AsyncUnitSession(AsyncSession):
    """An async session of one unit of work, around a `UnitSession`."""

    sync_session_class = UnitSession

    @property
    def config(self) -> SessionConfig:
        return cast(UnitSession, self.sync_session).config

    def enter(self, work: Work) -> None:
        cast(UnitSession, self.sync_session).enter(work)


def build_async_sessionmaker(config: AsyncSessionConfig) -> async_sessionmaker[AsyncUnitSession]:
    """Return the async sessionmaker of one connection."""
    settings = config.settings.session
    return async_sessionmaker(
        class_=AsyncUnitSession, config=config, autoflush=settings.autoflush, expire_on_commit=settings.expire_on_commit
    )


def build_async_scoped_session(maker: async_sessionmaker[S]) -> async_scoped_session[S]:
    """Return the proxy of the current unit's async session."""
    scoped: async_scoped_session[S] = async_scoped_session(maker, lambda: None)
    scoped.registry = UnitRegistry(maker)
    return scoped
