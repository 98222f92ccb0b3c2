"""zope's own tests of its manager run on app_db's, and synchronizers belong to the thread or task that registered them."""

from __future__ import annotations

import asyncio
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import transaction as zope
from transaction.tests import test__manager as zopes

from app_db import ContextTransactionManager, DatabaseSettings, container_of
from app_db._liveness import always
from app_db._units.manager import _Entry
from app_db._units.owned_transactions import Process

# ---- zope's own tests ------------------------------------------------------------------------------------------------------

IMPLICIT = {
    "test_begin_w_existing_txn": "begin() aborts what is under way",
    "test_get_wo_existing_txn": "get() begins a transaction",
    "test_isDoomed_wo_existing_txn": "isDoomed() begins a transaction",
    "test_doom": "doom() begins a transaction",
    "test__retryable_w_normal_exception_no_resources": "get() begins a transaction",
    "test__retryable_w_normal_exception_w_resource_voting_yes": "get() begins a transaction",
    "test__retryable_w_multiple": "get() begins a transaction",
}
"""Tests of zope's that ask for a transaction that begins by itself: app_db's manager is explicit."""


class Settable(ContextTransactionManager):
    """The manager, with the private attribute that zope's tests set."""

    @property
    def _txn(self) -> Any:
        return self.current()

    @_txn.setter
    def _txn(self, transaction: Any) -> None:
        for name, value in {"ended": False, "process": Process.generation, "liveness": always}.items():
            setattr(transaction, name, value)
        transaction.is_usable = transaction.is_open = lambda: not transaction.ended
        transaction.owner = type("Owner", (), {"task": None})()
        transaction.begun_by = self
        self._current.set(_Entry(lambda: transaction, None))

    def free(self, txn: Any) -> None:
        if not isinstance(txn, zope.Transaction):
            self.free_fake(txn)
        else:
            super().free(txn)

    def free_fake(self, txn: Any) -> None:
        """Free what a test has put into the place of a transaction."""
        txn.ended = True


class ZopesTests(zopes.TransactionManagerTests):  # type: ignore[misc]  # transaction has no type hints
    __test__ = False  # run below, one test at a time

    def _getTargetClass(self) -> Any:  # zope's name
        return Settable

    def _makePopulated(self) -> Any:  # zope's name
        populated = super()._makePopulated()
        populated[0].begin()
        return populated


ZOPES_NAMES = unittest.TestLoader().getTestCaseNames(ZopesTests)


@pytest.mark.parametrize("name", [name for name in ZOPES_NAMES if name not in IMPLICIT])
def test_the_manager_passes_zopes_tests(name: str) -> None:
    result = unittest.TestResult()
    ZopesTests(name).run(result)
    assert result.testsRun == 1
    assert [trace for _, trace in (*result.failures, *result.errors)] == []


@pytest.mark.parametrize("name", IMPLICIT)
def test_zopes_tests_that_ask_for_implicit_transactions_are_the_only_ones_that_fail(name: str) -> None:
    result = unittest.TestResult()
    ZopesTests(name).run(result)
    assert len(result.failures) + len(result.errors) == 1


def test_a_transaction_of_another_manager_is_not_freed() -> None:
    manager, other = ContextTransactionManager(), ContextTransactionManager()
    foreign, own = other.begin(), manager.begin()
    for strange in (foreign, zope.Transaction()):
        with pytest.raises(ValueError, match="Foreign"):
            manager.free(strange)
    own.abort()
    with pytest.raises(ValueError, match="Foreign"):
        manager.free(own)
    foreign.abort()


# ---- of whom they are told ---------------------------------------------------------------------------------------------------


class Synchronizer:
    def __init__(self) -> None:
        self.told: list[str] = []

    def newTransaction(self, begun: Any) -> None:  # zope's name
        self.told.append("new")

    def beforeCompletion(self, ending: Any) -> None:  # zope's name
        self.told.append("before")

    def afterCompletion(self, ended: Any) -> None:  # zope's name
        self.told.append("after")


ONE_UNIT = ["new", "before", "after"]


@pytest.fixture
def manager() -> ContextTransactionManager:
    return ContextTransactionManager()


def run_unit(manager: ContextTransactionManager) -> None:
    with manager:
        pass


def test_a_thread_is_not_told_of_another_threads_transactions(manager: ContextTransactionManager) -> None:
    mine = Synchronizer()
    manager.registerSynch(mine)
    with ThreadPoolExecutor(1) as pool:
        theirs = Synchronizer()
        pool.submit(manager.registerSynch, theirs).result()
        pool.submit(run_unit, manager).result()
        assert (mine.told, theirs.told) == ([], ONE_UNIT)
        run_unit(manager)
        assert (mine.told, theirs.told) == (ONE_UNIT, ONE_UNIT)
        assert pool.submit(manager.registeredSynchs).result()
        manager.clearSynchs()
        assert pool.submit(manager.registeredSynchs).result()


def test_a_task_is_not_told_of_another_tasks_transactions(manager: ContextTransactionManager) -> None:
    async def work(synchronizer: Synchronizer, units: int) -> None:
        manager.registerSynch(synchronizer)
        for _ in range(units):
            manager.begin()
            await asyncio.sleep(0)
            manager.commit()

    async def main() -> None:
        outer, first, second = Synchronizer(), Synchronizer(), Synchronizer()
        manager.registerSynch(outer)
        await asyncio.gather(work(first, 1), work(second, 2))
        assert (outer.told, first.told, second.told) == ([], ONE_UNIT, ONE_UNIT * 2)

    asyncio.run(main())


def test_a_worker_thread_of_a_unit_registers_for_the_units_owner(manager: ContextTransactionManager) -> None:
    async def main() -> None:
        synchronizer = Synchronizer()
        manager.begin()
        await asyncio.to_thread(manager.registerSynch, synchronizer)
        assert synchronizer.told == ["new"]
        manager.commit()
        assert synchronizer.told == ONE_UNIT

    asyncio.run(main())


def test_a_thread_that_has_ended_leaves_no_synchronizers_to_a_thread_with_its_number(manager: ContextTransactionManager) -> None:
    kept = []

    def register() -> None:
        kept.append(Synchronizer())
        manager.registerSynch(kept[-1])

    for _ in range(20):
        thread = threading.Thread(target=register)
        thread.start()
        thread.join()
    seen: list[bool] = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: seen.append(manager.registeredSynchs()))
        thread.start()
        thread.join()
    assert seen == [False] * 20


# ---- ZODB ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def zodb() -> Iterator[Any]:
    from persistent.mapping import PersistentMapping
    from ZODB.DB import DB
    from ZODB.MappingStorage import MappingStorage

    database = DB(MappingStorage())
    with database.transaction() as connection:
        connection.root()["counter"] = PersistentMapping(value=0)
    yield database
    database.close()


MANAGERS: dict[str, Callable[[], Any]] = {
    "app_db": ContextTransactionManager,
    "zope": lambda: zope.ThreadTransactionManager(),
}
TIMES = 1000


@pytest.mark.parametrize("kind", MANAGERS)
def test_two_threads_that_count_in_a_zodb_lose_nothing(kind: str) -> None:
    """The second of two that changed the same object gets a ConflictError and tries again, as under zope's own manager."""
    with zodb() as database:
        manager = MANAGERS[kind]()
        manager.explicit = True
        started = threading.Barrier(2)
        attempts: list[int] = []

        def count() -> None:
            connection = database.open(transaction_manager=manager)
            started.wait()
            for _ in range(TIMES):
                for attempt in manager.attempts(1000):
                    with attempt:
                        attempts.append(1)
                        counter = connection.root()["counter"]
                        counter["value"] += 1
                        time.sleep(0)
            connection.close()

        threads = [threading.Thread(target=count) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert value_in(database) == 2 * TIMES
        assert len(attempts) > 2 * TIMES, "nothing was in conflict"


def test_two_tasks_that_count_in_a_zodb_lose_nothing(manager: ContextTransactionManager) -> None:
    async def main(database: Any) -> int:
        attempts = 0

        async def count() -> None:
            nonlocal attempts
            connection = database.open(transaction_manager=manager)
            for _ in range(100):
                for attempt in manager.attempts(1000):
                    with attempt:
                        attempts += 1
                        counter = connection.root()["counter"]
                        counter["value"] += 1
                        await asyncio.sleep(0)
            connection.close()

        await asyncio.gather(count(), count())
        return attempts

    with zodb() as database:
        attempts = asyncio.run(main(database))
        assert value_in(database) == 200
        assert attempts > 200, "nothing was in conflict"


@pytest.mark.parametrize("between", ["requires_new", "not_supported", "nested, then requires_new"])
def test_a_unit_inside_another_one_leaves_the_outer_one_its_snapshot(between: str, new_sqlite_url: Callable[[], str]) -> None:
    container: Any = container_of("writer")(
        settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": new_sqlite_url()}})
    )
    manager = container.transaction_manager()

    def count_elsewhere() -> None:
        with container.transaction():
            other = database.open(transaction_manager=manager)
            other.root()["counter"]["value"] += 100
        other.close()

    with zodb() as database:
        connection = database.open(transaction_manager=manager)
        from ZODB.POSException import ConflictError

        with pytest.raises(ConflictError), container.transaction():
            seen = connection.root()["counter"]["value"]
            thread = threading.Thread(target=count_elsewhere)
            thread.start()
            thread.join()
            for propagation in between.split(", then "):
                with container.transaction(propagation=propagation):
                    pass
            connection.root()["counter"]["value"] = seen + 1
        connection.close()
        assert value_in(database) == 100
    container.shutdown_resources()


def test_a_connection_that_an_inner_unit_opens_is_told_of_its_end(new_sqlite_url: Callable[[], str]) -> None:
    container: Any = container_of("writer")(
        settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": new_sqlite_url()}})
    )
    manager = container.transaction_manager()
    with zodb() as database:
        outer = database.open(transaction_manager=manager)
        with container.transaction():
            assert outer.root()["counter"]["value"] == 0
            with container.transaction(propagation="requires_new"):
                inner = database.open(transaction_manager=manager)
                inner.root()["counter"]["value"] += 1
            assert outer.root()["counter"]["value"] == 0
        with container.transaction():
            assert (outer.root()["counter"]["value"], inner.root()["counter"]["value"]) == (1, 1)
        inner.close()
        outer.close()
    container.shutdown_resources()


def value_in(database: Any) -> int:
    with database.transaction() as connection:
        value: int = connection.root()["counter"]["value"]
    return value
