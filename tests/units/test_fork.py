"""A process that forks goes on as two that share no connection, whatever was under way."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest

from harness.paths import run_python


def run(scenario: str, url: str, ends: str = "at once") -> dict[str, Any]:
    """Run a scenario of forking.py in a process of its own.

    Warnings are errors, but for psycopg's that the child drops its parent's connections without closing them: it has to.
    """
    quiet = ("-W", "error", "-W", "ignore::ResourceWarning")
    done = run_python(*quiet, "-m", "harness.forking", scenario, url, ends)
    assert done.stderr == ""
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def has_server(url: str) -> bool:
    return not url.startswith("sqlite")


@pytest.mark.representative("postgresql-at once")
@pytest.mark.parametrize("ends", ["at once", "in order"])
def test_parent_and_child_go_on_with_connections_of_their_own(database_url: str, ends: str) -> None:
    """Parent and child would otherwise speak on one socket; the parent's pooled connection outlives the child's end."""
    seen = run("idle", database_url, ends)
    assert seen["ended"] == 0
    assert seen["items"] == ["child 1", "child 2", "parent after", "parent before"]
    assert seen["checked_out"] == 0
    if has_server(database_url):
        before, after = seen["parent"]
        first, second = seen["child"]
        assert before == after
        assert first == second
        assert before != first


@pytest.mark.representative("sqlite")
def test_parent_and_child_commit_side_by_side(database_url: str) -> None:
    seen = run("side_by_side", database_url)
    assert seen["ended"] == 0
    numbers = range(20)
    expected = [*(f"child {number:02}" for number in numbers), *(f"parent {number:02}" for number in numbers), "parent before"]
    assert seen["items"] == sorted(expected)
    assert seen["parent"] == seen["child"] == 1  # one connection each, all the time


@pytest.mark.representative("postgresql-at once")
@pytest.mark.parametrize("ends", ["at once", "in order"])
def test_a_child_forked_in_a_unit_is_refused_there_and_works_in_one_of_its_own(database_url: str, ends: str) -> None:
    seen = run("in_a_unit", database_url, ends)
    assert seen["left"] == "Leave"  # the child's own error, not one about the unit that it may not end
    check_the_unit_was_untouched(seen, database_url)


@pytest.mark.representative("postgresql")
def test_a_child_that_leaves_its_parents_block_without_an_error_is_refused(database_url: str) -> None:
    seen = run("in_a_unit_that_is_left_quietly", database_url)
    assert seen["left"] == "ForeignUnitOfWork"
    check_the_unit_was_untouched(seen, database_url)


def check_the_unit_was_untouched(seen: dict[str, Any], url: str) -> None:
    pid, *refusals = seen["refused"]
    assert len(refusals) == 3
    for refusal in refusals:
        assert f"used from process {pid}" in refusal
        assert "in the parent process" in refusal
    assert seen["ended"] == 0
    assert seen["checked_out"] == 0
    if has_server(url):
        assert seen["items"] == ["child", "parent 1", "parent 2", "parent 3"]
        before, after = seen["parent"]
        assert before == after == seen["after"]
        assert seen["child"] != before
    else:
        # The child has a copy of SQLite's own list of the locks that its process holds, and the parent's write lock is on it.
        assert seen["child"] == "database is locked"
        assert seen["items"] == ["parent 1", "parent 2", "parent 3"]
        with sqlite3.connect(url.removeprefix("sqlite:///")) as outside:
            assert outside.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        outside.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("scenario", ["pool_of_workers", "pool_of_workers_in_a_unit"])
def test_the_workers_of_a_multiprocessing_pool_have_each_their_own_connection(database_url: str, scenario: str) -> None:
    seen = run(scenario, database_url)
    assert [name for name in seen["items"] if name.startswith("job")] == [f"job {number:02}" for number in range(12)]
    assert "parent after" in seen["items"]
    assert seen["checked_out"] == 0
    if has_server(database_url):
        connections = {pid: {connection for worker, connection in seen["jobs"] if worker == pid} for pid, _ in seen["jobs"]}
        assert all(len(used) == 1 for used in connections.values())
        everybody = {*seen["parent"], *(connection for used in connections.values() for connection in used)}
        assert len(set(seen["parent"])) == 1
        assert len(everybody) == 1 + len(connections)
