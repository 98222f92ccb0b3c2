"""Reads the keys of a mapping: a WSGI environ, the settings of Paste and Pyramid, and what `engine_from_config` takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from pydantic_settings import BaseSettings, EnvSettingsSource
from sqlalchemy.pool import NullPool, Pool, QueuePool, StaticPool

from app_db._wording import did_you_mean
from app_db.errors import ContradictorySettings, Problem, SettingsError, UnknownVariable
from app_db.settings._reading import PLAIN_WORDS, Given, Keys, Reading, Values, known_settings
from app_db.settings._spelling import DELIMITER, PREFIX, Spelling
from app_db.settings._variables import VariableReader, with_texts

_SOURCE = "mapping"
_DOTTED = "app_db."
"""How keys begin in the settings of Paste and Pyramid."""

_TO_SETTINGS: dict[str, Keys] = {
    "url": ("url",),
    "echo": ("echo",),
    "isolation_level": ("isolation_level",),
    "connect_args": ("connect_args",),
    "pool_size": ("pool", "size"),
    "max_overflow": ("pool", "max_overflow"),
    "pool_timeout": ("pool", "timeout"),
    "pool_recycle": ("pool", "recycle"),
    "pool_use_lifo": ("pool", "use_lifo"),
    "pool_pre_ping": ("pool", "alive_window"),
    "poolclass": ("pool", "class"),
}
"""The arguments of create_engine that are settings."""

_INSTEAD = {
    "async_creator": "Set password_provider if the password changes.",
    "creator": "Set password_provider if the password changes.",
    "echo_pool": "Set the level of the logger sqlalchemy.pool.",
    "execution_options": "Set isolation_level for an isolation level, and give other options to statements.",
    "logging_name": "app_db gives the engine the connection's name.",
    "module": "Name the driver in the URL, as in postgresql+psycopg.",
    "plugins": "Name the plugin in the URL: ?plugin=NAME.",
    "pool": "Set poolclass.",
    "pool_logging_name": "app_db gives the pool the connection's name.",
    "pool_reset_on_return": "app_db resets connections itself.",
}
"""What to do in place of other arguments."""

_REMOVED = frozenset({"case_sensitive", "convert_unicode", "empty_in_strategy", "encoding", "implicit_returning", "strategy"})
_WITHOUT_SETTING = frozenset({
    "enable_from_linting", "hide_parameters", "insertmanyvalues_page_size", "json_deserializer", "json_serializer",
    "label_length", "max_identifier_length", "paramstyle", "pool_events", "query_cache_size", "skip_autocommit_rollback",
    "use_insertmanyvalues",
})  # fmt: skip

_POOLS: dict[object, str] = {QueuePool: "queue", NullPool: "null", StaticPool: "static"}
_TRUE = frozenset({"true", "yes", "on", "y", "t", "1"})
_FALSE = frozenset({"false", "no", "off", "n", "f", "0"})


def read_mapping(
    model: type[BaseSettings], own: Iterable[str], mapping: Mapping[str, object], prefix: str | None, prefixes: Mapping[str, str]
) -> Reading:
    """Read the keys that begin with `prefix`, and for each connection in `prefixes` those that begin with its prefix."""
    placed = {key: found for key in mapping if (found := _place_of(key, prefixes))}
    others = {key: value for key, value in mapping.items() if key not in placed}
    own_prefix = str(model.model_config.get("env_prefix") or PREFIX)
    spellings = [_spelling(each) for each in ([own_prefix, _DOTTED] if prefix is None else [prefix])]
    used = [spelling for spelling in spellings if any(key.lower().startswith(spelling.prefix.lower()) for key in others)]
    places = {name: _whole(each) for name, each in prefixes.items()}
    reading = Reading(model, replace((used or spellings)[0], places=places))
    reader = VariableReader(reading, own)
    for spelling in spellings:
        variables = EnvSettingsSource(
            model, case_sensitive=False, env_prefix=spelling.prefix, env_nested_delimiter=spelling.delimiter
        )
        texts = _lower(reading, others, spelling.prefix)
        _add(reading, reader.read(with_texts(variables, texts), _SOURCE, spelling))
    for name in prefixes:
        mine = {key: argument for key, (connection, argument) in placed.items() if connection == name}
        if not mine:  # it is asked for, so that it must have a database
            reading.values.put_given(("connections", name), Given({}, _SOURCE, prefixes[name]))
        for key, argument in mine.items():
            _add(reading, _of_engine(reader, name, key, argument, mapping[key]))
    return reading


def _place_of(key: str, prefixes: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the connection that a key is for, and the rest of the key. The longest prefix wins."""
    for name, prefix in sorted(prefixes.items(), key=lambda item: -len(item[1])):
        if key == prefix.rstrip("."):
            return name, "url"
        if key.startswith(_whole(prefix)):
            return name, key[len(_whole(prefix)) :]
    return None


def _whole(prefix: str) -> str:
    """Return what the keys of a connection begin with."""
    return prefix if prefix.endswith((".", "_")) else f"{prefix}."


def _spelling(prefix: str) -> Spelling:
    dotted = prefix.endswith(".") or not prefix
    return Spelling(prefix, "." if dotted else DELIMITER, upper=prefix.isupper())


def _lower(reading: Reading, texts: Mapping[str, object], prefix: str) -> dict[str, object]:
    """Return texts by their names in lower case."""
    found: dict[str, tuple[str, object]] = {}
    for key, value in texts.items():
        other = found.setdefault(key.lower(), (key, value))
        if key.lower().startswith(prefix.lower()) and str(other[1]) != str(value):
            reading.problems.append(_contradiction(key, other[0]))
    return {name: value for name, (_, value) in found.items()}


def _contradiction(key: str, other: str) -> tuple[type[SettingsError], Problem]:
    return ContradictorySettings, Problem(key, f"says something else than {other!r}. Keep one of them.")


def _add(reading: Reading, values: Values) -> None:
    """Add values, none of which may be there with another value."""
    for path, given in values.items():
        other = reading.values.below(path)
        if isinstance(other, Given) and str(other.value) != str(given.value):
            reading.problems.append(_contradiction(given.variable, other.variable))
    reading.add(values)


def _of_engine(reader: VariableReader, name: str, key: str, argument: str, value: object) -> Values:
    """Return what an argument of create_engine is as a setting of a connection, or a setting that is written as one."""
    values = Values()
    for refusal in _refusals(argument, value):
        reader.reading.problems.append((SettingsError, Problem(key, refusal)))
        return values
    path = ("connections", name, *_TO_SETTINGS.get(argument, argument.split(".")))
    if argument == "future":  # SQLAlchemy 2.0 is always so
        return values
    if not reader.has(path):
        own = (".".join(keys[2:]) for keys in known_settings(reader.reading.model, (), [name]) if keys[0] == "connections")
        hint = did_you_mean(argument, [*_TO_SETTINGS, *own])
        reader.reading.problems.append((UnknownVariable, Problem(key, f"is set, but app_db has no such setting.{hint}")))
        return values
    for item in _as_settings(argument, value):
        reader.put(values, path, Given(item, _SOURCE, key))
    return values


def _refusals(argument: str, value: object) -> Iterator[str]:
    """Yield why an argument of create_engine can't be used, and what to write."""
    if argument in _INSTEAD:
        yield f"is not taken from a mapping. Remove it. {_INSTEAD[argument]}"
    elif argument in _REMOVED:
        yield "is no argument of SQLAlchemy 2.0. Remove it."
    elif argument in _WITHOUT_SETTING:
        yield "has no setting. Remove it, or make the engine yourself and override the container's provider of it."
    elif argument == "echo" and str(value).lower() == "debug":
        yield "must be true or false. For the rows, too, set the level of the logger sqlalchemy.engine to DEBUG."
    elif argument == "pool_pre_ping" and str(value).lower() not in _TRUE | _FALSE:
        yield PLAIN_WORDS["bool_parsing"]


def _as_settings(argument: str, value: object) -> Iterator[object]:
    """Yield the value of the setting, or nothing if its default means the same."""
    if argument == "pool_pre_ping":
        if str(value).lower() in _TRUE:
            yield 0  # a ping whenever the pool gives a connection
    elif argument == "pool_recycle" and str(value).strip() == "-1":
        yield None
    elif isinstance(value, type) and issubclass(value, Pool):
        yield _POOLS.get(value, f"{value.__module__}:{value.__qualname__}")
    else:
        yield value
