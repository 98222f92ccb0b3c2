"""The decision logs of a container: the configured log, and a table in the database of each possible last resource.

Each unit is decided in one of them. The first characters of its id are the id of that log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakSet

from app_db._compat.os import after_fork_in_child
from app_db._databases.containers import Container
from app_db._databases.engines import build_engine
from app_db._databases.prepare_verbs import PrepareVerbs
from app_db._databases.registry import database_of
from app_db._two_phase.decision_table import TableLog
from app_db._two_phase.decisions import DecisionLog
from app_db.errors import InvalidUse
from app_db.settings import DatabaseSettings
from app_db.settings._database_settings import FILE

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine

log = logging.getLogger("app_db")

_BATCH = 200
"""How many decisions that are no longer needed are collected before one statement removes them."""


class DecisionLogs:
    """Finds decision logs. `engine` returns the engine that the application has for a connection, or None."""

    def __init__(self, settings: Callable[[], DatabaseSettings], engine: Callable[[str], Engine | None]) -> None:
        self._settings = settings
        self._engine = engine
        self._own_engines: dict[str, Engine] = {}
        self._tables: dict[tuple[str, str], TableLog] = {}
        self._files: dict[tuple[str, str], DecisionLog] = {}
        self._lock = Lock()
        self._acknowledged: dict[DecisionLog, list[str]] = {}
        _instances.add(self)

    @property
    def configured(self) -> DecisionLog:
        """The configured log. The default is a table in the database of `writer`, or of the first two-phase connection."""
        chosen = self._chosen()
        if not chosen.startswith(FILE):
            return self.of(chosen)
        from app_db._two_phase.decision_file import FileLog  # not at start-up: most applications have no decision file

        path, application = key = chosen.removeprefix(FILE), self._settings().application
        with self._lock:
            if key not in self._files:
                self._files[key] = FileLog(path, application)
            return self._files[key]

    def of(self, connection: str) -> TableLog:
        """Return the log in the database of a connection."""
        key = connection, self._settings().application
        with self._lock:
            if key not in self._tables:
                self._tables[key] = TableLog(connection, lambda: self.engine(connection), key[1])
            return self._tables[key]

    def are_in(self, connection: str) -> bool:
        """Return whether the configured log is a table in the database of `connection`."""
        return self._chosen() == connection

    def may_be_in(self, connection: str) -> bool:
        """Return whether units may be decided in a table in the database of `connection`."""
        return bool(self.two_phase()) and (self.are_in(connection) or connection in self._last_resources())

    def all(self) -> list[DecisionLog]:
        """Return all logs: the configured one, and the tables of the possible last resources."""
        return [self.configured, *(self.of(name) for name in self._last_resources() if not self.are_in(name))]

    def variable(self, *path: str) -> str:
        """Return the environment variable of a setting."""
        return self._settings().variable(*path)

    def two_phase(self) -> list[str]:
        """Return the connections whose databases may hold prepared branches."""
        return sorted(name for name, connection in self._settings().connections.items() if connection.two_phase)

    def driver(self, connection: str) -> str:
        """Return the dialect and driver of a connection, such as `postgresql+psycopg`."""
        return self._url(connection).drivername

    def prepare_verbs(self, connection: str) -> PrepareVerbs | None:
        """Return the statements by which the database of a connection prepares; None if app_db does not know them."""
        url = self._url(connection)
        return database_of(url.get_backend_name()).prepare_verbs(url.get_driver_name())

    def engine(self, connection: str) -> Engine:
        """Return the engine of a connection in the settings, also of one that the application does not use."""
        engine = self._engine(connection)
        if engine is not None:
            return engine
        with self._lock:
            if connection not in self._own_engines:
                self._own_engines[connection] = build_engine(connection, self._settings())
            return self._own_engines[connection]

    def acknowledged(self, decision_log: DecisionLog, unit: str) -> None:
        """Note that every branch of a unit has ended, so the decision in `decision_log` can be removed."""
        with self._lock:
            units = self._acknowledged.setdefault(decision_log, [])
            units.append(unit)
            enough = len(units) >= _BATCH
        if enough:
            self.forget_acknowledged()

    def forget_acknowledged(self) -> None:
        """Remove the decisions that are no longer needed. What fails is left to recovery."""
        with self._lock:
            acknowledged, self._acknowledged = self._acknowledged, {}
        for decision_log, units in acknowledged.items():
            try:
                decision_log.forget(units)
            except Exception:
                log.warning("Decisions in %s could not be removed; recovery will do it", decision_log.place, exc_info=True)

    @property
    def in_use(self) -> bool:
        """Whether there is something to close."""
        return bool(self._own_engines or self._acknowledged)

    def close(self) -> None:
        """Remove the decisions that are no longer needed, and dispose the engines that were built here."""
        self.forget_acknowledged()
        with self._lock:
            engines, self._own_engines = self._own_engines, {}
        for engine in engines.values():
            engine.dispose()

    def _url(self, connection: str) -> URL:
        return self._settings().connection(connection).sqlalchemy_url()

    def _last_resources(self) -> list[str]:
        """Return the connections that can be last resources."""
        connections = self._settings().connections.items()
        return sorted(name for name, each in connections if each.transactional and not (each.two_phase or each.read_only))

    def _chosen(self) -> str:
        settings = self._settings()
        if settings.decision_log is not None:
            return settings.decision_log
        two_phase = self.two_phase()
        if not two_phase:
            raise InvalidUse("There is no decision log, because no connection is two-phase", "Set TWO_PHASE=true for one")
        return "writer" if "writer" in two_phase else two_phase[0]


_instances: WeakSet[DecisionLogs] = WeakSet()


def _forget_parents_locks() -> None:
    """Replace the locks in a forked child: a thread of its parent may have held them."""
    for logs in list(_instances):
        logs._lock = Lock()


after_fork_in_child(_forget_parents_locks)


def build_decision_logs(container: Container) -> DecisionLogs:
    """Return the decision logs of a container."""

    def engine(name: str) -> Engine | None:
        provider = container.providers.get(f"{name}_engine")  # the provider called `name` may be of another kind
        return None if provider is None else provider()

    return DecisionLogs(lambda: container.settings(), engine)
