"""Throw-away SQLite databases in place of the databases in the settings."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from app_db.container import DatabaseContainer
from app_db.models._schema import own_tables
from app_db.settings import ConnectionSettings, DatabaseSettings, PoolSettings
from app_db.testing._overrides import Override, declared, names_of, settings_of


class ThrowAway(Override):
    """Settings with SQLite databases in a directory that is removed at the end."""

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
    """Create the tables of the models, also on read-only connections, whose databases would stay empty otherwise."""
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
    """Return the settings of a container with SQLite files in `directory` in place of its databases."""
    settings = settings_of(container)
    connections = {}
    names = names_of(container, settings)
    if settings is None and "writer" in names:
        names = [name for name in names if name != "reader"]  # without settings, it is a mirror of the writer
    for name in names:
        own = declared(settings, name) or ConnectionSettings()
        mirrored = own.mirror or _same_database(name, own, settings)
        place = {"mirror": mirrored} if mirrored else {"url": f"sqlite:///{directory / name}.db"}
        connections[name] = ConnectionSettings(**_usage(own), **place)
    if settings is None:
        return DatabaseSettings(connections=connections)
    two_phase = any(connection.two_phase for connection in settings.connections.values())
    atomicity = "best_effort" if two_phase else settings.atomicity
    others: dict[str, object] = {"atomicity": atomicity, "two_phase": False, "decision_log": None, "recover_at_start": False}
    return settings.with_connections(connections, **others)


def _usage(connection: ConnectionSettings) -> dict[str, object]:
    """Return the settings of how a connection is used which SQLite supports."""
    given = connection.model_fields_set
    usage: dict[str, object] = {field: getattr(connection, field) for field in _USAGE if field in given}
    if connection.isolation_level in _ISOLATION_LEVELS:
        usage["isolation_level"] = connection.isolation_level
    pool = connection.pool
    usage["pool"] = PoolSettings(**{field: getattr(pool, field) for field in _POOL_KEPT if field in pool.model_fields_set})
    return usage


def _same_database(name: str, connection: ConnectionSettings, settings: DatabaseSettings | None) -> str | None:
    """Return the writable connection to the database that a read-only connection reads, if there is one."""
    if settings is None or not connection.read_only:
        return None
    place = settings.connection(name).place
    writable = [other for other, own in settings.connections.items() if not (own.read_only or own.mirror)]
    if name == "reader" and "writer" in writable:
        return "writer"
    return min((other for other in writable if settings.connection(other).place == place), default=None)
