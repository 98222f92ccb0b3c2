"""Counts rows, to find what a test has committed outside its isolation."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, Table, inspect

from app_db._databases.registry import database_of
from app_db._wording import in_one_line
from app_db.container import DatabaseContainer
from app_db.errors import SettingsError
from app_db.models._bases import metadata_of
from app_db.testing._overrides import connections_of

log = logging.getLogger("app_db")

_LONGEST_WAIT = 2
"""How long counting waits for a lock that a test has left behind, in seconds."""


class RowCounts:
    """The committed rows of the models' tables, counted when this object is made.

    `connections` names the connections to count; without it, all that can be written are counted.
    """

    def __init__(self, container: DatabaseContainer, connections: Collection[str] | None = None) -> None:
        self._container = container
        self._connections = connections
        self._before = dict(self._count())

    def differences(self, own: Collection[str] = ()) -> list[str]:
        """Count again, and return a sentence for each table whose number of rows has changed.

        `own` names the connections whose tables were made for the tests. Their tables that were
        empty are emptied again.
        """
        return [sentence for name, now in self._count() for sentence in self._differences(name, now, emptied=name in own)]

    def moved_on(self, own: Collection[str] = (), connections: Collection[str] | None = None) -> list[str]:
        """Return the same for some connections, or for all, and compare with the rows of this moment from now on."""
        found: list[str] = []
        for name, now in self._count():
            if connections is None or name in connections:
                found += self._differences(name, now, emptied=name in own)
            before = self._before.get(name)
            if name in own and not isinstance(now, str) and not isinstance(before, str | None):
                now = {table: rows if before.get(table, rows) else 0 for table, rows in now.items()}  # noqa: PLW2901
            self._before[name] = now
        return found

    def _differences(self, name: str, now: Mapping[str, int] | str, *, emptied: bool) -> Iterator[str]:
        before = self._before.get(name, {})
        if isinstance(before, str):
            return
        if isinstance(now, str):
            yield f"the rows of {name!r} can't be counted any more: {now}"
            return
        changes = {table: count - before.get(table, count) for table, count in now.items() if count != before.get(table, count)}
        again = [table for table in changes if emptied and not before[table]]
        if again:
            _empty(self._container.providers[f"{name}_engine"](), name, again)
        for table, change in changes.items():
            yield _sentence(name, table, change) + (" (deleted again)" if table in again else "")

    def _count(self) -> Iterator[tuple[str, Mapping[str, int] | str]]:
        if self._container.core.coordinator().rehearsal is not None:  # inside another isolation, committed rows can't be seen
            return
        for name in _written(self._container, self._connections):
            try:
                yield name, _rows(self._container.providers[f"{name}_engine"](), name)
            except SettingsError:  # no driver for threads is installed
                log.debug("The rows of %r can't be counted", name, exc_info=True)
            except Exception as error:
                log.debug("The rows of %r can't be counted", name, exc_info=True)
                yield name, in_one_line(error)


def _written(container: DatabaseContainer, names: Collection[str] | None) -> list[str]:
    """Return the connections with tables that the test may have written to."""
    configured = container.settings().connections
    declared = connections_of(container) if names is None else names
    return [
        name
        for name in declared
        if name in configured and configured[name].mirror is None and not configured[name].read_only and metadata_of(name).tables
    ]


def _sentence(name: str, table: str, change: int) -> str:
    rows = "row" if abs(change) == 1 else "rows"
    more = "more" if change > 0 else "fewer"
    return f"the table {table!r} of {name!r} has {abs(change)} {rows} {more} than before, committed outside the isolation"


def _empty(engine: Engine, name: str, tables: Collection[str]) -> None:
    with engine.begin() as connection:
        for table in reversed(metadata_of(name).sorted_tables):
            if table.fullname in tables:
                connection.execute(table.delete())


# ---- the query ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Query:
    """The query that counts the rows of the models' tables which exist in a database."""

    tables: Sequence[Table]
    """The models' tables at the time at which the query was made."""
    counted: Sequence[str]
    statement: str


_queries: WeakKeyDictionary[Engine, _Query] = WeakKeyDictionary()


def _rows(engine: Engine, name: str) -> dict[str, int]:
    query = _queries.get(engine)
    tables = tuple(metadata_of(name).tables.values())
    if query is None or query.tables != tables:
        query = _queries[engine] = _query(engine, tables)
    try:
        return _run(engine, query)
    except Exception:
        _queries.pop(engine, None)  # a table may have been dropped
        raise


def _query(engine: Engine, tables: Sequence[Table]) -> _Query:
    inspector = inspect(engine)
    there = {schema: set(inspector.get_table_names(schema=schema)) for schema in {table.schema for table in tables}}
    counted = [table for table in tables if table.name in there[table.schema]]
    quoted = map(engine.dialect.identifier_preparer.format_table, counted)
    parts = [f"SELECT {number}, count(*) FROM {table}" for number, table in enumerate(quoted)]  # noqa: S608  # quoted
    return _Query(tables, [table.fullname for table in counted], " UNION ALL ".join(parts))


def _run(engine: Engine, query: _Query) -> dict[str, int]:
    """Run the query on a connection of the driver: on SQLite, a transaction of SQLAlchemy's would wait for every writer."""
    if not query.statement:
        return {}
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        limit = database_of(engine.name).lock_limit(_LONGEST_WAIT)
        if limit is not None:
            cursor.execute(limit)
        cursor.execute(query.statement)
        rows = cursor.fetchall()
        cursor.close()
    finally:
        connection.close()
    return {query.counted[int(number)]: int(count) for number, count in rows}
