"""app_db beside others that speak zope's transaction protocol: other data managers, and zope's own global manager."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
from dependency_injector import providers
from sqlalchemy import NullPool, String, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager, NoTransaction, TransactionFailedError
from zope.interface import implementer

from app_db import Connection, ConnectionSettings, DatabaseContainer, DatabaseSettings
from app_db.errors import (
    ForeignUnitOfWork,
    NotAtomic,
    NoUnitOfWork,
    PartialCommit,
    SessionIsManaged,
    UnitOfWorkDoomed,
    UnitOfWorkEnded,
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    sku: Mapped[str] = mapped_column(String(20), primary_key=True)


class Shop(DatabaseContainer):
    writer = Connection()
    log = Connection()


# ---- another resource: a file ------------------------------------------------------------------------------------------


@implementer(ISavepointDataManager)
class FileWriter:
    """Writes a file together with everything else in a transaction: staged beside it in the vote, renamed in the end."""

    def __init__(self, path: Path, sort_key: str = "file") -> None:
        self.path = path
        self.lines: list[str] = []
        self.refuse_in: str | None = None
        self.calls: list[str] = []
        self._sort_key = sort_key
        self._joined: Any = None

    @property
    def staged(self) -> Path:
        return self.path.with_suffix(".staged")

    def write(self, transaction: Any, line: str) -> None:
        if self._joined is not transaction:
            transaction.join(self)
            self._joined = transaction
        self.lines.append(line)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.refuse_in:
            raise OSError(f"no space left on device, in {name}")

    def sortKey(self) -> str:
        return self._sort_key

    def tpc_begin(self, transaction: Any) -> None:
        self._call("tpc_begin")

    def commit(self, transaction: Any) -> None:
        self._call("commit")

    def tpc_vote(self, transaction: Any) -> None:
        self.staged.write_text("\n".join(self.lines))
        self._call("tpc_vote")

    def tpc_finish(self, transaction: Any) -> None:
        self._call("tpc_finish")
        self.staged.replace(self.path)
        self._forget()

    def tpc_abort(self, transaction: Any) -> None:
        self.calls.append("tpc_abort")
        self._forget()

    def abort(self, transaction: Any) -> None:
        self.calls.append("abort")
        self._forget()

    def _forget(self) -> None:
        self.staged.unlink(missing_ok=True)
        self.lines = []
        self._joined = None

    def savepoint(self) -> FileSavepoint:
        return FileSavepoint(self)


@implementer(IDataManagerSavepoint)
class FileSavepoint:
    def __init__(self, writer: FileWriter) -> None:
        self._writer = writer
        self._lines = list(writer.lines)

    def rollback(self) -> None:
        self._writer.lines = list(self._lines)


class Ledger:
    """A file writer, and what the file holds in the end."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ledger.txt"

    def writer(self, sort_key: str = "file") -> FileWriter:
        return FileWriter(self.path, sort_key)

    @property
    def lines(self) -> list[str] | None:
        """None without a file."""
        assert not self.path.with_suffix(".staged").exists(), "a staged file was left behind"
        return self.path.read_text().splitlines() if self.path.exists() else None


# ---- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


@pytest.fixture
def new_container(new_database_url: Callable[[], str]) -> Iterator[Callable[..., Any]]:
    yield from _factory(new_database_url)


@pytest.fixture
def new_local(new_sqlite_url: Callable[[], str]) -> Iterator[Callable[..., Any]]:
    """As `new_container`, on SQLite only."""
    yield from _factory(new_sqlite_url)


def _factory(new_url: Callable[[], str]) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def new(manager: Any = None, atomicity: str = "strict") -> Any:
        connections = {name: ConnectionSettings(url=new_url()) for name in ("writer", "log")}
        container: Any = Shop(settings=DatabaseSettings(connections=connections, atomicity=atomicity))
        for engine in (container.writer_engine(), container.log_engine()):
            Base.metadata.create_all(engine)
        if manager is not None:
            container.transaction_manager.override(providers.Object(manager))
        made.append(container)
        return container

    yield new
    for container in made:
        for engine in (container.writer_engine(), container.log_engine()):
            assert engine.pool.checkedout() == 0, "a connection was not given back"
        container.shutdown_resources()


@pytest.fixture
def container(new_container: Callable[..., Any]) -> Any:
    return new_container()


@pytest.fixture
def local(new_local: Callable[..., Any]) -> Any:
    return new_local()


@pytest.fixture(autouse=True)
def clean_global_manager() -> Iterator[None]:
    """zope's own manager is the process's: every test finds it, and leaves it, without a transaction and implicit."""
    yield
    leave_no_transaction()


def leave_no_transaction(explicit: bool = False) -> None:
    transaction.manager.explicit = False
    transaction.abort()
    transaction.manager.explicit = explicit


@pytest.fixture(params=[False, True], ids=["implicit", "explicit"])
def global_manager(request: pytest.FixtureRequest) -> Any:
    """zope's thread-local manager with a transaction begun, in both of its modes."""
    leave_no_transaction(request.param)
    transaction.begin()
    return transaction.manager


def skus(container: Any, name: str = "writer") -> list[str]:
    """What has been committed, as somebody else sees it."""
    engine = create_engine(getattr(container, f"{name}_engine")().url, poolclass=NullPool)
    with engine.connect() as connection:
        return list(connection.scalars(select(Order.sku).order_by(Order.sku)))


# ---- another data manager in a unit of work ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sort_key", ["a before", "~~~after everybody"])
def test_a_file_and_a_database_commit_together(container: Any, ledger: Ledger, sort_key: str) -> None:
    file = ledger.writer(sort_key)
    with container.transaction() as unit:
        file.write(unit.transaction, "A-1")
        container.writer_session().add(Order(sku="A-1"))
        assert not ledger.path.exists()
    assert (ledger.lines, skus(container)) == (["A-1"], ["A-1"])


def test_a_file_and_a_database_abort_together(container: Any, ledger: Ledger) -> None:
    file = ledger.writer()
    with pytest.raises(LookupError), container.transaction() as unit:
        file.write(unit.transaction, "A-1")
        container.writer_session().add(Order(sku="A-1"))
        container.writer_session().flush()
        raise LookupError
    assert file.calls == ["abort"]
    assert (ledger.lines, skus(container)) == (None, [])


@pytest.mark.parametrize("phase", ["tpc_begin", "commit", "tpc_vote"])
def test_a_file_that_refuses_to_commit_rolls_the_databases_back(container: Any, ledger: Ledger, phase: str) -> None:
    file = ledger.writer()
    file.refuse_in = phase
    with pytest.raises(OSError, match=f"no space left on device, in {phase}"), container.transaction() as unit:
        container.writer_session().add(Order(sku="A-1"))
        file.write(unit.transaction, "A-1")
    assert (ledger.lines, skus(container)) == (None, [])
    with container.transaction():
        container.writer_session().add(Order(sku="A-2"))
    assert skus(container) == ["A-2"], "the next unit is a new one"


def test_the_databases_vote_last_so_that_nothing_that_can_still_fail_comes_after_them(local: Any, ledger: Ledger) -> None:
    file = ledger.writer("~sqlalchemy:late")
    seen: list[list[str]] = []
    file._call = lambda name: seen.append([name, *skus(local)])  # type: ignore[method-assign]
    with local.transaction() as unit:
        local.writer_session().add(Order(sku="A-1"))
        file.write(unit.transaction, "A-1")
    assert seen == [["tpc_begin"], ["commit"], ["tpc_vote"], ["tpc_finish", "A-1"]]


def test_a_database_that_refuses_a_flush_leaves_the_file_unwritten(container: Any, ledger: Ledger) -> None:
    with container.transaction():
        container.writer_session().add(Order(sku="A-1"))
    file = ledger.writer()
    with pytest.raises(Exception, match=r"(?i)unique|duplicate"), container.transaction() as unit:
        file.write(unit.transaction, "A-1")
        container.writer_session().add(Order(sku="A-1"))
    assert "tpc_finish" not in file.calls
    assert (ledger.lines, skus(container)) == (None, ["A-1"])


DEFERRED = "CREATE TABLE lines (sku VARCHAR(20) REFERENCES orders (sku) DEFERRABLE INITIALLY DEFERRED)"


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_a_database_that_refuses_its_commit_leaves_the_file_unwritten(
    request: pytest.FixtureRequest, ledger: Ledger, database: str
) -> None:
    """The constraint is checked by COMMIT itself, which is sent after the file has voted yes."""
    generator = _factory(request.getfixturevalue(f"new_{database}_url"))
    container = next(generator)()
    with container.writer_engine().begin() as connection:
        connection.execute(text(DEFERRED))
    file = ledger.writer()
    with pytest.raises(Exception, match=r"(?i)foreign key"), container.transaction() as unit:
        file.write(unit.transaction, "A-1")
        container.writer_session().add(Order(sku="A-2"))
        container.writer_session().execute(text("INSERT INTO lines VALUES ('nobody')"))
    assert "tpc_vote" in file.calls
    assert "tpc_finish" not in file.calls
    assert (ledger.lines, skus(container)) == (None, [])
    next(generator, None)


def test_databases_that_cannot_commit_together_leave_the_file_unwritten(container: Any, ledger: Ledger) -> None:
    file = ledger.writer()
    with pytest.raises(NotAtomic), container.transaction() as unit:
        file.write(unit.transaction, "A-1")
        container.writer_session().add(Order(sku="A-1"))
        container.log_session().add(Order(sku="A-1"))
    assert (ledger.lines, skus(container), skus(container, "log")) == (None, [], [])


def test_two_databases_chosen_to_commit_one_by_one_leave_the_file_unwritten_when_the_second_fails(
    new_local: Callable[..., Any], ledger: Ledger
) -> None:
    container = new_local(atomicity="best_effort")
    with container.writer_engine().begin() as connection:
        connection.execute(text(DEFERRED))
    file = ledger.writer()
    with pytest.raises(PartialCommit) as caught, container.transaction() as unit:
        file.write(unit.transaction, "A-1")
        container.log_session().add(Order(sku="A-1"))
        container.writer_session().execute(text("INSERT INTO lines VALUES ('nobody')"))
    assert (caught.value.committed, caught.value.failed) == (("log",), "writer")
    assert (ledger.lines, skus(container), skus(container, "log")) == (None, [], ["A-1"])


def test_a_doomed_unit_writes_neither(container: Any, ledger: Ledger) -> None:
    file = ledger.writer()
    with pytest.raises(UnitOfWorkDoomed, match="the price is missing"), container.transaction() as unit:
        file.write(unit.transaction, "A-1")
        container.writer_session().add(Order(sku="A-1"))
        unit.doom("the price is missing")
    assert (ledger.lines, skus(container)) == (None, [])


def test_a_file_without_a_database_commits_too(container: Any, ledger: Ledger) -> None:
    file = ledger.writer()
    with container.transaction() as unit:
        file.write(unit.transaction, "A-1")
    assert (ledger.lines, skus(container)) == (["A-1"], [])


# ---- savepoints --------------------------------------------------------------------------------------------------------------


def test_a_zope_savepoint_reaches_the_file_and_the_database(container: Any, ledger: Ledger) -> None:
    file = ledger.writer()
    with container.transaction() as unit:
        container.writer_session().add(Order(sku="kept"))
        file.write(unit.transaction, "kept")
        savepoint = unit.transaction.savepoint()
        for attempt in ("first", "second"):  # it may be rolled back to more than once
            container.writer_session().add(Order(sku=attempt))
            container.writer_session().flush()
            file.write(unit.transaction, attempt)
            savepoint.rollback()
        container.writer_session().add(Order(sku="later"))
        file.write(unit.transaction, "later")
    assert (ledger.lines, skus(container)) == (["kept", "later"], ["kept", "later"])


def test_a_session_that_joins_after_a_savepoint_is_undone_by_its_rollback_and_can_go_on(
    new_container: Callable[..., Any], ledger: Ledger
) -> None:
    """The fact guarded: zope.sqlalchemy aborts such a session for the rest of the transaction."""
    container = new_container(atomicity="best_effort")
    file = ledger.writer()
    with container.transaction() as unit:
        container.writer_session().add(Order(sku="kept"))
        savepoint = unit.savepoint()
        container.log_session().add(Order(sku="undone"))
        container.log_session().flush()
        file.write(unit.transaction, "undone")
        savepoint.rollback()
        container.log_session().add(Order(sku="later"))
        file.write(unit.transaction, "later")
    assert (ledger.lines, skus(container), skus(container, "log")) == (["later"], ["kept"], ["later"])


def test_a_nested_unit_that_fails_takes_the_files_part_back_too(container: Any, ledger: Ledger) -> None:
    file = ledger.writer()
    with container.transaction() as unit:
        container.writer_session().add(Order(sku="outer"))
        file.write(unit.transaction, "outer")
        with pytest.raises(LookupError), container.transaction("nested"):
            container.writer_session().add(Order(sku="inner"))
            file.write(unit.transaction, "inner")
            raise LookupError
    assert (ledger.lines, skus(container)) == (["outer"], ["outer"])


# ---- zope's own manager ----------------------------------------------------------------------------------------------


def test_a_plain_commit_commits_the_sessions(new_container: Callable[..., Any], global_manager: Any, ledger: Ledger) -> None:
    container = new_container(global_manager)
    file = ledger.writer()
    session = container.writer_session()
    session.add(Order(sku="A-1"))
    file.write(transaction.get(), "A-1")
    transaction.commit()
    assert (ledger.lines, skus(container)) == (["A-1"], ["A-1"])


def test_a_plain_abort_rolls_the_sessions_back(new_container: Callable[..., Any], global_manager: Any, ledger: Ledger) -> None:
    container = new_container(global_manager)
    container.writer_session().add(Order(sku="A-1"))
    container.writer_session().flush()
    ledger.writer().write(transaction.get(), "A-1")
    transaction.abort()
    assert (ledger.lines, skus(container)) == (None, [])


def test_a_plain_doom_refuses_the_commit_and_leaves_nothing(new_container: Callable[..., Any], global_manager: Any) -> None:
    container = new_container(global_manager)
    container.writer_session().add(Order(sku="A-1"))
    transaction.doom()
    container.writer_session().add(Order(sku="A-2"))
    with pytest.raises(transaction.interfaces.DoomedTransaction):
        transaction.commit()
    transaction.abort()
    assert skus(container) == []


def test_a_failed_commit_can_be_aborted_and_followed_by_another(new_container: Callable[..., Any], global_manager: Any) -> None:
    container = new_container(global_manager)
    container.writer_session().add(Order(sku="A-1"))
    transaction.commit()
    transaction.begin()
    container.writer_session().add(Order(sku="A-1"))
    with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
        transaction.commit()
    with pytest.raises(TransactionFailedError):
        transaction.commit()
    transaction.abort()
    transaction.begin()
    container.writer_session().add(Order(sku="A-2"))
    transaction.commit()
    assert skus(container) == ["A-1", "A-2"]


def test_a_with_block_of_zopes_manager_is_a_unit(new_container: Callable[..., Any]) -> None:
    container = new_container(transaction.manager)
    with transaction.manager:
        container.writer_session().add(Order(sku="A-1"))
    with pytest.raises(LookupError), transaction.manager:
        container.writer_session().add(Order(sku="A-2"))
        container.writer_session().flush()
        raise LookupError
    assert skus(container) == ["A-1"]


def test_the_containers_own_blocks_join_a_transaction_under_way(new_container: Callable[..., Any], global_manager: Any) -> None:
    container = new_container(global_manager)
    with container.transaction() as unit:
        assert unit.transaction is transaction.get()
        container.writer_session().add(Order(sku="A-1"))
    assert skus(container) == [], "the joined block does not commit"
    transaction.commit()
    assert skus(container) == ["A-1"]


def test_the_containers_own_blocks_begin_and_end_a_transaction_where_none_is(new_local: Callable[..., Any]) -> None:
    for explicit in (False, True):
        leave_no_transaction(explicit)
        container = new_local(transaction.manager)
        with container.transaction() as unit:
            assert unit.transaction is transaction.get()
            container.writer_session().add(Order(sku="A-1"))
        with pytest.raises(LookupError), container.transaction():
            container.writer_session().add(Order(sku="A-2"))
            raise LookupError
        assert skus(container) == ["A-1"]
        assert transaction.manager.manager._txn is None


def test_a_unit_of_its_own_inside_a_plain_transaction_leaves_that_one_as_it_was(
    new_local: Callable[..., Any], global_manager: Any
) -> None:
    container = new_local(global_manager)
    outer = transaction.get()
    ledger_session = container.log_session()
    ledger_session.add(Order(sku="outer"))
    with container.transaction("requires_new"):
        assert transaction.get() is not outer
        container.writer_session().add(Order(sku="inner"))
    assert transaction.get() is outer
    assert container.log_session() is ledger_session
    assert skus(container) == ["inner"]
    transaction.abort()
    assert (skus(container), skus(container, "log")) == (["inner"], [])


def test_without_a_transaction_the_explicit_manager_refuses_and_the_implicit_one_begins(new_local: Callable[..., Any]) -> None:
    container = new_local(transaction.manager)
    transaction.abort()
    container.writer_session().add(Order(sku="A-1"))  # as always with zope's implicit manager
    transaction.commit()
    transaction.manager.explicit = True
    with pytest.raises(NoUnitOfWork, match=r"with container\.transaction\(\):"):
        container.writer_session()
    with pytest.raises(NoUnitOfWork):
        container.writer_scoped_session().session_factory().add(Order(sku="A-2"))
    with pytest.raises(NoTransaction):
        container.unit()
    assert skus(container) == ["A-1"]


def test_a_session_kept_from_an_ended_transaction_is_refused(new_container: Callable[..., Any], global_manager: Any) -> None:
    container = new_container(global_manager)
    kept = container.writer_session()
    kept.add(Order(sku="A-1"))
    transaction.commit()
    with pytest.raises(UnitOfWorkEnded):
        kept.add(Order(sku="A-2"))
    transaction.begin()
    with pytest.raises(UnitOfWorkEnded):
        kept.execute(text("SELECT 1"))
    assert container.writer_session() is not kept
    container.writer_session().add(Order(sku="A-3"))
    transaction.commit()
    assert skus(container) == ["A-1", "A-3"]


def test_sessions_refuse_to_commit_by_themselves_under_zopes_manager_too(
    new_container: Callable[..., Any], global_manager: Any
) -> None:
    container = new_container(global_manager)
    session = container.writer_session()
    session.add(Order(sku="A-1"))
    for use in (session.commit, session.rollback, session.close, session.begin):
        with pytest.raises(SessionIsManaged):
            use()
    transaction.commit()
    assert skus(container) == ["A-1"]


def test_zopes_manager_keeps_threads_apart(new_local: Callable[..., Any]) -> None:
    container = new_local(transaction.manager)
    transaction.begin()
    mine = container.log_session()
    mine.add(Order(sku="mine"))
    outcome: list[object] = []

    def work() -> None:
        transaction.begin()
        try:
            outcome.append(container.log_session() is mine)
            try:
                mine.execute(text("SELECT 1"))
            except ForeignUnitOfWork as error:
                outcome.append(error.user)
            container.writer_session().add(Order(sku="theirs"))
            transaction.commit()
        finally:
            transaction.abort()

    thread = threading.Thread(target=work, name="other")
    thread.start()
    thread.join(30)
    assert outcome == [False, "thread 'other'"]
    assert skus(container) == ["theirs"]
    transaction.abort()
    assert skus(container, "log") == []


def test_sessions_of_two_containers_end_with_the_same_transaction(new_container: Callable[..., Any], global_manager: Any) -> None:
    first, second = new_container(global_manager), new_container(global_manager)
    assert first.writer_session() is not second.writer_session()
    first.writer_session().add(Order(sku="A-1"))
    second.writer_session().add(Order(sku="B-1"))
    assert first.unit().transaction is second.unit().transaction is transaction.get()
    transaction.commit()
    assert (skus(first), skus(second)) == (["A-1"], ["B-1"])
    transaction.begin()
    first.writer_session().add(Order(sku="A-2"))
    second.writer_session().add(Order(sku="B-2"))
    second.writer_session().flush()
    transaction.abort()
    assert (skus(first), skus(second)) == (["A-1"], ["B-1"])


def test_a_container_that_cannot_commit_takes_the_other_one_with_it(
    new_container: Callable[..., Any], global_manager: Any
) -> None:
    first, second = new_container(global_manager), new_container(global_manager)
    first.writer_session().add(Order(sku="A-1"))
    second.writer_session().add(Order(sku="B-1"))
    second.log_session().add(Order(sku="B-1"))
    with pytest.raises(NotAtomic):
        transaction.commit()
    transaction.abort()
    assert (skus(first), skus(second), skus(second, "log")) == ([], [], [])


def test_savepoints_of_zopes_manager_undo_what_came_after(new_container: Callable[..., Any], global_manager: Any) -> None:
    container = new_container(global_manager)
    container.writer_session().add(Order(sku="kept"))
    savepoint = transaction.savepoint()
    container.writer_session().add(Order(sku="undone"))
    container.writer_session().flush()
    savepoint.rollback()
    container.writer_session().add(Order(sku="later"))
    transaction.commit()
    assert skus(container) == ["kept", "later"]


def test_hooks_of_zope_and_of_the_unit_both_run(new_local: Callable[..., Any], global_manager: Any) -> None:
    container = new_local(global_manager)
    calls: list[str] = []
    container.writer_session().add(Order(sku="A-1"))
    container.unit().on_commit(lambda: calls.append(f"unit {skus(container)}"))
    container.unit().on_abort(calls.append, "never")
    transaction.get().addAfterCommitHook(lambda committed: calls.append(f"zope {committed}"))
    transaction.get().addBeforeCommitHook(calls.append, ("before",))
    transaction.commit()
    assert sorted(calls) == ["before", "unit ['A-1']", "zope True"]
    assert calls[0] == "before"
