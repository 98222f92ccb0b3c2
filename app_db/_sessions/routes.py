"""Which connection a statement goes to, as far as the settings and the statement itself say. Units of work are not known here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import inspect
from sqlalchemy.sql.elements import ClauseElement, ColumnClause, TextClause
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.lambdas import LambdaElement
from sqlalchemy.sql.selectable import ForUpdateArg
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.util import LRUCache

from app_db._databases.statements import Effect, effect_of, is_harmless
from app_db.errors import InvalidUse, SpansDatabases, UnknownModel
from app_db.models.bases import connection_of

if TYPE_CHECKING:
    from app_db.settings import DatabaseSettings

_JOINED = ("joined", False)
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
        # SQLAlchemy makes this key as well when it looks for the compiled statement, and keeps it until then.
        key = statement._generate_cache_key() if isinstance(statement, ClauseElement) else None
        if key is None:
            return _route_of(statement)
        route: Route | None = self._routes.get(key.key)
        if route is None:
            route = self._routes[key.key] = _route_of(statement)
        return route


def _is_strict(settings: DatabaseSettings, name: str) -> bool:
    return (name in settings.connections) and settings.connection(name).isolation_level in _STRICT


def _route_of(statement: Any) -> Route:
    _refuse_joined_loads(statement._resolved if isinstance(statement, LambdaElement) else statement)
    return Route(_connection_of(statement), is_query(statement))


def _connection_of(subject: Any) -> str | None:
    try:
        return connection_of(subject)
    except UnknownModel:
        return None


def _refuse_joined_loads(statement: Any) -> None:
    """Raise where objects are to be loaded by joins across databases: they are no part of the statement yet."""
    for parent, child in _joined_loads(statement):
        tables = [(mapper.local_table, _connection_of(mapper)) for mapper in (parent, child)]
        if len({connection for _, connection in tables if connection is not None}) > 1:
            raise SpansDatabases([(str(table), str(connection)) for table, connection in tables])


def _joined_loads(statement: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs of mappers that loading joins: by an option, or because the relationship says so."""
    options = [load for option in getattr(statement, "_with_options", ()) for load in getattr(option, "context", ())]
    paths = [(load, load.path.path) for load in options if getattr(load, "path", None) and len(load.path.path) > 2]
    yield from ((path[-3], path[-1]) for load, path in paths if ("lazy", "joined") in (load.strategy or ()))
    chosen = {path[-2] for _, path in paths}
    for mapper in _entities_of(statement):
        for relationship in mapper.relationships:
            if relationship.lazy in _JOINED and relationship not in chosen:
                yield mapper, relationship.mapper


def _entities_of(statement: Any) -> Iterator[Any]:
    if getattr(statement, "is_select", False) and hasattr(statement, "column_descriptions"):
        found = (inspect(column["entity"], raiseerr=False) for column in statement.column_descriptions if "entity" in column)
        yield from {entity.mapper for entity in found if hasattr(entity, "mapper")}


def is_query(statement: Any) -> bool:
    """Return whether all of a statement is known to do nothing but read, and to lock nothing."""
    return bool(getattr(statement, "is_select", False) or getattr(statement, "is_from_statement", False)) and not any(
        _may_do_more(element) for element in _elements_of(statement)
    )


def _elements_of(statement: Any) -> Iterator[Any]:
    whole: Any = statement._resolved if isinstance(statement, LambdaElement) else statement
    return iterate(whole)


def _may_do_more(element: Any) -> bool:
    if isinstance(element, FunctionElement):
        return bool(getattr(element, "packagenames", ())) or not is_harmless(str(getattr(element, "name", "")))
    if isinstance(element, ColumnClause):
        return element.is_literal and effect_of(f"SELECT {element.name}") is not Effect.READS
    return isinstance(element, (TextClause, ForUpdateArg)) or getattr(element, "is_dml", False)
