"""Sessions of connections that lead where another session of the unit has a transaction already: they borrow its connection.

Two connections with the same URL are two names for one database. With a transaction each, SQLite would have the unit wait for
itself, and other databases might commit half of it. So one lends its connection, and the session of the other is laid over it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app_db._sessions.routes import Route
from app_db._sessions.routing import Holders, OverlayConfig

if TYPE_CHECKING:
    from app_db._units.coordinator import Coordinator


class _OneWay:
    """Routes that all lead to one connection."""

    def __init__(self, lender: str) -> None:
        self.default = lender
        self._route = Route(lender, reads=False)

    def require(self, name: str) -> None:
        """Accept every name: it makes no difference."""

    def owner(self, name: str) -> str:
        return self.default

    def is_replica(self, name: str) -> bool:
        return False

    def next_replica(self, name: str) -> str:
        return self.default

    def of_mapper(self, mapper: Any) -> str:
        return self.default

    def of_statement(self, statement: Any) -> Route:
        return self._route


class BorrowingConfig(OverlayConfig):
    """What the sessions of one connection have in common that borrow the connection of another one's session."""

    def __init__(self, name: str, lender: str, coordinator: Coordinator, holders: Holders) -> None:
        super().__init__(coordinator, holders)
        self.name = name
        self.routes = _OneWay(lender)
