"""Litestar. It notes that a response has begun before it calls `send`, where a COMMIT may still fail."""

from __future__ import annotations

from copy import copy
from typing import Any


def answering_errors(application: Any) -> Any:
    """Return an ASGI application that answers the errors of another one by the exception handlers of the route."""
    from litestar.middleware._internal.exceptions import ExceptionHandlerMiddleware

    return ExceptionHandlerMiddleware(application, debug=None)


def renew_connection_state(scope: Any) -> None:
    """Give a scope a copy of what Litestar has noted about the request: whether its response has begun, for example."""
    from litestar.utils.scope.state import CONNECTION_STATE_KEY, ScopeState

    scope["state"][CONNECTION_STATE_KEY] = copy(ScopeState.from_scope(scope))
