"""How full the pools of a connection are, and who holds what they have given out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app_db._databases.capacity import most_of
from app_db._databases.engines import holders_of
from app_db._databases.holders import Holder

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.pool import Pool


@dataclass(frozen=True)
class PoolState:
    """The pools of one connection in this process: that of its engine, and one for each event loop.

    >>> from app_db import Container, DatabaseSettings
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite:///shop.db"}}))
    >>> with container.transaction():
    ...     connection = container.writer_session().connection()
    ...     state = container.pools()["writer"]
    >>> state.in_use, state.most
    (1, 15)
    """

    connection: str
    """The name of the connection."""
    in_use: int
    """How many connections are in use."""
    idle: int
    """How many are open and wait to be used."""
    most: float
    """How many can be open at once; `math.inf` if there is no limit, 0 if nothing has connected yet."""
    holders: tuple[Holder, ...]
    """Who holds those in use, from the longest on. Engines of the application's own don't tell."""
    is_full: bool
    """Whether one of the pools has none left, so that the next who needs one of it has to wait."""

    def __str__(self) -> str:
        lines = [f"{self.connection}: {self.in_use} of {self.most} in use, {self.idle} idle", *map(str, self.holders)]
        return "\n  ".join(lines)


def state_of(name: str, engines: Iterable[Engine]) -> PoolState:
    """Return the state of a connection's pools, from the engines that the connection has."""
    in_use, idle = 0, 0
    most: float = 0
    is_full = False
    found: list[Holder] = []
    for engine in engines:
        holders = holders_of(engine)
        taken, limit = _counted(engine.pool, "checkedout") if holders is None else len(holders), most_of(engine.pool)
        in_use += taken
        idle += _counted(engine.pool, "checkedin")
        most += limit
        is_full = is_full or taken >= limit
        found += holders or ()
    return PoolState(name, in_use, idle, most, tuple(sorted(found, key=lambda holder: -holder.seconds)), is_full)


def _counted(pool: Pool, method: str) -> int:
    """Return what a pool counts, or 0 if it is one of those that don't count."""
    counted: int = getattr(pool, method, int)()
    return counted
