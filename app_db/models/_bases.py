"""Declarative bases and MetaData for each connection: a model knows the name of its connection, and no engine.

The name is in the `info` of the MetaData of a model's table, under the key `CONNECTION`. All else
reads it there, so a MetaData of the application's own works too if it has that key.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
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
"""The key of a connection's name in the `info` of a MetaData."""

# ---- metadata and bases ----------------------------------------------------------------------------------------

_Convention = Mapping[str, Any]  # as SQLAlchemy has it

_metadata: dict[str, MetaData] = {}


def metadata_of(name: str = "writer", *, naming_convention: _Convention | None = None) -> MetaData:
    """Return the MetaData for the tables of the connection `name`. Each call returns the same one.

    The connection need not be configured yet. A naming convention has to be given before the
    MetaData has tables. Raises InvalidUse for a second naming convention, for one that comes too
    late, and for a name that no connection can have.

    >>> from app_db import metadata_of
    >>> metadata_of("warehouse") is metadata_of("warehouse")
    True
    """
    if name not in _metadata and not is_connection_name(name):
        raise InvalidUse(f"A connection can't be called {name!r}", f"Its name must be {CONNECTION_NAME_RULE}")
    known = _metadata.get(name) or _metadata.setdefault(name, MetaData(info={CONNECTION: name}))
    if naming_convention is not None:
        _set_convention(name, known, naming_convention)
    return known


def _set_convention(name: str, known: MetaData, naming_convention: _Convention) -> None:
    wanted = MetaData(naming_convention=dict(naming_convention)).naming_convention
    if known.naming_convention == wanted:
        return
    if known.naming_convention != MetaData().naming_convention:
        problem = f"Two different naming conventions were given for the tables of {name!r}"
        raise InvalidUse(problem, "Give only one of them, in the module that is imported first")
    if known.tables:
        problem = f"A naming convention was given for the tables of {name!r} after some of them had been declared without it"
        raise InvalidUse(problem, "Give it to the first orm_base() or metadata_of() of that name")
    known.naming_convention = wanted


class _OrmBase:
    """A mixin for the bases of `orm_base`: a subclass that declares nothing is abstract, and so a base as well."""

    if TYPE_CHECKING:
        __abstract__: bool

    def __init_subclass__(cls, **arguments: object) -> None:
        if DeclarativeBase not in cls.__bases__ and _declares_nothing(cls):
            cls.__abstract__ = True
        super().__init_subclass__(**arguments)


_DECLARES_A_TABLE = frozenset({"__annotations__", "__annotate__", "__annotate_func__", "__table__", "__tablename__"})


def _declares_nothing(base: type) -> bool:
    inherits = any(hasattr(base, name) for name in ("__table__", "__tablename__", "__mapper__"))
    return not inherits and not any(_is_declared(name, value) for name, value in vars(base).items())


def _is_declared(name: str, value: object) -> bool:
    if name in _DECLARES_A_TABLE or isinstance(value, Column | MappedColumn | MapperProperty):
        return True
    # An association proxy. An isinstance check would need its module, which takes long to import.
    return isinstance(value, InspectionAttr) and value.extension_type.name == "ASSOCIATION_PROXY"


def orm_base(
    name: str = "writer", *, naming_convention: _Convention | None = None, reflected: bool = False
) -> type[DeclarativeBase]:
    """Return a new declarative base for models of the connection `name`. Its MetaData is `metadata_of(name)`.

    The models of a `reflected` base get their columns from the database: see `Reflected`. Raises
    InvalidUse as `metadata_of` does.

    >>> from app_db import connection_of, orm_base
    >>> from sqlalchemy.orm import Mapped, mapped_column
    >>> class Base(orm_base("archive")):
    ...     pass
    >>> class Letter(Base):
    ...     __tablename__ = "letters"
    ...     id: Mapped[int] = mapped_column(primary_key=True)
    >>> connection_of(Letter)
    'archive'

    mypy does not accept a call as a base class. For mypy, write the same as:

        class Base(DeclarativeBase):
            metadata = metadata_of("archive")
    """
    metadata = metadata_of(name, naming_convention=naming_convention)
    bases = (_OrmBase, Reflected, DeclarativeBase) if reflected else (_OrmBase, DeclarativeBase)
    attributes = {"metadata": metadata, "__doc__": f"The base of models of {name!r}."}
    base: type[DeclarativeBase] = new_class("Base", bases, exec_body=lambda namespace: namespace.update(attributes))
    return base


# ---- reflected models -------------------------------------------------------------------------

REFLECTED = "app_db_reflected"
"""The key in the `info` of a reflected table, which app_db does not create or drop."""

_unreflected: set[Any] = set()
"""The models without columns. No weak set, because that can't be read while another thread imports models."""


class _ReflectedMeta(DeclarativeAttributeIntercept):
    """Raises NotReflected if a model is used before it is reflected. For type checkers, any attribute is a column."""

    def __getattr__(cls, name: str) -> Any:  # a column has any type
        if cls in _unreflected and not name.startswith("_"):
            raise _not_reflected(cls)
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")

    if not TYPE_CHECKING:  # type checkers would take these arguments for those of the model

        def __call__(cls, *args, **kwargs):
            if cls in _unreflected:
                raise _not_reflected(cls)
            return super().__call__(*args, **kwargs)


class Reflected(DeferredReflection, metaclass=_ReflectedMeta):
    """A mixin for declarative bases: the models declare `__tablename__`, and get their columns from the database.

    `container.reflect()` reads the columns. A column that a model declares itself replaces that of
    the database. Until then, any use of a model raises NotReflected.

        class Base(Reflected, DeclarativeBase):
            metadata = metadata_of("warehouse")
    """

    if TYPE_CHECKING:
        metadata: ClassVar[MetaData]  # DeclarativeBase's

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        table = None if "__abstract__" in vars(cls) else getattr(cls, "__table__", None)
        if table is not None:
            table.info[REFLECTED] = True
            _unreflected.add(cls)


def _refuse_unmapped(model: type) -> NoReturn:
    raise _not_reflected(model)


when_unmapped(Reflected, _refuse_unmapped)


def _not_reflected(model: Any) -> NotReflected:
    return NotReflected(model.__name__, _connection_in(model.metadata) or "")


def unreflected_models(name: str) -> list[type[Reflected]]:
    """Return the models of a connection that are not reflected yet."""
    return [model for model in list(_unreflected) if _connection_in(model.metadata) == name]


def note_reflected(models: Iterable[type[Reflected]]) -> None:
    """Note that these models are mapped."""
    _unreflected.difference_update(models)


# ---- the connection of a model -------------------------------------------------------------------------------------


def connection_of(subject: object) -> str:
    """Return the name of the connection of `subject`: a model, a table, a statement, or a part of one of them.

    A subject is a mapped class, its instance, mapper, alias or attribute; a table, alias, subquery
    or column; a MetaData or declarative base; a statement. Tables without a connection, such as
    temporary tables, are ignored beside others. Raises UnknownModel if nothing in the subject has a
    connection, and SpansDatabases if it has tables of several connections.
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


def _selectable_of(subject: object) -> object:
    """Return the table or other selectable of a model, the MetaData of a base, and any other subject itself."""
    if isinstance(subject, ClauseElement):
        return subject
    known: object = inspect(subject, raiseerr=False)
    if isinstance(known, QueryableAttribute):
        known = known.parent
    if isinstance(known, AliasedInsp | InstanceState):
        known = known.mapper
    if isinstance(known, Mapper):
        return known.local_table
    return getattr(subject, "metadata", subject) if isinstance(subject, type) else subject


_MOST_STATEMENTS = 1000
_of_statements: dict[Hashable, str] = {}


def _connection_of_parts(subject: object) -> str:
    """Return the connection of a statement. Statements that differ in their parameters only are searched once."""
    key = cache_key_of(subject)
    if key is None:
        return _only_connection(subject)
    name = _of_statements.get(key)
    if name is None:
        if len(_of_statements) >= _MOST_STATEMENTS:
            _of_statements.clear()
        name = _of_statements[key] = _only_connection(subject)
    return name


def _only_connection(subject: object) -> str:
    found: dict[str, str] = {}  # the first table of each connection
    for table in _tables_in(subject):
        name = None if table.metadata is None else _connection_in(table.metadata)  # a sequence may have no MetaData
        if name is not None:
            found.setdefault(name, table.fullname if isinstance(table, Table) else table.name)
    if len(found) > 1:
        raise SpansDatabases([(table, connection) for connection, table in found.items()])
    if not found:
        raise UnknownModel(described(subject), sorted(_metadata))
    return next(iter(found))


def _tables_in(subject: object) -> Iterator[Table | Sequence]:
    """Yield the tables and sequences in a statement, also those in subqueries and behind columns."""
    remaining: list[object] = [subject]
    seen = set[int]()
    while remaining:
        element = remaining.pop()
        while not isinstance(element, ClauseElement) and (clause_element := getattr(element, "__clause_element__", None)):
            element = clause_element()
        if id(element) in seen:
            continue
        seen.add(id(element))
        if isinstance(element, Table | Sequence):
            yield element
        else:
            remaining += _parts_of(element)


def _parts_of(element: object) -> Iterable[object]:
    if isinstance(element, ColumnClause):
        return () if element.table is None else (element.table,)
    if isinstance(element, BaseDDLElement):
        made = getattr(element, "element", None)
        return (getattr(made, "table", made),)  # an index or a constraint has a table
    if isinstance(element, next_value):
        return (element.sequence,)
    return element.get_children() if isinstance(element, ClauseElement) else ()


def described(subject: object) -> str:
    """Return a description of a subject for errors. It leaves out the text of statements, which may hold secrets."""
    if isinstance(subject, Table):
        return f"the table {subject.fullname!r}"
    if isinstance(subject, ClauseElement):
        return f"a statement ({type(subject).__name__})"
    return f"the model {subject.__name__ if isinstance(subject, type) else type(subject).__name__}"
