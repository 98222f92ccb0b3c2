"""The places where a container's units are decided: the log that is configured, and the tables of the last resources.

Each unit is decided in one of them, and the first characters of its id say in which.
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
from app_db.settings import ConnectionSettings, DatabaseSettings
from app_db.settings._database_settings import FILE

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine

log = logging.getLogger("app_db")

_BATCH = 200
"""How many acknowledged decisions are kept before they are forgotten in one go: a decision should cost one write, not two."""


class DecisionPlaces:
    """Where the decision about a unit can be. `engine` gives the engine of a connection that the application has, or None."""

    def __init__(self, settings: Callable[[], DatabaseSettings], engine: Callable[[str], Engine | None]) -> None:
        self._settings = settings
        self._engine = engine
        self._own_engines: dict[str, Engine] = {}
        self._tables: dict[tuple[str, str], TableLog] = {}
        self._files: dict[tuple[str, str], DecisionLog] = {}
        self._lock = Lock()
        self._acknowledged: dict[DecisionLog, list[str]] = {}
        _places.add(self)

    @property
    def configured(self) -> DecisionLog:
        """The log that the settings name; without `decision_log`, a table of the writer or of the first two-phase connection."""
        chosen = self._chosen()
        if not chosen.startswith(FILE):
            return self.of(chosen)
        from app_db._two_phase.decision_file import FileLog  # most applications have no decision file

        path, application = key = chosen.removeprefix(FILE), self._settings().application
        with self._lock:
            if key not in self._files:
                self._files[key] = FileLog(path, application)
            return self._files[key]

    def of(self, connection: str) -> TableLog:
        """Return the table of decisions in a connection's database."""
        key = connection, self._settings().application
        with self._lock:
            if key not in self._tables:
                self._tables[key] = TableLog(connection, lambda: self.engine(connection), key[1])
            return self._tables[key]

    def are_in(self, connection: str) -> bool:
        """Return whether the configured log is a table in the database of `connection`."""
        return self._chosen() == connection

    def may_be_in(self, connection: str) -> bool:
        """Return whether there are units that are decided in a table in the database of `connection`."""
        return bool(self.two_phase()) and (self.are_in(connection) or connection in self._last_resources())

    def all(self) -> list[DecisionLog]:
        """Return all places where units are decided: the configured log, and the tables of the possible last resources."""
        return [self.configured, *(self.of(name) for name in self._last_resources() if not self.are_in(name))]

    def two_phase(self) -> list[str]:
        """Return the connections whose databases may hold prepared branches."""
        return sorted(name for name, connection in self._settings().connections.items() if connection.two_phase)

    def driver(self, connection: str) -> str:
        """Return the dialect and driver of a connection in the settings, `postgresql+psycopg`."""
        return self._url(connection).drivername

    def prepare_verbs(self, connection: str) -> PrepareVerbs | None:
        """Return how the database of a connection prepares; None where app_db does not know."""
        url = self._url(connection)
        return database_of(url.get_backend_name()).prepare_verbs(url.get_driver_name())

    def engine(self, connection: str) -> Engine:
        """Return the engine of any connection in the settings, whether the application uses it or another one does."""
        engine = self._engine(connection)
        if engine is not None:
            return engine
        with self._lock:
            if connection not in self._own_engines:
                self._own_engines[connection] = build_engine(connection, self._settings())
            return self._own_engines[connection]

    def acknowledged(self, decision_log: DecisionLog, unit: str) -> None:
        """Note that every branch of a unit has heard the decision in `decision_log`, which can be forgotten some time."""
        with self._lock:
            units = self._acknowledged.setdefault(decision_log, [])
            units.append(unit)
            enough = len(units) >= _BATCH
        if enough:
            self.forget_acknowledged()

    def forget_acknowledged(self) -> None:
        """Forget the decisions that nobody needs, or leave that to recovery."""
        with self._lock:
            acknowledged, self._acknowledged = self._acknowledged, {}
        for decision_log, units in acknowledged.items():
            try:
                decision_log.forget(units)
            except Exception:
                log.warning("Decisions in %s could not be forgotten; recovery will do it", decision_log.place, exc_info=True)

    @property
    def in_use(self) -> bool:
        """Whether there is something to close."""
        return bool(self._own_engines or self._acknowledged)

    def close(self) -> None:
        """Forget what can be forgotten, and dispose the engines that nobody else knows of."""
        self.forget_acknowledged()
        with self._lock:
            engines, self._own_engines = self._own_engines, {}
        for engine in engines.values():
            engine.dispose()

    def _url(self, connection: str) -> URL:
        return self._settings().connection(connection).sqlalchemy_url()

    def _last_resources(self) -> list[str]:
        """Return the connections that may take part without being prepared."""
        connections = self._settings().connections
        return sorted(name for name, connection in connections.items() if _may_be_last_resource(connection))

    def _chosen(self) -> str:
        settings = self._settings()
        if settings.decision_log is not None:
            return settings.decision_log
        two_phase = self.two_phase()
        if not two_phase:
            raise InvalidUse("There is no decision log, because no connection is two-phase", "Set TWO_PHASE=true for one")
        return "writer" if "writer" in two_phase else two_phase[0]


def _may_be_last_resource(connection: ConnectionSettings) -> bool:
    return connection.transactional and not (connection.two_phase or connection.read_only)


_places: WeakSet[DecisionPlaces] = WeakSet()


def _forget_parents_locks() -> None:
    """Let a forked child go on where another thread of its parent held a lock."""
    for places in list(_places):
        places._lock = Lock()


after_fork_in_child(_forget_parents_locks)


def build_decision_places(container: Container) -> DecisionPlaces:
    """Return the places where the decisions of a container's units can be."""

    def engine(name: str) -> Engine | None:
        provider = container.providers.get(f"{name}_engine")  # what is called `name` may be a provider of another kind
        return None if provider is None else provider()

    return DecisionPlaces(lambda: container.settings(), engine)
