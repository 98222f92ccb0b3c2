"""Units of work of many threads and tasks at once: each has its own, and nobody gets at another's."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pytest
from sqlalchemy import Engine, event, exc, select, text
from sqlalchemy.orm import Session

import app_db._databases.engines
import app_db._sessions.state
import app_db.container
from app_db.errors import ForeignUnitOfWork, NoUnitOfWork, UnitOfWorkEnded
from harness.applications import Boom, checked_out
from harness.items import Databases, Item, database_name, opened
from harness.servers import PostgresServer

T = TypeVar("T")

THREADS = 32
UNITS = 200
POOL = {"size": 5, "max_overflow": 10, "timeout": 60}


def in_thread(function: Callable[[], T], name: str | None = None) -> T:
    """Return what a function returns, or raise what it raises, in a thread with an empty context."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results[0]


# ---- what threads share ------------------------------------------------------------------------------------------------


def test_units_don_t_need_the_lock_of_logging_which_an_interruption_may_leave_locked(new_sqlite_url: Callable[[], str]) -> None:
    """zope asks `logging` for a logger for each transaction. Before Python 3.13, a signal may leave that lock locked."""
    with opened({"writer": new_sqlite_url()}) as databases:

        def unit(name: str) -> None:
            with databases.container.transaction():
                databases.add(name)
            with contextlib.suppress(Boom), databases.container.transaction():
                databases.add("undone")
                raise Boom

        in_thread(lambda: unit("first"))  # loggers note once which levels they are for, under the lock
        second = threading.Thread(target=unit, args=("second",))
        with logging._lock:  # type: ignore[attr-defined]  # it is private
            second.start()
            second.join(10)
            waited = second.is_alive()
        second.join()
        assert not waited
        assert databases.items() == ["first", "second"]


# ---- many at once -----------------------------------------------------------------------------------------------------


class Crowd:
    """Threads that all work in units of their own, half of which raise, and note what they saw."""

    def __init__(self, databases: Databases, units: int) -> None:
        self.databases = databases
        self.units = units
        self.holders: dict[int, str] = {}
        self.wrong: list[str] = []
        self._barrier = threading.Barrier(THREADS)

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, args=(number,), name=f"worker {number}") for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def expected(self) -> list[str]:
        return sorted(f"{number}-{unit}" for number in range(THREADS) for unit in range(0, self.units, 2))

    def _work(self, number: int) -> None:
        try:
            self._barrier.wait(30)
            for unit in range(self.units):
                with contextlib.suppress(Boom):
                    self._unit(f"{number}-{unit}", fails=unit % 2 == 1)
        except BaseException as error:
            self.wrong.append(f"worker {number}: {error!r}")

    def _unit(self, name: str, *, fails: bool) -> None:
        me = threading.current_thread().name
        with self.databases.container.transaction():
            session = self.databases.session()
            # As long as it is held, no other session has its id; as long as it is noted, nobody else may have it.
            if (holder := self.holders.setdefault(id(session), me)) != me:
                self.wrong.append(f"{me} was given the session of {holder}")
            if len(session.identity_map) or session.new or session.in_transaction():
                self.wrong.append(f"{me} was given a session that was not empty")
            session.add(Item(name=name))
            session.flush()
            mine = session.scalars(select(Item.name).where(Item.name == name)).all()
            if mine != [name] or self.databases.session() is not session:
                self.wrong.append(f"{me} did not find its own work")
            del self.holders[id(session)]
            if fails:
                raise Boom


def backends(postgres: PostgresServer, url: str, application: str) -> int:
    rows = postgres.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = %s", [database_name(url), application]
    )
    return int(rows[0][0])


@pytest.mark.exhaustive
def test_32_threads_write_exactly_what_their_units_commit(postgres: PostgresServer, postgres_url: str) -> None:
    with opened({"writer": postgres_url}, each={"pool": POOL}) as databases:
        crowded: list[int] = []
        pool = databases.engine().pool
        event.listen(pool, "checkout", lambda *_: crowded.extend(checked_out([databases.engine()])))
        crowd = Crowd(databases, UNITS)
        crowd.run()
        assert crowd.wrong == []
        assert databases.items() == sorted(crowd.expected())
        assert max(crowded) == 15  # the pool was full, so that others waited for it
        assert databases.checked_out() == 0
        assert postgres.open_transactions(database_name(postgres_url)) == []


@pytest.mark.exhaustive
def test_engines_that_are_replaced_under_way_leave_nothing_behind(
    postgres: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[Engine] = []
    build = app_db._databases.engines.build_engine

    def build_and_note(name: str, settings: Any) -> Engine:
        engine = build(name, settings)
        engines.append(engine)
        return engine

    monkeypatch.setattr(app_db.container, "build_engine", build_and_note)
    with opened({"writer": postgres_url}, each={"pool": POOL}, application="crowd") as databases:
        crowd = Crowd(databases, UNITS // 4)  # each engine has its connections to make
        done = threading.Event()

        def replace() -> None:
            while not done.wait(0.05):
                databases.container.reset_singletons()

        replacing = threading.Thread(target=replace)
        replacing.start()
        try:
            crowd.run()
        finally:
            done.set()
            replacing.join()
        assert crowd.wrong == []
        assert databases.items() == sorted(crowd.expected())
        assert len(engines) > 10
        assert set(checked_out(engines)) == {0}
        databases.container.reset_singletons()
        give_up = time.monotonic() + 5
        while (left := backends(postgres, postgres_url, "crowd")) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert left == 0
        assert postgres.open_transactions(database_name(postgres_url)) == []


@pytest.mark.exhaustive
def test_every_engine_that_was_ever_made_is_retired_at_some_reset(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when a thread is put to sleep between making an engine and noting that it was made."""
    made: list[Engine] = []
    retired: set[Engine] = set()
    build, retire = app_db._databases.engines.build_engine, app_db._databases.engines.retire

    def build_and_note(name: str, settings: Any) -> Engine:
        made.append(build(name, settings))
        return made[-1]

    def retire_and_note(engine: Engine) -> None:
        retired.add(engine)
        retire(engine)

    monkeypatch.setattr(app_db.container, "build_engine", build_and_note)
    monkeypatch.setattr(app_db._sessions.state, "retire", retire_and_note)
    engine = databases.container.writer.engine  # type: ignore[attr-defined]  # its connections are known at run time
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            engine()

    threads = [threading.Thread(target=use) for _ in range(4)]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        while len(made) < 300:
            engine.reset()
    finally:
        done.set()
        sys.setswitchinterval(switching)
        for thread in threads:
            thread.join()
    engine.reset()
    assert set(made) == retired


def test_a_full_pool_makes_the_unit_fail_and_the_next_works(postgres_url: str) -> None:
    with opened({"writer": postgres_url}, each={"pool": {"size": 1, "max_overflow": 0, "timeout": 0.2}}) as databases:
        container = databases.container
        with container.transaction():
            databases.add("first")

            def second() -> None:
                with container.transaction():
                    databases.add("second")

            with pytest.raises(exc.TimeoutError):
                in_thread(second)
        assert databases.checked_out() == 0
        in_thread(second)
        assert databases.items() == ["first", "second"]


# ---- threads ----------------------------------------------------------------------------------------------------------


def test_a_thread_with_a_copy_of_the_context_works_in_its_callers_unit(databases: Databases) -> None:
    with databases.container.transaction():
        session = databases.session()
        context = contextvars.copy_context()

        def work() -> Session:
            databases.add("from the thread")
            return databases.session()

        assert in_thread(lambda: context.run(work)) is session
        assert databases.items() == []
    assert databases.items() == ["from the thread"]


def test_what_a_thread_with_a_copied_context_wrote_is_rolled_back_with_its_callers_unit(databases: Databases) -> None:
    with pytest.raises(Boom), databases.container.transaction():
        context = contextvars.copy_context()
        in_thread(lambda: context.run(databases.add, "from the thread"))
        raise Boom
    assert databases.items() == []


async def test_asyncio_to_thread_works_in_its_callers_unit(databases: Databases) -> None:
    with databases.container.transaction():
        session = databases.session()
        await asyncio.to_thread(databases.add, "from the thread")
        assert await asyncio.to_thread(databases.session) is session
    assert databases.items() == ["from the thread"]


def test_a_plain_thread_sees_no_unit(databases: Databases) -> None:
    with databases.container.transaction():
        with pytest.raises(NoUnitOfWork):
            in_thread(databases.session)
        with pytest.raises(NoUnitOfWork):
            in_thread(databases.container.unit)


def test_a_session_handed_to_a_thread_is_refused_there(databases: Databases) -> None:
    with databases.container.transaction():
        session = databases.session()
        databases.add("mine")
        for use in (
            lambda: session.execute(text("SELECT 1")),
            lambda: session.add(Item(name="theirs")),
            lambda: session.get(Item, "x"),
        ):
            with pytest.raises(ForeignUnitOfWork) as refused:
                in_thread(use, "borrower")
            assert refused.value.owner == f"thread {threading.current_thread().name!r}"
            assert refused.value.user == "thread 'borrower'"
    assert databases.items() == ["mine"]


def test_a_session_handed_to_a_thread_with_a_unit_of_its_own_is_refused_there(databases: Databases) -> None:
    with databases.container.transaction():
        session = databases.session()

        def borrow() -> None:
            with databases.container.transaction():
                session.add(Item(name="theirs"))

        with pytest.raises(ForeignUnitOfWork):
            in_thread(borrow)
        databases.add("mine")
    assert databases.items() == ["mine"]


def test_a_session_not_used_yet_is_refused_in_another_thread_all_the_same(databases: Databases) -> None:
    with databases.container.transaction():
        session = databases.session()
        with pytest.raises(ForeignUnitOfWork):
            in_thread(lambda: session.execute(text("SELECT 1")))


def test_a_thread_that_outlives_its_callers_unit_is_told_so(databases: Databases) -> None:
    with databases.container.transaction():
        session = databases.session()
        context = contextvars.copy_context()
    with pytest.raises(UnitOfWorkEnded):
        in_thread(lambda: context.run(databases.container.unit))
    for use in (lambda: session.execute(text("SELECT 1")), lambda: session.add(Item(name="late"))):
        with pytest.raises(UnitOfWorkEnded):
            in_thread(lambda use=use: context.run(use))  # type: ignore[misc]  # bound at once
    assert databases.items() == []


def test_a_thread_that_outlived_its_callers_unit_may_begin_one_of_its_own(databases: Databases) -> None:
    with databases.container.transaction():
        context = contextvars.copy_context()

    def own() -> None:
        with databases.container.transaction():
            databases.add("own")

    in_thread(lambda: context.run(own))
    assert databases.items() == ["own"]


# ---- tasks ------------------------------------------------------------------------------------------------------------


async def test_a_task_that_inherited_a_unit_is_refused_by_name(databases: Databases) -> None:
    async def main() -> None:
        async def child() -> None:
            for use in (databases.session, databases.container.unit, lambda: session.execute(text("SELECT 1"))):
                with pytest.raises(ForeignUnitOfWork, match="task 'the child'") as refused:
                    use()
                assert refused.value.owner == "task 'the parent'"

        with databases.container.transaction():
            session = databases.session()
            databases.add("parent")
            await asyncio.create_task(child(), name="the child")
            databases.add("parent again")

    await asyncio.create_task(main(), name="the parent")
    assert databases.items() == ["parent", "parent again"]


async def test_a_task_that_inherited_a_unit_may_have_one_of_its_own(postgres_url: str) -> None:
    with opened({"writer": postgres_url}) as databases:

        async def child() -> Session:
            with databases.container.transaction(propagation="requires_new"):
                databases.add("child")
                return databases.session()

        with pytest.raises(Boom), databases.container.transaction():
            databases.add("parent")
            assert await asyncio.create_task(child()) is not databases.session()
            databases.add("parent again")
            raise Boom
        assert databases.items() == ["child"]


def test_units_of_200_interleaved_tasks_are_kept_apart(postgres_url: str) -> None:
    """With zope's thread-local manager the tasks of one thread commit each other's rows, or find a transaction in their way."""
    with opened({"writer": postgres_url}, each={"pool": {"size": 200}}) as databases:

        async def task(number: int) -> None:
            with databases.container.transaction():
                session = databases.session()
                session.add(Item(name=f"{number:03}"))
                await asyncio.sleep(0)
                assert databases.session() is session
                if number % 2:
                    raise Boom

        async def main() -> list[Any]:
            return await asyncio.gather(*(task(number) for number in range(200)), return_exceptions=True)

        outcomes = asyncio.run(main())
        assert [type(outcome) for outcome in outcomes] == [type(None), Boom] * 100
        assert databases.items() == [f"{number:03}" for number in range(0, 200, 2)]


async def test_a_task_that_outlives_its_parents_unit_is_told_so(databases: Databases) -> None:
    go_on = asyncio.Event()

    async def child() -> None:
        await go_on.wait()
        with pytest.raises(UnitOfWorkEnded):
            databases.container.unit()
        with pytest.raises(UnitOfWorkEnded):
            session.add(Item(name="late"))
        with databases.container.transaction():
            databases.add("own")

    with databases.container.transaction():
        session = databases.session()
        outliving = asyncio.create_task(child())
        await asyncio.sleep(0)
    go_on.set()
    await outliving
    assert databases.items() == ["own"]


def test_a_unit_begun_before_the_loop_is_the_first_tasks_that_uses_it(databases: Databases) -> None:
    async def first() -> None:
        databases.add("first")
        with pytest.raises(ForeignUnitOfWork):
            await asyncio.create_task(second())

    async def second() -> None:
        databases.add("second")

    with databases.container.transaction():
        asyncio.run(first())
        databases.add("after the loop")
    assert databases.items() == ["after the loop", "first"]


async def test_an_async_generator_that_is_left_early_ends_its_unit(databases: Databases) -> None:
    """asyncio closes it in a task of its own."""

    async def numbers() -> AsyncIterator[int]:
        with databases.container.transaction():
            databases.add("abandoned")
            yield 1

    async for _ in numbers():
        break
    await asyncio.sleep(0.05)
    assert databases.checked_out() == 0
    with databases.container.transaction():
        databases.add("next")
    assert databases.items() == ["next"]


async def test_a_block_that_ends_in_another_task_is_aborted_and_says_so(databases: Databases) -> None:
    block = databases.container.transaction()
    block.__enter__()
    databases.add("a")

    async def leave() -> None:
        with pytest.raises(ForeignUnitOfWork):
            block.__exit__(None, None, None)

    await asyncio.create_task(leave())
    assert databases.checked_out() == 0
    with databases.container.transaction():
        databases.add("next")
    assert databases.items() == ["next"]


async def test_a_thread_that_goes_on_while_its_unit_is_aborted_leaves_no_transaction_open(
    postgres: PostgresServer, postgres_url: str
) -> None:
    """Its next statement would begin a transaction on a connection that is in the pool again."""
    with opened({"writer": postgres_url}, each={"pool": POOL}) as databases:
        errors: list[BaseException] = []
        ended = threading.Event()

        def work(session: Session) -> None:
            try:
                for _ in range(20):
                    session.execute(text("SELECT pg_sleep(0.05)"))
            except BaseException as error:
                errors.append(error)
            ended.set()

        async def unit() -> None:
            with databases.container.transaction():
                await asyncio.to_thread(work, databases.session())

        for _ in range(3):
            ended.clear()
            task = asyncio.create_task(unit())
            await asyncio.sleep(0.12)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(ended.wait, 10)
        assert [type(error) for error in errors] == [UnitOfWorkEnded] * 3
        assert postgres.open_transactions(database_name(postgres_url), within=1.0) == []
