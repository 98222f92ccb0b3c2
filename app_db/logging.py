"""Log records that say which unit of work and which connection they belong to."""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from app_db._compat.importing import is_being_imported
from app_db._units.manager import current
from app_db._wording import in_one_line
from app_db.errors import InvalidUse

if TYPE_CHECKING:
    from app_db.container import DatabaseContainer

__all__ = ["UnitFilter"]

_ENGINE_LOGGERS = "sqlalchemy.engine.Engine.", "sqlalchemy.pool.impl."
"""What precedes a connection's name in the names of SQLAlchemy's loggers, if the connection has ECHO=true."""


_NONE = "-"


class UnitFilter(logging.Filter):
    """Give each record the attributes `unit` and `connection`, for a formatter: `%(unit)s %(connection)s %(message)s`.

    `unit` is the number of the unit of work in which the record was made, as `unit.number` and `container.pools()` have it.
    `connection` is the name of the connection that a record of app_db or SQLAlchemy is about. Both are `-` where there is none.

    Add it to handlers: a filter of a logger is not asked about the records of loggers below it. For `logging.config.dictConfig`,
    name the container: `{"()": "app_db.logging.UnitFilter", "container": "shop.db:container"}`.

    >>> import logging
    >>> from app_db import Container, DatabaseSettings
    >>> from app_db.logging import UnitFilter
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> record = logging.makeLogRecord({"name": "shop", "msg": "an order was placed"})
    >>> with container.transaction() as unit:
    ...     UnitFilter(container).filter(record)
    ...     vars(record)["unit"] == str(unit.number)
    True
    True
    """

    def __init__(self, container: DatabaseContainer | str) -> None:
        super().__init__()
        if isinstance(container, str):
            if not all(container.partition(":")):
                raise InvalidUse(f"{container!r} names no container", "Write it as module:name, such as shop.db:container")
        elif not _is_container(container):
            raise InvalidUse(f"{container!r} is no database container", "Give an instance, such as Container(), or its name")
        self._container: DatabaseContainer | str | None = container

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes. Each record passes."""
        known = vars(record)
        for name, value in (("unit", self._unit), ("connection", lambda: _connection_of(record))):
            given = value() if known.get(name) in (None, _NONE) else known[name]  # another filter may have found none
            known[name] = _NONE if given is None else str(given)
        return True

    def _unit(self) -> int | None:
        """Return the number of the current unit, or None."""
        container = self._found()
        if container is None:
            return None
        coordinator = container.core.coordinator()
        transaction = current(coordinator.manager)
        return None if transaction is None else coordinator.work_of(transaction).number

    def _found(self) -> DatabaseContainer | None:
        """Return the container. One that can't be imported is told once: a log call must not fail."""
        named = self._container
        if not isinstance(named, str):
            return named
        module, _, path = named.partition(":")
        if is_being_imported(module):  # what it logs meanwhile comes before the container
            return None
        self._container = None  # what is logged while it is imported, has no unit
        try:
            found: Any = import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
            if not _is_container(found):
                raise InvalidUse(f"it is no database container, but {type(found).__name__}", "Name an instance")
        except Exception as error:  # noqa: BLE001  # the application may raise anything
            message = f"UnitFilter can't find the container {named!r} ({in_one_line(error)}). Records have no unit"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return None
        self._container = cast("DatabaseContainer", found)
        return self._container


def _is_container(given: object) -> bool:
    return not isinstance(given, type) and hasattr(given, "deferred_unit")


def _connection_of(record: logging.LogRecord) -> str | None:
    for prefix in _ENGINE_LOGGERS:
        if record.name.startswith(prefix):
            return record.name.removeprefix(prefix).partition(".")[0]
    return None
