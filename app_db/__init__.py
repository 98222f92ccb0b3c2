"""Named database connections whose sessions commit together.

Settings describe the connections. A container provides an engine and sessions for each. A unit of
work commits what was written to all of them, or nothing.
"""

import typing as _typing

from app_db import errors
from app_db._compat.packaging import version_of as _version_of
from app_db._sessions.routing import RoutingSession
from app_db._units.deferred import DeferredUnit
from app_db._units.manager import ContextTransactionManager, retryable
from app_db._units.markers import Provide
from app_db._units.options import Propagation
from app_db._units.transactions import Transaction, transactional
from app_db._units.unit_of_work import UnitOfWork
from app_db.container import Connection, ConnectionContainer, Container, DatabaseContainer, container_of
from app_db.errors import AppDbError
from app_db.models import Reflected, connection_of, metadata_of, orm_base
from app_db.settings import ConnectionSettings, DatabaseSettings, PoolSettings, SessionSettings

__all__ = [
    "AppDbError",
    "Connection",
    "ConnectionContainer",
    "ConnectionSettings",
    "Container",
    "ContextTransactionManager",
    "DatabaseContainer",
    "DatabaseSettings",
    "DeferredUnit",
    "PoolSettings",
    "Propagation",
    "Provide",
    "Reflected",
    "RoutingSession",
    "SessionSettings",
    "Transaction",
    "UnitOfWork",
    "connection_of",
    "container_of",
    "errors",
    "metadata_of",
    "orm_base",
    "retryable",
    "transactional",
]


if _typing.TYPE_CHECKING:
    __version__: str
else:  # hidden from checkers, which would take any name of the module for a str

    def __getattr__(name):
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return _version_of("app-db")
