"""Branches that a crash left prepared, made by raw SQL, and an application whose recovery is to find them.

with stranded(writer=url, warehouse=another_url) as scene:
    scene.prepare(unit := scene.new_unit(), "writer", "warehouse")
    scene.recover()
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, NullPool, create_engine, make_url

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db._two_phase.decisions import DecisionLog, Verdict
from app_db._two_phase.recovery import Settlement
from app_db._two_phase.xids import Xid, new_unit_id

_applications = count(1)


class Scene:
    """Databases with a table `t`, the settings of an application that uses them, and its container."""

    def __init__(self, connections: Mapping[str, Any], *, declared: tuple[str, ...] | None = None, **common: Any) -> None:
        given: dict[str, dict[str, Any]] = {
            name: {"url": what} if isinstance(what, str) else dict(what) for name, what in connections.items()
        }
        for settings in given.values():
            settings.setdefault("two_phase", make_url(settings["url"]).get_backend_name() != "sqlite")
        # MariaDB's xids are the whole server's.
        self.given: dict[str, Any] = {"application": f"stranded{next(_applications)}", **common, "connections": given}
        self.settings = DatabaseSettings(_env_file=None, **self.given)
        self.declared = tuple(given) if declared is None else declared
        self._stack = ExitStack()
        self.container = self.new_container()
        self.engines: dict[str, Engine] = {
            name: create_engine(self.settings.connection(name).sqlalchemy_url(), poolclass=NullPool) for name in given
        }
        self._held: list[Connection] = []

    def close(self) -> None:
        self.let_go()
        self._stack.close()

    def new_container(self, **changed: Any) -> DatabaseContainer:
        settings = DatabaseSettings(_env_file=None, **{**self.given, **changed})
        container = container_of(*self.declared)(settings=settings)
        self._stack.callback(container.shutdown_resources)
        return container

    # -- databases

    def make_tables(self, *names: str) -> None:
        for name in names or self.engines:
            self.run(name, "CREATE TABLE IF NOT EXISTS t (unit varchar(40))")

    def run(self, name: str, *statements: str) -> None:
        with self.engines[name].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def rows(self, name: str) -> list[str]:
        with self.engines[name].connect() as connection:
            return sorted(connection.exec_driver_sql("SELECT unit FROM t").scalars())

    def prepared(self, name: str) -> list[str]:
        """What is prepared in a database, or on a server, of whomever."""
        postgres = self.engines[name].dialect.name == "postgresql"
        statement = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()" if postgres else "XA RECOVER"
        with self.engines[name].connect() as connection:
            found = [str(row[-1]) for row in connection.exec_driver_sql(statement)]
        return sorted(found)

    def ours(self, name: str) -> list[str]:
        """What is prepared of this application."""
        return [gid for gid in self.prepared(name) if gid.startswith(f"{self.settings.application}:")]

    # -- what a dead committer leaves

    @property
    def log(self) -> DecisionLog:
        return self.container.core.decision_logs().configured

    def new_unit(self, place: str = "") -> str:
        """The name of a unit that is decided in the configured log, or in the table of a connection's database."""
        return new_unit_id(self._log_of(place).id)

    def _log_of(self, place: str) -> DecisionLog:
        return self.container.core.decision_logs().of(place) if place else self.log

    def prepare(self, unit: str, *names: str, application: str = "", hold: bool = False) -> str:
        """Leave branches of a unit prepared, each with a row, and the unit's name in it; return the unit."""
        for name in names:
            self.prepare_as(str(Xid(application or self.settings.application, unit, name)), name.partition(".")[0], unit, hold)
        return unit

    def prepare_as(self, gid: str, name: str, row: str = "?", hold: bool = False, engine: Engine | None = None) -> None:
        engine = engine or self.engines[name]
        insert = f"INSERT INTO t VALUES ('{row}')"
        statements = {
            "postgresql": ["BEGIN", insert, f"PREPARE TRANSACTION '{gid}'"],
            "mysql": [f"XA START '{gid}'", insert, f"XA END '{gid}'", f"XA PREPARE '{gid}'"],
        }[engine.dialect.name]
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        driver_connection: Any = connection.connection.driver_connection
        with driver_connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
        if hold:
            self._held.append(connection)
            return
        connection.close()
        if engine.dialect.name == "mysql":
            time.sleep(0.1)  # the server notices a little later that the client is gone

    def let_go(self) -> None:
        """Close the connections that hold their branches."""
        if not self._held:
            return
        for connection in self._held:
            connection.invalidate()  # without a rollback, which the server refuses
            connection.close()
        self._held.clear()
        time.sleep(0.1)  # as above

    def decide(self, unit: str, *names: str, verdict: Verdict = Verdict.COMMIT, place: str = "") -> None:
        assert self._log_of(place).decide(unit, verdict, names) is verdict

    def move(self, unit: str, place: str, *names: str) -> None:
        """Have the configured log say that a unit is decided in the table of a connection's database."""
        assert self.log.decide(unit, Verdict.MOVED, [self._log_of(place).id, *names]) is Verdict.MOVED

    def age(self, seconds: float, place: str = "writer") -> None:
        """Have the decisions in a table be older."""
        self.run(place, f"UPDATE app_db_decisions SET decided_at = decided_at - {seconds}")

    def decisions(self, place: str = "") -> dict[str, str]:
        return {decision.unit: str(decision.verdict) for decision in self._log_of(place).decisions()}

    # -- what recovery does

    def recover(self, **options: Any) -> Settlement:
        return self.container.recovery().settle(**{"grace": 0, **options})


@contextmanager
def stranded(*, declared: tuple[str, ...] | None = None, **given: Any) -> Iterator[Scene]:
    """A scene for the length of the block; whatever is a URL or a mapping with one is a connection."""
    connections = {
        name: what for name, what in given.items() if isinstance(what, Mapping) or (isinstance(what, str) and "://" in what)
    }
    scene = Scene(connections, declared=declared, **{name: what for name, what in given.items() if name not in connections})
    try:
        yield scene
    finally:
        scene.close()


def states(settlement: Settlement) -> dict[str, dict[str, str]]:
    """What became of each branch, by unit and connection."""
    return {unit.unit: {branch.connection: str(branch.state) for branch in unit.branches} for unit in settlement.units}


def sqlite_file(url: str) -> Path:
    return Path(str(make_url(url).database))
