"""Databases that tests make on the servers of a container's settings: they are marked, and only marked ones are dropped."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from app_db._databases.engines import build_engine
from app_db._databases.registry import database_of
from app_db._databases.shells import FILE
from app_db._wording import in_one_line
from app_db.container import DatabaseContainer
from app_db.errors import CannotMakeDatabase, SettingsError
from app_db.models._schema import own_tables
from app_db.settings import DatabaseSettings
from app_db.settings._urls import is_memory
from app_db.testing._marks import DATABASE, Mark, fingerprints, fingerprints_of_made, marks_in, put
from app_db.testing._overrides import connections_of, with_url
from app_db.testing._runner import runner

if TYPE_CHECKING:
    from sqlalchemy import URL

T = TypeVar("T")
Beside = Callable[[], AbstractContextManager[Connection]]
"""Connects to another database of the server."""

_log = logging.getLogger("app_db")


def written_places(container: DatabaseContainer, settings: DatabaseSettings, *, in_memory: bool = False) -> list[list[str]]:
    """Return, for each database that the container can write to, the connections to it, a writable one first."""
    places: dict[object, list[str]] = {}
    owners = {settings._mirrors(name)[-1] for name in connections_of(container)}
    for name in sorted(owners.intersection(settings.connections), key=lambda name: (settings.connections[name].read_only, name)):
        places.setdefault(settings.connection(name).place, []).append(name)
    return [
        names
        for names in places.values()
        for first in [settings.connection(names[0])]
        if not first.read_only and (in_memory or not is_memory(first.sqlalchemy_url()))
    ]


def name_of(name: str, url: URL, suffix: str) -> str:
    """Return the name of a database of the tests' own, made from the name of the database in the settings."""
    database = url.database or url.username
    if database is None:
        raise CannotMakeDatabase(name, suffix, "its name is made from the name of the database, and the settings don't have that")
    return database_of(url.get_backend_name()).name_for_worker(database, suffix)


class OwnDatabase:
    """A database that tests may make, on the server of the connection `name`, and drop again."""

    def __init__(
        self,
        name: str,
        settings: DatabaseSettings,
        database: str,
        *,
        home: str | None = None,
        beside: Beside | None = None,
    ) -> None:
        self.name, self.database = name, database
        self._settings = settings
        url = settings.connection(name).sqlalchemy_url()
        self._kind = database_of(url.get_backend_name())
        if not self._kind.creates_databases:
            raise CannotMakeDatabase(name, database, f"app_db does not know how {url.get_backend_name()} makes one")
        self.beside = beside or connecting(name, settings if home is None else _with_database(name, settings, home))

    @contextmanager
    def connected(self) -> Generator[Connection]:
        """Connect to this database for one transaction."""
        engine = build_engine(self.name, _with_database(self.name, self._settings, self.database))
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()

    def mark(self) -> Mark | None:
        """Return the mark of the run that has made this database; None if it is not there, or no run has made it."""
        if not self.exists():
            return None
        with self.connected() as connection:
            return marks_in(connection).get(DATABASE)

    def put(self, mark: Mark) -> None:
        with self.connected() as connection:
            put(connection, DATABASE, mark)

    def exists(self) -> bool:
        return self._try(lambda: self._kind.has_database(self.beside, self.database))

    def create(self) -> None:
        self._try(lambda: self._kind.create_database(self.beside, self.database))
        self.put(Mark())

    def copy_from(self, source: str, *, marked: bool = False) -> None:
        """Copy a database. The mark in it comes along; without one, the copy gets one."""
        self._try(lambda: self._kind.copy_database(self.beside, source, self.database))
        if not marked:
            self.put(Mark())

    def drop(self) -> None:
        try:
            self._kind.drop_database(self.beside, self.database)
        except DBAPIError:
            inside = connecting(self.name, _with_database(self.name, self._settings, self.database))
            self._kind.roll_back_prepared(self.beside, inside, self.database)
            self._kind.drop_database(self.beside, self.database)

    def drop_at_end(self) -> None:
        try:
            self.drop()
        except DBAPIError:
            _log.warning("The database %r could not be dropped", self.database, exc_info=True)

    def command(self) -> str:
        """Return the command that opens a shell in this database. It contains no password."""
        settings = _with_database(self.name, self._settings, self.database).connection(self.name)
        url = settings.sqlalchemy_url().set(password=None)
        shell = self._kind.shell(url, settings, None)
        if shell is None:
            return repr(url.render_as_string())
        options = [f"--{line}" for line in shell.private.splitlines() if "=" in line]
        return shlex.join([shell.programs[0], *options, *(each for each in shell.arguments if FILE not in each)])

    def _try(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except (DBAPIError, SettingsError) as error:
            raise CannotMakeDatabase(self.name, self.database, in_one_line(error)) from error


@contextmanager
def claimed(own: OwnDatabase, names: Sequence[str]) -> Generator[None]:
    """Make a database for the length of the block, unless it is there. One that no run of tests has made is not dropped.

    With the runner's `reuse`, it stays for the next run, which uses it if the models are the same.
    """
    mark = own.mark()
    ours = mark is not None or not own.exists()
    if mark is not None:
        _clear(own, names, mark)
    elif ours:
        own.create()
    try:
        yield
    finally:
        if ours and runner().reuse:
            own.put(Mark(kept=True, tables=_fingerprints(own, names, made=True)))
        elif ours:
            own.drop_at_end()


@contextmanager
def made_databases(container: DatabaseContainer) -> Generator[None]:
    """Make the databases of a container that are not there, for the length of the block.

    One that an earlier run of tests has made is made anew, unless the runner is to reuse it. One
    that no run has made is used, and never dropped. Raises CannotMakeDatabase.
    """
    settings = container.settings()
    with ExitStack() as stack:
        for names in written_places(container, settings):
            _close_idle(container, names)
            home = database_of(settings.connection(names[0]).sqlalchemy_url().get_backend_name()).first_database
            stack.enter_context(claimed(OwnDatabase(names[0], settings, database_in(names[0], settings), home=home), names))
            stack.callback(_close_idle, container, names)
        yield


def _close_idle(container: DatabaseContainer, names: Iterable[str]) -> None:
    for name in names:
        for engine in container.core.state().engines(name):
            engine.dispose()


def database_in(name: str, settings: DatabaseSettings) -> str:
    """Return the name of a connection's database on its server, or the path of its file."""
    connection = settings.connection(name)
    configured = connection.sqlalchemy_url()
    url = database_of(configured.get_backend_name()).url(configured, connection)
    return str(url.database or url.username)


def _clear(own: OwnDatabase, names: Sequence[str], mark: Mark) -> None:
    """Make a database of an earlier run anew, unless it is to be used again."""
    if mark.is_alive or (mark.is_other_run and not runner().create):
        reason = f"another test run uses it: {mark}. If that host is gone, `pytest --app-db-create` makes it anew"
        raise CannotMakeDatabase(own.name, own.database, reason)
    changed = mark.changed_or_removed(_fingerprints(own, names))
    if runner().reuse and mark.kept and not changed and not runner().create:
        own.put(Mark())
        return
    if runner().create:
        why = "as --app-db-create says"
    elif changed:
        why = f"the models have changed since the last run: {', '.join(changed)}"
    else:
        why = "the last run kept it" if mark.kept else f"the run that made it was killed ({mark})"
    runner().tell(f"the database {own.database!r} was made anew: {why}")
    own.drop()
    own.create()


def _fingerprints(own: OwnDatabase, names: Sequence[str], *, made: bool = False) -> dict[str, str]:
    """Return the fingerprints of the models' tables; with `made`, only of those that are in the database."""
    tables = [table for name in names for table in own_tables(name)]
    with own.connected() as connection:
        return fingerprints_of_made(tables, connection) if made else fingerprints(tables, connection.dialect)


def _with_database(name: str, settings: DatabaseSettings, database: str) -> DatabaseSettings:
    url = settings.connection(name).sqlalchemy_url().set(database=database)
    changed = with_url(settings.connections[name], url.render_as_string(hide_password=False))
    return settings.with_connections({**settings.connections, name: changed})


def connecting(name: str, settings: DatabaseSettings) -> Beside:
    """Return a function that connects in autocommit. No connection stays open: it would keep PostgreSQL from copying."""
    engine = cache(lambda: build_engine(name, settings))

    @contextmanager
    def connected() -> Generator[Connection]:
        try:
            with engine().execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                yield connection
        finally:
            engine().dispose()

    return connected
