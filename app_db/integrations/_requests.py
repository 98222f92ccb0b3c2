"""What the middlewares of all web frameworks have in common: their options, and the end of a unit."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, TypedDict

from app_db import DatabaseContainer, DeferredUnit
from app_db.integrations._rule import CommitRule, commit_rule

_log = logging.getLogger("app_db")


class RequestOptions(TypedDict, total=False):
    """How the requests of an application get their units of work."""

    attempts: int
    """How often a request may be answered anew if its unit fails with an error that `retryable` accepts. 1 by default."""
    body_limit: int
    """The bytes of a request's body that are kept for that, 1 MiB by default. A request with a larger one is not repeated."""
    read_only_methods: Iterable[str]
    """Methods whose units are read-only, `("GET", "HEAD")` for example."""
    rule: CommitRule
    """A function to use in place of `commit_rule`."""
    isolation: str | None
    """The isolation level of units, as in `container.transaction()`."""
    timeout: float | None
    """The time limit of units in seconds, as in `container.transaction()`."""


class RequestUnits:
    """Makes the units of an application's requests, by RequestOptions."""

    def __init__(
        self,
        container: DatabaseContainer,
        *,
        awaited: bool,
        attempts: int = 1,
        body_limit: int = 2**20,
        read_only_methods: Iterable[str] = (),
        rule: CommitRule = commit_rule,
        isolation: str | None = None,
        timeout: float | None = None,
    ) -> None:
        options: dict[str, Any] = {"attempts": attempts, "isolation": isolation, "timeout": timeout, "awaited": awaited}
        self._any = container.deferred_unit(**options)
        self._read_only = container.deferred_unit(read_only=True, **options)
        self._read_only_methods = frozenset(method.upper() for method in read_only_methods)
        self._rule = rule
        self.attempts = attempts
        self.body_limit = body_limit

    def unit_for(self, method: str) -> DeferredUnit:
        """Return a new unit for a request with this method."""
        return (self._read_only if method in self._read_only_methods else self._any).anew()

    def commits(
        self, unit: DeferredUnit, status: int, headers: Iterable[tuple[str, str]], error: BaseException | None = None
    ) -> bool:
        """Return whether a response commits a unit."""
        lower: Mapping[str, str] = {name.lower(): value for name, value in headers}
        return not unit.is_doomed and self._rule(status, lower, error)


@contextmanager
def unless_committed(unit: DeferredUnit) -> Generator[None]:
    """Log an error that comes after the databases have committed, of a hook for example: the client must hear that it is done."""
    try:
        yield
    except Exception:
        if not unit.has_committed:
            raise
        _log.exception("A request has committed, and then something failed")
