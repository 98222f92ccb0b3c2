"""Units of work whose writes don't show in their text, in generated orders, over all pairs of databases.

    python tests/who_wrote_at_random.py --units 5000
    python tests/who_wrote_at_random.py --units 500 --seed 7 --pair postgresql-mariadb

Half of the work are units that write to one database in a way that no text shows, and to another one whose COMMIT
fails: neither may keep anything. The other half are units that write to one database, and read, lock rows and roll back to
savepoints in three more: none of them may be refused. Rows are counted in all databases after each unit.

Each line says what was seen of one pair. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, text

from app_db.errors import NotAtomic
from harness.applications import Application
from harness.hidden_writes import FAIL_AT_COMMIT, INSERT, KINDS, Step
from harness.servers import MariaDBServer, PostgresServer, Server, ServerMissing, quick_tempdir

MAKERS: dict[str, Callable[[], Server]] = {"postgresql": PostgresServer, "mariadb": MariaDBServer}

EXAMPLES = 3
"""How many units that went wrong are shown for each pair."""

OTHERS = ("first", "second", "third")

_numbers = count(1)


@dataclass
class Seen:
    """What was seen of one pair."""

    units: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


# ---- where units run ------------------------------------------------------------------------------------------------


class Databases:
    """The servers of a run, started when they are first needed, and SQLite's files."""

    def __init__(self, stack: ExitStack) -> None:
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=quick_tempdir())))
        self._stack = stack
        self._started: dict[str, Server] = {}

    def url(self, kind: str) -> str:
        """Make a database."""
        name = f"d{next(_numbers)}"
        if kind == "sqlite":
            return f"sqlite:///{self._directory / name}.db"
        server = self.server(kind)
        server.create_database(name)
        return server.url(name)

    def server(self, kind: str) -> Server:
        if kind not in self._started:
            server = MAKERS[kind]()
            self._stack.callback(server.close)
            self._started[kind] = server.start()
        return self._started[kind]


class Place(Application):
    """An application on several databases of these kinds."""

    def __init__(self, kinds: dict[str, str], databases: Databases, *, two_phase: bool) -> None:
        self.kinds = {name: KINDS[kind] for name, kind in kinds.items()}
        given = {name: {"url": databases.url(kind), "two_phase": two_phase and kind != "sqlite"} for name, kind in kinds.items()}
        logs = [name for name, kind in kinds.items() if kind == "sqlite"] or list(kinds)
        super().__init__(given, decision_log=logs[0] if two_phase else None)
        self._looking: dict[str, Connection] = {}
        for name, kind in kinds.items():
            if kind == "sqlite":
                self.define_writing_function(name)
            self.run(*self.kinds[name].schema, on=name)
            self.put("seed", on=name)
            engine = create_engine(self.plain_engine(name).url, isolation_level="AUTOCOMMIT")
            self._looking[name] = engine.connect()

    def state(self, name: str) -> list[tuple[Any, ...]]:
        """Return what is committed in a database."""
        connection = self._looking[name]
        return [tuple(row) for query in self.kinds[name].state for row in connection.exec_driver_sql(query)]

    def close(self) -> None:
        for connection in self._looking.values():
            connection.close()
            connection.engine.dispose()
        super().close()


@contextmanager
def killed_at_commit(app: Place, name: str) -> Iterator[None]:
    """Kill the server's connection of MariaDB right before each COMMIT."""

    def kill(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        app.run(f"KILL CONNECTION {driver.thread_id()}", on=name)

    engine = app.engine(name)
    event.listen(engine, "commit", kill)
    try:
        yield
    finally:
        event.remove(engine, "commit", kill)


# ---- what units do --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A step of a unit, on one of its connections."""

    connection: str
    name: str
    step: Step

    def __str__(self) -> str:
        return f"{self.connection}: {self.name}"


def around(app: Place, name: str, least: int = 0) -> list[Planned]:
    """Return up to three steps that change nothing."""
    looking = app.kinds[name].looking
    return [Planned(name, chosen, looking[chosen]) for chosen in random.choices(list(looking), k=random.randint(least, 3))]


def hidden(app: Place, name: str, *, visible_after: bool = False) -> Planned:
    """Return a write that the text does not show, or, where it is to be seen from outside, perhaps one that it does."""
    kind = app.kinds[name]
    known = [chosen for chosen in kind.hidden if not (visible_after and chosen in kind.invisible)]
    chosen = random.choice([*known, *(["said"] if visible_after else [])])
    return Planned(name, chosen, kind.hidden.get(chosen, said))


def said(session: Any) -> None:
    session.execute(text(INSERT))


def fail(session: Any) -> None:
    session.execute(text(FAIL_AT_COMMIT))


def mixed(*lists: list[Planned]) -> list[Planned]:
    """Return the steps of several lists, each in its own order."""
    queues = [list(reversed(one)) for one in lists]
    result: list[Planned] = []
    while queues := [queue for queue in queues if queue]:
        result.append(random.choice(queues).pop())
    return result


def execute(app: Place, plan: list[Planned], noted: list[str]) -> None:
    """Run one unit, with savepoints over whatever it uses, and note its steps."""
    with app.unit() as unit:
        for planned in plan:
            if random.random() < 0.1:
                savepoint = unit.savepoint()
                noted.append("savepoint")
                if random.random() < 0.5:
                    app.session(planned.connection).execute(text("SELECT name FROM items"))
                    savepoint.rollback()
                    noted.append(f"{planned.connection}: rows, rollback to the savepoint")
            noted.append(str(planned))
            planned.step(app.session(planned.connection))


def run(app: Place, seen: Seen, plan: list[Planned], judge: Callable[[dict[str, Any], dict[str, Any], str], str | None]) -> None:
    """Run one unit and judge it by the states before and after, and its error."""
    before = {name: app.state(name) for name in app.kinds}
    outcome, error, noted = "committed", "", list[str]()
    try:
        execute(app, plan, noted)
    except Exception as raised:
        outcome, error = type(raised).__name__, " ".join(str(raised).split())[:110]
    after = {name: app.state(name) for name in app.kinds}
    seen.units += 1
    seen.outcomes[outcome] += 1
    problem = judge(before, after, outcome)
    if problem is not None:
        changed = [name for name in app.kinds if before[name] != after[name]]
        seen.wrong.append(f"{problem} ({outcome} {error}; changed: {changed}; steps: {', '.join(noted)})")


# ---- the two halves -------------------------------------------------------------------------------------------------


def partial_commits(writer: str, warehouse: str, units: int, databases: Databases, *, two_phase: bool) -> Seen:
    """Write to one database unseen, and to another one whose COMMIT fails."""
    seen = Seen()

    def judge(before: dict[str, Any], after: dict[str, Any], outcome: str) -> str | None:
        if before != after:
            return "something was committed"
        return None if outcome == NotAtomic.__name__ or (two_phase and outcome != "committed") else "it was not refused"

    with Place({"writer": writer, "warehouse": warehouse}, databases, two_phase=two_phase) as app, ExitStack() as stack:
        if app.kinds["warehouse"].fails_at_commit:
            failing = Planned("warehouse", "fails at COMMIT", fail)
        else:
            stack.enter_context(killed_at_commit(app, "warehouse"))
            failing = Planned("warehouse", "is killed at COMMIT", said)
        for _ in range(units):
            plan = mixed(
                [*around(app, "writer"), hidden(app, "writer"), *around(app, "writer")],
                [*around(app, "warehouse"), failing, *around(app, "warehouse")],
            )
            run(app, seen, plan, judge)
    return seen


def false_refusals(writer: str, others: tuple[str, ...], units: int, databases: Databases) -> Seen:
    """Write to one database, and use three others without a change."""
    seen = Seen()

    def judge(before: dict[str, Any], after: dict[str, Any], outcome: str) -> str | None:
        if outcome != "committed":
            return "it was refused"
        changed = [name for name in before if before[name] != after[name]]
        return None if changed == ["writer"] else "the writes are not as they should be"

    with Place({"writer": writer, **dict(zip(OTHERS, others, strict=True))}, databases, two_phase=False) as app:
        for _ in range(units):
            writes = [hidden(app, "writer", visible_after=True) for _ in range(random.randint(1, 2))]
            written = [*around(app, "writer"), *writes[:1], *around(app, "writer"), *writes[1:]]
            run(app, seen, mixed(written, *(around(app, name, 1) for name in OTHERS)), judge)
    return seen


# ---- the command ----------------------------------------------------------------------------------------------------


def jobs(units: int, pair: str | None) -> Iterator[tuple[str, Callable[[Databases], Seen]]]:
    """Return what there is to run, with the share of the units that each gets."""
    pairs = [
        (writer, warehouse, two_phase)
        for writer, warehouse in product(KINDS, KINDS)
        for two_phase in (False, True)
        # Two-phase needs a database that can prepare, and one that refuses at the end without having been killed.
        if not two_phase or (KINDS[warehouse].fails_at_commit and (writer, warehouse) != ("sqlite", "sqlite"))
    ]
    layouts = [(writer, others) for writer in KINDS for others in (tuple(KINDS), (writer,) * 3)]
    wanted = [one for one in pairs if pair in (None, f"{one[0]}-{one[1]}")]
    for number, (writer, warehouse, two_phase) in enumerate(wanted):
        share = units // len(wanted) + (number < units % len(wanted))
        said = f"{writer} unseen, {warehouse} fails{', two-phase' if two_phase else ''}"
        yield said, _partly(writer, warehouse, share, two_phase)
    if pair is not None:
        writer, other = pair.split("-")
        layouts = [(writer, (other,) * 3)]
    for number, (writer, others) in enumerate(layouts):
        share = units // len(layouts) + (number < units % len(layouts))
        yield f"{writer} written, {', '.join(others)} only looked at", _alone(writer, others, share)


def _partly(writer: str, warehouse: str, units: int, two_phase: bool) -> Callable[[Databases], Seen]:
    return lambda databases: partial_commits(writer, warehouse, units, databases, two_phase=two_phase)


def _alone(writer: str, others: tuple[str, ...], units: int) -> Callable[[Databases], Seen]:
    return lambda databases: false_refusals(writer, others, units, databases)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=5000, help="of each half")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--pair", default=None, help="only this pair, as postgresql-mariadb, in both halves")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    random.seed(seed)
    print(f"seed {seed}", flush=True)
    wrong = units = 0
    with ExitStack() as stack:
        databases = Databases(stack)
        for name, job in jobs(options.units, options.pair):
            began = time.monotonic()
            try:
                seen = job(databases)
            except ServerMissing as missing:
                print(f"{name}: not run, {missing}", flush=True)
                continue
            units += seen.units
            wrong += len(seen.wrong)
            took = time.monotonic() - began
            print(f"{name}: {seen.units} units in {took:.0f} s, {dict(seen.outcomes)}, {len(seen.wrong)} wrong", flush=True)
            for example in seen.wrong[:EXAMPLES]:
                print(f"    {example}", flush=True)
    print(f"{units} units, {wrong} wrong; again with --seed {seed}")
    return 1 if wrong or not units else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
