"""Sessions that borrow the connection of another session of the unit, because both connections lead to one database.

Two connections with the same URL are two names for one database. If each had a transaction, a unit
on SQLite would wait for itself, and other databases might commit half of it. So the session of one
uses the connection of the other, the lender.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from app_db._sessions.routes import Route
from app_db._sessions.routing import Holders, OverlayConfig

if TYPE_CHECKING:
    from app_db._units.coordinator import Coordinator


class _OneWay:
    """Routes that send every statement to one connection, the lender."""

    def __init__(self, lender: str) -> None:
        self.default = lender
        self._route = Route(lender, reads=False)

    def require(self, name: str) -> None:
        """Accept every name."""

    def owner(self, name: str) -> str:
        return self.default

    def is_replica(self, name: str) -> bool:
        return False

    def next_replica(self, name: str) -> str:
        return self.default

    def of_mapper(self, mapper: object) -> str:
        return self.default

    def of_statement(self, statement: object) -> Route:
        return self._route


class BorrowingConfig(OverlayConfig):
    """The configuration of the sessions of one connection that borrow another one's."""

    def __init__(self, name: str, lender: str, coordinator: Coordinator, holders: Holders) -> None:
        super().__init__(coordinator, holders)
        self.name = name
        self.routes = _OneWay(lender)
