"""Tables that are read from the live database: those of reflected models, and whole schemas."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

from sqlalchemy import Connection, Inspector, MetaData, Table, inspect
from sqlalchemy.engine.reflection import ObjectKind
from sqlalchemy.ext.declarative import DeferredReflection

from app_db._compat.os import after_fork_in_child
from app_db._databases.containers import Container
from app_db._databases.registry import database_of
from app_db.errors import CannotReflect, UnknownConnection, UnknownTable, Unreflectable
from app_db.models._bases import CONNECTION, REFLECTED, Reflected, note_reflected, unreflected_models


class _Looking:
    """The terms of a transaction in which nothing is written: on SQLite it waits for no writer."""

    read_only = True
    isolation: str | None = None
    timed = False


_LOOKING = _Looking()
_reflecting = Lock()
"""Models are the process's, whoever has them filled."""


def connections_in(container: Container, names: Iterable[str] = ()) -> list[str]:
    """Return the connections that a container declares, or of these the ones that were asked for by name."""
    declared = sorted(name.removesuffix("_sessionmaker") for name in container.providers if name.endswith("_sessionmaker"))
    declared = [name for name in declared if name in container.providers]
    for name in names:
        if name not in declared:
            raise UnknownConnection(name, declared)
    return [name for name in declared if name in names] if names else declared


@contextmanager
def _looking_at(container: Container, name: str) -> Generator[Connection]:
    engine = container.providers[f"{name}_engine"]()
    settings = container.settings().connection(name)
    with database_of(engine.dialect.name).engine_for_unit(engine, settings, _LOOKING).connect() as connection:
        yield connection


# ---- models -----------------------------------------------------------------------------------------------------------


def reflect(container: Container, *names: str) -> None:
    """Fill the reflected models of the container's connections, or of those named, from their databases.

    Each model is filled once in a process, by whichever container comes first; when all are, nothing connects. Threads that ask
    at the same time wait for the one that does it. Raises CannotReflect, which names all models that could not be filled; they
    may be tried again.
    """
    problems: list[Unreflectable] = []
    for name in connections_in(container, names):
        if unreflected_models(name):
            with _reflecting:
                problems += _fill(container, name)
    if problems:
        raise CannotReflect(problems)


def _fill(container: Container, name: str) -> list[Unreflectable]:
    models = unreflected_models(name)  # asked again, because another thread may have done it meanwhile
    if not models:
        return []
    with _looking_at(container, name) as connection:
        problems = list(_problems(inspect(connection), name, models))
        if not problems:
            _map(connection, models)
    return problems


def _map(connection: Connection, models: list[type[Reflected]]) -> None:
    declared = {metadata: set(metadata.tables) for metadata in {model.metadata for model in models}}
    chosen: Any = _Chosen("Chosen", (DeferredReflection,), {"models": frozenset(models)})
    try:
        chosen.prepare(connection, views=True)
    finally:  # an error that nobody foresaw leaves some mapped
        note_reflected(model for model in models if "__mapper__" in vars(model))
    for metadata, keys in declared.items():
        for key in metadata.tables.keys() - keys:  # what foreign keys lead to
            metadata.tables[key].info[REFLECTED] = True


class _Chosen(type):
    """The class of a class whose subclasses are those chosen: it is the subclasses of a class that SQLAlchemy prepares."""

    models: frozenset[type[Any]]

    def __subclasscheck__(cls, subclass: type[Any]) -> bool:
        return subclass in cls.models


def _problems(inspector: Inspector, name: str, models: Iterable[Any]) -> Iterator[Unreflectable]:
    """Yield what would stop some of the models from being mapped, before any of them is."""
    by_table: dict[Table, Any] = {}
    for model in sorted(models, key=lambda model: (model.__table__.fullname, len(model.__mro__))):
        by_table.setdefault(model.__table__, model)  # of several, the one that the others inherit from
    for schema in {table.schema: None for table in by_table}:
        tables = [table for table in by_table if table.schema == schema]
        there = {*inspector.get_table_names(schema), *inspector.get_view_names(schema)}
        wanted = [table.name for table in tables if table.name in there]
        keys = inspector.get_multi_pk_constraint(schema, filter_names=wanted, kind=ObjectKind.ANY) if wanted else {}
        for table in tables:
            problem = _problem(by_table[table], table, there, keys.get((schema, table.name)))
            if problem:
                yield Unreflectable(by_table[table].__name__, table.fullname, name, problem)


def _problem(model: Any, table: Table, there: set[str], key: Any) -> str:
    if table.name not in there:
        return "is not there"
    if not _has_key(model, table, key):
        return "has no primary key; declare the columns that identify a row in the model, with primary_key=True"
    return ""


def _has_key(model: Any, table: Table, found: Any) -> bool:
    # The database's word counts for those of its columns that the class has not declared.
    of_database = set((found or {}).get("constrained_columns", ())) - set(table.columns.keys())
    of_mapper = getattr(model, "__mapper_args__", None)
    return bool(table.primary_key.columns or of_database or (isinstance(of_mapper, dict) and "primary_key" in of_mapper))


# ---- schemas ------------------------------------------------------------------------------------------------------------


class ReflectedSchema(Mapping[str, Table]):
    """The tables and views of a schema as they were when it was read: `tables.orders`, or `tables["orders"]`.

    The second form reaches those as well that are called like a method of mappings: `tables["items"]`.
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
    """Read all tables and views of a connection's schema, its default one unless said otherwise, and return them by name.

    They are Tables, with primary key or without, which belong to the connection and to a MetaData of their own.
    """
    connections_in(container, [name])
    metadata = MetaData(info={CONNECTION: name})
    with _looking_at(container, name) as connection:
        metadata.reflect(connection, schema=schema, views=True)
    return ReflectedSchema(name, {table.name: table for table in metadata.tables.values() if table.schema == schema})


def _forget_parents_lock() -> None:
    """Let a forked child go on where another thread of its parent was reflecting."""
    global _reflecting  # noqa: PLW0603  # there is one
    _reflecting = Lock()


after_fork_in_child(_forget_parents_lock)
