"""What the middlewares of all web frameworks have in common: their options, and the end of a unit."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypedDict

from app_db import DatabaseContainer, DeferredUnit
from app_db.errors import InvalidUse
from app_db.integrations._containers import require_container
from app_db.integrations._rule import CommitRule, commit_rule

_log = logging.getLogger("app_db")

Headers = Iterable[tuple[str, str]]


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
        require_container(container)
        for name, number in (("attempts", attempts), ("body_limit", body_limit)):
            require_number(name, number)
        if not callable(rule):
            raise InvalidUse(f"rule={rule!r} can't be called", "Give a function, such as commit_rule")
        if isinstance(read_only_methods, str):
            raise InvalidUse(
                f"read_only_methods={read_only_methods!r} is a string",
                f"Give a tuple: ({read_only_methods!r},)",
            )
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

    def end(self, unit: DeferredUnit, status: int, headers: Headers, error: BaseException | None = None) -> None:
        """End a unit as its response says. Raise the error of its end, unless the databases have committed."""
        try:
            commits = self._commits(unit, status, headers, error)
        except BaseException as failure:
            unit.end(failure)
            raise
        with _unless_committed(unit):
            unit.end(commit=commits)

    async def end_awaited(
        self, unit: DeferredUnit, status: int, headers: Headers, client_is_there: Callable[[], Awaitable[bool]]
    ) -> bool:
        """Do the same in a coroutine. Return False if the unit aborts because its client has gone."""
        try:
            commits = self._commits(unit, status, headers, None)
            is_there = not commits or await client_is_there()
        except BaseException as failure:
            await unit.end_awaited(failure)
            raise
        if not is_there:
            _log.info("A request aborts, because its client has gone")
        with _unless_committed(unit):
            await unit.end_awaited(commit=commits and is_there)
        return is_there

    def _commits(self, unit: DeferredUnit, status: int, headers: Headers, error: BaseException | None) -> bool:
        if unit.is_doomed:
            return False
        return _decision(self._rule(status, {name.lower(): value for name, value in headers}, error), self._rule)


def _decision(decided: object, rule: CommitRule) -> bool:
    if not isinstance(decided, bool):  # an un-awaited coroutine is true, too
        raise InvalidUse(f"The rule {rule!r} returned {decided!r}", "Return True or False, from a plain function")
    return decided


def require_number(name: str, given: object) -> None:
    """Raise InvalidUse unless an option is a number of at least 0."""
    if not isinstance(given, int) or given < 0:
        raise InvalidUse(f"{name}={given!r} is no whole number", f"Give one: {name}=3")


@contextmanager
def _unless_committed(unit: DeferredUnit) -> Generator[None]:
    """Log an error that comes after the databases have committed, of a hook for example: the client must hear that it is done."""
    try:
        yield
    except Exception:
        if not unit.has_committed:
            raise
        _log.exception("A request has committed, and then something failed")
