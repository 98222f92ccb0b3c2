"""The tables that tests make: what earlier runs have left is recognised by its mark, and only that is ever dropped."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from sqlalchemy import Engine, MetaData, Table, func, inspect, select

from app_db.container import DatabaseContainer
from app_db.errors import CannotMakeTables
from app_db.models._schema import change, own_tables, steps, writable
from app_db.testing._marks import Mark, fingerprints, fingerprints_of_made, marks_in, put, take
from app_db.testing._runner import runner


@contextmanager
def made_tables(container: DatabaseContainer) -> Generator[frozenset[str]]:
    """Create the tables of the models for the length of the block. It gives the names of the connections that had none before.

    At the end it drops the tables of those connections only. Until then, a mark in each database
    says which process has made them. So the next run recognises the tables of one that was killed:
    it makes them anew if they are empty, and leaves them alone if there are rows. Raises
    CannotMakeTables if there are rows and the models have changed.
    """
    runner().prepare(container)
    made = [name for name in writable(container, ()) if _Tables(container, name).are_ours()]
    for name in made:
        _Tables(container, name).put(Mark())
    container.create_all()
    try:
        yield frozenset(made)
    finally:
        for name in reversed(made):
            tables = _Tables(container, name)
            if runner().reuse:
                tables.keep()
            else:
                container.drop_all(name)
                tables.unmark()


class _Tables:
    """The tables of a connection's models, and what is in the database of them."""

    def __init__(self, container: DatabaseContainer, name: str) -> None:
        self._container, self._name = container, name
        self._engine: Engine = container.providers[f"{name}_engine"]()
        self._tables = own_tables(name)
        self._now = fingerprints(self._tables, self._engine.dialect)

    def put(self, mark: Mark) -> None:
        with self._engine.begin() as connection:
            put(connection, self._name, replace(mark, tables=self._now))

    def keep(self) -> None:
        """Mark the tables that are there as kept for the next run."""
        with self._engine.begin() as connection:
            put(connection, self._name, Mark(kept=True, tables=fingerprints_of_made(self._tables, connection)))

    def unmark(self) -> None:
        with self._engine.begin() as connection:
            take(connection, self._name)

    def are_ours(self) -> bool:
        """Return whether this run has to make the tables, or uses those that an earlier one has kept for it."""
        with self._engine.begin() as connection:
            marks = marks_in(connection)
            inspector = inspect(connection)
            there = [table for table in self._tables if inspector.has_table(table.name, schema=table.schema)]
        mark = marks.get(self._name)
        if mark is None or mark.is_ours:
            if there and runner().create and not marks:
                raise CannotMakeTables(
                    self._name,
                    f"there is {there[0].fullname!r} already, which no test run has made, and --app-db-create drops only what "
                    "a test run has made",
                    f"Give the tests another database, by --app-db-url {self._name}=URL, or drop the tables yourself",
                )
            return not there
        if mark.is_alive or (mark.is_other_run and not runner().create):
            advice = "" if mark.is_alive else ". If that host is gone, `pytest --app-db-create` makes them anew"
            runner().tell(f"the tables of {self._name!r} are in use by another test run: {mark}{advice}")
            return False
        return self._of_earlier_run(mark, there)

    def _of_earlier_run(self, mark: Mark, there: list[Table]) -> bool:
        # A run that reuses tables replaces the mark, and with it the names of the tables that are to be dropped one day.
        changed = mark.changed_or_removed(self._now) if runner().reuse else mark.changed(self._now)
        rows = self._rows(there)
        listed = ", ".join(f"{name} ({count})" for name, count in rows.items())
        made_by = f"a test run that {'has kept them' if mark.kept else 'was killed'} ({mark})"
        if runner().create:
            why = "as --app-db-create says"
        elif runner().reuse and mark.kept and not changed:
            if rows:
                runner().tell(f"the tables of {self._name!r}, which were kept, have rows: {listed}")
            return True
        elif rows and changed and not runner().reuse:
            raise CannotMakeTables(
                self._name,
                f"the tables were made by {made_by}. Since then the models have changed ({', '.join(changed)}), and there are "
                f"rows in {listed}",
                "`pytest --app-db-create` makes the tables anew, without the rows",
            )
        elif rows and not runner().reuse:
            runner().tell(
                f"the tables of {self._name!r} were made by {made_by}, and have rows: {listed}. They were left as they are; "
                "`pytest --app-db-create` makes them anew"
            )
            return False
        elif changed:
            why = f"they were of {made_by}, and the models have changed since: {', '.join(changed)}"
        else:
            why = f"they were of {made_by}"
        self._drop(mark)
        runner().tell(f"the tables of {self._name!r} were made anew: {why}")
        return True

    def _rows(self, tables: list[Table]) -> Mapping[str, int]:
        """Return the tables that are not empty, each with its number of rows."""
        with self._engine.begin() as connection:
            counts = {table.fullname: connection.scalar(select(func.count()).select_from(table)) or 0 for table in tables}
        return {name: count for name, count in counts.items() if count}

    def _drop(self, mark: Mark) -> None:
        """Drop the tables that the mark names: first those of which there is no model any more."""
        others = [name for name in mark.tables if name not in self._now]
        removed = MetaData()
        with self._engine.begin() as connection:
            for name in others:
                schema, _, table = name.rpartition(".")
                if inspect(connection).has_table(table, schema=schema or None):
                    Table(table, removed, schema=schema or None, autoload_with=connection)
            removed.drop_all(connection, tables=[table for table in removed.tables.values() if table.fullname in others])
        named = [table for table in self._tables if table.fullname in mark.tables]
        change(self._container, self._name, [*named, steps()], MetaData.drop_all)
