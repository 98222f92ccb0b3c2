"""The transaction manager itself, as any code that knows zope's `ITransactionManager` uses it, and the traps it is free of."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transaction as zope
from sqlalchemy import event, exc, inspect, select, text
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import DetachedInstanceError
from transaction.interfaces import (
    AlreadyInTransaction,
    DoomedTransaction,
    InvalidSavepointRollbackError,
    ISynchronizer,
    ITransaction,
    ITransactionManager,
    NoTransaction,
    TransientError,
)
from zope.interface import implementer
from zope.interface.verify import verifyObject
from zope.sqlalchemy import mark_changed

from app_db import ContextTransactionManager
from app_db.errors import AlreadyInUnitOfWork, NoUnitOfWork, UnitOfWorkDoomed, UnitOfWorkEnded, UnitOfWorkError
from harness.items import Databases, Item, opened


class Boom(Exception):
    pass


class Resource:
    """A data manager that notes how it ended, and fails where it is told to."""

    def __init__(self, fails_in: str = "", error: Exception | None = None) -> None:
        self.fails_in = fails_in
        self.error = error or Boom()
        self.calls: list[str] = []

    def sortKey(self) -> str:
        return "resource"

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        if name not in ("abort", "tpc_begin", "commit", "tpc_vote", "tpc_finish", "tpc_abort"):
            raise AttributeError(name)

        def call(transaction: Any) -> None:
            self.calls.append(name)
            if name == self.fails_in:
                raise self.error

        return call

    @property
    def ended(self) -> str:
        return "committed" if "tpc_finish" in self.calls else "aborted" if "abort" in self.calls else "open"


@pytest.fixture
def manager() -> ContextTransactionManager:
    return ContextTransactionManager()


@pytest.fixture
def databases(sqlite_url: str) -> Iterator[Databases]:
    with opened({"writer": sqlite_url}) as databases:
        yield databases


# ---- the interface ------------------------------------------------------------------------------------------------------


def test_it_is_what_zope_calls_a_transaction_manager(manager: ContextTransactionManager) -> None:
    assert verifyObject(ITransactionManager, manager)
    assert manager.explicit is True
    assert verifyObject(ITransaction, manager.begin())


def test_a_transaction_is_begun_found_and_ended(manager: ContextTransactionManager) -> None:
    for end, ended in ((manager.commit, "committed"), (manager.abort, "aborted")):
        transaction = manager.begin()
        assert manager.get() is transaction
        resource = Resource()
        transaction.join(resource)
        end()
        assert resource.ended == ended
        with pytest.raises(NoUnitOfWork):
            manager.get()


def test_a_transaction_may_be_ended_by_itself(manager: ContextTransactionManager) -> None:
    transaction = manager.begin()
    transaction.commit()
    assert manager.current() is None
    assert manager.begin() is not transaction


@pytest.mark.parametrize("verb", ["get", "commit", "abort", "doom", "isDoomed", "savepoint"])
def test_where_none_has_begun_every_verb_says_so(manager: ContextTransactionManager, verb: str) -> None:
    with pytest.raises(NoUnitOfWork):
        getattr(manager, verb)()


def test_it_does_not_begin_where_one_is_under_way(manager: ContextTransactionManager) -> None:
    transaction = manager.begin()
    with pytest.raises(AlreadyInUnitOfWork):
        manager.begin()
    assert manager.get() is transaction


def test_a_doomed_transaction_does_not_commit(manager: ContextTransactionManager) -> None:
    resource = Resource()
    manager.begin().join(resource)
    assert not manager.isDoomed()
    manager.doom()
    assert manager.isDoomed()
    with pytest.raises(DoomedTransaction):
        manager.commit()
    manager.abort()
    assert resource.ended == "aborted"
    manager.begin()


def test_savepoints_are_the_transactions(manager: ContextTransactionManager) -> None:
    manager.begin()
    first = manager.savepoint()
    second = manager.savepoint(optimistic=True)
    first.rollback()
    assert not second.valid
    with pytest.raises(InvalidSavepointRollbackError):
        second.rollback()


def test_two_managers_know_nothing_of_each_other(manager: ContextTransactionManager) -> None:
    other = ContextTransactionManager()
    mine, theirs = manager.begin(), other.begin()
    assert mine is not theirs
    other.commit()
    assert manager.get() is mine


def test_each_thread_and_context_has_its_own_transaction(manager: ContextTransactionManager) -> None:
    mine = manager.begin()
    seen: list[Any] = []

    def elsewhere() -> None:
        with pytest.raises(NoUnitOfWork):
            manager.get()
        seen.append(manager.begin())
        manager.commit()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    contextvars.Context().run(elsewhere)
    assert len({id(transaction) for transaction in (mine, *seen)}) == 3
    assert manager.get() is mine


def test_zopes_names_for_the_errors_catch_ours(manager: ContextTransactionManager, databases: Databases) -> None:
    with pytest.raises(NoTransaction):
        manager.get()
    manager.begin()
    with pytest.raises(AlreadyInTransaction):
        manager.begin()
    with pytest.raises(DoomedTransaction), databases.container.transaction() as unit:
        unit.doom()
    for error in (NoUnitOfWork, AlreadyInUnitOfWork, UnitOfWorkDoomed):
        assert issubclass(error, UnitOfWorkError)


# ---- with, run, attempts --------------------------------------------------------------------------------------------------


def test_a_with_block_commits_or_aborts(manager: ContextTransactionManager) -> None:
    kept, undone = Resource(), Resource()
    with manager as transaction:
        assert manager.get() is transaction
        transaction.join(kept)
    with pytest.raises(Boom), manager as transaction:
        transaction.join(undone)
        raise Boom
    assert (kept.ended, undone.ended) == ("committed", "aborted")


@pytest.mark.parametrize("step", ["tpc_begin", "commit", "tpc_vote", "tpc_finish"])
def test_after_a_with_block_whose_commit_failed_the_next_one_works(manager: ContextTransactionManager, step: str) -> None:
    """The fact guarded: zope's own `with tm:` leaves a transaction current whose commit failed, and the next `with` raises."""
    failing, next_one = Resource(step), Resource()
    with pytest.raises(Boom), manager as transaction:
        transaction.join(failing)
    assert manager.current() is None
    with manager as transaction:
        transaction.join(next_one)
    assert next_one.ended == "committed"


def test_after_a_plain_commit_that_failed_the_next_begin_works(manager: ContextTransactionManager) -> None:
    manager.begin().join(Resource("tpc_vote"))
    with pytest.raises(Boom):
        manager.commit()
    failed = manager.get()
    assert failed.status == "Commit failed"
    assert manager.begin() is not failed
    manager.commit()


def test_zopes_own_manager_still_has_the_hole(manager: ContextTransactionManager) -> None:
    """When this fails, zope has mended `with tm:`, and the workaround can go."""
    theirs = zope.TransactionManager(explicit=True)
    with pytest.raises(Boom), theirs as transaction:
        transaction.join(Resource("tpc_vote"))
    with pytest.raises(AlreadyInTransaction):
        theirs.begin()


def test_a_with_block_inside_another_is_refused_and_aborts_nothing(manager: ContextTransactionManager) -> None:
    """The fact guarded: on zope's implicit manager the inner `with` silently aborts the outer block's work."""
    resource = Resource()
    with manager as transaction:
        transaction.join(resource)
        with pytest.raises(AlreadyInUnitOfWork, match="joins it"), manager:
            pytest.fail("entered")
        assert resource.ended == "open"
    assert resource.ended == "committed"


def test_run_repeats_what_may_pass(manager: ContextTransactionManager) -> None:
    resources = [Resource("tpc_vote", TransientError()), Resource("commit", TransientError()), Resource()]

    def work() -> str:
        """Do the work."""
        resource = next(resource for resource in resources if not resource.calls)
        manager.get().join(resource)
        assert manager.get().description == "work\n\nDo the work."
        return "done"

    assert manager.run(work) == "done"
    assert [resource.ended for resource in resources] == ["aborted", "aborted", "committed"]
    assert manager.current() is None


def test_run_gives_up_after_its_tries_and_leaves_nothing_current(manager: ContextTransactionManager) -> None:
    tries: list[int] = []

    @manager.run(2)  # type: ignore[untyped-decorator]
    def result() -> None: ...

    assert result is None

    def work() -> None:
        tries.append(1)
        manager.get().join(Resource("tpc_vote", TransientError()))

    with pytest.raises(TransientError):
        manager.run(work, 2)
    assert len(tries) == 2
    assert manager.current() is None


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_attempts_end_with_the_first_success(manager: ContextTransactionManager, failures: int) -> None:
    tried = 0
    for attempt in manager.attempts(3):
        with attempt:
            tried += 1
            if tried <= failures:
                manager.get().join(Resource("tpc_vote", TransientError()))
    assert tried == failures + 1
    assert manager.current() is None


def test_the_last_of_the_attempts_leaves_nothing_wedged_either(manager: ContextTransactionManager) -> None:
    """The fact guarded: the last try of zope's `attempts()` has the same hole as its `with tm:`."""
    tried = 0
    with pytest.raises(TransientError):
        for attempt in manager.attempts(2):
            with attempt:
                tried += 1
                manager.get().join(Resource("tpc_vote", TransientError()))
    assert tried == 2
    assert manager.current() is None
    manager.begin()


def test_what_will_not_pass_is_attempted_once(manager: ContextTransactionManager) -> None:
    tried = 0
    with pytest.raises(Boom):
        for attempt in manager.attempts(3):
            with attempt:
                tried += 1
                raise Boom
    assert tried == 1
    assert manager.current() is None


def test_a_locked_database_is_retried_by_the_managers_own_verbs(sqlite_url: str) -> None:
    """The fact guarded: zope.sqlalchemy does not know that "database is locked" may pass."""
    with opened({"writer": sqlite_url}, each={"connect_args": {"timeout": 0.05}}) as databases:
        databases.engine().connect().close()
        manager = databases.container.transaction_manager()
        rival = databases.outside().connect()
        rival.execute(text("BEGIN IMMEDIATE"))
        tried = 0

        def work() -> None:
            nonlocal tried
            tried += 1
            if tried == 2:
                rival.rollback()
            databases.add("a")

        manager.run(work)
        rival.close()
        assert tried == 2
        assert databases.items() == ["a"]


# ---- synchronizers --------------------------------------------------------------------------------------------------------


@implementer(ISynchronizer)
class Synchronizer:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def newTransaction(self, transaction: Any) -> None:
        self.seen.append("new")

    def beforeCompletion(self, transaction: Any) -> None:
        self.seen.append("before")

    def afterCompletion(self, transaction: Any) -> None:
        self.seen.append("after")


def test_synchronizers_are_told(manager: ContextTransactionManager) -> None:
    synchronizer = Synchronizer()
    assert not manager.registeredSynchs()
    manager.registerSynch(synchronizer)
    assert manager.registeredSynchs()
    with manager:
        assert synchronizer.seen == ["new"]
    manager.begin()
    manager.abort()
    assert synchronizer.seen == ["new", "before", "after"] * 2
    manager.unregisterSynch(synchronizer)
    assert not manager.registeredSynchs()
    with manager:
        pass
    assert synchronizer.seen == ["new", "before", "after"] * 2


def test_a_synchronizer_registered_in_mid_transaction_is_told_of_it(manager: ContextTransactionManager) -> None:
    synchronizer = Synchronizer()
    with manager:
        manager.registerSynch(synchronizer)
        assert synchronizer.seen == ["new"]
    assert synchronizer.seen == ["new", "before", "after"]
    manager.clearSynchs()
    assert not manager.registeredSynchs()


def test_a_synchronizer_finds_the_new_transaction_current(manager: ContextTransactionManager) -> None:
    found: list[Any] = []

    class Looks(Synchronizer):
        def newTransaction(self, transaction: Any) -> None:
            found.append(manager.get() is transaction)

    looks = Looks()
    manager.registerSynch(looks)
    with manager:
        pass
    assert found == [True]


def test_a_synchronizer_that_does_not_live_is_forgotten(manager: ContextTransactionManager) -> None:
    manager.registerSynch(Synchronizer())
    with manager:
        pass


class Fails(Synchronizer):
    def newTransaction(self, transaction: Any) -> None:
        raise RuntimeError


def test_a_transaction_that_a_synchronizer_kept_from_beginning_is_not_the_current_one(manager: ContextTransactionManager) -> None:
    fails = Fails()
    manager.registerSynch(fails)
    with pytest.raises(RuntimeError):
        manager.begin()
    assert manager.current() is None


@pytest.mark.parametrize("make", [ContextTransactionManager, zope.ThreadTransactionManager])
def test_the_unit_after_one_that_could_not_begin_is_committed(make: Callable[[], Any], sqlite_url: str) -> None:
    manager, fails = make(), Fails()
    with opened({"writer": sqlite_url}, manager=manager) as databases:
        manager.registerSynch(fails)
        with pytest.raises(RuntimeError), databases.container.transaction():
            pytest.fail("the block ran")
        manager.unregisterSynch(fails)
        with databases.container.transaction():
            databases.add("a")
        assert databases.items() == ["a"]


def test_a_unit_inside_another_one_is_not_told_to_the_synchronizers_of_that(sqlite_url: str) -> None:
    fails = Fails()
    with opened({"writer": sqlite_url}) as databases:
        manager = databases.container.transaction_manager()
        with databases.container.transaction():
            manager._synchs.add(fails)
            with databases.container.transaction(propagation="requires_new"):
                databases.add("inner")
            manager.unregisterSynch(fails)
            databases.add("outer")
        assert databases.items() == ["inner", "outer"]


# ---- contexts -------------------------------------------------------------------------------------------------------------


def test_a_generator_may_end_its_unit_in_another_context_than_it_began_in(databases: Databases) -> None:
    """The fact guarded: a framework leaves a generator in another context, where `ContextVar.reset` raises ValueError."""

    def unit(name: str) -> Iterator[Session]:
        with databases.container.transaction():
            yield databases.session()

    for name, fails in (("kept", False), ("undone", True)):
        generator = unit(name)
        entering, leaving = contextvars.Context(), contextvars.Context()
        session = entering.run(next, generator)
        entering.run(session.add, Item(name=name))
        if fails:
            with pytest.raises(Boom):
                leaving.run(generator.throw, Boom())  # type: ignore[attr-defined]  # a generator, whatever else it is
        else:
            with pytest.raises(StopIteration):
                leaving.run(next, generator)
        for context in (entering, leaving):
            with pytest.raises((NoUnitOfWork, UnitOfWorkEnded)):
                context.run(databases.container.unit)
            context.run(add_in_a_unit, databases, f"{name}, next in context {id(context)}")
        assert databases.checked_out() == 0
    names = [name for name in databases.items() if "next" not in name]
    assert names == ["kept"]
    assert len(databases.items()) == 5


def add_in_a_unit(databases: Databases, name: str) -> None:
    with databases.container.transaction():
        databases.add(name)


def test_a_generator_that_is_never_finished_aborts_its_unit(databases: Databases) -> None:
    def unit() -> Iterator[None]:
        with databases.container.transaction():
            databases.add("a")
            yield

    generator = unit()
    next(generator)
    assert databases.checked_out() == 1
    generator.close()  # type: ignore[attr-defined]  # as above
    assert databases.checked_out() == 0
    assert databases.items() == []


def test_an_ended_transaction_is_not_found_in_a_context_that_was_copied_before(manager: ContextTransactionManager) -> None:
    transaction = manager.begin()
    copied = contextvars.copy_context()
    assert copied.run(manager.get) is transaction
    manager.commit()
    with pytest.raises(UnitOfWorkEnded):
        copied.run(manager.get)
    assert copied.run(manager.begin) is not transaction


def test_a_copied_context_may_end_the_transaction_of_its_caller(manager: ContextTransactionManager) -> None:
    resource = Resource()
    manager.begin().join(resource)
    contextvars.copy_context().run(manager.commit)
    assert resource.ended == "committed"
    with pytest.raises(UnitOfWorkEnded):
        manager.get()
    manager.begin()


# ---- more traps of zope.sqlalchemy ----------------------------------------------------------------------------------------


def test_savepoints_work_whatever_sqlite_is_called(sqlite_url: str) -> None:
    """The fact guarded: zope.sqlalchemy refuses savepoints to a URL of "sqlite", but not to one of "sqlite+pysqlite"."""
    for url in (sqlite_url, sqlite_url.replace("sqlite:", "sqlite+pysqlite:")):
        with opened({"writer": url}) as databases, databases.container.transaction() as unit:
            databases.add(f"kept {url.partition(':')[0]}")
            savepoint = unit.savepoint()
            databases.add("undone")
            savepoint.rollback()
    with opened({"writer": sqlite_url}) as databases:
        assert databases.items() == ["kept sqlite", "kept sqlite+pysqlite"]


def test_a_savepoint_that_cannot_be_taken_ends_the_unit_and_not_the_next_one(databases: Databases) -> None:
    """The fact guarded: a savepoint that zope could not take leaves its transaction failed."""
    databases.put("taken")
    with pytest.raises((UnitOfWorkDoomed, exc.IntegrityError)), databases.container.transaction() as unit:
        databases.session().add(Item(name="taken"))
        with pytest.raises(exc.IntegrityError):
            unit.savepoint()
    add_in_a_unit(databases, "next")
    assert databases.items() == ["next", "taken"]


def test_a_commit_that_fails_leaves_the_cause_and_no_complaint_of_the_data_manager(postgres_url: str) -> None:
    """The fact guarded: after a commit that failed, `tpc_abort` of zope.sqlalchemy can raise AssertionError."""
    with opened({"writer": postgres_url}) as databases:
        databases.rival("ALTER TABLE item ADD COLUMN other TEXT REFERENCES item DEFERRABLE INITIALLY DEFERRED")
        with pytest.raises(exc.IntegrityError) as failed, databases.container.transaction():
            databases.session().execute(text("INSERT INTO item (name, amount, other) VALUES ('a', 0, 'nowhere')"))
        error: BaseException | None = failed.value
        while error is not None:
            assert not isinstance(error, AssertionError)
            error = error.__context__


def test_objects_are_detached_after_the_commit_and_keep_their_values_unless_told_otherwise(sqlite_url: str) -> None:
    """The fact guarded: objects are detached after commit; `expire_on_commit=False`, the default of units, keeps their values."""
    for name, each in {"default": {}, "forgets": {"session": {"expire_on_commit": True}}}.items():
        with opened({"writer": sqlite_url}, each=each) as databases:
            with databases.container.transaction():
                item = Item(name=name, amount=7)
                databases.session().add(item)
            assert inspect(item).detached
            if name == "default":
                assert item.amount == 7
            else:
                with pytest.raises(DetachedInstanceError):
                    assert item.amount


def test_zopes_mark_changed_with_its_default_manager_joins_nothing_else(databases: Databases) -> None:
    """The fact guarded: module-level `mark_changed()` joins an unjoined session to the *global* manager."""
    with databases.container.transaction():
        session = databases.session()
        databases.add("a")
        mark_changed(session)  # joined already: then it is harmless
        assert zope.get()._resources == []
    zope.abort()
    assert databases.items() == ["a"]


def test_every_session_that_starts_is_committed_and_returned(databases: Databases) -> None:
    """The fact guarded: an object added without a flush starts a session that `after_begin` alone does not see."""
    with databases.container.transaction():
        databases.session().add(Item(name="never flushed"))
    assert databases.items() == ["never flushed"]
    with pytest.raises(Boom), databases.container.transaction():
        databases.session().add(Item(name="b"))
        raise Boom
    with databases.container.transaction():
        assert databases.session().scalars(select(Item.name)).all() == ["never flushed"]


def test_readers_are_committed_and_not_rolled_back(postgres_url: str) -> None:
    """The fact guarded: a ROLLBACK makes psycopg forget its prepared statements, and SERIALIZABLE reads are not validated."""
    with opened({"writer": postgres_url}) as databases:
        ends: list[str] = []
        event.listen(databases.engine(), "commit", lambda connection: ends.append("commit"))
        event.listen(databases.engine(), "rollback", lambda connection: ends.append("rollback"))
        with databases.container.transaction():
            databases.session().execute(text("SELECT 1"))
        assert ends == ["commit"]
