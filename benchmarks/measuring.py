"""Two ways of doing the same thing, measured in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Seconds a call of each, and the median of the ratios of neighbouring rounds."""

    ours: float
    bare: float
    ratio: float


def compare(
    ours: Callable[[], object],
    bare: Callable[[], object],
    *,
    calls: int,
    rounds: int = 15,
    before_round: Callable[[], object] = lambda: None,
) -> Comparison:
    """Call both in turns: `rounds` times `calls` of the one, then of the other, the first to go alternating."""
    pairs: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        before_round()
        if number % 2:
            bare_seconds = _seconds(bare, calls)
            pairs.append((_seconds(ours, calls), bare_seconds))
        else:
            pairs.append((_seconds(ours, calls), _seconds(bare, calls)))
    del pairs[0]  # the warming up
    return Comparison(
        statistics.median(one for one, _ in pairs),
        statistics.median(other for _, other in pairs),
        statistics.median(one / other for one, other in pairs),
    )


def _seconds(function: Callable[[], object], calls: int) -> float:
    gc.collect()
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def report(what: str, *, ours: str, bare: str, ratio: float, at_most: float | None = None, at_least: float | None = None) -> None:
    """Print one line, with a mark where the ratio is on the wrong side of its floor."""
    floor = f"≤ {at_most:.2f}" if at_most is not None else f"≥ {at_least:.2f}" if at_least is not None else ""
    missed = (at_most is not None and ratio > at_most) or (at_least is not None and ratio < at_least)
    print(f"{what:<44} {ours:>12} {bare:>12} {ratio:>7.2f}  {floor:<8}{'!' if missed else ''}".rstrip())


def heading(title: str, unit: str) -> None:
    """Print the title of a table."""
    print(f"\n{title:<44} {'app_db':>12} {'bare':>12} {'ratio':>7}  floor\n{'':<44} {unit:>12} {unit:>12}")
