"""An exception that comes from nowhere, at any line of app_db: no later unit of work is lost by it, and nothing stays open."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from dependency_injector.wiring import Provide
from sqlalchemy import NullPool, create_engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from transaction.interfaces import IDataManager, ISynchronizer, TransientError
from zope.interface import implementer
from zope.sqlalchemy import datamanager

from app_db import DatabaseSettings, container_of, transactional
from harness.applications import Application, Base, Item, Settings, running
from harness.interrupting import Boom, Ground, Halt, Holding, Interruption, Mode, Scenario, Stage, try_every_point
from harness.two_phasing import TwoPhaseApplication, without

NewUrl = Callable[[], str]

IN_TURN = (Boom, Halt)
EVERYWHERE = os.environ.get("INTERRUPT_EVERYWHERE", "") not in ("", "0")
"""Whether each point is interrupted by both kinds of exceptions, and each opcode. `make soak` does that, in half an hour."""

KINDS = pytest.mark.parametrize(
    "kinds", [(Boom,), (Halt,)] if EVERYWHERE else [IN_TURN], ids=["Exception", "BaseException"] if EVERYWHERE else ["in turn"]
)

pytestmark = pytest.mark.timeout(900)

_files = count(1)


def scenarios(*given: Scenario) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scenario", given, ids=[scenario.name for scenario in given])


# ---- where they run ---------------------------------------------------------------------------------------------------


class AwaitedApplication(Application):
    """An application whose writer only coroutines use."""

    def __init__(self, url: str, driver: str) -> None:
        settings = DatabaseSettings(connections={"writer": impatient(url.replace("+psycopg", f"+{driver}"))}, _env_file=None)
        self.connections = ("writer",)
        self.container = container_of("writer")(settings=settings)
        self._plain = {"writer": create_engine(url, poolclass=NullPool)}
        Base.metadata.create_all(self._plain["writer"])


class MemoryApplication(Application):
    """An application whose writer is `sqlite://`."""

    def __init__(self) -> None:
        settings = DatabaseSettings(connections={"writer": {"url": "sqlite://"}}, _env_file=None)
        self.connections = ("writer",)
        self.container = container_of("writer")(settings=settings)
        self._plain = {"writer": create_engine(self.engine().url, poolclass=NullPool)}
        Base.metadata.create_all(self._plain["writer"])


def impatient(url: str) -> Settings:
    """The settings of a connection that does not wait for what an interrupted unit has left."""
    waits = {"timeout": 0.05} if url.startswith("sqlite") else {}
    return {"url": url, "connect_args": waits, "pool": {"timeout": 0.2}}


@pytest.fixture
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Ground]:
    """Makes applications with a writer and a warehouse, in two SQLite files."""

    def new() -> Ground:
        number = next(_files)
        given = {name: impatient(f"sqlite:///{tmp_path}/{name}{number}.db") for name in ("writer", "warehouse")}
        return Ground(Application(given, "best_effort"), sys.modules[__name__] if is_decorated else None)

    is_decorated = "transactional" in request.node.name  # wiring takes long
    return new


# ---- one unit of work --------------------------------------------------------------------------------------------------


def empty(stage: Stage) -> None:
    with stage.unit():
        pass


def plain(stage: Stage) -> None:
    with stage.unit():
        stage.add("mine")


def unflushed(stage: Stage) -> None:
    with stage.unit():
        stage.app.session().add(Item(name=stage.name("mine")))


def failing(stage: Stage) -> None:
    with stage.unit():
        stage.add("mine")
        raise ValueError("changed my mind")


def named(stage: Stage) -> None:
    block = stage.unit()
    stage.kept.append(block)
    with block:
        stage.add("mine")


def stacked(stage: Stage) -> None:
    with ExitStack() as stack:
        stack.enter_context(stage.unit())
        stage.add("mine")


def stacked_and_kept(stage: Stage) -> None:
    stack = ExitStack()
    stage.kept.append(stack)
    with stack:
        stack.enter_context(stage.unit())
        stage.add("mine")


def stacked_and_closed(stage: Stage) -> None:
    stack = ExitStack()
    try:
        stack.enter_context(stage.unit())
        stage.add("mine")
    finally:
        stack.close()


@transactional
def add_injected(name: str, session: Session = Provide["writer_session"]) -> None:
    session.add(Item(name=name))


def decorated(stage: Stage) -> None:
    add_injected(stage.name("mine"))


def attempted(stage: Stage) -> None:
    attempts: list[int] = []

    def write() -> None:
        attempts.append(len(attempts))
        stage.add("mine")
        if len(attempts) == 1:
            raise TransientError("somebody else was first")

    stage.unit(attempts=2, backoff=0).run(write)


def limited(stage: Stage) -> None:
    with stage.unit(timeout=30):
        stage.add("mine")


def without_unit(propagation: str, stage: Stage) -> None:
    with stage.unit(propagation=propagation):
        pass


def joined(stage: Stage) -> None:
    with stage.unit():
        stage.add("mine")
        with stage.unit():
            stage.add("other")


def with_new_one(stage: Stage) -> None:
    with stage.unit():
        stage.add("outer", "warehouse")
        with stage.unit(propagation="requires_new"):
            stage.add("mine")


def with_savepoint(stage: Stage) -> None:
    with stage.unit():
        stage.add("mine")
        with stage.unit(propagation="nested"):
            stage.add("other")


def two_databases(stage: Stage) -> None:
    with stage.unit():
        stage.add("mine")
        stage.add("mine", "warehouse")


PLAIN = (
    Scenario("with", plain),
    Scenario("with, unflushed", unflushed),
    Scenario("with, nothing done", empty, connections=()),
    Scenario("with, the body raises", failing, raises=ValueError),
    Scenario("with, the block in a variable", named),
    Scenario("with, a timeout", limited),
    Scenario("transactional, injected", decorated),
    Scenario("run, two attempts", attempted),
    Scenario("two databases, best effort", two_databases, connections=("writer", "warehouse")),
    Scenario("joined inside", joined),
    Scenario("nested inside", with_savepoint),
    Scenario("requires_new inside", with_new_one),
    *(
        Scenario(f"{name}, no unit", partial(without_unit, name), connections=())
        for name in ("supports", "not_supported", "never")
    ),
    Scenario("mandatory, no unit", partial(without_unit, "mandatory"), connections=(), raises=LookupError),
)
STACKED = (
    Scenario("ExitStack", stacked, at_once=False),
    Scenario("ExitStack, in a variable", stacked_and_kept, at_once=False),
    Scenario("ExitStack, closed", stacked_and_closed, at_once=False),
)


@pytest.mark.representative("with-in turn" if not EVERYWHERE else "with-Exception")
@KINDS
@scenarios(*PLAIN, *STACKED)
def test_no_later_unit_is_lost(files: Callable[[], Ground], scenario: Scenario, kinds: tuple[type[BaseException], ...]) -> None:
    tried = try_every_point(scenario, files, *kinds)
    assert not tried.bad, tried.report()


LEAVING_A_STACK = (
    *(f"ExitStack.{method}" for method in ("__exit__", "close")),
    *(f"AsyncExitStack.{method}" for method in ("__aexit__", "aclose")),
    "Block._exit_by_stack",
    "Block._start_leaving",
)
"""Where a stack may be interrupted before it has begun to leave the block. docs/interruptions.md says what that means."""

KEPT = ("with", "with, the body raises", "with, the block in a variable", "transactional, injected", "nested inside")


@pytest.mark.exhaustive
@scenarios(*(scenario for scenario in PLAIN if scenario.name in KEPT), *STACKED)
def test_no_later_unit_is_lost_while_the_exception_is_kept(files: Callable[[], Ground], scenario: Scenario) -> None:
    tried = try_every_point(scenario, files, *IN_TURN, holding=Holding.EXCEPTION, documented=LEAVING_A_STACK)
    assert not tried.bad, tried.report()


@pytest.mark.exhaustive
@KINDS
def test_no_later_unit_is_lost_in_memory(kinds: tuple[type[BaseException], ...]) -> None:
    tried = try_every_point(Scenario("with, in memory", plain), lambda: Ground(MemoryApplication()), *kinds)
    assert not tried.bad, tried.report()


OPCODES = ("with", "with, the body raises", "transactional, injected", "with, nothing done", "ExitStack", "nested inside")


@pytest.mark.exhaustive
@scenarios(*(scenario for scenario in (*PLAIN, *STACKED) if scenario.name in OPCODES))
def test_no_later_unit_is_lost_at_any_opcode(files: Callable[[], Ground], scenario: Scenario) -> None:
    tried = try_every_point(scenario, files, *IN_TURN, mode=Mode.OPCODES, every=1 if EVERYWHERE else 7)
    assert not tried.bad, tried.report()


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
# With a timeout some points wait 10 s for a session that SQLAlchemy left in the middle, so that it takes too long.
@scenarios(*(scenario for scenario in (*PLAIN, *STACKED) if scenario.name != "with, a timeout"))
def test_no_later_unit_is_lost_inside_sqlalchemy(files: Callable[[], Ground], scenario: Scenario) -> None:
    tried = try_every_point(scenario, files, *IN_TURN, mode=Mode.EXHAUSTIVE, every=7 if EVERYWHERE else 21)
    assert not tried.bad, tried.report()


# ---- inside another unit -----------------------------------------------------------------------------------------------


class InterruptedOnce(WeakKeyDictionary[Any, Any]):
    """Stands for zope.sqlalchemy's dictionary of sessions. The first assignment is interrupted."""

    is_due = True

    def __setitem__(self, key: object, value: object) -> None:
        if self.is_due:
            self.is_due = False
            raise Boom
        super().__setitem__(key, value)


def test_a_session_that_zope_has_joined_and_not_noted_is_closed(
    monkeypatch: pytest.MonkeyPatch, new_sqlite_url: Callable[[], str]
) -> None:
    with running(writer=new_sqlite_url()) as app:
        monkeypatch.setattr(datamanager, "_SESSION_STATE", InterruptedOnce())
        with pytest.raises(Boom), app.unit():
            app.add("lost")
        assert app.engine().pool.checkedout() == 0  # type: ignore[attr-defined]
        with app.unit():
            app.add("kept")
        assert app.names() == ["kept"]


class Changed(Exception):
    """What the outer block raises, in scenarios where it does."""


def inner(propagation: str, where: str, fails: bool, stage: Stage) -> None:
    """Interrupt an inner block, catch that, and go on in the outer one."""
    with stage.unit():
        stage.add("outer", where)
        try:
            with stage.interrupter, stage.unit(propagation=propagation):
                if propagation != "not_supported":
                    stage.add("mine")
            if propagation != "not_supported":
                stage.returned.add("mine")
        except Interruption:
            stage.caught_inside()
        else:
            stage.run_next()
        if fails:
            raise Changed


def savepoint_taken(fails: bool, stage: Stage) -> None:
    with stage.unit() as unit:
        stage.add("outer")
        stage.add("outer", "warehouse")
        try:
            with stage.interrupter:
                savepoint = unit.savepoint()
            stage.add("mine")
            stage.add("mine", "warehouse")
            savepoint.rollback()
        except Interruption:
            stage.caught_inside()
        else:
            stage.run_next()
        if fails:
            raise Changed


def savepoint_rolled_back(fails: bool, stage: Stage) -> None:
    with stage.unit() as unit:
        stage.add("outer")
        stage.add("outer", "warehouse")
        savepoint = unit.savepoint()
        stage.add("mine")
        stage.add("mine", "warehouse")
        try:
            with stage.interrupter:
                savepoint.rollback()
        except Interruption:
            stage.caught_inside()
        else:
            stage.run_next()
        if fails:
            raise Changed


def all_or_none(stage: Stage, rows: dict[str, list[str]]) -> None:
    """Whether the rollback to a savepoint undid both databases' part, or neither's."""
    if len({"mine" in there for there in rows.values()}) > 1:
        stage.wrong(f"the rollback to a savepoint undid one database's part only: {rows}")
    if "mine" in rows["writer"] and not stage.inner_raised:
        stage.wrong(f"'mine' was rolled back to a savepoint, but is committed: {rows}")


INNER = tuple(
    scenario
    for fails, ending in ((False, "returns"), (True, "raises"))
    for scenario in (
        *(
            Scenario(f"{name} in a unit that {ending}", partial(inner, name, "writer", fails), inside="part")
            for name in ("required", "nested", "supports", "mandatory", "not_supported")
        ),
        Scenario(f"requires_new in a unit that {ending}", partial(inner, "requires_new", "warehouse", fails), inside="own"),
        Scenario(f"savepoint in a unit that {ending}", partial(savepoint_taken, fails), inside="free", check=all_or_none),
        Scenario(
            f"rollback to a savepoint in a unit that {ending}",
            partial(savepoint_rolled_back, fails),
            inside="free",
            check=all_or_none,
        ),
    )
)


@pytest.mark.representative(
    "nested in a unit that returns-in turn" if not EVERYWHERE else "nested in a unit that returns-Exception"
)
@KINDS
@scenarios(*INNER)
def test_the_outer_unit_goes_on_or_raises(
    files: Callable[[], Ground], scenario: Scenario, kinds: tuple[type[BaseException], ...]
) -> None:
    tried = try_every_point(scenario, files, *kinds)
    assert not tried.bad, tried.report()


@pytest.mark.exhaustive
@scenarios(*(scenario for scenario in INNER if scenario.name.startswith(("nested", "requires_new"))))
def test_the_outer_unit_goes_on_or_raises_at_any_opcode(files: Callable[[], Ground], scenario: Scenario) -> None:
    # After its last statement `_exit` only returns. A tracer can raise between the two opcodes of that, a signal handler can't.
    tried = try_every_point(scenario, files, *IN_TURN, mode=Mode.OPCODES, documented=("Block._exit",))
    assert not tried.bad, tried.report()


# ---- what takes part ---------------------------------------------------------------------------------------------------


def before_commit(stage: Stage) -> None:
    with stage.unit() as unit:
        stage.add("mine")
        unit.before_commit(stage.add, "hook's")


def on_commit(stage: Stage) -> None:
    with stage.unit() as unit:
        stage.add("mine")
        unit.on_commit(stage.add_alone, "hook's")
        unit.on_commit(stage.add_alone, "second hook's")


def on_abort(stage: Stage) -> None:
    with stage.unit() as unit:
        stage.add("mine")
        unit.on_abort(stage.add_alone, "hook's")
        unit.on_abort(stage.add_alone, "second hook's")
        raise ValueError("changed my mind")


def with_its_unit(stage: Stage, rows: dict[str, list[str]]) -> None:
    there = rows["writer"]
    if ("mine" in there) != ("hook's" in there):
        stage.wrong(f"what a before_commit hook wrote is apart from its unit: {there}")


def after_its_unit(stage: Stage, rows: dict[str, list[str]]) -> None:
    there = rows["writer"]
    if "hook's" in there and "mine" not in there:
        stage.wrong(f"an on_commit hook ran, but its unit is not committed: {there}")
    if not stage.raised and "second hook's" not in there:
        stage.wrong(f"the unit returned, but its on_commit hook didn't run: {there}")


def instead_of_its_unit(stage: Stage, rows: dict[str, list[str]]) -> None:
    if not stage.interrupter.where and "second hook's" not in rows["writer"]:
        stage.wrong(f"on_abort hooks didn't run: {rows}")


@implementer(IDataManager)
class Recorder:
    """Another data manager, which notes how it ended."""

    transaction_manager: Any = None

    def __init__(self, taking_part_in: Stage) -> None:
        self.said: list[str] = []
        self._stage = taking_part_in

    def abort(self, transaction: Any) -> None:
        self.said.append("abort")

    def tpc_begin(self, transaction: Any) -> None:
        self.said.append("begin")

    def commit(self, transaction: Any) -> None:
        self.said.append("commit")

    def tpc_vote(self, transaction: Any) -> None:
        self.said.append("vote")

    def tpc_finish(self, transaction: Any) -> None:
        self.said.append("finish")

    def tpc_abort(self, transaction: Any) -> None:
        self.said.append("abort")

    def sortKey(self) -> str:  # zope's name
        return "a recorder"


@implementer(ISynchronizer)
class Counting:
    """A synchronizer, which notes that it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def beforeCompletion(self, transaction: Any) -> None:
        self.told.append("before")

    def afterCompletion(self, transaction: Any) -> None:
        self.told.append("after")

    def newTransaction(self, transaction: Any) -> None:
        self.told.append("new")


_recorders: dict[int, Recorder] = {}


def with_data_manager(stage: Stage) -> None:
    recorder = _recorders[stage.number] = Recorder(stage)
    with stage.unit() as unit:
        unit.transaction.join(recorder)
        stage.add("mine")


def is_told(stage: Stage, rows: dict[str, list[str]]) -> None:
    recorder = _recorders.pop(stage.number)
    if "mine" in rows["writer"] and not {"finish", "abort"} & {*recorder.said}:
        stage.wrong(f"a data manager of a committed unit was not told how it ended: {recorder.said}")
    if {"begin", "vote"} & {*recorder.said} and not {"finish", "abort"} & {*recorder.said}:
        stage.wrong(f"a data manager was begun, but not told how the unit ended: {recorder.said}")
    if "finish" in recorder.said and "mine" not in rows["writer"]:
        stage.wrong(f"a data manager finished, but the database did not commit: {recorder.said}")


def with_synchronizer(stage: Stage) -> None:
    synchronizer = Counting()
    stage.app.container.transaction_manager().registerSynch(synchronizer)
    with stage.unit():
        stage.add("mine")


TAKING_PART = (
    Scenario("before_commit", before_commit, check=with_its_unit),
    Scenario("on_commit, which begins a unit", on_commit, check=after_its_unit),
    Scenario("on_abort, which begins a unit", on_abort, raises=ValueError, check=instead_of_its_unit),
    Scenario("a zope data manager", with_data_manager, check=is_told),
    Scenario("a synchronizer", with_synchronizer),
)


@pytest.mark.exhaustive
@KINDS
@scenarios(*TAKING_PART)
def test_what_takes_part_ends_with_its_unit(
    files: Callable[[], Ground], scenario: Scenario, kinds: tuple[type[BaseException], ...]
) -> None:
    tried = try_every_point(scenario, files, *kinds)
    assert not tried.bad, tried.report()


# ---- two-phase commit --------------------------------------------------------------------------------------------------


LOGS = ("a third", "one of the two", "a last resource", "a file")


@pytest.mark.exhaustive
@pytest.mark.parametrize("log", LOGS)
def test_two_databases_never_disagree(new_postgres_url: NewUrl, new_sqlite_url: NewUrl, tmp_path: Path, log: str) -> None:
    postgres = {"writer": new_postgres_url(), "warehouse": new_postgres_url()}

    def new() -> Ground:
        given: dict[str, Settings] = {name: impatient(url) for name, url in postgres.items()}
        place = {"a third": "journal", "a file": f"file:{tmp_path}/decisions{next(_files)}"}.get(log)
        if log == "a third":
            given["journal"] = impatient(journal)
        if log == "a last resource":
            given["warehouse"] = without(new_sqlite_url(), connect_args={"timeout": 0.05})
        app = TwoPhaseApplication(given, place, "strict")
        ground = Ground(app)
        app.container.check()  # makes the decision log
        return ground

    journal = new_postgres_url()
    scenario = Scenario(f"two-phase, decided in {log}", two_databases, connections=("writer", "warehouse"))
    tried = try_every_point(scenario, new, *IN_TURN)
    assert not tried.bad, tried.report()


@pytest.mark.exhaustive
@KINDS
def test_no_later_unit_is_lost_on_postgresql(postgres_url: str, kinds: tuple[type[BaseException], ...]) -> None:
    def new() -> Ground:
        return Ground(Application({"writer": impatient(postgres_url)}, "strict"))

    tried = try_every_point(Scenario("with, PostgreSQL", plain), new, *kinds)
    assert not tried.bad, tried.report()


# ---- coroutines ----------------------------------------------------------------------------------------------------------


async def awaited(stage: Stage) -> None:
    async with stage.unit():
        await stage.add_awaited("mine")


async def awaited_and_failing(stage: Stage) -> None:
    async with stage.unit():
        await stage.add_awaited("mine")
        raise ValueError("changed my mind")


async def awaited_and_empty(stage: Stage) -> None:
    async with stage.unit():
        await asyncio.sleep(0)


async def awaited_and_named(stage: Stage) -> None:
    block = stage.unit()
    stage.kept.append(block)
    async with block:
        await stage.add_awaited("mine")


async def awaited_stack(stage: Stage) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(stage.unit())
        await stage.add_awaited("mine")


@transactional
async def add_injected_awaited(name: str, session: AsyncSession = Provide["writer_async_session"]) -> None:
    session.add(Item(name=name))
    await session.flush()


async def decorated_awaited(stage: Stage) -> None:
    await add_injected_awaited(stage.name("mine"))


async def blocking_in_coroutine(stage: Stage) -> None:
    with stage.unit():
        stage.add("mine")


async def inner_awaited(propagation: str, fails: bool, stage: Stage) -> None:
    async with stage.unit():
        await stage.add_awaited("outer", "warehouse" if propagation == "requires_new" else "writer")
        try:
            with stage.interrupter:
                async with stage.unit(propagation=propagation):
                    await stage.add_awaited("mine")
            stage.returned.add("mine")
        except Interruption:
            await stage.caught_inside_awaited()
        else:
            await stage.run_next_awaited()
        if fails:
            raise Changed


AWAITED = (
    Scenario("async with", awaited),
    Scenario("async with, the body raises", awaited_and_failing, raises=ValueError),
    Scenario("async with, nothing done", awaited_and_empty, connections=()),
    Scenario("async with, the block in a variable", awaited_and_named),
    Scenario("transactional coroutine function", decorated_awaited),
    Scenario("AsyncExitStack", awaited_stack, at_once=False),
    Scenario("with, in a coroutine", blocking_in_coroutine),
)
INNER_AWAITED = tuple(
    Scenario(
        f"async {propagation} in a unit that {'raises' if fails else 'returns'}",
        partial(inner_awaited, propagation, fails),
        inside="own" if propagation == "requires_new" else "part",
    )
    for fails in (False, True)
    for propagation in ("required", "nested", "requires_new")
)


@pytest.mark.exhaustive
@KINDS
@scenarios(*AWAITED, *INNER_AWAITED)
def test_no_later_unit_of_coroutines_is_lost(
    files: Callable[[], Ground], scenario: Scenario, kinds: tuple[type[BaseException], ...]
) -> None:
    tried = try_every_point(scenario, files, *kinds)
    assert not tried.bad, tried.report()


def test_no_later_unit_of_coroutines_is_lost_at_every_twentieth_line(files: Callable[[], Ground]) -> None:
    """What `make test` has the time for."""
    tried = try_every_point(AWAITED[0], files, *IN_TURN, every=20)
    assert not tried.bad, tried.report()


@pytest.mark.exhaustive
@scenarios(*AWAITED)
def test_no_later_unit_of_coroutines_is_lost_while_the_exception_is_kept(files: Callable[[], Ground], scenario: Scenario) -> None:
    tried = try_every_point(scenario, files, *IN_TURN, holding=Holding.EXCEPTION, documented=LEAVING_A_STACK)
    assert not tried.bad, tried.report()


@pytest.mark.exhaustive
@scenarios(*(scenario for scenario in AWAITED if scenario.name in ("async with", "transactional coroutine function")))
def test_no_later_unit_of_coroutines_is_lost_at_any_opcode(files: Callable[[], Ground], scenario: Scenario) -> None:
    # A tracer can raise at the opcode by which `_start_leaving` returns, a signal handler can't.
    tried = try_every_point(scenario, files, *IN_TURN, mode=Mode.OPCODES, every=3, documented=("Block._start_leaving",))
    assert not tried.bad, tried.report()


@pytest.mark.exhaustive
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_no_later_unit_of_coroutines_is_lost_on_postgresql(postgres_url: str, driver: str) -> None:
    def new() -> Ground:
        return Ground(AwaitedApplication(postgres_url, driver))

    tried = try_every_point(Scenario(f"async with, {driver}", awaited), new, *IN_TURN, every=2)
    assert not tried.bad, tried.report()


# ---- isolated tests --------------------------------------------------------------------------------------------------------


ISOLATED = (
    Scenario("isolated: with", plain, isolated=True),
    Scenario("isolated: the body raises", failing, isolated=True, raises=ValueError),
    Scenario("isolated: transactional", decorated, isolated=True),
    Scenario("isolated: nested inside", with_savepoint, isolated=True),
)


@pytest.mark.exhaustive
@KINDS
@scenarios(*ISOLATED)
def test_an_isolated_test_goes_on(
    files: Callable[[], Ground], scenario: Scenario, kinds: tuple[type[BaseException], ...]
) -> None:
    tried = try_every_point(scenario, files, *kinds)
    assert not tried.bad, tried.report()
