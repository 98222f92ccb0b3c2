"""What coroutines use beside the names of `app_db`. It needs the extra `asyncio`."""

from app_db._sessions.async_routing import AsyncRoutingSession

__all__ = ["AsyncRoutingSession"]
