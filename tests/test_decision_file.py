"""A decision file loses nothing that it has answered for, and says so when somebody else has damaged it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app_db._two_phase import decision_file
from app_db._two_phase.decision_file import FileLog
from app_db._two_phase.decisions import Verdict
from app_db._two_phase.xids import new_unit_id
from app_db.errors import DecisionFileDamaged, DecisionFileFull
from interrupting import Interrupter, Interruption, Mode

HERE = Path(__file__).parent
COMMIT, ABORT = Verdict.COMMIT, Verdict.ABORT


def command(*arguments: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    return {
        "args": [sys.executable, "-W", "error", str(HERE / "deciding.py"), *arguments],
        "env": {**os.environ, "PYTHONPATH": paths},
        "stdin": subprocess.DEVNULL,
        "text": True,
    }


def seen(*arguments: str) -> Any:
    """Run a scenario of deciding.py in a process of its own."""
    done = subprocess.run(**command(*arguments), capture_output=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "decisions"


@pytest.fixture
def often_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_file, "_LEAST_WORTH_REWRITING", 2_000)


def filled(path: Path, count: int = 5, **options: Any) -> tuple[FileLog, list[str]]:
    log = FileLog(path, **options)
    assert log.id
    units = [new_unit_id(log.id) for _ in range(count)]
    for unit in units:
        log.decide(unit, COMMIT, ["warehouse", "writer"])
    return log, units


def steps(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Note what is asked of the system from now on."""
    noted: list[str] = []
    for name in names:

        def note(*arguments: Any, name: str = name, real: Callable[..., Any] = getattr(os, name), **options: Any) -> Any:
            noted.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, note)
    return noted


# ---- one decision a unit -------------------------------------------------------------------------------------------------


def test_a_decision_stands_for_everybody_and_whoever_comes_second_obeys(path: Path) -> None:
    log, [unit] = filled(path, 1)
    for other in (log, FileLog(path)):
        assert other.decide(unit, ABORT, []) is COMMIT
        assert other.find(unit) is COMMIT
        [decision] = other.decisions()
        assert (decision.unit, decision.verdict, decision.branches) == (unit, COMMIT, ("warehouse", "writer"))
        assert abs(decision.decided_at - time.time()) < 60


def test_a_log_is_made_by_the_first_who_needs_it_and_by_nobody_else(path: Path) -> None:
    log = FileLog(path)
    assert (log.find("u" * 22), log.decisions(), path.exists()) == (None, [], False)
    log.forget(["u" * 22])
    assert re.fullmatch(r"[A-Za-z0-9]{6}", log.id)
    assert (FileLog(path).id, path.exists()) == (log.id, True)


def test_threads_that_decide_differently_get_the_same_answer(path: Path) -> None:
    log, _ = filled(path, 0)
    units = [new_unit_id(log.id) for _ in range(20)]
    together = threading.Barrier(32)

    def decide(number: int) -> list[Verdict]:
        own = log if number % 4 else FileLog(path)
        together.wait(20)
        return [own.decide(unit, ABORT if number % 2 else COMMIT, []) for unit in units]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(decide, range(32)))
    assert answers == [[log.find(unit) for unit in units]] * 32


def test_processes_that_decide_differently_get_the_same_answer(path: Path) -> None:
    units = [new_unit_id("Log123") for _ in range(100)]
    answers = seen("race", str(path), "6", *units)
    found = {decision.unit: str(decision.verdict) for decision in FileLog(path).decisions()}
    assert answers == [found] * 6
    assert sorted(found) == sorted(units)


def test_processes_that_make_the_log_at_the_same_time_make_one(path: Path) -> None:
    ids = seen("create", str(path), "12")
    assert ids == [FileLog(path).id] * 12


def test_a_forked_child_and_its_parent_keep_each_other_out(path: Path) -> None:
    assert seen("fork_with_a_log_in_use", str(path)) == {"kept out": True, "agreed": True, "first": "commit"}


def test_what_is_forgotten_is_gone_for_everybody(path: Path) -> None:
    log, units = filled(path)
    other = FileLog(path)
    assert len(other.decisions()) == 5
    log.forget([*units[1:], new_unit_id(log.id)])
    assert [decision.unit for decision in other.decisions()] == units[:1]
    assert other.decide(units[1], ABORT, []) is ABORT
    assert log.find(units[1]) is ABORT


# ---- speed ---------------------------------------------------------------------------------------------------------------


def test_a_decision_is_one_write_and_one_wait_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = filled(path)
    noted = steps(monkeypatch, "open", "pread", "write", "fdatasync", "fsync", "ftruncate")
    log.decide(new_unit_id(log.id), COMMIT, ["writer"])
    assert noted == ["write", "fdatasync"]


@pytest.mark.usefixtures("often_rewritten")
def test_a_file_that_is_rewritten_is_on_disk_before_it_takes_the_name_and_the_name_is_before_anybody_hears_of_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, units = filled(path, 30)
    log.forget(units)
    noted = steps(monkeypatch, "write", "fdatasync", "replace", "fsync")
    while "replace" not in noted:
        noted.clear()
        log.decide(new_unit_id(log.id), COMMIT, [])
    assert noted == ["write", "fdatasync", "replace", "fsync"]


def test_only_what_others_have_added_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = filled(path, 200)
    other, unit = FileLog(path), new_unit_id(log.id)
    before = path.stat().st_size
    other.decide(unit, COMMIT, [])
    read: list[int] = []
    real = os.pread

    def note(fd: int, size: int, offset: int) -> bytes:
        read.append(size)
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", note)
    assert log.decide(unit, ABORT, []) is COMMIT
    assert read == [path.stat().st_size - before]


def test_a_verdict_of_somebody_who_died_before_it_was_on_disk_is_put_there_before_it_is_believed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, [unit] = filled(path, 1)
    believers: list[Callable[[FileLog], object]] = [
        lambda reader: reader.find(unit),
        lambda reader: reader.decisions(),
        lambda reader: reader.decide(unit, ABORT, []),
    ]
    for believe in believers:
        reader = FileLog(path)
        assert reader.id == log.id
        with monkeypatch.context() as patched:
            noted = steps(patched, "fdatasync")
            assert believe(reader)
            assert noted == ["fdatasync"]
            believe(reader)
            assert noted == ["fdatasync"], "what is on disk stays there"


# ---- kill -9 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.representative("torn", "to rewrite")
@pytest.mark.parametrize("state", ["new", "plain", "torn", "to rewrite"])
def test_a_kill_at_any_step_loses_nothing_that_was_acknowledged(state: str, tmp_path: Path) -> None:
    results = seen("killed_at_every_step", str(tmp_path), state)
    for result in results:
        good = {key: value for key, value in result.items() if key not in ("step", "stood")}
        assert good == dict.fromkeys(good, True), result
        assert result["stood"] == "commit" or not re.search("acknowledging|(within|after) fdatasync, [457]$", result["step"])
    tried = {result["step"].split(",")[0] for result in results}
    needed = {f"{how} {name}" for how in ("before", "within", "after") for name in ("write", "fdatasync", "acknowledging")}
    needed |= {"before replace", "after replace"} if state == "to rewrite" else set()
    assert tried >= needed


@pytest.mark.exhaustive
def test_random_kills_lose_nothing_that_was_acknowledged(path: Path) -> None:
    chance, standing, uncertain, rewritten = random.Random(7), dict[str, str](), set[str](), set[int]()
    log_id = FileLog(path).id
    for round_ in range(4):
        workers = [subprocess.Popen(**command("work", str(path), f"{round_} {n}"), stdout=subprocess.PIPE) for n in range(3)]
        heads = [worker.stdout.readline() for worker in workers if worker.stdout]  # they are at work
        for worker in workers:
            time.sleep(chance.uniform(0.01, 0.15))
            rewritten.add(path.stat().st_ino)
            worker.send_signal(signal.SIGKILL)
        for head, worker in zip(heads, workers, strict=True):
            for line in (head + worker.communicate()[0]).splitlines():
                kind, *words = line.split()
                if kind == "stands":
                    standing[words[0]] = words[1]
                else:
                    uncertain.update(words)
        found = {decision.unit: str(decision.verdict) for decision in FileLog(path).decisions()}
        certain = {unit: verdict for unit, verdict in standing.items() if unit not in uncertain}
        assert {unit: found.get(unit) for unit in certain} == certain
    assert FileLog(path).id == log_id
    assert len(standing) > 100
    assert len(rewritten) > 1, "the file is to be rewritten meanwhile, or this proves less"


# ---- damage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_last_line_that_is_cut_off_does_not_count(path: Path, cut: int) -> None:
    reader, _ = filled(path, 0)
    _, units = filled(path)
    path.write_bytes(path.read_bytes()[:-cut])
    for log in (reader, FileLog(path)):
        assert sorted(decision.unit for decision in log.decisions()) == sorted(units[:-1])
    assert reader.decide(units[-1], ABORT, []) is ABORT
    assert FileLog(path).find(units[-1]) is ABORT


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10_000), change=st.integers(1, 255))
def test_a_byte_that_was_changed_is_an_error_that_names_file_and_offset(tmp_path: Path, where: int, change: int) -> None:
    path = tmp_path / "damaged"
    path.unlink(missing_ok=True)
    filled(path, 3)
    content = path.read_bytes()
    place = where % len(content)
    path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
    with pytest.raises(DecisionFileDamaged) as caught:
        FileLog(path).decisions()
    assert caught.value.offset == content.rfind(b"\n", 0, place) + 1, "where the damaged line begins"
    assert f"{path} is damaged at byte {caught.value.offset}" in str(caught.value)


def test_a_line_that_is_missing_is_noticed(path: Path) -> None:
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(DecisionFileDamaged, match=f"at byte {len(lines[0] + lines[1])}:"):
        FileLog(path).decisions()


def test_damage_is_not_written_over(path: Path) -> None:
    log, _ = filled(path)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    before = path.read_bytes()
    with pytest.raises(DecisionFileDamaged):
        FileLog(path).decide(new_unit_id(log.id), COMMIT, [])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"x", b"hello", b"#!/bin/sh\necho\n" * 20, b"\0" * 500, b"app_db-decisions 2 abcdef 00000000\n"]
)
def test_another_file_is_not_taken_for_a_log(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(DecisionFileDamaged):
        _ = FileLog(path).id
    assert path.read_bytes() == content


@pytest.mark.parametrize("length", [0, 1, 17, 20, 34])
def test_a_log_whose_maker_died_is_made_again(path: Path, length: int) -> None:
    filled(path, 1)
    path.write_bytes(path.read_bytes()[:length])
    again = FileLog(path)
    assert again.decide(new_unit_id(again.id), COMMIT, []) is COMMIT


def test_a_log_that_vanishes_in_use_is_an_error(path: Path) -> None:
    log, [unit] = filled(path, 1)
    path.unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="decisions"):
            log.find(unit)
    FileLog(path).decide(unit, ABORT, [])
    with pytest.raises(DecisionFileDamaged, match="another log"):
        log.find(unit)


def test_a_log_that_got_shorter_in_use_is_an_error(path: Path) -> None:
    log, _ = filled(path)
    content = path.read_bytes()
    os.truncate(path, len(content) - 3)
    with pytest.raises(DecisionFileDamaged, match=f"at byte {len(content) - 3}: it ends there"):
        log.decisions()


def test_a_line_that_could_not_be_written_whole_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, units = filled(path)
    before, real = path.read_bytes(), os.write

    def full_disk(fd: int, line: bytes) -> int:
        real(fd, line[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "write", full_disk)
        log.decide(new_unit_id(log.id), COMMIT, [])
    assert path.read_bytes() == before
    assert log.decide(units[0], ABORT, []) is COMMIT
    assert log.decide(new_unit_id(log.id), ABORT, []) is ABORT
    assert len(FileLog(path).decisions()) == 6


# ---- the size ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("often_rewritten")
def test_a_file_is_rewritten_when_most_of_it_is_forgotten_and_others_notice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, kept = filled(path)
    other = FileLog(path)
    assert len(other.decisions()) == 5
    sizes, noted = [], steps(monkeypatch, "replace")
    path.chmod(0o640)
    for turn in range(100):
        unit = new_unit_id(log.id)
        user = log if turn % 3 else other
        user.decide(unit, COMMIT, ["writer"])
        assert (other if user is log else log).find(unit) is COMMIT
        user.forget([unit])
        sizes.append(path.stat().st_size)
    assert max(sizes) < 2_500
    assert 3 < len(noted) < 20
    assert path.stat().st_mode & 0o777 == 0o640, "who could use it still can"
    assert [decision.unit for decision in FileLog(path).decisions()] == kept
    assert [file.name for file in path.parent.iterdir()] == ["decisions"]


@pytest.mark.usefixtures("often_rewritten")
def test_who_waits_for_the_lock_of_a_file_that_is_rewritten_writes_into_the_new_one(path: Path) -> None:
    log, units = filled(path)
    other, late = FileLog(path), new_unit_id(log.id)
    other.find(units[0])
    with ThreadPoolExecutor(1) as pool:
        with log._locked() as file:
            waiting = pool.submit(other.decide, late, COMMIT, [])
            time.sleep(0.05)
            log._rewrite(file, list(file.decisions.values()))
        assert waiting.result(10) is COMMIT
    assert log.find(late) is FileLog(path).find(late) is COMMIT


@pytest.mark.usefixtures("often_rewritten")
def test_a_disk_that_is_too_full_to_rewrite_the_file_is_no_error_as_long_as_there_is_room_in_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = filled(path)

    def full_disk(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full_disk)
        for _ in range(40):
            unit = new_unit_id(log.id)
            assert log.decide(unit, COMMIT, ["writer"]) is COMMIT
            assert FileLog(path).find(unit) is COMMIT
            log.forget([unit])
    assert path.stat().st_size > 3_000
    assert [file.name for file in path.parent.iterdir()] == ["decisions"]
    log.decide(new_unit_id(log.id), COMMIT, [])
    assert path.stat().st_size < 1_000


def test_a_file_full_of_decisions_that_stand_says_so_and_leaves_room_for_recovery(path: Path) -> None:
    log, units = filled(path, max_bytes=4_000, count=1)
    unit = ""
    with pytest.raises(DecisionFileFull) as caught:
        while True:
            unit = new_unit_id(log.id)
            log.decide(unit, COMMIT, ["warehouse", "writer"])
            units.append(unit)
    assert (caught.value.max_bytes, caught.value.decisions) == (4_000, len(units))
    assert "python -m app_db recover" in str(caught.value)
    assert log.find(unit) is None
    assert log.decide(unit, ABORT, ["warehouse", "writer"]) is ABORT
    assert log.decide(units[0], ABORT, []) is COMMIT
    with pytest.raises(DecisionFileFull):
        for _ in range(40):
            log.decide(new_unit_id(log.id), ABORT, [])
    assert path.stat().st_size <= 4_000
    log.forget(units[:20])  # though there is no room to say so
    assert path.stat().st_size <= 4_000
    assert log.decide(new_unit_id(log.id), COMMIT, ["writer"]) is COMMIT
    assert FileLog(path).find(units[0]) is None
    assert FileLog(path).find(unit) is ABORT


def test_who_waits_too_long_for_the_others_is_told(path: Path) -> None:
    log, units = filled(path)
    other = FileLog(path, lock_wait=0.2)
    with log._locked(), pytest.raises(TimeoutError, match=r"held the decision file for 0\.2 s.*decisions"):
        other.decide(units[0], COMMIT, [])
    assert other.decide(units[0], ABORT, []) is COMMIT


@pytest.mark.parametrize("unit", ["", "short", "x" * 21 + "\n", "x" * 21 + " "])
def test_what_is_no_unit_is_refused(path: Path, unit: str) -> None:
    log, _ = filled(path)
    uses: list[Callable[[], object]] = [lambda: log.decide(unit, COMMIT, []), lambda: log.find(unit), lambda: log.forget([unit])]
    for use in uses:
        with pytest.raises(ValueError, match="can't be the unit of an xid"):
            use()
    with pytest.raises(ValueError, match="can't be the connection of an xid"):
        log.decide("x" * 22, COMMIT, ["no name"])


# ---- interruptions ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Python swallows what comes in a weakref's callback
@pytest.mark.parametrize("kind", Interruption)
def test_an_interruption_at_any_line_of_a_decision_damages_nothing(
    tmp_path: Path, often_rewritten: None, kind: type[BaseException]
) -> None:
    for number in count(1):
        path = tmp_path / str(number)
        log, other = FileLog(path, lock_wait=1.0), FileLog(path, lock_wait=1.0)
        units = [new_unit_id(log.id) for _ in range(12)]
        for unit in units[:8]:  # some of which are written anew by the next one
            log.decide(unit, COMMIT, ["a" * 20, "b" * 20])
        log.forget(units[1:8])
        interrupter = Interrupter(number, kind, Mode.LINES)
        with suppress(kind), interrupter:
            log.decide(units[8], COMMIT, ["a"])
        stands = other.decide(units[8], ABORT, ["a"])  # another process, as far as the lock on the file is concerned
        assert log.decide(units[9], COMMIT, ["a"]) is COMMIT, interrupter.where
        assert other.decide(units[10], COMMIT, ["a"]) is COMMIT, interrupter.where
        for each in (log, other, FileLog(path)):
            found = {decision.unit: decision.verdict for decision in each.decisions()}
            assert found == {units[0]: COMMIT, units[8]: stands, units[9]: COMMIT, units[10]: COMMIT}, interrupter.where
        if not interrupter.where:
            assert stands is COMMIT
            return
