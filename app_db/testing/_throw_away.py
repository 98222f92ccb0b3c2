"""Throw-away SQLite databases in the place of whatever the settings say."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from app_db.container import DatabaseContainer
from app_db.models._schema import own_tables
from app_db.settings import ConnectionSettings, DatabaseSettings, PoolSettings
from app_db.testing._overrides import Override, declared, names_of, settings_of


class ThrowAway(Override):
    """Other settings, and the directory in which their databases are."""

    _directory = ""

    def __init__(self, container: DatabaseContainer) -> None:
        super().__init__(container, {})

    def other_settings(self) -> DatabaseSettings:
        self._directory = tempfile.mkdtemp(prefix="app_db-")
        try:
            return on_sqlite(self.container, Path(self._directory))
        except BaseException:
            self.clean_up()
            raise

    def __enter__(self) -> DatabaseSettings:
        settings = super().__enter__()
        try:
            _make_tables(self.container, settings)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return settings

    def clean_up(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


def _make_tables(container: DatabaseContainer, settings: DatabaseSettings) -> None:
    """Make the models' tables, those of read-only connections too, whose databases would be empty for ever."""
    container.create_all()
    for name, connection in settings.connections.items():
        tables = own_tables(name)
        if tables and connection.read_only and connection.mirror is None:
            engine = create_engine(connection.sqlalchemy_url(), poolclass=NullPool)
            tables[0].metadata.create_all(engine, tables=tables)


_USAGE = ("read_only", "transactional", "statement_timeout", "echo", "session")
_POOL_KEPT = ("size", "max_overflow", "timeout")
_ISOLATION_LEVELS = ("AUTOCOMMIT", "READ UNCOMMITTED", "SERIALIZABLE")


def on_sqlite(container: DatabaseContainer, directory: Path) -> DatabaseSettings:
    """Return the settings of a container with files in `directory` in the place of its databases."""
    settings = settings_of(container)
    connections = {}
    names = names_of(container, settings)
    if settings is None and "writer" in names:
        names = [name for name in names if name != "reader"]  # which is the writer, read-only
    for name in names:
        own = declared(settings, name) or ConnectionSettings()
        twin = own.mirror or _twin_of(name, own, settings)
        place = {"mirror": twin} if twin else {"url": f"sqlite:///{directory / name}.db"}
        connections[name] = ConnectionSettings(**_usage(own), **place)
    if settings is None:
        return DatabaseSettings(connections=connections)
    two_phase = any(connection.two_phase for connection in settings.connections.values())
    atomicity = "best_effort" if two_phase else settings.atomicity
    return settings.with_connections(connections, atomicity=atomicity, decision_log=None, recover_at_start=False)


def _usage(connection: ConnectionSettings) -> dict[str, Any]:
    """Return how a connection is used, as far as SQLite can."""
    given = connection.model_fields_set
    usage = {field: getattr(connection, field) for field in _USAGE if field in given}
    if connection.isolation_level in _ISOLATION_LEVELS:
        usage["isolation_level"] = connection.isolation_level
    pool = connection.pool
    usage["pool"] = PoolSettings(**{field: getattr(pool, field) for field in _POOL_KEPT if field in pool.model_fields_set})
    return usage


def _twin_of(name: str, connection: ConnectionSettings, settings: DatabaseSettings | None) -> str | None:
    """Return the writable connection whose database a read-only one reads: its own would be empty for ever."""
    if settings is None or not connection.read_only:
        return None
    place = settings.connection(name).place
    writable = {other: one for other, one in settings.connections.items() if not (one.read_only or one.mirror)}
    twins = sorted(other for other in writable if settings.connection(other).place == place)
    return "writer" if name == "reader" and "writer" in writable else next(iter(twins), None)
