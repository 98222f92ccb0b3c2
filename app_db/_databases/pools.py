"""Pools: which class an engine gets, whose wait a unit's time limit bounds, and whose error says which connection it is."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool, StaticPool

from app_db._compat.sqlalchemy import OWN_TIMEOUT, with_timeout
from app_db._databases.time_limits import limit_of_checkout
from app_db.errors import UnitOfWorkTimeout

if TYPE_CHECKING:
    from sqlalchemy.pool import PoolProxiedConnection

    from app_db.settings import ConnectionSettings

_POOLS: dict[str, type[Pool]] = {"queue": QueuePool, "null": NullPool, "static": StaticPool}


guards: list[Callable[[Pool], None]] = []
"""Called with a pool that is asked for a connection, before it gives one. Tests add some, which raise to refuse it."""


def pool_arguments(connection: ConnectionSettings, *, asynchronous: bool) -> dict[str, object]:
    """Return the arguments of `create_engine` about its pool."""
    pool = connection.pool
    pool_class = pool_class_of(pool.class_)
    if asynchronous and issubclass(pool_class, QueuePool) and not issubclass(pool_class, AsyncAdaptedQueuePool):
        pool_class = _for_coroutines(pool_class)
    elif pool_class is AsyncAdaptedQueuePool and not asynchronous:
        pool_class = QueuePool
    arguments: dict[str, object] = {
        "pool_recycle": -1 if pool.recycle is None else pool.recycle,
        "pool_reset_on_return": None,  # engines.py registers a listener that does it
    }
    if issubclass(pool_class, QueuePool):
        pool_class = with_timeout(pool_class, _limited_timeout)
        arguments |= {
            "pool_size": pool.size,
            "max_overflow": pool.max_overflow,
            "pool_timeout": pool.timeout,
            "pool_use_lifo": pool.use_lifo,
        }
    return {"poolclass": type(pool_class.__name__, (_Timed, pool_class), {}), **arguments}


def name_pool(pool: Pool, note: Callable[[], str]) -> None:
    """Have the error of a full pool say what `note` returns."""
    if isinstance(pool, _Timed):
        pool.note_if_full = note


class _Timed(Pool):
    """A pool whose errors say which connection is meant, and whether the time of the unit of work was over."""

    note_if_full: Callable[[], str] | None = None

    def connect(self) -> PoolProxiedConnection:
        """Return a connection. The time limit's error replaces any error after the deadline.

        A driver that was cut off may raise it at any step of a new connection, also in those that SQLAlchemy and listeners take.
        """
        for guard in guards:
            guard(self)
        try:
            return super().connect()
        except Exception as error:
            limit = limit_of_checkout.get()
            overtime = None if limit is None or not limit.is_in_force() else limit.overtime()
            shown = overtime or error
            if self.note_if_full is not None and isinstance(error, PoolTimeoutError):
                shown.add_note(self.note_if_full())
            if overtime is None or isinstance(error, UnitOfWorkTimeout):
                raise
            raise overtime from error

    def recreate(self) -> Pool:
        """Return a new pool with the same arguments, as `dispose()` needs it."""
        new = super().recreate()
        cast("_Timed", new).note_if_full = self.note_if_full
        return new


_LONGER = 0.002
"""Seconds that are added to the wait, so that the limit has passed by any clock when it ends."""


def _limited_timeout(pool: Pool) -> float:
    """Return how long the unit of work in this context may wait for a connection of the pool."""
    timeout: float = vars(pool)[OWN_TIMEOUT]
    limit = limit_of_checkout.get()
    return timeout if limit is None or not limit.is_in_force() else min(timeout, limit.remaining() + _LONGER)


def _for_coroutines(pool_class: type[QueuePool]) -> type[Pool]:
    """Return a subclass of a queue pool for async engines."""
    if pool_class is QueuePool:
        return AsyncAdaptedQueuePool
    bases: tuple[Any, ...] = (pool_class, AsyncAdaptedQueuePool)
    return type(pool_class.__name__, bases, {})


def pool_class_of(name: str | None) -> type[Pool]:
    """Return the class that the settings name. For coroutines, an engine gets a subclass of it."""
    if name is None:
        return QueuePool
    if name in _POOLS:
        return _POOLS[name]
    module, _, attribute = name.replace(":", ".").rpartition(".")
    pool_class: type[Pool] = getattr(import_module(module), attribute)
    return pool_class
