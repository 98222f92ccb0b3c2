"""The benchmarks run, and what they print can be trusted: how they choose rounds, count functions,
and check the contestants.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

from harness.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
NAMES = (
    "units",
    "async_units",
    "threads",
    "readers",
    "routing",
    "two_phase",
    "isolation",
    "isolated_tests",
    "fresh",
    "imports",
    "building",
    "holders",
    "web",
)
TABLES = {"units": 4, "async_units": 6, "building": 2, "web": 4}
"""How many tables a benchmark prints at least; one if it isn't named here. MariaDB adds one where
it is installed.
"""

RATIO = re.compile(r"\d+\.\d\d( \(\d+\.\d\d–\d+\.\d\d\))?( of at most \d\.\d\d)?( \*\*!\*\*)?")  # noqa: RUF001  # a range
QUANTITY = re.compile(r"[\d,.]+ (µs|ms|KiB)")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """`benchmark("measuring")` imports a module of the benchmarks, which is forgotten after the
    test.
    """
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


# ---- all of them run -----------------------------------------------------------------------------


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cells_of(line: str) -> list[str]:
    return line.removeprefix("| ").removesuffix(" |").split(" | ")


def check_tables(printed: str, *, at_least: int) -> list[list[list[str]]]:
    """Check the form of every table, and return the cells of their lines."""
    tables: list[list[list[str]]] = []
    for table in printed.split("\n### ")[1:]:
        title, _, head, rule, *lines = table.rstrip().splitlines()
        assert lines, title
        assert set(rule) == set("| -"), title
        tables.append([cells_of(line) for line in lines])
        for what, baseline, ratio, *others in tables[-1]:
            assert 3 + len(others) == len(cells_of(head)), what
            assert QUANTITY.fullmatch(baseline), what
            assert RATIO.fullmatch(ratio), what
    assert len(tables) >= at_least
    return tables


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "units"])
def test_a_benchmark_prints_whole_tables(name: str, postgres: object) -> None:
    """`postgres` is asked for only so that this is skipped where PostgreSQL is missing."""
    check_tables(run(name), at_least=TABLES.get(name, 1))


@pytest.mark.exhaustive
def test_units_print_whole_tables_and_count_functions(postgres: object) -> None:
    """An INSERT calls more of app_db than a SELECT, and a SELECT more than a unit that leaves its
    session alone.
    """
    for table in check_tables(run("units"), at_least=TABLES["units"]):
        called = {title: [int(count) for count in counts.split(" and ")] for title, *_, counts in table}
        select, insert, untouched = called["SELECT by key, writer"], called["INSERT"], called["session not used"]
        for fewer, more in ((untouched, select), (select, insert)):
            assert [0, 0] < fewer < more
        assert all(block <= decorated for block, decorated in called.values())


def test_an_unknown_benchmark_is_refused_with_the_names_that_there_are() -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "unit"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no benchmark is called unit; there are units, async_units" in done.stderr


def test_the_names_are_those_of_the_runner(benchmark: Callable[[str], Any]) -> None:
    assert benchmark("run").NAMES == NAMES


# ---- the measuring -------------------------------------------------------------------------------


@pytest.mark.parametrize("disturbed", ["bare", "other"])
def test_the_quieter_rounds_are_kept_by_their_whole_time(disturbed: str, benchmark: Callable[[str], Any]) -> None:
    """Three rounds of ten are disturbed, while one of the contestants is measured."""
    measuring = benchmark("measuring")
    undisturbed = {"bare": 1.0, "other": 1.5}
    times = {name: [seconds] * 10 for name, seconds in undisturbed.items()}
    times[disturbed][4:7] = [9.0] * 3
    left = {name: iter(seconds) for name, seconds in times.items()}
    batches = {name: lambda units, name=name: units * next(left[name]) for name in left}
    measured = measuring.measure(batches, measuring.Effort(), rounds=10, units=2)
    assert measured["other"] == measuring.Measured(seconds=1.5, low=1.5, ratio=1.5, high=1.5)
    assert measured["bare"] == measuring.Measured(seconds=1.0, low=1.0, ratio=1.0, high=1.0)


def test_a_ratio_is_to_the_first_contestant_in_the_same_round(benchmark: Callable[[str], Any]) -> None:
    """The machine is twice as slow in every second round, which changes no ratio."""
    measuring = benchmark("measuring")
    bare, other = iter([1.0, 2.0] * 5), iter([1.2, 2.4] * 5)
    batches = {"bare": lambda units: next(bare), "other": lambda units: next(other)}
    measured = measuring.measure(batches, measuring.Effort(), rounds=10, units=1)["other"]
    assert (measured.low, measured.ratio, measured.high) == pytest.approx((1.2, 1.2, 1.2))


def test_the_order_is_reshuffled_for_each_round(benchmark: Callable[[str], Any]) -> None:
    measuring = benchmark("measuring")
    order: list[str] = []

    def batch(name: str) -> Callable[[int], float]:
        def noted(units: int) -> float:
            order.append(name)
            return 1.0

        return noted

    names = "abcd"
    measuring.measure({name: batch(name) for name in names}, measuring.Effort(), rounds=50, units=1)
    rounds = ["".join(order[start : start + 4]) for start in range(0, len(order), 4)]
    assert len(rounds) == 50
    assert all(sorted(one) == sorted(names) for one in rounds)
    assert len(set(rounds)) > 10
    assert {one[0] for one in rounds} == set(names)


def rounds_of_slow_units(measuring: Any, *, rounds_asked_for: int | None) -> int:
    """Measure a contestant for which each batch is late, and return its number of rounds."""
    batches: list[int] = []

    def batch(units: int) -> float:
        batches.append(units)
        return 1.0

    measuring.measure({"bare": batch}, measuring.Effort(rounds=rounds_asked_for), rounds=100, units=1)
    return len(batches)


def test_slow_units_have_fewer_rounds_unless_a_number_is_asked_for(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = benchmark("measuring")
    assert rounds_of_slow_units(measuring, rounds_asked_for=None) == 100
    monkeypatch.setattr(measuring, "LONGEST", 0.0)
    assert rounds_of_slow_units(measuring, rounds_asked_for=None) == measuring.FEWEST
    assert rounds_of_slow_units(measuring, rounds_asked_for=50) == 50


# ---- the count of functions ----------------------------------------------------------------------


def test_a_function_of_app_db_is_counted_once_however_often_it_is_resumed(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = benchmark("measuring")
    monkeypatch.setattr(measuring, "PACKAGE", __file__)

    async def slow(pauses: int) -> None:
        for _ in range(pauses):
            await asyncio.sleep(0)

    def call() -> None:
        asyncio.run(slow(5))

    assert measuring.functions_called(call) == 2  # `call` and `slow`


def test_other_libraries_functions_are_not_counted(benchmark: Callable[[str], Any]) -> None:
    assert benchmark("measuring").functions_called(lambda: re.compile("a|b|c{3}")) == 0


# ---- the check of the contestants ----------------------------------------------------------------


def test_a_contestant_that_loses_rows_is_found_out(benchmark: Callable[[str], Any]) -> None:
    contestants, workloads, measuring = (benchmark(name) for name in ("contestants", "workloads", "measuring"))

    def losing(workload: Any) -> Callable[[], Any]:
        return (lambda: (7, 0)) if workload is workloads.TALLY else (lambda: None)

    with pytest.raises(AssertionError, match=r"INSERT, bare: 12 units added \(0, 0\) \(rows, counts\), not \(12, 0\)"):
        contestants.checked_units("bare", losing, workloads.INSERT, measuring.Effort())
