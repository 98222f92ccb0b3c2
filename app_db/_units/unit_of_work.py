"""The handle of a unit of work that application code gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, ParamSpec, cast

from sqlalchemy.util.concurrency import greenlet_spawn

from app_db._units.hooks import Hook, Hooks
from app_db._units.manager import ContextTransactionManager
from app_db._units.savepoints import require_savepoints_of
from app_db._units.work import Work
from app_db.errors import AwaitRequired, InvalidUse, NoUnitOfWork, UnitOfWorkEnded

if TYPE_CHECKING:
    from transaction import Savepoint
    from transaction import Transaction as ZopeTransaction

    from app_db._units.owned_transactions import OwnedTransaction


P = ParamSpec("P")


class Done:
    """An awaitable of something that is done already."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


class UnitOfWork:
    """The handle of a unit of work, for hooks, savepoints and dooming.

    `with container.transaction() as unit:` returns it, and so does `container.unit()` inside the
    block. After the unit has ended, its methods raise UnitOfWorkEnded. In a block that runs without
    a unit they raise NoUnitOfWork.

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

    def __repr__(self) -> str:
        if self._work is None:
            return "<UnitOfWork: none>"
        if not self._work.is_under_way():
            return "<UnitOfWork: ended>"
        used = sorted({f"{branch.name} wrote" if branch.wrote else branch.name for branch in self._work.branches})
        return f"<UnitOfWork: under way, {', '.join(used) or 'nothing used'}>"

    def adopt(self) -> None:
        """Make the calling task the owner of the unit, and the unit current in this context.

        A unit belongs to the task that began it. Use this if another task goes on with the unit: a
        test, for example, whose fixture began the unit in a task of its own. The former owner can't
        use the unit afterwards. Raises InvalidUse under a manager other than
        ContextTransactionManager.
        """
        manager, transaction = self._work_under_way().manager, self.transaction
        if not isinstance(manager, ContextTransactionManager):
            raise InvalidUse("Only a unit of the context's manager can be adopted", "Give the container no other manager")
        manager.adopt(cast("OwnedTransaction", transaction))

    @property
    def transaction(self) -> ZopeTransaction:
        """The zope transaction. Other zope data managers may join it."""
        return self._work_under_way().transaction

    def before_commit(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `function(*args, **kwargs)` inside the unit, before anything is committed. If it raises, the unit aborts."""
        self._hooks(function).before_commit(_call(function, args, kwargs))

    def on_commit(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `function(*args, **kwargs)` after the unit has committed and its sessions are closed.

        It may begin a unit of its own. If it raises, the unit stays committed, the other hooks run,
        and the block raises HookFailed.
        """
        self._hooks(function).on_commit(_call(function, args, kwargs))

    def on_abort(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `function(*args, **kwargs)` after the unit has aborted and its sessions are closed.

        If it raises, its error is logged: the block raises the error that made the unit abort.
        """
        self._hooks(function).on_abort(_call(function, args, kwargs))

    def doom(self, reason: str = "unit.doom() was called") -> None:
        """Make sure that the unit is not committed. A block that ends without an exception then raises UnitOfWorkDoomed."""
        work = self._work_under_way()
        work.is_vetoed = True
        work.doom(reason)

    @property
    def number(self) -> int:
        """The number of the unit in this process, as logs and `container.pools()` name it. It stays after the unit's end."""
        if self._work is None:
            raise NoUnitOfWork("The handle of a block that has no unit of work")
        return self._work.number

    @property
    def is_doomed(self) -> bool:
        """Whether the unit is doomed: it can only be aborted."""
        return bool(self.transaction.isDoomed())

    def rollback(self, connection: str) -> Awaitable[None]:
        """Undo what the unit has done on one connection. The other connections keep their work, and the unit goes on.

        The connection's session can be used again. Objects that were added to it have left it, and
        the others are read again. In a unit that `async with` began, await the result; elsewhere
        awaiting is optional.
        """
        work = self._work_under_way()
        if work.asynchronous:
            return greenlet_spawn(work.roll_back_connection, connection)
        work.roll_back_connection(connection)
        return Done()

    def savepoint(self) -> Savepoint:
        """Return a savepoint across all connections of the unit.

        Its `rollback()` undoes what was done since. It may be called several times.
        """
        if self._work is not None:
            require_savepoints_of(self._work)
        return self.transaction.savepoint(optimistic=True)

    def _work_under_way(self) -> Work:
        if self._work is None:
            raise NoUnitOfWork("The handle of a block that has no unit of work")
        if not self._work.is_under_way():
            raise UnitOfWorkEnded("The handle of a unit of work")
        return self._work

    def _hooks(self, function: Callable[..., object]) -> Hooks:
        work = self._work_under_way()
        if iscoroutinefunction(function) and not work.asynchronous:
            advice = "Begin the unit with `async with`, or register a plain function"
            raise AwaitRequired(f"The hook {function.__qualname__}()", advice)
        if work.hooks is None:
            work.hooks = Hooks(work.transaction, work.manager, work.captures)
        return work.hooks


def _call(function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> Hook:
    return partial(function, *args, **kwargs) if args or kwargs else function
