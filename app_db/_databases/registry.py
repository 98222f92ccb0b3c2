"""The registry of databases. Each is the `DATABASE` in a module of this package that is named like the dialect."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from sqlalchemy.exc import DBAPIError

import app_db._databases
from app_db._databases.database import Database

_UNKNOWN = Database()


@cache
def database_of(dialect: str) -> Database:
    """Return the database of a SQLAlchemy dialect."""
    return _databases().get(dialect, _UNKNOWN)


def is_transient(error: BaseException) -> bool:
    """Return whether any known database says that a driver's error may not occur when the unit of work is run again."""
    return any(database.is_transient(error) for database in _databases().values())


def is_lost_for_good(error: DBAPIError) -> bool:
    """Return whether any known database says that a connection would be lost again when the unit of work is run again."""
    return any(database.is_lost_for_good(error) for database in _databases().values())


@cache
def _databases() -> dict[str, Database]:
    names = [module.name for module in iter_modules(app_db._databases.__path__)]
    modules = {name: import_module(f"app_db._databases.{name}") for name in names}
    found = {name: getattr(module, "DATABASE", None) for name, module in modules.items()}
    return {name: database for name, database in found.items() if database is not None}
