"""The container, as the rooms below it see it."""

from __future__ import annotations

from typing import Any, Protocol


class Container(Protocol):
    """A database container: what asks for one is given `app_db.DatabaseContainer`, and uses this of it."""

    core: Any
    providers: Any

    def settings(self) -> Any: ...
    def transaction(self, *args: Any, **options: Any) -> Any: ...
    def transaction_manager(self) -> Any: ...
