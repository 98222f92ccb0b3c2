"""The settings of one named connection: which database it is, and how it is used.

Secrets are `SecretStr`, and are shown as `***`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PrivateAttr, SecretStr
from sqlalchemy.engine import URL

from app_db.errors import ContradictorySettings, Problem, SettingsError
from app_db.settings._reading import Finding, Group, Reading
from app_db.settings._spelling import Spelling
from app_db.settings._urls import (
    UNREADABLE_URL,
    URL_PARTS,
    Secretive,
    SecretiveURL,
    dialect_of,
    dumped,
    is_memory,
    masked,
    parse_url,
    revealed,
    with_driver,
)

DATABASE_FIELDS = ("url", *URL_PARTS, "password_provider", "connect_args", "pooler")
"""The settings that say which database a connection uses. The others say how. A mirror has none of these."""

# ---- rules for values ---------------------------------------------------------------------------------------


def matching(pattern: str, requirement: str) -> AfterValidator:
    """Return a validator that refuses a value which does not match, and says what is required."""
    compiled = re.compile(pattern, re.ASCII)

    def check(value: str) -> str:
        if compiled.fullmatch(value) is None:
            raise ValueError(requirement)
        return value

    return AfterValidator(check)


def _isolation_level(value: object) -> object:
    return value.strip().upper().replace("_", " ") if isinstance(value, str) else value


_IMPORT_STRING = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_ImportString = Annotated[str, matching(_IMPORT_STRING, "must have the form module:function")]
_SessionClass = Annotated[str, matching(_IMPORT_STRING, "must have the form module:Class")]
_PoolClass = Annotated[
    str, matching(f"queue|null|static|{_IMPORT_STRING}", "must be queue, null, static or have the form module:Class")
]
_IsolationLevel = Annotated[
    Literal["AUTOCOMMIT", "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    BeforeValidator(_isolation_level),
]
_Url = Annotated[SecretStr, BeforeValidator(revealed)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
SecondsOrNever = Annotated[
    Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
    BeforeValidator(lambda value: 0 if value == "" else value),
    AfterValidator(lambda seconds: seconds or None),
]
"""Seconds after which something is done. 0 and an empty text mean never: for a connection, although it is set for all."""
_Query = Annotated[dict[str, str], BeforeValidator(revealed), AfterValidator(Secretive), PlainSerializer(dumped)]
_ConnectArgs = Annotated[dict[str, Any], BeforeValidator(revealed), AfterValidator(Secretive), PlainSerializer(dumped)]

T = TypeVar("T")


def _imported(name: str, variable: str) -> object:
    """Return what `module:name` names. Raises SettingsError with the variable that has it."""
    module, _, attribute = name.partition(":")
    try:
        found: object = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise SettingsError([Problem(variable, f"can't be imported ({type(error).__name__}).")]) from error
    return found


CONNECTION_NAME_RULE = "a lower-case Python identifier without '__'"


def is_connection_name(name: object) -> bool:
    """Return whether a connection can have this name. CONNECTION_NAME_RULE is the rule in words."""
    matches = isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*_?", name) is not None
    return matches and not iskeyword(str(name))


# ---- the models -------------------------------------------------------------------------------------------------


class DatabaseIdentity:
    """The identity of a database: a connection and its mirrors have the same one. A copy of it is the object itself."""

    __slots__ = ("__weakref__", "name", "spelling")

    def __init__(self, name: str, spelling: Spelling | None = None) -> None:
        self.name = name
        self.spelling = spelling or Spelling()

    def __copy__(self) -> DatabaseIdentity:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> DatabaseIdentity:
        return self


class PoolSettings(Group):
    """The connection pool: how many connections it keeps, and for how long. Times are in seconds."""

    size: int = Field(default=5, ge=1)
    max_overflow: int = Field(default=10, ge=-1)
    timeout: _Finite = Field(default=30.0, ge=0)
    recycle: _Finite | None = Field(default=None, gt=0)
    alive_window: _Finite = Field(default=30.0, ge=0)
    use_lifo: bool = True
    stacks: bool = False
    class_: _PoolClass | None = Field(default=None, validation_alias="class", serialization_alias="class")


class SessionSettings(Group):
    """How the sessions of a connection behave."""

    autoflush: bool = True
    expire_on_commit: bool | None = None
    class_: _SessionClass | None = Field(default=None, validation_alias="class", serialization_alias="class")
    async_class: _SessionClass | None = None


class ConnectionSettings(Group):
    """The settings of one named connection: its database, by `url`, by parts of the URL or by `mirror`, and how it is used.

    Settings that contradict each other are accepted here, and refused by the `DatabaseSettings`
    that contain them. These know the name of the connection, so that the error names the variable
    to change.

    >>> from app_db import ConnectionSettings
    >>> ConnectionSettings(driver="postgresql", host="db", user="shop", password="secret", database="shop").masked_url
    'postgresql+psycopg://shop:***@db/shop'
    """

    url: _Url | None = None
    driver: str | None = None
    host: str | None = None
    port: int | None = Field(default=None, ge=1, le=65535)
    user: str | None = None
    password: SecretStr | None = None
    database: str | None = None
    query: _Query = Field(default_factory=dict)
    password_provider: _ImportString | None = None
    read_only: bool = False
    mirror: str | None = None
    replica_of: str | None = None
    two_phase: bool = False
    transactional: bool = True
    isolation_level: _IsolationLevel | None = None
    begin_with_statement: bool = False
    pooler: Literal["transaction", "none"] | None = None
    required: bool | None = None
    max_lag: _Finite | None = Field(default=None, gt=0)
    statement_timeout: _Finite | None = Field(default=None, gt=0)
    slow_statement: SecondsOrNever = None
    held_warning: SecondsOrNever = None
    echo: bool = False
    pool: PoolSettings = Field(default_factory=PoolSettings)
    session: SessionSettings = Field(default_factory=SessionSettings)
    connect_args: _ConnectArgs = Field(default_factory=dict)

    _read_url: URL | None = PrivateAttr(default=None)
    _identity: DatabaseIdentity = PrivateAttr(default_factory=lambda: DatabaseIdentity("name"))  # until `become`

    if TYPE_CHECKING:  # type checkers would not accept a plain string for a SecretStr

        def __init__(self, **given: object) -> None: ...

    def database_identity(self) -> DatabaseIdentity:
        """Return an object that is the same for a connection, its mirrors, and all copies of them."""
        return self._identity

    @property
    def place(self) -> object:
        """A value that is equal for all connections to the same database, with whatever user and driver."""
        url = self.sqlalchemy_url()
        if url.get_backend_name() != "sqlite":
            return url.get_backend_name(), url.host, url.port, url.database
        return self._identity if is_memory(url) else str(Path(str(url.database)).absolute())

    def become(self, name: str, spelling: Spelling) -> None:
        """Take the name of a connection, and a database identity of its own. `DatabaseSettings` calls this."""
        self._identity = DatabaseIdentity(name, spelling)

    def sqlalchemy_url(self) -> URL:
        """Return the URL to connect to, with the password. Raises SettingsError if it is missing or can't be read."""
        url = self.read_url()
        if url is None:
            raise SettingsError([Problem(self.variable("url"), UNREADABLE_URL)])
        return url

    @property
    def masked_url(self) -> str:
        """The URL with its secrets masked. Raises SettingsError as `sqlalchemy_url()` does."""
        return masked(self.sqlalchemy_url())

    def load_password_provider(self) -> Callable[[], str]:
        """Import and return the function that returns the password for each new DBAPI connection. Raises SettingsError."""
        variable = self.variable("password_provider")
        if self.password_provider is None:
            raise SettingsError([Problem(variable, "is not set.")])
        provider = _imported(self.password_provider, variable)
        if not callable(provider):
            raise SettingsError([Problem(variable, "does not name a function.")])
        return cast("Callable[[], str]", provider)

    def load_session_class(self, field: Literal["class", "async_class"], base: type[T]) -> type[T] | None:
        """Import and return the class of the sessions, None if it is not set. Raises SettingsError if it is no `base`."""
        named = self.session.class_ if field == "class" else self.session.async_class
        if named is None:
            return None
        variable = self.variable("session", field)
        found = _imported(named, variable)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise SettingsError([Problem(variable, f"does not name a subclass of {base.__module__}.{base.__qualname__}.")])
        return found

    def variable(self, *path: str) -> str:
        """Return the environment variable that sets a field of this connection."""
        return self._identity.spelling.variable(("connections", self._identity.name, *path))

    def read_url(self) -> URL | None:
        """Return the URL to connect to, or None if it is missing or can't be read."""
        url = self._read_url  # read once, because pydantic's access to private attributes is slow
        if url is None:
            read = self._read()
            url = self._read_url = None if read is None else SecretiveURL.create(*read)
        return url

    def _read(self) -> URL | None:
        if self.url is not None:
            return parse_url(self.url.get_secret_value())
        if self.driver is None:
            return None
        return URL.create(
            with_driver(self.driver),
            username=self.user,
            password=None if self.password is None else self.password.get_secret_value(),
            host=self.host,
            port=self.port,
            database=self.database,
            query=self.query,
        )


# ---- checking one connection ------------------------------------------------------------------------------------


def contradiction(reading: Reading, name: str, field: str, message: str) -> Finding:
    """Return a problem with a setting of a connection, as a ContradictorySettings."""
    return ContradictorySettings, Problem(reading.name_of(("connections", name, field)), message)


def findings_of(name: str, connection: ConnectionSettings, reading: Reading) -> Iterator[Finding]:
    """Yield the problems of one connection that don't depend on the others."""
    if not is_connection_name(name):
        yield (
            SettingsError,
            Problem(reading.name_of(("connections", name)), f"a connection's name must be {CONNECTION_NAME_RULE}."),
        )
    for field, message in (*_contradictions_of_use(connection), *_contradictions_of_database(connection)):
        yield contradiction(reading, name, field, message)
    if not connection.mirror:
        yield from _url_findings(name, connection, reading)


def _contradictions_of_use(connection: ConnectionSettings) -> Iterator[tuple[str, str]]:
    """Yield each contradiction between settings of how a connection is used: a field, and what it excludes and why."""
    if connection.read_only and connection.two_phase:
        yield "two_phase", "excludes READ_ONLY=true: where nothing is written, nothing can be prepared."
    if connection.read_only and not connection.transactional:
        yield "transactional", "=false excludes READ_ONLY=true: only writes can outlive the unit of work."
    if connection.replica_of and not connection.read_only:
        yield "replica_of", "needs READ_ONLY=true: nothing is written to a replica."
    if connection.two_phase and not connection.transactional:
        yield "two_phase", "excludes TRANSACTIONAL=false: a connection that commits by itself can't commit with others."
    if connection.isolation_level == "AUTOCOMMIT":
        if connection.two_phase:
            yield "two_phase", "excludes ISOLATION_LEVEL=AUTOCOMMIT: what is committed at once can't be prepared."
        elif connection.transactional and not connection.read_only:
            message = "can't be AUTOCOMMIT on a connection that is writable and transactional: a unit of work there could not be "
            yield "isolation_level", message + "rolled back. Set TRANSACTIONAL=false, READ_ONLY=true or another level."


def _contradictions_of_database(connection: ConnectionSettings) -> Iterator[tuple[str, str]]:
    """Yield each contradiction between settings of which database it is: a field, and what it excludes and why."""
    if connection.mirror is not None:
        if own := _given(connection, DATABASE_FIELDS):
            yield "mirror", f"excludes {_upper(own)}: a mirror uses the database of another connection. Unset one side."
        return
    parts = _given(connection, URL_PARTS)
    if connection.url is not None and parts:
        yield "url", f"excludes {_upper(parts)}: give the URL or its parts."
    if connection.url is None and parts and connection.driver is None:
        yield "driver", "is not set, but other parts of the URL are. Set it, for example to postgresql+psycopg."
    if connection.password_provider and (url := connection.read_url()) is not None and url.password is not None:
        place = "PASSWORD" if connection.url is None else "URL"
        yield "password_provider", f"excludes a password in {place}. Remove one of them."


def _given(connection: ConnectionSettings, fields: Iterable[str]) -> list[str]:
    return [field for field in fields if getattr(connection, field) not in (None, {})]


def _upper(fields: Iterable[str]) -> str:
    return ", ".join(field.upper() for field in fields)


def _url_findings(name: str, connection: ConnectionSettings, reading: Reading) -> Iterator[Finding]:
    path = ("connections", name)
    variable = reading.name_of((*path, "driver" if connection.url is None else "url"))
    url = connection.read_url()
    if url is not None:
        dialect = dialect_of(url)
        if isinstance(dialect, str):
            yield SettingsError, Problem(variable, dialect)
        elif connection.pooler is not None and dialect.name != "postgresql":
            yield contradiction(reading, name, "pooler", f"is for poolers of PostgreSQL, and this is {dialect.name}. Unset it.")
    elif connection.url is not None:
        yield SettingsError, Problem(variable, UNREADABLE_URL)
    elif not _given(connection, URL_PARTS) and not reading.has_refused(path):
        message = f"is not set. Set it, for example to sqlite:///{name}.db, or set DRIVER and the other parts, or MIRROR."
        yield contradiction(reading, name, "url", message)
