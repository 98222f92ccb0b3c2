"""Functions that run before a unit of work commits, and after it has committed or aborted.

Hooks join zope's transaction as a data manager with savepoints. A rollback to a savepoint forgets
the hooks that were registered after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from functools import partial
from inspect import isawaitable, iscoroutinefunction
from typing import TYPE_CHECKING

from sqlalchemy.util.concurrency import await_only, in_greenlet
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface import implementer

from app_db._units.manager import TransactionManager, suspended
from app_db.errors import AwaitRequired, HookFailed, InvalidUse

if TYPE_CHECKING:
    from transaction import Transaction

log = logging.getLogger("app_db")

Hook = Callable[[], object]


@implementer(ISavepointDataManager)
class Hooks:
    """The hooks of one unit of work. Errors of on_commit and on_abort hooks are kept in `errors`: the unit has ended by then."""

    def __init__(self, transaction: Transaction, manager: TransactionManager, captures: list[CapturedHooks]) -> None:
        self._transaction = transaction
        self._captures = captures
        self._manager = manager
        self._before_commit: list[Hook] = []
        self._on_commit: list[Hook] = []
        self._on_abort: list[Hook] = []
        self._joined = False
        self._announced = False
        self._has_run_before_commit = False
        self._ending = False
        self.has_committed = False
        """Set it before zope aborts a transaction that the databases have committed. The on_commit hooks run then."""
        self.errors: list[Exception] = []
        self.interruption: BaseException | None = None

    def before_commit(self, hook: Hook) -> None:
        """Register `hook` to run inside the unit, before anything is committed. If it raises, the unit aborts."""
        if self._has_run_before_commit or not self._may_join:
            raise InvalidUse(
                "A before_commit hook was registered while the unit commits, after these hooks have run",
                "Register it before, or do its work where you are",
            )
        self._join()
        self._before_commit.append(hook)

    def on_commit(self, hook: Hook) -> None:
        """Register `hook` to run after the unit has committed and its sessions are closed."""
        self._join()
        self._on_commit.append(hook)

    def on_abort(self, hook: Hook) -> None:
        """Register `hook` to run after the unit has aborted and its sessions are closed."""
        self._join()
        self._on_abort.append(hook)

    @property
    def _may_join(self) -> bool:
        """Whether the unit is still at work. During COMMIT, in a listener of a flush for example, zope takes no data managers."""
        return self._transaction.status in ("Active", "Doomed")

    def _join(self) -> None:
        if not self._joined and self._may_join:
            self._transaction.join(self)
            self._joined = True
        if not self._announced:
            self._transaction.addBeforeCommitHook(self._run_before_commit)
            self._transaction.addAfterCommitHook(self._run_after_commit)
            self._transaction.addBeforeAbortHook(self._note_end)
            self._transaction.addAfterAbortHook(self._run_after_abort)
            self._announced = True

    def _note_end(self) -> None:
        self._ending = True

    def _run_before_commit(self) -> None:
        while self._before_commit:  # a hook may register further ones
            self._call(self._before_commit.pop(0))
        self._has_run_before_commit = True

    def _run_after_commit(self, committed: bool) -> None:
        if not committed:
            return
        try:
            self._follow_commit()
        except BaseException as error:  # noqa: BLE001  # the unit raises it; zope only logs it
            self.interruption = error

    def run_what_is_left(self) -> None:
        """Run the on_commit hooks that have not run because an exception from outside interrupted zope."""
        if self._on_commit:
            self._follow_commit()

    def _run_after_abort(self) -> None:
        if self.has_committed:
            self._follow_commit()
        else:
            self._run(self._on_abort)

    def _follow_commit(self) -> None:
        if self._captures:
            self._captures[-1].take(self._on_commit)
        else:
            self._run(self._on_commit)

    def _run(self, hooks: list[Hook]) -> None:
        with suspended(self._manager):  # the ended transaction is still the current one, and a hook may begin a unit
            while hooks:
                hook = hooks.pop(0)
                try:
                    self._call(hook)
                except Exception as error:
                    log.exception("The hook %r failed", hook)
                    self.errors.append(error)
                except BaseException as error:  # noqa: BLE001  # raised below; after a commit zope swallows it, so the block raises it
                    self.interruption = error
        if self.interruption is not None:
            raise self.interruption

    def _call(self, hook: Hook) -> None:
        made = hook()
        if not in_greenlet():
            _refuse_awaitable(made, hook, "Begin the unit with `async with`")
        elif isawaitable(made):
            await_only(made)

    # -- what zope asks of a data manager

    def sortKey(self) -> str:  # noqa: N802  # zope's name
        return "app_db._units.hooks"

    def savepoint(self) -> HooksSavepoint:
        return HooksSavepoint(self._before_commit, self._on_commit, self._on_abort)

    def abort(self, transaction: Transaction) -> None:
        """Forget the hooks if zope rolls back to a savepoint from before they joined, but not if the whole unit aborts."""
        if not self._ending and transaction.status in ("Active", "Doomed"):
            for hooks in (self._before_commit, self._on_commit, self._on_abort):
                hooks.clear()
            self._joined = False

    def tpc_begin(self, transaction: Transaction) -> None: ...
    def commit(self, transaction: Transaction) -> None: ...
    def tpc_vote(self, transaction: Transaction) -> None: ...
    def tpc_finish(self, transaction: Transaction) -> None: ...
    def tpc_abort(self, transaction: Transaction) -> None: ...


# ---- hooks that are captured instead of run ------------------------------------------------------------------------------


class CapturedHook:
    """A function that would have been called after a commit, with its arguments. Two are equal if all these are.

    >>> from app_db.testing import CapturedHook
    >>> CapturedHook(dict, sku="A-1") == CapturedHook(dict, sku="A-1")
    True
    >>> CapturedHook(dict, sku="A-1")
    dict(sku='A-1')
    """

    __slots__ = ("args", "function", "kwargs")

    def __init__(self, function: Callable[..., object], /, *args: object, **kwargs: object) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs

    def __call__(self) -> object:
        """Call the function, and return what it returns."""
        return self.function(*self.args, **self.kwargs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CapturedHook):
            return NotImplemented
        return (self.function, self.args, self.kwargs) == (other.function, other.args, other.kwargs)

    def __hash__(self) -> int:
        return hash((self.function, self.args, frozenset(self.kwargs.items())))

    def __repr__(self) -> str:
        given = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        name = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"{name}({', '.join(given)})"


class CapturedHooks(list[CapturedHook]):
    """A list of the hooks of committed units, in the order in which they would have run."""

    def take(self, hooks: list[Hook]) -> None:
        self.extend(map(_captured, hooks))
        hooks.clear()

    def run(self) -> None:
        """Run the hooks, and those of the units that they begin, and remove them from this list.

        If a hook raises, the others still run, and HookFailed is raised afterwards. Raises
        AwaitRequired for coroutine functions.
        """
        for hook in self:
            if iscoroutinefunction(hook.function):
                raise AwaitRequired(f"The hook {hook!r}", _AWAIT_THEM)
        errors: list[Exception] = []
        while self:
            hook = self.pop(0)
            try:
                _refuse_awaitable(hook(), hook)
            except Exception as error:
                log.exception("The hook %r failed", hook)
                errors.append(error)
        _tell(errors)

    async def run_awaited(self) -> None:
        """Run the hooks as `run` does, and await those that are coroutine functions."""
        errors: list[Exception] = []
        while self:
            hook = self.pop(0)
            try:
                made = hook()
                if isawaitable(made):
                    await made
            except Exception as error:
                log.exception("The hook %r failed", hook)
                errors.append(error)
        _tell(errors)


_AWAIT_THEM = "Write `await hooks.run_awaited()`"


def _captured(hook: Hook) -> CapturedHook:
    return CapturedHook(hook.func, *hook.args, **hook.keywords) if isinstance(hook, partial) else CapturedHook(hook)


def _refuse_awaitable(made: object, hook: object, advice: str = _AWAIT_THEM) -> None:
    if isawaitable(made):
        if isinstance(made, Coroutine):
            made.close()  # avoids the warning that it was never awaited
        raise AwaitRequired(f"What the hook {hook!r} returned", advice)


def _tell(errors: list[Exception]) -> None:
    if errors:
        raise HookFailed(errors) from errors[0]


@implementer(IDataManagerSavepoint)
class HooksSavepoint:
    """The number of hooks of each kind when the savepoint was taken."""

    def __init__(self, *kinds: list[Hook]) -> None:
        self._counted = [(hooks, len(hooks)) for hooks in kinds]

    def rollback(self) -> None:
        for hooks, count in self._counted:
            del hooks[count:]
