"""What tests/units/test_fork.py runs in processes of their own: `python -m harness.forking SCENARIO URL ENDS`
prints what was seen, as JSON.

Not a test of pytest's: nobody should fork pytest.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NoReturn

from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from app_db.errors import ForeignUnitOfWork
from harness.items import Databases

Seen = dict[str, Any]


class Wire:
    """What a child tells its parent."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        self._heard = b""

    def say(self, what: Any) -> None:
        os.write(self._writing, json.dumps(what).encode() + b"\n")

    def hear(self) -> Any:
        """Return the next thing that is said, or None when nobody is left to say anything."""
        while b"\n" not in self._heard:
            more = os.read(self._reading, 4096)
            if not more:
                return None
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def only_hear(self) -> None:
        os.close(self._writing)


def end(work: Callable[[], None], ends: str) -> NoReturn:
    """Do the last work of a child, and end it."""
    try:
        work()
        gc.collect()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    if ends == "at once":
        os._exit(0)
    sys.exit(0)  # with all that an interpreter does at its end: destructors, and functions registered for it


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def unit(databases: Databases, name: str) -> int | None:
    """Write an item in a unit of its own; return the server's number of the connection."""
    with databases.container.transaction():
        databases.add(name)
        return databases.backend_id()


def idle(databases: Databases, ends: str) -> Seen:
    """Fork while the connections are in the pool."""
    before = unit(databases, "parent before")
    wire = Wire()
    pid = os.fork()
    if pid == 0:
        end(lambda: wire.say([unit(databases, "child 1"), unit(databases, "child 2")]), ends)
    wire.only_hear()
    in_child, ended = wire.hear(), end_of(pid)
    return {"parent": [before, unit(databases, "parent after")], "child": in_child, "ended": ended}


def side_by_side(databases: Databases, ends: str) -> Seen:
    """Fork, and let both go on at the same time."""
    unit(databases, "parent before")

    def many(who: str) -> int:
        return len({unit(databases, f"{who} {number:02}") for number in range(20)})

    wire = Wire()
    pid = os.fork()
    if pid == 0:
        end(lambda: wire.say(many("child")), ends)
    wire.only_hear()
    in_parent = many("parent")
    return {"parent": in_parent, "child": wire.hear(), "ended": end_of(pid)}


def refusal(use: Callable[[], Any]) -> str:
    try:
        use()
    except ForeignUnitOfWork as refused:
        return str(refused)
    return "not refused"


class Leave(Exception):
    pass


def in_a_unit(databases: Databases, ends: str, *, raises: bool = True) -> Seen:
    """Fork in mid-unit: the child is refused in it, leaves it, and works in one of its own before the parent goes on."""
    wire = Wire()
    try:
        with databases.container.transaction():
            databases.add("parent 1")
            before = databases.backend_id()
            session = databases.session()
            pid = os.fork()
            if pid == 0:
                uses = (lambda: session.execute(text("SELECT 1")), databases.session, databases.container.unit)
                wire.say([os.getpid(), *(refusal(use) for use in uses)])
                if raises:
                    raise Leave
            else:
                wire.only_hear()
                seen: Seen = {"refused": wire.hear(), "left": wire.hear(), "child": wire.hear(), "ended": end_of(pid)}
                databases.add("parent 2")
                seen["parent"] = [before, databases.backend_id()]
    except (Leave, ForeignUnitOfWork) as error:
        wire.say(type(error).__name__)
        del session
        end(lambda: wire.say(unit_or_error(databases, "child")), ends)
    return {**seen, "after": unit(databases, "parent 3")}


def unit_or_error(databases: Databases, name: str) -> int | str | None:
    try:
        return unit(databases, name)
    except OperationalError as error:
        return str(error.orig)


def in_a_unit_that_is_left_quietly(databases: Databases, ends: str) -> Seen:
    """As `in_a_unit`, with a child that leaves the block as if all were well."""
    return in_a_unit(databases, ends, raises=False)


@contextmanager
def _pool() -> Any:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        yield pool
        pool.close()
        pool.join()


_databases: Databases


def _in_worker(number: int) -> tuple[int, int | None]:
    return os.getpid(), unit(_databases, f"job {number:02}")


def pool_of_workers(databases: Databases, ends: str) -> Seen:
    """A `multiprocessing` pool whose workers inherit a container that has been used."""
    before = unit(databases, "parent before")
    with _pool() as pool:
        jobs = pool.map(_in_worker, range(12), chunksize=1)
    return {"parent": [before, unit(databases, "parent after")], "jobs": jobs}


def pool_of_workers_in_a_unit(databases: Databases, ends: str) -> Seen:
    """The same, with a unit under way in which the parent has only read."""
    with databases.container.transaction(read_only=True):
        before = databases.backend_id()
        databases.session().execute(text("SELECT name FROM item"))
        with _pool() as pool:
            jobs = pool.map(_in_worker, range(12), chunksize=1)
        during = databases.backend_id()
    return {"parent": [before, during, unit(databases, "parent after")], "jobs": jobs}


SCENARIOS = (idle, side_by_side, in_a_unit, in_a_unit_that_is_left_quietly, pool_of_workers, pool_of_workers_in_a_unit)


def main() -> None:
    global _databases
    scenario, url, ends = sys.argv[1:]
    each = {"connect_args": {"timeout": 0.5}} if url.startswith("sqlite") and "in_a_unit" in scenario else {}
    _databases = databases = Databases({"writer": url}, each=each)
    seen = {function.__name__: function for function in SCENARIOS}[scenario](databases, ends)
    seen["items"] = databases.items()
    seen["checked_out"] = databases.checked_out()
    databases.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
