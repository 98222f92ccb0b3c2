"""What the tests of decision logs run in processes of their own: `python -m harness.deciding SCENARIO WHERE ARGUMENTS...`
prints what was seen, as JSON. WHERE is a URL or the path of a file.

Not a test of pytest's: nobody should fork pytest, or kill it.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from app_db._databases.engines import build_engine
from app_db._two_phase.decision_database import DecisionDatabase
from app_db._two_phase.decision_file import FileLog
from app_db._two_phase.decision_table import TableLog
from app_db._two_phase.decisions import DecisionLog, Verdict
from app_db._two_phase.xids import new_unit_id
from app_db.errors import DecisionFileUnusable
from app_db.settings import DatabaseSettings


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
    """Decide and forget for ever, and say what is certain: until somebody kills it."""
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
    """Die before, in and after each statement of a decision; return what was there afterwards, for each."""
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
    if state == "to be checkpointed":
        while wal_of(path).stat().st_size < 4096 * 998:  # SQLite copies what is in the -wal when it has 1000 pages
            log.forget(units[15:])
            for unit in units[15:]:
                log.decide(unit, Verdict.COMMIT, ["writer"])
    return dict.fromkeys(units, "commit")


def wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def die_in_decision(path: Path, how: str, step: int) -> str:
    """Kill a child at its `step`th statement, or when it has its answer; return the statement's first word."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0
        real = DecisionDatabase._execute

        def dying(database: DecisionDatabase, statement: str, give_up: float) -> list[Any]:
            nonlocal count
            count += 1
            if count != step + 1:
                return real(database, statement, give_up)
            os.write(writing, f"{statement.partition(' ')[0]}\n".encode())
            try:
                if how == "within":
                    # What is written ends in the middle of a page.
                    size = wal_of(path).stat().st_size if wal_of(path).exists() else 0
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2_000, resource.RLIM_INFINITY))
                if how != "before":
                    real(database, statement, give_up)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
            return []

        DecisionDatabase._execute = dying  # type: ignore[method-assign,assignment]
        FileLog(path).decide(UNIT, Verdict.COMMIT, ["writer"])
        os.write(writing, b"acknowledging\n")
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
    """Fork in the middle of a transaction; what both decide must not be mixed up, and the parent's connection is its own."""
    log = FileLog(where)
    first = new_unit_id(log.id)
    log.decide(first, Verdict.COMMIT, [])
    assert log._database is not None
    parents = log._database._connection
    parents.execute("BEGIN IMMEDIATE")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        log._lock_wait = 0.3
        kept_out = False
        try:
            log.decide(first, Verdict.ABORT, [])
        except DecisionFileUnusable:
            kept_out = True
        own = log._database._connection is not parents
        del log
        gc.collect()
        untouched = parents.in_transaction  # which raises nothing as long as it is open
        os.write(writing, json.dumps([kept_out, own, untouched]).encode())
        sys.exit()
    os.close(writing)
    seen = json.loads(heard(reading))
    os.waitpid(pid, 0)
    parents.execute("COMMIT")
    units = [new_unit_id(log.id) for _ in range(40)]
    answers = side_by_side(4, lambda number: [log.decide(unit, list(Verdict)[number % 2], []) for unit in units])
    agreed = all(each == answers[0] for each in answers) and answers[0] == [log.find(unit) for unit in units]
    return {"kept out, on its own, untouched": seen, "agreed": agreed, "first": log.find(first)}


def problem(where: str) -> list[str]:
    """What is said of a file that can't be used."""
    try:
        FileLog(where).decide(UNIT, Verdict.COMMIT, [])
    except DecisionFileUnusable as error:
        return [str(error)]
    return []


def problem_of_guest(where: str) -> list[str]:
    """The same where the user has no rights that the file does not give to everybody."""
    if os.geteuid() == 0:
        for directory in list(Path(where).parents)[1:]:
            if not directory.stat().st_mode & 0o001:
                directory.chmod(directory.stat().st_mode | 0o111)
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
    return problem(where)


def fill(where: str) -> dict[str, Any]:
    """Decide until the disk is full, then make some room."""
    room = Path(where).with_name("room")
    room.write_bytes(b"x" * 64 * 1024)
    log = FileLog(where)
    decided, unit = 0, ""
    seen: dict[str, Any] = {}
    while not seen:
        unit = new_unit_id(log.id)
        try:
            log.decide(unit, Verdict.COMMIT, ["warehouse", "writer"])
        except DecisionFileUnusable as error:
            seen = {"error": str(error), "undecided": error.undecided}
        else:
            decided += 1
    seen |= {"stands": FileLog(where).find(unit), "decided": decided, "kept": len(FileLog(where).decisions())}
    room.unlink()
    return seen | {"once there is room": log.decide(unit, Verdict.COMMIT, [])}


def go_on_without_room(where: str) -> list[str]:
    """Decide and forget on a disk that is full, in a file that has been in use."""
    log = FileLog(where)
    for _ in range(10):
        log.decide(new_unit_id(log.id), Verdict.COMMIT, ["warehouse", "writer"])
    del log
    gc.collect()  # which closes it
    log = FileLog(where)
    log.forget([decision.unit for decision in log.decisions()][:5])
    with suppress(OSError), Path(where).with_name("junk").open("wb", buffering=0) as junk:
        while True:
            junk.write(b"x" * 4096)
    answers = []
    for _ in range(300):
        unit = new_unit_id(log.id)
        answers.append(str(log.decide(unit, Verdict.ABORT, ["warehouse", "writer"])))
        log.forget([unit])
    return answers


SCENARIOS: dict[str, Callable[..., Any]] = {
    "create": create,
    "race": race,
    "work": work,
    "killed_at_every_step": killed_at_every_step,
    "fork_with_a_log_in_use": fork_with_a_log_in_use,
    "problem": problem,
    "problem_of_guest": problem_of_guest,
    "fill": fill,
    "go_on_without_room": go_on_without_room,
}

if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](*sys.argv[2:])))
