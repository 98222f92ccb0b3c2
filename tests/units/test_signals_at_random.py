"""Signals interrupt units of work at random times, and nothing is wrong afterwards.

The same for each database, driver and way to commit is a part of test_soak.py; `make soak` does it for a minute each.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness.paths import TESTS, run_python
from signals_at_random import Combination


def run(seconds: float, combination: Combination, *arguments: str) -> dict[str, Any]:
    """Run the program and return what it has seen. Its signals are not for the process of the tests."""
    named = {name: getattr(combination, name) for name in ("database", "kind", "driver", "commit", "log")}
    given = [word for name, value in named.items() if value for word in (f"--{name}", value)]
    done = run_python(str(TESTS / "signals_at_random.py"), "--seconds", str(seconds), *given, *arguments, codes=(0, 1))
    results: dict[str, Any] = json.loads(done.stdout)
    (seen,) = results.values()
    return dict(seen)


def assert_nothing_is_wrong(seen: dict[str, Any]) -> None:
    assert set(seen["wrong"].values()) == {0}, json.dumps(seen, indent=2)
    assert seen["interrupts"] > 20, "units were hardly interrupted"
    assert seen["acknowledged"] > 20, "hardly any unit was committed"


def test_nothing_is_wrong_after_signals_at_random() -> None:
    assert_nothing_is_wrong(run(3, Combination("sqlite", "sync", "one-phase")))


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_the_program_sees_that_plain_sqlalchemy_commits_in_one_database_and_not_in_the_other(postgres: object) -> None:
    apart = 0
    for _ in range(5):  # a signal meets the moments that matter by chance
        seen = run(6, Combination("postgresql", "sync", "two-phase", "last"), "--bare")
        apart += seen["wrong"]["in one database only"]
        if apart:
            return
    pytest.fail("signals at random have shown nothing")
