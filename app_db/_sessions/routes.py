"""Choose the connection of a statement by the settings and the statement alone, without the unit of work."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import inspect
from sqlalchemy.sql.elements import ColumnClause, TextClause
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ForUpdateArg
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.util import LRUCache

from app_db._compat.sqlalchemy import cache_key_of
from app_db._databases.statements import Effect, effect_of, is_harmless
from app_db.errors import InvalidUse, UnknownModel
from app_db.models._bases import connection_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

    from app_db.settings import DatabaseSettings

_STRICT = ("REPEATABLE READ", "SERIALIZABLE")


class Route(NamedTuple):
    """What a statement tells about its connection."""

    connection: str | None
    """The connection of the tables that it names, or None if it names none."""
    reads: bool
    """Whether it certainly only reads."""


class Routes:
    """The connections of a container and their replicas."""

    def __init__(self, settings: DatabaseSettings, names: Sequence[str]) -> None:
        self._names = names
        self._variable = settings.variable
        self._owners = {replica: owner for replica, owner in settings.replicas().items() if replica in names}
        self._replicas = {
            owner: [name for name in names if self._owners.get(name) == owner] for owner in set(self._owners.values())
        }
        self._default = self._find_default()
        self._lenders = settings.lenders(names)
        self._strict = frozenset(name for name in names if _is_strict(settings, name))
        self._turn = count()
        self._routes: LRUCache[Hashable, Route] = LRUCache(1000)
        self._of_mappers: LRUCache[object, str | None] = LRUCache(1000)

    def _find_default(self) -> str | None:
        candidates = [name for name in self._names if name not in self._owners]
        return "writer" if "writer" in candidates else candidates[0] if len(candidates) == 1 else None

    @property
    def has_default(self) -> bool:
        """Whether there is a connection for statements that name no model."""
        return self._default is not None

    @property
    def default(self) -> str:
        """The connection for statements that name no model: `writer`, or the only connection that is no replica."""
        if self._default is None:
            raise InvalidUse(
                "A statement names no model of a connection, and the container has no 'writer' to which such statements go",
                f"Say where it goes, with session.using() and one of {', '.join(map(repr, self._names)) or 'its connections'}",
            )
        return self._default

    def require(self, name: str) -> None:
        if name not in self._names:
            raise InvalidUse(f"There is no connection {name!r}", f"Use one of {', '.join(map(repr, self._names))}")

    def variable(self, name: str, setting: str) -> str:
        """Return the environment variable of a connection's setting."""
        return self._variable("connections", name, setting)

    def owner(self, name: str) -> str:
        """Return the connection of which `name` is a replica, or `name` itself."""
        return self._owners.get(name, name)

    def is_replica(self, name: str) -> bool:
        return name in self._owners

    def branch_of(self, name: str) -> str:
        """Return the connection whose branch `name` shares, or `name` itself."""
        return self._lenders.get(name, name)

    def may_lag_behind(self, name: str) -> bool:
        """Return whether reads may go to replicas of `name`. A strict isolation level forbids it: replicas are outside it."""
        return name in self._replicas and name not in self._strict

    def next_replica(self, name: str) -> str:
        """Return the replicas of `name` in turn, or `name` if there is none."""
        replicas = self._replicas.get(name)
        return replicas[next(self._turn) % len(replicas)] if replicas else name

    def of_mapper(self, mapper: object) -> str | None:
        try:
            found: str | None = self._of_mappers[mapper]
        except KeyError:
            found = self._of_mappers[mapper] = _connection_of(mapper)
        return found

    def of_statement(self, statement: object) -> Route:
        """Return the route of a statement. Routes are cached by SQLAlchemy's cache key."""
        key = cache_key_of(statement)
        if key is None:
            return self._route_of(statement)
        route: Route | None = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._route_of(statement)
        return route

    def _route_of(self, statement: object) -> Route:
        self._refuse_joined_loads(statement)
        return Route(_connection_of(statement), is_query(statement))

    def _refuse_joined_loads(self, statement: Any) -> None:
        """Raise if a joined load would join tables of two databases. The statement does not contain such joins yet."""
        if any(map(self._leads_elsewhere, _mappers_in(statement))):  # compiling is slow
            for joined in statement.get_final_froms():
                _connection_of(joined)

    def _leads_elsewhere(self, mapper: Mapper[object]) -> bool:
        """Return whether a chain of relationships leads from a mapper to another database."""
        return len({self.of_mapper(near) for near in _around(mapper)} - {None}) > 1


def _is_strict(settings: DatabaseSettings, name: str) -> bool:
    return (name in settings.connections) and settings.connection(name).isolation_level in _STRICT


def _connection_of(subject: object) -> str | None:
    try:
        return connection_of(subject)
    except UnknownModel:
        return None


def _mappers_in(statement: Any) -> set[Mapper[object]]:
    """Return the mappers of the models that a SELECT loads."""
    if not (getattr(statement, "is_select", False) and hasattr(statement, "get_final_froms")):
        return set()
    found = (inspect(column["entity"], raiseerr=False) for column in statement.column_descriptions if "entity" in column)
    return {entity.mapper for entity in found if hasattr(entity, "mapper")}


def _around(mapper: Mapper[object]) -> set[Mapper[object]]:
    """Return a mapper and all that relationships lead to from it, directly or indirectly."""
    found: set[Mapper[object]] = set()
    remaining = [mapper]
    while remaining:
        near = remaining.pop()
        if near not in found:
            found.add(near)
            remaining += [*near.self_and_descendants, *(relationship.mapper for relationship in near.relationships)]
    return found


def is_query(statement: Any) -> bool:
    """Return whether a statement certainly only reads, and locks nothing."""
    return bool(getattr(statement, "is_select", False) or getattr(statement, "is_from_statement", False)) and not any(
        _may_do_more(element) for element in iterate(statement)
    )


def _may_do_more(element: object) -> bool:
    if isinstance(element, FunctionElement):
        return bool(getattr(element, "packagenames", ())) or not is_harmless(str(getattr(element, "name", "")))
    if isinstance(element, ColumnClause):
        return element.is_literal and effect_of(f"SELECT {element.name}") is not Effect.READS
    return isinstance(element, (TextClause, ForUpdateArg)) or getattr(element, "is_dml", False)
