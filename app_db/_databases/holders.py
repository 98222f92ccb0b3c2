"""Who holds a connection: which unit of work, since when, the function that began it, and the line that took it."""

from __future__ import annotations

import logging
import threading
import time
import traceback
import weakref
from asyncio import current_task
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from app_db._compat.asyncio import running_loop
from app_db._compat.clocks import monotonic
from app_db._compat.frames import frame_at, frames_of_waiting_greenlets

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

log = logging.getLogger("app_db")

_INSIDE = frozenset(
    (
        "alembic app_db asyncio concurrent contextlib dependency_injector functools greenlet pandas polyfactory pytest_app_db "
        "sqlalchemy sqlalchemy_continuum sqlmodel threading transaction zope"
    ).split()
)
"""Packages whose frames are no lines of the application: they send statements for it."""

_is_inside: dict[Any, bool] = {None: True}
"""By the name of a module, as its code is asked for with each checkout."""


# ---- lines of the application --------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of the application's code. Its text is made only when somebody asks for it."""

    code: CodeType
    instruction: int

    @property
    def number(self) -> int:
        """The number of the line. Finding it takes time, because Python looks through the whole function."""
        found = (line for start, end, line in self.code.co_lines() if start <= self.instruction < end and line is not None)
        return next(found, self.code.co_firstlineno)

    def __str__(self) -> str:
        path = Path(self.code.co_filename)
        with suppress(OSError, ValueError):  # the working directory was deleted, as after a deployment, or is another one
            path = path.relative_to(Path.cwd())
        return f"{path}:{self.number} in {self.code.co_qualname}"


class LineAbove:
    """Finds the line of the application that has led to one place in app_db.

    Most calls come as deep there as the one before. So that depth is looked at first, which makes two frames where a walk makes
    ten: Python makes frames when they are asked for.
    """

    def __init__(self) -> None:
        self._usual_depth = 1
        """How many calls above the last frame was that is not the application's, but was called by it."""

    def __call__(self) -> Line | None:
        """Return the line, or None if no code of the application has led here."""
        try:
            inside = frame_at(self._usual_depth)
        except ValueError:  # it is not called as deep this time
            return self._walk(frame_at(1))
        outside = inside.f_back
        known = _is_inside.get
        if outside is not None and known(inside.f_globals.get("__name__")) and known(outside.f_globals.get("__name__")) is False:
            return Line(outside.f_code, outside.f_lasti)
        return self._walk(frame_at(1))

    def _walk(self, frame: FrameType | None) -> Line | None:
        """Walk up from a frame. In a greenlet of SQLAlchemy, the stack goes on where the coroutine waits for it."""
        depth = 0
        waiting: Iterator[FrameType] | None = None
        while frame is not None:
            if not is_inside(frame):
                if waiting is None:
                    self._usual_depth = max(depth, 1)
                return Line(frame.f_code, frame.f_lasti)
            frame, depth = frame.f_back, depth + 1
            if frame is None:
                waiting = waiting or frames_of_waiting_greenlets()
                frame = next(waiting, None)
        return None


def is_inside(frame: FrameType) -> bool:
    """Return whether a frame is app_db's or of a library underneath, and no line of the application."""
    name: Any = frame.f_globals.get("__name__")
    return _is_inside[name] if name in _is_inside else _note_module(name)


def _note_module(name: str) -> bool:
    _is_inside[name] = inside = name.partition(".")[0] in _INSIDE
    return inside


FIRST = -1
"""Stands for an instruction in the first line of a function."""


def line_of(function: Callable[..., object]) -> Line | None:
    """Return the first line of a function that is written in Python."""
    code = getattr(function, "__code__", None)
    return Line(code, FIRST) if isinstance(code, CodeType) else None


CHECKOUT = "app_db_checkout"
"""Key in the info of a pool's entry. The value is its last checkout."""

# ---- holders ---------------------------------------------------------------------------------------------------------------


class Unit(Protocol):
    """What a holder knows of its unit of work."""

    number: int

    @property
    def begun_at(self) -> Line | None: ...

    def owner(self) -> str: ...


@dataclass(frozen=True)
class Holder:
    """Who holds a connection of a pool at the moment.

    >>> from app_db import Container, DatabaseSettings
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> with container.transaction() as unit:
    ...     connection = container.writer_session().connection()
    ...     [holder] = container.pools()["writer"].holders
    >>> holder.unit == unit.number
    True
    """

    connection: str
    """The name of the connection."""
    seconds: float
    """For how long."""
    unit: int | None
    """The number of the unit of work, as `unit.number`; None for a connection that was taken outside of units."""
    owner: str
    """The thread or the task, as text."""
    begun_at: str | None
    """The line that began the unit, or the function that runs in it."""
    taken_at: str | None
    """The line that took the connection."""
    stack: str | None = None
    """The whole stack above that line, if the pool's `STACKS` is true."""

    def __str__(self) -> str:
        unit = "no unit of work" if self.unit is None else f"unit {self.unit}"
        begun = f", begun at {self.begun_at}" if self.begun_at else ""
        taken = f", taken at {self.taken_at}" if self.taken_at else ""
        return f"{self.connection!r} for {self.seconds:.1f} s by {self.owner}, {unit}{begun}{taken}"


Taken = list[tuple["weakref.ref[PoolProxiedConnection]", bool]]
"""Connections that were taken from their pools, and whether each may be rolled back by any thread."""


class Checkout:
    """A connection that is taken for a unit, or for code outside of units. It refers to what can be spelled later."""

    __slots__ = ("_line", "_owner", "_stack", "_unit", "is_told", "log", "may_be_rolled_back", "record", "since", "taken")
    log: HolderLog
    record: ConnectionPoolEntry

    def __init__(self, unit: Unit | None, taken: Taken | None, may_be_rolled_back: bool, line: Line | None) -> None:
        # A weak reference: a unit that is dropped gives its connections back by that.
        self._unit = None if unit is None else weakref.ref(unit)
        self.taken = taken
        """Where the unit notes the connection."""
        self.may_be_rolled_back = may_be_rolled_back
        self._line = line
        self._owner: str | None = None
        self._stack: str | None = None
        self.since = 0.0
        self.is_told = False
        """Whether a warning was logged because it is held for so long."""

    def note_owner(self) -> None:
        """Note the calling thread or task, which has no unit of work."""
        task = None if running_loop() is None else current_task()
        self._owner = f"thread {threading.current_thread().name!r}" if task is None else f"task {task.get_name()!r}"

    def note_stack(self, frame: FrameType) -> None:
        """Note all that has called the function of a frame."""
        stacks = [traceback.format_stack(each) for each in (frame, *frames_of_waiting_greenlets())]
        self._stack = "".join(chain.from_iterable(reversed(stacks)))

    @property
    def unit_number(self) -> int | None:
        """The number of the unit that uses the connection, if one does."""
        unit = None if self._unit is None else self._unit()
        return None if unit is None else unit.number

    @property
    def begun_at(self) -> Line | None:
        """Where the unit was begun that uses the connection, if one does."""
        unit = None if self._unit is None else self._unit()
        return None if unit is None else unit.begun_at

    def holder(self) -> Holder:
        """Return what is known, in words."""
        unit = None if self._unit is None else self._unit()
        return Holder(
            self.log.name,
            monotonic() - self.since,
            None if unit is None else unit.number,
            self._owner or (unit.owner() if unit is not None else "a unit that was dropped"),
            None if unit is None or unit.begun_at is None else str(unit.begun_at),
            None if self._line is None else str(self._line),
            self._stack,
        )


# ---- the connections of one engine -------------------------------------------------------------------------------------------

holder_logs: weakref.WeakSet[HolderLog] = weakref.WeakSet()
"""The logs of all engines."""

SHOWN = 8
"""How many holders the error of a full pool names: those that have held their connections for longest."""


_line_outside_units = LineAbove()


class HolderLog:
    """The connections of an engine that are in use, and a warning for those that are held too long."""

    def __init__(self, name: str, *, warns_after: float | None, keeps_stacks: bool) -> None:
        self.name = name
        self.warns_after = warns_after
        self.keeps_stacks = keeps_stacks
        self._checkouts: dict[int, Checkout] = {}
        self._warner = None if warns_after is None else Warner(self, warns_after)
        holder_logs.add(self)

    def note(self, record: ConnectionPoolEntry, checkout: Checkout | None) -> None:
        """Note that a connection was taken. Code outside of units has noted nothing before, and is looked for here."""
        if checkout is None:
            checkout = Checkout(None, None, False, _line_outside_units())
            checkout.note_owner()
        checkout.log, checkout.record, checkout.since = self, record, monotonic()
        self._checkouts[id(record)] = record.info[CHECKOUT] = checkout
        if self.keeps_stacks:
            checkout.note_stack(frame_at(1))
        if self._warner is not None:
            self._warner.ensure()

    def forget(self, record: ConnectionPoolEntry) -> None:
        """Note that a connection is no longer in use."""
        checkout = self._checkouts.pop(id(record), None)
        if checkout is not None and checkout.is_told:
            holder = checkout.holder()
            log.warning("Given back: %s", holder, extra=_names(holder))

    def forget_parents(self) -> list[ConnectionPoolEntry]:
        """Forget everything, in a forked child. Return the pool's entries of connections that are in use in its parent."""
        records = [checkout.record for checkout in self._checkouts.values()]
        self._checkouts = {}
        return records

    def holders(self) -> tuple[Holder, ...]:
        """Return who holds connections, from the longest on."""
        found = sorted(self._checkouts.copy().values(), key=lambda checkout: checkout.since)
        return tuple(checkout.holder() for checkout in found)

    def shown(self) -> str:
        """Return the lines for an error that says that all connections are in use."""
        holders = self.holders()
        lines = [f"\n  {holder}" for holder in islice(holders, SHOWN)]
        if len(holders) > SHOWN:
            lines.append(f"\n  and {len(holders) - SHOWN} more")
        return "".join(lines)

    def warn(self) -> bool:
        """Log each connection once that is held too long. Return whether any is in use."""
        checkouts = list(self._checkouts.copy().values())
        latest = monotonic() - (self.warns_after or 0.0)
        for checkout in checkouts:
            if checkout.since <= latest and not checkout.is_told:
                checkout.is_told = True
                holder = checkout.holder()
                log.warning("Held too long: %s", holder, extra=_names(holder))
        return bool(checkouts)


def _names(holder: Holder) -> Mapping[str, object]:
    return {"connection": holder.connection, "unit": holder.unit}


class Held(Protocol):
    """What a thread looks at."""

    def warn(self) -> bool:
        """Log what is held too long. Return whether anything is held."""
        ...


class Warner:
    """A thread that has others look for what is held too long. It runs while anything is held."""

    def __init__(self, held: Held, seconds: float) -> None:
        self._held = weakref.ref(held)
        self._pause = min(seconds / 4, _LONGEST_PAUSE)
        self._thread: threading.Thread | None = None

    def ensure(self) -> None:
        """Start the thread if it does not run."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="app_db-held", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        idle = 0
        while idle < _IDLE_LOOKS:
            time.sleep(self._pause)
            held = self._held()
            if held is None:
                return  # its engine is gone
            idle = 0 if held.warn() else idle + 1
            del held


_LONGEST_PAUSE = 1.0
"""Seconds between two looks at what is in use."""

_IDLE_LOOKS = 20
"""After so many looks at nothing the thread ends, and is started again when there is something."""
