"""The tests' small application on databases that can prepare, and what they say of each other's commits.

    with two_phasing("file:/tmp/decisions", writer=url, warehouse=another_url) as app:
        with app.unit():
            app.add("a", "writer")
            app.add("a", "warehouse")

Servers that can prepare do so, unless they are given as `without(url)`. When the block ends nothing may be in use, prepared or
open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
from sqlalchemy import make_url, text

from app_db._databases.concurrent_statements import Results, execute_together
from app_db._two_phase.decisions import Decision
from app_db._two_phase.recovery import Settlement
from app_db._two_phase.xids import Xid
from harness.applications import Application, Atomicity, Settings
from harness.servers import MariaDBServer, PostgresServer

_applications = count(1)
_databases = count(1)

OPEN = """
    SELECT pid, state, query FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = '{}' AND xact_start IS NOT NULL
    """
PREPARED = {"postgresql": "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()", "mysql": "XA RECOVER"}


def without(url: str, **settings: Any) -> dict[str, Any]:
    """The settings of a connection that does not prepare."""
    return {"url": url, "two_phase": False, **settings}


class TwoPhaseApplication(Application):
    """An application whose connections prepare, as far as their databases can."""

    def __init__(self, connections: Mapping[str, Settings], decision_log: str | None, atomicity: Atomicity) -> None:
        given = {name: _preparing({"url": what} if isinstance(what, str) else dict(what)) for name, what in connections.items()}
        self.application = f"shop{next(_applications)}"  # MariaDB's xids are the whole server's
        super().__init__(given, atomicity, application=self.application, decision_log=decision_log)

    def add_to_each(self, item: str, *names: str) -> None:
        """Add an item on each of these connections, or on all."""
        for name in names or self.connections:
            self.add(item, name)

    def everywhere(self) -> dict[str, list[str]]:
        """The names of the committed items, by connection."""
        return {name: self.names(name) for name in self.connections}

    def recover(self) -> Settlement:
        return self.container.recovery().settle(grace=0)

    def decisions(self, place: str = "") -> list[Decision]:
        """What stands in the configured log, or in the table of a connection's database."""
        places = self.container.core.decision_logs()
        return (places.of(place) if place else places.configured).decisions()

    def prepared(self) -> list[str]:
        """The xids of this application that are prepared now."""
        found: set[str] = set()
        for engine in self._plain.values():
            if engine.dialect.name in PREPARED:
                with engine.connect() as connection:
                    found |= {str(row[-1]) for row in connection.exec_driver_sql(PREPARED[engine.dialect.name])}
        return sorted(xid for xid in found if (read := Xid.parse(xid)) and read.application == self.application)

    def open(self) -> list[tuple[Any, ...]]:
        """The transactions that this application has open on PostgreSQL."""
        found: list[tuple[Any, ...]] = []
        for engine in self._plain.values():
            if engine.dialect.name == "postgresql":
                with engine.connect() as connection:
                    found += [tuple(row) for row in connection.exec_driver_sql(OPEN.format(self.application))]
        return found

    def leftovers(self) -> list[object]:
        """What a unit must not leave behind. A server notices late that a client has gone."""
        deadline = time.monotonic() + 3
        while (found := [*super().leftovers(), *self.prepared(), *self.open()]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found


def _preparing(given: dict[str, Any]) -> dict[str, Any]:
    can = "url" in given and make_url(given["url"]).get_backend_name() != "sqlite"
    return {"two_phase": can and not given.get("read_only"), **given}


def two_phasing(
    decision_log: str | None = None, atomicity: Atomicity = "strict", /, **connections: Settings
) -> TwoPhaseApplication:
    """An application on these databases for the length of a block."""
    return TwoPhaseApplication(connections, decision_log, atomicity)


# ---- what servers have heard ------------------------------------------------------------------------------------------


WORDS = (
    "PREPARE TRANSACTION",
    "COMMIT PREPARED",
    "ROLLBACK PREPARED",
    "COMMIT",
    "ROLLBACK",
    "BEGIN",
    "INSERT INTO app_db_decisions",
)
WORDS_OF_XA = ("XA START", "XA END", "XA PREPARE", "XA COMMIT", "XA ROLLBACK")


@contextmanager
def listening_to_postgres(
    server: PostgresServer, app: TwoPhaseApplication, *only: str
) -> Iterator[Callable[[], list[tuple[str, str]]]]:
    """Have the server note what this application says; gives (connection, word) in the order of the server's log."""
    listened = [name for name in only or app.connections if app.plain_engine(name).dialect.name == "postgresql"]
    names = {app.plain_engine(name).url.database: name for name in listened}
    for database in names:
        server.execute(f"ALTER DATABASE \"{database}\" SET log_statement = 'all'")
    for name in listened:
        app.engine(name).dispose()
        app.engine(name).connect().close()  # what is said on connecting doesn't count
    start = len(server.log_lines())

    def heard() -> list[tuple[str, str]]:
        found = []
        for line in server.log_lines()[start:]:
            for marker in ("statement: ", "execute <unnamed>: ", "execute _pg"):
                before, marked, statement = line.partition(marker)
                if marked and f" {app.application} " in before:
                    if marker.startswith("execute _pg"):
                        statement = statement.partition(": ")[2]
                    database = before.partition("] ")[2].split(" ")[0]
                    word = next((word for word in WORDS if statement.startswith(word)), statement.split(" ")[0])
                    found.append((names[database], word))
        return found

    yield heard


@contextmanager
def listening_to_mariadb(server: MariaDBServer, app: TwoPhaseApplication) -> Iterator[Callable[[], list[str]]]:
    """Have the server note everything that is said in the block; gives what this application's branches were told."""
    server.execute("SET GLOBAL log_output = 'TABLE'")
    server.execute("SET GLOBAL general_log = ON")

    def heard() -> list[str]:
        rows = server.execute("SELECT CONVERT(argument USING utf8mb4) FROM mysql.general_log WHERE command_type = 'Query'")
        ours = [str(row[0]) for row in rows if f"'{app.application}:" in str(row[0])]
        return [word for statement in ours for word in WORDS_OF_XA if statement.startswith(word)]

    try:
        yield heard
    finally:
        server.execute("SET GLOBAL general_log = OFF")
        server.execute("TRUNCATE TABLE mysql.general_log")


# ---- coming between -------------------------------------------------------------------------------------------------


def between(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object], *, after: bool = False) -> list[int]:
    """Run `act` before (or after) the commit's exchange of that number, counted from 1: 1 prepares, 2 tells how it ends.

    Returns the exchanges that took place."""
    seen: list[int] = []

    def interrupted(lines: Any, **options: Any) -> Results[Any]:
        seen.append(len(seen) + 1)
        ours = len(seen) == number
        if ours and not after:
            act()
        answers = execute_together(lines, **options)
        if ours and after:
            act()
        return answers

    monkeypatch.setattr("app_db._units.commit.execute_together", interrupted)
    return seen


def backend_of(app: Application, name: str) -> int:
    """The server's id of the connection that a session of the unit uses."""
    query = "SELECT pg_backend_pid()" if app.plain_engine(name).dialect.name == "postgresql" else "SELECT CONNECTION_ID()"
    return int(app.session(name).scalar(text(query)) or 0)


def kill_backend(app: Application, name: str, backend: int) -> None:
    """Have the server end a connection, and wait until it has."""
    if app.plain_engine(name).dialect.name == "postgresql":
        app.run(f"SELECT pg_terminate_backend({backend}, 5000)", on=name)
    else:
        app.run(f"KILL {backend}", on=name)
        time.sleep(0.1)


def sessions_of(app: Application, name: str, number: int) -> Sequence[Any]:
    """Several sessions of one connection in the unit that is under way."""
    maker = getattr(app.container, f"{name}_scoped_session")().session_factory
    return [maker() for _ in range(number)]
