"""A unit of work that begins when it is first asked for: that of a request, which may need none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import Token
from threading import Lock
from typing import Any, Self, cast

from app_db._liveness import WithBlock
from app_db._units.coordinator import Coordinator
from app_db._units.manager import ContextTransactionManager, Deferred
from app_db._units.options import Options, options_from, signature_of_options
from app_db._units.own_unit import OwnUnit
from app_db._units.owned_transactions import AwaitedTransaction, OwnedTransaction, Owner, acting_for
from app_db._units.transactions import pause_after
from app_db.errors import InvalidUse


class _NotCommitted(Exception):  # it is never raised: it tells a unit to abort
    """The reason why a unit of work aborts that must not commit, where there was no error."""


def _nothing() -> None:
    """Return None, for a unit that is named after the line that begins it."""


class DeferredUnit(WithBlock):
    """A unit of work that begins when a session, or a block that takes part in a unit, first asks for it.

    `with container.deferred_unit() as unit:` makes it known in this context and in copies of it: those of the threads and tasks
    that serve a request. It belongs to the task that asked first. When that task is done, it belongs to the next one that asks;
    a task that asks while another one has it gets ForeignUnitOfWork. `unit.end()` commits it, and nothing can begin it
    afterwards. A block that ends without that aborts it. The middlewares of `app_db.integrations` are made with it.

    >>> from app_db import Container, DatabaseSettings
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> with container.deferred_unit() as unit:
    ...     before = unit.has_begun
    ...     session = container.writer.session()
    ...     before, unit.has_begun
    ...     unit.end()
    (False, True)
    """

    __slots__ = ("_awaited", "_coordinator", "_guard", "_manager", "_options", "_role", "_token", "begun_by", "is_over")

    def __init__(self, coordinator: Coordinator, options: Options, *, awaited: bool) -> None:
        manager = coordinator.manager
        if not isinstance(manager, ContextTransactionManager):
            raise InvalidUse(
                f"A unit of work can't be deferred under a {type(manager).__name__}, which knows no tasks",
                "Give the container no other manager",
            )
        self._coordinator = coordinator
        self._manager = manager
        self._options = options
        self._awaited = awaited
        self._guard = Lock()
        self._role: OwnUnit | None = None
        self._token: Token[Deferred | None] | None = None
        self.begun_by: Callable[[], Callable[..., object] | None] = _nothing
        """Returns the function that the unit is for, such as a request's, by which `container.pools()` names the unit."""
        self.is_over = False
        """Whether the unit has ended, or can't begin any more."""

    def __enter__(self) -> Self:
        self._token = self._manager.deferred.set(self)
        return self

    def anew(self) -> DeferredUnit:
        """Return another unit with the same options, that has not begun."""
        return DeferredUnit(self._coordinator, self._options, awaited=self._awaited)

    def _leave(self, error: BaseException | None) -> None:
        if self._token is not None:
            with suppress(ValueError):  # a coroutine that is closed in another context than it ran in
                self._manager.deferred.reset(self._token)
        self.is_over = True
        self.liveness.torn = None
        if self._role is not None:
            self._role.torn_down()  # does nothing if the unit has ended

    @property
    def is_one_too_many(self) -> bool:
        """Whether this context has another deferred unit of the container: a middleware may have been installed twice."""
        other = self._manager.deferred.get()
        return other is not None and other is not self and not other.is_over

    @property
    def has_begun(self) -> bool:
        """Whether the unit was asked for."""
        return self._role is not None

    @property
    def is_doomed(self) -> bool:
        """Whether `unit.doom()` was called: the application wants no commit, and no error."""
        return self._role is not None and self._role.work.is_vetoed

    @property
    def has_committed(self) -> bool:
        """Whether the databases have committed. A hook may have failed afterwards."""
        return self._role is not None and self._role.work.has_committed

    @property
    def may_pass(self) -> bool:
        """Whether the unit has failed with an error that `retryable` accepts."""
        return self._role is not None and self._role.may_pass

    def pause_after(self, attempt: int) -> float:
        """Return how many seconds to wait before the attempt that follows."""
        return pause_after(attempt, self._options)

    def transaction(self) -> OwnedTransaction:
        """Return the unit's transaction for the calling task or thread. The first call begins it."""
        if self._role is None:
            with self._guard:  # two threads of a request may ask at the same time
                if self._role is None:
                    role = OwnUnit(self._coordinator, self._options, None, self.liveness_to_enter(), self._awaited)
                    function = self.begun_by()
                    role.begun_by = function if hasattr(function, "__code__") else None  # a class has no line
                    role.enter()
                    self._role = role
        found = self.begun()
        if found is None:
            raise cast("OwnedTransaction", self._role.transaction).refusal()
        return found

    def begun(self) -> OwnedTransaction | None:
        """Return the unit's transaction if it has begun, and the calling code may use it."""
        if self._role is None:
            return None
        found = cast("OwnedTransaction", self._role.transaction)
        if not found.is_usable():
            owner = found.owner.task
            if not found.is_open() or owner is None or not owner.done():
                return None
            found.owner = Owner()
        return found

    def end(self, error: BaseException | None = None, *, commit: bool = True) -> None:
        """Commit the unit, or abort it because of an error or without one. Raises what `with container.transaction():` would.

        A unit in which another block is still open is aborted, and raises InvalidUse: the block may not have done all its work.
        """
        self.is_over = True
        if self._role is None:
            return
        if commit and error is None and self._role.work.open_blocks:
            unfinished = InvalidUse(
                "A unit of work was to commit while a block that takes part in it was open, so that it was aborted",
                "End the block before you answer a request or return from a task, and await what takes part. A block that goes "
                "on needs propagation='requires_new'. In a web application, compression belongs outside of the unit",
            )
            self._role.leave(unfinished)
            raise unfinished
        self._role.leave(error if commit else error or _NotCommitted())

    async def end_awaited(self, error: BaseException | None = None, *, commit: bool = True) -> None:
        """Do the same in a coroutine. Any task may call it, on behalf of the task to which the unit belongs."""
        from app_db._units.to_the_end import to_the_end  # not at start-up: many programs have no coroutines

        if self._role is None:
            self.is_over = True
            return
        transaction = cast("AwaitedTransaction", self._role.transaction)
        if transaction.owner.task in (None, asyncio.current_task()):
            await to_the_end(self.end, error, commit=commit)
        else:
            with acting_for(transaction.owner.task):
                await to_the_end(self.end, error, commit=commit)

    def renew(self) -> None:
        """Let another unit begin if one is asked for: that of an error handler, after the first one could not commit."""
        if not self.is_over:
            raise InvalidUse("The unit of work is open", "End it first")
        self._role, self.is_over = None, False


def build_deferred_unit(coordinator: Coordinator, *, awaited: bool = False, **options: Any) -> DeferredUnit:
    """Return a DeferredUnit. `awaited`: coroutines use it. The other options are those of `transaction()`."""
    return DeferredUnit(coordinator, options_from(**options), awaited=awaited)


build_deferred_unit.__signature__ = signature_of_options(build_deferred_unit)  # type: ignore[attr-defined]  # `inspect` reads it
