"""Units of work over two PostgreSQL clusters by processes that are killed at random, with recovery running all the time.

    python tests/random_kills.py --kills 1000

Four workers commit units as fast as they can; each worker that is killed is replaced at once. Recoveries are killed, too. At the
end everybody is killed, recovery runs once more, and both databases are looked at. What was seen is printed as JSON: if a count
of `wrong` is above 0, the exit status is 1. With `--without-recovery` some are, or the run has shown nothing, and the status is
0. With `--seconds 5 --grace 0` nobody is killed, and recoveries take for dead those who are only at work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.crashing import COMMITTED_AFTER_ALL, UNKNOWN
from harness.leftovers import Site, left_in
from harness.servers import PostgresServer, Setting

if TYPE_CHECKING:
    from app_db import DatabaseContainer

CONNECTIONS = ("shop", "warehouse")

SERVER: dict[str, Setting] = {
    "max_prepared_transactions": 1000,  # nobody settles them when there is no recovery
}


_over = threading.Event()
"""Set in a process that is to end when it has finished what it is at."""


# ---- who is killed ------------------------------------------------------------------------------------------------------


class Journal:
    """Lines that processes append, and that are there although their writer is killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, line: str) -> None:
        os.write(self._file, line.replace("\n", " ").encode() + b"\n")

    def lines(self) -> list[str]:
        return self._path.read_text().splitlines()


def work(container: DatabaseContainer, name: str, acknowledged: Journal, refused: Journal) -> None:
    """Run units of work until it is over: each adds an item to both databases, and is acknowledged before the next one begins."""
    from harness.items import Item

    parent = os.getppid()
    for number in count():
        if is_over(parent):
            return
        unit = f"{name}-{number}"
        try:
            with container.transaction():
                for connection in random.sample(CONNECTIONS, 2):
                    getattr(container, f"{connection}_session")().add(Item(name=unit))
        except Exception as error:
            refused.note(f"{unit} {type(error).__name__} {error}")
        else:
            acknowledged.note(unit)


def recover(container: DatabaseContainer, grace: float, failures: Journal) -> None:
    """Run recoveries until it is over."""
    given: Any = container
    parent = os.getppid()
    while not is_over(parent):
        try:
            given.recovery().settle(grace=grace)
        except Exception:
            failures.note(traceback.format_exc())
        time.sleep(random.uniform(0, grace / 4))


def is_over(parent: int) -> bool:
    """Return whether this process was dismissed, or its parent has gone without a word."""
    return _over.is_set() or os.getppid() != parent


def _finish(*_: object) -> None:
    _over.set()


def fork(role: Callable[[], object]) -> int:
    """Have a process do something; return its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGTERM, _finish)
        random.seed()
        role()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Crowd:
    """The processes that live now, each replaced by one with the same role when it is killed."""

    def __init__(self) -> None:
        self._roles: dict[int, Callable[[int], None]] = {}
        self._generations = count()

    def add(self, role: Callable[[int], None]) -> None:
        generation = next(self._generations)
        self._roles[fork(lambda: role(generation))] = role

    def kill_one(self) -> None:
        """Kill one of them, wherever it is, and have another one take its place."""
        victim = random.choice(list(self._roles))
        self.add(self._end(victim))

    def kill_all(self) -> None:
        for pid in list(self._roles):
            self._end(pid)

    def dismiss_all(self) -> None:
        """Have them finish what they are at."""
        for pid in self._roles:
            os.kill(pid, signal.SIGTERM)
        for pid in list(self._roles):
            del self._roles[pid]
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError("a process failed")

    def _end(self, pid: int) -> Callable[[int], None]:
        role = self._roles.pop(pid)
        os.kill(pid, signal.SIGKILL)  # it is there, even as a zombie, until it is waited for
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != -signal.SIGKILL:
            raise RuntimeError(f"a process ended by itself with {status}")
        return role


# ---- the run ------------------------------------------------------------------------------------------------------------


def open_container(sites: dict[str, Site], log: str) -> DatabaseContainer:
    from app_db import DatabaseSettings, container_of
    from harness.items import Base

    connections = {name: {"url": site.url, "two_phase": True} for name, site in sites.items()}
    settings = DatabaseSettings(connections=connections, decision_log=log, _env_file=None)
    container = container_of(*connections)(settings=settings)
    for name in connections:
        engine = getattr(container, f"{name}_engine")()
        Base.metadata.create_all(engine)
        engine.dispose()  # forks have what SQLAlchemy found out on the first connection, and no connection
    return container


def run(options: argparse.Namespace, directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Kill, and count what was left."""
    sites: dict[str, Site] = {}
    for name in CONNECTIONS:
        server = PostgresServer(settings=SERVER).start()
        stack.callback(server.close)
        server.create_database(name)
        sites[name] = Site(server.url(name), server)
    container = open_container(sites, options.log.replace("file", f"file:{directory / 'decisions'}"))
    for site in sites.values():
        site.query("CHECKPOINT")  # the tests' servers commit asynchronously, and would lose the tables when they are killed early
    acknowledged, refused, failures = (Journal(directory / name) for name in ("acknowledged", "refused", "failures"))

    crowd = Crowd()
    stack.callback(crowd.kill_all)
    began = time.monotonic()
    for _ in range(options.workers):
        crowd.add(lambda generation: work(container, f"{generation}", acknowledged, refused))
    for _ in range(options.recoveries):
        crowd.add(lambda _: recover(container, options.grace, failures))
    kills = 0 if options.seconds else options.kills
    restarts = set(random.sample(range(kills), options.restarts))
    for number in range(kills):
        time.sleep(random.expovariate(1 / options.pause))
        crowd.kill_one()
        if number in restarts and (unlucky := random.choice(list(sites.values())).server) is not None:
            unlucky.restart("immediate")
    if options.seconds:
        time.sleep(options.seconds)
        crowd.dismiss_all()
    crowd.kill_all()
    seconds = time.monotonic() - began
    if options.recoveries:
        settle(container, sites)
    left = left_in(list(sites.values()), within=5.0 if options.recoveries else 0.0)
    return report(sites, left, acknowledged.lines(), refused.lines(), failures.lines()) | {"kills": kills, "seconds": seconds}


def settle(container: DatabaseContainer, sites: dict[str, Site]) -> None:
    """Run the last recovery, when the servers have noticed that nobody is left."""
    for site in sites.values():
        if site.server is not None:
            site.server.open_transactions(site.database, within=10)
    given: Any = container
    pid = fork(lambda: given.recovery().settle(grace=0))
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the last recovery failed")


def report(
    sites: dict[str, Site], left: list[object], acknowledged: list[str], refused: list[str], failures: list[str]
) -> dict[str, Any]:
    items = {name: site.items() for name, site in sites.items()}
    everywhere, somewhere = set.intersection(*items.values()), set.union(*items.values())
    reasons = dict(line.split(" ")[:2] for line in refused)
    told_there = {unit for unit, reason in reasons.items() if reason == COMMITTED_AFTER_ALL}
    told_not_there = {unit for unit, reason in reasons.items() if reason not in (COMMITTED_AFTER_ALL, UNKNOWN)}
    return {
        "acknowledged": len(acknowledged),
        "committed": len(everywhere),
        "refused": Counter(reasons.values()),
        "wrong": {
            "divergences": len(somewhere - everywhere),
            "lost": len((set(acknowledged) | told_there) - everywhere),
            "there although refused": len(told_not_there & somewhere),
            "prepared or locked": len(left),
            "failed recoveries": len(failures),
        },
        "examples": {"refused": refused[:3], "left": [str(what) for what in left[:3]], "failures": failures[:2]},
    }


def main(arguments: list[str]) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0, help="how long to go on, without killing anybody")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--recoveries", type=int, default=1)
    parser.add_argument("--without-recovery", dest="recoveries", action="store_const", const=0)
    parser.add_argument("--restarts", type=int, default=0, help="how often a server is killed as well")
    parser.add_argument("--grace", type=float, default=0.2, help="seconds for which recovery leaves a unit alone")
    parser.add_argument("--pause", type=float, default=0.03, help="seconds between two kills, on average")
    parser.add_argument("--log", default=CONNECTIONS[0], choices=[*CONNECTIONS, "file"])
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = parser.parse_args(arguments)
        seen = run(options, directory, stack)
        print(json.dumps(seen, indent=2))
    return 1 if options.recoveries and any(seen["wrong"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
