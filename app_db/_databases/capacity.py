"""How many connections a process can open to its database servers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from sqlalchemy.pool import Pool, QueuePool, SingletonThreadPool, StaticPool

from app_db._compat.sqlalchemy import max_overflow_of
from app_db._databases.pools import pool_class_of
from app_db._databases.registry import database_of
from app_db.errors import InvalidUse
from app_db.settings import ConnectionSettings


@dataclass(frozen=True)
class Capacity:
    """The most connections that one process can open. A number is `math.inf` if the pool has no limit.

    >>> from app_db import DatabaseSettings, container_of
    >>> shop = {"url": "postgresql://db/shop", "pool": {"size": 3, "max_overflow": 2}}
    >>> capacity = container_of("writer")(settings=DatabaseSettings(connections={"writer": shop})).capacity()
    >>> capacity.connections["writer"], capacity.total, capacity.for_workers(4)
    (10, 10, 40)
    """

    connections: Mapping[str, float]
    """By the name of the connection. SQLite has no server, and counts 0."""

    @property
    def total(self) -> float:
        """The sum of all connections."""
        return sum(self.connections.values())

    def for_workers(self, processes: int) -> float:
        """Return the sum for so many processes. Compare it with `max_connections` of the server."""
        if processes < 1:
            raise InvalidUse(f"{processes!r} is no number of processes", "Give a whole number from 1 on")
        return self.total * processes

    def __str__(self) -> str:
        lines = [f"{name}: {number}" for name, number in self.connections.items()]
        return "\n".join([*lines, f"total: {self.total}"])


def most_of(pool: Pool) -> float:
    """Return how many connections a pool can open."""
    if isinstance(pool, QueuePool):
        return inf if (extra := max_overflow_of(pool)) < 0 else pool.size() + extra
    return 1 if isinstance(pool, (StaticPool, SingletonThreadPool)) else inf


def most_by_settings(connection: ConnectionSettings) -> float:
    """Return how many connections an engine can open that is made from settings."""
    if not database_of(connection.sqlalchemy_url().get_backend_name()).waits_for_answers:
        return 0
    pool_class, pool = pool_class_of(connection.pool.class_), connection.pool
    if issubclass(pool_class, QueuePool):
        return inf if pool.max_overflow < 0 else pool.size + pool.max_overflow
    if issubclass(pool_class, StaticPool):
        return 1
    return inf  # it connects each time, or is a class of the application's that does not say
