"""The settings of all connections, checked as a whole. `app_db.settings._sources` reads them.

Secrets are `SecretStr`, and are shown as `***`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import Dialect

from app_db._wording import did_you_mean
from app_db.errors import ConnectionNotConfigured, ContradictorySettings, NothingConfigured, Problem
from app_db.settings._connection_settings import (
    DATABASE_FIELDS,
    ConnectionSettings,
    SecondsOrNever,
    contradiction,
    findings_of,
    matching,
)
from app_db.settings._mapping import read_mapping
from app_db.settings._reading import IN_CODE, Finding, Origin, Reading, Values, has_path_alias
from app_db.settings._sources import Paths, read
from app_db.settings._spelling import DELIMITER, PREFIX, Spelling
from app_db.settings._urls import dialect_of, is_memory

_Application = Annotated[
    str, matching(r"[A-Za-z][A-Za-z0-9_-]{0,15}", "must begin with a letter and have at most 16 letters, digits, '_' or '-'")
]
_DecisionLog = Annotated[str, matching(r"[a-z][a-z0-9_]*|file:.+", "must be the name of a connection, or file: and a path")]
_FROM_CONFIG = Path()
"""The default of `_env_file` and `_secrets_dir`: the value in `model_config` is used."""
_OPTIONS = frozenset(name for name in inspect.signature(BaseSettings.__init__).parameters if name.startswith("_"))
"""The arguments of pydantic-settings that are no settings."""
_PREPARING_DRIVERS = frozenset({"psycopg", "asyncpg", "pymysql", "asyncmy"})
_LONGEST_TWO_PHASE_NAME = 22
FILE = "file:"
"""`decision_log` begins with this if decisions are kept in a file."""


class DatabaseSettings(BaseSettings):
    """The settings of all connections, and those that they have in common.

    Settings that are not given are read from environment variables that begin with `APP_DB_`, from
    `.env`, and from the secrets directory. `_env_file=` replaces `.env`, and `_secrets_dir=` names
    one or several secrets directories. `settings_customise_sources`, `model_config` and the other
    arguments that begin with an underscore do what pydantic-settings says. Raises a SettingsError
    that lists everything wrong, with the variables to change.

    It may be a field of the application's own settings. Give those `hide_input_in_errors=True`,
    because pydantic shows the values of a model in its own errors:

        class Settings(BaseSettings):
            model_config = SettingsConfigDict(hide_input_in_errors=True)
            db: DatabaseSettings = Field(default_factory=DatabaseSettings)

    >>> from app_db import DatabaseSettings
    >>> settings = DatabaseSettings(connections={"writer": {"url": "postgresql://shop:secret@db/shop"}})
    >>> settings.connection("writer").masked_url
    'postgresql+psycopg://shop:***@db/shop'
    >>> settings.connection("reader").read_only  # a reader that is not configured is the writer, read-only
    True
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=DELIMITER, env_file=".env", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    application: _Application = "app_db"
    connections: dict[str, ConnectionSettings] = Field(default_factory=dict)
    atomicity: Literal["strict", "best_effort"] = "strict"
    two_phase: bool = False
    slow_statement: SecondsOrNever = None
    held_warning: SecondsOrNever = None
    decision_log: _DecisionLog | None = None
    recover_at_start: bool = False
    reflect_at_start: bool = False

    _origins: tuple[Origin, ...] = PrivateAttr(default=())
    _spelling: Spelling = PrivateAttr(default_factory=Spelling)
    _lending: tuple[object, dict[str, list[str]]] | None = PrivateAttr(default=None)

    def __init__(
        self,
        /,
        *,
        _env_file: Paths = _FROM_CONFIG,
        _env_file_encoding: str | None = None,
        _secrets_dir: Paths = _FROM_CONFIG,
        **given: object,
    ) -> None:
        options = {name[1:]: given.pop(name) for name in list(given) if name in _OPTIONS}
        options["env_file_encoding"] = _env_file_encoding
        options.update({} if _env_file is _FROM_CONFIG else {"env_file": _env_file})
        options.update({} if _secrets_dir is _FROM_CONFIG else {"secrets_dir": _secrets_dir})
        self._settle(read(type(self), DatabaseSettings.model_fields, given, options))

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, object], *, prefix: str | None = None, prefixes: Mapping[str, str] | None = None
    ) -> Self:
        """Return the settings that are in a mapping: a WSGI environ, or the settings of Paste or Pyramid.

        Keys begin with `prefix`: with `APP_DB_` or `app_db.` if it is not given. After a prefix that
        ends with a dot, dots separate the levels, and else two underscores. `prefixes` has for each
        connection the prefix of keys that `sqlalchemy.engine_from_config` takes. A key that is the
        prefix itself is the URL. Keys with other beginnings are ignored. No other source is read.
        Raises SettingsError.

        >>> from app_db import DatabaseSettings
        >>> DatabaseSettings.from_mapping({"app_db.connections.log.url": "sqlite:///log.db"}).connection("log").masked_url
        'sqlite:///log.db'
        >>> settings = DatabaseSettings.from_mapping({"sa.url": "sqlite://", "sa.echo": "on"}, prefixes={"log": "sa."})
        >>> settings.connection("log").echo
        True
        """
        reading = read_mapping(cls, DatabaseSettings.model_fields, mapping, prefix, prefixes or {})
        made = cls.__new__(cls)
        made._settle(reading)
        return made

    def _settle(self, reading: Reading) -> None:
        """Take the values that were read, or raise an error that lists all problems."""
        # Not BaseSettings.__init__: it would read the sources a second time, ignore unknown
        # variables silently, and not record the source of a value.
        reading.apply_database_url()
        while invalid := _validation_error(super(BaseSettings, self).__init__, reading.tree()):
            if not reading.reject(invalid):
                raise reading.error()
        for name, connection in self.connections.items():
            connection.become(name, reading.spelling)
        _pass_on(self, ("slow_statement", "held_warning"))
        if self.two_phase:
            reading.problems += _prepare_all(self, reading)
        reading.problems += _findings(self, reading)
        if reading.problems:
            raise reading.error()
        self._origins = tuple(reading.origins())
        self._spelling = reading.spelling

    def connection(self, name: str) -> ConnectionSettings:
        """Return the settings of a connection. A mirror has the database of the connection that it mirrors.

        A `reader` that is not configured is the writer, read-only. Raises ConnectionNotConfigured
        for other names.
        """
        own = self._declared(name)
        if own is None:
            raise ConnectionNotConfigured(name, sorted(self.connections), self.variable("connections", name, "url"))
        if own.mirror is None:
            return own
        owner = self._declared(self._mirrors(name)[-1])
        if owner is None or owner is own:
            return own
        usage = {field: getattr(own, field) for field in type(own).model_fields if field not in DATABASE_FIELDS}
        return owner.model_copy(update=usage)

    def replicas(self) -> dict[str, str]:
        """Return the replicas, each with the name of the connection whose reads may be sent to it.

        `replica_of` names that connection. If it isn't set, a read-only connection is a replica of
        the connection that it mirrors, and `reader` is a replica of `writer` if their databases are
        of the same kind. An empty `replica_of` makes it no replica.
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
        """Return the connections that have no transaction of their own in a unit, each with the one whose transaction it uses.

        Writable connections with the same URL share a transaction. It belongs to `writer`, or else
        to the connection that is first in the settings.
        """
        found = {name: self.lender_of(name, names) for name in names}
        return {name: lender for name, lender in found.items() if lender is not None}

    def lender_of(self, name: str, names: Collection[str]) -> str | None:
        """Return the connection among `names` whose transaction `name` uses, or None if it has its own."""
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

    def variable(self, *path: str) -> str:
        """Return the name of a setting: `variable("connections", "writer", "url")` is `APP_DB_CONNECTIONS__WRITER__URL`."""
        return self._spelling.variable(path)

    def origins(self) -> list[Origin]:
        """Return the source of each setting that was given, sorted by variable, with secrets masked."""
        return list(self._origins)

    def with_connections(self, connections: Mapping[str, ConnectionSettings], **others: object) -> DatabaseSettings:
        """Return a copy with other connections, and other values of the fields in `others`. Raises SettingsError.

        No source is read.
        """
        by_path = [name for name, field in type(self).model_fields.items() if has_path_alias(field)]
        given = {field: getattr(self, field) for field in self.model_fields_set.difference(by_path)}
        reading = Reading(type(self), self._spelling)
        values = Values()
        values.put((), {**given, "connections": dict(connections), **others}, self._spelling, IN_CODE)
        reading.add(values)
        made = type(self).__new__(type(self))
        made._settle(reading)
        for name in by_path:
            object.__setattr__(made, name, getattr(self, name))
        return made

    def _declared(self, name: str) -> ConnectionSettings | None:
        if name == "reader" and name not in self.connections and "writer" in self.connections:
            of_all = {"slow_statement": self.slow_statement, "held_warning": self.held_warning}
            return ConnectionSettings(mirror="writer", read_only=True, **of_all)
        return self.connections.get(name)

    def _mirrors(self, name: str) -> list[str]:
        """Return the names from a connection to the end of its mirrors. The last may be unknown, or a name that came before."""
        names = [name]
        while (connection := self._declared(names[-1])) is not None and connection.mirror is not None:
            names.append(connection.mirror)
            if names.count(connection.mirror) > 1:
                break
        return names


def _lending_key(own: ConnectionSettings) -> object:
    """Return a value that is equal for connections that can share a transaction."""
    url = own.sqlalchemy_url()
    memory = own.database_identity() if is_memory(url) else None  # each has its own, with the same URL
    arguments = tuple(sorted((key, repr(value)) for key, value in own.connect_args.items()))  # they may name a role
    return url, memory, own.password_provider, own.isolation_level, own.statement_timeout, arguments


def _kind(connection: ConnectionSettings) -> str | None:
    url = connection.read_url()
    return None if url is None else url.get_backend_name()


# ---- checking the whole -----------------------------------------------------------------------------------------


def _validation_error(validate: Callable[..., None], values: dict[str, object]) -> ValidationError | None:
    # Returned, not raised: an error raised while this one is handled would carry it, and the values
    # in it, as its context.
    try:
        validate(**values)
    except ValidationError as invalid:
        return invalid
    return None


def _findings(settings: DatabaseSettings, reading: Reading) -> Iterator[Finding]:
    """Yield the problems that pydantic can't see: contradictions, and references to connections that don't exist."""
    for name, connection in settings.connections.items():
        yield from findings_of(name, connection, reading)
        if connection.mirror:
            yield from _mirror_findings(settings, name, reading)
        if connection.replica_of:
            yield from _replica_findings(settings, name, connection.replica_of, reading)
        if connection.two_phase:
            yield from _two_phase_findings(settings, name, reading)
    yield from _decision_log_findings(settings, reading)
    # Not if the only variable of a connection was misspelt or refused.
    misspelt = any(reading.spelling.variable(["connections"]) in str(problem) for _, problem in reading.problems)
    if not (settings.connections or misspelt or reading.has_refused(("connections",))):
        variable = reading.spelling.variable(("connections", "writer", "url"))
        message = f"is not set, and no other connection is. To start, paste {variable}=sqlite:///writer.db"
        yield NothingConfigured, Problem(variable, message)


def _not_configured(settings: DatabaseSettings, missing: str, name: str = "") -> str:
    """Return how a message about the connection `name` ends that names a missing connection."""
    others = ", ".join(repr(known) for known in sorted(settings.connections) if known != name) or "none"
    hint = did_you_mean(missing, settings.connections)
    return f"a connection that is not configured.{hint} {'Others configured' if name else 'Configured'} are: {others}."


def _mirror_findings(settings: DatabaseSettings, name: str, reading: Reading) -> Iterator[Finding]:
    *passed, last = settings._mirrors(name)
    if last in passed:
        circle = " → ".join([*passed, last])
        yield contradiction(reading, name, "mirror", f"leads back to itself: {circle}. Give one of these connections a URL.")
    elif settings._declared(last) is None and not reading.has_refused(("connections", last)):
        yield contradiction(reading, name, "mirror", f"leads to {_not_configured(settings, last, name)}")


def _replica_findings(settings: DatabaseSettings, name: str, owner: str, reading: Reading) -> Iterator[Finding]:
    known = settings._declared(owner)
    if owner == name:
        yield contradiction(reading, name, "replica_of", "names the connection itself. Name the one whose database it copies.")
    elif known is None and not reading.has_refused(("connections", owner)):
        yield contradiction(reading, name, "replica_of", f"names {_not_configured(settings, owner, name)}")
    elif known is not None and known.read_only:
        yield contradiction(reading, name, "replica_of", f"names {owner!r}, which is read-only. Name the connection that writes.")
    elif known is not None and None not in (kinds := {_end_kind(settings, name), _end_kind(settings, owner)}) and len(kinds) > 1:
        yield contradiction(reading, name, "replica_of", f"names {owner!r}, which is a database of another kind.")


def _end_kind(settings: DatabaseSettings, name: str) -> str | None:
    """Return the kind of database at the end of a connection's mirrors, or None if there is none."""
    end = settings._declared(settings._mirrors(name)[-1])
    return None if end is None else _kind(end)


def _pass_on(settings: DatabaseSettings, fields: Iterable[str]) -> None:
    """Give each connection that does not say itself what the settings say of all of them."""
    given = {field: value for field in fields if (value := getattr(settings, field)) is not None}
    for name, connection in settings.connections.items():
        missing = {field: value for field, value in given.items() if field not in connection.model_fields_set}
        if missing:
            settings.connections[name] = connection.model_copy(update=missing)


def _prepare_all(settings: DatabaseSettings, reading: Reading) -> Iterator[Finding]:
    """Set `two_phase` of each connection that can prepare and doesn't say itself. Yield the problems with the others.

    A connection that is read-only or autonomous has no part in the commit. One connection that
    can't prepare may be the last resource.
    """
    unable: dict[object, list[str]] = {}
    for name, connection in settings.connections.items():
        takes_part = connection.transactional and not connection.read_only and connection.isolation_level != "AUTOCOMMIT"
        if "two_phase" in connection.model_fields_set or not takes_part:
            continue
        if any(_obstacles_to_preparing(settings, name)):
            unable.setdefault(_lending_key(settings.connection(name)), []).append(name)
        else:
            preparing = connection.model_copy(update={"two_phase": True})
            preparing.model_fields_set.discard("two_phase")  # a copy with another URL may be unable to
            settings.connections[name] = preparing
    if len(unable) < 2:
        return
    names = sorted(name for group in unable.values() for name in group)
    switch = reading.name_of(("two_phase",))
    for name in names:
        others = " and ".join(repr(other) for other in names if other != name)
        message = f"{next(_obstacles_to_preparing(settings, name))} {switch} asks all connections to prepare, and only one that "
        message += f"can't may commit with them, as the last resource; {others} can't either. Set TWO_PHASE=false if a unit of "
        message += "work writes to one of them at most, or TRANSACTIONAL=false if its writes need not commit with the others."
        yield contradiction(reading, name, "two_phase", message)


def _two_phase_findings(settings: DatabaseSettings, name: str, reading: Reading) -> Iterator[Finding]:
    for obstacle in _obstacles_to_preparing(settings, name):
        yield contradiction(reading, name, "two_phase", obstacle)


def _obstacles_to_preparing(settings: DatabaseSettings, name: str) -> Iterator[str]:
    """Yield why a connection can't be prepared."""
    url = settings.connection(name).read_url()
    dialect = None if url is None else dialect_of(url)
    if url is None or not isinstance(dialect, type):
        return
    if dialect.do_prepare_twophase is Dialect.do_prepare_twophase:
        yield f"needs a database that can prepare a transaction, as PostgreSQL and MySQL can, and {dialect.name} can't."
    elif url.get_driver_name() not in _PREPARING_DRIVERS:
        known = " and ".join(sorted(_PREPARING_DRIVERS))
        yield f"is not supported by the driver {url.get_driver_name()}. Use one of {known}."
    if len(name) > _LONGEST_TWO_PHASE_NAME:
        yield f"needs a connection whose name has at most {_LONGEST_TWO_PHASE_NAME} characters: it is part of every xid."


def _decision_log_findings(settings: DatabaseSettings, reading: Reading) -> Iterator[Finding]:
    chosen = settings.decision_log
    if chosen is None or chosen.startswith(FILE):
        return
    owner = settings.connections.get(chosen)
    problem = ""
    if owner is None:
        problem = f"names {_not_configured(settings, chosen)}"
    elif owner.read_only or not owner.transactional:
        problem = "names a connection that is read-only or not transactional. Name one that units of work write to."
    if problem:
        yield ContradictorySettings, Problem(reading.name_of(("decision_log",)), problem)
