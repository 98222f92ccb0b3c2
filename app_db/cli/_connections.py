"""What the container says of its connections, without connecting to anything: `show` and `graph` print it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isinf
from typing import TYPE_CHECKING

from app_db.container import KINDS, Connection, DatabaseContainer, _own_engine
from app_db.errors import ConnectionNotConfigured
from app_db.settings._connection_settings import DATABASE_FIELDS
from app_db.settings._urls import is_memory, masked

if TYPE_CHECKING:
    from sqlalchemy import URL

    from app_db.settings import ConnectionSettings, DatabaseSettings
    from app_db.settings._reading import Origin


@dataclass(frozen=True)
class Configured:
    """One connection, as it is configured."""

    name: str
    database: str
    """The kind of database, as SQLAlchemy calls its dialect. Empty if no database is configured."""
    url: str = ""
    place: str = ""
    """Which database it is: `shop@db:5432`, or the file."""
    identity: object = None
    """The same for all connections to the same database."""
    declared: bool = True
    """Whether the container has a provider of it; else it is in the settings only."""
    read_only: bool = False
    two_phase: bool = False
    transactional: bool = True
    own_engine: bool = False
    mirror: str | None = None
    replica_of: str | None = None
    shares_with: str | None = None
    """The connection whose transaction it uses."""
    pooler: str | None = None
    pool: str = ""
    threads: float = 0
    """The most connections that one process opens by threads."""
    coroutines: float = 0
    origins: list[Origin] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)
    """Its providers that are overridden."""

    @property
    def use(self) -> list[str]:
        """How it is used, in words."""
        if not self.database:
            return ["not configured"]
        said = {
            "read-only": self.read_only,
            "two-phase": self.two_phase,
            "autonomous": not self.transactional,
            f"mirror of {self.mirror}": self.mirror,
            f"replica of {self.replica_of}": self.replica_of,
            f"transaction of {self.shares_with}": self.shares_with,
            f"pooler: {self.pooler}": self.pooler,
            "an engine of its own": self.own_engine,
            "not in the container": not self.declared,
        }
        return [words for words, is_so in said.items() if is_so]


def configured(container: DatabaseContainer) -> list[Configured]:
    """Return the connections of a container and of its settings, by name."""
    settings = container.settings()
    declared = [name for name, provider in container.providers.items() if isinstance(provider, Connection)]
    origins = _origins_by_connection(settings)
    lenders = settings.lenders([name for name in declared if name in settings.connections])
    return [
        _configured(
            container,
            settings,
            name,
            declared=name in declared,
            lender=lenders.get(name),
            origins=[*origins.get(name, []), *_origins_of_database(settings, name, origins)],
        )
        for name in sorted({*declared, *settings.connections})
    ]


def _origins_of_database(settings: DatabaseSettings, name: str, origins: Mapping[str, Sequence[Origin]]) -> list[Origin]:
    """Return the settings of the connection that a mirror mirrors, as far as they are the mirror's, too."""
    owner = mirrored_by(settings, name)
    if owner == name or owner not in settings.connections:
        return []
    beginnings = tuple(settings.connections[owner].variable(field).lower() for field in DATABASE_FIELDS)
    return [origin for origin in origins.get(owner, []) if origin.variable.lower().startswith(beginnings)]


def _configured(
    container: DatabaseContainer,
    settings: DatabaseSettings,
    name: str,
    *,
    declared: bool,
    lender: str | None,
    origins: list[Origin],
) -> Configured:
    overridden = [kind for kind in KINDS if declared and container.providers[f"{name}_{kind}"].overridden]
    try:
        own = settings.connection(name)
    except ConnectionNotConfigured:
        return Configured(name, "", overridden=overridden)
    engine = _own_engine(container.connection(name)) if declared else None
    url = url_of(container, name)
    threads = container.capacity(coroutines=False).connections if declared else {}
    coroutines = container.capacity(threads=False).connections if declared else {}
    return Configured(
        name,
        url.get_backend_name(),
        masked(url),
        place_of(url),
        own.place if engine is None else url,
        declared,
        own.read_only,
        own.two_phase,
        own.transactional,
        engine is not None,
        mirror_of(settings, name),
        settings.replicas().get(name),
        lender,
        own.pooler,
        pool_of(own),
        threads.get(name, 0),
        coroutines.get(name, 0),
        origins,
        overridden,
    )


def url_of(container: DatabaseContainer, name: str) -> URL:
    """Return the URL of a connection, with the password: that of its own engine, or of the settings."""
    declared = isinstance(container.providers.get(name), Connection)
    engine = _own_engine(container.connection(name)) if declared else None
    return container.settings().connection(name).sqlalchemy_url() if engine is None else engine.url


def mirror_of(settings: DatabaseSettings, name: str) -> str | None:
    """Return the connection that another one mirrors. A `reader` that is not configured is the writer, read-only."""
    own = settings.connections.get(name)
    if own is None:
        return "writer" if name == "reader" else None
    return own.mirror


def mirrored_by(settings: DatabaseSettings, name: str) -> str:
    """Return the connection at the end of a connection's mirrors, or the connection itself. They have the same database."""
    while (mirrored := mirror_of(settings, name)) is not None:
        name = mirrored
    return name


def _origins_by_connection(settings: DatabaseSettings) -> dict[str, list[Origin]]:
    """Return where each setting came from, by connection; by "" for settings that all have in common."""
    beginnings = {
        name: each.variable("url").removesuffix(each.variable("url")[-3:]) for name, each in settings.connections.items()
    }
    found: dict[str, list[Origin]] = {}
    for origin in settings.origins():
        fitting = [name for name, beginning in beginnings.items() if origin.variable.lower().startswith(beginning.lower())]
        found.setdefault(max(fitting, key=len, default=""), []).append(origin)
    return found


def common_origins(settings: DatabaseSettings) -> list[Origin]:
    """Return where the settings came from that belong to no connection."""
    return _origins_by_connection(settings).get("", [])


def place_of(url: URL) -> str:
    """Return which database a URL leads to, without the user."""
    if is_memory(url):
        return "in memory"
    database = str(url.database or "")
    port = f":{url.port}" if url.port else ""
    return f"{database}@{url.host}{port}" if url.host else database


def pool_of(own: ConnectionSettings) -> str:
    """Return a pool in words: `5 + 10`, or its class."""
    size = f"{own.pool.size} + {'any number' if own.pool.max_overflow < 0 else own.pool.max_overflow}"
    return size if own.pool.class_ in (None, "queue") else own.pool.class_


def number(most: float) -> str:
    """Return a number of connections in words."""
    return "no limit" if isinf(most) else f"{most:g}"


def overridden_elsewhere(container: DatabaseContainer) -> list[str]:
    """Return the providers of the container that are overridden, without those of its connections."""
    of_connections = {
        f"{name}_{kind}" for name, each in container.providers.items() if isinstance(each, Connection) for kind in KINDS
    }
    return sorted(name for name, each in container.providers.items() if name not in of_connections and each.overridden)


def name_of(container: DatabaseContainer) -> str:
    """Return the name of a container's class."""
    return str(getattr(container.declarative_parent, "__name__", "Container"))


def decision_log(container: DatabaseContainer) -> str | None:
    """Return where decisions are written; None if no connection is two-phase."""
    logs = container.core.decision_logs()
    return str(logs.configured.place) if logs.two_phase() else None


def holder_of_decisions(container: DatabaseContainer, names: Iterable[str]) -> str | None:
    """Return the connection among `names` in whose database decisions are written; None if they are elsewhere."""
    logs = container.core.decision_logs()
    return next((name for name in names if logs.two_phase() and logs.are_in(name)), None)
