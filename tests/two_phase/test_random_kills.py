"""Processes that commit over two PostgreSQL clusters are killed at random, and nothing is wrong afterwards.

The same for longer is `python tests/random_kills.py --kills 1000`.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from harness.paths import TESTS, run_python
from harness.servers import available


def run(*arguments: str) -> dict[str, Any]:
    """Run the program and return what it has seen. It forks, which pytest should not do."""
    seen: dict[str, Any] = json.loads(run_python(str(TESTS / "random_kills.py"), *arguments).stdout)
    return seen


@pytest.fixture(autouse=True)
def _needs_postgresql(postgres: object) -> None:
    """Skip or fail as all tests do that need it."""
    assert "not found" not in available()["postgresql"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "arguments",
    [
        ("--kills", "80"),
        ("--kills", "30", "--log", "file", "--recoveries", "2", "--grace", "0"),
        ("--kills", "25", "--restarts", "5"),
    ],
    ids=" ".join,
)
def test_nothing_is_wrong_after_random_kills_with_recovery_running(arguments: tuple[str, ...]) -> None:
    seen = run(*arguments)
    assert set(seen["wrong"].values()) == {0}, seen
    assert seen["acknowledged"] > seen["kills"], seen


@pytest.mark.exhaustive
def test_recoveries_that_take_the_living_for_dead_never_roll_back_what_somebody_commits() -> None:
    seen = run("--seconds", "5", "--recoveries", "2", "--grace", "0", "--log", "file")
    assert set(seen["wrong"].values()) == {0}, seen
    assert seen["acknowledged"] > 0, seen
    assert seen["refused"].get("AbortedByRecovery", 0) > 0, "they never met"


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_without_recovery_the_same_leaves_something_wrong() -> None:
    wrong: Counter[str] = Counter()
    for _ in range(5):  # a kill meets the moments that matter by chance
        wrong.update(run("--kills", "60", "--without-recovery")["wrong"])
        if wrong["prepared or locked"] and wrong["divergences"]:
            return
    pytest.fail(f"kills at random have shown nothing: {dict(wrong)}")
