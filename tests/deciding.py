"""What the tests of decision logs run in processes of their own: `python deciding.py SCENARIO WHERE ARGUMENTS...` prints what
was seen, as JSON. WHERE is a URL or the path of a file.

Not a test of pytest's: nobody should fork pytest, or kill it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app_db._databases.engines import build_engine
from app_db._two_phase import decision_file
from app_db._two_phase.decision_file import FileLog
from app_db._two_phase.decision_table import TableLog
from app_db._two_phase.decisions import DecisionLog, Verdict
from app_db._two_phase.xids import new_unit_id
from app_db.settings import DatabaseSettings

STEPS = ("open", "write", "ftruncate", "fdatasync", "fsync", "replace", "unlink", "fchmod")
"""What a decision file asks of the system."""


def opened(where: str) -> DecisionLog:
    if "://" not in where:
        return FileLog(where)
    engine = build_engine("writer", DatabaseSettings(connections={"writer": {"url": where}}))
    return TableLog("writer", lambda: engine)


def side_by_side(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Return what `work` returns in `count` children that begin at the same time."""
    start_reading, start_writing = os.pipe()
    answers = []
    for number in range(count):
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(start_writing)
            os.read(start_reading, 1)  # until everybody has closed the other end
            with os.fdopen(writing, "w") as answer:
                json.dump(work(number), answer)
            os._exit(0)
        os.close(writing)
        answers.append(reading)
    os.close(start_writing)
    return [json.loads(heard(reading)) for reading in answers]


def heard(reading: int) -> str:
    """Everything that is said on a pipe, until nobody is left to say more."""
    with os.fdopen(reading) as pipe:
        return pipe.read()


def create(where: str, count: str) -> list[str]:
    """The ids that `count` processes see of a log that none of them has made."""
    return side_by_side(int(count), lambda number: opened(where).id)


def race(where: str, count: str, *units: str) -> list[dict[str, str]]:
    """What stands about each unit, as `count` processes see it who decide differently about all of them."""

    def decide(number: int) -> dict[str, str]:
        log = opened(where)
        ours = Verdict.COMMIT if number % 2 else Verdict.ABORT
        return {unit: log.decide(unit, ours, ["writer"]) for unit in units}

    return side_by_side(int(count), decide)


def work(where: str, seed: str) -> None:
    """Decide and forget for ever, in a file that is often written anew, and say what is certain: until somebody kills it."""
    decision_file._LEAST_WORTH_REWRITING = 2_000
    chance = random.Random(seed)
    log = opened(where)
    mine: list[str] = []
    while True:
        unit = new_unit_id(log.id)
        verdict = chance.choice([Verdict.COMMIT, Verdict.ABORT])
        say("stands", unit, log.decide(unit, verdict, ["warehouse", "writer"]))
        mine.append(unit)
        if len(mine) > 15:
            forgotten = [mine.pop(chance.randrange(len(mine))) for _ in range(chance.randint(1, 12))]
            say("forgetting", *forgotten)
            log.forget(forgotten)


def say(*words: str) -> None:
    os.write(1, (" ".join(words) + "\n").encode())


def killed_at_every_step(where: str, state: str) -> list[dict[str, Any]]:
    """Die before, in and after each step of a decision; return what was there afterwards, for each."""
    decision_file._LEAST_WORTH_REWRITING = 2_000
    seen = []
    for how in ("before", "within", "after"):
        for step in range(100):
            path = Path(where) / f"{state}-{how}-{step}"
            expected = prepared(path, state)
            name = die_in_decision(path, how, step)
            seen.append({"step": f"{how} {name}, {step}", **after_death(path, expected)})
            if name == "acknowledging":
                break  # there are no more steps
    return seen


UNIT = "Log123" + "000001" + "0000000000"


def prepared(path: Path, state: str) -> dict[str, str]:
    """Make a file in some state; return what stands in it."""
    if state == "new":
        return {}
    log = FileLog(path)
    units = [new_unit_id(log.id) for _ in range(30)]
    for unit in units:
        log.decide(unit, Verdict.COMMIT, ["writer"])
    if state == "to rewrite":
        log.forget(units[5:])
        while path.stat().st_size < 2_000:
            unit = new_unit_id(log.id)
            log.decide(unit, Verdict.COMMIT, [])
            log.forget([unit])
        units = units[:5]
    if state == "torn":
        with path.open("ab") as file:
            file.write(b"commit Log123000")
    return dict.fromkeys(units, "commit")


def die_in_decision(path: Path, how: str, step: int) -> str:
    """Kill a child at its `step`th step, or when it has its answer; return the step's name."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        tell = os.write
        count = 0

        def dying(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count != step + 1:
                    return real(*arguments, **options)
                tell(writing, f"{name}\n".encode())
                try:
                    if how == "within" and name == "write":
                        real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    elif how != "before":
                        real(*arguments, **options)
                finally:
                    os.kill(os.getpid(), signal.SIGKILL)

            return call

        log = FileLog(path)
        for name in STEPS:
            setattr(os, name, dying(name))
        log.decide(UNIT, Verdict.COMMIT, ["writer"])
        tell(writing, b"acknowledging\n")
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    said = heard(reading).strip()
    os.waitpid(pid, 0)
    return said


def after_death(path: Path, expected: dict[str, str]) -> dict[str, Any]:
    log = FileLog(path)
    stood = log.find(UNIT)
    standing = log.decide(UNIT, Verdict.ABORT, ["writer"])
    found = {decision.unit: str(decision.verdict) for decision in FileLog(path).decisions()}
    return {
        "stood": stood,
        "others are there": {unit: verdict for unit, verdict in found.items() if unit != UNIT} == expected,
        "first wins": standing == (stood or Verdict.ABORT) == found.get(UNIT),
        "usable": log.decide(new_unit_id(log.id), Verdict.COMMIT, ["writer"]) == "commit",
        "same id": FileLog(path).id == log.id,
    }


def fork_with_a_log_in_use(where: str) -> dict[str, Any]:
    """Fork with the file open and its lock held; what both decide must not be mixed up."""
    log = FileLog(where)
    first = new_unit_id(log.id)
    log.decide(first, Verdict.COMMIT, [])
    with log._locked():
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            log._lock_wait = 0.3
            held = False
            try:
                log.find(first)
            except TimeoutError:
                held = True
            os.write(writing, json.dumps(held).encode())
            os._exit(0)
        os.close(writing)
        kept_out = json.loads(heard(reading))
        os.waitpid(pid, 0)
    units = [new_unit_id(log.id) for _ in range(40)]
    seen = side_by_side(4, lambda number: [log.decide(unit, list(Verdict)[number % 2], []) for unit in units])
    return {"kept out": kept_out, "agreed": all(answers == seen[0] for answers in seen), "first": log.find(first)}


SCENARIOS: dict[str, Callable[..., Any]] = {
    "create": create,
    "race": race,
    "work": work,
    "killed_at_every_step": killed_at_every_step,
    "fork_with_a_log_in_use": fork_with_a_log_in_use,
}

if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](*sys.argv[2:])))
