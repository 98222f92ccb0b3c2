"""Reads variables: those of the environment, of files, and keys of a mapping, by pydantic-settings' rules for their names."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, cast

from pydantic import create_model
from pydantic_settings import BaseSettings, EnvSettingsSource

from app_db._compat.pydantic_settings import means_none
from app_db.errors import Problem, SettingsError
from app_db.settings._reading import (
    PLAIN_WORDS,
    Given,
    Keys,
    Reading,
    Values,
    has_path_alias,
    is_group,
    leaves,
    plain_aliases,
    type_at,
)
from app_db.settings._spelling import DELIMITER, Spelling
from app_db.settings._urls import is_object

_NOTHING = object()


class VariableReader:
    """Reads the variables of a source. What is wrong with one is a problem of `reading`.

    `own` has the names of the fields that are read here. The fields of a subclass are read as
    pydantic-settings reads them.
    """

    def __init__(self, reading: Reading, own: Iterable[str]) -> None:
        self.reading = reading
        fields = reading.model.model_fields
        self.own = [name for name in own if not has_path_alias(fields[name])]
        self.others = [name for name in fields if name not in self.own]

    def spelling(self, source: EnvSettingsSource) -> Spelling:
        """Return how a source names the settings."""
        roots = {name: roots[0] for name, roots in self.roots(source).items()}
        return Spelling(source.env_prefix, source.env_nested_delimiter or DELIMITER, not source.case_sensitive, roots)

    def roots(self, source: EnvSettingsSource) -> dict[str, list[str]]:
        """Return the variables of each field. Those of its parts begin with them."""
        targets = getattr(source, "env_prefix_target", "variable")
        to_aliases = source.env_prefix if targets in ("alias", "all") else ""
        to_names = source.env_prefix if targets in ("variable", "all") else ""
        by_name = bool(source.config.get("populate_by_name") or source.config.get("validate_by_name"))
        roots: dict[str, list[str]] = {}
        for name, field in self.reading.model.model_fields.items():
            aliases = [to_aliases + alias for alias in plain_aliases(field)]
            roots[name] = aliases + ([to_names + name] if by_name or not aliases else [])
        return roots

    def read(self, source: EnvSettingsSource, label: str, spelling: Spelling | None = None) -> Values:
        """Read each variable of the fields. If one begins with the prefix and there is no such setting, that is a problem."""
        texts = {name: text for name, text in source.env_vars.items() if text is not None}
        url = next((text for name, text in texts.items() if name.upper() == "DATABASE_URL"), None)
        self.reading.database_url = self.reading.database_url or url
        spelling = spelling or self.spelling(source)
        named = _Named(source, self.roots(source))
        layer = self._of_other_fields(source, label, spelling)
        # A JSON object comes first, then the variables that replace parts of it.
        paths = [(named.path(name), name) for name in texts]
        for path, name in sorted(paths, key=lambda found: len(found[0])):
            shown = name.upper() if spelling.upper else name
            if not path:
                continue
            if path[0] in self.own:
                value = self._value(path, shown, texts[name])
                if value is not _NOTHING:
                    layer.put(path, value, spelling, label)
            elif path[0] not in self.others:
                self.reading.unknown(shown, path)
        return layer

    def has(self, path: Keys) -> bool:
        """Return whether there is such a setting."""
        return type_at(self.reading.model, path) is not None

    def put(self, values: Values, path: Keys, given: Given) -> None:
        """Store what one variable gives, by the name that it has there."""
        value = self._value(path, given.variable, given.value)
        for leaf, item in leaves(path, value):
            if value is not _NOTHING:
                variable = ".".join([given.variable, *leaf[len(path) :]])
                values.put_given(leaf, Given(item, given.source, variable))

    def _value(self, path: Keys, name: str, text: object) -> object:
        """Return the value that a variable gives for a setting, or _NOTHING, if that is a problem."""
        kind = type_at(self.reading.model, path)
        if kind is None:
            self.reading.unknown(name, path)
            return _NOTHING
        value = _decoded(text) if kind is Any or is_group(kind) else text
        if is_group(kind) and not is_object(value):
            self.reading.refuse(path)
            self.reading.problems.append((SettingsError, Problem(name, PLAIN_WORDS["dict_type"])))
            return _NOTHING
        return None if means_none(value) else value

    def _of_other_fields(self, source: EnvSettingsSource, label: str, spelling: Spelling) -> Values:
        """Return the values of the fields that a subclass has, as pydantic-settings reads them."""
        layer = Values()
        for name in self.others:
            alone = copy.copy(source)
            alone.settings_cls = _alone(self.reading.model, name)
            found, failure = tried(lambda alone=alone: EnvSettingsSource.__call__(alone))  # type: ignore[misc]
            if failure is None:
                for key, value in cast("dict[str, object]", found).items():
                    layer.put((self.reading.field_of(key),), value, spelling, label)
            else:
                self.reading.refuse((name,))
                self.reading.problems.append(
                    (SettingsError, Problem(spelling.variable((name,)), "must be JSON of the right kind."))
                )
        return layer


class _Named:
    """The paths of variables, by the rules of a source."""

    def __init__(self, source: EnvSettingsSource, roots: Mapping[str, list[str]]) -> None:
        self._source = source
        self._delimiter = source.env_nested_delimiter
        self._prefix = self._cased(source.env_prefix)
        self._roots = {self._cased(root): name for name, each in roots.items() for root in each}

    def _cased(self, text: str) -> str:
        return text if self._source.case_sensitive else text.lower()

    def path(self, name: str) -> Keys:
        """Return the path of the setting that a variable means. It is empty if the variable is somebody else's."""
        name = self._cased(name)
        if name in self._roots:
            return (self._roots[name],)
        split = getattr(self._source, "maxsplit", -1)
        if self._delimiter:
            for root, field in self._roots.items():
                if name.startswith(root + self._delimiter):
                    return (field, *name[len(root + self._delimiter) :].split(self._delimiter, split))
        if self._prefix and name.startswith(self._prefix):
            keys = name[len(self._prefix) :].split(self._delimiter) if self._delimiter else [name[len(self._prefix) :]]
            return (f"?{keys[0]}", *keys[1:])  # no field has such a name
        return ()


@cache
def _alone(model: type[BaseSettings], name: str) -> type[BaseSettings]:
    """Return a model that has one field of another."""
    field = model.model_fields[name]
    fields: dict[str, Any] = {name: (field.annotation, field)}
    return create_model(model.__name__, __base__=BaseSettings, **fields)


def with_texts(source: EnvSettingsSource, texts: Mapping[str, object]) -> EnvSettingsSource:
    """Return a copy of a source with these variables in place of those of the environment."""
    made = copy.copy(source)
    made.env_vars = cast(
        "Mapping[str, str | None]", texts if made.case_sensitive else {name.lower(): text for name, text in texts.items()}
    )
    return made


def _decoded(text: object) -> object:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def tried(call: Callable[[], object]) -> tuple[object, Exception | None]:
    # Returned, not raised: an error raised while this one is handled would carry it, and the values
    # in it, as its context.
    try:
        return call(), None
    except Exception as failure:  # noqa: BLE001 - a source may be anybody's
        return None, failure
