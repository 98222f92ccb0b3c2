"""Where the contestants' databases are: SQLite in memory and in a file, PostgreSQL near and farther
away, MariaDB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import URL, make_url

from harness.proxies import Proxy
from harness.servers import USER, MariaDBServer, PostgresServer, Server, ServerMissing, Setting, quick_tempdir
from measuring import on_server_core

ROUND_TRIP = 1.0
"""Milliseconds that the proxy adds, half of them each way."""

POSTGRES_SETTINGS: dict[str, Setting] = {"fsync": True, "synchronous_commit": True, "full_page_writes": True}
MARIADB_SETTINGS: dict[str, Setting] = {"innodb_flush_log_at_trx_commit": 1, "innodb_flush_method": "fsync"}
"""The settings with which the servers come. Those of the tests don't wait for the disk."""

_numbers = count(1)

S = TypeVar("S", bound=Server)


@dataclass(frozen=True)
class Place:
    """Gives each contestant an empty database of its own, by one driver.

    `new_same` is for the contestant that does the same work as app_db, which puts `:memory:`
    databases into files.
    """

    title: str
    new: Callable[[], str]
    new_same: Callable[[], str]
    in_memory: bool = False


class Databases:
    """All places, for the length of a `with` block. A server starts when it is first asked for."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._postgres: PostgresServer | None = None
        self._mariadb: MariaDBServer | None = None
        self._sockets = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def postgres(self) -> PostgresServer:
        """A PostgreSQL server, which listens on a Unix socket, too."""
        if self._postgres is None:
            self._sockets = self._stack.enter_context(tempfile.TemporaryDirectory())
            Path(self._sockets).chmod(0o777)  # the server may run as another user
            self._postgres = self._started(
                PostgresServer(settings={**POSTGRES_SETTINGS, "unix_socket_directories": self._sockets})
            )
        return self._postgres

    @contextmanager
    def sqlite_memory(self, driver: str) -> Iterator[Place]:
        """SQLite's own in-memory databases."""
        with _files_in_memory() as directory:
            new_file = _new_file(driver, directory)
            yield Place(f"SQLite in memory, {driver}", lambda: f"sqlite+{driver}://", new_file, in_memory=True)

    @contextmanager
    def sqlite_file(self, driver: str) -> Iterator[Place]:
        """SQLite files."""
        with _files_in_memory() as directory:
            new_file = _new_file(driver, directory)
            yield Place(f"SQLite file, {driver}", new_file, new_file)

    @contextmanager
    def postgres_socket(self, driver: str) -> Iterator[Place]:
        """PostgreSQL by a Unix socket."""
        server = self.postgres

        def new() -> str:
            query = {"host": self._sockets, "port": str(server.port)}
            url = make_url(server.url(_created(server)))
            return _shown(URL.create(f"postgresql+{driver}", USER, url.password, database=url.database, query=query))

        yield Place(f"PostgreSQL by socket, {driver}", new, new)

    @contextmanager
    def postgres_proxy(self, driver: str, *, round_trip: float = ROUND_TRIP) -> Iterator[Place]:
        """PostgreSQL by TCP, through a proxy in a process of its own."""
        server = self.postgres
        proxy = Proxy(server, rtt=round_trip)
        with on_server_core():
            proxy.__enter__()
        try:

            def new() -> str:
                return proxy.url(server.url(_created(server), driver=f"postgresql+{driver}"))

            yield Place(f"PostgreSQL, {round_trip:g} ms round trip, {driver}", new, new)
        finally:
            proxy.__exit__(None, None, None)

    @contextmanager
    def mariadb(self, driver: str) -> Iterator[Place | None]:
        """MariaDB by TCP, or None where it is not installed."""
        if self._mariadb is None:
            try:
                self._mariadb = self._started(MariaDBServer(settings=MARIADB_SETTINGS))
            except ServerMissing:
                yield None
                return
        server = self._mariadb

        def new() -> str:
            return server.url(_created(server), driver=f"mysql+{driver}")

        yield Place(f"MariaDB, {driver}", new, new)

    def _started(self, server: S) -> S:
        self._stack.callback(server.close)
        with on_server_core():
            server.start()
        return server


@contextmanager
def _files_in_memory() -> Iterator[Path]:
    """Have temporary files kept in memory if there is room, also those that app_db makes: no disk
    disturbs the figures.
    """
    before = tempfile.tempdir
    tempfile.tempdir = str(quick_tempdir())
    try:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
    finally:
        tempfile.tempdir = before


def _new_file(driver: str, directory: Path) -> Callable[[], str]:
    return lambda: f"sqlite+{driver}:///{directory / f'shop{next(_numbers)}.db'}"


def _created(server: Server) -> str:
    name = f"shop{next(_numbers)}"
    server.create_database(name)
    return name


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=False)
