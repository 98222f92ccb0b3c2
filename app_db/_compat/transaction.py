"""zope's transaction package."""

from __future__ import annotations

from typing import Any

import transaction
from transaction.weakset import WeakSet

CALLS_OTHERS = frozenset({"transaction.weakset", "transaction._transaction"})
"""Modules that call functions of applications: synchronizers and hooks."""


_FIRST = transaction.Transaction()
_NEW = {name: value for name, value in vars(_FIRST).items() if name != "log"}
_LISTS_AND_DICTS = tuple((name, type(value)) for name, value in _NEW.items() if isinstance(value, (list, dict)))


class Transaction(transaction.Transaction):  # type: ignore[misc]  # transaction has no type hints
    """A transaction with a hook before a rollback to a savepoint. It is made without a lock."""

    log = _FIRST.log

    def __init__(self, synchronizers: object, manager: object) -> None:
        # zope's asks `logging` for a logger named after the thread, which takes a lock. Before Python 3.13, an exception
        # from a signal handler may leave that locked, and no other thread could begin a transaction again.
        attributes = self.__dict__
        attributes.update(_NEW)
        for name, kind in _LISTS_AND_DICTS:
            attributes[name] = kind()
        self._synchronizers = synchronizers
        self._manager = manager
        self.log.debug("new transaction")

    def tell(self, synchronizers: object) -> None:
        """Tell other synchronizers of its end."""
        self._synchronizers = synchronizers

    def before_rollback_to(self, savepoint: transaction.Savepoint) -> None:
        """Raise an error if the transaction can't be rolled back to a savepoint here."""

    def _remove_and_invalidate_after(self, savepoint: transaction.Savepoint) -> None:
        self.before_rollback_to(savepoint)  # a rollback begins with this call
        super()._remove_and_invalidate_after(savepoint)


class TransactionManager(transaction.TransactionManager):  # type: ignore[misc]  # transaction has no type hints
    """A transaction manager that gets its current transaction from `current()`, and asks `is_retryable` about errors."""

    def __init__(self) -> None:
        self.explicit = True

    def synchronizers_here(self) -> WeakSet:
        """Return the set to which synchronizers are added here."""
        raise NotImplementedError

    @property
    def _synchs(self) -> WeakSet:
        return self.synchronizers_here()

    def current(self) -> Any:
        """Return the current transaction, or None."""
        raise NotImplementedError

    def is_retryable(self, error: BaseException) -> bool:
        """Return whether `error` may not occur when the transaction is run again."""
        return False

    @property
    def _txn(self) -> Any:
        return self.current()

    def _retryable(self, error_type: type[BaseException], error: BaseException) -> bool:
        return self.is_retryable(error) or bool(super()._retryable(error_type, error))


def current_of(manager: object) -> Any:
    """Return the current transaction of one of zope's managers, or None, without beginning one as `get()` does."""
    return _plain(manager)._txn


def set_current(manager: object, current: object) -> None:
    """Make `current` the current transaction of one of zope's managers. None makes it have none."""
    _plain(manager)._txn = current


def _plain(manager: object) -> Any:
    return getattr(manager, "manager", manager)  # the thread-local manager has a plain one for each thread
