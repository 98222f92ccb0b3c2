"""The container, as the rooms below it see it."""

from __future__ import annotations

from typing import Any, Protocol

from app_db.errors import InvalidUse
from app_db.settings import DatabaseSettings


class Container(Protocol):
    """A database container: what asks for one is given `app_db.DatabaseContainer`, and uses this of it."""

    core: Any
    providers: Any

    def settings(self) -> DatabaseSettings: ...
    def transaction(self, *, propagation: str, attempts: int) -> Any: ...
    def transaction_manager(self) -> object: ...


def require_container(container: object) -> None:
    """Raise InvalidUse unless it is an instance of a DatabaseContainer."""
    if isinstance(container, type) or not hasattr(container, "deferred_unit"):
        raise InvalidUse(f"{container!r} is no database container", "Give an instance, such as Container()")
