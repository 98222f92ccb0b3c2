"""The places where the decisions about a container's units can be: the log that is configured, and the last resources."""

from __future__ import annotations

import hashlib
import logging
import os
from base64 import b32encode
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from app_db.decision_file import FileLog
from app_db.decisions import DecisionLog, TableLog
from app_db.engines import build_engine
from app_db.errors import InvalidUse
from app_db.settings import FILE, ConnectionSettings, DatabaseSettings

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
        self._tables: dict[str, _Table] = {}
        self._files: dict[str, _File] = {}
        self._lock = Lock()
        self._acknowledged: dict[DecisionLog, list[str]] = {}
        _places.add(self)

    @property
    def configured(self) -> DecisionLog:
        """The log that the settings name; without `decision_log`, a table of the writer or of the first two-phase connection."""
        chosen = self._chosen()
        if not chosen.startswith(FILE):
            return self.of(chosen)
        path = chosen.removeprefix(FILE)
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(Path(path), self._application)
            return self._files[path]

    def of(self, connection: str) -> TableLog:
        """Return the table of decisions in a connection's database."""
        with self._lock:
            if connection not in self._tables:
                self._tables[connection] = _Table(connection, lambda: self.engine(connection), self._application)
            return self._tables[connection]

    def are_in(self, connection: str) -> bool:
        """Return whether the configured log is a table in the database of `connection`."""
        return self._chosen() == connection

    def all(self) -> list[DecisionLog]:
        """Return all places where a decision may be: the configured log, and the tables of the possible last resources."""
        settings = self._settings()
        others = [name for name, connection in settings.connections.items() if _may_be_last_resource(connection)]
        return [self.configured, *(self.of(name) for name in sorted(others) if not self.are_in(name))]

    def is_made(self, place: DecisionLog) -> bool:
        """Return whether a log is there, without making it."""
        return self.missing_file(place) is None and (not isinstance(place, TableLog) or place.exists())

    def missing_file(self, place: DecisionLog) -> Path | None:
        """Return the file of a log, or of the SQLite database that it is in, if that file is not there."""
        if isinstance(place, _File):
            path: Path | None = place.path
        else:
            path = None if not isinstance(place, _Table) else _sqlite_file(self._url(place.connection))
        return None if path is None or path.exists() else path

    def may_be_decided_in(self, place: DecisionLog) -> bool:
        """Return whether the decision about a unit of which a branch is prepared may come to stand in a log.

        Whoever decides in a table makes it, and only then prepares. On SQLite the transaction that decides makes it.
        """
        if isinstance(place, _Table) and self.engine(place.connection).dialect.name != "sqlite":
            return place is self.configured or place.exists()
        return True

    def two_phase(self) -> list[str]:
        """Return the connections whose databases may hold prepared branches."""
        return sorted(name for name, connection in self._settings().connections.items() if connection.two_phase)

    def driver(self, connection: str) -> str:
        """Return the dialect and driver of a connection in the settings, `postgresql+psycopg`."""
        return self._url(connection).drivername

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

    def _application(self) -> str:
        return self._settings().application

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


# ---- logs as one application sees them ------------------------------------------------------------------------------------

# Several applications may keep their decisions in one place. Each has its own id there, with which its units begin, so that none
# forgets what another one needs.


class _Table(TableLog):
    def __init__(self, connection: str, engine: Callable[[], Engine], application: Callable[[], str]) -> None:
        super().__init__(connection, engine)
        self.connection = connection
        self._application = application

    @property
    def id(self) -> str:
        return _id_for(self._application(), super().id)


class _File(FileLog):
    def __init__(self, path: Path, application: Callable[[], str]) -> None:
        super().__init__(path)
        self.path = path
        self._application = application

    @property
    def id(self) -> str:
        return _id_for(self._application(), super().id)


@lru_cache
def _id_for(application: str, log_id: str) -> str:
    """Return an application's own id of a log."""
    return b32encode(hashlib.sha256(f"{log_id} {application}".encode()).digest()).decode()[:6]


def _sqlite_file(url: URL) -> Path | None:
    """Return the file of a SQLite database that has one."""
    name = url.database
    if url.get_backend_name() != "sqlite" or not name or name == ":memory:" or url.query.get("mode") == "memory":
        return None
    return Path(name.removeprefix("file:").partition("?")[0])


_places: WeakSet[DecisionPlaces] = WeakSet()


def _forget_parents_locks() -> None:
    """Let a forked child go on where another thread of its parent held a lock."""
    for places in list(_places):
        places._lock = Lock()


os.register_at_fork(after_in_child=_forget_parents_locks)


class _Container(Protocol):
    providers: Any

    def settings(self) -> Any: ...


def build_decision_places(container: _Container) -> DecisionPlaces:
    """Return the places where the decisions of a container's units can be."""

    def engine(name: str) -> Engine | None:
        provider = container.providers.get(f"{name}_engine")  # what is called `name` may be a provider of another kind
        return None if provider is None else provider()

    return DecisionPlaces(container.settings, engine)
