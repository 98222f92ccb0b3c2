"""What integrations of all kinds do with a container."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isawaitable
from typing import Any

from app_db.errors import InvalidUse


def require_container(container: object) -> None:
    """Raise InvalidUse unless it is an instance of a DatabaseContainer."""
    if isinstance(container, type) or not hasattr(container, "deferred_unit"):
        raise InvalidUse(f"{container!r} is no database container", "Give an instance, such as Container()")


async def awaited(provide: Callable[[], Any]) -> Any:
    """Call a provider, or `container.init_resources`, and await what it returns where that is to be awaited."""
    made = provide()
    return await made if isawaitable(made) else made
