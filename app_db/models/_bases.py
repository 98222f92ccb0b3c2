"""Declarative bases and metadata by connection name: a model knows the name of its connection, and never an engine.

The name stands in the `info` of the MetaData that a model's table is in, under `CONNECTION`, and everything else reads it
there. A MetaData of the application's own with that key does as well as one of `metadata_of`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import new_class
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from sqlalchemy import Column, MetaData, Sequence, Table, inspect
from sqlalchemy.ext.declarative import DeferredReflection
from sqlalchemy.orm import (
    DeclarativeBase,
    InspectionAttr,
    InstanceState,
    MappedColumn,
    Mapper,
    MapperProperty,
    QueryableAttribute,
)
from sqlalchemy.orm.decl_api import DeclarativeAttributeIntercept
from sqlalchemy.orm.util import AliasedInsp
from sqlalchemy.sql.ddl import BaseDDLElement
from sqlalchemy.sql.elements import ClauseElement, ColumnClause
from sqlalchemy.sql.functions import next_value

from app_db._compat.sqlalchemy import cache_key_of, when_unmapped
from app_db.errors import InvalidUse, NotReflected, SpansDatabases, UnknownModel
from app_db.settings._connection_settings import CONNECTION_NAME_RULE, is_connection_name

CONNECTION = "app_db_connection"
"""The key in a MetaData's `info` under which the name of its connection stands."""

# ---- what a model is made from ----------------------------------------------------------------------------------------

_metadata: dict[str, MetaData] = {}


def metadata_of(name: str = "writer", *, naming_convention: Mapping[str, Any] | None = None) -> MetaData:
    """Return the one MetaData of this process for the tables of the connection `name`.

    Settings need not be there yet. A naming convention holds for all who ask for that name, and has to be given before there are
    tables.

    >>> from app_db import metadata_of
    >>> metadata_of("warehouse") is metadata_of("warehouse")
    True
    """
    known = _metadata.get(name) or _metadata.setdefault(_checked(name), MetaData(info={CONNECTION: name}))
    if naming_convention is not None:
        _agree(name, known, naming_convention)
    return known


def _checked(name: str) -> str:
    if not is_connection_name(name):
        raise InvalidUse(f"A connection can't be called {name!r}", f"Its name must be {CONNECTION_NAME_RULE}")
    return name


def _agree(name: str, known: MetaData, naming_convention: Mapping[str, Any]) -> None:
    wanted = MetaData(naming_convention=dict(naming_convention)).naming_convention
    if known.naming_convention == wanted:
        return
    if known.naming_convention != MetaData().naming_convention:
        problem = f"Two different naming conventions were given for the tables of {name!r}"
        raise InvalidUse(problem, "Give one of them, in the place that is imported first")
    if known.tables:
        problem = f"A naming convention was given for the tables of {name!r} when there were some without it already"
        raise InvalidUse(problem, "Give it to the first orm_base() or metadata_of() of that name")
    known.naming_convention = wanted


class _OrmBase:
    """Beside DeclarativeBase in a base of `orm_base`: lets a class below it that declares nothing be a base, too."""

    if TYPE_CHECKING:
        __abstract__: bool

    def __init_subclass__(cls, **arguments: Any) -> None:
        if DeclarativeBase not in cls.__bases__ and _declares_nothing(cls):
            cls.__abstract__ = True
        super().__init_subclass__(**arguments)


_SAYS_WHAT_A_TABLE_IS = frozenset({"__annotations__", "__annotate__", "__annotate_func__", "__table__", "__tablename__"})


def _declares_nothing(base: type[Any]) -> bool:
    inherits = any(hasattr(base, name) for name in ("__table__", "__tablename__", "__mapper__"))
    return not inherits and not any(_is_declared(name, value) for name, value in vars(base).items())


def _is_declared(name: str, value: object) -> bool:
    if name in _SAYS_WHAT_A_TABLE_IS or isinstance(value, Column | MappedColumn | MapperProperty):
        return True
    # An association proxy, whose module takes long to import.
    return isinstance(value, InspectionAttr) and value.extension_type.name == "ASSOCIATION_PROXY"


def orm_base(
    name: str = "writer", *, naming_convention: Mapping[str, Any] | None = None, reflected: bool = False
) -> type[DeclarativeBase]:
    """Return a new declarative base, for models of the connection `name`. All bases of one name share `metadata_of(name)`.

    The models of a `reflected` base get their columns from the database: see `Reflected`.

    >>> from app_db import connection_of, orm_base
    >>> from sqlalchemy.orm import Mapped, mapped_column
    >>> class Base(orm_base("archive")):
    ...     pass
    >>> class Letter(Base):
    ...     __tablename__ = "letters"
    ...     id: Mapped[int] = mapped_column(primary_key=True)
    >>> connection_of(Letter)
    'archive'

    mypy takes no call for a base class. For mypy, the same is said so:

        class Base(DeclarativeBase):
            metadata = metadata_of("archive")
    """
    metadata = metadata_of(name, naming_convention=naming_convention)
    bases = (_OrmBase, Reflected, DeclarativeBase) if reflected else (_OrmBase, DeclarativeBase)
    attributes = {"metadata": metadata, "__doc__": f"The base of models of {name!r}."}
    base: type[DeclarativeBase] = new_class("Base", bases, exec_body=lambda namespace: namespace.update(attributes))
    return base


# ---- models that are filled from the database -------------------------------------------------------------------------

REFLECTED = "app_db_reflected"
"""The key in a table's `info` that says that the table is somebody else's to create: it was, or will be, reflected."""

_unreflected: set[Any] = set()
"""A weak set could not be read while another thread imports models."""


class _ReflectedMeta(DeclarativeAttributeIntercept):
    """Makes what is asked of a model before it was reflected one clear error. Type checkers take any attribute for a column."""

    def __getattr__(cls, name: str) -> Any:
        if cls in _unreflected and not name.startswith("_"):
            raise _not_reflected(cls)
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")

    if not TYPE_CHECKING:  # who would take the arguments of this for those of the model

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls in _unreflected:
                raise _not_reflected(cls)
            return super().__call__(*args, **kwargs)


class Reflected(DeferredReflection, metaclass=_ReflectedMeta):
    """Beside DeclarativeBase in a base: its models declare `__tablename__`, and get their columns from the live database.

    `container.reflect()` does that. Columns that the class declares win over those of the database.

        class Base(Reflected, DeclarativeBase):
            metadata = metadata_of("warehouse")
    """

    if TYPE_CHECKING:
        metadata: ClassVar[MetaData]  # DeclarativeBase's

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        table = None if "__abstract__" in vars(cls) else getattr(cls, "__table__", None)
        if table is not None:
            table.info[REFLECTED] = True
            _unreflected.add(cls)


def _refuse_unmapped(model: type[Any]) -> NoReturn:
    raise _not_reflected(model)


when_unmapped(Reflected, _refuse_unmapped)


def _not_reflected(model: type[Any]) -> NotReflected:
    return NotReflected(model.__name__, _connection_in(model.metadata) or "")


def unreflected_models(name: str) -> list[type[Reflected]]:
    """Return the models of a connection that wait for being reflected."""
    return [model for model in list(_unreflected) if _connection_in(model.metadata) == name]


def note_reflected(models: Iterable[type[Reflected]]) -> None:
    """Note that models are mapped now."""
    _unreflected.difference_update(models)


# ---- which connection a model is of -------------------------------------------------------------------------------------


def connection_of(subject: object) -> str:
    """Return the name of the connection that `subject` belongs to: a model, what is made of models, or a statement.

    That is a mapped class, its instance, mapper, alias or attribute; a table, alias, subquery or column; a MetaData or
    declarative base; a statement. Tables without a connection (temporary ones, say) count for nothing beside others. Raises
    UnknownModel when nothing in it has a connection, and SpansDatabases when tables of several are in it.
    """
    found = _selectable_of(subject)
    if not isinstance(found, MetaData | Table):
        return _connection_of_parts(found)
    name = _connection_in(found if isinstance(found, MetaData) else found.metadata)
    if name is None:
        raise UnknownModel(described(subject), sorted(_metadata))
    return name


def _connection_in(metadata: MetaData) -> str | None:
    name: str | None = metadata.info.get(CONNECTION)
    return name


def _selectable_of(subject: Any) -> Any:
    """Return what a model is mapped to, most often its table, and the metadata of a base. All else is itself."""
    if isinstance(subject, ClauseElement):
        return subject
    known = inspect(subject, raiseerr=False)
    if isinstance(known, QueryableAttribute):
        known = known.parent
    if isinstance(known, AliasedInsp | InstanceState):
        known = known.mapper
    if isinstance(known, Mapper):
        return known.local_table
    return getattr(subject, "metadata", subject) if isinstance(subject, type) else subject


_MOST_STATEMENTS = 1000
_of_statements: dict[Any, str] = {}


def _connection_of_parts(subject: Any) -> str:
    """Return the connection of a statement, which is looked through only once for all that differ in their parameters alone."""
    key = cache_key_of(subject)
    if key is None:
        return _only_connection(subject)
    name = _of_statements.get(key)
    if name is None:
        if len(_of_statements) >= _MOST_STATEMENTS:
            _of_statements.clear()
        name = _of_statements[key] = _only_connection(subject)
    return name


def _only_connection(subject: Any) -> str:
    found: dict[str, str] = {}  # the first table of each connection
    for table in _tables_in(subject):
        name = None if table.metadata is None else _connection_in(table.metadata)  # a sequence may have none
        if name is not None:
            found.setdefault(name, table.fullname if isinstance(table, Table) else table.name)
    if len(found) > 1:
        raise SpansDatabases([(table, connection) for connection, table in found.items()])
    if not found:
        raise UnknownModel(described(subject), sorted(_metadata))
    return next(iter(found))


def _tables_in(subject: Any) -> Iterator[Table | Sequence]:
    """Yield the tables and sequences in a statement, also those in subqueries and behind columns."""
    remaining, seen = [subject], set[int]()
    while remaining:
        element = remaining.pop()
        while not isinstance(element, ClauseElement) and hasattr(element, "__clause_element__"):
            element = element.__clause_element__()
        if id(element) in seen:
            continue
        seen.add(id(element))
        if isinstance(element, Table | Sequence):
            yield element
        else:
            remaining += _parts_of(element)


def _parts_of(element: Any) -> Iterable[Any]:
    if isinstance(element, ColumnClause):
        return () if element.table is None else (element.table,)
    if isinstance(element, BaseDDLElement):
        made = getattr(element, "element", None)
        return (getattr(made, "table", made),)  # an index or a constraint has one
    if isinstance(element, next_value):
        return (element.sequence,)
    return element.get_children() if isinstance(element, ClauseElement) else ()


def described(subject: Any) -> str:
    """Return how an error calls a subject. The text of a statement may hold what is secret, and is left out."""
    if isinstance(subject, Table):
        return f"the table {subject.fullname!r}"
    if isinstance(subject, ClauseElement):
        return f"a statement ({type(subject).__name__})"
    return f"the model {subject.__name__ if isinstance(subject, type) else type(subject).__name__}"
