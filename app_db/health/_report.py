"""The report about the health of a container's connections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import inf
from typing import TYPE_CHECKING, Literal, NoReturn

from app_db._databases.facts import Role
from app_db._databases.pool_states import PoolState

Status = Literal["up", "degraded", "down"]
"""The status of a connection, and of all together."""

_WORDS: Mapping[Status, str] = {"up": "pass", "degraded": "warn", "down": "fail"}
"""What a status is called in `application/health+json`."""


@dataclass(frozen=True)
class ConnectionHealth:
    """The health of one connection. A field is None if the database does not report it, or has not answered."""

    name: str
    status: Status
    required: bool
    """Whether the report is `down` if this connection is."""
    reason: str = ""
    """Why the connection is not up, in one line without secrets."""
    milliseconds: float | None = None
    """How long it took to connect and to be told all this."""
    version: str | None = None
    """The version of the server."""
    role: Role | None = None
    lag: float | None = None
    """Seconds by which a replica is behind."""
    max_lag: float | None = None
    """The seconds by which it may be behind and still be up: `MAX_LAG` of its settings. None if there is no limit."""
    galera: str | None = None
    """The state of a node of a Galera cluster, such as `Synced`."""
    pooler: bool | None = None
    """Whether a pooler such as PgBouncer stands before the server."""
    tls: str | None = None
    """The version of TLS; empty without TLS."""
    pool: PoolState | None = None
    """How full the pools of this process are, as `container.pools()` tells. None if no engine was made yet."""
    oldest_in_doubt: float | None = None
    """Seconds since the oldest branch was prepared that is in doubt; None if there is none."""


class _Frozen(dict[str, ConnectionHealth]):
    """A dict that can't be changed. It is no MappingProxyType, which can't be pickled or given to `dataclasses.asdict`."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("A report can't be changed")

    if not TYPE_CHECKING:  # a refusal has the signature of none of them
        __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[_Frozen], tuple[dict[str, ConnectionHealth]]]:
        return _Frozen, (dict(self),)  # pickle would set each item


@dataclass(frozen=True)
class Health:
    """The health of a container's connections at one moment: what `container.health()` returns.

    >>> from app_db import DatabaseSettings, container_of
    >>> container = container_of("writer")(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> health = container.health()
    >>> health.status, health.connections["writer"].status
    ('up', 'up')
    """

    connections: Mapping[str, ConnectionHealth]
    """By the name of the connection."""
    at: datetime
    """When the report was made, in UTC."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "connections", _Frozen(self.connections))

    @property
    def status(self) -> Status:
        """`down` if a required connection is down, `degraded` if any connection is not up, and `up` otherwise."""
        if any(each.required and each.status == "down" for each in self.connections.values()):
            return "down"
        return "up" if all(each.status == "up" for each in self.connections.values()) else "degraded"

    def as_json(self) -> dict[str, object]:
        """Return the document of the type `application/health+json`, for `json.dumps()`."""
        document: dict[str, object] = {"status": _WORDS[self.status]}
        reasons = [f"{each.name}: {each.reason}" for each in self.connections.values() if each.reason]
        if reasons:
            document["output"] = "; ".join(reasons)
        time = self.at.strftime("%Y-%m-%dT%H:%M:%SZ")
        document["checks"] = {
            f"{each.name}:{measured}": [{"componentType": "datastore", **check, "time": time}]
            for each in self.connections.values()
            for measured, check in _checks(each)
        }
        return document


def _checks(health: ConnectionHealth) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield what was measured about a connection, each by its name in the document."""
    yield "responseTime", _response_time(health)
    pool = health.pool
    if pool is not None:
        most = {} if pool.most == inf else {"most": pool.most}
        yield "connections", {**_observed(pool.in_use, "connections", is_fine=not pool.is_full), **most}
    if health.lag is not None:
        is_fine = health.max_lag is None or health.lag <= health.max_lag
        limit = {} if health.max_lag is None else {"most": health.max_lag}
        yield "replicationLag", {**_observed(round(health.lag, 3), "s", is_fine=is_fine), **limit}
    if health.oldest_in_doubt is not None:
        yield "inDoubt", _observed(round(health.oldest_in_doubt, 3), "s", is_fine=health.status == "up")


def _response_time(health: ConnectionHealth) -> dict[str, object]:
    check: dict[str, object] = {"status": _WORDS[health.status], "required": health.required}
    if health.milliseconds is not None:
        check |= {"observedValue": round(health.milliseconds, 3), "observedUnit": "ms"}
    told = {field: getattr(health, field) for field in ("version", "role", "galera", "pooler", "tls")}
    check |= {field: value for field, value in told.items() if value is not None}
    return check | ({"output": health.reason} if health.reason else {})


def _observed(value: float, unit: str, *, is_fine: bool) -> dict[str, object]:
    return {"observedValue": value, "observedUnit": unit, "status": "pass" if is_fine else "warn"}
