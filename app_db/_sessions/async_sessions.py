"""The async sessions of a unit of work: SQLAlchemy's AsyncSession around a `UnitSession`.

Importing this needs greenlet, which comes with the extra `asyncio`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, cast

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session

from app_db._sessions.makers import UnitSessionmaker, configure, copied, derived, not_a_maker
from app_db._sessions.registry import UnitRegistry
from app_db._sessions.sessions import SessionConfig, UnitSession
from app_db._units.owned_transactions import async_session_refused
from app_db._units.work import Work
from app_db.settings._urls import require_asyncio

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from app_db._units.interfaces import BranchedWork
    from app_db.settings import ConnectionSettings, SessionSettings


class AsyncSessionConfig(SessionConfig):
    """The configuration that the async sessions of one connection share."""

    asynchronous = True

    def engine_for(self, work: BranchedWork) -> Engine:
        if not work.asynchronous:
            raise async_session_refused(f"The {self.name!r} async session", work.transaction)
        return super().engine_for(work)


class AsyncUnitSession(AsyncSession):
    """An async session of one unit of work, around a `UnitSession`."""

    sync_session_class: Any = UnitSession

    def __init__(self, *args: Any, sync_session_class: object = None, **arguments: Any) -> None:
        super().__init__(*args, **arguments)  # with the class attribute, which `async_unit_class` sets

    @property
    def config(self) -> SessionConfig:
        return cast(UnitSession, self.sync_session).config

    def enter(self, work: Work) -> None:
        cast(UnitSession, self.sync_session).enter(work)


class ConnectionAsyncSessionmaker(async_sessionmaker[AsyncSession]):
    """An async sessionmaker whose sessions use the engine that the connection has in the running event loop."""

    def __init__(self, engine: Callable[[], AsyncEngine], settings: SessionSettings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._engine = engine
        configure(self, settings)

    def __call__(self, **local_kw: Any) -> AsyncSession:
        require_asyncio()
        if self.kw["bind"] is None:
            local_kw.setdefault("bind", self._engine())
        return super().__call__(**local_kw)

    def __copy__(self) -> Self:
        return copied(self)


def build_async_sessionmaker(
    connection: ConnectionSettings,
    engine: Callable[[], AsyncEngine],
    session_class: type[Session] | None,
    async_session_class: type[AsyncSession] | None,
) -> async_sessionmaker[AsyncSession]:
    """Return the async sessionmaker of one connection."""
    class_ = async_session_class or connection.load_session_class("async_class", AsyncSession) or AsyncSession
    own = session_class or connection.load_session_class("class", Session)
    arguments = {} if own is None else {"sync_session_class": own}
    return ConnectionAsyncSessionmaker(engine, connection.session, class_=class_, **arguments)


def async_unit_class(base: type[AsyncUnitSession], maker: object) -> type[AsyncUnitSession]:
    """Return the class of a unit's async sessions, as `unit_class` does. The sync session inside has such a class, too."""
    if not isinstance(maker, async_sessionmaker):
        raise not_a_maker(maker, "async_sessionmaker")
    made = derived(base, maker.class_)
    made.sync_session_class = derived(
        base.sync_session_class, maker.kw.get("sync_session_class", maker.class_.sync_session_class)
    )
    return made


def build_async_scoped_session(maker: UnitSessionmaker) -> async_scoped_session[Any]:
    """Return the proxy of the current unit's async session."""
    scoped: async_scoped_session[Any] = async_scoped_session(cast(Any, maker), lambda: None)
    scoped.registry = UnitRegistry(maker)
    return scoped
