"""Making and dropping the tables of models, by any number of processes at the same time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import cache
from typing import Any

from sqlalchemy import Column, Connection, DateTime, Engine, MetaData, String, Table, func
from sqlalchemy.exc import DBAPIError
from transaction.interfaces import NoTransaction

from app_db._databases.containers import Container
from app_db._databases.registry import database_of
from app_db._units.manager import retryable
from app_db.errors import InvalidUse, UnitOfWorkError
from app_db.models._bases import REFLECTED, metadata_of
from app_db.models._reflection import connections_in
from app_db.settings._sources import variable_for

LOCK = "app_db create_all"
"""What processes that change a schema wait for on a server."""

_ATTEMPTS = 10
"""SQLite waits for others for a while only."""


def create_all(container: Container, *names: str) -> None:
    """Make the tables of `metadata_of(name)` that are not there yet, for all the container's connections or those named.

    Read-only connections and mirrors are passed over, and refused when they are named. Reflected tables are left alone. Nothing
    connects where there is nothing to make. Processes may do this at the same time.
    """
    for name in writable(container, names):
        _change(container, name, own_tables(name), MetaData.create_all)


def drop_all(container: Container, *names: str) -> None:
    """Drop the tables that `create_all` makes, with all that is in them, and what is remembered there of a bootstrap."""
    for name in reversed(writable(container, names)):
        _change(container, name, [*own_tables(name), steps()], MetaData.drop_all)


@cache
def steps() -> Table:
    """Return the table that says what a bootstrap has done. Its rows are written by the units of work that do it."""
    return Table(
        "app_db_bootstrap",
        MetaData(),
        Column("step", String(100), primary_key=True),
        Column("done_at", DateTime, nullable=False, server_default=func.now()),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )


def create_bootstrap_table(container: Container, name: str) -> None:
    """Make the table `steps` unless it is there."""
    _change(container, name, [steps()], MetaData.create_all)


def own_tables(name: str) -> list[Table]:
    """Return the tables of a connection that are the models' to make."""
    return [table for table in metadata_of(name).tables.values() if not table.info.get(REFLECTED)]


def writable(container: Container, names: Iterable[str]) -> list[str]:
    """Return the connections whose tables can be made. Raises InvalidUse if one of `names` is a mirror or read-only."""
    asked = tuple(names)
    found = connections_in(container, asked)
    if not asked:
        found = [name for name in found if own_tables(name)]
    obstacles = {name: _obstacle(container.settings(), name) for name in found}
    for name, obstacle in obstacles.items():
        if obstacle and asked:
            raise InvalidUse(
                f"The tables of {name!r} can't be made or dropped: {obstacle}", "Name a connection that can be written"
            )
    return [name for name, obstacle in obstacles.items() if not obstacle]


def _obstacle(settings: Any, name: str) -> str:
    used, own = settings.connection(name), settings.connections.get(name)
    if own is None or own.mirror is not None:
        return "it mirrors another connection"
    return f"it is read-only ({variable_for(('connections', name, 'read_only'))})" if used.read_only else ""


def _change(container: Container, name: str, tables: list[Table], verb: Callable[..., None]) -> None:
    """Create or drop tables of a connection, alone among all processes that do."""
    if not tables:
        return
    _refuse_inside_unit(container, name)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _change_once(container, name, tables, verb)
            break
        except DBAPIError as error:
            if attempt == _ATTEMPTS or not retryable(error):
                raise


def _change_once(container: Container, name: str, tables: list[Table], verb: Callable[..., None]) -> None:
    with _changing(container.providers[f"{name}_engine"]()) as connection:
        for metadata in {table.metadata: None for table in tables}:
            verb(metadata, connection, tables=[table for table in tables if table.metadata is metadata])


def _refuse_inside_unit(container: Container, name: str) -> None:
    """Raise where the change would wait for the locks of the unit that waits for it."""
    try:
        work = container.core.coordinator().get()
    except (NoTransaction, UnitOfWorkError):
        return
    database = container.settings().connection(name).database_identity()
    for branch in work.branches:
        if branch.config.settings.database_identity() is database:
            raise InvalidUse(
                f"The tables of {name!r} can't be made or dropped inside a unit of work that uses its database: each would wait "
                "for the other",
                "Do it before the unit begins",
            )


@contextmanager
def _changing(engine: Engine) -> Generator[Connection]:
    """Give a connection that holds the lock of its database, where there is one. It commits what was done."""
    with engine.connect() as connection, database_of(engine.dialect.name).changing_tables(connection, LOCK):
        yield connection
