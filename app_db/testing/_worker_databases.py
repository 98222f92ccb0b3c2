"""Databases for one of several processes that run tests at the same time, created and dropped on the servers of the settings."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from app_db._databases.engines import build_engine
from app_db._databases.registry import database_of
from app_db._wording import in_one_line
from app_db.container import DatabaseContainer
from app_db.errors import CannotMakeDatabase, SettingsError
from app_db.settings import ConnectionSettings, DatabaseSettings
from app_db.settings._urls import is_memory
from app_db.testing._overrides import Override, connections_of, with_url

if TYPE_CHECKING:
    from sqlalchemy import URL

log = logging.getLogger("app_db")


class WorkerDatabases(Override):
    """Settings with a database of the worker's own for each that can be written. They are dropped at the end."""

    def __init__(self, container: DatabaseContainer, worker: str) -> None:
        super().__init__(container, {})
        self._worker = worker
        self._databases = ExitStack()

    def other_settings(self) -> DatabaseSettings:
        settings = self.container.settings()
        own: dict[str, ConnectionSettings] = {}
        with ExitStack() as stack:
            for names in _written_places(self.container, settings):
                urls = {name: _of_worker(name, settings.connection(name).sqlalchemy_url(), self._worker) for name in names}
                stack.enter_context(_database(names[0], settings, urls[names[0]]))
                for name, url in urls.items():
                    own[name] = with_url(settings.connections[name], url.render_as_string(hide_password=False))
            self._databases = stack.pop_all()
        return settings.with_connections({**settings.connections, **own})

    def clean_up(self) -> None:
        self._databases.close()


def _written_places(container: DatabaseContainer, settings: DatabaseSettings) -> list[list[str]]:
    """Return, for each database that the container can write to, the connections to it, a writable one first."""
    places: dict[object, list[str]] = {}
    owners = {settings._mirrors(name)[-1] for name in connections_of(container)}
    for name in sorted(owners.intersection(settings.connections), key=lambda name: (settings.connections[name].read_only, name)):
        places.setdefault(settings.connection(name).place, []).append(name)
    return [
        names
        for names in places.values()
        for first in [settings.connection(names[0])]
        if not (first.read_only or is_memory(first.sqlalchemy_url()))
    ]


def _of_worker(name: str, url: URL, worker: str) -> URL:
    database = url.database or url.username
    if database is None:
        raise CannotMakeDatabase(name, worker, "its name is made from the name of the database, and the settings don't have that")
    return url.set(database=database_of(url.get_backend_name()).name_for_worker(database, worker))


# ---- on the server -------------------------------------------------------------------------------------------------


@contextmanager
def _database(name: str, settings: DatabaseSettings, url: URL) -> Generator[None]:
    """Create the database of `url` for the length of the block, by a connection to the database in the settings."""
    kind, database = database_of(url.get_backend_name()), str(url.database)
    if not kind.creates_databases:
        raise CannotMakeDatabase(name, database, f"app_db does not know how {url.get_backend_name()} makes one")
    connected = partial(_connected, name, settings)
    try:
        kind.create_database(connected, database)
    except (DBAPIError, SettingsError) as error:
        raise CannotMakeDatabase(name, database, in_one_line(error)) from error
    try:
        yield
    finally:
        try:
            kind.drop_database(connected, database)
        except DBAPIError:
            log.warning("The database %r could not be dropped", database, exc_info=True)


@contextmanager
def _connected(name: str, settings: DatabaseSettings) -> Generator[Connection]:
    engine = build_engine(name, settings)
    try:
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            yield connection
    finally:
        engine.dispose()
