"""What the databases are: the settings of every connection, read from the environment and checked as a whole.

A setting may come from five places. The first that has it wins, setting by setting: given in code, the environment,
`.env`, the secrets directory (a file a setting), and for the writer's URL `DATABASE_URL`. Wherever it came from, a
setting is spoken of by its environment variable. That holds too when `DatabaseSettings` is a field of an application's
own settings and the value came by a variable of the application:

    class Settings(BaseSettings):
        db: DatabaseSettings = Field(default_factory=DatabaseSettings)

Give those the option `hide_input_in_errors`, because pydantic shows the values of a model with an error of its own.

Secrets are `SecretStr` here and `***` wherever something is shown.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeGuard, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    SecretStr,
    SerializationInfo,
    ValidationError,
)
from pydantic_settings import BaseSettings, DotEnvSettingsSource, SettingsConfigDict
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError

from app_db.errors import (
    ConnectionNotConfigured,
    ContradictorySettings,
    NothingConfigured,
    Problem,
    SettingsError,
    UnknownVariable,
    did_you_mean,
)

__all__ = ["ConnectionSettings", "DatabaseIdentity", "DatabaseSettings", "Origin", "PoolSettings", "SessionSettings"]

PREFIX = "APP_DB_"
DELIMITER = "__"

_DEFAULT_DRIVERS = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
_PACKAGES = {  # by driver: the module it is, what to pip install for it
    "psycopg": ("psycopg", "'psycopg[binary]'"),
    "psycopg2": ("psycopg2", "psycopg2-binary"),
    "asyncpg": ("asyncpg", "asyncpg"),
    "pymysql": ("pymysql", "PyMySQL"),
    "mysqldb": ("MySQLdb", "mysqlclient"),
    "aiomysql": ("aiomysql", "aiomysql"),
    "asyncmy": ("asyncmy", "asyncmy"),
    "aiosqlite": ("aiosqlite", "aiosqlite"),
    "oracledb": ("oracledb", "oracledb"),
    "pyodbc": ("pyodbc", "pyodbc"),
}
_PARTS = ("driver", "host", "port", "user", "password", "database", "query")
_DATABASE_FIELDS = ("url", *_PARTS, "password_provider", "connect_args")

# ---- what may be shown ------------------------------------------------------------------------------------------

_MASK = "***"
_SECRET_KEY = re.compile(r"pass|pwd|secret|token|credential|dsn|conninfo|odbc_connect", re.IGNORECASE)


def _is_secret(key: str) -> bool:
    return key != "password_provider" and _SECRET_KEY.search(key) is not None


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _shown(key: str, value: Any) -> Any:
    """Return a value as people may see it: equal to it, or with its secrets masked."""
    if value is None:
        return None
    if key == "url":
        url = _parse_url(_revealed(value))
        return _MASK if url is None else _masked(url)
    if _is_secret(key) or isinstance(value, SecretStr):
        return _MASK
    if _is_object(value):
        return {inner: _shown(inner, item) for inner, item in value.items()}
    if isinstance(value, list):
        return [_shown(key, item) for item in value]
    return re.sub(r"(://[^:/@\s]*:)\S+@", rf"\1{_MASK}@", value) if isinstance(value, str) else value


def _masked(url: URL) -> str:
    query = {key: _MASK if _is_secret(key) else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True).replace("%2A%2A%2A", _MASK)


def _concealed(value: Any, secret: bool = False) -> Any:
    """Return a value with what is secret in it wrapped in SecretStr, to be dumped."""
    if _is_object(value):
        return {key: _concealed(item, secret or _is_secret(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_concealed(item, secret) for item in value]
    return SecretStr(str(value)) if secret else value


def _dumped(value: dict[str, Any], info: SerializationInfo) -> Any:
    return _shown("", value) if info.mode == "json" else _concealed(value)


def _revealed(value: Any) -> Any:
    """Return a value with every SecretStr in it opened: the inverse of `_concealed`, and of a URL object's masking."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, URL):
        return value.render_as_string(hide_password=False)
    if _is_object(value):
        return {key: _revealed(item) for key, item in value.items()}
    return [_revealed(item) for item in value] if isinstance(value, list) else value


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
_IsolationLevel = Annotated[
    Literal["AUTOCOMMIT", "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    BeforeValidator(_isolation_level),
]
_Url = Annotated[SecretStr, BeforeValidator(lambda value: _revealed(value) if isinstance(value, URL) else value)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Query = Annotated[dict[str, str], BeforeValidator(_revealed), PlainSerializer(_dumped)]
_ConnectArgs = Annotated[dict[str, Any], BeforeValidator(_revealed), PlainSerializer(_dumped)]

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


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value != field.get_default(call_default_factory=True):
                yield name, _shown(name, value)


class PoolSettings(_Model):
    """How many connections are kept, and for how long. Times are seconds."""

    size: int = Field(default=5, ge=1)
    max_overflow: int = Field(default=10, ge=-1)
    timeout: _Finite = Field(default=30.0, ge=0)
    recycle: _Finite | None = Field(default=None, gt=0)
    alive_window: _Finite = Field(default=30.0, ge=0)
    use_lifo: bool = True
    class_: _PoolClass | None = Field(default=None, validation_alias="class", serialization_alias="class")


class SessionSettings(_Model):
    """How the sessions of a connection behave."""

    autoflush: bool = True
    expire_on_commit: bool = True


class ConnectionSettings(_Model):
    """One named connection: which database it is, by `url`, by its parts or by `mirror`, and how it is used.

    It is a value. What contradicts what is checked by the `DatabaseSettings` it becomes part of, which know its name.
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
    two_phase: bool = False
    transactional: bool = True
    isolation_level: _IsolationLevel | None = None
    statement_timeout: _Finite | None = Field(default=None, gt=0)
    echo: bool = False
    pool: PoolSettings = Field(default_factory=PoolSettings)
    session: SessionSettings = Field(default_factory=SessionSettings)
    connect_args: _ConnectArgs = Field(default_factory=dict)

    _database: DatabaseIdentity = PrivateAttr(default_factory=lambda: DatabaseIdentity("name"))

    if TYPE_CHECKING:  # type checkers would ask for SecretStr where a plain string does

        def __init__(self, **given: Any) -> None: ...

    def database_key(self) -> DatabaseIdentity:
        """Return the object that is the same for a connection, its mirrors and all copies of them."""
        return self._database

    def sqlalchemy_url(self) -> URL:
        """Return the URL to connect to, password included. Raises SettingsError when there is none or it can't be read."""
        url = self._url()
        if url is None:
            raise SettingsError([Problem(self._variable("url"), _UNREADABLE_URL)])
        return url

    @property
    def masked_url(self) -> str:
        """The URL as it may be shown."""
        return _masked(self.sqlalchemy_url())

    def load_password_provider(self) -> Callable[[], str]:
        """Import and return the function that is asked for a password for each new DBAPI connection."""
        variable = self._variable("password_provider")
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

    def _variable(self, field: str) -> str:
        return _variable(("connections", self._database.name, field))

    def _url(self) -> URL | None:
        if self.url is not None:
            return _parse_url(self.url.get_secret_value())
        if self.driver is None:
            return None
        return URL.create(
            _DEFAULT_DRIVERS.get(self.driver, self.driver),
            username=self.user,
            password=None if self.password is None else self.password.get_secret_value(),
            host=self.host,
            port=self.port,
            database=self.database,
            query=self.query,
        )


@dataclass(frozen=True)
class Origin:
    """Where a setting came from. `source` is one of: given in code, environment, .env, secrets, DATABASE_URL."""

    variable: str
    source: str
    shown_value: str


_FROM_CONFIG: Any = object()


class DatabaseSettings(BaseSettings):
    """All connections and what they have in common. Raises one SettingsError that lists everything wrong with them.

    `_env_file=` and `_secrets_dir=` name other places to read from than `.env` and none.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=DELIMITER, env_file=".env", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    application: _Application = "app_db"
    connections: dict[str, ConnectionSettings] = Field(default_factory=dict)
    atomicity: Literal["strict", "best_effort"] = "strict"
    decision_log: str | None = None

    _origins: tuple[Origin, ...] = PrivateAttr(default=())

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
        reading = _Reading(type(self))
        reading.read_secrets(config.get("secrets_dir") if _secrets_dir is _FROM_CONFIG else _secrets_dir)
        reading.read_env_file(config.get("env_file") if _env_file is _FROM_CONFIG else _env_file, _env_file_encoding)
        reading.read_variables(os.environ, "environment")
        reading.take((), given, "given in code")
        reading.settle_writer()
        # BaseSettings.__init__ is passed over: it would read the variables a second time, drop the nested ones nobody knows
        # without a word, and keep no record of where a value came from.
        while invalid := _validation_error(super(BaseSettings, self).__init__, reading.tree()):
            if not reading.reject(invalid):
                raise reading.error()
        for name, connection in self.connections.items():
            connection._database = DatabaseIdentity(name)
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
        owner = self._declared(self._mirrors(name)[-1])
        if owner is None or owner is own:
            return own
        usage = {field: getattr(own, field) for field in type(own).model_fields if field not in _DATABASE_FIELDS}
        return owner.model_copy(update=usage)

    def origins(self) -> list[Origin]:
        """Return where each setting that was given came from, sorted by variable, with secrets masked."""
        return list(self._origins)

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


# ---- reading what was given -------------------------------------------------------------------------------------

_Path = tuple[str, ...]
_Finding = tuple[type[SettingsError], Problem]


class _Given(NamedTuple):
    value: Any
    source: str


def _variable(path: Iterable[object]) -> str:
    return PREFIX + DELIMITER.join(str(key) for key in path).upper()


class _Reading:
    """What was given, one entry a setting, and what is wrong with the way it was given."""

    def __init__(self, model: type[BaseSettings]) -> None:
        self.model = model
        self.given: dict[_Path, _Given] = {}
        self.rejected: set[_Path] = set()
        self.problems: list[_Finding] = []
        self.database_url: str | None = None

    def take(self, path: _Path, value: Any, source: str) -> None:
        """Remember a value. It wins over what was taken before for the same setting, and leaves its neighbours alone."""
        for leaf, leaf_value in _leaves(path, value):
            related = [other for other in self.given if _overlap(leaf, other)]
            if leaf_value == {} and related:
                continue
            for other in related:
                del self.given[other]
            self.given[leaf] = _Given(leaf_value, source)

    def read_variables(self, variables: Mapping[str, str | None], source: str) -> None:
        texts = {name.upper(): text for name, text in variables.items() if text is not None}
        self.database_url = texts.get("DATABASE_URL") or self.database_url
        for name in sorted(texts, key=lambda name: name.count(DELIMITER)):  # an object first, then what replaces a part of it
            if name.startswith(PREFIX):
                self._read(name, texts[name], source)

    def read_secrets(self, directories: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None) -> None:
        for directory in [directories] if isinstance(directories, (str, os.PathLike)) else directories or ():
            folder = Path(directory).expanduser()
            if not folder.is_dir():
                warnings.warn(f"the secrets directory {str(folder)!r} does not exist", stacklevel=3)
                continue
            files = [file for file in folder.iterdir() if file.is_file() and file.name.upper().startswith(PREFIX)]
            self.read_variables(
                {file.name: file.read_text("utf-8", "surrogateescape").rstrip("\r\n") for file in files}, "secrets"
            )

    def read_env_file(self, env_file: Any, encoding: str | None) -> None:
        try:
            variables = DotEnvSettingsSource(self.model, env_file, encoding).env_vars
        except (OSError, UnicodeError):
            self.problems.append((SettingsError, Problem(str(env_file), "can't be read as a file of variables.")))
        else:
            self.read_variables(variables, ".env")

    def settle_writer(self) -> None:
        """Let DATABASE_URL be the writer's when nothing else says which database the writer is."""
        fields = ("url", "mirror", *_PARTS)
        said = any(path[:2] == ("connections", "writer") and (len(path) == 2 or path[2] in fields) for path in self.given)
        if self.database_url and not said:
            self.take(("connections", "writer", "url"), self.database_url, "DATABASE_URL")

    def name_of(self, path: _Path) -> str:
        """Return the variable a setting was given by, or can be given by."""
        given = self.given.get(path)
        return "DATABASE_URL" if given is not None and given.source == "DATABASE_URL" else _variable(path)

    def tree(self) -> dict[str, Any]:
        root: dict[str, Any] = {}
        for path, given in self.given.items():
            node = root
            for key in path[:-1]:
                node = node.setdefault(key, {})
            if path:
                node[path[-1]] = given.value
        return root

    def origins(self) -> list[Origin]:
        origins: list[Origin] = []
        for path, (value, source) in self.given.items():
            shown = _MASK if any(_is_secret(key) for key in path[2:]) else _shown(path[-1], value)
            origins.append(Origin(_variable(path), source, shown if isinstance(shown, str) else json.dumps(shown, default=str)))
        return sorted(origins, key=lambda origin: origin.variable)

    def reject(self, invalid: ValidationError) -> bool:
        """Turn what pydantic refused into problems and forget those values, so that the rest can still be checked."""
        before = len(self.given)
        for error in invalid.errors(include_url=False, include_input=False):
            path = tuple(str(key) for key in error["loc"] if key != "[key]")
            self.rejected.add(path)
            if error["type"] == "extra_forbidden":
                self._unknown(_variable(path))
            else:
                self.problems.append(
                    (SettingsError, Problem(self.name_of(path), _in_plain_words(error["type"], error.get("ctx", {}))))
                )
            for other in [other for other in self.given if _overlap(path, other)]:
                del self.given[other]
        return len(self.given) < before

    def error(self) -> SettingsError:
        kinds = {kind for kind, _ in self.problems}
        kind = kinds.pop() if len(kinds) == 1 else SettingsError
        return kind(sorted({problem for _, problem in self.problems}, key=lambda problem: problem.variable))

    def _read(self, name: str, text: str, source: str) -> None:
        path = tuple(name[len(PREFIX) :].lower().split(DELIMITER))
        kind = _type_at(self.model, path)
        if kind is None:
            return self._unknown(name)
        value: Any = text
        if kind is Any or _holds_more(kind):
            value = _decoded(text)
        if _holds_more(kind) and not _is_object(value):
            self.rejected.add(path)
            return self.problems.append((SettingsError, Problem(name, _PLAIN_WORDS["dict_type"])))
        return self.take(path, value, source)

    def _unknown(self, name: str) -> None:
        names = {"writer", "reader", *(key.lower() for key in name.split(DELIMITER)[1:2])}
        names.update(path[1] for path in self.given if path[:1] == ("connections",) and len(path) > 1)
        hint = did_you_mean(name, _known_variables(self.model, (), names))
        self.problems.append((UnknownVariable, Problem(name, f"is set, but nobody reads it.{hint}")))


def _overlap(one: _Path, other: _Path) -> bool:
    return one[: len(other)] == other[: len(one)]


def _leaves(path: _Path, value: Any) -> Iterator[tuple[_Path, Any]]:
    if isinstance(value, _Model):
        fields = type(value).model_fields
        value = {str(fields[name].validation_alias or name): getattr(value, name) for name in value.model_fields_set}
    if not _is_object(value) or not value:
        yield path, value
        return
    for key, item in value.items():
        yield from _leaves((*path, "class" if key == "class_" else key), item)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _holds_more(kind: Any) -> bool:
    return _is_model(kind) or get_origin(kind) is dict


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {str(field.validation_alias or name): field.annotation for name, field in model.model_fields.items()}


def _type_at(kind: Any, path: _Path) -> Any:
    """Return the type of the setting a path leads to, or None where there is no setting."""
    for key in path:
        if _is_model(kind):
            kind = _fields(kind).get(key)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif kind is not Any:
            return None
    return kind


def _known_variables(kind: Any, path: _Path, names: Iterable[str]) -> Iterator[str]:
    if _is_model(kind):
        for key, inner in _fields(kind).items():
            yield from _known_variables(inner, (*path, key), names)
    elif get_origin(kind) is dict and _is_model(get_args(kind)[1]):
        for name in names:
            yield from _known_variables(get_args(kind)[1], (*path, name), names)
    else:
        yield _variable(path)


def _validation_error(validate: Callable[..., None], values: dict[str, Any]) -> ValidationError | None:
    # Returned, not raised: an error raised while this one is handled would carry it, and the values in it, as its context.
    try:
        validate(**values)
    except ValidationError as invalid:
        return invalid
    return None


_PLAIN_WORDS = {
    "bool_parsing": "must be true or false.",
    "bool_type": "must be true or false.",
    "int_parsing": "must be a whole number.",
    "int_parsing_size": "must be a smaller whole number.",
    "int_from_float": "must be a whole number.",
    "int_type": "must be a whole number.",
    "float_parsing": "must be a number.",
    "float_type": "must be a number.",
    "finite_number": "must be a finite number.",
    "greater_than": "must be greater than {gt}.",
    "greater_than_equal": "must be at least {ge}.",
    "less_than_equal": "must be at most {le}.",
    "literal_error": "must be {expected}.",
    "string_type": "must be text.",
    "string_unicode": "must be text in UTF-8.",
    "dict_type": "must be a JSON object.",
    "model_type": "must be a JSON object.",
    "model_attributes_type": "must be a JSON object.",
    "value_error": "{error}.",
}


def _in_plain_words(error_type: str, context: Mapping[str, Any]) -> str:
    return _PLAIN_WORDS.get(error_type, "can't be used: it is of the wrong kind.").format_map(context)


# ---- checking the whole -----------------------------------------------------------------------------------------

_UNREADABLE_URL = (
    "can't be read as a database URL. It has the form postgresql+psycopg://user:password@host/database or sqlite:///file.db; "
    "write '@' in a user name or password as %40, or set DRIVER, HOST, USER, PASSWORD and DATABASE instead of URL."
)


def _parse_url(text: str) -> URL | None:
    """Return the URL with its driver settled, or None when it can't be read or can be read in more than one way."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return None
    if url.password is not None and text.count("@") > 1:  # a part of the password would be taken for the host, and shown
        return None
    return url.set(drivername=_DEFAULT_DRIVERS.get(url.drivername, url.drivername))


def _dialect(url: URL) -> type[Dialect] | str:
    """Return the dialect of a URL, or what has to be installed to have it."""
    try:
        dialect = url.get_dialect()
    except (ArgumentError, ImportError):  # NoSuchModuleError is an ArgumentError
        return "names a dialect that SQLAlchemy does not have. Check the spelling, or pip install the package of the dialect."
    module, package = _PACKAGES.get(dialect.driver, ("", ""))
    if module and find_spec(module) is None:
        return f"needs a driver that is not installed: pip install {package}"
    return dialect


def _contradictions(connection: ConnectionSettings) -> Iterator[tuple[str, str]]:
    """Yield the settings of one connection that exclude another one of it: the field, and what it excludes and why."""
    if connection.read_only and connection.two_phase:
        yield "two_phase", "excludes READ_ONLY=true: where nothing is written, nothing can be prepared."
    if connection.read_only and not connection.transactional:
        yield "transactional", "=false excludes READ_ONLY=true: only writes can outlive the unit of work."
    if connection.two_phase and not connection.transactional:
        yield "two_phase", "excludes TRANSACTIONAL=false: a connection that commits by itself can't commit with others."
    if connection.two_phase and connection.isolation_level == "AUTOCOMMIT":
        yield "two_phase", "excludes ISOLATION_LEVEL=AUTOCOMMIT: what is committed at once can't be prepared."
    parts = [part for part in _PARTS if getattr(connection, part) not in (None, {})]
    if connection.mirror is not None:
        own = [field for field in _DATABASE_FIELDS if getattr(connection, field) not in (None, {})]
        if own:
            yield "mirror", f"excludes {_upper(own)}: a mirror uses the database of another connection. Unset one side."
        return
    if connection.url is not None and parts:
        yield "url", f"excludes {_upper(parts)}: give the URL or its parts."
    if connection.url is None and parts and connection.driver is None:
        yield "driver", "is not set, but other parts of the URL are. Set it, for example to postgresql+psycopg."
    if connection.password_provider and (url := connection._url()) is not None and url.password is not None:
        place = "PASSWORD" if connection.url is None else "URL"
        yield "password_provider", f"excludes a password in {place}: say it in one place."


def _upper(fields: Iterable[str]) -> str:
    return ", ".join(field.upper() for field in fields)


def _findings(settings: DatabaseSettings, reading: _Reading) -> Iterator[_Finding]:
    """Yield what pydantic can't see: settings that exclude each other, and connections that lead nowhere."""
    for name, connection in settings.connections.items():
        path = ("connections", name)
        if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*_?", name) is None or iskeyword(name):
            yield (
                SettingsError,
                Problem(_variable(path), "a connection's name must be a lower-case Python identifier without '__'."),
            )
        for field, message in _contradictions(connection):
            yield ContradictorySettings, Problem(_variable((*path, field)), message)
        refused = any(_overlap(path, other) for other in reading.rejected)
        yield from (
            _mirror_findings(settings, name, reading) if connection.mirror else _url_findings(connection, path, reading, refused)
        )
        if connection.two_phase:
            yield from _two_phase_findings(settings, name)
    if not settings.connections and not any("APP_DB_CONNECTIONS" in str(problem) for _, problem in reading.problems):
        variable = _variable(("connections", "writer", "url"))
        yield (
            NothingConfigured,
            Problem(variable, f"is not set, and no other connection is. To start, paste {variable}=sqlite:///writer.db"),
        )


def _mirror_findings(settings: DatabaseSettings, name: str, reading: _Reading) -> Iterator[_Finding]:
    *passed, last = settings._mirrors(name)
    variable = _variable(("connections", name, "mirror"))
    if last in passed:
        yield (
            ContradictorySettings,
            Problem(variable, f"leads in a circle: {' → '.join([*passed, last])}. Give one of them a URL."),
        )
    elif settings._declared(last) is None and not any(_overlap(("connections", last), path) for path in reading.rejected):
        hint = did_you_mean(last, settings.connections)
        names = ", ".join(repr(known) for known in sorted(settings.connections) if known != name) or "none"
        yield (
            ContradictorySettings,
            Problem(variable, f"leads to a connection that is not configured.{hint} Others configured are: {names}."),
        )


def _url_findings(connection: ConnectionSettings, path: _Path, reading: _Reading, refused: bool) -> Iterator[_Finding]:
    field = "driver" if connection.url is None else "url"
    variable = reading.name_of((*path, field))
    url = connection._url()
    if url is not None:
        dialect = _dialect(url)
        if isinstance(dialect, str):
            yield SettingsError, Problem(variable, dialect)
    elif connection.url is not None:
        yield SettingsError, Problem(variable, _UNREADABLE_URL)
    elif not refused and all(getattr(connection, part) in (None, {}) for part in _PARTS):
        message = f"is not set. Set it, for example to sqlite:///{path[-1]}.db, or set DRIVER and the other parts, or MIRROR."
        yield ContradictorySettings, Problem(_variable((*path, "url")), message)


def _two_phase_findings(settings: DatabaseSettings, name: str) -> Iterator[_Finding]:
    url = settings.connection(name)._url()
    dialect = None if url is None else _dialect(url)
    if isinstance(dialect, type) and dialect.do_prepare_twophase is Dialect.do_prepare_twophase:
        message = f"needs a database that can prepare a transaction, as PostgreSQL and MySQL can, and {dialect.name} can't."
        yield ContradictorySettings, Problem(_variable(("connections", name, "two_phase")), message)
