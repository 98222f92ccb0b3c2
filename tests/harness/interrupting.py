"""Interrupts a unit of work at each line, or at each opcode, and looks what it has left.

    tried = try_every_point(Scenario("a block", plain), new_ground, Boom)
    assert not tried.bad, tried.report()

A tracer raises an exception once, at the n-th traced line, for n = 1, 2, ... until the scenario runs through. The exception
stands for one that a signal handler raises: an alarm, Celery's soft time limit, Ctrl-C. Whoever catches it begins the next
unit of work, while the traceback is still alive. That unit must raise, or be committed by itself.

Only public names of app_db are used, the manager's `current()` and the engines' pools.
"""

from __future__ import annotations

import asyncio
import contextlib
import dis
import gc
import inspect
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal, Self, cast

import pytest
import sqlalchemy
import transaction
import zope.sqlalchemy
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession

import app_db
from app_db.errors import IsolationTimeout
from app_db.testing import isolated
from harness.applications import Application, Item
from harness.two_phasing import TwoPhaseApplication
from harness.versions import RESET_LOSES_PLACES


class Boom(Exception):
    """An interruption that `except Exception` catches, such as Celery's soft time limit."""


class Halt(BaseException):
    """An interruption that `except Exception` does not catch, such as KeyboardInterrupt."""


Interruption = (Boom, Halt)

STOPS = (asyncio.CancelledError, KeyboardInterrupt, pytest.fail.Exception)
"""What ends a test: its user, or its time limit, as after a lock that stays locked for ever."""

HANGS = 2.0
"""Seconds after which a point of coroutines counts as one that never ends."""


# ---- the tracer -----------------------------------------------------------------------------------------------------


class Mode(Enum):
    """What counts as a point."""

    LINES = "lines"
    """Each line of app_db, transaction, zope.sqlalchemy, of contextlib's stacks, and of how it runs their generators."""
    OPCODES = "opcodes"
    """Each opcode of them."""
    EXHAUSTIVE = "exhaustive"
    """Each line of them, of all of contextlib, and of SQLAlchemy."""


def _directory(package: Any) -> str:
    return f"{Path(package.__file__).parent}/"


_TRACED = (_directory(app_db), _directory(transaction), _directory(zope.sqlalchemy))
_STACKS = ("ExitStack.", "AsyncExitStack.", "_BaseExitStack.")


@cache
def _is_traced(code: CodeType, mode: Mode) -> bool:
    file = code.co_filename
    if file == contextlib.__file__:
        return mode is Mode.EXHAUSTIVE or code.co_qualname.startswith(_STACKS)
    if mode is Mode.EXHAUSTIVE and file.startswith(_directory(sqlalchemy)):
        return True
    return file.startswith(_TRACED)


def _runs_traced_generator(frame: FrameType, mode: Mode) -> bool:
    """Return whether a frame of contextlib's is on its way into a traced function that `contextmanager` decorates."""
    code = frame.f_code
    if code.co_filename != contextlib.__file__ or not code.co_qualname.startswith("_GeneratorContextManager."):
        return False
    generator = getattr(frame.f_locals.get("self"), "gen", None)
    return generator is not None and _is_traced(generator.gi_code, mode)


@cache
def _exits(code: CodeType) -> frozenset[int]:
    """Return the offsets of the instructions by which `with` blocks that raised nothing call `__exit__`.

    An exception that a tracer raises there skips `__exit__`, and a lock stays locked for ever. One that a signal handler raises
    can't come there: Python runs signal handlers after calls, at the start of functions and at the end of loops only.
    """
    instructions = list(dis.get_instructions(code))
    found: set[int] = set()
    for number, instruction in enumerate(instructions):
        if instruction.opname != "CALL" or instruction.arg != 2:
            continue
        first = number - 1
        while first >= 0 and instructions[first].opname in ("PRECALL", "CACHE", "PUSH_NULL"):
            first -= 1
        nones = instructions[max(first - 2, 0) : first + 1]
        if len(nones) < 3 or any(it.opname != "LOAD_CONST" or it.argval is not None for it in nones):
            continue
        first -= 3
        while first >= 0 and instructions[first].opname in ("SWAP", "NOP", "COPY"):
            first -= 1
        found.update(it.offset for it in instructions[first + 1 : number + 1])
    return frozenset(found)


class Interrupter:
    """Raises once, at a point of what is called in the block: `with interrupter: ...`."""

    def __init__(self, number: int, kind: type[BaseException], mode: Mode) -> None:
        self.where = ""
        self._number = number
        self._kind = kind
        self.mode = mode
        self._event = "opcode" if mode is Mode.OPCODES else "line"
        self._seen = 0

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)  # Python has taken the tracer away by itself if it raised

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        if self.where or not (_is_traced(frame.f_code, self.mode) or _runs_traced_generator(frame, self.mode)):
            return None
        if self.mode is Mode.OPCODES:
            frame.f_trace = self._in_frame  # Python 3.13 minds the next line only where this is set
            frame.f_trace_opcodes = True
        return self._in_frame

    def _in_frame(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == self._event and not self.where and frame.f_lasti not in _exits(frame.f_code):
            self._seen += 1
            if self._seen == self._number:
                code = frame.f_code
                path = Path(code.co_filename)
                self.where = f"{path.parent.name}/{path.name}:{frame.f_lineno} in {code.co_qualname}"
                raise self._kind(f"point {self._number}")
        return self._in_frame


# ---- scenarios --------------------------------------------------------------------------------------------------------


class Holding(Enum):
    """When the next unit is begun, and what of the interrupted one is still alive then."""

    HANDLER = "in the handler"
    EXCEPTION = "the exception kept"


@dataclass(frozen=True)
class Scenario:
    """What is interrupted, and what has to be true of it."""

    name: str
    body: Callable[[Stage], Any]
    """A function or a coroutine function. It writes the row `mine` to all connections that it uses."""
    connections: Sequence[str] = ("writer",)
    """Where it writes."""
    raises: type[BaseException] | None = None
    """What it raises where nothing interrupts it. Nothing of it may be committed then."""
    at_once: bool = True
    """Whether the connections are back in their pools when the handler begins."""
    inside: Literal["", "part", "own", "free"] = ""
    """Not empty where it interrupts an inner block only, catches that itself, and runs the next block inside the outer one.

    The row `mine` of the inner block is a part of the outer unit ("part"): it must not be there when its block or the outer
    one raised. Or it is of a unit of its own ("own"), or it is left to `check` ("free").
    """
    wants_outer: bool | None = None
    """How the outer block has to end, if that is certain: by its commit, or by raising."""
    isolated: bool = False
    """Whether it runs in an isolated test."""
    check: Callable[[Stage, dict[str, list[str]]], None] | None = None
    """What else is to be looked at."""

    @property
    def asynchronous(self) -> bool:
        return inspect.iscoroutinefunction(self.body)


class Stage:
    """What the body of a scenario is given, for one point."""

    def __init__(self, app: Application, number: int, interrupter: Interrupter) -> None:
        self.app = app
        self.interrupter = interrupter
        self.number = number
        self.problems: list[str] = []
        self.kept: list[object] = []
        """What is held until the next unit has ended."""
        self.returned: set[str] = set()
        """The rows whose block returned normally, so that they must be there."""
        self.raised = ""
        """What the scenario raised."""
        self.inner_raised = False
        """Whether the inner block raised, in a scenario that catches that itself."""
        self.next_raised = ""
        self.wrote = False
        """Whether the row `mine` was written before the interruption."""

    def unit(self, *args: Any, **options: Any) -> Any:
        return self.app.container.transaction(*args, **options)

    def name(self, what: str) -> str:
        """The name of a row of this point."""
        return f"{what} {self.number}"

    def add(self, what: str, connection: str = "writer") -> None:
        """Write a row in the unit that is under way."""
        self.app.add(self.name(what), connection)

    def awaited_session(self, connection: str = "writer") -> AsyncSession:
        return cast("AsyncSession", getattr(self.app.container, f"{connection}_async_session")())

    async def add_awaited(self, what: str, connection: str = "writer") -> None:
        session = self.awaited_session(connection)
        session.add(Item(name=self.name(what)))
        await session.flush()

    def add_alone(self, what: str) -> None:
        """Write a row in a unit of its own."""
        with self.unit():
            self.add(what)
        self.returned.add(what)

    def wrong(self, problem: str) -> None:
        self.problems.append(problem)

    def run_next(self) -> None:
        """Run the next block, and note whether it returned."""
        try:
            with self.app.container.transaction():
                self.app.session().add(Item(name=self.name("next")))
            self.returned.add("next")
        except STOPS:
            raise
        except BaseException as error:
            self._note_next(error)

    async def run_next_awaited(self) -> None:
        try:
            async with self.app.container.transaction():
                self.awaited_session().add(Item(name=self.name("next")))
            self.returned.add("next")
        except STOPS:
            raise
        except BaseException as error:
            self._note_next(error)

    def _note_next(self, error: BaseException) -> None:
        self.next_raised = _line(error)
        # The unit before it was not ended, and keeps the next one from its database, its connection or its turn.
        # Inside SQLAlchemy an interruption may lose a connection, and its lock, whoever uses it.
        left_open = isinstance(error, (*Interruption, OperationalError, PoolTimeout, IsolationTimeout))
        if left_open and self.interrupter.mode is not Mode.EXHAUSTIVE:
            self.wrong(f"the next block raised {self.next_raised}")

    def caught_inside(self) -> None:
        """Note that the inner block raised, and run the next one inside the outer one. Called in the handler."""
        self.inner_raised = True
        self.run_next()

    async def caught_inside_awaited(self) -> None:
        self.inner_raised = True
        await self.run_next_awaited()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"


# ---- the ground on which they run -----------------------------------------------------------------------------------


class Ground:
    """An application, and connections that app_db knows nothing of to look at its databases with."""

    def __init__(self, app: Application, wired: Any = None) -> None:
        self.app = app
        self._wired = wired
        if wired is not None:
            app.container.wire(modules=[wired])
        self._looks: dict[str, Connection] = {
            name: app.plain_engine(name).execution_options(isolation_level="AUTOCOMMIT").connect() for name in app.connections
        }
        for look in self._looks.values():
            if look.dialect.name == "postgresql":
                look.exec_driver_sql("SET lock_timeout = '200ms'")

    def _ask(self, connection: str, statement: str) -> list[str]:
        # SQLAlchemy takes five times as long, and there are several questions at each point.
        dbapi: Any = self._looks[connection].connection.dbapi_connection
        return [row[0] for row in dbapi.execute(statement).fetchall()]

    def rows(self, number: int) -> dict[str, list[str]]:
        """Return which rows of a point are committed, by connection: ["mine", "next"]."""
        end = f" {number}"
        statement = f"SELECT name FROM items WHERE name LIKE '%{end}'"
        return {name: sorted(row.removesuffix(end) for row in self._ask(name, statement)) for name in self._looks}

    def clear(self) -> None:
        """Delete all rows, so that looking for some stays quick."""
        for look in self._looks.values():
            with contextlib.suppress(OperationalError):  # a unit that was never ended holds locks
                look.exec_driver_sql("DELETE FROM items")

    def in_use(self) -> dict[str, int]:
        """Return how many connections of each pool are in use."""
        found = {name: _checked_out(self.app.engine(name)) for name in self.app.connections}
        if _runs_in_loop():
            for name in self.app.connections:
                found[f"{name} (async)"] = _checked_out(getattr(self.app.container, f"{name}_async_engine")())
        return {name: count for name, count in found.items() if count}

    def current(self) -> object:
        return self.app.container.transaction_manager().current()

    def prepared(self) -> list[str]:
        """Return what is prepared in the databases."""
        found: list[str] = []
        for name, look in self._looks.items():
            if look.dialect.name == "postgresql":
                found += self._ask(name, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        return found

    def close(self) -> Any:
        for look in self._looks.values():
            with contextlib.suppress(Exception):
                look.close()
        if self._wired is not None:
            self.app.container.unwire()
        return self.app.container.shutdown_resources()


def _checked_out(engine: Any) -> int:
    return int(engine.pool.checkedout())


def _runs_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# ---- what is tried ------------------------------------------------------------------------------------------------------


@dataclass
class Tried:
    """The points of a scenario, and what was wrong at which."""

    title: str
    points: int = 0
    refused: int = 0
    """At how many the next block raised."""
    swallowed: int = 0
    """How many interruptions hit a callback, whose errors Python swallows."""
    hung: int = 0
    """How many did not end. After five the rest is left out, because each takes seconds."""
    took: float = 0.0
    documented: Sequence[str] = ()
    """Functions inside which an interruption may leave the unit open, as the documentation says."""
    bad: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def note(self, point: str, where: str, problems: Sequence[str]) -> None:
        if problems and not where.endswith(tuple(f" in {function}" for function in self.documented)):
            self.bad.append(f"{point} at {where or 'no point (it ran through)'}: {'; '.join(problems)}")
            self.kinds.update(problem.partition(":")[0] for problem in problems)

    def summary(self) -> str:
        left_out = ", the rest left out after 5 that hang" if self.hung >= 5 else ""
        return (
            f"POINTS | {self.title} | {self.points} points{left_out} | {len(self.bad)} bad | next block refused {self.refused} | "
            f"swallowed by Python {self.swallowed} | {self.took:.1f} s"
        )

    def report(self) -> str:
        lines = [self.summary(), *(f"  {count:5} x {kind}" for kind, count in self.kinds.most_common()), *self.bad[:20]]
        if len(self.bad) > 20:
            lines.append(f"... and {len(self.bad) - 20} more")
        return "\n".join(lines)


class Trial:
    """Runs one scenario at all its points."""

    def __init__(
        self,
        scenario: Scenario,
        new_ground: Callable[[], Ground],
        *,
        kinds: Sequence[type[BaseException]],
        mode: Mode,
        every: int,
        holding: Holding,
    ) -> None:
        self.scenario = scenario
        self._new_ground = new_ground
        self._kinds = kinds
        self._mode = mode
        self._every = every
        self._holding = holding
        names = "/".join(kind.__name__ for kind in kinds)
        self.tried = Tried(f"{scenario.name} | {mode.value}, {names}, {holding.value}")
        self._unraisable: list[str] = []
        self._ground = new_ground()

    # -- all points

    def run(self) -> Tried:
        began = time.monotonic()
        try:
            with self._quiet():
                if self.scenario.asynchronous:
                    asyncio.run(self._all_points_awaited())
                else:
                    self._all_points()
        except pytest.fail.Exception as stopped:
            self.tried.bad.append(f"stopped in the point after {self.tried.points} points: {_line(stopped)}")
            raise AssertionError(self.tried.report()) from stopped
        finally:
            if not self.scenario.asynchronous:
                self._ground.close()
        self.tried.took = time.monotonic() - began
        return self.tried

    def _numbers(self) -> Iterator[int]:
        number = 1
        while True:
            yield number
            number += self._every

    def _all_points(self) -> None:
        for number in self._numbers():
            if self._is_new:
                self._run_in_context(self._warming_up())
            stage = self._new_stage(number)
            self._run_in_context(stage)
            if self._is_over(stage):
                return

    def _run_in_context(self, stage: Stage) -> None:
        copy_context().run(_drive, self._one_point(stage))

    async def _all_points_awaited(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # no task of a unit that was interrupted is asked
        for number in self._numbers():
            if self._is_new:
                await asyncio.create_task(self._one_point(self._warming_up()))
            stage = self._new_stage(number)
            task = asyncio.create_task(self._one_point(stage))
            _, hanging = await asyncio.wait({task}, timeout=HANGS)
            if hanging:
                stage.wrong("hangs")
                task.cancel()
                await asyncio.wait({task}, timeout=0.5)
                self.tried.hung += 1
            elif not task.cancelled() and task.exception() is not None:
                stage.wrong(f"the test itself raised {_line(cast('BaseException', task.exception()))}")
            del task
            ground = self._ground
            over = self._is_over(stage) or self.tried.hung >= 5
            if over or ground is not self._ground:
                disposal = ground.close() if over else self._closing
                if disposal is not None:
                    await asyncio.wait({asyncio.ensure_future(disposal)}, timeout=HANGS)
            if over:
                return

    _closing: Any = None
    _is_new = True

    def _warming_up(self) -> Stage:
        """Return a stage without an interruption: what is made at the first use would make the points other ones."""
        self._is_new = False
        return self._new_stage(sys.maxsize)

    def _new_stage(self, number: int) -> Stage:
        kind = self._kinds[number // self._every % len(self._kinds)]
        return Stage(self._ground.app, number, Interrupter(number, kind, self._mode))

    def _is_over(self, stage: Stage) -> bool:
        """Note what came of a point, and return whether it was the last one."""
        hit = stage.interrupter.where
        self.tried.points += bool(hit)
        self.tried.refused += bool(stage.next_raised)
        swallowed = [line for line in self._unraisable if line.startswith(tuple(it.__name__ for it in Interruption))]
        self.tried.swallowed += bool(swallowed)
        for line in self._unraisable:
            # SQLAlchemy's greenlets wait for the database when their coroutine is closed, with app_db or without.
            if line not in swallowed and hit and "coroutine ignored GeneratorExit" not in line:
                stage.wrong(f"ignored by Python: {line}")
        self._unraisable.clear()
        self.tried.note(f"{self.scenario.name!r}, n={stage.number}", hit, stage.problems)
        if hit and (stage.problems or stage.next_raised) and self._is_spoilt(stage):
            self._renew()
        elif self.tried.points % 50 == 0:
            gc.collect()
            self._ground.clear()
        return not hit

    def _is_spoilt(self, stage: Stage) -> bool:
        """Return whether a point has left something that would be in the way of those after it."""
        stage.kept.clear()
        return (
            self.scenario.isolated or self.scenario.asynchronous or bool(self._ground.in_use()) or "locked" in stage.next_raised
        )

    def _renew(self) -> None:
        """Take other databases: what a bad point has left would be in the way of those after it."""
        left = self._ground
        self._closing = left.close()
        self._ground = self._new_ground()
        self._is_new = True

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Switch off what holds tracebacks (the capture of the log) or runs traced code at any time (the collector)."""
        before, sys.unraisablehook = sys.unraisablehook, self._note_unraisable
        logging.disable(logging.CRITICAL)
        gc.disable()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a coroutine was never awaited, say: so it is when it was interrupted
                yield
                gc.collect()
        finally:
            gc.enable()
            logging.disable(logging.NOTSET)
            sys.unraisablehook = before

    def _note_unraisable(self, unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, Warning):
            self._unraisable.append(f"{unraisable.exc_type.__name__}: {unraisable.exc_value}")

    # -- one point

    async def _one_point(self, stage: Stage) -> None:
        """Run the scenario, and the next block. Where the scenario is a function, nothing in here is awaited."""
        if self.scenario.isolated:
            await self._in_isolation(stage)
        elif self.scenario.inside:
            await self._act(stage)
            self._look_after(stage)
            self._look_at_inner(stage, self._ground.rows(stage.number))
        else:
            await self._act_and_go_on(stage)
        await self._once_more(stage)
        if self.scenario.check is not None:
            self.scenario.check(stage, self._ground.rows(stage.number))

    async def _act(self, stage: Stage) -> None:
        """Run a scenario that catches the interruption itself."""
        try:
            await _maybe(self.scenario.body(stage))
        except STOPS:
            raise
        except BaseException as error:
            stage.raised = _line(error)
        stage.kept.clear()

    async def _act_and_go_on(self, stage: Stage) -> None:
        kept = None
        ran_next = False
        before: dict[str, list[str]] = {}
        try:
            with stage.interrupter:
                await _maybe(self.scenario.body(stage))
        except STOPS:
            raise
        except BaseException as error:
            stage.raised = _line(error)
            if self.scenario.at_once:
                self._look_into_pools(stage, "in the handler")
            before = await self._rows_when_settled(stage)
            if self._holding is Holding.EXCEPTION:
                kept = error
            else:
                ran_next = True
                await self._run_next(stage)
        if not stage.raised:
            stage.returned.add("mine")
        if not ran_next:
            before = before or self._ground.rows(stage.number)
            await self._run_next(stage)
        del kept
        stage.kept.clear()
        self._look_after(stage)
        self._look_at_rows(stage, before)

    async def _rows_when_settled(self, stage: Stage) -> dict[str, list[str]]:
        """The rows after the interruption. If that landed while a coroutine awaited COMMIT, the driver goes on with it."""
        rows = self._ground.rows(stage.number)
        give_up = time.monotonic() + 0.5
        while "_Action.run" in str(stage.interrupter.where) and "mine" not in rows["writer"] and time.monotonic() < give_up:
            await asyncio.sleep(0.01)
            rows = self._ground.rows(stage.number)
        return rows

    async def _in_isolation(self, stage: Stage) -> None:
        """The same inside an isolated test, in which later units see what earlier ones have committed."""
        try:
            with isolated(stage.app.container, patience=0.3):
                try:
                    with stage.interrupter:
                        self.scenario.body(stage)
                    stage.returned.add("mine")
                except STOPS:
                    raise
                except BaseException as error:
                    stage.raised = _line(error)
                    stage.run_next()
                if not stage.raised:
                    stage.run_next()
                stage.kept.clear()
                if self._ground.current() is not None:
                    stage.wrong("a unit is still current after the next block")
                with stage.unit():
                    names = stage.app.session().scalars(sqlalchemy.select(Item.name)).all()
                seen = sorted(name.removesuffix(f" {stage.number}") for name in names)
                self._look_at_rows(stage, {}, {"writer": seen})
        except STOPS:
            raise
        except BaseException as error:
            stage.wrong(f"the isolated test raised: {_line(error)}")
        self._look_after(stage)
        left = self._ground.rows(stage.number)
        if any(left.values()):
            stage.wrong(f"the isolated test left rows: {left}")

    async def _run_next(self, stage: Stage) -> None:
        if self.scenario.asynchronous:
            await stage.run_next_awaited()
        else:
            stage.run_next()

    async def _once_more(self, stage: Stage) -> None:
        """A block that begins when all is over must work."""
        if self._mode is Mode.EXHAUSTIVE:
            return
        try:
            if self.scenario.asynchronous:
                async with stage.unit():
                    await stage.add_awaited("later")
            else:
                with stage.unit():
                    stage.add("later")
        except STOPS:
            raise
        except BaseException as error:
            stage.wrong(f"a later block raised: {_line(error)}")
        else:
            if "later" not in self._ground.rows(stage.number)["writer"]:
                stage.wrong("a later block returned, but its row is not there")

    # -- what is looked at

    def _look_into_pools(self, stage: Stage, when: str) -> None:
        # An interruption inside SQLAlchemy's pool may lose a connection, whoever uses it.
        in_use = self._ground.in_use()
        if in_use and self._mode is not Mode.EXHAUSTIVE and not RESET_LOSES_PLACES:
            stage.wrong(f"connections in use {when}: {in_use}")

    def _look_after(self, stage: Stage) -> None:
        if self._ground.current() is not None:
            stage.wrong("a unit is still current after the next block")
        self._look_into_pools(stage, "at the end")
        app = stage.app
        if isinstance(app, TwoPhaseApplication) and self._ground.prepared():
            app.recover()
            if self._ground.prepared():
                stage.wrong(f"still prepared after recovery: {self._ground.prepared()}")

    def _look_at_rows(self, stage: Stage, before: dict[str, list[str]], rows: dict[str, list[str]] | None = None) -> None:
        scenario = self.scenario
        rows = rows if rows is not None else self._ground.rows(stage.number)
        everywhere = f"rows: {rows}, raised: {stage.raised or None}, next raised: {stage.next_raised or None}"
        for what in sorted(stage.returned | {"next"}):
            there = what in rows["writer"]
            if what in stage.returned and not there and (what != "mine" or self._is_written()):
                stage.wrong(f"'{what}' returned, but is not committed: {everywhere}")
        if "next" in rows["writer"] and "next" not in stage.returned:
            stage.wrong(f"'next' raised, but is committed: {everywhere}")
        mine = {name: "mine" in rows[name] for name in scenario.connections if name in rows}
        if scenario.raises is not None and any(mine.values()):
            stage.wrong(f"'mine' is committed, though its body raised: {everywhere}")
        if "mine" in stage.returned and self._is_written() and not all(mine.values()):
            stage.wrong(f"'mine' returned, but is not in all databases: {everywhere}")
        together = isinstance(stage.app, TwoPhaseApplication)
        if together and len(set(mine.values())) > 1:
            stage.wrong(f"'mine' is in one database only: {everywhere}")
        for name, there in mine.items():
            if before and not together and there and "mine" not in before[name]:
                stage.wrong(f"'mine' was committed by the next block: {everywhere}")
        if not stage.interrupter.where and bool(stage.raised) != (scenario.raises is not None):
            stage.wrong(f"not interrupted, it ended otherwise than expected: {everywhere}")

    def _is_written(self) -> bool:
        return bool(self.scenario.connections)

    def _look_at_inner(self, stage: Stage, rows: dict[str, list[str]]) -> None:
        everywhere = (
            f"rows: {rows}, outer raised: {stage.raised or None}, inner raised: {stage.inner_raised}, "
            f"next raised: {stage.next_raised or None}"
        )
        in_all = set[str]().union(*rows.values())
        outer_committed = not stage.raised
        if ("outer" in in_all) != outer_committed:
            stage.wrong(f"'outer' is there otherwise than its block ended: {everywhere}")
        if ("next" in in_all) != ("next" in stage.returned and outer_committed):
            stage.wrong(f"'next' is there otherwise than its block and the outer one ended: {everywhere}")
        if not stage.interrupter.where and stage.inner_raised:
            stage.wrong(f"not interrupted, the inner block raised: {everywhere}")
        if self.scenario.wants_outer is not None and outer_committed != self.scenario.wants_outer:
            stage.wrong(f"the outer block ended otherwise than expected: {everywhere}")
        if self.scenario.inside == "part" and "mine" in in_all and (stage.inner_raised or not outer_committed):
            stage.wrong(f"'mine' is committed, though its block or the outer one raised: {everywhere}")
        if "mine" in stage.returned and "mine" not in in_all and (self.scenario.inside == "own" or outer_committed):
            stage.wrong(f"'mine' is not committed, though its block returned: {everywhere}")


def _drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that awaits nothing."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("a function's scenario has awaited something")


async def _maybe(made: Any) -> None:
    if inspect.isawaitable(made):
        await made


def try_every_point(
    scenario: Scenario,
    new_ground: Callable[[], Ground],
    *kinds: type[BaseException],
    mode: Mode = Mode.LINES,
    every: int = 1,
    holding: Holding = Holding.HANDLER,
    documented: Sequence[str] = (),
) -> Tried:
    """Interrupt a scenario at every point. `every` skips points; of several `kinds` of interruptions each has its turn."""
    trial = Trial(scenario, new_ground, kinds=kinds or Interruption, mode=mode, every=every, holding=holding)
    trial.tried.documented = documented
    tried = trial.run()
    print(tried.summary())
    return tried
