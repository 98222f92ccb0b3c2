"""Where settings come from.

A setting may come from five places. The first that has it wins, setting by setting: given in code, the environment,
`.env`, the secrets directory (a file a setting), and for the writer's URL `DATABASE_URL`. Wherever it came from, a
setting is spoken of by its environment variable.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, DotEnvSettingsSource

from app_db._wording import did_you_mean
from app_db.errors import Problem, SettingsError, UnknownVariable
from app_db.settings._urls import MASK, URL_PARTS, is_object, is_secret, shown

PREFIX = "APP_DB_"
DELIMITER = "__"

Finding = tuple[type[SettingsError], Problem]
"""A problem, and the kind of error it makes when there is no problem of another kind."""

_Path = tuple[str, ...]
"""The keys that lead to a setting: connections, writer, url."""


def variable_for(path: Iterable[object]) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + DELIMITER.join(str(key) for key in path).upper()


@dataclass(frozen=True)
class Origin:
    """Where a setting came from. `source` is one of: given in code, environment, .env, secrets, DATABASE_URL."""

    variable: str
    source: str
    shown_value: str


class Group(BaseModel):
    """Settings that belong together. A group given as a whole still competes with other sources setting by setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value != field.get_default(call_default_factory=True):
                yield name, shown(name, value)


class _Given(NamedTuple):
    value: Any
    source: str


class Reading:
    """What was given for the settings of `model`, one entry a setting, and what is wrong with the way it was given.

    Read the source that wins last.
    """

    def __init__(self, model: type[BaseSettings]) -> None:
        self.model = model
        self.problems: list[Finding] = []
        self._given: dict[_Path, _Given] = {}
        self._refused: set[_Path] = set()
        self._database_url: str | None = None

    # ---- the sources ----

    def read_secrets(self, directories: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None) -> None:
        """Read the files that are named like variables, in any case; others belong to others."""
        for directory in [directories] if isinstance(directories, (str, os.PathLike)) else directories or ():
            folder = Path(directory).expanduser()
            if not folder.is_dir():
                warnings.warn(f"the secrets directory {str(folder)!r} does not exist", stacklevel=3)
                continue
            files = [file for file in folder.iterdir() if file.is_file() and file.name.upper().startswith(PREFIX)]
            # What is not UTF-8 becomes text that pydantic refuses, and so a problem of its variable.
            texts = {file.name: file.read_text("utf-8", "surrogateescape").rstrip("\r\n") for file in files}
            self.read_variables(texts, "secrets")

    def read_env_file(self, env_file: Any, encoding: str | None) -> None:
        """Read what pydantic-settings would take for the `env_file` of `model`: a path, several or None."""
        try:
            variables = DotEnvSettingsSource(self.model, env_file, encoding).env_vars
        except (OSError, UnicodeError):
            self.problems.append((SettingsError, Problem(str(env_file), "can't be read as a file of variables.")))
        else:
            self.read_variables(variables, ".env")

    def read_variables(self, variables: Mapping[str, str | None], source: str) -> None:
        """Take every variable that begins with PREFIX. One that is no setting is a problem."""
        texts = {name.upper(): text for name, text in variables.items() if text is not None}
        self._database_url = texts.get("DATABASE_URL") or self._database_url
        for name in sorted(texts, key=lambda name: name.count(DELIMITER)):  # an object first, then what replaces a part of it
            if name.startswith(PREFIX):
                self._read(name, texts[name], source)

    def take(self, path: _Path, value: Any, source: str) -> None:
        """Remember a value. It wins over what was taken before for the same setting, and leaves its neighbours alone."""
        for leaf, leaf_value in _leaves(path, value):
            related = [other for other in self._given if _overlap(leaf, other)]
            if leaf_value == {} and (related or not leaf):
                continue
            for other in related:
                del self._given[other]
            self._given[leaf] = _Given(leaf_value, source)

    def settle_writer(self) -> None:
        """Let DATABASE_URL be the writer's when nothing else says which database the writer is."""
        fields = ("url", "mirror", *URL_PARTS)
        said = any(path[:2] == ("connections", "writer") and (len(path) == 2 or path[2] in fields) for path in self._given)
        if self._database_url and not said:
            self.take(("connections", "writer", "url"), self._database_url, "DATABASE_URL")

    # ---- the outcome ----

    def tree(self) -> dict[str, Any]:
        """Return what was given as `model` takes it: groups are dicts in dicts."""
        root: dict[str, Any] = {}
        for path, given in self._given.items():
            node = root
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = given.value
        return root

    def reject(self, invalid: ValidationError) -> bool:
        """Turn what pydantic refused into problems and forget those values, so that the rest can still be checked.

        Returns whether there was anything to forget.
        """
        before = len(self._given)
        for error in invalid.errors(include_url=False, include_input=False):
            path = tuple(str(key) for key in error["loc"] if key != "[key]")
            self._refused.add(path)
            if error["type"] == "extra_forbidden":
                self._unknown(variable_for(path))
            else:
                message = _in_plain_words(error["type"], error.get("ctx", {}))
                self.problems.append((SettingsError, Problem(self.name_of(path), message)))
            for other in [other for other in self._given if _overlap(path, other)]:
                del self._given[other]
        return len(self._given) < before

    def has_refused(self, path: _Path) -> bool:
        """Return whether a setting was refused, or a part of it, or what it is a part of."""
        return any(_overlap(path, other) for other in self._refused)

    def name_of(self, path: _Path) -> str:
        """Return the variable a setting was given by, or can be given by."""
        given = self._given.get(path)
        return "DATABASE_URL" if given is not None and given.source == "DATABASE_URL" else variable_for(path)

    def origins(self) -> list[Origin]:
        """Return where each setting came from, sorted by variable, with secrets masked."""
        origins: list[Origin] = []
        for path, (value, source) in self._given.items():
            masked = MASK if any(is_secret(key) for key in path[2:]) else shown(path[-1], value)
            text = masked if isinstance(masked, str) else json.dumps(masked, default=str)
            origins.append(Origin(variable_for(path), source, text))
        return sorted(origins, key=lambda origin: origin.variable)

    def error(self) -> SettingsError:
        """Return one error for all problems, of their own kind when they are all of one."""
        kinds = {kind for kind, _ in self.problems}
        kind = kinds.pop() if len(kinds) == 1 else SettingsError
        return kind(sorted({problem for _, problem in self.problems}, key=lambda problem: problem.variable))

    # ---- one variable ----

    def _read(self, name: str, text: str, source: str) -> None:
        path = tuple(name[len(PREFIX) :].lower().split(DELIMITER))
        kind = _type_at(self.model, path)
        if kind is None:
            self._unknown(name)
            return
        value = _decoded(text) if kind is Any or _holds_more(kind) else text
        if _holds_more(kind) and not is_object(value):
            self._refused.add(path)
            self.problems.append((SettingsError, Problem(name, _PLAIN_WORDS["dict_type"])))
        else:
            self.take(path, value, source)

    def _unknown(self, name: str) -> None:
        connections = {"writer", "reader", *(key.lower() for key in name.split(DELIMITER)[1:2])}
        connections.update(path[1] for path in self._given if path[:1] == ("connections",) and len(path) > 1)
        hint = did_you_mean(name, _known_variables(self.model, (), connections))
        self.problems.append((UnknownVariable, Problem(name, f"is set, but nobody reads it.{hint}")))


# ---- paths and the types they lead to ---------------------------------------------------------------------------


def _overlap(one: _Path, other: _Path) -> bool:
    return one[: len(other)] == other[: len(one)]


def _leaves(path: _Path, value: Any) -> Iterator[tuple[_Path, Any]]:
    if isinstance(value, Group):
        fields = type(value).model_fields
        value = {str(fields[name].validation_alias or name): getattr(value, name) for name in value.model_fields_set}
    if not is_object(value) or not value:
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


def _known_variables(kind: Any, path: _Path, connections: Iterable[str]) -> Iterator[str]:
    """Yield the variables of all settings below a path, those of a connection for each of the names in `connections`."""
    if _is_model(kind):
        for key, inner in _fields(kind).items():
            yield from _known_variables(inner, (*path, key), connections)
    elif get_origin(kind) is dict and _is_model(get_args(kind)[1]):
        for name in connections:
            yield from _known_variables(get_args(kind)[1], (*path, name), connections)
    else:
        yield variable_for(path)


# ---- what pydantic refuses, in plain words ----------------------------------------------------------------------

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
