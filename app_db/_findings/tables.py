"""The tables of one connection: whether they are as the models say, and whether they have transactions."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect
from sqlalchemy.engine.reflection import ObjectKind

from app_db._findings import matters
from app_db._findings.asking import Asked, Question
from app_db._findings.finding import Finding
from app_db.container import DatabaseContainer
from app_db.errors import AppDbError
from app_db.models._bases import metadata_of
from app_db.models._reflection import connections_in
from app_db.models._schema import own_tables

if TYPE_CHECKING:
    from sqlalchemy.schema import Table


def _the_models_tables(asked: Asked) -> Iterator[Finding]:
    by_schema: dict[str | None, list[Table]] = {}
    for table in metadata_of(asked.name).tables.values():
        by_schema.setdefault(table.schema, []).append(table)
    for schema, tables in by_schema.items():
        found = inspect(asked.connection).get_multi_columns(
            schema, filter_names=[table.name for table in tables], kind=ObjectKind.ANY
        )
        for table in tables:
            columns = found.get((schema, table.name))
            yield from _missing_table(asked, table) if columns is None else _differences(asked, table, columns)


def _missing_table(asked: Asked, table: Table) -> Iterator[Finding]:
    asked.differing.update([f"table {table.fullname}", *(f"index {each.name} of {table.fullname}" for each in table.indexes)])
    yield matters.NO_TABLE.found(
        asked.name,
        f"The table {table.fullname} of the models does not exist.",
        _place(asked, table),
        f"Run the migrations, or container.create_all({asked.name!r}), or let the user see the table.",
    )


def _differences(asked: Asked, table: Table, columns: list[Any]) -> Iterator[Finding]:
    existing = {column["name"].lower(): column for column in columns}
    declared = {column.name.lower(): column.name for column in table.columns}
    missing = [name for key, name in declared.items() if key not in existing]
    asked.differing.update(f"column {table.name}.{name}" for name in missing)
    if missing:
        yield matters.NO_COLUMN.found(
            asked.name,
            f"The table {table.fullname} does not have the columns {', '.join(missing)} of its model.",
            _place(asked, table),
            "Add the columns by a migration.",
        )
    required = [column["name"] for key, column in existing.items() if key not in declared and _is_required(column)]
    if required and declared:  # a reflected model has no columns until it is read
        asked.differing.update(f"column {table.name}.{name}" for name in required)
        yield matters.UNKNOWN_COLUMN.found(
            asked.name,
            f"The table {table.fullname} requires values for {', '.join(required)}, which the model does not have.",
            _place(asked, table),
            "Add the columns to the model, or give them a default in the database.",
        )


def _is_required(column: Any) -> bool:
    makes_itself = (
        column.get("default") or column.get("autoincrement") is True or column.get("identity") or column.get("computed")
    )
    return not (column["nullable"] or makes_itself)


def _place(asked: Asked, table: Table) -> str:
    return f"the table {table.fullname!r} in metadata_of({asked.name!r})"


def _tables_without_transactions(asked: Asked) -> Iterator[Finding]:
    if asked.own.read_only:
        return
    for table, storage in asked.database.tables_without_transactions(asked.connection):
        quoted = asked.connection.dialect.identifier_preparer.quote(str(table))
        yield matters.NO_TRANSACTIONS.found(
            asked.name,
            f"The table {table} has no transactions ({storage}). Its rows stay if the unit of work aborts.",
            f"the table {table!r} in the database",
            f"ALTER TABLE {quoted} ENGINE=InnoDB gives it some.",
        )


def _the_migrations(asked: Asked) -> Iterator[Finding]:
    """Yield the migrations that have not been run; if there are none, the differences that nothing else is found about."""
    if find_spec("alembic") is None:
        return
    from app_db.migrations import check
    from app_db.migrations._folders import folder_of
    from app_db.migrations._selecting import changeable, versions_in

    folder = folder_of(None)
    if asked.name not in changeable(asked.container) or not versions_in(folder, asked.name).is_dir():
        return
    place = f"the folder {versions_in(folder, asked.name)}"
    try:
        [found] = check(asked.container, connections=[asked.name])
    except AppDbError as error:
        yield matters.PENDING.found(asked.name, f"{' '.join(error.message.split()).rstrip('.')}.", place, "Correct them.")
        return
    if found.pending:
        names = ", ".join(found.pending)
        what = f"Migrations have not been run: {names}."
        yield matters.PENDING.found(asked.name, what, place, "Run them: app-db migrate.")
    said = tuple(f"{element} is " for element in asked.differing)
    lines = [f"{line}." for line in found.drift if not line.startswith(said)]
    if lines and own_tables(asked.name):  # of models that are not imported, each table would be listed
        yield matters.DRIFT.found(
            asked.name,
            "\n".join(["The models and the database differ:", *lines]),
            f"metadata_of({asked.name!r}), and {place}",
            "Correct the models, or write a migration and read it before you run it: app-db revision -m '…'.",
        )


def stray_migrations(container: DatabaseContainer) -> Iterator[Finding]:
    """Yield the folders of migrations that are named like no connection of the container."""
    if find_spec("alembic") is None:
        return
    from app_db.migrations._folders import folder_of

    try:
        folder = folder_of(None)
    except AppDbError:
        return  # each connection is asked about its migrations, and answers with this error
    known = connections_in(container)
    for versions in sorted(folder.glob("*/versions")):
        name = versions.parent.name
        if name not in known and versions.is_dir():
            yield matters.STRAY.found(
                None,
                f"The migrations of {name!r} are never run: the container has no such connection.",
                f"the folder {versions}",
                f"Rename the folder, or remove it. The connections are: {', '.join(known)}.",
            )


SCHEMA: tuple[Question, ...] = (_the_models_tables,)
"""What is asked of mirrors, too."""

QUESTIONS: tuple[Question, ...] = (*SCHEMA, _the_migrations, _tables_without_transactions)
