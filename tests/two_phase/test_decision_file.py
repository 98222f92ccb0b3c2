"""A decision file loses nothing that it has answered for, and what is not as it should be is an error that says what to do."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from app_db._two_phase import file_checks
from app_db._two_phase.decision_database import DecisionDatabase
from app_db._two_phase.decision_file import FileLog
from app_db._two_phase.decisions import Verdict
from app_db._two_phase.xids import new_unit_id
from app_db.errors import DecisionFileDamaged, DecisionFileFull, DecisionFileUnusable
from harness.interrupting import Interrupter, Interruption, Mode
from harness.paths import PYTHONPATH, run_python
from harness.requiring import need_command

COMMIT, ABORT = Verdict.COMMIT, Verdict.ABORT


def command(*arguments: str) -> dict[str, Any]:
    return {
        "args": [sys.executable, "-W", "error", "-m", "harness.deciding", *arguments],
        "env": {**os.environ, "PYTHONPATH": PYTHONPATH},
        "stdin": subprocess.DEVNULL,
        "text": True,
    }


def seen(*arguments: str, within: tuple[str, ...] = ()) -> Any:
    """Run a scenario of deciding.py in a process of its own, started by the command `within`."""
    done = run_python("-W", "error", "-m", "harness.deciding", *arguments, within=within)
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "decisions"


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def filled(path: Path, count: int = 5, **options: Any) -> tuple[FileLog, list[str]]:
    log = FileLog(path, **options)
    assert log.id
    units = [new_unit_id(log.id) for _ in range(count)]
    for unit in units:
        log.decide(unit, COMMIT, ["warehouse", "writer"])
    return log, units


def connection_of(log: FileLog) -> sqlite3.Connection:
    assert log._database is not None
    return log._database._connection


def plain(path: Path) -> Any:
    """A connection that knows nothing of app_db."""
    return closing(sqlite3.connect(path, isolation_level=None))


def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the first word of each statement from now on."""
    noted: list[str] = []
    real = DecisionDatabase._execute

    def note(database: DecisionDatabase, statement: str, give_up: float) -> list[Any]:
        noted.append(statement.partition(" ")[0])
        return real(database, statement, give_up)

    monkeypatch.setattr(DecisionDatabase, "_execute", note)
    return noted


@contextmanager
def before_commit(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> Iterator[None]:
    """Have something happen once a COMMIT is under way, when app_db has looked whether the file is in place."""
    real = DecisionDatabase._execute

    def execute(database: DecisionDatabase, statement: str, give_up: float) -> list[Any]:
        if statement == "COMMIT":
            happens()
        return real(database, statement, give_up)

    with monkeypatch.context() as patched:
        patched.setattr(DecisionDatabase, "_execute", execute)
        yield


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
    units = [new_unit_id("Log123") for _ in range(50)]
    answers = seen("race", str(path), "6", *units)
    found = {decision.unit: str(decision.verdict) for decision in FileLog(path).decisions()}
    assert answers == [found] * 6
    assert sorted(found) == sorted(units)


def test_processes_that_make_the_log_at_the_same_time_make_one(path: Path) -> None:
    ids = seen("create", str(path), "12")
    assert ids == [FileLog(path).id] * 12


@pytest.mark.exhaustive
def test_a_forked_child_and_its_parent_keep_each_other_out(path: Path) -> None:
    assert seen("fork_with_a_log_in_use", str(path)) == {
        "kept out, on its own, untouched": [True, True, True],
        "agreed": True,
        "first": "commit",
    }


def test_what_is_forgotten_is_gone_for_everybody(path: Path) -> None:
    log, units = filled(path)
    other = FileLog(path)
    assert len(other.decisions()) == 5
    log.forget([*units[1:], new_unit_id(log.id)])
    assert [decision.unit for decision in other.decisions()] == units[:1]
    assert other.decide(units[1], ABORT, []) is ABORT
    assert log.find(units[1]) is ABORT


# ---- speed ---------------------------------------------------------------------------------------------------------------


def test_a_decision_is_one_transaction_whose_commit_waits_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = filled(path)
    noted = steps(monkeypatch)
    log.decide(new_unit_id(log.id), COMMIT, ["writer"])
    assert noted == ["BEGIN", "INSERT", "COMMIT"]
    assert connection_of(log).execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
    assert connection_of(log).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_threads_that_decide_at_the_same_time_share_a_transaction(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, [stands] = filled(path, 1)
    units = [stands, *(new_unit_id(log.id) for _ in range(15))]
    noted = steps(monkeypatch)
    with plain(path) as other, ThreadPoolExecutor(16) as pool:
        other.execute("BEGIN IMMEDIATE")
        waiting = [pool.submit(log.decide, unit, ABORT, []) for unit in units]
        while len(log._waiting) < len(units):
            time.sleep(0.01)
        other.execute("COMMIT")
        answers = [decided.result(20) for decided in waiting]
    assert noted.count("COMMIT") == 1
    assert answers == [COMMIT, *[ABORT] * 15]
    assert [FileLog(path).find(unit) for unit in units] == answers


def test_what_was_read_when_the_file_was_opened_is_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite takes up what a process that was killed has written, and does not see to it that it is on disk."""
    filled(path, 1)
    synced: list[str] = []
    real = os.fsync

    def note(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    reader = FileLog(path)
    assert reader.decisions()
    assert synced == [f"{path}-wal", str(path.parent)]
    assert reader.decisions()
    assert len(synced) == 2, "what is on disk stays there"


# ---- kill -9 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.representative("plain")
@pytest.mark.parametrize("state", ["new", "plain", "to be checkpointed"])
def test_a_kill_at_any_step_loses_nothing_that_was_acknowledged(state: str, tmp_path: Path) -> None:
    results = seen("killed_at_every_step", str(tmp_path), state)
    for result in results:
        good = {key: value for key, value in result.items() if key not in ("step", "stood")}
        assert good == dict.fromkeys(good, True), result
    committed = {result["step"] for result in results if result["stood"] == "commit"}
    tried = {result["step"].partition(",")[0] for result in results}
    assert tried >= {f"{how} {name}" for how in ("before", "within", "after") for name in ("BEGIN", "INSERT", "COMMIT")}
    last = max(int(result["step"].partition(",")[2]) for result in results)
    assert {f"after COMMIT, {last - 1}", f"before acknowledging, {last}"} <= committed
    assert not committed & {f"before COMMIT, {last - 1}", f"within COMMIT, {last - 1}"}


@pytest.mark.exhaustive
def test_random_kills_lose_nothing_that_was_acknowledged(path: Path) -> None:
    chance, standing, uncertain = random.Random(7), dict[str, str](), set[str]()
    log_id = FileLog(path).id
    for round_ in range(4):
        workers = [subprocess.Popen(**command("work", str(path), f"{round_} {n}"), stdout=subprocess.PIPE) for n in range(3)]
        heads = [worker.stdout.readline() for worker in workers if worker.stdout]  # they are at work
        for worker in workers:
            time.sleep(chance.uniform(0.01, 0.15))
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
    assert len(standing) > 20


@pytest.mark.parametrize("cut", [1, 100, 4096])
def test_a_decision_that_was_not_written_whole_does_not_count(path: Path, tmp_path: Path, cut: int) -> None:
    log, units = filled(path)
    copy = tmp_path / "copy"
    for suffix in ("", "-wal"):
        shutil.copy(beside(path, suffix), beside(copy, suffix))
    os.truncate(beside(copy, "-wal"), beside(copy, "-wal").stat().st_size - cut)
    again = FileLog(copy)
    assert sorted(decision.unit for decision in again.decisions()) == sorted(units[:-1])
    assert again.decide(units[-1], ABORT, []) is ABORT
    assert log.find(units[-1]) is COMMIT


# ---- damage ----------------------------------------------------------------------------------------------------------------


def as_it_is(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.parent.iterdir() if not each.name.endswith("-shm")}


@pytest.mark.representative("table", "a key")
@pytest.mark.parametrize("where", ["header", "first page", "table", "a key", "everything"])
def test_a_damaged_file_is_an_error_that_says_what_to_do_and_stays_as_it_is(path: Path, where: str) -> None:
    units = filled(path, 200)[1]
    gc.collect()  # which closes it
    content = path.read_bytes()
    key = content.index(units[7].encode())  # in the index: the decision would not be found there, and be taken for none
    places = {
        "header": (0, 16),
        "first page": (100, 500),
        "table": (4096, 3 * 4096),
        "a key": (key, key + 1),
        "everything": (0, len(content)),
    }
    start, end = places[where]
    path.write_bytes(content[:start] + b"!" * (end - start) + content[end:])
    before = path.read_bytes()
    uses: list[Callable[[FileLog], object]] = [
        lambda log: log.id,
        lambda log: log.id_if_made(),
        lambda log: log.decisions(),
        lambda log: log.decide("u" * 22, COMMIT, []),
    ]
    for use in uses:
        with pytest.raises(DecisionFileDamaged, match=r"Don't delete it: .*by hand") as caught:
            use(FileLog(path))
        assert (caught.value.path, caught.value.undecided) == (str(path), True)
        del caught
        gc.collect()
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello", b"#!/bin/sh\necho\n" * 20, b"\0" * 500])
def test_another_file_is_not_taken_for_a_log(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(DecisionFileDamaged, match="not a database"):
        _ = FileLog(path).id
    assert as_it_is(path) == {"decisions": content}


@pytest.mark.parametrize(
    "made_by", ["CREATE TABLE app_db_decisions (unit TEXT)", "PRAGMA application_id = 7", "CREATE VIEW v AS SELECT 1"]
)
def test_a_database_of_something_else_is_not_taken_for_a_log(path: Path, made_by: str) -> None:
    with plain(path) as other:
        other.execute(made_by)
    before = as_it_is(path)
    with pytest.raises(DecisionFileDamaged, match="an SQLite database of something else"):
        _ = FileLog(path).id
    assert as_it_is(path) == before


@pytest.mark.parametrize(
    "harm",
    [
        "DROP TABLE app_db_decisions",
        "DELETE FROM app_db_decisions WHERE unit = 'log'",
        "UPDATE app_db_decisions SET branches = 'x' WHERE unit = 'log'",
        "ALTER TABLE app_db_decisions RENAME COLUMN verdict TO says",
        "UPDATE app_db_decisions SET verdict = 'perhaps'",
        "UPDATE app_db_decisions SET branches = x'00' WHERE unit <> 'log'",
    ],
)
def test_a_log_that_was_edited_is_an_error(path: Path, harm: str) -> None:
    filled(path, 1)
    with plain(path) as other:
        other.execute(harm)
    with pytest.raises(DecisionFileDamaged, match="Don't delete it"):
        FileLog(path).decisions()


def test_a_file_of_the_former_format_is_an_error_that_says_what_to_do(path: Path) -> None:
    content = b"app_db-decisions 1 xLaKBZ 5d6b4c1f\ncommit xLaKBZ1xUODgcZR7TrHPMI warehouse,writer 1764412345.25 0f3a7c21\n"
    path.write_bytes(content)
    with pytest.raises(DecisionFileUnusable, match=r"format that app_db had before .*recover.* with the version that wrote it"):
        FileLog(path).decisions()
    assert as_it_is(path) == {"decisions": content}


@pytest.mark.parametrize("content", [b"", None])
def test_a_wal_whose_file_is_missing_is_kept(path: Path, content: bytes | None) -> None:
    """SQLite deletes it."""
    log, _ = filled(path)
    wal = beside(path, "-wal").read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    uses: list[Callable[[FileLog], object]] = [lambda log: log.id, lambda log: log.decisions(), lambda log: log.id_if_made()]
    for use in uses:
        with pytest.raises(DecisionFileDamaged, match="decisions-wal, which belongs to it, is not"):
            use(FileLog(path))
    assert beside(path, "-wal").read_bytes() == wal
    assert path.exists() == (content is not None)
    del log


# ---- files that are deleted, moved, or replaced ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("then", ["gone", "another"])
def test_a_file_that_was_deleted_in_use_is_an_error_until_it_is_back(path: Path, suffix: str, then: str) -> None:
    log, [unit] = filled(path, 1)
    late = new_unit_id(log.id)
    kept = path.parent / "kept"
    beside(path, suffix).rename(kept)
    if then == "another":
        beside(path, suffix).write_bytes(b"")
    uses: list[Callable[[], object]] = [
        lambda: log.find(unit),
        log.decisions,
        lambda: log.decide(late, COMMIT, []),
        lambda: log.forget([unit]),
    ]
    for use in uses:
        with pytest.raises(DecisionFileUnusable, match=r"was deleted, moved or replaced.*Put the same files back") as caught:
            use()
        assert caught.value.undecided
    if then == "gone":
        assert not beside(path, suffix).exists(), "nothing is made in its place"
    kept.rename(beside(path, suffix))
    assert (log.find(unit), log.find(late), log.decide(late, ABORT, [])) == (COMMIT, None, ABORT)


def test_a_decision_into_a_file_that_was_deleted_meanwhile_is_in_doubt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In WAL mode SQLite acknowledges it."""
    log, _ = filled(path)
    unit, kept = new_unit_id(log.id), path.parent / "kept"
    with before_commit(monkeypatch, lambda: path.rename(kept)), pytest.raises(DecisionFileUnusable) as caught:
        log.decide(unit, COMMIT, [])
    assert not caught.value.undecided
    kept.rename(path)
    assert log.decide(unit, ABORT, []) is COMMIT, "the file says what became of it"


def test_a_file_that_is_moved_while_a_decision_waits_for_it_is_noticed_before_it_is_written(path: Path) -> None:
    log, _ = filled(path)
    unit, kept = new_unit_id(log.id), path.parent / "kept"
    with plain(path) as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN IMMEDIATE")
        waiting = pool.submit(log.decide, unit, COMMIT, [])
        time.sleep(0.1)
        path.rename(kept)
        other.execute("COMMIT")
        with pytest.raises(DecisionFileUnusable) as caught:
            waiting.result(20)
        assert caught.value.undecided
        kept.rename(path)
    assert log.find(unit) is None


def test_a_decision_whose_write_failed_is_in_doubt_until_the_file_is_asked_again(path: Path) -> None:
    log, _ = filled(path)
    unit, limits = new_unit_id(log.id), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (beside(path, "-wal").stat().st_size + 2_000, limits[1]))
    try:
        with pytest.raises(DecisionFileUnusable, match="disk I/O error") as caught:
            log.decide(unit, COMMIT, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not caught.value.undecided
    assert log.decide(unit, ABORT, []) is ABORT
    assert FileLog(path).find(unit) is ABORT


def test_a_process_does_not_take_another_log_for_its_own(path: Path) -> None:
    log, [unit] = filled(path, 1)
    own = log.id
    log._begin_afresh()  # as a forked child does
    gc.collect()
    path.unlink()
    filled(path, 1)
    uses: list[Callable[[], object]] = [lambda: log.find(unit), lambda: log.decide(unit, COMMIT, [])]
    for use in uses:
        with pytest.raises(DecisionFileDamaged, match="it is another log"):
            use()
    assert log.id == own


def test_a_thread_that_gives_up_while_its_decision_is_written_does_not_know_what_became_of_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = filled(path)
    units, under_way, go_on = [new_unit_id(log.id) for _ in "ab"], threading.Event(), threading.Event()

    def wait() -> None:
        under_way.set()
        go_on.wait(20)

    with plain(path) as other, before_commit(monkeypatch, wait), ThreadPoolExecutor(2) as pool:
        other.execute("BEGIN IMMEDIATE")
        log._lock_wait = 5.0
        leader = pool.submit(log.decide, units[0], COMMIT, [])
        while not log._waiting:
            time.sleep(0.01)
        time.sleep(0.05)
        log._lock_wait = 0.3
        follower = pool.submit(log.decide, units[1], COMMIT, [])
        time.sleep(0.05)
        other.execute("COMMIT")
        assert under_way.wait(20)
        with pytest.raises(DecisionFileUnusable) as caught:
            follower.result(20)
        go_on.set()
        assert leader.result(20) is COMMIT
    assert not caught.value.undecided
    assert log.decide(units[1], ABORT, []) is COMMIT


def test_a_connection_to_a_file_that_was_replaced_does_not_delete_the_wal_of_the_new_one(path: Path) -> None:
    """SQLite deletes a -wal by its name when the last connection is closed, but looks whether the file has moved."""
    log, _ = filled(path)
    for suffix in ("", "-wal", "-shm"):
        beside(path, suffix).unlink()
    new, units = filled(path)
    del log
    gc.collect()
    assert beside(path, "-wal").exists()
    assert sorted(decision.unit for decision in new.decisions()) == sorted(units)


def test_a_link_is_followed_once(path: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(path)
    log, [unit] = filled(link, 1)
    assert log.place == f"the file {path}"
    link.unlink()
    link.symlink_to(other)
    assert log.decide(unit, ABORT, []) is COMMIT
    assert FileLog(path).find(unit) is COMMIT
    assert FileLog(link).find(unit) is None
    assert FileLog(link).id != log.id, "recovery knows by the id that it is another log"
    assert sorted(each.name for each in tmp_path.iterdir() if "-" not in each.name) == ["decisions", "link", "other"]


def test_a_file_with_a_second_name_is_refused_before_it_is_used(path: Path, tmp_path: Path) -> None:
    log, _ = filled(path)
    second = tmp_path / "second"
    second.hardlink_to(path)
    with pytest.raises(DecisionFileUnusable, match=r"several names.*Remove the other names"):
        _ = FileLog(second).id
    assert not beside(second, "-wal").exists()
    second.unlink()
    assert FileLog(path).id == log.id


# ---- file systems -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.glusterfs"])
def test_a_file_system_of_the_network_is_refused_by_name(
    kind: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        f"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"22 21 0:40 / {tmp_path} rw,relatime shared:3 - {kind} server:/export rw\n"
        f"23 21 0:41 / {tmp_path}/decision rw - ext4 /dev/sdb1 rw\n"  # which is not the same
    )
    monkeypatch.setattr(file_checks, "_MOUNT_TABLE", table)
    with pytest.raises(DecisionFileUnusable, match=rf"it is on {kind}, .*set DECISION_LOG to the name of a connection"):
        _ = FileLog(path).id
    assert not path.exists()
    assert FileLog(path.parent.parent / f"{tmp_path.name}.{kind}").id, "beside it there is room"


def test_a_file_that_is_mounted_without_its_directory_is_refused(path: Path) -> None:
    need_command("unshare", "-rm", "true")
    path.touch()
    script = f'touch {path}.of_the_host; mount --bind {path}.of_the_host {path} && exec "$@"'
    [problem] = seen("problem", str(path), within=("unshare", "-rm", "sh", "-c", script, "sh"))
    assert "it is mounted without its directory" in problem
    assert "Mount the directory" in problem


def test_where_linux_does_not_tell_nothing_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_checks, "_MOUNT_TABLE", tmp_path / "no such file")
    assert FileLog(path).id


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_may_not_be_written_is_told(path: Path, what: str) -> None:
    filled(path)
    gc.collect()
    path.parent.chmod(0o777 if what == "file" else 0o555)
    path.chmod(0o444 if what == "file" else 0o666)
    try:
        [problem] = seen("problem_of_guest", str(path))
    finally:
        path.parent.chmod(0o755)
    assert "SQLite says" in problem or "Permission denied" in problem  # by whose means it is noticed depends on the -wal
    assert "must be able to write there" in problem


def test_a_directory_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(DecisionFileUnusable, match="Its directory must exist"):
        _ = FileLog(tmp_path / "nowhere" / "decisions").id


def test_a_full_disk_is_told_and_nothing_is_decided(tmp_path: Path) -> None:
    need_command("unshare", "-rm", "true")
    script = f'mount -t tmpfs -o size=512k none {tmp_path} && exec "$@"'
    found = seen("fill", str(tmp_path / "decisions"), within=("unshare", "-rm", "sh", "-c", script, "sh"))
    assert re.search(r"its disk is full\. Make room, then run `python -m app_db recover`", found["error"])
    assert found["undecided"]
    assert found["stands"] is None, "and nobody will find it decided later"
    assert found["decided"] == found["kept"] > 30
    assert found["once there is room"] == "commit"


def test_a_full_disk_does_not_stop_a_log_that_has_room_of_its_own(tmp_path: Path) -> None:
    """Recovery has to write aborts there."""
    need_command("unshare", "-rm", "true")
    script = f'mount -t tmpfs -o size=512k none {tmp_path} && exec "$@"'
    found = seen("go_on_without_room", str(tmp_path / "decisions"), within=("unshare", "-rm", "sh", "-c", script, "sh"))
    assert found == ["abort"] * 300


def test_a_file_that_may_not_grow_is_full(path: Path) -> None:
    log, [stands] = filled(path, 1)
    pages = connection_of(log).execute("PRAGMA page_count").fetchone()[0]
    connection_of(log).execute(f"PRAGMA max_page_count = {pages}")
    late = ""
    with pytest.raises(DecisionFileFull, match=r"its disk is full\. Make room"):
        while True:
            late = new_unit_id(log.id)
            log.decide(late, COMMIT, ["warehouse", "writer"])
    assert log.decide(stands, ABORT, []) is COMMIT
    assert log.find(late) is None
    log.forget([decision.unit for decision in log.decisions() if decision.unit != stands])
    assert log.decide(late, ABORT, []) is ABORT


# ---- others that use it -------------------------------------------------------------------------------------------------------


def test_who_waits_too_long_for_another_process_is_told(path: Path) -> None:
    log, units = filled(path, lock_wait=0.2)
    late = new_unit_id(log.id)
    with plain(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DecisionFileUnusable, match=r"held it for too long.*a process that was stopped") as caught:
            log.decide(late, COMMIT, [])
        assert caught.value.undecided
        assert log.find(units[0]) is COMMIT, "looking waits for nobody"
        other.execute("COMMIT")
    assert (log.find(late), log.decide(late, ABORT, [])) == (None, ABORT)


def test_a_thread_that_waited_too_long_for_its_turn_is_not_served_later(path: Path) -> None:
    log, _ = filled(path)
    other = FileLog(path)
    late, slow = new_unit_id(log.id), new_unit_id(log.id)
    with plain(path) as stopped, ThreadPoolExecutor(1) as pool:
        stopped.execute("BEGIN IMMEDIATE")
        leader = pool.submit(log.decide, slow, COMMIT, [])
        while not log._waiting:
            time.sleep(0.01)
        time.sleep(0.05)  # it has the turn, and waits for the file
        log._lock_wait = 0.1
        with pytest.raises(DecisionFileUnusable) as caught:
            log.decide(late, COMMIT, [])
        assert caught.value.undecided
        stopped.execute("COMMIT")
        assert leader.result(20) is COMMIT
    assert other.find(late) is None


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


def decide_interrupted(log: FileLog, unit: str, interrupter: Interrupter, kind: type[BaseException]) -> None:
    """Decide in a thread that ends afterwards.

    Python 3.11 goes on handling an exception for ever when a trace function raises at the end of a `with suppress()`: it would be
    the context of every later exception of the thread.
    """
    with suppress(kind), interrupter:
        log.decide(unit, COMMIT, ["a"])


@pytest.mark.representative("Boom")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Python swallows what comes in a weakref's callback
@pytest.mark.parametrize("kind", Interruption)
def test_an_interruption_at_any_line_of_a_decision_damages_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "decisions"
    other = FileLog(path, lock_wait=1.0)
    assert other.id
    for number in count(1):
        log = FileLog(path, lock_wait=1.0)
        units = [new_unit_id(other.id) for _ in range(3)]
        if number % 2:
            assert log.id  # else it is opened by what is interrupted
        interrupter = Interrupter(number // 2, kind, Mode.LINES)
        interrupted = threading.Thread(target=decide_interrupted, args=(log, units[0], interrupter, kind))
        interrupted.start()
        interrupted.join()
        stands = other.decide(units[0], ABORT, ["a"])  # another process, as far as the locks on the file are concerned
        assert log.decide(units[1], COMMIT, ["a"]) is COMMIT, interrupter.where
        assert other.decide(units[2], COMMIT, ["a"]) is COMMIT, interrupter.where
        for each in (log, other, FileLog(path)):
            found = {decision.unit: decision.verdict for decision in each.decisions()}
            assert found == {units[0]: stands, units[1]: COMMIT, units[2]: COMMIT}, interrupter.where
        other.forget(units)
        if number > 1 and not interrupter.where and not number % 2:
            assert stands is COMMIT
            return


def test_an_interruption_of_cleaning_up_after_one_keeps_no_other_process_waiting(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, other = FileLog(path), FileLog(path, lock_wait=1.0)
    unit = new_unit_id(other.id)
    assert log.id
    real, interruptions = DecisionDatabase.roll_back, [KeyboardInterrupt]

    def roll_back(database: DecisionDatabase) -> None:
        if database._connection.in_transaction and interruptions:
            raise interruptions.pop()
        real(database)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with before_commit(monkeypatch, interrupt), monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DecisionDatabase, "roll_back", roll_back)
        log.decide(unit, COMMIT, [])
    assert not interruptions
    assert other.decide(unit, ABORT, []) is ABORT


@pytest.mark.parametrize("number", range(1, 200, 13))
def test_an_interruption_of_a_thread_that_writes_for_others_loses_none_of_theirs(path: Path, number: int) -> None:
    log, _ = filled(path, 0)
    units = [new_unit_id(log.id) for _ in range(8)]

    def decide(unit: str) -> Verdict:
        return log.decide(unit, COMMIT, [])

    def interrupted(unit: str) -> Verdict:
        with suppress(RuntimeError), Interrupter(number, RuntimeError, Mode.LINES):
            return decide(unit)
        return log.decide(unit, ABORT, [])

    with plain(path) as other, ThreadPoolExecutor(8) as pool:
        other.execute("BEGIN IMMEDIATE")
        first = pool.submit(interrupted, units[0])  # which has the turn, and waits for the file
        time.sleep(0.02)
        waiting = [pool.submit(decide, unit) for unit in units[1:]]
        time.sleep(0.02)
        other.execute("COMMIT")
        assert [decided.result(20) for decided in waiting] == [COMMIT] * 7
    found = {decision.unit: decision.verdict for decision in FileLog(path).decisions()}
    assert found == {**dict.fromkeys(units, COMMIT), units[0]: first.result(0)}
