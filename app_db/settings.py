"""What the databases are: the settings of every connection, checked as a whole.

Where they come from, and which source wins, is told in `app_db.sources`. `DatabaseSettings` may also be a field of an
application's own settings, and take values from variables of the application; errors name the variables of app_db then too:

    class Settings(BaseSettings):
        db: DatabaseSettings = Field(default_factory=DatabaseSettings)

Give those the option `hide_input_in_errors`, because pydantic shows the values of a model with an error of its own.

Secrets are `SecretStr` here and `***` wherever something is shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib import import_module
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PrivateAttr, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import URL, Dialect

from app_db.errors import (
    ConnectionNotConfigured,
    ContradictorySettings,
    NothingConfigured,
    Problem,
    SettingsError,
    did_you_mean,
)
from app_db.sources import DELIMITER, PREFIX, Finding, Group, Origin, Reading, variable_for
from app_db.urls import UNREADABLE_URL, URL_PARTS, dialect_of, dumped, is_memory, masked, parse_url, revealed, with_driver

__all__ = [
    "ConnectionSettings",
    "DatabaseIdentity",
    "DatabaseSettings",
    "Origin",
    "PoolSettings",
    "SessionSettings",
    "is_connection_name",
]

_DATABASE_FIELDS = ("url", *URL_PARTS, "password_provider", "connect_args")
"""The settings that say which database a connection uses; the others say how. A mirror has none of its own."""

# ---- what a value must be ---------------------------------------------------------------------------------------


def _matching(pattern: str, requirement: str) -> AfterValidator:
    compiled = re.compile(pattern, re.ASCII)

    def check(value: str) -> str:
        if compiled.fullmatch(value) is None:
            raise ValueError(requirement)
        return value

    return AfterValidator(check)


def _isolation_level(value: object) -> object:
    return value.strip().upper().replace("_", " ") if isinstance(value, str) else value


_IMPORT_STRING = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_ImportString = Annotated[str, _matching(_IMPORT_STRING, "must have the form module:function")]
_PoolClass = Annotated[
    str, _matching(f"queue|null|static|{_IMPORT_STRING}", "must be queue, null, static or have the form module:Class")
]
_Application = Annotated[
    str, _matching(r"[A-Za-z][A-Za-z0-9_-]{0,15}", "must begin with a letter and have at most 16 letters, digits, '_' or '-'")
]
_DecisionLog = Annotated[str, _matching(r"[a-z][a-z0-9_]*|file:.+", "must be the name of a connection, or file: and a path")]
_IsolationLevel = Annotated[
    Literal["AUTOCOMMIT", "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    BeforeValidator(_isolation_level),
]
_Url = Annotated[SecretStr, BeforeValidator(revealed)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Query = Annotated[dict[str, str], BeforeValidator(revealed), PlainSerializer(dumped)]
_ConnectArgs = Annotated[dict[str, Any], BeforeValidator(revealed), PlainSerializer(dumped)]

CONNECTION_NAME_RULE = "a lower-case Python identifier without '__'"


def is_connection_name(name: object) -> bool:
    """Return whether a connection can have this name: CONNECTION_NAME_RULE says which names are."""
    matches = isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*_?", name) is not None
    return matches and not iskeyword(str(name))


# ---- the models -------------------------------------------------------------------------------------------------


class DatabaseIdentity:
    """Stands for the one database behind a connection and its mirrors. All copies of it are the same object."""

    __slots__ = ("__weakref__", "name")

    def __init__(self, name: str) -> None:
        self.name = name

    def __copy__(self) -> DatabaseIdentity:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> DatabaseIdentity:
        return self


class PoolSettings(Group):
    """How many connections are kept, and for how long. Times are seconds."""

    size: int = Field(default=5, ge=1)
    max_overflow: int = Field(default=10, ge=-1)
    timeout: _Finite = Field(default=30.0, ge=0)
    recycle: _Finite | None = Field(default=None, gt=0)
    alive_window: _Finite = Field(default=30.0, ge=0)
    use_lifo: bool = True
    class_: _PoolClass | None = Field(default=None, validation_alias="class", serialization_alias="class")


class SessionSettings(Group):
    """How the sessions of a connection behave."""

    autoflush: bool = True
    expire_on_commit: bool = True


class ConnectionSettings(Group):
    """One named connection: which database it is, by `url`, by its parts or by `mirror`, and how it is used.

    By itself it is a value, and may contradict itself: the `DatabaseSettings` that it becomes a part of know its name, and refuse
    it with an error that names the variable to change.
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
    statement_timeout: _Finite | None = Field(default=None, gt=0)
    echo: bool = False
    pool: PoolSettings = Field(default_factory=PoolSettings)
    session: SessionSettings = Field(default_factory=SessionSettings)
    connect_args: _ConnectArgs = Field(default_factory=dict)

    _read_url: URL | None = PrivateAttr(default=None)
    _identity: DatabaseIdentity = PrivateAttr(default_factory=lambda: DatabaseIdentity("name"))  # DatabaseSettings knows better

    if TYPE_CHECKING:  # type checkers would ask for SecretStr where a plain string does

        def __init__(self, **given: Any) -> None: ...

    def database_identity(self) -> DatabaseIdentity:
        """Return the object that is the same for a connection, its mirrors and all copies of them."""
        return self._identity

    @property
    def place(self) -> object:
        """What is equal for all connections to the same database, whoever logs in and by whichever driver."""
        url = self.sqlalchemy_url()
        if url.get_backend_name() != "sqlite":
            return url.get_backend_name(), url.host, url.port, url.database
        return self._identity if is_memory(url) else str(Path(str(url.database)).absolute())

    def sqlalchemy_url(self) -> URL:
        """Return the URL to connect to, password included. Raises SettingsError when there is none or it can't be read."""
        url = self._url()
        if url is None:
            raise SettingsError([Problem(self.variable("url"), UNREADABLE_URL)])
        return url

    @property
    def masked_url(self) -> str:
        """The URL as it may be shown."""
        return masked(self.sqlalchemy_url())

    def load_password_provider(self) -> Callable[[], str]:
        """Import and return the function that is asked for a password for each new DBAPI connection."""
        variable = self.variable("password_provider")
        if self.password_provider is None:
            raise SettingsError([Problem(variable, "is not set.")])
        module, _, attribute = self.password_provider.partition(":")
        try:
            provider: Any = import_module(module)
            for name in attribute.split("."):
                provider = getattr(provider, name)
        except (ImportError, AttributeError) as error:
            raise SettingsError([Problem(variable, f"can't be imported ({type(error).__name__}).")]) from error
        if not callable(provider):
            raise SettingsError([Problem(variable, "does not name a function.")])
        return cast("Callable[[], str]", provider)

    def variable(self, field: str) -> str:
        """Return the environment variable that sets a field of this connection."""
        return variable_for(("connections", self._identity.name, field))

    def _url(self) -> URL | None:
        url = self._read_url  # pydantic is slow to find what is private, so it is asked once
        if url is None:
            url = self._read_url = self._read()
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


_FROM_CONFIG: Any = object()
_PREPARING_DRIVERS = frozenset({"psycopg", "asyncpg", "pymysql", "asyncmy"})
_LONGEST_TWO_PHASE_NAME = 22
FILE = "file:"
"""What `decision_log` begins with when decisions go into a file."""


class DatabaseSettings(BaseSettings):
    """All connections and what they have in common. Raises one SettingsError that lists everything wrong with them.

    What isn't given is read from variables that begin with `APP_DB_`; `app_db.sources` says where else, and which source wins.
    `_env_file=` and `_secrets_dir=` name other places to read from than `.env` and none.

    >>> from app_db import DatabaseSettings
    >>> settings = DatabaseSettings(connections={"writer": {"url": "postgresql://shop:secret@db/shop"}})
    >>> settings.connection("writer").masked_url
    'postgresql+psycopg://shop:***@db/shop'
    >>> settings.connection("reader").read_only  # a reader that nobody configured is the writer, read-only
    True
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=DELIMITER, env_file=".env", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    application: _Application = "app_db"
    connections: dict[str, ConnectionSettings] = Field(default_factory=dict)
    atomicity: Literal["strict", "best_effort"] = "strict"
    decision_log: _DecisionLog | None = None
    recover_at_start: bool = False
    reflect_at_start: bool = False

    _origins: tuple[Origin, ...] = PrivateAttr(default=())
    _lending: tuple[object, dict[str, list[str]]] | None = PrivateAttr(default=None)

    def __init__(
        self,
        /,
        *,
        _env_file: Any = _FROM_CONFIG,
        _env_file_encoding: str | None = None,
        _secrets_dir: Any = _FROM_CONFIG,
        **given: Any,
    ) -> None:
        config = type(self).model_config
        reading = Reading(type(self))
        reading.read_secrets(config.get("secrets_dir") if _secrets_dir is _FROM_CONFIG else _secrets_dir)
        reading.read_env_file(config.get("env_file") if _env_file is _FROM_CONFIG else _env_file, _env_file_encoding)
        reading.read_variables(os.environ, "environment")
        reading.take((), given, "given in code")
        reading.settle_writer()
        self._settle(reading)

    def _settle(self, reading: Reading) -> None:
        """Become what was read, or raise what is wrong with it."""
        # BaseSettings.__init__ is passed over: it would read the variables a second time, drop the nested ones nobody knows
        # without a word, and keep no record of where a value came from.
        while invalid := _validation_error(super(BaseSettings, self).__init__, reading.tree()):
            if not reading.reject(invalid):
                raise reading.error()
        for name, connection in self.connections.items():
            connection._identity = DatabaseIdentity(name)
        reading.problems += _findings(self, reading)
        if reading.problems:
            raise reading.error()
        self._origins = tuple(reading.origins())

    def connection(self, name: str) -> ConnectionSettings:
        """Return the settings of a connection with its mirror resolved: they say which database, and how it is used.

        A reader nobody configured is the writer, read-only.
        """
        own = self._declared(name)
        if own is None:
            raise ConnectionNotConfigured(name, sorted(self.connections))
        if own.mirror is None:
            return own
        owner = self._declared(self._mirrors(name)[-1])
        if owner is None or owner is own:
            return own
        usage = {field: getattr(own, field) for field in type(own).model_fields if field not in _DATABASE_FIELDS}
        return owner.model_copy(update=usage)

    def replicas(self) -> dict[str, str]:
        """Return which connections reads may be sent to in place of another one: each with the name of that.

        It is what `replica_of` names; where that isn't set, a read-only connection is the replica of what it mirrors, and
        `reader` of `writer` where both are databases of one kind. An empty `replica_of` makes it nobody's.
        """
        names = {*self.connections, *(["reader"] if self._declared("reader") else [])}
        found = {name: self._replicated_by(name) for name in sorted(names)}
        return {name: owner for name, owner in found.items() if owner is not None}

    def _replicated_by(self, name: str) -> str | None:
        own = self.connection(name)
        if own.replica_of is not None:
            return own.replica_of or None
        mirrored = self._mirrors(name)[-1]
        owner = mirrored if mirrored != name else "writer" if name == "reader" and "writer" in self.connections else None
        if owner is None or not own.read_only or self.connection(owner).read_only:
            return None
        return owner if _kind(own) == _kind(self.connection(owner)) else None

    def lenders(self, names: Collection[str]) -> dict[str, str]:
        """Return which of these connections have no transaction of their own in a unit: each with the one whose they share.

        So it is for connections with the same URL whose writes are the unit's to commit. The lender is `writer`, or the first.
        """
        found = {name: self.lender_of(name, names) for name in names}
        return {name: lender for name, lender in found.items() if lender is not None}

    def lender_of(self, name: str, names: Collection[str]) -> str | None:
        """Return the one of these connections whose transaction `name` shares, if it has none of its own."""
        known = self._lending
        if known is None or known[0] is not self.connections:  # a copy's may be others
            known = self._lending = self.connections, self._lending_groups()
        lender = next((other for other in known[1].get(name, ()) if other in names), name)
        return None if lender == name else lender

    def _lending_groups(self) -> dict[str, list[str]]:
        groups: dict[object, list[str]] = {}
        for name in sorted(self.connections, key=lambda name: name != "writer"):
            own = self.connections[name]
            if not own.read_only and own.transactional:
                groups.setdefault(_lending_key(self.connection(name)), []).append(name)
        return {name: group for group in groups.values() for name in group}

    def origins(self) -> list[Origin]:
        """Return where each setting that was given came from, sorted by variable, with secrets masked."""
        return list(self._origins)

    def with_connections(self, connections: Mapping[str, ConnectionSettings], **others: Any) -> DatabaseSettings:
        """Return these settings with all connections replaced, and `others` too, checked as a whole. No variable is read."""
        given = {field: getattr(self, field) for field in self.model_fields_set}
        reading = Reading(type(self))
        reading.take((), {**given, "connections": dict(connections), **others}, "given in code")
        made = type(self).__new__(type(self))
        made._settle(reading)
        return made

    def _declared(self, name: str) -> ConnectionSettings | None:
        if name == "reader" and name not in self.connections and "writer" in self.connections:
            return ConnectionSettings(mirror="writer", read_only=True)
        return self.connections.get(name)

    def _mirrors(self, name: str) -> list[str]:
        """Return the names from a connection to what it mirrors in the end, which may be unknown or one passed before."""
        names = [name]
        while (connection := self._declared(names[-1])) is not None and connection.mirror is not None:
            names.append(connection.mirror)
            if names.count(connection.mirror) > 1:
                break
        return names


def _lending_key(own: ConnectionSettings) -> object:
    """Return what is equal for connections that can share a transaction."""
    url = own.sqlalchemy_url()
    memory = own.database_identity() if is_memory(url) else None  # of which each has its own, with the same URL
    return url, memory, own.password_provider, own.isolation_level, own.statement_timeout


def _kind(connection: ConnectionSettings) -> str | None:
    url = connection._url()
    return None if url is None else url.get_backend_name()


# ---- checking the whole -----------------------------------------------------------------------------------------


def _validation_error(validate: Callable[..., None], values: dict[str, Any]) -> ValidationError | None:
    # Returned, not raised: an error raised while this one is handled would carry it, and the values in it, as its context.
    try:
        validate(**values)
    except ValidationError as invalid:
        return invalid
    return None


def _findings(settings: DatabaseSettings, reading: Reading) -> Iterator[Finding]:
    """Yield what pydantic can't see: settings that exclude each other, and connections that lead nowhere."""
    for name, connection in settings.connections.items():
        if not is_connection_name(name):
            message = f"a connection's name must be {CONNECTION_NAME_RULE}."
            yield SettingsError, Problem(variable_for(("connections", name)), message)
        for field, message in (*_contradictions_of_use(connection), *_contradictions_of_database(connection)):
            yield _contradiction(name, field, message)
        yield from _mirror_findings(settings, name, reading) if connection.mirror else _url_findings(name, connection, reading)
        if connection.replica_of:
            yield from _replica_findings(settings, name, connection.replica_of, reading)
        if connection.two_phase:
            yield from _two_phase_findings(settings, name)
    yield from _decision_log_findings(settings)
    # A variable that was misspelt or refused may be all there is of a connection.
    if not settings.connections and not any(variable_for(["connections"]) in str(problem) for _, problem in reading.problems):
        variable = variable_for(("connections", "writer", "url"))
        message = f"is not set, and no other connection is. To start, paste {variable}=sqlite:///writer.db"
        yield NothingConfigured, Problem(variable, message)


def _contradiction(name: str, field: str, message: str) -> Finding:
    return ContradictorySettings, Problem(variable_for(("connections", name, field)), message)


def _contradictions_of_use(connection: ConnectionSettings) -> Iterator[tuple[str, str]]:
    """Yield the settings of how a connection is used that exclude another one: the field, and what it excludes and why."""
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
    """Yield the settings of which database it is that exclude another one, as `_contradictions_of_use` does."""
    if connection.mirror is not None:
        if own := _given(connection, _DATABASE_FIELDS):
            yield "mirror", f"excludes {_upper(own)}: a mirror uses the database of another connection. Unset one side."
        return
    parts = _given(connection, URL_PARTS)
    if connection.url is not None and parts:
        yield "url", f"excludes {_upper(parts)}: give the URL or its parts."
    if connection.url is None and parts and connection.driver is None:
        yield "driver", "is not set, but other parts of the URL are. Set it, for example to postgresql+psycopg."
    if connection.password_provider and (url := connection._url()) is not None and url.password is not None:
        place = "PASSWORD" if connection.url is None else "URL"
        yield "password_provider", f"excludes a password in {place}: say it in one place."


def _given(connection: ConnectionSettings, fields: Iterable[str]) -> list[str]:
    return [field for field in fields if getattr(connection, field) not in (None, {})]


def _upper(fields: Iterable[str]) -> str:
    return ", ".join(field.upper() for field in fields)


def _mirror_findings(settings: DatabaseSettings, name: str, reading: Reading) -> Iterator[Finding]:
    *passed, last = settings._mirrors(name)
    if last in passed:
        circle = " → ".join([*passed, last])
        yield _contradiction(name, "mirror", f"leads in a circle: {circle}. Give one of them a URL.")
    elif settings._declared(last) is None and not reading.has_refused(("connections", last)):
        hint = did_you_mean(last, settings.connections)
        others = ", ".join(repr(known) for known in sorted(settings.connections) if known != name) or "none"
        message = f"leads to a connection that is not configured.{hint} Others configured are: {others}."
        yield _contradiction(name, "mirror", message)


def _replica_findings(settings: DatabaseSettings, name: str, owner: str, reading: Reading) -> Iterator[Finding]:
    known = settings._declared(owner)
    if owner == name:
        yield _contradiction(name, "replica_of", "names the connection itself. Name the one whose database it copies.")
    elif known is None and not reading.has_refused(("connections", owner)):
        others = ", ".join(repr(other) for other in sorted(settings.connections) if other != name) or "none"
        hint = did_you_mean(owner, settings.connections)
        message = f"names a connection that is not configured.{hint} Others configured are: {others}."
        yield _contradiction(name, "replica_of", message)
    elif known is not None and known.read_only:
        yield _contradiction(name, "replica_of", f"names {owner!r}, which is read-only. Name the connection that writes.")
    elif known is not None and None not in (kinds := {_end_kind(settings, name), _end_kind(settings, owner)}) and len(kinds) > 1:
        yield _contradiction(name, "replica_of", f"names {owner!r}, which is a database of another kind.")


def _end_kind(settings: DatabaseSettings, name: str) -> str | None:
    """Return the kind of database that a connection leads to, where it leads to one."""
    end = settings._declared(settings._mirrors(name)[-1])
    return None if end is None else _kind(end)


def _url_findings(name: str, connection: ConnectionSettings, reading: Reading) -> Iterator[Finding]:
    path = ("connections", name)
    variable = reading.name_of((*path, "driver" if connection.url is None else "url"))
    url = connection._url()
    if url is not None:
        dialect = dialect_of(url)
        if isinstance(dialect, str):
            yield SettingsError, Problem(variable, dialect)
    elif connection.url is not None:
        yield SettingsError, Problem(variable, UNREADABLE_URL)
    elif not _given(connection, URL_PARTS) and not reading.has_refused(path):
        message = f"is not set. Set it, for example to sqlite:///{name}.db, or set DRIVER and the other parts, or MIRROR."
        yield _contradiction(name, "url", message)


def _two_phase_findings(settings: DatabaseSettings, name: str) -> Iterator[Finding]:
    url = settings.connection(name)._url()
    dialect = None if url is None else dialect_of(url)
    if url is None or not isinstance(dialect, type):
        return
    if dialect.do_prepare_twophase is Dialect.do_prepare_twophase:
        message = f"needs a database that can prepare a transaction, as PostgreSQL and MySQL can, and {dialect.name} can't."
        yield _contradiction(name, "two_phase", message)
    elif url.get_driver_name() not in _PREPARING_DRIVERS:
        known = " and ".join(sorted(_PREPARING_DRIVERS))
        message = f"is not there for the driver {url.get_driver_name()}. Use one of {known}."
        yield _contradiction(name, "two_phase", message)
    if len(name) > _LONGEST_TWO_PHASE_NAME:
        message = f"needs a connection whose name has at most {_LONGEST_TWO_PHASE_NAME} characters: it is part of every xid."
        yield _contradiction(name, "two_phase", message)


def _decision_log_findings(settings: DatabaseSettings) -> Iterator[Finding]:
    chosen = settings.decision_log
    if chosen is None or chosen.startswith(FILE):
        return
    owner = settings.connections.get(chosen)
    problem = ""
    if owner is None:
        others = ", ".join(repr(known) for known in sorted(settings.connections)) or "none"
        problem = (
            f"names a connection that is not configured.{did_you_mean(chosen, settings.connections)} Configured are: {others}."
        )
    elif owner.read_only or not owner.transactional:
        problem = "names a connection that is read-only or not transactional. Name one that units of work write to."
    if problem:
        yield ContradictorySettings, Problem(variable_for(("decision_log",)), problem)
