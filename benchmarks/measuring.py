"""Several ways of doing the same thing, measured in turns in one process, and the functions of
app_db that they call.

A round is one short batch of each contestant, in an order that is reshuffled for each round.
Whatever disturbs the machine makes a round longer, whichever contestant it hits, so the rounds are
sorted by their whole time and the quieter 70 % are kept. A contestant's figure is its ratio to the
first contestant in the same round.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import app_db

KEPT = 0.7
BATCH = 0.003
LONGEST = 6.0
"""Seconds after which no further round begins, if there were FEWEST: units of tens of milliseconds, or
a busy machine. A number of rounds on the command line is kept.
"""

FEWEST = 20

WARM_UP = 12
"""Units of each contestant before its first round. psycopg prepares a statement when it has been
sent five times.
"""

PACKAGE = str(Path(app_db.__file__).parent) + os.sep

Batch = Callable[[int], float]
"""Does so many units, and returns the seconds that they took together."""


@dataclass(frozen=True)
class Effort:
    """How long to measure. The default lets each benchmark choose its own number of rounds."""

    rounds: int | None = None
    quick: bool = False

    def rounds_of(self, usual: int) -> int:
        """Return the number of rounds of a benchmark that usually has `usual`."""
        return self.rounds or (2 if self.quick else usual)


@dataclass(frozen=True)
class Measured:
    """The median of the seconds of a unit; the median and quartiles of the ratio to the first
    contestant.
    """

    seconds: float
    low: float
    ratio: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f}–{self.high:.2f})"  # noqa: RUF001  # a range


# ---- rounds --------------------------------------------------------------------------------------


def measure(
    batches: Mapping[str, Batch], effort: Effort, *, rounds: int, seconds: float = BATCH, units: int | None = None
) -> dict[str, Measured]:
    """Measure all contestants against the first one.

    A batch has `units` units, or as many as the first contestant does in `seconds`. Contestants
    should have warmed up.
    """
    names = list(batches)
    size = units or (1 if effort.quick else _units_in(seconds, batches[names[0]]))
    order = random.Random(1)
    taken: list[dict[str, float]] = []
    gc.collect()
    gc.freeze()  # what is there now stays, and need not be looked at before each batch
    late = time.monotonic() + LONGEST
    for number in range(effort.rounds_of(rounds)):
        if effort.rounds is None and number >= FEWEST and time.monotonic() > late:
            break
        order.shuffle(names)
        taken.append({name: _seconds(batches[name], size) for name in names})
    return _summary(list(batches), _quieter(taken))


def _units_in(seconds: float, batch: Batch) -> int:
    fastest = min(batch(2) / 2 for _ in range(5))
    return max(1, round(seconds / fastest))


def _seconds(batch: Batch, units: int) -> float:
    gc.collect()  # a batch pays for its own garbage only
    return batch(units) / units


def _quieter(taken: list[dict[str, float]]) -> list[dict[str, float]]:
    by_time = sorted(taken, key=lambda times: sum(times.values()))
    return by_time[: max(2, math.ceil(len(by_time) * KEPT))]


def _summary(names: list[str], kept: list[dict[str, float]]) -> dict[str, Measured]:
    summary: dict[str, Measured] = {}
    for name in names:
        ratios = [times[name] / times[names[0]] for times in kept]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        summary[name] = Measured(statistics.median(times[name] for times in kept), low, ratio, high)
    return summary


def repeated(unit: Callable[[], object]) -> Batch:
    """Return what does a unit again and again in this thread."""

    def batch(units: int) -> float:
        began = time.perf_counter()
        for _ in range(units):
            unit()
        return time.perf_counter() - began

    return batch


def functions_called(function: Callable[[], object]) -> int:
    """Return how many functions of app_db a call runs in this thread. It is the same on every
    machine.
    """
    called = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal called
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and not _is_resumed(frame):
            called += 1

    before = sys.getprofile()
    gc.disable()  # it may call finalizers
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
        gc.enable()
    return called


def _is_resumed(frame: FrameType) -> bool:
    """Return whether a coroutine or generator goes on after an `await` or `yield`, which is a
    "call", too.

    How often a coroutine is resumed depends on how fast the server answers. The argument of RESUME
    says where it stands: 0 is the beginning of a function.
    """
    return frame.f_code.co_code[frame.f_lasti + 1] & 3 != 0


# ---- the machine ---------------------------------------------------------------------------------


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []


_ALL_CORES = _cores()


def pinning() -> str:
    """Say in words what runs where."""
    if not _ALL_CORES:
        return "not pinned to cores"
    return "client and servers on a core each" if len(_ALL_CORES) > 1 else "client and servers on one core"


def pin_client() -> None:
    """Stay on one core from now on. Threads and processes that begin later stay there as well."""
    if _ALL_CORES:
        os.sched_setaffinity(0, {_ALL_CORES[-1]})


@contextmanager
def on_server_core() -> Iterator[None]:
    """Start servers in this block: they inherit the core, which is another one than the client's if
    there are two.
    """
    if not _ALL_CORES:
        yield
        return
    os.sched_setaffinity(0, {_ALL_CORES[0]})
    try:
        yield
    finally:
        pin_client()
