"""Names for coroutines, in addition to those of `app_db`. They need the extra `asyncio`."""

from app_db._sessions.async_routing import AsyncRoutingSession

__all__ = ["AsyncRoutingSession"]
