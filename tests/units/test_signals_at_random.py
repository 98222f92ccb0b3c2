"""Signals interrupt units of work at random times, and nothing is wrong afterwards.

The same for each database, driver and way to commit is a part of test_soak.py; `make soak` does it for a minute each.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from harness.forms_of_units import Alarm, Bell, Plan, Unit
from harness.items import Base
from harness.paths import TESTS, run_python
from harness.signalled import AwaitedRun
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


@pytest.mark.exhaustive
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


@pytest.mark.timeout(60, method="thread")  # the other method uses the same timer
def test_an_interrupted_look_does_not_take_what_a_generator_still_holds_for_left_current(
    new_sqlite_url: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first interruption leaves the generator to the event loop, which closes it in a task. The second lands in the look."""
    url = new_sqlite_url()
    plain = create_engine(url)
    Base.metadata.create_all(plain)
    connections = {"writer": {"url": url.replace("sqlite:", "sqlite+aiosqlite:")}}
    plan = Plan(connections, ["writer"], None, kind="async", commit="one-phase", bare=False, seconds=60, directory=str(tmp_path))
    run = AwaitedRun(plan)
    interruptions = [Bell()]
    look = run.units.current

    def interrupted_look() -> object:
        if interruptions:
            raise interruptions.pop()
        return look()

    async def generator(unit: Unit) -> None:
        plan.seconds = 0  # there is no unit after this one
        entered = run.units._unit_of_work()
        await entered.__aenter__()
        monkeypatch.setattr(run.units, "current", interrupted_look)
        raise Alarm

    async def chunk() -> None:
        await run.chunk()
        await run.units.leave_loop()

    run.units.forms = [generator]
    monkeypatch.setattr(run.gate, "open", lambda unit: None)  # these are all interruptions that there are
    before = signal.getsignal(signal.SIGALRM)
    run.gate.start()
    try:
        asyncio.run(chunk())
    finally:
        run.gate.stop()
        signal.signal(signal.SIGALRM, before)
        run.units.close()
        plain.dispose()
    assert interruptions == []
    assert run.notes.counts["left current"] == 0
