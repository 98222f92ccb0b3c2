"""Units of many tasks and threads at once, while signals interrupt the main thread: which rows are there afterwards is exact.

A fifth of the units raise. A signal's handler raises an exception wherever a unit of the main thread is at that moment.

- A unit that returned is committed.
- A unit that raised its own error is not committed.
- A unit that was interrupted is committed or not: the interruption may have come after the COMMIT was sent.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from greenlet import getcurrent  # type: ignore[import-untyped]  # it has no type hints
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection
from sqlalchemy.exc import DBAPIError

from harness.applications import Boom
from harness.choosing import turns
from harness.coroutines import AwaitedDatabases, opened_awaited
from harness.items import Databases, opened
from harness.servers import PostgresServer

INTERVAL = (0.002, 0.010)
"""Seconds between two signals."""


@pytest.fixture(autouse=True)
def free_logging() -> Iterator[None]:
    """Release the lock of the module logging, which an interruption inside it leaves to this thread for ever."""
    yield
    with suppress(RuntimeError):
        while True:
            logging._lock.release()  # type: ignore[attr-defined]  # it is private


class Interrupted(Exception):
    """From outside, as an ordinary error."""


class InterruptedHard(BaseException):
    """From outside, as an error that `except Exception` does not catch."""


INTERRUPTIONS = (Interrupted, InterruptedHard)

ASYNCIO = (str(Path(asyncio.__file__).parent), str(Path(asyncio.__file__).parent.parent / "selectors.py"))


class Tally:
    """What became of the units, by their names."""

    def __init__(self) -> None:
        self.returned: set[str] = set()
        self.raised: set[str] = set()
        """Units that raised their own error, or were about to."""
        self.interrupted: set[str] = set()
        self.collateral: list[str] = []
        """Units whose connection another unit's interruption has closed. They count as interrupted."""
        self.wrong: list[str] = []

    def check(self, rows: set[str]) -> None:
        assert self.wrong == []
        assert self.returned - rows == set(), "a unit returned, and its row is not there"
        assert rows & self.raised == set(), "a unit raised, and its row is there"
        assert rows - self.returned <= self.interrupted, "a row is there of a unit that did not return"


class Alarms:
    """A timer whose signals raise exceptions in the units of the main thread, and nowhere else."""

    def __init__(self, unit: CodeType, tally: Tally) -> None:
        self._unit = unit
        self._tally = tally
        self.rung = 0
        self.raised = 0
        self._returned = 0
        self._in_a_row = 0

    @contextmanager
    def ringing(self) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, self._ring)
        self._arm()
        try:
            yield
        finally:
            # First the handler goes: it sets the timer again. The default one, which is `before`, would end the process.
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _is_fruitless(self) -> bool:
        """Return whether ten interruptions in a row let no unit return: on a slow machine none ever would."""
        returned = len(self._tally.returned)
        if returned > self._returned:
            self._returned, self._in_a_row = returned, 0
        self._in_a_row += 1
        return self._in_a_row > 10

    def _arm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(*INTERVAL))

    def _ring(self, number: int, frame: FrameType | None) -> None:
        self._arm()
        self.rung += 1
        unit = self._unit_of(frame)
        if unit is not None and not self._is_fruitless():
            self._tally.interrupted.add(unit.f_locals["name"])
            self.raised += 1
            raise INTERRUPTIONS[self.raised % 2]

    def _unit_of(self, frame: FrameType | None) -> FrameType | None:
        """Return the frame of the unit that a signal has interrupted, if it has interrupted one."""
        greenlet: Any = getcurrent()
        while True:
            while frame is not None:
                if frame.f_code is self._unit:
                    return frame
                if frame.f_code.co_filename.startswith(ASYNCIO):
                    return None  # asyncio loses wake-ups when its own code is interrupted
                frame = frame.f_back
            greenlet = greenlet.parent  # SQLAlchemy runs its blocking code in a greenlet, which has frames of its own
            if greenlet is None:
                return None
            frame = greenlet.gr_frame


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is interrupted logs, and its destructors print: a lock of logging's would stay locked for the other threads."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    logging.disable(logging.CRITICAL)
    yield
    gc.collect()  # sockets that asyncio has lost warn when they go, and fail a later test otherwise
    logging.disable(logging.NOTSET)


# An interruption in a pool of SQLAlchemy's may lose a place in it, so that what is interrupted must not wait for one.
NO_POOL = {"class": "null"}
NO_WAITING = {"size": 200, "max_overflow": -1}


# ---- threads ----------------------------------------------------------------------------------------------------------


class Threads:
    """Threads that run units, and the main thread, which runs units of its own meanwhile and is interrupted."""

    def __init__(self, databases: Databases, threads: int, units: int) -> None:
        self._databases = databases
        self._threads = threads
        self._units = units
        self.tally, self.tally_of_main = Tally(), Tally()
        self.alarms = Alarms(Threads._unit_of_main.__code__, self.tally_of_main)

    def run(self) -> None:
        self._unit_of_main("warm")  # what is made once is made
        self.tally_of_main.returned.add("warm")
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(self._threads)]
        for thread in threads:
            thread.start()
        numbers = count()
        with self.alarms.ringing():
            while any(thread.is_alive() for thread in threads):
                self._try(f"main-{next(numbers)}", self._unit_of_main, self.tally_of_main)
        for thread in threads:
            thread.join()

    def _work(self, number: int) -> None:
        for unit in range(self._units):
            self._try(f"{number}-{unit}", self._unit, self.tally)

    def _try(self, name: str, unit: Callable[[str], None], tally: Tally) -> None:
        try:
            unit(name)
        except Boom:
            pass
        except BaseException as error:
            if name not in tally.interrupted:
                tally.wrong.append(f"{name}: {error!r}")
        else:
            tally.returned.add(name)
        if self._databases.container.transaction_manager().current() is not None:
            tally.wrong.append(f"{name}: a unit is current afterwards")

    def _unit(self, name: str) -> None:
        with self._databases.container.transaction():
            self._databases.add(name)
            if _fails(name):
                self.tally.raised.add(name)
                raise Boom

    def _unit_of_main(self, name: str) -> None:
        with self._databases.container.transaction():
            self._databases.add(name, "main")
            if _fails(name):
                self.tally_of_main.raised.add(name)
                raise Boom


def _fails(name: str) -> bool:
    """Whether a unit is one of the fifth that raise."""
    return name.rpartition("-")[2].isdigit() and int(name.rpartition("-")[2]) % 5 == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(900, method="thread")  # the other method uses the same timer
@pytest.mark.parametrize(
    ("threads", "units"), [pytest.param(8, 50, id="short"), pytest.param(32, 200, id="long", marks=pytest.mark.exhaustive)]
)
def test_threads_leave_exactly_the_rows_of_their_units(
    postgres: PostgresServer, new_postgres_url: Callable[[], str], threads: int, units: int
) -> None:
    urls = {"writer": new_postgres_url(), "main": new_postgres_url()}
    settings: dict[str, Any] = {"writer": {"pool": {"size": 16, "max_overflow": 16, "timeout": 60}}, "main": {"pool": NO_POOL}}
    with opened(urls, settings=settings) as databases:
        run = Threads(databases, threads, units)
        run.run()
        rows, rows_of_main = set(databases.items()), set(databases.items("main"))
        run.tally.check(rows)
        run.tally_of_main.check(rows_of_main)
        assert run.tally.interrupted == set()
        assert len(rows) == threads * units * 4 // 5
        assert run.alarms.raised > 5
        assert len(run.tally_of_main.returned) > 1
        assert databases.checked_out() == 0
        with databases.container.transaction():
            databases.add("afterwards")
            databases.add("afterwards", "main")


# ---- tasks ------------------------------------------------------------------------------------------------------------


class Tasks:
    """Tasks that run units, all of which are interrupted."""

    def __init__(self, databases: AwaitedDatabases, tasks: int, units: int) -> None:
        self._databases = databases
        self._tasks = tasks
        self._units = units
        self.tally = Tally()
        self.alarms = Alarms(Tasks._unit.__code__, self.tally)

    async def run(self) -> None:
        await self._unit("warm")
        self.tally.returned.add("warm")
        with self.alarms.ringing():
            await asyncio.gather(*(self._work(number) for number in range(self._tasks)))

    async def _work(self, number: int) -> None:
        for unit in range(self._units):
            await self._try(f"{number}-{unit}")

    async def _try(self, name: str) -> None:
        try:
            await self._unit(name)
        except Boom:
            pass
        except (ConnectionError, DBAPIError) as error:
            # An interruption while asyncpg connects may leave a socket to the garbage collector, which closes it when another
            # connection has its number already.
            self._note_collateral(name, error)
        except asyncio.CancelledError as error:
            if _is_connecting(error):
                self._note_collateral(name, error)
            else:
                self._note_wrong(name, error)
        except BaseException as error:
            self._note_wrong(name, error)
        else:
            self.tally.returned.add(name)
        if self._databases.container.transaction_manager().current() is not None:
            self.tally.wrong.append(f"{name}: a unit is current afterwards")

    def _note_collateral(self, name: str, error: BaseException) -> None:
        if name not in self.tally.interrupted:
            self.tally.interrupted.add(name)
            self.tally.collateral.append(f"{name}: {error!r}")

    def _note_wrong(self, name: str, error: BaseException) -> None:
        if name not in self.tally.interrupted:
            self.tally.wrong.append(f"{name}: {''.join(traceback.format_exception(error))}")

    async def _unit(self, name: str) -> None:
        async with self._databases.container.transaction():
            await self._databases.write(name)
            if _fails(name):
                self.tally.raised.add(name)
                raise Boom


def _is_connecting(error: BaseException) -> bool:
    """Return whether an exception came out of asyncpg's connect, and no task was cancelled."""
    task = asyncio.current_task()
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return task is not None and task.cancelling() == 0 and any(file.endswith("connect_utils.py") for file in files)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(900, method="thread")
@pytest.mark.parametrize(
    ("tasks", "units"), [pytest.param(10, 10, id="short"), pytest.param(200, turns(100), id="long", marks=pytest.mark.exhaustive)]
)
def test_tasks_leave_exactly_the_rows_of_their_units(new_postgres: Callable[..., PostgresServer], tasks: int, units: int) -> None:
    server = new_postgres(settings={"max_connections": 500, "authentication_timeout": "60s"})
    server.create_database("exact")
    with opened_awaited(server.url("exact"), "asyncpg", each={"pool": NO_WAITING}) as databases:
        run = Tasks(databases, tasks, units)
        asyncio.run(_supervised(databases, run))
        rows = set(databases.items())
        run.tally.check(rows)
        assert run.alarms.raised > 5
        assert len(run.tally.collateral) <= max(1, tasks * units // 100), run.tally.collateral
        uninterrupted = {f"{task}-{unit}" for task in range(tasks) for unit in range(units)} - run.tally.interrupted
        assert {name for name in uninterrupted if not _fails(name)} <= rows
        with databases.container.transaction():
            databases.add("afterwards")


async def _supervised(databases: AwaitedDatabases, run: Tasks) -> None:
    try:
        await run.run()
        async with databases.container.transaction():
            await databases.write("in the same loop")
        run.tally.returned.add("in the same loop")
    finally:
        disposal = databases.container.shutdown_resources()
        if disposal is not None:
            await disposal


# ---- what an interruption leaves behind on a connection ---------------------------------------------------------------

ONE_CONNECTION = {"size": 1, "max_overflow": 0, "timeout": 5}


@pytest.mark.parametrize("is_begun", [True, False], ids=["after BEGIN", "before BEGIN was answered"])
async def test_a_unit_that_is_interrupted_as_asyncpg_begins_takes_nothing_from_the_next(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, is_begun: bool
) -> None:
    """SQLAlchemy's adapter knows of no transaction then. The next unit would begin a savepoint, and commit only that."""
    begin: Any = AsyncAdapt_asyncpg_connection._start_transaction
    interruptions: list[Interrupted] = []

    async def interrupted_begin(connection: Any) -> None:
        if not interruptions:
            await begin(connection)
        elif is_begun:
            await connection._connection.transaction().start()
            raise interruptions.pop()
        else:
            connection._connection._top_xact = connection._connection.transaction()
            raise interruptions.pop()

    monkeypatch.setattr(AsyncAdapt_asyncpg_connection, "_start_transaction", interrupted_begin)

    async with opened_awaited(postgres_url, "asyncpg", each={"pool": ONE_CONNECTION}) as databases:

        async def unit(name: str) -> None:
            async with databases.container.transaction():
                await databases.say(f"INSERT INTO item (name, amount) VALUES ('{name}', 0)")

        await unit("first")
        interruptions.append(Interrupted())
        with pytest.raises(Interrupted):
            await unit("interrupted")
        await unit("next")
        assert databases.items() == ["first", "next"]
        await unit("last")
        assert databases.items() == ["first", "last", "next"]


async def test_a_connection_whose_lock_an_interruption_left_locked_is_not_used_again(postgres_url: str) -> None:
    """The next statement on it would wait without an end."""
    async with opened_awaited(postgres_url, "asyncpg", each={"pool": ONE_CONNECTION}) as databases:
        with pytest.raises(Interrupted):
            async with databases.container.transaction():
                await databases.write("interrupted")
                connection = await databases.awaited_session().connection()
                adapter: Any = (await connection.get_raw_connection()).dbapi_connection
                await adapter._execute_mutex.acquire()
                raise Interrupted
        async with asyncio.timeout(10), databases.container.transaction():
            await databases.write("next")
        assert databases.items() == ["next"]
