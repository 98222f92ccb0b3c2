"""Private names of SQLAlchemy, for which it has no public way. Each stands here once, and has a test."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

from sqlalchemy.orm.exc import DetachedInstanceError
from sqlalchemy.orm.mapper import _all_registries
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql.cache_key import HasCacheKey

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine, RootTransaction, Transaction
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.orm import Mapper, Session, SessionTransaction

# ---- sessions and their transactions ------------------------------------------------------------------------------------


def is_flushing(session: Session) -> bool:
    """Return whether a flush, or a bulk method, is under way in a session.

    An override of `flush()` could note it. But an exception from a signal handler between two lines of the override would leave
    the note, and the end of the unit would wait for a flush that is over.
    """
    return session._flushing


def prepare_to_commit(transaction: SessionTransaction) -> None:
    """Do everything before a session's COMMIT: call the listeners to `before_commit`, release savepoints, flush.

    The session refuses statements afterwards, until `transaction.commit()` sends COMMIT and nothing else. The public `prepare()`
    is for sessions with `twophase=True`, which prepare their connections themselves.
    """
    transaction._prepare_impl()


class _NotItsOwn:
    """Stands for the transaction of a lent connection, which the session must not end."""

    def rollback(self) -> None:
        """Do nothing."""


_NOT_ITS_OWN = cast("Transaction", _NotItsOwn())


def lend(connection: Connection, transaction: SessionTransaction) -> None:
    """Make a session use a connection that it does not begin, commit, roll back or close.

    Of the public `join_transaction_mode`s, "rollback_only" rolls the connection's transaction back, and "create_savepoint" sends
    SAVEPOINT.
    """
    _connections_of(transaction).setdefault(connection, (connection, _NOT_ITS_OWN, False, False))


def hand_over(connection: Connection, begun: RootTransaction, transaction: SessionTransaction) -> None:
    """Make a session go on in `begun`, the transaction of a connection, and commit, roll back and close it with its own.

    With the public mode "control_fully", a session that is bound to the connection does so too. But it takes the innermost
    savepoint for the transaction, and leaves the connection open.
    """
    connections = _connections_of(transaction)
    connections[connection] = connections[connection.engine] = (connection, begun, True, True)


def take_away(transaction: SessionTransaction, connections: Iterable[Connection] | None = None) -> None:
    """Make a session's transaction forget these connections, or all of them. Nothing is sent."""
    held = _connections_of(transaction)
    if connections is None:
        held.clear()
        return
    for connection in connections:
        held.pop(connection, None)
        held.pop(connection.engine, None)


def _connections_of(transaction: SessionTransaction) -> dict[Connection | Engine, tuple[Connection, Transaction, bool, bool]]:
    """Return the connections of a session's transaction: with their transactions, and whether to commit and to close them."""
    return transaction._connections


# ---- statements -----------------------------------------------------------------------------------------------------------


def cache_key_of(element: object) -> Hashable | None:
    """Return a key that is equal for statements that differ only in their parameters; None if SQLAlchemy does not cache it.

    SQLAlchemy needs the same key to find the compiled statement, and keeps it on the statement until then.
    """
    caching = element._generate_cache_key() if isinstance(element, HasCacheKey) else None
    return None if caching is None else caching.key


# ---- models -----------------------------------------------------------------------------------------------------------------


def when_unmapped(base: Any, refuse: Callable[[type[object]], NoReturn]) -> None:
    """Make SQLAlchemy call `refuse` with a subclass of `base` that is used before it is mapped.

    Otherwise SQLAlchemy raises UnmappedClassError, whose message names methods that users of app_db do not call.
    """
    base._sa_raise_deferred_config = classmethod(refuse)


def mapped_classes() -> list[type]:
    """Return all classes that are mapped in this process. SQLAlchemy has a list for each registry, and none of registries."""
    # Not `known.mappers`, which raises if a class is only being mapped.
    return [manager.class_ for known in _all_registries() for manager in list(known._managers) if manager.is_mapped]


class _Noted:
    """Loads an attribute as SQLAlchemy does, and adds a note to the error of an object that no session holds any more."""

    def __init__(self, load: Callable[..., Any], note: Callable[[str | None], str], key: str | None) -> None:
        self._load, self._note, self._key = load, note, key

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._load(*arguments)
        except DetachedInstanceError as error:
            error.add_note(self._note(self._key))
            raise


def note_detached(mapper: Mapper[Any], note: Callable[[str | None], str]) -> None:
    """Make the DetachedInstanceError of a model's attribute that is not loaded say what `note` returns for the attribute.

    For an attribute that has expired it is called with None. SQLAlchemy has no event for reading an attribute.
    """
    manager: Any = mapper.class_manager
    for key, attribute in manager.items():
        load = getattr(attribute.impl, "callable_", None)
        if load is not None and not isinstance(load, _Noted):
            attribute.impl.callable_ = _Noted(load, note, key)
    expired = manager.expired_attribute_loader
    if not isinstance(expired, _Noted):
        manager.expired_attribute_loader = _Noted(expired, note, None)


# ---- async connections --------------------------------------------------------------------------------------------------


def listeners_to(engine: Engine, event: str) -> Sequence[Callable[..., object]]:
    """Return what listens to an event of an engine, those that listen to all engines left out: SQLAlchemy calls them itself."""
    found: Any = getattr(engine.dispatch, event)
    return list(found.listeners)


def is_executing(dbapi_connection: DBAPIConnection) -> bool:
    """Return whether a statement on an async connection has begun and not ended. The next one would wait for ever."""
    mutex = getattr(dbapi_connection, "_execute_mutex", None)
    return mutex is not None and bool(mutex.locked())


# ---- pools --------------------------------------------------------------------------------------------------------------


def max_overflow_of(pool: QueuePool) -> int:
    """Return how many connections a pool opens beside those that it keeps. `status()` tells it only in a sentence."""
    return pool._max_overflow


OWN_TIMEOUT = "app_db_timeout"
"""The attribute of a pool in which `with_timeout` keeps the timeout that it was made with."""


def with_timeout(pool_class: type[QueuePool], read: Callable[[Any], float]) -> type[QueuePool]:
    """Return a subclass of a pool that waits `read(pool)` seconds for a connection, asked in the thread that waits.

    A method of ours around the pool's queue would do, too, but an exception from a signal handler in it would lose the
    connection that the queue has just given out.
    """

    def write(pool: Any, timeout: float) -> None:
        vars(pool)[OWN_TIMEOUT] = timeout

    return type(pool_class.__name__, (pool_class,), {"_timeout": property(read, write)})
