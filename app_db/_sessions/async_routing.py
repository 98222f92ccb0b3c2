"""The async session that finds its database, around a `RoutingSession`.

Importing this needs greenlet, which comes with the extra `asyncio`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

from app_db._sessions.async_sessions import AsyncUnitSession
from app_db._sessions.routing import RoutingSession


class AsyncRoutingSession(AsyncUnitSession):
    """An async session of one unit of work that sends each statement to the connection of the model or table that it names.

    It follows the rules of `RoutingSession`. `container.async_session()` returns the current
    unit's.
    """

    sync_session_class = RoutingSession

    def using(self, name: str) -> AbstractContextManager[None]:
        """Send statements in the block to the connection `name`, as `RoutingSession.using` does. Use a plain `with`."""
        return cast(RoutingSession, self.sync_session).using(name)
