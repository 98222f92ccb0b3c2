"""What app_db relies on of zope's transaction that is not public. Each test says what breaks without it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import transaction
from transaction.interfaces import TransientError
from transaction.weakset import WeakSet

from app_db._compat.transaction import Transaction, TransactionManager, current_of, set_current


class Synchronizer:
    def __init__(self) -> None:
        self.told: list[str] = []

    def newTransaction(self, begun: Any) -> None:  # zope's name
        self.told.append("new")

    def beforeCompletion(self, ending: Any) -> None:  # zope's name
        self.told.append("before")

    def afterCompletion(self, ended: Any) -> None:  # zope's name
        self.told.append("after")


class Savepointer:
    """A data manager that takes part and has savepoints."""

    def __init__(self) -> None:
        self.transaction_manager = transaction.manager

    def sortKey(self) -> str:  # zope's name
        return "a"

    def abort(self, ending: Any) -> None: ...
    def tpc_begin(self, ending: Any) -> None: ...
    def commit(self, ending: Any) -> None: ...
    def tpc_vote(self, ending: Any) -> None: ...
    def tpc_finish(self, ending: Any) -> None: ...
    def tpc_abort(self, ending: Any) -> None: ...

    def savepoint(self) -> Any:
        return self

    def rollback(self) -> None: ...


class Manager(TransactionManager):
    """A manager whose current transaction is found elsewhere."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found
        self.set = WeakSet()

    def synchronizers_here(self) -> Any:
        return self.set

    def current(self) -> Any:
        return self.found

    def is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, KeyError)


def test_a_manager_adds_and_removes_synchronizers_where_it_is_told() -> None:
    """`_synchs`: without it, all threads and tasks would share one set."""
    manager, one = Manager(None), Synchronizer()
    assert not manager.registeredSynchs()
    manager.registerSynch(one)
    assert manager.registeredSynchs()
    assert one in manager.set
    manager.unregisterSynch(one)
    assert not manager.registeredSynchs()
    manager.registerSynch(one)
    manager.clearSynchs()
    assert not manager.registeredSynchs()


def test_a_rollback_to_a_savepoint_asks_first() -> None:
    """`_remove_and_invalidate_after`: without it, a rollback would wait for coroutines where none can be awaited."""

    class Refusing(Transaction):
        def before_rollback_to(self, savepoint: Any) -> None:
            raise LookupError("not here")

    begun = Refusing(WeakSet(), None)
    begun.join(Savepointer())
    savepoint = begun.savepoint()
    with pytest.raises(LookupError, match="not here"):
        savepoint.rollback()
    assert savepoint.valid


def test_a_managers_methods_find_the_current_transaction_by_current() -> None:
    """`_txn`: without it, begin() would not see what is under way, and synchronizers would be told of nothing."""
    begun, one = Transaction(WeakSet(), None), Synchronizer()
    manager = Manager(begun)
    manager.registerSynch(one)
    assert one.told == ["new"]
    with pytest.raises(transaction.interfaces.AlreadyInTransaction):
        transaction.TransactionManager.begin(manager)


def test_a_transaction_begins_with_what_zopes_has_and_shares_nothing_with_others() -> None:
    """`__init__` is not called: it asks `logging` for a logger each time, under a lock that an interruption may leave locked."""
    synchronizers, manager = WeakSet(), object()
    zopes, ours, other = (kind(synchronizers, manager) for kind in (transaction.Transaction, Transaction, Transaction))
    assert zopes.log.name == f"txn.{threading.get_ident()}", "zope makes no logger for each thread any more"
    assert ours.log is other.log
    assert (ours.log.name.partition(".")[0], "log" in vars(ours)) == ("txn", False)
    assert vars(ours) == {name: value for name, value in vars(zopes).items() if name != "log"}
    shared = [name for name, value in vars(ours).items() if vars(other)[name] is value and isinstance(value, (list, dict, set))]
    assert shared == []


def test_attempts_ask_whether_an_error_may_pass() -> None:
    """`_retryable`: without it, `attempts()` and `run()` would not repeat what app_db knows to be worth it."""
    manager = Manager(Transaction(WeakSet(), None))
    attempt: Any = next(manager.attempts(2))
    assert attempt.manager is manager
    assert manager._retryable(KeyError, KeyError()) is True
    assert manager._retryable(TransientError, TransientError()) is True
    assert manager._retryable(ValueError, ValueError()) is False


@pytest.mark.parametrize("new_manager", [transaction.TransactionManager, transaction.ThreadTransactionManager])
def test_the_current_transaction_of_zopes_own_managers_can_be_seen_and_set_aside(new_manager: Any) -> None:
    """`_txn` of zope's managers: `get()` would begin a transaction, and requires_new has to put one aside."""
    manager = new_manager()
    assert current_of(manager) is None
    begun = manager.begin()
    assert current_of(manager) is begun
    set_current(manager, None)
    assert current_of(manager) is None
    other = manager.begin()
    assert other is not begun
    manager.abort()
    set_current(manager, begun)
    assert manager.get() is begun
    manager.abort()
