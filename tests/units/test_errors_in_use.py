"""What an application does wrong with sessions and units is refused by an error of its own that says what to do next.

A refusal takes nothing away: the unit under way still commits what it had, and no connection stays behind.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dependency_injector.wiring import Provide, inject
from sqlalchemy import String, event, insert, inspect, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from transaction.interfaces import AlreadyInTransaction, NoTransaction
from zope.sqlalchemy import mark_changed

from app_db import AppDbError, ConnectionSettings, Container, DatabaseSettings, container_of, retryable, transactional
from app_db.errors import (
    AbortedByRecovery,
    AlreadyInUnitOfWork,
    AwaitRequired,
    CommitUnconfirmed,
    ConnectionNotConfigured,
    ContradictorySettings,
    DecisionFileDamaged,
    ForeignUnitOfWork,
    HookFailed,
    InvalidUse,
    NotAtomic,
    NothingConfigured,
    NotWired,
    NoUnitOfWork,
    OutcomeUnknown,
    SessionIsManaged,
    TransactionLost,
    TwoPhaseUnavailable,
    UnitOfWorkEnded,
    UnitOfWorkError,
    UnitOfWorkInUse,
    UnknownConnection,
    UnknownVariable,
)
from harness.paths import ROOT
from harness.servers import PASSWORD, PostgresServer

WRITER = "APP_DB_CONNECTIONS__WRITER__URL"
NEXT_STEP = r"Put the code in `with container\.transaction\(\):` or in a function decorated with @transactional\."


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    sku: Mapped[str] = mapped_column(String(20), primary_key=True)


@inject
def ask_without_a_unit(session: Session = Provide["writer_session"]) -> None:
    pytest.fail("a session was injected where there is no unit of work")


@transactional
def unwired(session: Session = Provide[Container.writer_session]) -> None:
    pytest.fail("the body of a function ran that was never wired")


@pytest.fixture
def container(database_url: str) -> Iterator[Container]:
    yield from _container(database_url)


@pytest.fixture
def local(sqlite_url: str) -> Iterator[Container]:
    """As `container`, on SQLite only."""
    yield from _container(sqlite_url)


def _container(url: str) -> Iterator[Container]:
    container = Container(settings=DatabaseSettings(connections={"writer": ConnectionSettings(url=url)}))
    with container.transaction():
        Base.metadata.create_all(container.writer_session().connection())
    yield container
    require_clean(container)
    container.shutdown_resources()


def require_clean(container: Container) -> None:
    """Nothing is checked out, and no connection of the pool has a transaction open: another unit can write."""
    for provider in (container.writer_engine, container.reader_engine):
        pool: Any = provider().pool
        assert pool.checkedout() == 0
    with container.transaction() as unit:
        container.writer_session().execute(insert(Order).values(sku="probe"))
        unit.on_abort(list)
        session = container.writer_session()
        session.execute(text("DELETE FROM orders WHERE sku = 'probe'"))
    assert not container.transaction_manager().current()


def skus(container: Container) -> list[str]:
    with container.transaction():
        return list(container.writer_session().scalars(select(Order.sku).order_by(Order.sku)))


# ---- outside ---------------------------------------------------------------------------------------------------------


OUTSIDE: dict[str, Callable[[Session], object]] = {
    "execute": lambda session: session.execute(text("SELECT 1")),
    "add": lambda session: session.add(Order(sku="A-1")),
    "add_all": lambda session: session.add_all([Order(sku="A-1"), Order(sku="A-2")]),
    "get": lambda session: session.get(Order, "A-1"),
    "query": lambda session: session.query(Order).all(),
    "merge": lambda session: session.merge(Order(sku="A-1")),
    "scalars": lambda session: session.scalars(select(Order)),
    "connection": lambda session: session.connection(),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Order(sku="A-1")]),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Order, [{"sku": "A-1"}]),
    "commit": lambda session: session.commit(),
    "bulk_update_mappings": lambda session: session.bulk_update_mappings(Order, [{"sku": "A-1"}]),
    "begin": lambda session: session.begin(),
    "begin_nested": lambda session: session.begin_nested(),
}


def test_a_session_asked_for_directly_outside_a_unit_is_refused(local: Container) -> None:
    with pytest.raises(NoUnitOfWork, match=rf"The 'writer' session was used outside a unit of work\. {NEXT_STEP}"):
        local.writer_session()


def test_a_session_injected_outside_a_unit_is_refused(local: Container) -> None:
    local.wire(modules=[__name__])
    with pytest.raises(NoUnitOfWork, match=NEXT_STEP):
        ask_without_a_unit()
    local.unwire()


@pytest.mark.parametrize("use", OUTSIDE.values(), ids=OUTSIDE)
def test_a_scoped_session_used_outside_a_unit_is_refused(local: Container, use: Callable[[Any], object]) -> None:
    with pytest.raises(NoUnitOfWork, match=rf"The 'writer' session was used outside a unit of work\. {NEXT_STEP}"):
        use(local.writer_scoped_session())
    assert skus(local) == []


@pytest.mark.parametrize("use", OUTSIDE.values(), ids=OUTSIDE)
def test_a_session_made_by_hand_and_used_outside_a_unit_is_refused(local: Container, use: Callable[[Session], object]) -> None:
    session = local.writer_scoped_session().session_factory()
    with pytest.raises(NoUnitOfWork, match=NEXT_STEP):
        use(session)
    assert list(session) == list(session.new) == []
    assert skus(local) == []


def test_adding_outside_leaves_nothing_pending_for_the_next_unit(container: Container) -> None:
    """The fact guarded: under zope.sqlalchemy alone the object stays pending, and the next transaction commits it."""
    session = container.writer_scoped_session().session_factory()
    order = Order(sku="outside")
    with pytest.raises(NoUnitOfWork):
        session.add(order)
    assert order not in session
    with container.transaction():
        session.add(Order(sku="inside"))  # belongs to this unit from now on
    assert skus(container) == ["inside"]


def test_no_unit_of_work_is_zopes_error_too() -> None:
    assert issubclass(NoUnitOfWork, NoTransaction)
    assert issubclass(AlreadyInUnitOfWork, AlreadyInTransaction)


def test_the_manager_outside_says_that_there_is_no_unit(local: Container) -> None:
    manager = local.transaction_manager()
    for use in (manager.get, manager.commit, manager.abort, manager.doom, manager.isDoomed, manager.savepoint):
        with pytest.raises(NoUnitOfWork, match=NEXT_STEP):
            use()


# ---- afterwards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("ending", ["commit", "abort"])
@pytest.mark.parametrize("inside_another", [False, True], ids=["outside", "in the next unit"])
def test_a_session_used_after_its_unit_is_refused(
    local: Container, use: Callable[[Session], object], ending: str, inside_another: bool
) -> None:
    kept = []
    try:
        with local.transaction():
            kept.append(local.writer_session())
            kept[0].execute(text("SELECT 1"))
            if ending == "abort":
                raise LookupError
    except LookupError:
        pass
    message = r"The 'writer' session was used after its unit of work had ended\. Don't keep a session.*ask for it again"
    if not inside_another:
        with pytest.raises(UnitOfWorkEnded, match=message):
            use(kept[0])
    else:
        with local.transaction():
            local.writer_session().add(Order(sku="B-1"))
            with pytest.raises(UnitOfWorkEnded, match=message):
                use(kept[0])
    assert list(kept[0]) == list(kept[0].new) == []
    assert skus(local) == (["B-1"] if inside_another else [])


# ---- from elsewhere ------------------------------------------------------------------------------------------------------


def in_thread(function: Callable[[], object], name: str = "worker") -> BaseException | None:
    """Run a function in a thread of its own, with a context of its own, and return what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return raised[0] if raised else None


@pytest.mark.parametrize("use", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("own_unit", [False, True], ids=["without a unit", "in a unit of its own"])
def test_a_session_used_from_another_thread_is_refused(
    local: Container, use: Callable[[Session], object], own_unit: bool
) -> None:
    with local.transaction():
        session = local.writer_session()
        session.add(Order(sku="A-0"))

        def work() -> None:
            if not own_unit:
                use(session)
            else:
                with local.transaction():
                    use(session)

        error = in_thread(work)
        assert isinstance(error, ForeignUnitOfWork)
        assert (error.owner, error.user) == ("thread 'MainThread'", "thread 'worker'")
        assert str(error).startswith("The 'writer' session belongs to ")
        assert error.message.endswith(
            "Begin a unit of work there (`with container.transaction():`) and ask for a session inside it."
        )
    assert skus(local) == ["A-0"]


# ---- what the unit does itself -----------------------------------------------------------------------------------------------


def _with_session(session: Session) -> None:
    with session:
        pass


def _with_begin(session: Session) -> None:
    with session.begin():
        pass


MANAGED: dict[str, tuple[Callable[[Session], object], str, str]] = {
    # name: (what is done, the method that is refused, what to do instead)
    "commit": (
        lambda s: s.commit(),
        "commit",
        "The unit commits it, when its block ends; session.flush() sends what is pending now.",
    ),
    "rollback": (
        lambda s: s.rollback(),
        "rollback",
        "on this connection, call unit.rollback('writer'); to undo all, raise, or call",
    ),
    "close": (lambda s: s.close(), "close", "To undo a part, use `with session.begin_nested():`"),
    "reset": (lambda s: s.reset(), "reset", "To undo a part, use `with session.begin_nested():`"),
    "invalidate": (lambda s: s.invalidate(), "invalidate", "To undo a part, use `with session.begin_nested():`"),
    "begin": (lambda s: s.begin(), "begin", "Its transaction begins by itself; session.begin_nested() takes a savepoint."),
    "prepare": (lambda s: s.prepare(), "prepare", "to undo all, raise, or call unit.doom()"),
    "transaction.commit": (lambda s: s.get_transaction().commit(), "commit", "The unit commits it, when its block ends"),  # type: ignore[union-attr]
    "with session": (_with_session, "close", "To undo a part, use `with session.begin_nested():`"),
    "with session.begin": (_with_begin, "begin", "Its transaction begins by itself"),
}


@pytest.mark.parametrize("how", MANAGED)
@pytest.mark.parametrize("flushed", [False, True], ids=["pending", "flushed"])
def test_what_the_unit_does_itself_a_session_refuses_and_nothing_is_lost(container: Container, how: str, flushed: bool) -> None:
    use, method, advice = MANAGED[how]
    with container.transaction():
        session = container.writer_session()
        session.add(Order(sku="before"))
        if flushed:
            session.flush()
        with pytest.raises(SessionIsManaged) as caught:
            use(session)
        assert caught.value.connection == "writer"
        assert caught.value.method == method
        assert str(caught.value).startswith(
            f"session.{method}() was called on the 'writer' session, which belongs to a unit of work. "
        )
        assert advice in str(caught.value)
        session.add(Order(sku="later"))
    assert skus(container) == ["before", "later"]


@pytest.mark.parametrize("how", MANAGED)
def test_an_aborted_unit_keeps_nothing_of_what_was_done_around_a_refusal(container: Container, how: str) -> None:
    with pytest.raises(SessionIsManaged), container.transaction():
        session = container.writer_session()
        session.add(Order(sku="before"))
        session.flush()
        MANAGED[how][0](session)
    assert skus(container) == []


@pytest.mark.parametrize("method", ["commit", "rollback", "close", "begin", "remove", "reset"])
def test_a_scoped_session_refuses_the_same(container: Container, method: str) -> None:
    with container.transaction():
        scoped = container.writer_scoped_session()
        scoped.add(Order(sku="before"))
        with pytest.raises(SessionIsManaged):
            getattr(scoped, method)()
        assert scoped() is container.writer_session(), "a refused remove() must not make room for a second session"
    assert skus(container) == ["before"]


def test_savepoints_by_hand_are_not_refused(container: Container) -> None:
    with container.transaction():
        session = container.writer_session()
        session.add(Order(sku="kept"))
        with session.begin_nested():
            session.add(Order(sku="released"))
        with pytest.raises(LookupError), session.begin_nested():
            session.add(Order(sku="undone"))
            raise LookupError
        nested = session.begin_nested()
        session.add(Order(sku="rolled back"))
        nested.rollback()
    assert skus(container) == ["kept", "released"]


def test_a_transaction_rolled_back_behind_the_units_back_is_found_out(container: Container) -> None:
    with pytest.raises(TransactionLost, match="Nothing was committed"), container.transaction():
        session = container.writer_session()
        session.add(Order(sku="before"))
        session.flush()
        transaction = session.get_transaction()
        assert transaction is not None
        transaction.rollback()
        session.add(Order(sku="later"))
    assert skus(container) == []


def test_a_commit_by_way_of_the_connection_is_refused_before_it_is_sent(container: Container) -> None:
    with pytest.raises(SessionIsManaged, match=r"session\.connection\(\)\.commit\(\)"), container.transaction():
        session = container.writer_session()
        session.add(Order(sku="before"))
        session.flush()
        session.connection().commit()
    assert skus(container) == []


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "BEGIN"])
def test_a_transaction_ended_by_a_statement_is_refused_before_it_is_sent(container: Container, statement: str) -> None:
    with container.transaction():
        session = container.writer_session()
        session.add(Order(sku="before"))
        session.flush()
        with pytest.raises(SessionIsManaged):
            session.execute(text(statement))
        with pytest.raises(SessionIsManaged):
            session.connection().exec_driver_sql(statement)
        session.add(Order(sku="later"))
    assert skus(container) == ["before", "later"]


# ---- the manager -------------------------------------------------------------------------------------------------------------


def test_a_unit_begun_by_the_manager_inside_another_is_refused(container: Container) -> None:
    message = (
        r"begin\(\) was called while a unit of work is under way\. Use `with container\.transaction\(\):`, which joins it, or"
    )
    with container.transaction():
        container.writer_session().add(Order(sku="before"))
        with pytest.raises(AlreadyInUnitOfWork, match=message), container.transaction_manager():
            pytest.fail("a second unit began inside the first")
        with pytest.raises(AlreadyInUnitOfWork, match=message):
            container.transaction_manager().begin()
        with pytest.raises(AlreadyInUnitOfWork, match=message):
            container.transaction_manager().run(lambda: pytest.fail("a second unit began inside the first"))
        container.writer_session().add(Order(sku="later"))
    assert skus(container) == ["before", "later"]


@pytest.mark.parametrize("verb", ["commit", "abort"])
def test_a_unit_ended_behind_the_blocks_back_says_so_at_the_end_of_the_block(container: Container, verb: str) -> None:
    with pytest.raises(UnitOfWorkEnded), container.transaction():
        container.writer_session().add(Order(sku="before"))
        getattr(container.transaction_manager(), verb)()
    assert skus(container) == (["before"] if verb == "commit" else [])


# ---- names and settings --------------------------------------------------------------------------------------------------------


def test_a_function_that_was_never_wired_says_which_module_to_wire() -> None:
    with pytest.raises(NotWired) as caught:
        unwired()
    assert f"`container.wire(modules=[{__name__!r}])`" in str(caught.value)
    assert "unwired was called before a container was wired to its module" in str(caught.value)


def test_a_connection_that_is_not_declared_is_named_with_those_that_are(local: Container) -> None:
    asks: list[Callable[[], object]] = [
        lambda: local.warehouse_session,
        lambda: local.warehouse,
        lambda: Container.warehouse_session,
    ]
    for ask in asks:
        with pytest.raises(
            UnknownConnection, match=r"Declare `NAME = Connection\(\)` in the container.*There are: 'reader', 'writer'"
        ):
            ask()
    with pytest.raises(UnknownConnection, match=r"no 'writer_sesion'\. Did you mean 'writer_session'\?"):
        local.writer_sesion  # noqa: B018


def test_a_connection_without_a_database_names_the_variable_to_set(sqlite_url: str) -> None:
    container = Container(settings=DatabaseSettings(connections={"log": ConnectionSettings(url=sqlite_url)}))
    for ask in (container.writer_engine, container.writer_sessionmaker):
        with pytest.raises(
            ConnectionNotConfigured, match=rf"Set {WRITER}, for example to sqlite:///writer\.db\. Configured are: 'log'"
        ):
            ask()
    with pytest.raises(ConnectionNotConfigured), container.transaction():
        container.writer_session()
    assert not container.transaction_manager().current()


def test_an_unknown_variable_is_named_with_the_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WRITER, "sqlite://")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__POOL__SISE", "7")
    container = Container()
    with pytest.raises(
        UnknownVariable,
        match=r"SISE: is set, but app_db has no such setting\. Did you mean 'APP_DB_CONNECTIONS__WRITER__POOL__SIZE'\?",
    ):
        container.settings()
    with pytest.raises(UnknownVariable), container.transaction():
        container.writer_session()
    monkeypatch.delenv("APP_DB_CONNECTIONS__WRITER__POOL__SISE")
    with container.transaction():
        container.writer_session().execute(text("SELECT 1"))  # mended without making a new container
    container.shutdown_resources()


def test_what_has_to_be_awaited_is_refused_in_a_plain_with_before_anything_is_touched(container: Container) -> None:
    async def hook() -> None:
        pytest.fail("ran")

    with container.transaction() as unit:
        container.writer_session().add(Order(sku="A-1"))
        with pytest.raises(
            AwaitRequired, match=r"The 'writer' async session has to be awaited\. Begin its unit of work with `async"
        ):
            container.writer_async_session()
        with pytest.raises(AwaitRequired, match=r"The hook .*hook\(\) has to be awaited\. Begin the unit with `async with`"):
            unit.on_commit(hook)
    assert skus(container) == ["A-1"]
    assert not container.writer_async_engine.is_built  # type: ignore[attr-defined]


def test_settings_that_contradict_each_other_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WRITER, "postgresql://app:secret@db/app")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__READ_ONLY", "true")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__TWO_PHASE", "true")
    with pytest.raises(ContradictorySettings, match=r"WRITER__TWO_PHASE: excludes READ_ONLY=true") as caught:
        Container().settings()
    assert "secret" not in str(caught.value)


def test_nothing_configured_gives_a_line_to_paste() -> None:
    with pytest.raises(NothingConfigured, match=rf"To start, paste {WRITER}=sqlite:///writer\.db"):
        Container().settings()


@pytest.mark.parametrize(
    "kind",
    [NoUnitOfWork, UnitOfWorkEnded, ForeignUnitOfWork, UnitOfWorkInUse, SessionIsManaged, AlreadyInUnitOfWork],
    ids=lambda kind: kind.__name__,
)
def test_wrong_uses_have_a_common_base(kind: type[Exception]) -> None:
    assert issubclass(kind, UnitOfWorkError)
    assert issubclass(kind, AppDbError)


# ---- several databases ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(new_postgres_url: Callable[[], str]) -> Iterator[Any]:
    """Two-phase `a` and `b`, each with a table `orders`, and a decision log in a third database, with its table."""
    connections: dict[str, ConnectionSettings] = {
        name: ConnectionSettings(url=new_postgres_url(), two_phase=True) for name in ("a", "b", "ledger")
    }
    container: Any = container_of(*connections)(settings=DatabaseSettings(connections=connections, decision_log="ledger"))
    container.check()
    for engine in (container.a_engine(), container.b_engine()):
        Base.metadata.create_all(engine)
    yield container
    for name in connections:
        assert getattr(container, f"{name}_engine")().pool.checkedout() == 0
    assert not container.transaction_manager().current()
    assert container.recovery().in_doubt() == []
    container.shutdown_resources()


def order(container: Any) -> None:
    for session in (container.a_session(), container.b_session()):
        session.execute(insert(Order).values(sku="A-1"))


def ordered(container: Any) -> tuple[list[str], list[str]]:
    with container.transaction():
        a, b = (list(session.scalars(select(Order.sku))) for session in (container.a_session(), container.b_session()))
    return a, b


def at_the_decision(container: Any, do: Callable[[], object]) -> None:
    """Do something once all branches are prepared, immediately before the decision is written."""
    event.listen(container.ledger_engine(), "before_cursor_execute", lambda *_: do() and None, once=True)


class Closing:
    """Keeps a database of `several` closed to everybody."""

    def __init__(self, container: Any, name: str) -> None:
        self._engine = (container.b_engine if name == "a" else container.a_engine)()
        self._database = getattr(container, f"{name}_engine")().url.database

    def close(self) -> None:
        self._execute(f"ALTER DATABASE {self._database} ALLOW_CONNECTIONS false")
        self._execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._database}'")

    def open(self) -> None:
        self._execute(f"ALTER DATABASE {self._database} ALLOW_CONNECTIONS true")

    def _execute(self, statement: str) -> None:
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(statement))


@pytest.mark.parametrize("ask", ["check", "init_resources"])
def test_a_server_that_cannot_prepare_is_named_with_its_setting_before_the_first_unit(
    new_postgres: Callable[..., PostgresServer], ask: str
) -> None:
    server = new_postgres(settings={"max_prepared_transactions": 0})
    settings = DatabaseSettings(connections={"writer": ConnectionSettings(url=server.url("postgres"), two_phase=True)})
    container = Container(settings=settings)
    with pytest.raises(TwoPhaseUnavailable, match=r"APP_DB_CONNECTIONS__WRITER__TWO_PHASE: max_prepared_transactions is 0"):
        getattr(container, ask)()
    server.stop()
    with pytest.raises(TwoPhaseUnavailable, match=r"APP_DB_CONNECTIONS__WRITER__TWO_PHASE: .*can't be asked") as caught:
        getattr(container, ask)()
    assert PASSWORD not in str(caught.value)
    container.shutdown_resources()


def test_only_those_that_cannot_be_prepared_are_named_when_a_unit_is_refused(
    new_postgres_url: Callable[[], str], new_sqlite_url: Callable[[], str]
) -> None:
    connections = {name: ConnectionSettings(url=new_sqlite_url()) for name in ("x", "y")}
    connections["a"] = ConnectionSettings(url=new_postgres_url(), two_phase=True)
    container: Any = container_of(*connections)(settings=DatabaseSettings(connections=connections))
    for name in connections:
        Base.metadata.create_all(getattr(container, f"{name}_engine")())
    with (
        pytest.raises(
            NotAtomic, match=r"wrote to 'x', 'y', which can't commit together\..*TWO_PHASE=true for all of them but one"
        ),
        container.transaction(),
    ):
        for name in connections:
            getattr(container, f"{name}_session")().execute(insert(Order).values(sku="A-1"))
    container.shutdown_resources()


def test_a_unit_that_recovery_has_aborted_says_that_it_can_be_repeated(several: Any) -> None:
    at_the_decision(several, lambda: several.recovery().settle(grace=0))
    with pytest.raises(AbortedByRecovery, match=r"Nothing was committed: .*Repeat the unit \(`attempts=2` does\)") as caught:
        several.transaction().run(order, several)
    assert retryable(caught.value)
    assert ordered(several) == ([], [])

    at_the_decision(several, lambda: several.recovery().settle(grace=0))
    several.transaction(attempts=2).run(order, several)
    assert ordered(several) == (["A-1"], ["A-1"])


def test_a_database_that_does_not_confirm_the_commit_is_named_and_nothing_is_repeated(several: Any) -> None:
    b, calls = Closing(several, "b"), []
    at_the_decision(several, b.close)

    def attempt() -> None:
        calls.append("attempt")
        several.unit().on_commit(calls.append, "hook")
        order(several)

    with pytest.raises(CommitUnconfirmed, match=r"was committed, but 'b' did not confirm it\. Don't repeat the unit") as caught:
        several.transaction(attempts=3).run(attempt)
    assert (caught.value.connections, calls) == (("b",), ["attempt", "hook"])
    assert not retryable(caught.value)
    b.open()
    several.recovery().settle(grace=0)
    assert ordered(several) == (["A-1"], ["A-1"])


def test_a_database_that_does_not_confirm_is_one_of_the_failures_where_hooks_fail_too(several: Any) -> None:
    b = Closing(several, "b")
    at_the_decision(several, b.close)
    with pytest.raises(HookFailed) as caught, several.transaction() as unit:
        unit.on_commit(int, "no number")
        order(several)
    assert [type(error) for error in caught.value.errors] == [CommitUnconfirmed, ValueError]
    b.open()
    several.recovery().settle(grace=0)


def test_a_decision_that_got_no_answer_names_where_it_is_and_what_waits_for_it(several: Any) -> None:
    ledger, calls = Closing(several, "ledger"), []
    at_the_decision(several, ledger.close)

    def attempt() -> None:
        calls.append("attempt")
        order(several)

    message = r"the table app_db_decisions of 'ledger' can't be reached\. 'a', 'b' stay prepared"
    with pytest.raises(OutcomeUnknown, match=message) as caught:
        several.transaction(attempts=3).run(attempt)
    assert (caught.value.prepared, caught.value.committed, calls) == (("a", "b"), (), ["attempt"])
    settlement = several.recovery().settle(grace=0)
    assert settlement.left, "nothing may be rolled back while the decision can't be looked up"
    ledger.open()
    several.recovery().settle(grace=0)
    a, b = ordered(several)
    assert a == b


def test_a_damaged_decision_file_fails_the_unit_with_its_name_and_stays_as_it_is(
    new_postgres_url: Callable[[], str], tmp_path: Path
) -> None:
    connections = {name: ConnectionSettings(url=new_postgres_url(), two_phase=True) for name in ("a", "b")}
    path = tmp_path / "decisions"
    path.write_text("these are not\nthe decisions you are looking for\n")
    container: Any = container_of(*connections)(settings=DatabaseSettings(connections=connections, decision_log=f"file:{path}"))
    for engine in (container.a_engine(), container.b_engine()):
        Base.metadata.create_all(engine)
    with pytest.raises(DecisionFileDamaged, match=r"file is not a database\. Don't delete it") as caught:
        container.transaction().run(order, container)
    assert caught.value.path == str(path)
    assert ordered(container) == ([], [])
    assert container.recovery().settle(grace=0).left, "recovery does not take a damaged file for one without decisions"
    assert path.read_text().startswith("these are not")
    container.shutdown_resources()


# ---- without assert statements -----------------------------------------------------------------------------------------------


OPTIMISED = """
import sys, threading, warnings
warnings.simplefilter("error")
import transaction
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from zope.sqlalchemy import register
from app_db import Container, DatabaseSettings, errors

if __debug__:
    sys.exit("run me with -O")

def require(condition, what):
    if not condition:
        sys.exit("FAILED: " + what)

def refused(kind, action, what):
    try:
        action()
    except kind:
        return
    except BaseException as error:
        sys.exit(f"FAILED: {what} raised {error!r} instead of {kind.__name__}")
    sys.exit(f"FAILED: {what} was allowed")

directory = sys.argv[1]

# zope.sqlalchemy alone: its guards are assert statements, so this commits behind the transaction's back.
engine = create_engine(f"sqlite:///{directory}/plain.db")
with engine.begin() as connection:
    connection.execute(text("CREATE TABLE orders (sku TEXT)"))
maker = sessionmaker(engine)
register(maker)
session = maker()
session.execute(text("INSERT INTO orders VALUES ('behind')"))
session.commit()
transaction.abort()
with engine.begin() as connection:
    require(connection.scalar(text("SELECT count(*) FROM orders")) == 1, "zope.sqlalchemy's guard has become more than an assert")
engine.dispose()

# app_db: the same is refused.
container = Container(settings=DatabaseSettings(connections={"writer": {"url": f"sqlite:///{directory}/shop.db"}}))
with container.transaction():
    container.writer_session().execute(text("CREATE TABLE orders (sku TEXT)"))

def count():
    with container.transaction():
        return container.writer_session().scalar(text("SELECT count(*) FROM orders"))

fresh = container.writer_scoped_session().session_factory()
refused(errors.NoUnitOfWork, container.writer_session, "asking outside")
refused(errors.NoUnitOfWork, lambda: fresh.execute(text("SELECT 1")), "executing outside")
refused(errors.NoUnitOfWork, fresh.commit, "commit outside")
refused(errors.NoUnitOfWork, lambda: container.writer_scoped_session().execute(text("SELECT 1")), "the scoped session outside")

def with_session(session):
    with session:
        pass

def with_begin(session):
    with session.begin():
        pass

for name, use in {
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "begin": lambda session: session.begin(),
    "prepare": lambda session: session.prepare(),
    "get_transaction().commit": lambda session: session.get_transaction().commit(),
    "with session": with_session,
    "with session.begin": with_begin,
}.items():
    before = count()
    try:
        with container.transaction():
            session = container.writer_session()
            session.execute(text("INSERT INTO orders VALUES ('inside')"))
            refused(errors.SessionIsManaged, lambda: use(session), name)
            raise LookupError
    except LookupError:
        pass
    require(count() == before, f"{name} kept what an aborted unit wrote")
    with container.transaction():
        session = container.writer_session()
        session.execute(text("INSERT INTO orders VALUES ('inside')"))
        refused(errors.SessionIsManaged, lambda: use(session), name)
    require(count() == before + 1, f"{name} lost what a unit wrote")
    refused(errors.UnitOfWorkEnded, lambda: session.execute(text("SELECT 1")), "a session kept from an ended unit")

with container.transaction():
    session = container.writer_session()
    refused(errors.AlreadyInUnitOfWork, container.transaction_manager().begin, "a second begin")
    raised = []
    def work():
        try:
            session.execute(text("SELECT 1"))
        except errors.ForeignUnitOfWork as error:
            raised.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    require(len(raised) == 1, "another thread was let in")

reader = Container(settings=DatabaseSettings(connections={"writer": {"url": f"sqlite:///{directory}/shop.db"}}))
def write_by_reader():
    with reader.transaction():
        reader.reader_session().execute(text("DELETE FROM orders"))
refused(errors.ReadOnlyViolation, write_by_reader, "a write by the reader")
require(count() == 8, "the reader wrote")
require(container.writer_engine().pool.checkedout() == 0, "a connection was kept")
reader.shutdown_resources()
container.shutdown_resources()
print("all refused")
"""


@pytest.mark.exhaustive
def test_the_refusals_do_not_need_assert_statements(tmp_path: Path) -> None:
    """The fact guarded: zope.sqlalchemy's guards are asserts, so `python -O` commits what they should refuse; ours stay."""
    script = tmp_path / "optimised.py"
    script.write_text(OPTIMISED)
    command, environment = [sys.executable, "-O", str(script), str(tmp_path)], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "all refused"), done.stdout + done.stderr


def test_a_session_that_is_marked_before_its_first_use_says_that_this_is_not_needed(sqlite_url: str) -> None:
    container = container_of("writer")(settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": sqlite_url}}))
    with container.transaction():
        with pytest.raises(
            InvalidUse, match=r"mark_changed\(\) came before the first use of the 'writer' session\. Leave it out"
        ):
            mark_changed(container.writer_session())
        container.writer_session().execute(text("CREATE TABLE kept (n integer)"))
        mark_changed(container.writer_session())
    assert inspect(container.writer_engine()).get_table_names() == ["kept"]
    container.shutdown_resources()
