"""Copies a schema of MariaDB or MySQL, which have no statement for that: tables, rows, sequences, views, routines, triggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

_MODES = "NO_AUTO_VALUE_ON_ZERO"
"""Without this, a row whose key is 0 gets another key."""


def copy_schema(connection: Connection, source: str, target: str) -> None:
    """Create the schema `target` with all that is in `source`. The connection uses `target` afterwards."""
    copy = _Copy(connection, source, target)
    copy.create()
    kinds = copy.tables()
    names = [name for name, kind in kinds.items() if kind not in ("VIEW", "SEQUENCE")]
    for name, kind in kinds.items():
        if kind == "SEQUENCE":
            copy.sequence(name)
    for name in names:
        copy.table(name)
    for name in names:
        copy.rows(name)
    copy.routines()
    copy.views([name for name, kind in kinds.items() if kind == "VIEW"])
    copy.triggers()


class _Copy:
    def __init__(self, connection: Connection, source: str, target: str) -> None:
        self._connection = connection
        self._names = {"source": source, "target": target}
        quote = connection.dialect.identifier_preparer.quote_identifier
        self._quote: Callable[[str], str] = quote
        self._source, self._target = quote(source), quote(target)

    def _run(self, statement: str) -> None:
        self._connection.exec_driver_sql(statement)

    def _rows(self, statement: str) -> list[tuple[str, ...]]:
        return [tuple(row) for row in self._connection.execute(text(statement), self._names)]

    def _shown(self, kind: str, name: str, column: int) -> str:
        """Return the statement that creates an object of `source`."""
        row = self._connection.exec_driver_sql(f"SHOW CREATE {kind} {self._source}.{self._quote(name)}").one()
        return str(row[column])

    def create(self) -> None:
        character_set, collation = self._rows(
            "SELECT default_character_set_name, default_collation_name FROM information_schema.schemata "
            "WHERE schema_name = :source"
        )[0]
        self._run(f"CREATE DATABASE {self._target} CHARACTER SET {character_set} COLLATE {collation}")
        self._run(f"USE {self._target}")
        self._run(f"SET SESSION foreign_key_checks = 0, unique_checks = 0, sql_mode = CONCAT(@@sql_mode, ',{_MODES}')")

    def tables(self) -> dict[str, str]:
        rows = self._rows(
            "SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = :source ORDER BY table_name"
        )
        return {str(name): str(kind) for name, kind in rows}

    def sequence(self, name: str) -> None:
        self._run(self._shown("SEQUENCE", name, 1))
        quoted = self._quote(name)
        following = self._connection.exec_driver_sql(f"SELECT next_not_cached_value FROM {self._source}.{quoted}").scalar()  # noqa: S608  # quoted
        self._run(f"DO SETVAL({self._target}.{quoted}, {following}, 0)")

    def table(self, name: str) -> None:
        self._run(self._shown("TABLE", name, 1))

    def rows(self, name: str) -> None:
        columns = self._connection.execute(
            text(
                "SELECT column_name FROM information_schema.columns WHERE table_schema = :source AND table_name = :name "
                "AND COALESCE(generation_expression, '') = '' ORDER BY ordinal_position"
            ),
            {**self._names, "name": name},
        ).scalars()
        listed, table = ", ".join(map(self._quote, columns)), self._quote(name)
        self._run(f"INSERT INTO {self._target}.{table} ({listed}) SELECT {listed} FROM {self._source}.{table}")  # noqa: S608  # quoted

    def routines(self) -> None:
        found = "SELECT routine_type, routine_name FROM information_schema.routines WHERE routine_schema = :source"
        for kind, name in self._rows(found):
            self._run(self._shown(kind, name, 2))

    def views(self, names: list[str]) -> None:
        """Create the views. One that needs another fails until that is there."""
        while names:
            failed = [name for name in names if not self._is_view_made(name, last=len(names) == 1)]
            if len(failed) == len(names):
                self._is_view_made(failed[0], last=True)
            names = failed

    def _is_view_made(self, name: str, *, last: bool) -> bool:
        statement = self._shown("VIEW", name, 1).replace(f"{self._source}.", f"{self._target}.")
        try:
            self._run(statement)
        except DBAPIError:
            if last:
                raise
            return False
        return True

    def triggers(self) -> None:
        found = "SELECT trigger_name FROM information_schema.triggers WHERE trigger_schema = :source ORDER BY action_order"
        for (name,) in self._rows(found):
            self._run(self._shown("TRIGGER", name, 2))
