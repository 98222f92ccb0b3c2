"""Databases for one of several processes that run tests at the same time, created and dropped on the servers of the settings."""

from __future__ import annotations

from contextlib import ExitStack

from app_db.container import DatabaseContainer
from app_db.settings import ConnectionSettings, DatabaseSettings
from app_db.testing._databases import OwnDatabase, claimed, name_of, written_places
from app_db.testing._overrides import Override, with_url


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
            for names in written_places(self.container, settings):
                databases = {name: name_of(name, settings.connection(name).sqlalchemy_url(), self._worker) for name in names}
                stack.enter_context(claimed(OwnDatabase(names[0], settings, databases[names[0]]), names))
                for name, database in databases.items():
                    url = settings.connection(name).sqlalchemy_url().set(database=database)
                    own[name] = with_url(settings.connections[name], url.render_as_string(hide_password=False))
            self._databases = stack.pop_all()
        return settings.with_connections({**settings.connections, **own})

    def clean_up(self) -> None:
        self._databases.close()
