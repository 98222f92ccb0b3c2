"""Units of work that signals interrupt at random times, and a look at what became of those that were acknowledged.

    python tests/signals_at_random.py --seconds 60
    python tests/signals_at_random.py --seconds 60 --database postgresql --kind sync --commit two-phase --log file
    python tests/signals_at_random.py --seconds 60 --bare       # the same in plain SQLAlchemy

A process runs units as fast as it can, in its main thread. A timer's signals raise exceptions there every few milliseconds,
wherever the program is: in a block, on the way into it or out of it, in a driver. The loop catches them and goes on. At the end
recovery runs, and the databases are compared with what the process has noted. What was seen is printed as JSON. No count of
`wrong` may be above 0; else the exit status is 1.

Without options a selection of databases, drivers and ways to commit is run, each for that many seconds; `--all` runs all. Over
two phases, `sqlite` is SQLite as the last resource beside PostgreSQL, and `mariadb` is MariaDB beside PostgreSQL.

`leaked` counts slots of pools that stayed in use, which happens to plain SQLAlchemy, too: compare with `--bare`. `errors` has
what else came out of units, with one traceback each; `examples` says for each wrong event what was interrupted before.

In coroutines, an exception that lands in asyncio's own code breaks the event loop, or has it lose a wake-up. That is counted as
`loop_broken`, and the run goes on with another loop.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import NullPool, create_engine, make_url

from harness.items import Base
from harness.leftovers import Site
from harness.paths import PYTHONPATH
from harness.servers import MariaDBServer, PostgresServer, Server, ServerMissing, Setting, quick_tempdir

POSTGRESQL: dict[str, Setting] = {"max_prepared_transactions": 2000, "max_connections": 500}

ASYNC_DRIVERS = {"sqlite": ["aiosqlite"], "postgresql": ["psycopg", "asyncpg"], "mariadb": ["asyncmy"]}

EXAMPLES = 5

_databases = count(1)


@dataclass(frozen=True)
class Combination:
    """A database, a driver, and a way to commit."""

    database: str
    kind: str
    commit: str
    log: str = ""
    driver: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.database, self.kind, self.driver, self.commit, self.log)))


def combinations() -> list[Combination]:
    found: list[Combination] = []
    for database, drivers in ASYNC_DRIVERS.items():
        kinds = [("sync", ""), *(("async", driver) for driver in drivers)]
        for kind, driver in kinds:
            found.append(Combination(database, kind, "one-phase", driver=driver))
            found += [Combination(database, kind, "two-phase", log, driver) for log in ("last", "table", "file")]
    return found


SELECTED = [
    Combination("sqlite", "sync", "one-phase"),
    Combination("sqlite", "async", "one-phase", driver="aiosqlite"),
    Combination("sqlite", "sync", "two-phase", "table"),
    Combination("postgresql", "sync", "one-phase"),
    Combination("postgresql", "async", "one-phase", driver="asyncpg"),
    Combination("postgresql", "sync", "two-phase", "last"),
    Combination("postgresql", "sync", "two-phase", "file"),
    Combination("postgresql", "async", "two-phase", "table", "psycopg"),
    Combination("mariadb", "sync", "one-phase"),
    Combination("mariadb", "async", "one-phase", driver="asyncmy"),
    Combination("mariadb", "sync", "two-phase", "last"),
]


# ---- what units run on -----------------------------------------------------------------------------------------------


class Servers:
    """The servers of a run, started when they are first needed."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._started: dict[str, Server] = {}

    def get(self, name: str) -> Server:
        if name not in self._started:
            server = PostgresServer(settings=POSTGRESQL) if name == "postgresql" else MariaDBServer()
            self._stack.callback(server.close)
            self._started[name] = server.start()
        return self._started[name]

    def site(self, database: str, directory: Path, name: str) -> Site:
        """A new database with a table of items."""
        if database == "sqlite":
            site = Site(f"sqlite:///{directory / name}.db")
        else:
            server = self.get(database)
            created = f"{name}_{next(_databases)}"
            server.create_database(created)
            site = Site(server.url(created), server)
        engine = create_engine(site.url, poolclass=NullPool)
        Base.metadata.create_all(engine)
        return site


def settings_of(site: Site, combination: Combination) -> dict[str, Any]:
    """A connection's settings. In a run of coroutines the URL names their driver."""
    url = make_url(site.url)
    backend = url.get_backend_name()
    arguments: dict[str, Any] = {}
    if backend == "sqlite":
        arguments = {"timeout": 0.05}  # what has leaked may hold the lock of the file
    if combination.kind == "async":
        drivers = {"sqlite": "aiosqlite", "postgresql": "psycopg", "mysql": "asyncmy"}
        driver = combination.driver if backend == "postgresql" and combination.driver == "asyncpg" else drivers[backend]
        url = url.set(drivername=f"{backend}+{driver}")
    two_phase = combination.commit == "two-phase" and backend != "sqlite"
    return {"url": url.render_as_string(hide_password=False), "two_phase": two_phase, "connect_args": arguments}


def plan_of(
    combination: Combination, options: argparse.Namespace, servers: Servers, directory: Path
) -> tuple[dict[str, Any], dict[str, Site]]:
    """What the process is told, and the databases that its units write to."""
    sites = {"writer": servers.site(combination.database, directory, "writer")}
    log = None
    if combination.commit == "two-phase":
        sites["warehouse"] = servers.site("postgresql", directory, "warehouse")
        log = {"last": "writer", "table": "ledger", "file": f"file:{directory / 'decisions'}"}[combination.log]
    connections = {name: settings_of(site, combination) for name, site in sites.items()}
    if log == "ledger":
        connections["ledger"] = settings_of(servers.site("postgresql", directory, "ledger"), combination)
    plan = {
        "connections": connections,
        "written": list(sites),
        "decision_log": log,
        "kind": combination.kind,
        "commit": combination.commit,
        "bare": options.bare,
        "seconds": options.seconds,
        "directory": str(directory),
    }
    return plan, sites


# ---- one run ---------------------------------------------------------------------------------------------------------


def start(path: Path, output: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    environment |= dict.fromkeys(("SSL_CERT_FILE", "SSL_CERT_DIR"), os.devnull)  # as in conftest.py
    with output.open("ab") as file:
        command = [sys.executable, "-m", "harness.signalled", str(path), *arguments]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)


def wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait for a process; end it, and return None, if it takes too long. Its stacks are written down before."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        return None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def run(combination: Combination, options: argparse.Namespace, servers: Servers, directory: Path) -> dict[str, Any]:
    """Run units for a while, settle what is prepared, and compare."""
    plan, sites = plan_of(combination, options, servers, directory)
    path, output = directory / "plan.json", directory / "output"
    path.write_text(json.dumps(plan))
    status = wait(start(path, output), options.seconds * 1.25 + 30)
    for site in sites.values():
        if site.server is not None:
            site.server.open_transactions(site.database, within=10)
    problems: dict[str, Any] = {}
    if status != 0:
        stacks = directory / "stacks"
        problems["hung" if status is None else f"ended with {status}"] = {
            "stacks": stacks.read_text()[-6000:] if stacks.exists() else "",
            "output": output.read_text(errors="replace")[-3000:],
        }
    if combination.commit == "two-phase" and not options.bare:
        recovered = directory / "recovered"
        if wait(start(path, recovered, "--recover"), 40) != 0:
            problems["recovery failed"] = recovered.read_text(errors="replace")[-3000:]
    return report(sites, directory, problems)


def report(sites: dict[str, Site], directory: Path, problems: dict[str, Any]) -> dict[str, Any]:
    summary = _summary(directory)
    events = _Journal(directory / "journal", summary)
    rows = {name: site.items() for name, site in sites.items()}
    everywhere, somewhere = set.intersection(*rows.values()), set.union(*rows.values())
    absent = events.only("acknowledged") - everywhere
    apart = somewhere - everywhere
    undone = events.only("never") & somewhere
    prepared = [gid for site in sites.values() for gid in site.prepared()]
    wrong = {
        "acknowledged but absent": len(absent),
        "in one database only": len(apart),
        "undone but there": len(undone),
        "left current": summary["counts"].pop("left current", 0),
        "acknowledged without its hook": len(events.only("hooks")),
        "prepared after recovery": len(prepared),
        "failed recoveries": int("recovery failed" in problems) + summary["counts"].get("failed recovering", 0),
        "hung or ended early": int(bool({"hung"} & set(problems)) or any(key.startswith("ended") for key in problems)),
    }
    seen = {
        "interrupts": summary["interrupts"],
        "units": summary["units"],
        "acknowledged": len(events.only("acknowledged")),
        "committed": len(everywhere),
        "wrong": wrong,
        "leaked": summary["leaked"],
        "leaked in 10,000 interrupts": round(summary["leaked"] * 10_000 / max(summary["interrupts"], 1))
        if summary["interrupts"]
        else None,
        "errors": dict(sorted(summary["errors"].items(), key=lambda item: -item[1]["count"])),
    }
    examples = {
        "acknowledged but absent": events.examples(absent, "acknowledged"),
        "in one database only": events.examples(apart, None, rows),
        "undone but there": events.examples(undone, "never"),
        "left current": summary["left current"],
        "no unit comes through after": summary["no unit comes through"],
        "acknowledged without its hook": sorted(events.only("hooks"))[:EXAMPLES],
        "prepared after recovery": prepared[:EXAMPLES],
    }
    rest = ("seconds", "interrupts in the loop", "longest interval", "current inside the except", "counts", "logged")
    return {
        **seen,
        "loop_broken": summary["counts"].pop("loop_broken", 0),
        **{key: summary[key] for key in rest},
        "absent, by form": Counter(_form(name) for name in absent),
        "examples": {what: found for what, found in examples.items() if found},
        "problems": problems,
    }


def _summary(directory: Path) -> dict[str, Any]:
    """What the process has said at its end, or the little that is known of one that had no end."""
    empty: dict[str, Any] = {
        "counts": {},
        "errors": {},
        "left current": [],
        "no unit comes through": [],
        "raised": [],
        "places": [],
        "logged": {},
    }
    path = directory / "summary"
    if path.exists():
        return {**empty, **json.loads(path.read_text())}
    nothing = (
        "seconds",
        "interrupts",
        "units",
        "leaked",
        "interrupts in the loop",
        "longest interval",
        "current inside the except",
    )
    return {**empty, **dict.fromkeys(nothing)}


def _form(name: str) -> str:
    """The form of the unit to which a row belongs, and which of its parts it is."""
    return name.partition("-")[2]


class _Journal:
    """What the process has noted, with the number of interruptions before each note."""

    def __init__(self, path: Path, summary: dict[str, Any]) -> None:
        self._notes: dict[str, dict[str, int]] = {}
        self._raised: list[tuple[str, str, list[int]]] = summary["raised"]
        self._places: list[str] = summary["places"]
        self._of_unit: dict[str, list[int]] = {}
        for number, (unit, _, _) in enumerate(self._raised):
            self._of_unit.setdefault(unit, []).append(number)
        for line in path.read_text().splitlines() if path.exists() else ():
            kind, name, interruptions = line.split("\t")
            self._notes.setdefault(kind, {})[name] = int(interruptions)

    def only(self, kind: str) -> set[str]:
        return set(self._notes.get(kind, ()))

    def examples(self, names: set[str], kind: str | None, rows: dict[str, set[str]] | None = None) -> list[dict[str, Any]]:
        """The first of these rows, with the interruptions of their units, and the last one before those were noted."""
        found = []
        for name in sorted(names, key=lambda name: int(name.partition("-")[0]))[:EXAMPLES]:
            its = self._of_unit.get(name.partition("/")[0], [])
            before = self._notes.get(kind or "", {}).get(name, its[0] if its else 0) - 1
            last = [number for number in (before - 1, before) if 0 <= number < len(self._raised) and number not in its]
            example: dict[str, Any] = {"row": name, "interruptions before": [self._told(number) for number in last]}
            example["interruptions of the unit"] = [self._told(number) for number in its[:4]]
            if rows is not None:
                example["there"] = [database for database, there in rows.items() if name in there]
            found.append(example)
        return found

    def _told(self, number: int) -> list[str]:
        unit, kind, where = self._raised[number]
        return [f"{kind} in {unit}", *(self._places[place] for place in where)]


# ---- the command -----------------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> list[Combination]:
    """The combinations that were asked for: of all if any is named, else of the selection."""
    named = ("database", "kind", "commit", "log", "driver")
    wanted = {name: value for name in named if (value := getattr(options, name)) is not None}
    everything = options.all or bool(wanted)
    return [
        combination
        for combination in (combinations() if everything else SELECTED)
        if all(getattr(combination, name) == value for name, value in wanted.items())
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each combination")
    parser.add_argument("--database", choices=list(ASYNC_DRIVERS))
    parser.add_argument("--kind", choices=["sync", "async"])
    parser.add_argument("--driver", choices=sorted({driver for drivers in ASYNC_DRIVERS.values() for driver in drivers}))
    parser.add_argument("--commit", choices=["one-phase", "two-phase"])
    parser.add_argument("--log", choices=["last", "table", "file"], help="where two-phase commits are decided; last: the writer")
    parser.add_argument("--bare", action="store_true", help="plain SQLAlchemy; over two databases, one commit after the other")
    parser.add_argument("--all", action="store_true", help="all combinations, not a selection")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        servers = Servers(stack)
        for combination in chosen(options):
            began = time.monotonic()
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=quick_tempdir())))
            try:
                result = run(combination, options, servers, directory)
            except ServerMissing as missing:
                result = {"skipped": str(missing)}
            results[str(combination)] = result
            told = result.get("wrong", result)
            print(f"{combination}: {time.monotonic() - began:.0f} s, {told}", file=sys.stderr, flush=True)
    print(json.dumps(results, indent=2))
    if not results:
        print("There is no such combination.", file=sys.stderr)
        return 2
    return int(any(any(result.get("wrong", {}).values()) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
