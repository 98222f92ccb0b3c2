"""Which connection a statement goes to, as far as the settings and the statement itself say. Units of work are not known here."""

from __future__ import annotations

from collections.abc import Sequence
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
    """What a statement says about where it goes."""

    connection: str | None
    """Whose tables it names; None for a statement that doesn't say."""
    reads: bool
    """Whether it is known to do nothing but read."""


class Routes:
    """The connections of a container, and which of them are replicas of which."""

    def __init__(self, settings: DatabaseSettings, names: Sequence[str]) -> None:
        self._names = names
        self._owners = {replica: owner for replica, owner in settings.replicas().items() if replica in names}
        self._replicas = {
            owner: [name for name in names if self._owners.get(name) == owner] for owner in set(self._owners.values())
        }
        self._default = self._find_default()
        self._lenders = settings.lenders(names)
        self._strict = frozenset(name for name in names if _is_strict(settings, name))
        self._turn = count()
        self._routes: LRUCache[Any, Route] = LRUCache(1000)
        self._of_mappers: LRUCache[Any, str | None] = LRUCache(1000)

    def _find_default(self) -> str | None:
        candidates = [name for name in self._names if name not in self._owners]
        return "writer" if "writer" in candidates else candidates[0] if len(candidates) == 1 else None

    @property
    def has_default(self) -> bool:
        """Whether there is a connection for statements that don't say where they go."""
        return self._default is not None

    @property
    def default(self) -> str:
        """Where statements go that don't say where: to `writer`, or to the only connection that is no replica."""
        if self._default is None:
            raise InvalidUse(
                "A statement names no model of a connection, and the container has no 'writer' to which such statements go",
                f"Say where it goes, with session.using() and one of {', '.join(map(repr, self._names)) or 'its connections'}",
            )
        return self._default

    def require(self, name: str) -> None:
        """Raise unless the container has a connection of that name."""
        if name not in self._names:
            raise InvalidUse(f"There is no connection {name!r}", f"Use one of {', '.join(map(repr, self._names))}")

    def owner(self, name: str) -> str:
        """Return what a connection is a replica of, or the connection itself."""
        return self._owners.get(name, name)

    def is_replica(self, name: str) -> bool:
        """Return whether a connection is a replica of another one."""
        return name in self._owners

    def branch_of(self, name: str) -> str:
        """Return whose branch of a unit what goes to `name` is a part of: of the connection whose transaction it shares."""
        return self._lenders.get(name, name)

    def may_lag_behind(self, name: str) -> bool:
        """Return whether reads of a unit that may write can go to replicas of `name`, which its isolation can't include."""
        return name in self._replicas and name not in self._strict

    def next_replica(self, name: str) -> str:
        """Return one of the replicas of `name`, in turn, or `name` where there is none."""
        replicas = self._replicas.get(name)
        return replicas[next(self._turn) % len(replicas)] if replicas else name

    def of_mapper(self, mapper: Any) -> str | None:
        """Return whose tables a mapper maps."""
        try:
            found: str | None = self._of_mappers[mapper]
        except KeyError:
            found = self._of_mappers[mapper] = _connection_of(mapper)
        return found

    def of_statement(self, statement: Any) -> Route:
        """Return the route of a statement. Asked again for one of the same shape, it needn't look at it."""
        key = cache_key_of(statement)
        if key is None:
            return self._route_of(statement)
        route: Route | None = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._route_of(statement)
        return route

    def _route_of(self, statement: Any) -> Route:
        self._refuse_joined_loads(statement)
        return Route(_connection_of(statement), is_query(statement))

    def _refuse_joined_loads(self, statement: Any) -> None:
        """Raise where objects are to be loaded by joins across databases. Such joins are no part of the statement yet."""
        if any(map(self._leads_elsewhere, _mappers_in(statement))):  # compiling a statement takes its time
            for joined in statement.get_final_froms():
                _connection_of(joined)

    def _leads_elsewhere(self, mapper: Mapper[Any]) -> bool:
        """Return whether relationships lead from a mapper's objects, one after the other, to another database."""
        return len({self.of_mapper(near) for near in _around(mapper)} - {None}) > 1


def _is_strict(settings: DatabaseSettings, name: str) -> bool:
    return (name in settings.connections) and settings.connection(name).isolation_level in _STRICT


def _connection_of(subject: Any) -> str | None:
    try:
        return connection_of(subject)
    except UnknownModel:
        return None


def _mappers_in(statement: Any) -> set[Mapper[Any]]:
    """Return the mappers of the models that a SELECT loads."""
    if not (getattr(statement, "is_select", False) and hasattr(statement, "get_final_froms")):
        return set()
    found = (inspect(column["entity"], raiseerr=False) for column in statement.column_descriptions if "entity" in column)
    return {entity.mapper for entity in found if hasattr(entity, "mapper")}


def _around(mapper: Mapper[Any]) -> set[Mapper[Any]]:
    """Return a mapper and those to which relationships lead from it, directly or by others."""
    found: set[Mapper[Any]] = set()
    remaining = [mapper]
    while remaining:
        near = remaining.pop()
        if near not in found:
            found.add(near)
            remaining += [*near.self_and_descendants, *(relationship.mapper for relationship in near.relationships)]
    return found


def is_query(statement: Any) -> bool:
    """Return whether all of a statement is known to do nothing but read, and to lock nothing."""
    return bool(getattr(statement, "is_select", False) or getattr(statement, "is_from_statement", False)) and not any(
        _may_do_more(element) for element in iterate(statement)
    )


def _may_do_more(element: Any) -> bool:
    if isinstance(element, FunctionElement):
        return bool(getattr(element, "packagenames", ())) or not is_harmless(str(getattr(element, "name", "")))
    if isinstance(element, ColumnClause):
        return element.is_literal and effect_of(f"SELECT {element.name}") is not Effect.READS
    return isinstance(element, (TextClause, ForUpdateArg)) or getattr(element, "is_dml", False)
