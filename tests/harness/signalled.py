"""Run units of work in the main thread while real signals interrupt them at random times.

    python -m harness.signalled PLAN.json              # interrupt units; leaves a journal and a summary in the plan's directory
    python -m harness.signalled PLAN.json --recover    # settle what is prepared

tests/signals_at_random.py starts it, ends it if it hangs, and compares the databases with the journal.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import logging
import os
import random
import re
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import aiosqlite
from sqlalchemy.exc import StatementError

from app_db import errors
from harness.forms_of_units import (
    INTERRUPTIONS,
    POOL,
    Alarm,
    AwaitedUnits,
    BareAwaitedUnits,
    BareBlockingUnits,
    Bell,
    BlockingUnits,
    Plan,
    Unit,
)

SHORT = (0.0002, 0.003)
"""Seconds between two interruptions, most of the time."""

LONGEST = 0.1
"""Seconds between two interruptions, at most. Now and then a unit has to have the time to connect."""

CHUNK = 2.0
"""Seconds for which one event loop is used."""

PATIENCE = 30
"""So many units in a row may fail. Then something is broken for good: what has leaked has a lock, for example."""

CAPACITY = int(POOL["size"] + POOL["max_overflow"])

KEPT_BY_TRACEBACKS = ("generator",)
"""Forms whose block stays open as long as the traceback of the interruption is kept, because a generator holds it.

docs/interruptions.md says so.
"""

COMMITTED = (errors.CommitUnconfirmed, errors.HookFailed)
"""Errors which say that the unit is committed."""

NOT_COMMITTED = (
    errors.AbortedByRecovery,
    errors.NotAtomic,
    errors.ReadOnlyViolation,
    errors.TransactionLost,
    errors.UnitOfWorkDoomed,
    errors.UnitOfWorkTimeout,
)
"""Errors which say that nothing is committed."""


class Stuck(BaseException):
    """What isn't interrupted at random did not end in time."""


# ---- signals ---------------------------------------------------------------------------------------------------------


class Gate:
    """A timer whose signals raise an interruption while the gate is open, and are put off while it is shut.

    They are put off, too, where they land in this module's own code: it catches what comes out of units.
    """

    def __init__(self) -> None:
        self.unit: Unit | None = None
        self.longest = SHORT[1]
        self.raised: list[tuple[str, str, list[str]]] = []
        """For each interruption: its unit, its type, and where it landed, the innermost frame first."""
        self.in_loop = 0
        self._open = False
        self._deadline: float | None = None
        self._places: dict[tuple[CodeType, int], str] = {}

    def start(self) -> None:
        signal.signal(signal.SIGALRM, self._ring)
        self._arm(self._interval())

    def stop(self) -> None:
        self.shut()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def open(self, unit: Unit) -> None:
        self.unit = unit
        self._open = True

    def shut(self) -> None:
        self._open = False

    @contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """Raise Stuck if the block takes longer. It isn't interrupted at random."""
        self._open = False
        self._deadline = time.monotonic() + seconds
        self._arm(seconds)
        try:
            yield
        finally:
            self._deadline = None
            self._arm(self._interval())

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            self._arm(max(left, 1.0))  # again, if Stuck is swallowed
            if left <= 0:
                raise Stuck
            return
        if not self._open or self.unit is None or (frame is not None and frame.f_code.co_filename == __file__):
            self._arm(0.0002)
            return
        in_loop = _is_in_loop(frame)
        if in_loop and random.random() > 0.004:
            # asyncio loses wake-ups when its own code is interrupted. Most interruptions are to land in the code of tasks.
            self._arm(random.uniform(0.00005, 0.0005))
            return
        self.in_loop += in_loop
        kind = Alarm if len(self.raised) % 2 else Bell
        self.raised.append((self.unit.name, kind.__name__, self._where(frame)))
        self._arm(self._interval())
        raise kind(f"interruption {len(self.raised)}")

    def _where(self, frame: FrameType | None) -> list[str]:
        """Return the innermost frames, and all those of app_db and of the form."""
        found: list[str] = []
        depth = 0
        while frame is not None and len(found) < 30:
            name = frame.f_code.co_filename
            if depth < 3 or "/app_db/" in name or name.endswith("forms_of_units.py"):
                found.append(self._place(frame.f_code, frame.f_lineno))
            depth += 1
            frame = frame.f_back
        return found

    def _place(self, code: CodeType, line: int) -> str:
        if (code, line) not in self._places:
            name = "/".join(Path(code.co_filename).parts[-2:])
            self._places[code, line] = f"{name}:{line} {code.co_qualname}"
        return self._places[code, line]

    def _interval(self) -> float:
        dice = random.random()
        if dice < 0.1:
            return random.uniform(0.00005, 0.0005)  # into what the last one has set going
        return random.uniform(*SHORT) if dice < 0.8 else random.uniform(0.0002, self.longest)

    def _arm(self, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)


_RUN_ONCE = asyncio.BaseEventLoop._run_once.__code__  # type: ignore[attr-defined]  # it is private


def _is_in_loop(frame: FrameType | None) -> bool:
    """Whether an event loop's own code or a callback is interrupted, and no task's."""
    while frame is not None:
        if frame.f_code is _ATTEMPT:
            return False
        if frame.f_code is _RUN_ONCE:
            return True
        frame = frame.f_back  # of a greenlet's outermost frame: None
    return False


# ---- what is noted ---------------------------------------------------------------------------------------------------


class Notes:
    """The journal, in a file that is there although the process is killed, and what is counted beside it."""

    def __init__(self, path: Path, gate: Gate) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._gate = gate
        self.fruitless = 0
        """How many units have been begun since one was acknowledged."""
        self.fruitless_since = 0
        """How many interruptions there were when one was."""
        self.broken: list[list[str]] = []
        """What was interrupted when no unit came through any more."""
        self.counts: Counter[str] = Counter()
        self.errors: dict[str, dict[str, Any]] = {}
        self.left_current: list[dict[str, Any]] = []
        self.in_the_handler: Counter[str] = Counter()
        self.logged: Counter[str] = Counter()

    def note(self, kind: str, name: str) -> None:
        if kind == "acknowledged":
            self.fruitless = 0
            self.fruitless_since = len(self._gate.raised)
        os.write(self._file, f"{kind}\t{name}\t{len(self._gate.raised)}\n".encode())

    def error(self, error: BaseException, where: str) -> None:
        """Count an error by its type and the head of its message, with one traceback each."""
        head = re.sub(r"0x[0-9a-f]+|\d+", "N", str(error).strip().partition("\n")[0])[:100]
        interrupted = " (while interrupted)" if _was_interrupted(error) else ""
        key = f"{type(error).__name__}: {head}{interrupted}"
        if key not in self.errors:
            lines = "".join(traceback.format_exception(error))
            self.errors[key] = {"count": 0, "first in": where, "last interruption": self.last(), "traceback": lines[-5000:]}
        self.errors[key]["count"] += 1

    def last(self) -> list[str]:
        return self.interruption(-1) if self._gate.raised else []

    def interruption(self, number: int) -> list[str]:
        unit, kind, where = self._gate.raised[number]
        return [f"{kind} in {unit}", *where]

    def nothing_comes_through(self) -> None:
        numbers = range(self.fruitless_since, min(self.fruitless_since + 2, len(self._gate.raised)))
        self.broken += [self.interruption(number) for number in numbers if len(self.broken) < 10]


def _was_interrupted(error: BaseException) -> bool:
    """Whether an error came out of what an interruption had set going."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        if isinstance(current, INTERRUPTIONS):
            return True
        seen.add(id(current))
        waiting += [current.__cause__, current.__context__, *getattr(current, "errors", ())]
    return False


class Counting(logging.Handler):
    """Counts what is logged. It has no lock, which an interruption could leave locked."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def createLock(self) -> None:  # the name is logging's
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        self._counts[f"{record.name}: {str(record.msg)[:80]}"] += 1


# ---- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """Units in a loop, and what has to be done between them. Nothing is interrupted but units."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.gate = Gate()
        self.notes = Notes(Path(plan.directory, "journal"), self.gate)
        self.numbers = count(1)
        self.units: Any = self._open()
        self.began = time.monotonic()
        self.about = Unit("0-none", self.notes)
        """The unit that is run now."""
        self._stale: object | None = None
        self._is_new = False
        self._looked = 0
        self._leaking = 0
        self._leaked_before = 0

    def _open(self) -> Any:
        if self.plan.bare:
            return (BareAwaitedUnits if self.plan.kind == "async" else BareBlockingUnits)(self.plan)
        return (AwaitedUnits if self.plan.kind == "async" else BlockingUnits)(self.plan)

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.began >= self.plan.seconds

    def new_unit(self) -> tuple[Any, Unit]:
        self.notes.fruitless += 1
        form = random.choice(self.units.forms)
        return form, Unit(f"{next(self.numbers)}-{form.__name__}", self.notes)

    def run(self) -> None:
        sys.unraisablehook = self._count_unraisable
        logging.getLogger().addHandler(Counting(self.notes.logged))
        self.prepare()
        gc.collect()
        gc.freeze()  # so that collecting in between takes little time
        self.began = time.monotonic()
        self.gate.start()
        try:
            self.interrupt_units()
        finally:
            self.gate.shut()
            seconds = time.monotonic() - self.began
            self.finish()
            self.gate.stop()
        self.write_summary(seconds)

    def prepare(self) -> None:
        """Do once what is done once: logs are made, modules imported."""
        raise NotImplementedError

    def interrupt_units(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError

    def begin_again(self, unit: Unit) -> Unit:
        """Return another unit, to be begun in the `except` that caught the interruption of one before."""
        self.about = Unit(unit.part("again"), self.notes)
        return self.about

    def refuse(self, error: BaseException) -> None:
        """A unit has raised something that is no interruption."""
        unit = self.about
        if not isinstance(error, (Exception, Stuck, asyncio.CancelledError)):
            raise error  # Ctrl-C
        if isinstance(error, StatementError) and isinstance(error.orig, INTERRUPTIONS):
            self.notes.counts["interruptions that SQLAlchemy has wrapped"] += 1
            return
        self.notes.error(error, unit.name)
        if "locked" in str(error):
            gc.collect()  # on SQLite, what has leaked may hold the lock of the file
        if unit.name.partition("-")[2] in ("separate", "separate_undone", "read_only", "undone"):
            return  # it may be about another unit, or one without a row
        if isinstance(error, COMMITTED):
            unit.acknowledge()
        elif isinstance(error, NOT_COMMITTED):
            unit.never()

    def look_at_current(self, unit: Unit) -> bool:
        """See that no unit is under way, and return whether one has to be ended.

        One that is may go on for one more unit, which shows what that does.
        """
        current = self.units.current()
        if current is None:
            self._stale = None
        elif current is not self._stale:
            self._stale = current
            self.notes.counts["left current"] += 1
            if len(self.notes.left_current) < 5:
                self.notes.left_current.append({"after": unit.name, "last interruption": self.notes.last()})
        else:
            self._stale = None
            return True
        return False

    def look_at_pools(self) -> None:
        """Collect what is unreachable, and begin anew where connections have leaked."""
        gc.collect()
        used = [pool.checkedout() for pool in self.units.pools()]
        self._leaking = sum(used)
        if max(used, default=0) > CAPACITY // 2:
            self.renew("half of a pool leaked")
        elif self.notes.fruitless >= PATIENCE:
            self.notes.nothing_comes_through()
            self.renew("no unit comes through")

    def renew(self, why: str) -> None:
        """Go on with new engines, and a new container."""
        self.notes.counts[f"renewed: {why}"] += 1
        self._leaked_before += self._leaking
        self._leaking = self.notes.fruitless = 0
        self.notes.fruitless_since = len(self.gate.raised)
        self._is_new = True
        self._stale = None
        self.guarded(self.units.close, "closing", 10)
        self.units = self._open()
        self.unlock()

    def unlock(self) -> None:
        """Roll back what SQLite connections have open that are in nobody's hands any more: they would keep the file locked."""
        gc.collect()
        for found in gc.get_objects():
            if type(found) is sqlite3.Connection:
                with suppress(sqlite3.Error):  # it is closed, or another thread's
                    if found.in_transaction:
                        self.notes.counts["SQLite connections left in a transaction"] += 1
                        found.rollback()

    def recover(self) -> None:
        if self.plan.commit == "two-phase":
            self.guarded(self.units.recover, "recovering", 30)

    def guarded(self, do: Callable[[], object], what: str, seconds: float) -> None:
        """Do something that isn't interrupted, and go on if it fails or hangs."""
        try:
            with self.gate.at_most(seconds):
                do()
        except (Exception, Stuck) as error:
            self.notes.error(error, what)
            self.notes.counts[f"failed {what}"] += 1

    def _count_unraisable(self, unraisable: Any) -> None:
        self.notes.counts[f"swallowed outside of any block: {type(unraisable.exc_value).__name__}"] += 1

    def write_summary(self, seconds: float) -> None:
        places: dict[str, int] = {}
        raised = [
            (unit, kind, [places.setdefault(place, len(places)) for place in where]) for unit, kind, where in self.gate.raised
        ]
        summary = {
            "seconds": round(seconds, 1),
            "interrupts": len(raised),
            "interrupts in the loop": self.gate.in_loop,
            "units": next(self.numbers) - 1,
            "left current": self.notes.left_current,
            "no unit comes through": self.notes.broken,
            "leaked": self._leaked_before + self._leaking,
            "current inside the except": dict(self.notes.in_the_handler),
            "counts": dict(self.notes.counts),
            "errors": self.notes.errors,
            "logged": dict(self.notes.logged),
            "longest interval": self.gate.longest,
            "raised": raised,
            "places": list(places),
        }
        Path(self.plan.directory, "summary").write_text(json.dumps(summary))


class BlockingRun(Run):
    def prepare(self) -> None:
        for form in self.units.forms:
            form(Unit(f"{next(self.numbers)}-{form.__name__}", self.notes))

    def interrupt_units(self) -> None:
        while not self.is_over:
            self._is_new = False
            copy_context().run(self.interrupt_units_of_one_container)  # what a container has left there goes with it

    def interrupt_units_of_one_container(self) -> None:
        self.guarded(self.do_once, "beginning", 5)
        while not self.is_over and not self._is_new:
            form, unit = self.new_unit()
            try:
                self.attempt(form, unit)
            except INTERRUPTIONS:  # it came while the last one was caught
                self.gate.shut()
            except BaseException as error:
                self.gate.shut()
                self.refuse(error)
            if self.look_at_current(unit):
                self.guarded(self.units.abort_current, "ending what was left current", 5)
                if self.units.current() is not None:
                    self.renew("left current for good")
            if len(self.gate.raised) >= self._looked + 250:
                self._looked = len(self.gate.raised)
                self.look_at_pools()
                self.recover()
            elif self.notes.fruitless >= PATIENCE:
                self.look_at_pools()

    def do_once(self) -> None:
        """Have engines made, which takes longer than interruptions leave time for. See how long it takes to connect."""
        self.units.block(Unit(f"{next(self.numbers)}-once", self.notes))
        self.units.forget_connections()
        began = time.monotonic()
        self.units.block(Unit(f"{next(self.numbers)}-cold", self.notes))
        self.gate.longest = min(max(self.gate.longest, 2 * (time.monotonic() - began)), LONGEST)

    def attempt(self, form: Callable[[Unit], None], unit: Unit) -> None:
        try:
            self.about = unit
            self.gate.open(unit)
            form(unit)
            self.gate.shut()
        except INTERRUPTIONS as interruption:
            kept = interruption  # as logging and error reporters do
            try:
                if self.units.current() is not None:
                    self.notes.in_the_handler[form.__name__] += 1
                if random.random() < 0.5 and form.__name__ not in KEPT_BY_TRACEBACKS:
                    self.units.block(self.begin_again(unit))
                self.gate.shut()
            finally:
                del kept  # else it is kept by its own traceback, and so is the block of a generator

    def finish(self) -> None:
        self.look_at_pools()
        self.guarded(self.units.close, "closing", 10)


class AwaitedRun(Run):
    _asleep = 0
    """How many tasks of the loop before have lost their wake-up."""

    def prepare(self) -> None:
        async def warm_up() -> None:
            for form in self.units.forms:
                await form(Unit(f"{next(self.numbers)}-{form.__name__}", self.notes))
            await self.units.leave_loop()
            began = time.monotonic()
            await self.units.block(Unit(f"{next(self.numbers)}-cold", self.notes))
            self.gate.longest = min(max(SHORT[1], 2 * (time.monotonic() - began)), LONGEST)
            await self.units.leave_loop()

        asyncio.run(warm_up())

    def interrupt_units(self) -> None:
        while not self.is_over:
            runner = asyncio.Runner()
            try:
                runner.run(self.chunk())
            except INTERRUPTIONS:
                self.gate.shut()
                self.notes.counts["loop_broken"] += 1
            except (Exception, Stuck, asyncio.CancelledError) as error:
                self.gate.shut()
                self.notes.error(error, "the loop")
                self.notes.counts["loop_broken"] += 1
            self.guarded(lambda runner=runner: runner.run(self.leave()), "leaving a loop", 6)  # type: ignore[misc]  # a closure
            if self._asleep:  # close() would wait for these
                runner.get_loop().close()
            else:
                self.guarded(runner.close, "closing a loop", 3)
            self.unlock()
            if self.notes.fruitless >= PATIENCE:
                self.notes.nothing_comes_through()
                self.renew("no unit comes through")
            if len(self.gate.raised) >= self._looked + 250:
                self._looked = len(self.gate.raised)
                self.recover()

    async def chunk(self) -> None:
        """Run units in one loop for a while."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._count_lost)
        try:
            with self.gate.at_most(5):
                await self.units.block(Unit(f"{next(self.numbers)}-once", self.notes))
        except (Exception, Stuck) as error:
            self.notes.error(error, "beginning")
            self.notes.counts["failed beginning"] += 1
            return
        until = time.monotonic() + CHUNK
        while not self.is_over and time.monotonic() < until and self.notes.fruitless < PATIENCE:
            form, unit = self.new_unit()
            try:
                async with asyncio.timeout(2 * CHUNK):  # a wake-up may be lost
                    await self.attempt(form, unit)
            except INTERRUPTIONS:
                self.gate.shut()
            except asyncio.CancelledError:
                self.gate.shut()
                raise
            except BaseException as error:
                self.gate.shut()
                self.refuse(error)
            if form.__name__ in KEPT_BY_TRACEBACKS:
                await self._let_loop_close_generators()
            if self.look_at_current(unit):
                return  # the next task knows nothing of it
            if max((pool.checkedout() for pool in self.units.pools()), default=0) > CAPACITY // 2:
                self.notes.counts["renewed: half of a pool leaked"] += 1
                return

    async def attempt(self, form: Callable[[Unit], Any], unit: Unit) -> None:
        try:
            self.about = unit
            self.gate.open(unit)
            await form(unit)
            self.gate.shut()
        except INTERRUPTIONS as interruption:
            kept = interruption
            try:
                if self.units.current() is not None:
                    self.notes.in_the_handler[form.__name__] += 1
                if random.random() < 0.5 and form.__name__ not in KEPT_BY_TRACEBACKS:
                    await self.units.block(self.begin_again(unit))
                self.gate.shut()
            finally:
                del kept

    async def _let_loop_close_generators(self) -> None:
        """Wait for what closes an asynchronous generator that nothing refers to any more: a task of the event loop."""
        for _ in range(400):
            if self.units.current() is None:
                return
            await asyncio.sleep(0.005)

    def unlock(self) -> None:
        """Close what aiosqlite has open although its loop is over: it may keep the file locked."""
        if not self.plan.on_sqlite:
            return
        gc.collect()
        for found in gc.get_objects():
            if type(found) is aiosqlite.Connection and found._connection is not None:
                self.notes.counts["aiosqlite connections left open"] += 1
                self.guarded(found.stop, "closing a connection", 1)
                found._thread.join(0.5)
                found._connection = None  # its thread may have died before

    async def leave(self) -> None:
        """Cancel what a broken loop has left, count what has leaked, and close the engines."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        broken = bool(tasks)
        for task in tasks:
            task.cancel()
        self._asleep = 0
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=0.5)
            self._asleep = len(pending)
            self.notes.counts["tasks that never wake up"] += len(pending)
            del pending
        del tasks
        gc.collect()
        used = sum(pool.checkedout() for pool in self.units.pools())
        if broken:
            self.notes.counts["slots in use in broken loops"] += used
        else:
            self._leaked_before += used
        async with asyncio.timeout(4):
            await self.units.leave_loop()

    def finish(self) -> None:
        self.guarded(self.units.close, "closing", 10)

    def _count_lost(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.notes.counts[f"the loop: {re.sub('<.*|0x.*', '', str(context.get('message')))[:60]}"] += 1


_ATTEMPT = AwaitedRun.attempt.__code__


def main(path: str, *arguments: str) -> None:
    plan = Plan(**json.loads(Path(path).read_text()))
    if "--recover" in arguments:
        container = plan.container()
        print(container.recovery().settle(grace=0))
        container.shutdown_resources()
        return
    with Path(plan.directory, "stacks").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        (AwaitedRun if plan.kind == "async" else BlockingRun)(plan).run()
    sys.stdout.flush()
    os._exit(0)  # threads of drivers may have been left waiting


if __name__ == "__main__":
    main(*sys.argv[1:])
