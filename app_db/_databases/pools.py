"""Pools: which class an engine gets, whose wait a unit's time limit bounds, and whose error says which connection it is."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool, StaticPool
from sqlalchemy.util.queue import Empty

from app_db._compat.sqlalchemy import with_queue
from app_db._databases.time_limits import limit_of_checkout
from app_db.errors import UnitOfWorkTimeout

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from app_db.settings import ConnectionSettings

_POOLS: dict[str, type[Pool]] = {"queue": QueuePool, "null": NullPool, "static": StaticPool}


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
        pool_class = _named_and_limited(pool_class)
        arguments |= {
            "pool_size": pool.size,
            "max_overflow": pool.max_overflow,
            "pool_timeout": pool.timeout,
            "pool_use_lifo": pool.use_lifo,
        }
    return {"poolclass": pool_class, **arguments}


def name_pool(pool: Pool, note: Callable[[], str]) -> None:
    """Have the error of a full pool say what `note` returns."""
    if isinstance(pool, _Named):
        pool.note_if_full = note


class _Named(Pool):
    """A pool whose error says which connection it belongs to."""

    note_if_full: Callable[[], str] | None = None

    def connect(self) -> PoolProxiedConnection:
        """Return a connection. The error of a full pool says in a note which connection was wanted."""
        try:
            return super().connect()
        except (PoolTimeoutError, UnitOfWorkTimeout) as error:
            if self.note_if_full is not None and not hasattr(error, "__notes__"):  # a new connection has its own note
                error.add_note(self.note_if_full())
            raise

    def recreate(self) -> Pool:
        """Return a new pool with the same arguments, as `dispose()` needs it."""
        new = super().recreate()
        cast("_Named", new).note_if_full = self.note_if_full
        return new


class _Limited:
    """The queue of a pool: a thread or a task waits no longer for a connection than its unit may."""

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        # Each `return` is one line with the call: an exception from a signal handler between two would lose the connection.
        queue: Any = super()
        limit = limit_of_checkout.get() if block else None
        if limit is None or not limit.is_in_force():
            return queue.get(block, timeout)  # type: ignore[no-any-return]
        limit.refuse_overtime()
        try:
            return queue.get(True, limit.remaining() if timeout is None else min(timeout, limit.remaining()))  # type: ignore[no-any-return]
        except Empty:
            limit.refuse_overtime()
            raise


def _named_and_limited(pool_class: type[QueuePool]) -> type[QueuePool]:
    bases: tuple[type[Any], ...] = (_Named, with_queue(pool_class, _Limited))
    return type(pool_class.__name__, bases, {})


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
