"""What a unit of work is to the tasks and threads that are started inside it.

`PYTHONPATH=tests python -m units.test_tasks_and_threads` writes the table of this module into docs/tasks-and-threads.md.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import pytest

from app_db import AppDbError, Propagation, UnitOfWork
from app_db.errors import ForeignUnitOfWork, InvalidUse, NoUnitOfWork, UnitOfWorkDoomed, UnitOfWorkEnded, UnitOfWorkInUse
from harness.applications import Boom
from harness.coroutines import AwaitedDatabases, opened_awaited
from harness.items import Databases, opened
from harness.paths import ROOT

DOCUMENT = ROOT / "docs" / "tasks-and-threads.md"

Blocking = Callable[[], None]
Awaited = Callable[[], Coroutine[Any, Any, None]]


# ---- ways to start something ------------------------------------------------------------------------------------------


async def await_it(inner: Awaited) -> None:
    await inner()


async def async_for(inner: Awaited) -> None:
    class Once:
        def __init__(self) -> None:
            self._is_over = False

        def __aiter__(self) -> Once:
            return self

        async def __anext__(self) -> None:
            if self._is_over:
                raise StopAsyncIteration
            self._is_over = True
            await inner()

    async for _ in Once():
        pass


async def async_generator(inner: Awaited) -> None:
    async def generate() -> AsyncIterator[None]:
        await inner()
        yield

    async for _ in generate():
        pass


async def timeout(inner: Awaited) -> None:
    async with asyncio.timeout(30):
        await inner()


async def wait_for(inner: Awaited) -> None:
    await asyncio.wait_for(inner(), 30)


async def create_task(inner: Awaited) -> None:
    await asyncio.create_task(inner())


async def gather(inner: Awaited) -> None:
    await asyncio.gather(inner())


async def task_group(inner: Awaited) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(inner())


async def shield(inner: Awaited) -> None:
    await asyncio.shield(inner())


async def eager_task(inner: Awaited) -> None:
    factory: Any = asyncio.eager_task_factory  # type: ignore[attr-defined,unused-ignore]  # since Python 3.12
    await factory(asyncio.get_running_loop(), inner())


async def anyio_task_group(inner: Awaited) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(inner)


async def call_soon(inner: Blocking) -> None:
    called = asyncio.Event()

    def call() -> None:
        inner()
        called.set()

    asyncio.get_running_loop().call_soon(call)
    await called.wait()


async def to_thread(inner: Blocking) -> None:
    await asyncio.to_thread(inner)


async def anyio_to_thread(inner: Blocking) -> None:
    await anyio.to_thread.run_sync(inner)


async def run_in_executor(inner: Blocking) -> None:
    await asyncio.get_running_loop().run_in_executor(None, inner)


async def run_in_executor_with_context(inner: Blocking) -> None:
    await asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, inner)


def generator(inner: Blocking) -> None:
    def generate() -> Iterator[None]:
        inner()
        yield

    for _ in generate():
        pass


def submit(inner: Blocking) -> None:
    with ThreadPoolExecutor() as executor:
        executor.submit(inner).result()


def submit_with_context(inner: Blocking) -> None:
    with ThreadPoolExecutor() as executor:
        executor.submit(contextvars.copy_context().run, inner).result()


def thread(inner: Blocking) -> None:
    started = threading.Thread(target=inner)
    started.start()
    started.join()


def thread_with_context(inner: Blocking) -> None:
    thread(lambda context=contextvars.copy_context(): context.run(inner))  # type: ignore[misc]  # bound at once


# ---- the table --------------------------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """What a block becomes, by its propagation."""

    required: str
    requires_new: str
    nested: str
    mandatory: str
    supports: str
    not_supported: str
    never: str


PART, OWN, NONE = "takes part", "own unit", "no unit"
PART_OR_AWAIT = "takes part; `AwaitRequired` if an async session is in use"
FOREIGN, IN_UNIT, NO_UNIT = "`ForeignUnitOfWork`", "`AlreadyInUnitOfWork`", "`NoUnitOfWork`"

#                   required requires_new nested mandatory supports not_supported never
IN_THE_UNIT = Cells(PART, OWN, PART, PART, PART, NONE, IN_UNIT)
IN_A_THREAD = IN_THE_UNIT._replace(nested=PART_OR_AWAIT)
INHERITED = Cells(FOREIGN, OWN, FOREIGN, FOREIGN, FOREIGN, NONE, NONE)
OUTSIDE = Cells(OWN, OWN, OWN, NO_UNIT, NONE, NONE, NONE)

WITH, ASYNC_WITH, SYNC_SESSION, NO_LOOP = "with", "async with", "async with and a sync session", "with, without a loop"
"""The outer unit: begun by `with` or by `async with` in a task, or by `with` where no loop runs."""

IN_A_LOOP = (WITH, ASYNC_WITH)
FOR_THREADS = (WITH, ASYNC_WITH, SYNC_SESSION)
EVERYWHERE = (NO_LOOP, *FOR_THREADS)


class Way(NamedTuple):
    """A way to start code, and what a block in that code becomes."""

    name: str
    start: Callable[..., Awaitable[None] | None]
    cells: Cells
    units: tuple[str, ...]
    """The outer units that it is tried in."""
    is_awaited: bool = False
    """Whether the code is a coroutine. Its block is then begun as the outer unit is."""
    is_there: bool = True
    """Whether this version of Python has it."""


SINCE_312 = sys.version_info >= (3, 12)

WAYS = (
    Way("`await`", await_it, IN_THE_UNIT, IN_A_LOOP, is_awaited=True),
    Way("`async for`", async_for, IN_THE_UNIT, IN_A_LOOP, is_awaited=True),
    Way("an async generator", async_generator, IN_THE_UNIT, IN_A_LOOP, is_awaited=True),
    Way("a generator", generator, IN_THE_UNIT, (NO_LOOP, WITH)),
    Way("`asyncio.timeout`", timeout, IN_THE_UNIT, IN_A_LOOP, is_awaited=True),
    Way("`asyncio.wait_for`, since Python 3.12", wait_for, IN_THE_UNIT, IN_A_LOOP, is_awaited=True, is_there=SINCE_312),
    Way("`asyncio.wait_for`, Python 3.11", wait_for, INHERITED, IN_A_LOOP, is_awaited=True, is_there=not SINCE_312),
    Way("`asyncio.create_task`", create_task, INHERITED, IN_A_LOOP, is_awaited=True),
    Way("`asyncio.gather`", gather, INHERITED, IN_A_LOOP, is_awaited=True),
    Way("`asyncio.TaskGroup`", task_group, INHERITED, IN_A_LOOP, is_awaited=True),
    Way("`asyncio.shield`", shield, INHERITED, IN_A_LOOP, is_awaited=True),
    Way("an eager task, since Python 3.12", eager_task, INHERITED, IN_A_LOOP, is_awaited=True, is_there=SINCE_312),
    Way("`anyio.create_task_group`", anyio_task_group, INHERITED, IN_A_LOOP, is_awaited=True),
    Way("`loop.call_soon`", call_soon, INHERITED, IN_A_LOOP),
    Way("`asyncio.to_thread`", to_thread, IN_A_THREAD, FOR_THREADS),
    Way("`anyio.to_thread.run_sync`", anyio_to_thread, IN_A_THREAD, FOR_THREADS),
    Way("`loop.run_in_executor` with `copy_context().run`", run_in_executor_with_context, IN_A_THREAD, FOR_THREADS),
    Way("`ThreadPoolExecutor.submit` with `copy_context().run`", submit_with_context, IN_A_THREAD, EVERYWHERE),
    Way("`threading.Thread` with `copy_context().run`", thread_with_context, IN_A_THREAD, EVERYWHERE),
    Way("`loop.run_in_executor`", run_in_executor, OUTSIDE, FOR_THREADS),
    Way("`ThreadPoolExecutor.submit`", submit, OUTSIDE, EVERYWHERE),
    Way("`threading.Thread`", thread, OUTSIDE, EVERYWHERE),
)

CASES = [
    pytest.param(way, unit, propagation, id=f"{way.name.replace('`', '')}-{unit}-{propagation}", marks=_available)
    for way in WAYS
    for _available in [() if way.is_there else pytest.mark.skip("another version of Python has it")]
    for unit in way.units
    for propagation in Propagation
]

INTRODUCTION = """\
---
orphan: true
---

# Tasks and threads inside a unit of work

A unit of work is open, and its code starts other code in one of the ways below. That code enters a block with the
`propagation` at the head of the column. A cell says what the block becomes:

- **takes part**: the block is a part of the open unit. Its rows are rolled back if the open unit raises.
- **own unit**: the block is a unit of work of its own. Its rows stay if the open unit raises.
- **no unit**: the block runs without a unit of work. A session asked for inside it raises `NoUnitOfWork`.
- The name of an error: the block raises the error and does not run. The open unit goes on.

The tests run every cell and compare the rows in the database with this page.
"""

AFTER_THE_TABLE = """\
A task that got [`ForeignUnitOfWork`](errors/foreign-unit-of-work.md) has three ways out. The error's page shows them.

Threads take part in a unit one at a time. A second thread at the same time gets
[`UnitOfWorkInUse`](errors/unit-of-work-in-use.md).
"""


def document() -> str:
    head = ["started by", *(f"`{propagation}`" for propagation in Propagation)]
    lines = [INTRODUCTION, f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join([way.name, *(_cell(way, propagation) for propagation in Propagation)])} |" for way in WAYS]
    return "\n".join([*lines, "", AFTER_THE_TABLE])


def _cell(way: Way, propagation: str) -> str:
    cell: str = getattr(way.cells, propagation)
    return cell


def test_the_documented_table_is_the_one_that_is_tested() -> None:
    assert DOCUMENT.read_text() == document(), "run `PYTHONPATH=tests python -m units.test_tasks_and_threads`"


def test_the_table_has_every_propagation() -> None:
    assert Cells._fields == tuple(propagation.value for propagation in Propagation)


@pytest.fixture
def two_databases(new_sqlite_url: Callable[[], str]) -> Iterator[AwaitedDatabases]:
    """Two files, because SQLite has one writer at a time: the outer block writes to one, the inner block to the other."""
    with opened_awaited({"writer": new_sqlite_url(), "other": new_sqlite_url()}, "aiosqlite") as databases:
        yield databases


class Seen(NamedTuple):
    """What an inner block saw, and the rows afterwards when the outer unit raised, and when it did not."""

    block: str
    raised: frozenset[str]
    succeeded: frozenset[str]


OUTER_ROW, INNER_ROW = frozenset({"outer"}), frozenset({"inner"})
NO_ROW: frozenset[str] = frozenset()


def expected_of(cell: str, unit: str) -> Seen:
    if cell == PART_OR_AWAIT:
        cell = "AwaitRequired" if unit == ASYNC_WITH else PART
    if cell == PART:
        return Seen("wrote", NO_ROW, OUTER_ROW | INNER_ROW)
    if cell == OWN:
        return Seen("wrote", INNER_ROW, OUTER_ROW | INNER_ROW)
    return Seen(cell.strip("`"), NO_ROW, OUTER_ROW)


@pytest.mark.representative("*-required", "await-*", "asyncio.to_thread-*")
@pytest.mark.parametrize(("way", "unit", "propagation"), CASES)
def test_the_table(two_databases: AwaitedDatabases, way: Way, unit: str, propagation: str) -> None:
    blocks, rows = [], []
    for raises in (True, False):
        blocks.append(start_inside(two_databases, way, unit, propagation, raises=raises))
        rows.append(frozenset({*two_databases.items(), *two_databases.items("other")}))
        for name in ("writer", "other"):
            two_databases.rival("DELETE FROM item", name)
    assert blocks[0] == blocks[1]
    assert Seen(blocks[0], *rows) == expected_of(_cell(way, propagation), unit)


def start_inside(databases: AwaitedDatabases, way: Way, unit: str, propagation: str, *, raises: bool) -> str:
    """Start a block inside a unit of work that may raise, and return what the block saw."""
    run = Run(databases, way, propagation, raises=raises)
    try:
        if unit == NO_LOOP:
            run.without_a_loop()
        else:
            databases.in_a_loop(run.in_with if unit == WITH else partial(run.in_async_with, by_sync_session=unit == SYNC_SESSION))
    except Boom:
        assert raises
    assert databases.checked_out() == 0
    (block,) = run.seen
    return block


class Run:
    """A unit of work that writes a row, starts a block that writes another row, and may raise."""

    def __init__(self, databases: AwaitedDatabases, way: Way, propagation: str, *, raises: bool) -> None:
        self._databases = databases
        self._transaction = databases.container.transaction
        self._way = way
        self._propagation = propagation
        self._raises = raises
        self.seen: list[str] = []

    # -- the outer unit

    def without_a_loop(self) -> None:
        with self._transaction():
            self._databases.add("outer")
            self._way.start(self._block)
            self._end()

    async def in_with(self) -> None:
        async def awaited() -> None:
            self._block()

        with self._transaction():
            self._databases.add("outer")
            await self._start(awaited)
            self._end()

    async def in_async_with(self, *, by_sync_session: bool) -> None:
        async with self._transaction():
            if by_sync_session:
                self._databases.add("outer")
            else:
                await self._databases.write("outer")
            await self._start(self._awaited_block)
            self._end()

    async def _start(self, awaited: Awaited) -> None:
        started = self._way.start(awaited if self._way.is_awaited else self._block)
        if started is not None:
            await started

    def _end(self) -> None:
        if self._raises:
            raise Boom

    # -- the inner block

    def _block(self) -> None:
        with self._watched(), self._transaction(propagation=self._propagation), self._written():
            self._databases.add("inner", "other")

    async def _awaited_block(self) -> None:
        with self._watched():
            async with self._transaction(propagation=self._propagation):
                with self._written():
                    await self._databases.write("inner", "other")

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
            self.seen.append("wrote")
        except NoUnitOfWork:
            self.seen.append(NONE)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except AppDbError as error:
            self.seen.append(type(error).__name__)


# ---- tasks ------------------------------------------------------------------------------------------------------------


async def test_a_task_that_runs_without_a_unit_may_begin_one_inside(two_databases: AwaitedDatabases) -> None:
    """As the same code does that is awaited in the unit's own task."""
    container = two_databases.container

    async def without() -> None:
        with container.transaction(propagation="not_supported"):
            with pytest.raises(NoUnitOfWork):
                two_databases.session()
            with container.transaction():
                two_databases.add("inner", "other")

    with pytest.raises(Boom), container.transaction():
        two_databases.add("outer")
        await asyncio.create_task(without())
        raise Boom
    assert two_databases.items() == []
    assert two_databases.items("other") == ["inner"]


async def test_a_callback_of_the_loop_may_begin_a_unit(databases: Databases) -> None:
    """A handler of `loop.add_signal_handler` is one, too. No task runs it."""
    failed: list[object] = []

    def work() -> None:
        with databases.container.transaction():
            databases.add("called")
            with databases.container.transaction():
                databases.add("inside")

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, what: failed.append(what))
    loop.call_soon(work)
    await asyncio.sleep(0.01)
    assert failed == []
    assert databases.items() == ["called", "inside"]


def test_a_callback_that_inherited_a_unit_is_told_a_way_out_that_works(databases: Databases) -> None:
    told: list[str] = []

    def work() -> None:
        with pytest.raises(ForeignUnitOfWork) as refused:
            databases.session()
        told.append(str(refused.value))
        with databases.container.transaction(propagation="requires_new"):
            databases.add("own")

    async def main() -> None:
        with databases.container.transaction():
            asyncio.get_running_loop().call_soon(work)
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert len(told) == 1
    assert "`with container.transaction(propagation='requires_new'):`" in told[0]
    assert databases.items() == ["own"]


async def test_a_task_that_outlives_its_parents_unit_may_begin_its_own(two_databases: AwaitedDatabases) -> None:
    container = two_databases.container

    async def outliving(may_go_on: asyncio.Event) -> None:
        with pytest.raises(ForeignUnitOfWork):
            async with container.transaction():
                pytest.fail("took part in the unit of another task")
        await may_go_on.wait()
        with pytest.raises(UnitOfWorkEnded):
            container.unit()
        async with container.transaction():
            await two_databases.write("outliving")

    may_go_on = asyncio.Event()
    async with container.transaction():
        await two_databases.write("parent")
        task = asyncio.create_task(outliving(may_go_on))
        await asyncio.sleep(0)
    may_go_on.set()
    await task
    assert two_databases.items() == ["outliving", "parent"]


WAYS_OUT = {
    "await": "Await the coroutine there instead of making a task of it",
    "requires_new": "give it `propagation='requires_new'`",
    "adopt": "call `unit.adopt()` in the new task",
}


@pytest.mark.parametrize("way_out", WAYS_OUT)
@pytest.mark.parametrize("raises", [False, True], ids=["the unit commits", "the unit raises"])
def test_each_way_out_that_a_refused_task_is_told_works(two_databases: AwaitedDatabases, way_out: str, raises: bool) -> None:
    container = two_databases.container

    async def child() -> None:
        async with container.transaction(propagation="requires_new" if way_out == "requires_new" else "required"):
            await two_databases.write("child", "other")

    async def follow_advice(unit: UnitOfWork) -> None:
        async def adopting() -> None:
            unit.adopt()
            await child()

        if way_out == "await":
            await child()
        elif way_out == "requires_new":
            await asyncio.create_task(child())
        else:
            await asyncio.create_task(adopting())
            unit.adopt()

    async def refused() -> None:
        async with container.transaction():
            pytest.fail("took part in the unit of another task")

    async def main() -> None:
        async with container.transaction() as unit:
            await two_databases.write("parent")
            with pytest.raises(ForeignUnitOfWork) as told:
                await asyncio.create_task(refused(), name="the child")
            assert told.value.user == "task 'the child'"
            assert all(advice in str(told.value) for advice in WAYS_OUT.values())
            await follow_advice(unit)
            await two_databases.write("parent again")
            if raises:
                raise Boom

    if raises:
        with pytest.raises(Boom):
            two_databases.in_a_loop(main)
    else:
        two_databases.in_a_loop(main)
    assert two_databases.items() == ([] if raises else ["parent", "parent again"])
    assert two_databases.items("other") == ([] if raises and way_out != "requires_new" else ["child"])


# ---- two threads in one unit ------------------------------------------------------------------------------------------


class Visitor:
    """A thread with a copy of the context in which it was made. It enters a block of the unit, and stays there until told."""

    def __init__(self, databases: Databases, name: str, **options: Any) -> None:
        self._databases = databases
        self._options = options
        self._entered, self._may_leave = threading.Event(), threading.Event()
        self._raises: BaseException | None = None
        self.error: BaseException | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=lambda: context.run(self._visit), name=name)

    def _visit(self) -> None:
        try:
            with self._databases.container.transaction(**self._options):
                self._databases.add(self._thread.name)
                self._entered.set()
                self._may_leave.wait(30)
                if self._raises is not None:
                    raise self._raises
        except BaseException as error:
            self.error = error
        finally:
            self._entered.set()

    def enter(self) -> Visitor:
        self._thread.start()
        assert self._entered.wait(30)
        return self

    def leave(self, error: BaseException | None = None) -> Visitor:
        self._raises = error
        self._may_leave.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self


TAKING_PART = pytest.mark.parametrize("propagation", ["required", "nested", "mandatory", "supports"])


@TAKING_PART
def test_a_second_thread_at_the_same_time_is_refused_by_name(databases: Databases, propagation: str) -> None:
    with databases.container.transaction():
        first = Visitor(databases, "the first").enter()
        second = Visitor(databases, "the second", propagation=propagation).enter().leave()
        assert isinstance(second.error, UnitOfWorkInUse)
        assert (second.error.user, second.error.other) == ("thread 'the second'", "thread 'the first'")
        assert "thread 'the second'" in str(second.error)
        assert "thread 'the first'" in str(second.error)
        assert first.leave().error is None
    assert databases.items() == ["the first"]


@TAKING_PART
def test_a_refused_thread_takes_part_when_the_first_has_left(databases: Databases, propagation: str) -> None:
    with databases.container.transaction() as unit:
        first = Visitor(databases, "the first").enter()
        refused = Visitor(databases, "refused", propagation=propagation).enter().leave()
        assert isinstance(refused.error, UnitOfWorkInUse)
        assert first.leave().error is None
        assert not unit.is_doomed
        assert Visitor(databases, "the second", propagation=propagation).enter().leave().error is None
        databases.add("the owner")
    assert databases.items() == ["the first", "the owner", "the second"]


def test_a_refused_thread_may_begin_a_unit_of_its_own(postgres_url: str) -> None:
    with opened({"writer": postgres_url}) as databases:
        with pytest.raises(Boom), databases.container.transaction():
            first = Visitor(databases, "the first").enter()
            second = Visitor(databases, "the second", propagation="requires_new").enter().leave()
            assert second.error is None
            assert first.leave().error is None
            raise Boom
        assert databases.items() == ["the second"]


def test_threads_that_follow_each_other_take_part_in_one_unit(databases: Databases) -> None:
    names = [f"thread {number}" for number in range(5)]
    with pytest.raises(Boom), databases.container.transaction():
        for name in names:
            assert Visitor(databases, name).enter().leave().error is None
        raise Boom
    assert databases.items() == []
    with databases.container.transaction():
        for name in names:
            assert Visitor(databases, name).enter().leave().error is None
    assert databases.items() == names


def test_blocks_inside_each_other_in_one_thread_take_part(databases: Databases) -> None:
    def work() -> None:
        with databases.container.transaction():
            with databases.container.transaction(propagation="nested"):
                databases.add("innermost")
            with pytest.raises(Boom), databases.container.transaction(propagation="nested"):
                databases.add("undone")
                raise Boom
            refused = Visitor(databases, "refused").enter().leave()  # the inner blocks have not freed the unit
            assert isinstance(refused.error, UnitOfWorkInUse)
            databases.add("inner")

    with databases.container.transaction(), ThreadPoolExecutor(1) as executor:
        executor.submit(contextvars.copy_context().run, work).result()
        assert Visitor(databases, "next").enter().leave().error is None
    assert databases.items() == ["inner", "innermost", "next"]


def test_a_thread_whose_block_raised_frees_the_unit_for_the_next(databases: Databases) -> None:
    boom = Boom()
    with databases.container.transaction():
        failed = Visitor(databases, "failed", propagation="nested").enter().leave(boom)
        assert failed.error is boom
        assert Visitor(databases, "next").enter().leave().error is None
    assert databases.items() == ["next"]


def test_a_thread_whose_block_raised_dooms_the_unit_and_frees_it(databases: Databases) -> None:
    with pytest.raises(UnitOfWorkDoomed), databases.container.transaction():
        assert isinstance(Visitor(databases, "failed").enter().leave(Boom()).error, Boom)
        assert Visitor(databases, "next").enter().leave().error is None
    assert databases.items() == []


def test_a_thread_that_could_not_enter_frees_the_unit_for_the_next(databases: Databases) -> None:
    """Its block was refused for another reason, after it was noted that the thread takes part."""
    with databases.container.transaction():
        refused = Visitor(databases, "refused", isolation="serializable").enter().leave()
        assert isinstance(refused.error, InvalidUse)
        assert Visitor(databases, "next").enter().leave().error is None
    assert databases.items() == ["next"]


def test_two_calls_of_to_thread_at_once_are_refused_by_name(two_databases: AwaitedDatabases) -> None:
    """They have a task each, too; what counts is that a thread takes part already."""
    databases, both = two_databases, threading.Barrier(2)
    names: list[str] = []

    def work() -> None:
        names.append(threading.current_thread().name)
        both.wait(30)
        try:
            with databases.container.transaction():
                databases.add("worked", "other")
                both.wait(30)
        except UnitOfWorkInUse:
            both.wait(30)
            raise

    async def main() -> None:
        async with databases.container.transaction():
            await databases.write("owner")
            outcomes = await asyncio.gather(asyncio.to_thread(work), asyncio.to_thread(work), return_exceptions=True)
            (refused,) = [outcome for outcome in outcomes if outcome is not None]
            assert isinstance(refused, UnitOfWorkInUse)
            assert {refused.user, refused.other} == {f"thread {name!r}" for name in names}
            await asyncio.to_thread(databases.add, "afterwards", "other")

    databases.in_a_loop(main)
    assert databases.items() == ["owner"]
    assert databases.items("other") == ["afterwards", "worked"]


if __name__ == "__main__":
    DOCUMENT.write_text(document())
