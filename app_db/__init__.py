"""Named database connections whose sessions commit together.

Settings describe the connections. A container provides an engine and sessions for each. A unit of
work commits what was written to all of them, or nothing.
"""

import typing as _typing

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

_HOMES = {
    "app_db._sessions.routing": "RoutingSession",
    "app_db._units.deferred": "DeferredUnit",
    "app_db._units.manager": "ContextTransactionManager retryable",
    "app_db._units.markers": "Provide",
    "app_db._units.options": "Propagation",
    "app_db._units.transactions": "Transaction transactional",
    "app_db._units.unit_of_work": "UnitOfWork",
    "app_db.container": "Connection ConnectionContainer Container DatabaseContainer container_of",
    "app_db.errors": "AppDbError",
    "app_db.models": "Reflected connection_of metadata_of orm_base",
    "app_db.settings": "ConnectionSettings DatabaseSettings PoolSettings SessionSettings",
}
"""Where each name is defined. It is imported when it is first asked for: `app-db --help` needs none, and all take long."""

_MODULES = ("container", "errors", "models", "settings")
"""The modules that `import app_db` makes available."""

if _typing.TYPE_CHECKING:
    from app_db import errors
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

    __version__: str
else:  # hidden from checkers, which would take any name of the module for a str

    def __getattr__(name):
        if name == "__version__":
            return __import__("app_db._compat.packaging", fromlist=[name]).version_of("app-db")
        home = next((module for module, names in _HOMES.items() if name in names.split()), None)
        if name in _MODULES:
            found = __import__(f"app_db.{name}", fromlist=["*"])
        elif home is not None:
            found = getattr(__import__(home, fromlist=[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__():
        return sorted({*globals(), *__all__, *_MODULES})
