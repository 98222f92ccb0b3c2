"""The sources of settings.

A setting may come from five sources. For each setting the first source that has it wins: code, the
environment, `.env`, the secrets directory (one file for each setting), and `DATABASE_URL` for the
writer's URL. Errors name a setting by its environment variable, whatever its source.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, DotEnvSettingsSource

from app_db._wording import did_you_mean
from app_db.errors import Problem, SettingsError, UnknownVariable
from app_db.settings._urls import MASK, URL_PARTS, is_object, is_secret, shown

PREFIX = "APP_DB_"
DELIMITER = "__"

Finding = tuple[type[SettingsError], Problem]
"""A problem, and the class of the error to raise if all problems are of that class."""

_Path = tuple[str, ...]
"""The keys that lead to a setting: connections, writer, url."""

Paths: TypeAlias = Path | str | Sequence[Path | str] | None
"""Files or directories: one, several or none."""


def variable_for(path: Iterable[object]) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + DELIMITER.join(str(key) for key in path).upper()


@dataclass(frozen=True)
class Origin:
    """Where a setting came from. `source` is `given in code`, `environment`, `.env`, `secrets` or `DATABASE_URL`."""

    variable: str
    source: str
    shown_value: str


class Group(BaseModel):
    """Settings that belong together. Each setting of a group may come from another source."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True)

    def __repr_args__(self) -> Iterator[tuple[str, object]]:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value != field.get_default(call_default_factory=True):
                yield name, shown(name, value)


class _Given(NamedTuple):
    value: object
    source: str


class Reading:
    """The values that the sources give for the settings of `model`, and the problems with them.

    Read the sources in ascending order of precedence: the last one wins.
    """

    def __init__(self, model: type[BaseSettings]) -> None:
        self.model = model
        self.problems: list[Finding] = []
        self._given: dict[_Path, _Given] = {}
        self._refused: set[_Path] = set()
        self._database_url: str | None = None

    # ---- the sources ----

    def read_secrets(self, directories: Paths) -> None:
        """Read the files whose names are those of variables, in upper or lower case. Other files are ignored."""
        for directory in [directories] if isinstance(directories, (str, os.PathLike)) else directories or ():
            folder = Path(directory).expanduser()
            if not folder.is_dir():
                warnings.warn(f"the secrets directory {str(folder)!r} does not exist", stacklevel=3)
                continue
            files = [file for file in folder.iterdir() if file.is_file() and file.name.upper().startswith(PREFIX)]
            # Bytes that are not UTF-8 become text that pydantic refuses: a problem of this
            # variable, not an error here.
            texts = {file.name: file.read_text("utf-8", "surrogateescape").rstrip("\r\n") for file in files}
            self.read_variables(texts, "secrets")

    def read_env_file(self, env_file: Paths, encoding: str | None) -> None:
        """Read files of variables, as pydantic-settings reads its `env_file`."""
        try:
            variables = DotEnvSettingsSource(self.model, env_file, encoding).env_vars
        except (OSError, UnicodeError):
            self.problems.append((SettingsError, Problem(str(env_file), "can't be read as a file of variables.")))
        else:
            self.read_variables(variables, ".env")

    def read_variables(self, variables: Mapping[str, str | None], source: str) -> None:
        """Read each variable that begins with PREFIX. If there is no such setting, that is a problem."""
        texts = {name.upper(): text for name, text in variables.items() if text is not None}
        self._database_url = texts.get("DATABASE_URL") or self._database_url
        # A JSON object comes first, then the variables that replace parts of it.
        for name in sorted(texts, key=lambda name: name.count(DELIMITER)):
            if name.startswith(PREFIX):
                self._read(name, texts[name], source)

    def take(self, path: _Path, value: object, source: str) -> None:
        """Store a value. It replaces an earlier value of the same setting, and no other setting of the same group."""
        for leaf, leaf_value in _leaves(path, value):
            related = [other for other in self._given if _overlap(leaf, other)]
            if leaf_value == {} and (related or not leaf):
                continue
            for other in related:
                del self._given[other]
            self._given[leaf] = _Given(leaf_value, source)

    def apply_database_url(self) -> None:
        """Use DATABASE_URL for the writer, if no other setting says which database the writer is."""
        fields = ("url", "mirror", *URL_PARTS)
        is_given = any(path[:2] == ("connections", "writer") and (len(path) == 2 or path[2] in fields) for path in self._given)
        if self._database_url and not is_given:
            self.take(("connections", "writer", "url"), self._database_url, "DATABASE_URL")

    # ---- the outcome ----

    def tree(self) -> dict[str, object]:
        """Return the values as arguments of `model`: groups are dicts in dicts."""
        root: dict[str, object] = {}
        for path, given in self._given.items():
            node = root
            for key in path[:-1]:
                node = cast("dict[str, object]", node.setdefault(key, {}))
            node[path[-1]] = given.value
        return root

    def reject(self, invalid: ValidationError) -> bool:
        """Note a problem for each value that pydantic refused, and remove the value, so that the rest can be checked.

        Return whether a value was removed.
        """
        before = len(self._given)
        for error in invalid.errors(include_url=False, include_input=False):
            path = tuple(str(key) for key in error["loc"] if key != "[key]")
            self._refused.add(path)
            if error["type"] == "extra_forbidden":
                self._unknown(variable_for(path))
            else:
                message = _PLAIN_WORDS.get(error["type"], "can't be used: it is of the wrong kind.")
                self.problems.append((SettingsError, Problem(self.name_of(path), message.format_map(error.get("ctx", {})))))
            for other in [other for other in self._given if _overlap(path, other)]:
                del self._given[other]
        return len(self._given) < before

    def has_refused(self, path: _Path) -> bool:
        """Return whether a setting was refused, or a part of it, or the group that it is in."""
        return any(_overlap(path, other) for other in self._refused)

    def name_of(self, path: _Path) -> str:
        """Return the variable that gave a setting, or that can give it."""
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
        """Return one error that lists all problems. Its class is that of the problems, if they all have the same."""
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
        value = _decoded(text) if kind is Any or _is_group(kind) else text
        if _is_group(kind) and not is_object(value):
            self._refused.add(path)
            self.problems.append((SettingsError, Problem(name, _PLAIN_WORDS["dict_type"])))
        else:
            self.take(path, value, source)

    def _unknown(self, name: str) -> None:
        connections = {"writer", "reader", *(key.lower() for key in name.split(DELIMITER)[1:2])}
        connections.update(path[1] for path in self._given if path[:1] == ("connections",) and len(path) > 1)
        hint = did_you_mean(name, _known_variables(self.model, (), connections))
        self.problems.append((UnknownVariable, Problem(name, f"is set, but app_db has no such setting.{hint}")))


# ---- paths, and the types of their settings ---------------------------------------------------------------------------


def _overlap(one: _Path, other: _Path) -> bool:
    return one[: len(other)] == other[: len(one)]


def _leaves(path: _Path, value: object) -> Iterator[tuple[_Path, object]]:
    if isinstance(value, Group):
        fields = type(value).model_fields
        value = {str(fields[name].validation_alias or name): getattr(value, name) for name in value.model_fields_set}
    if not is_object(value) or not value:
        yield path, value
        return
    for key, item in value.items():
        yield from _leaves((*path, "class" if key == "class_" else key), item)


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_model(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_group(kind: object) -> bool:
    return _is_model(kind) or get_origin(kind) is dict


def _fields(model: type[BaseModel]) -> dict[str, object]:
    return {str(field.validation_alias or name): field.annotation for name, field in model.model_fields.items()}


def _type_at(kind: object, path: _Path) -> object:
    """Return the type of the setting that a path leads to from a type, or None if there is no such setting."""
    for key in path:
        if _is_model(kind):
            kind = _fields(kind).get(key)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif kind is not Any:
            return None
    return kind


def _known_variables(kind: object, path: _Path, connections: Iterable[str]) -> Iterator[str]:
    """Yield the variables of all settings below a path. Connections have the names in `connections`."""
    if _is_model(kind):
        for key, inner in _fields(kind).items():
            yield from _known_variables(inner, (*path, key), connections)
    elif get_origin(kind) is dict and _is_model(get_args(kind)[1]):
        for name in connections:
            yield from _known_variables(get_args(kind)[1], (*path, name), connections)
    else:
        yield variable_for(path)


# ---- pydantic's errors in plain words ----------------------------------------------------------------------

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
