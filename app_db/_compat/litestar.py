"""Litestar. It notes that a response has begun before it calls `send`, where a COMMIT may still fail."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from copy import copy
from typing import Any


def answering_errors(application: Any) -> Any:
    """Return an ASGI application that answers the errors of another one by the exception handlers of the route."""
    from litestar.middleware._internal.exceptions import ExceptionHandlerMiddleware

    return ExceptionHandlerMiddleware(application, debug=None)


@contextmanager
def own_connection_state(scope: Any) -> Generator[None]:
    """Keep what Litestar notes about a request in a copy, and forget it after an error: that the response has begun, say."""
    from litestar.utils.scope.state import CONNECTION_STATE_KEY, ScopeState

    before = ScopeState.from_scope(scope)
    scope["state"][CONNECTION_STATE_KEY] = copy(before)
    try:
        yield
    except BaseException:
        scope["state"][CONNECTION_STATE_KEY] = before
        raise
