"""Sessions of connections that lead where another session of the unit has a transaction already: they borrow its connection.

Two connections with the same URL are two names for one database. With a transaction each, SQLite would have the unit wait for
itself, and other databases might commit half of it. So one lends its connection, and the session of the other is laid over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import sessionmaker

from app_db.routes import Route
from app_db.routing import RoutingHome, RoutingSession
from app_db.sessions import IdleSessions, NewSessions

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import async_sessionmaker

    from app_db.coordinator import Coordinator
    from app_db.settings import SessionSettings


class _OneWay:
    """Routes that all lead to one connection."""

    has_default = True

    def __init__(self, lender: str) -> None:
        self.default = lender
        self._route = Route(lender, reads=False)

    def require(self, name: str) -> None:
        """Accept every name: it makes no difference."""

    def owner(self, name: str) -> str:
        return self.default

    def is_replica(self, name: str) -> bool:
        return False

    def may_lag_behind(self, name: str) -> bool:
        return False

    def next_replica(self, name: str) -> str:
        return self.default

    def of_mapper(self, mapper: Any) -> str:
        return self.default

    def of_statement(self, statement: Any) -> Route:
        return self._route


class BorrowingHome(RoutingHome):
    """What the sessions of one connection have in common that borrow the connection of another one's session."""

    def __init__(
        self, name: str, lender: str, coordinator: Coordinator, session_of: Callable[[str], Any], *, asynchronous: bool = False
    ) -> None:
        super().__init__(coordinator, _no_settings, lambda: (lender,), session_of, asynchronous=asynchronous)
        self.name = name
        self._one_way: Any = _OneWay(lender)

    @property
    def routes(self) -> Any:
        """Where statements go: to the lender."""
        return self._one_way


def _no_settings() -> Any:
    raise NotImplementedError  # a home that has only one way asks for none


def build_borrowing_sessionmaker(home: BorrowingHome, settings: SessionSettings) -> sessionmaker[RoutingSession]:
    """Return the maker of the sessions of a connection that borrows."""
    maker: sessionmaker[Any] = sessionmaker(
        class_=RoutingSession, home=home, autoflush=settings.autoflush, expire_on_commit=settings.expire_on_commit
    )
    home.idle = IdleSessions(maker)
    return maker


def build_async_borrowing_sessionmaker(home: BorrowingHome, settings: SessionSettings) -> async_sessionmaker[Any]:
    """Return the maker of the sessions that coroutines use on a connection that borrows."""
    from sqlalchemy.ext.asyncio import async_sessionmaker

    from app_db.async_routing import AsyncRoutingSession

    arguments: Any = {"home": home, "autoflush": settings.autoflush, "expire_on_commit": settings.expire_on_commit}
    maker = async_sessionmaker(class_=AsyncRoutingSession, **arguments)
    home.idle = NewSessions(maker)
    return maker
