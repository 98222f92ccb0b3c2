"""What a test run writes into the databases that it makes: which run made what, and by which models.

A run that ends takes its marks away with what it made. So a mark of a process that is gone says
that the run was killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import Column, Connection, Dialect, Integer, MetaData, String, Table, Text, inspect, select
from sqlalchemy.schema import CreateIndex, CreateTable

from app_db.models._schema import TEST_RUN

DATABASE = ""
"""The subject of the mark of a whole database. The others are names of connections, for their tables."""

_MARKS = Table(
    TEST_RUN,
    MetaData(),
    Column("subject", String(100), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("since", String(40), nullable=False),
    Column("kept", Integer, nullable=False),
    Column("tables", Text, nullable=False),
    mysql_engine="InnoDB",
    mariadb_engine="InnoDB",
)


def _now() -> str:
    return datetime.now(UTC).isoformat(sep=" ", timespec="seconds")


_STARTED = _now()


@dataclass(frozen=True)
class Mark:
    """The mark of a test run."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    since: str = field(default_factory=_now)
    kept: bool = False
    """Whether the run has ended, and has kept what it made for the next one."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """The tables that were made, each with a fingerprint of its DDL."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_ours(self) -> bool:
        """Whether this process has made the mark."""
        # In a container, the process of each run may have the same host name and number.
        return (self.host, self.pid) == (socket.gethostname(), os.getpid()) and self.since >= _STARTED

    @property
    def is_alive(self) -> bool:
        """Whether the run is under way in another process of this host."""
        return (
            not self.kept
            and not self.is_ours
            and self.host == socket.gethostname()
            and self.pid != os.getpid()
            and _is_alive(self.pid)
        )

    @property
    def is_other_run(self) -> bool:
        """Whether the run may be under way in another process. One of another host can't be asked."""
        return self.is_alive or not (self.kept or self.host == socket.gethostname())

    @property
    def is_left(self) -> bool:
        """Whether the run was killed, on this host."""
        return not (self.kept or self.is_ours or self.is_other_run)

    def changed(self, now: Mapping[str, str]) -> list[str]:
        """Return the tables that the models describe otherwise than when they were made."""
        return sorted(name for name, fingerprint in now.items() if self.tables.get(name, fingerprint) != fingerprint)

    def changed_or_removed(self, now: Mapping[str, str]) -> list[str]:
        """Return the tables that have changed, and the tables for which this run has imported no model."""
        removed = {f"{name} (this run imports no model of it)" for name in self.tables.keys() - now.keys()}
        return sorted({*self.changed(now), *removed})


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # os.kill() would end it
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True


def fingerprints(tables: list[Table], dialect: Dialect) -> dict[str, str]:
    """Return a fingerprint of the DDL of each table, by the table's name."""
    return {table.fullname: _hashed(table, dialect) for table in tables}


def fingerprints_of_made(tables: list[Table], connection: Connection) -> dict[str, str]:
    """Return the fingerprints of those tables that are in the database. A test may define a model and make no table of it."""
    inspector = inspect(connection)
    there = [table for table in tables if inspector.has_table(table.name, schema=table.schema)]
    return fingerprints(there, connection.dialect)


def _hashed(table: Table, dialect: Dialect) -> str:
    parts: list[CreateTable | CreateIndex] = [
        CreateTable(table),
        *map(CreateIndex, sorted(table.indexes, key=lambda index: str(index.name))),
    ]
    return hashlib.sha256("\n".join(str(part.compile(dialect=dialect)) for part in parts).encode()).hexdigest()[:16]


# ---- in a database ------------------------------------------------------------------------------------------------------


def marks_in(connection: Connection) -> dict[str, Mark]:
    """Return the marks in a database, by subject."""
    if not inspect(connection).has_table(TEST_RUN):
        return {}
    rows = connection.execute(select(_MARKS)).mappings()
    return {
        row["subject"]: Mark(row["host"], row["pid"], row["since"], bool(row["kept"]), json.loads(row["tables"])) for row in rows
    }


def put(connection: Connection, subject: str, mark: Mark) -> None:
    """Write a mark, in place of the one that there may be."""
    _MARKS.create(connection, checkfirst=True)
    connection.execute(_MARKS.delete().where(_MARKS.c.subject == subject))
    values = {"host": mark.host, "pid": mark.pid, "since": mark.since, "kept": int(mark.kept)}
    connection.execute(_MARKS.insert().values(subject=subject, tables=json.dumps(dict(mark.tables)), **values))


def take(connection: Connection, subject: str) -> None:
    """Take a mark away, and the table of marks with the last one."""
    connection.execute(_MARKS.delete().where(_MARKS.c.subject == subject))
    if connection.execute(select(_MARKS.c.subject)).first() is None:
        _MARKS.drop(connection)
