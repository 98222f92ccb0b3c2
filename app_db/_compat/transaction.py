"""zope's transaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transaction
from transaction.weakset import WeakSet

CALLS_OTHERS = frozenset({"transaction.weakset", "transaction._transaction"})
"""Modules that call functions of applications: synchronizers and hooks."""


class Synchronizers(WeakSet):  # type: ignore[misc]  # transaction has no type hints
    """A set of synchronizers that costs next to nothing while there are none: every unit asks for them three times."""

    data: Any  # a WeakValueDictionary, whose own `data` is not in its stubs

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[Any, Any] = self.data.data
        """What is in it. This is the dictionary inside: to count what is still alive takes longer."""

    def map(self, f: Callable[[Any], object]) -> None:
        if self.entries:
            super().map(f)


class Transaction(transaction.Transaction):  # type: ignore[misc]  # transaction has no type hints
    """A transaction that is told before it is rolled back to a savepoint."""

    def before_rollback_to(self, savepoint: transaction.Savepoint) -> None:
        """Raise if the transaction can't be rolled back to a savepoint here."""

    def _remove_and_invalidate_after(self, savepoint: transaction.Savepoint) -> None:
        self.before_rollback_to(savepoint)  # the rollback begins with this call
        super()._remove_and_invalidate_after(savepoint)


class TransactionManager(transaction.TransactionManager):  # type: ignore[misc]  # transaction has no type hints
    """A transaction manager that finds its current transaction by `current()`, and asks `is_retryable` about errors."""

    def __init__(self) -> None:
        self.explicit = True
        self.synchronizers = self._synchs = Synchronizers()
        """What is told of the beginning and the end of transactions."""

    def current(self) -> Any:
        """Return the current transaction, or None."""
        raise NotImplementedError

    def is_retryable(self, error: BaseException) -> bool:
        """Return whether `error` may pass when the transaction is run again."""
        return False

    @property
    def _txn(self) -> Any:
        return self.current()

    def _retryable(self, error_type: type[BaseException], error: BaseException) -> bool:
        return self.is_retryable(error) or bool(super()._retryable(error_type, error))


def current_of(manager: Any) -> Any:
    """Return the current transaction of one of zope's managers, or None, without beginning one as `get()` does."""
    return _plain(manager)._txn


def set_current(manager: Any, current: Any) -> None:
    """Have `current`, or no transaction, be the current one of one of zope's managers."""
    _plain(manager)._txn = current


def _plain(manager: Any) -> Any:
    return getattr(manager, "manager", manager)  # the thread-local manager keeps a plain one for each thread
