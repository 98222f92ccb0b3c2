"""Functions that run before a unit of work commits, and after it has committed or aborted.

Hooks join zope's transaction as a data manager of their own, with savepoints: a hook registered inside a savepoint that
is rolled back is forgotten with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from sqlalchemy.util.concurrency import await_only, in_greenlet
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface import implementer

from app_db.errors import AwaitRequired
from app_db.manager import suspended

if TYPE_CHECKING:
    from transaction import Transaction

log = logging.getLogger("app_db")

Hook = Callable[[], Any]


@implementer(ISavepointDataManager)
class Hooks:
    """The hooks of one unit of work. What on-commit and on-abort hooks raise is kept in `errors`: the outcome stands by then."""

    def __init__(self, transaction: Transaction, manager: Any) -> None:
        self._transaction = transaction
        self._manager = manager
        self._before_commit: list[Hook] = []
        self._on_commit: list[Hook] = []
        self._on_abort: list[Hook] = []
        self._joined = False
        self._announced = False
        self._ending = False
        self.has_committed = False
        """To be set where zope ends a committed transaction by aborting it, so that the right hooks run."""
        self.errors: list[Exception] = []
        self.interruption: BaseException | None = None

    def before_commit(self, hook: Hook) -> None:
        """Run `hook` inside the unit, before anything is committed. If it raises, the unit aborts."""
        self._join()
        self._before_commit.append(hook)

    def on_commit(self, hook: Hook) -> None:
        """Run `hook` after the unit has committed and its sessions are closed."""
        self._join()
        self._on_commit.append(hook)

    def on_abort(self, hook: Hook) -> None:
        """Run `hook` after the unit has aborted and its sessions are closed."""
        self._join()
        self._on_abort.append(hook)

    def _join(self) -> None:
        if not self._joined:
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

    def _run_after_commit(self, committed: bool) -> None:
        if committed:
            self._run(self._on_commit)

    def _run_after_abort(self) -> None:
        self._run(self._on_commit if self.has_committed else self._on_abort)

    def _run(self, hooks: list[Hook]) -> None:
        with suspended(self._manager):  # the ended transaction is still the current one, and a hook may begin a unit
            while hooks:
                hook = hooks.pop(0)
                try:
                    self._call(hook)
                except Exception as error:
                    log.exception("The hook %r failed", hook)
                    self.errors.append(error)
                except BaseException as error:  # noqa: BLE001  # raised below, and after a commit, where zope swallows it, by the block
                    self.interruption = error
        if self.interruption is not None:
            raise self.interruption

    def _call(self, hook: Hook) -> None:
        made = hook()
        if not isawaitable(made):
            return
        if not in_greenlet():
            if isinstance(made, Coroutine):
                made.close()  # or it would be warned of as never awaited
            raise AwaitRequired(f"What the hook {hook!r} returned", "Begin the unit with `async with`")
        await_only(made)

    # -- what zope asks of a data manager

    def sortKey(self) -> str:  # noqa: N802  # zope's name
        return "app_db.hooks"

    def savepoint(self) -> HooksSavepoint:
        return HooksSavepoint(self._before_commit, self._on_commit, self._on_abort)

    def abort(self, transaction: Transaction) -> None:
        """Forget the hooks when it is a savepoint older than the first of them that is rolled back, not the whole unit."""
        if not self._ending and transaction.status in ("Active", "Doomed"):
            for hooks in (self._before_commit, self._on_commit, self._on_abort):
                hooks.clear()
            self._joined = False

    def tpc_begin(self, transaction: Transaction) -> None: ...
    def commit(self, transaction: Transaction) -> None: ...
    def tpc_vote(self, transaction: Transaction) -> None: ...
    def tpc_finish(self, transaction: Transaction) -> None: ...
    def tpc_abort(self, transaction: Transaction) -> None: ...


@implementer(IDataManagerSavepoint)
class HooksSavepoint:
    """How many hooks there were of each kind."""

    def __init__(self, *kinds: list[Hook]) -> None:
        self._counted = [(hooks, len(hooks)) for hooks in kinds]

    def rollback(self) -> None:
        for hooks, count in self._counted:
            del hooks[count:]
