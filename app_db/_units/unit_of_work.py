"""The unit of work under way, as application code sees it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, cast

from app_db._units.hooks import Hook, Hooks
from app_db._units.manager import ContextTransactionManager
from app_db._units.work import Work
from app_db.errors import AwaitRequired, InvalidUse, NoUnitOfWork, UnitOfWorkEnded

if TYPE_CHECKING:
    from transaction import Savepoint
    from transaction import Transaction as ZopeTransaction

    from app_db._units.owned_transactions import OwnedTransaction


class UnitOfWork:
    """The unit of work under way, as application code sees it: hooks, savepoints and dooming.

    `with container.transaction() as unit:` gives it, and inside the block so does `container.unit()`. Kept for longer, it
    raises UnitOfWorkEnded; for a block that runs without a unit, NoUnitOfWork.

    >>> from app_db import Container, DatabaseSettings
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> told = []
    >>> with container.transaction() as unit:
    ...     unit.on_commit(told.append, "committed")
    ...     unit.before_commit(told.append, "about to commit")
    >>> told
    ['about to commit', 'committed']
    """

    __slots__ = ("_work",)

    def __init__(self, work: Work | None) -> None:
        self._work = work

    def adopt(self) -> None:
        """Make the calling task the unit's owner, and the unit the one under way here.

        A unit belongs to the task that began it. This is for where it goes on in another one: a fixture that is set up in one
        task while the test runs in the next, say. The task that owned it can't use it any more.
        """
        manager, transaction = self._work_under_way().manager, self.transaction
        if not isinstance(manager, ContextTransactionManager):
            raise InvalidUse("Only a unit of the context's manager can be adopted", "Give the container no other manager")
        manager.adopt(cast("OwnedTransaction", transaction))

    @property
    def transaction(self) -> ZopeTransaction:
        """The zope transaction, which any other zope data manager may join."""
        return self._work_under_way().transaction

    def before_commit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `function` inside the unit, before anything is committed. If it raises, the unit aborts."""
        self._hooks(function).before_commit(_call(function, args, kwargs))

    def on_commit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `function` after the unit has committed and its sessions are closed; it may begin a unit of its own.

        If it raises, the unit stays committed, the other hooks run, and the block raises HookFailed.
        """
        self._hooks(function).on_commit(_call(function, args, kwargs))

    def on_abort(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `function` after the unit has aborted, for whatever reason, and its sessions are closed.

        What it raises is logged, because the block raises what made the unit abort.
        """
        self._hooks(function).on_abort(_call(function, args, kwargs))

    def doom(self, reason: str = "unit.doom() was called") -> None:
        """Make sure that this unit is not committed. Ending it without an exception raises UnitOfWorkDoomed."""
        self._work_under_way().doom(reason)

    @property
    def is_doomed(self) -> bool:
        """Whether the unit can't be committed any more."""
        return bool(self.transaction.isDoomed())

    def savepoint(self) -> Savepoint:
        """Return a savepoint across all the unit's connections; its `rollback()` undoes what was done since, again and again."""
        return self.transaction.savepoint(optimistic=True)

    def _work_under_way(self) -> Work:
        if self._work is None:
            raise NoUnitOfWork("The handle of a block that has no unit of work")
        if not self._work.is_under_way():
            raise UnitOfWorkEnded("The handle of a unit of work")
        return self._work

    def _hooks(self, function: Callable[..., Any]) -> Hooks:
        work = self._work_under_way()
        if iscoroutinefunction(function) and not work.asynchronous:
            advice = "Begin the unit with `async with`, or register a plain function"
            raise AwaitRequired(f"The hook {function.__qualname__}()", advice)
        if work.hooks is None:
            work.hooks = Hooks(work.transaction, work.manager, work.captures)
        return work.hooks


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
    return partial(function, *args, **kwargs) if args or kwargs else function
