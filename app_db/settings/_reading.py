"""The values of settings, where each came from, and the problems with them.

Errors name a setting by its environment variable, whatever its source, or by its key in a mapping.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast, get_args, get_origin

from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from app_db._wording import did_you_mean
from app_db.errors import Problem, SettingsError, UnknownVariable
from app_db.settings._spelling import Spelling
from app_db.settings._urls import MASK, URL_PARTS, is_object, is_secret, shown

Finding = tuple[type[SettingsError], Problem]
"""A problem, and the class of the error to raise if all problems are of that class."""

Keys: TypeAlias = tuple[str, ...]
"""The keys that lead to a setting: connections, writer, url. The first is the name of a field."""

DATABASE_URL = "DATABASE_URL"
IN_CODE = "given in code"
NOT_SETTINGS = frozenset({"APP_DB_CONTAINER"})
"""Variables that begin as settings do, and are none: the command line reads them."""
_MOST_HINTS = 20


@dataclass(frozen=True)
class Origin:
    """Where a setting came from.

    `source` is `given in code`, `environment`, `DATABASE_URL`, `mapping`, the name of an env file,
    `secrets`, with the directory if there are several, or the class of another source and its file.
    """

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


class Given(NamedTuple):
    """A value, its source, and the variable or key that gave it. `note` is for errors, if the variable doesn't say enough."""

    value: object
    source: str
    variable: str
    note: str = ""


_Node: TypeAlias = "Given | dict[str, _Node]"


class Values:
    """Values of settings: a tree in which each group is a node, and each value a leaf."""

    def __init__(self) -> None:
        self._root: dict[str, _Node] = {}

    def put(self, path: Keys, value: object, spelling: Spelling, source: str, note: str = "") -> None:
        """Store a value. It replaces an earlier value of the same setting, and no other setting of the same group."""
        for leaf, leaf_value in leaves(path, value):
            if leaf:
                self.put_given(leaf, Given(leaf_value, source, spelling.variable(leaf), note))

    def put_given(self, path: Keys, given: Given) -> None:
        """Store one value as it is. An empty group takes nothing away."""
        if given.value == {} and (self.below(path) is not None or self.given(path) is not None):
            return
        node = self._root
        for key in path[:-1]:
            inner = node.get(key)
            if not isinstance(inner, dict):
                inner = node[key] = {}
            node = inner
        node[path[-1]] = given

    def update(self, others: Values) -> None:
        """Store all values of others."""
        for path, given in others.items():
            self.put_given(path, given)

    def items(self) -> Iterator[tuple[Keys, Given]]:
        """Yield each value with its path."""
        yield from _items((), self._root)

    def below(self, path: Keys) -> _Node | None:
        """Return what is at a path: a value, a group or None."""
        node: _Node | None = self._root
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def given(self, path: Keys) -> Given | None:
        """Return the value at a path, or of the group that it is in, or None."""
        node: _Node = self._root
        for key in path:
            inner = node.get(key) if isinstance(node, dict) else None
            if inner is None:
                break
            node = inner
        return node if isinstance(node, Given) else None

    def remove(self, path: Keys) -> bool:
        """Remove what is at a path, or the value of the group that it is in. Return whether there was something."""
        passed: list[tuple[dict[str, _Node], str]] = []
        node: _Node | None = self._root
        for key in path:
            if not isinstance(node, dict):
                break
            passed.append((node, key))
            node = node.get(key)
        if node is None or not passed:
            return False
        parent, key = passed.pop()
        del parent[key]
        while not parent and passed:
            parent, key = passed.pop()
            del parent[key]
        return True

    def plain(self) -> dict[str, object]:
        """Return the values as dicts in dicts."""
        return cast("dict[str, object]", _plain(self._root))


class Reading:
    """The values that the sources give for the settings of `model`, and the problems with them.

    Add the sources in ascending order of precedence: the last one wins.
    """

    def __init__(self, model: type[BaseSettings], spelling: Spelling) -> None:
        self.model = model
        self.spelling = spelling
        self.problems: list[Finding] = []
        self.values = Values()
        self.database_url: str | None = None
        self._aliases = {alias: name for name, field in model.model_fields.items() for alias in plain_aliases(field)}
        self._notes: dict[str, str] = {}
        self._refused: set[Keys] = set()
        self._holding_refused: set[Keys] = set()
        self._hints = _MOST_HINTS

    def field_of(self, key: str) -> str:
        """Return the name of the field that a key of the model means: the key itself, or the field that has this alias."""
        return self._aliases.get(key, key)

    def add(self, values: Values) -> None:
        """Take the values of a source. They replace those that are there."""
        self.values.update(values)
        self._notes.update({given.variable: given.note for _, given in values.items() if given.note})

    def apply_database_url(self) -> None:
        """Use DATABASE_URL for the writer, if no other setting says which database the writer is."""
        writer = self.values.below(("connections", "writer"))
        fields = ("url", "mirror", *URL_PARTS)
        is_given = any(field in writer for field in fields) if isinstance(writer, dict) else writer is not None
        if self.database_url and not is_given:
            given = Given(self.database_url, DATABASE_URL, DATABASE_URL)
            self.values.put_given(("connections", "writer", "url"), given)

    # ---- the outcome ----

    def tree(self) -> dict[str, object]:
        """Return the values as arguments of `model`: groups are dicts in dicts."""
        keys = {name: alias for alias, name in reversed(self._aliases.items())}
        return {keys.get(name, name): value for name, value in self.values.plain().items()}

    def reject(self, invalid: ValidationError) -> bool:
        """Note a problem for each value that pydantic refused, and remove the value, so that the rest can be checked.

        Return whether a value was removed.
        """
        removed = False
        for error in invalid.errors(include_url=False, include_input=False):
            keys = [str(key) for key in error["loc"] if key != "[key]"]
            path = (*map(self.field_of, keys[:1]), *keys[1:])
            if error["type"] == "missing" and self.has_refused(path):
                continue
            self.refuse(path)
            if error["type"] == "extra_forbidden":
                self.unknown(self.name_of(path), path)
            else:
                message = PLAIN_WORDS.get(error["type"], "can't be used: it is of the wrong kind.")
                self.problems.append((SettingsError, Problem(self.name_of(path), message.format_map(error.get("ctx", {})))))
            removed = self.values.remove(path) or removed
        return removed

    def refuse(self, path: Keys) -> None:
        """Remember that a setting was refused."""
        self._refused.add(path)
        self._holding_refused.update(path[:length] for length in range(len(path)))

    def has_refused(self, path: Keys) -> bool:
        """Return whether a setting was refused, or a part of it, or the group that it is in."""
        return path in self._holding_refused or any(path[:length] in self._refused for length in range(len(path) + 1))

    def name_of(self, path: Keys) -> str:
        """Return the variable that gave a setting, or that can give it."""
        if not path:  # a validator of the whole
            return self.model.__name__
        given = self.values.below(path)
        return given.variable if isinstance(given, Given) else self.spelling.variable(path)

    def unknown(self, name: str, path: Keys) -> None:
        """Note that a variable is set of which there is no such setting."""
        if name.upper() in NOT_SETTINGS:
            return
        hint = ""
        if self._hints:  # each takes long if there are many connections
            self._hints -= 1
            connections = {"writer", "reader", *path[1:2]}
            others = self.values.below(("connections",))
            connections.update(list(others if isinstance(others, dict) else ())[:_MOST_HINTS])
            known = map(self.spelling.variable, known_settings(self.model, (), connections))
            hint = did_you_mean(name, known)
        self.problems.append((UnknownVariable, Problem(name, f"is set, but app_db has no such setting.{hint}")))

    def origins(self) -> list[Origin]:
        """Return where each setting came from, sorted by variable, with secrets masked."""
        origins: list[Origin] = []
        for path, given in self.values.items():
            masked = MASK if any(is_secret(key) for key in path[2:]) else shown(path[-1], given.value)
            text = masked if isinstance(masked, str) else json.dumps(masked, default=str)
            variable = given.variable if given.source != DATABASE_URL else self.spelling.variable(path)
            origins.append(Origin(variable, given.source, text))
        return sorted(origins, key=lambda origin: origin.variable)

    def error(self) -> SettingsError:
        """Return one error that lists all problems. Its class is that of the problems, if they all have the same."""
        kinds = {kind for kind, _ in self.problems}
        kind = kinds.pop() if len(kinds) == 1 else SettingsError
        problems = {
            Problem(problem.variable, problem.message + self._notes.get(problem.variable, "")) for _, problem in self.problems
        }
        return kind(sorted(problems, key=lambda problem: (problem.variable, problem.message)))


# ---- paths, and the types of their settings ---------------------------------------------------------------------------


def leaves(path: Keys, value: object) -> Iterator[tuple[Keys, object]]:
    """Yield the values of the settings in a group, each with its path. Anything else is a value itself."""
    if isinstance(value, Group):
        fields = type(value).model_fields
        value = {str(fields[name].validation_alias or name): getattr(value, name) for name in value.model_fields_set}
    if not is_object(value) or not value:
        yield path, value
        return
    for key, item in value.items():
        yield from leaves((*path, "class" if key == "class_" else str(key)), item)


def _items(path: Keys, node: dict[str, _Node]) -> Iterator[tuple[Keys, Given]]:
    for key, inner in node.items():
        if isinstance(inner, Given):
            yield (*path, key), inner
        else:
            yield from _items((*path, key), inner)


def _plain(node: _Node) -> object:
    return node.value if isinstance(node, Given) else {key: _plain(inner) for key, inner in node.items()}


def plain_aliases(field: FieldInfo) -> list[str]:
    """Return the aliases of a field that are one key. Those that are paths are pydantic's own affair."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return [choice for choice in alias.choices if isinstance(choice, str)]
    return [alias] if isinstance(alias, str) else []


def has_path_alias(field: FieldInfo) -> bool:
    """Return whether an alias of a field is a path."""
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
    return any(isinstance(choice, AliasPath) for choice in choices)


def _is_model(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def is_group(kind: object) -> bool:
    """Return whether a setting of this type is a group of settings."""
    return _is_model(kind) or get_origin(kind) is dict


def _fields(model: type[BaseModel]) -> dict[str, object]:
    fields = model.model_fields.items()
    return {
        name if issubclass(model, BaseSettings) else str(field.validation_alias or name): field.annotation
        for name, field in fields
    }


def type_at(kind: object, path: Keys) -> object:
    """Return the type of the setting that a path leads to from a type, or None if there is no such setting."""
    for key in path:
        if _is_model(kind):
            kind = _fields(kind).get(key)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif kind is not Any:
            return None
    return kind


def known_settings(kind: object, path: Keys, connections: Iterable[str]) -> Iterator[Keys]:
    """Yield all settings below a path. Connections have the names in `connections`."""
    if _is_model(kind):
        for key, inner in _fields(kind).items():
            yield from known_settings(inner, (*path, key), connections)
    elif get_origin(kind) is dict and _is_model(get_args(kind)[1]):
        for name in connections:
            yield from known_settings(get_args(kind)[1], (*path, name), connections)
    else:
        yield path


# ---- pydantic's errors in plain words ----------------------------------------------------------------------

PLAIN_WORDS = {
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
    "missing": "is not set.",
    "string_too_short": "must have at least {min_length} characters.",
    "string_too_long": "must have at most {max_length} characters.",
    "string_pattern_mismatch": "must match {pattern}.",
    "enum": "must be {expected}.",
    "date_from_datetime_parsing": "must be a date.",
    "date_parsing": "must be a date.",
    "datetime_parsing": "must be a date and time.",
    "url_parsing": "must be a URL.",
    "less_than": "must be less than {lt}.",
}
