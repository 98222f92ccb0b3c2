"""Creates and drops the tables of models. Several processes may do it at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from sqlalchemy import Column, DateTime, Engine, MetaData, String, Table, func
from sqlalchemy.exc import DBAPIError
from transaction.interfaces import NoTransaction

from app_db._databases.containers import Container
from app_db._databases.registry import database_of
from app_db._two_phase.decisions import TABLE as DECISIONS
from app_db._units.manager import retryable
from app_db.errors import InvalidUse, UnitOfWorkError
from app_db.models._bases import REFLECTED, metadata_of
from app_db.models._reflection import connections_in
from app_db.settings import DatabaseSettings

LOCK = "app_db create_all"
"""The name of the lock on the server that processes hold while they change a schema."""

BOOTSTRAP = "app_db_bootstrap"

TEST_RUN = "app_db_test_run"
"""The table in which a test run notes what it has made in a database."""

_ATTEMPTS = 10
"""More than one, because SQLite waits for another process for a limited time only."""


def create_all(container: Container, *names: str) -> None:
    """Create the tables of the models that don't exist yet, on all connections or on those in `names`.

    Read-only connections and mirrors are left out, and reflected tables too. A connection without
    models is not opened. Several processes may do this at the same time. Raises InvalidUse for a
    read-only connection or mirror in `names`, and inside a unit of work that uses the same
    database.
    """
    for name in writable(container, names):
        change(container, name, own_tables(name), MetaData.create_all)


def drop_all(container: Container, *names: str) -> None:
    """Drop the tables that `create_all` makes, with all that is in them, and what is remembered there of a bootstrap."""
    for name in reversed(writable(container, names)):
        change(container, name, [*own_tables(name), steps()], MetaData.drop_all)


@cache
def steps() -> Table:
    """Return the table of the bootstrap steps that are done. The unit of work that does a step writes its row."""
    return Table(
        BOOTSTRAP,
        MetaData(),
        Column("step", String(100), primary_key=True),
        Column("done_at", DateTime, nullable=False, server_default=func.now()),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )


def include_name(name: str | None, kind: str, parents: object) -> bool:
    """Return False for app_db's own tables, for Alembic: `context.configure(..., include_name=include_name)`.

    They are in no MetaData of the application, so that Alembic's autogenerate would propose to drop them: `app_db_decisions`
    with the decisions of two-phase commit, `app_db_bootstrap` with the steps of `bootstrap`, and `app_db_test_run` with what a
    test run has made.
    """
    return kind != "table" or name not in {DECISIONS, BOOTSTRAP, TEST_RUN}


def create_bootstrap_table(container: Container, name: str) -> None:
    """Create the table `steps` unless it exists."""
    change(container, name, [steps()], MetaData.create_all)


def own_tables(name: str) -> list[Table]:
    """Return the tables of a connection's models, without reflected ones."""
    return [table for table in metadata_of(name).tables.values() if not table.info.get(REFLECTED)]


def writable(container: Container, names: Iterable[str]) -> list[str]:
    """Return the connections whose tables can be created. Raises InvalidUse if one of `names` is a mirror or read-only."""
    asked = tuple(names)
    found = connections_in(container, asked)
    if not asked:
        found = [name for name in found if own_tables(name)]
    obstacles = {name: obstacle_to_changes(container.settings(), name) for name in found}
    for name, obstacle in obstacles.items():
        if obstacle and asked:
            raise InvalidUse(f"The tables of {name!r} can't be created or dropped: {obstacle}", "Name a writable connection")
    return [name for name, obstacle in obstacles.items() if not obstacle]


def obstacle_to_changes(settings: DatabaseSettings, name: str) -> str:
    """Return why the tables of a connection can't be changed; empty if they can."""
    used, own = settings.connection(name), settings.connections.get(name)
    if own is None or own.mirror is not None:
        return "it mirrors another connection"
    return f"it is read-only ({settings.variable('connections', name, 'read_only')})" if used.read_only else ""


def change(container: Container, name: str, tables: list[Table], verb: Callable[..., None]) -> None:
    """Create or drop tables of a connection while no other process does."""
    if not tables:
        return
    refuse_inside_unit(container, name)
    engine: Engine = container.providers[f"{name}_engine"]()
    database = database_of(engine.dialect.name)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with engine.connect() as connection, database.changing_tables(connection, LOCK):
                for metadata in {table.metadata: None for table in tables}:
                    verb(metadata, connection, tables=[table for table in tables if table.metadata is metadata])
            return
        except DBAPIError as error:
            if attempt == _ATTEMPTS or not retryable(error):
                raise


def refuse_inside_unit(container: Container, name: str) -> None:
    """Raise InvalidUse in a unit that uses the database: the change would wait for the locks of the unit, for ever."""
    try:
        work = container.core.coordinator().get()
    except (NoTransaction, UnitOfWorkError):
        return
    database = container.settings().connection(name).database_identity()
    for branch in work.branches:
        if branch.config.settings.database_identity() is database:
            raise InvalidUse(
                f"The tables of {name!r} can't be created or dropped inside a unit of work that uses its database: each "
                "would wait for the other",
                "Do it before the unit begins",
            )
