"""Reads tables from the database: those of reflected models, and whole schemas."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, cast

from sqlalchemy import Connection, Inspector, MetaData, Table, inspect
from sqlalchemy.engine.reflection import ObjectKind
from sqlalchemy.ext.declarative import DeferredReflection

from app_db._compat.os import after_fork_in_child
from app_db._databases.containers import Container
from app_db._databases.database import ReadOnlyTerms
from app_db._databases.registry import database_of
from app_db.errors import CannotReflect, UnknownConnection, UnknownTable, Unreflectable
from app_db.models._bases import CONNECTION, REFLECTED, Reflected, note_reflected, unreflected_models

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import ReflectedPrimaryKeyConstraint

    from app_db.settings import ConnectionSettings


_reflecting = Lock()
"""Held while models are filled. All containers of a process share the models."""


def connections_in(container: Container, names: Iterable[str] = ()) -> list[str]:
    """Return the connections that a container declares, or only `names`. Raises UnknownConnection for a name it does not have."""
    declared = sorted(name.removesuffix("_sessionmaker") for name in container.providers if name.endswith("_sessionmaker"))
    declared = [name for name in declared if name in container.providers]
    for name in names:
        if name not in declared:
            raise UnknownConnection(name, declared)
    return [name for name in declared if name in names] if names else declared


@contextmanager
def _connected(container: Container, name: str) -> Generator[Connection]:
    engine = container.providers[f"{name}_engine"]()
    with engine_that_reads(engine, container.settings().connection(name)).connect() as connection:
        yield connection


def engine_that_reads(engine: Engine, settings: ConnectionSettings) -> Engine:
    """Return `engine` with transactions that write nothing, and so don't wait for writers."""
    return database_of(engine.dialect.name).engine_for_unit(engine, settings, ReadOnlyTerms())


# ---- models -----------------------------------------------------------------------------------------------------------


def reflect(container: Container, *names: str) -> None:
    """Read the columns of reflected models from the databases of all connections, or of those in `names`.

    Each model is filled once in a process, by the first container that does it. If all are filled,
    nothing connects. Another thread that calls this meanwhile waits. Raises CannotReflect, which
    names all models that could not be filled. These can be tried again.
    """
    problems: list[Unreflectable] = []
    for name in connections_in(container, names):
        if unreflected_models(name):
            with _reflecting:
                problems += _fill(container, name)
    if problems:
        raise CannotReflect(problems)


def _fill(container: Container, name: str) -> list[Unreflectable]:
    models = unreflected_models(name)  # again: another thread may have filled them meanwhile
    if not models:
        return []
    with _connected(container, name) as connection:
        problems = list(_problems(inspect(connection), name, models))
        if not problems:
            _map(connection, models)
    return problems


def _map(connection: Connection, models: list[type[Reflected]]) -> None:
    declared = {metadata: set(metadata.tables) for metadata in {model.metadata for model in models}}
    chosen = cast("type[DeferredReflection]", _Chosen("Chosen", (DeferredReflection,), {"models": frozenset(models)}))
    try:
        chosen.prepare(connection, views=True)
    finally:  # an unexpected error leaves some of them mapped
        note_reflected(model for model in models if "__mapper__" in vars(model))
    for metadata, keys in declared.items():
        for key in metadata.tables.keys() - keys:  # the tables that foreign keys refer to
            metadata.tables[key].info[REFLECTED] = True


class _Chosen(type):
    """The metaclass of a class whose subclasses are `models`: SQLAlchemy prepares all subclasses of a class."""

    models: frozenset[type]

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass in cls.models


def _problems(inspector: Inspector, name: str, models: Iterable[type[Reflected]]) -> Iterator[Unreflectable]:
    """Yield the problems of the models that can't be mapped. It is called before any of them is mapped."""
    by_table: dict[Table, type[Reflected]] = {}
    for model in sorted(models, key=lambda model: (model.__table__.fullname, len(model.__mro__))):
        by_table.setdefault(model.__table__, model)  # of several models, the one from which the others inherit
    for schema in {table.schema: None for table in by_table}:
        tables = [table for table in by_table if table.schema == schema]
        there = {*inspector.get_table_names(schema), *inspector.get_view_names(schema)}
        wanted = [table.name for table in tables if table.name in there]
        keys = inspector.get_multi_pk_constraint(schema, filter_names=wanted, kind=ObjectKind.ANY) if wanted else {}
        for table in tables:
            problem = _problem(by_table[table], table, there, keys.get((schema, table.name)))
            if problem:
                yield Unreflectable(by_table[table].__name__, table.fullname, name, problem)


def _problem(model: type[Reflected], table: Table, there: set[str], key: ReflectedPrimaryKeyConstraint | None) -> str:
    if table.name not in there:
        return "is not there"
    no_key = "has no primary key; declare the columns that identify a row in the model, with primary_key=True"
    return "" if _has_key(model, table, key) else no_key


def _has_key(model: type[Reflected], table: Table, found: ReflectedPrimaryKeyConstraint | None) -> bool:
    # A column that the model declares is a key only if the model says so.
    of_database = set(found["constrained_columns"] if found else ()) - set(table.columns.keys())
    of_mapper = getattr(model, "__mapper_args__", None)
    return bool(table.primary_key.columns or of_database or (isinstance(of_mapper, dict) and "primary_key" in of_mapper))


# ---- schemas ------------------------------------------------------------------------------------------------------------


class ReflectedSchema(Mapping[str, Table]):
    """The tables and views of a schema at the time at which it was read: `tables.orders`, or `tables["orders"]`.

    The second form also finds a table with the name of a method of mappings: `tables["items"]`.
    Raises UnknownTable.
    """

    def __init__(self, connection: str, tables: Mapping[str, Table]) -> None:
        self.connection = connection
        self._tables = dict(tables)

    def __getitem__(self, name: str) -> Table:
        try:
            return self._tables[name]
        except KeyError:
            raise UnknownTable(name, self.connection, sorted(self._tables)) from None

    def __getattr__(self, name: str) -> Table:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._tables]

    def __repr__(self) -> str:
        return f"<{len(self)} tables of {self.connection!r}>"


def reflect_schema(container: Container, name: str, schema: str | None = None) -> ReflectedSchema:
    """Read all tables and views of a connection's schema, and return them by name. Without `schema` it is the default one.

    Tables without a primary key are included. The tables belong to the connection and to a MetaData
    of their own. Raises UnknownConnection.
    """
    connections_in(container, [name])
    metadata = MetaData(info={CONNECTION: name})
    with _connected(container, name) as connection:
        metadata.reflect(connection, schema=schema, views=True)
    return ReflectedSchema(name, {table.name: table for table in metadata.tables.values() if table.schema == schema})


def _forget_parents_lock() -> None:
    """Make a new lock in a forked child. Another thread of the parent may have held the old one."""
    global _reflecting  # noqa: PLW0603  # one for the process
    _reflecting = Lock()


after_fork_in_child(_forget_parents_lock)
