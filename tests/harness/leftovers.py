"""What units of work left in their databases: rows, prepared transactions, locks. Nothing here knows of app_db."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import NullPool, create_engine, make_url, text

from harness.servers import MariaDBServer, PostgresServer, Server

POSTGRESQL_LOCKS = """
    SELECT locktype, mode, pid, relation::regclass::text FROM pg_locks
    WHERE database = (SELECT oid FROM pg_database WHERE datname = %s) AND pid IS DISTINCT FROM pg_backend_pid()
    """
MARIADB_LOCKS = "SELECT trx_id, trx_state, trx_mysql_thread_id, trx_tables_locked FROM information_schema.innodb_trx"


@dataclass(frozen=True)
class Site:
    """A database of the tests, on its server; SQLite has none."""

    url: str
    server: Server | None = None

    @property
    def database(self) -> str:
        return str(make_url(self.url).database)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement beside everybody else and commit it; return the rows if there are any."""
        engine = create_engine(self.url, poolclass=NullPool)
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []

    def items(self) -> set[str]:
        """The names of the items that are committed."""
        return {name for (name,) in self.query("SELECT name FROM item")}

    def prepared(self) -> list[str]:
        """The transactions that are prepared; on MariaDB those of the whole server."""
        return [] if self.server is None else self.server.prepared_transactions(self.database)

    def locks(self) -> list[tuple[Any, ...]]:
        """The locks that are held; on MariaDB the transactions of the whole server."""
        if isinstance(self.server, PostgresServer):
            return self.server.execute(POSTGRESQL_LOCKS, [self.database])
        if isinstance(self.server, MariaDBServer):
            time.sleep(0.15)  # the table is a copy, renewed when nobody has read it for so long
            return self.server.execute(MARIADB_LOCKS)
        self.query("CREATE TABLE lockable (id INTEGER)")
        self.query("DROP TABLE lockable")
        return []


def rows_of(units: Iterable[str], sites: Mapping[str, Site]) -> dict[str, dict[str, bool]]:
    """For each unit, and each database: whether its item is there."""
    items = {name: site.items() for name, site in sites.items()}
    return {unit: {name: unit in there for name, there in items.items()} for unit in units}


def left_in(sites: Sequence[Site], within: float = 5.0) -> list[object]:
    """Prepared transactions, and locks, which the connections of dead processes hold for a little longer."""
    prepared: list[object] = [gid for site in sites for gid in site.prepared()]
    return prepared + [lock for site in sites for lock in _until_none(site.locks, within)]


def _until_none(find: Callable[[], list[Any]], within: float) -> list[Any]:
    deadline = time.monotonic() + within
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
