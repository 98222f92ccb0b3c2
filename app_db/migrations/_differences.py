"""Differences between models and a database, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

_VERBS = {"add": "is missing in the database", "remove": "is in the database, and in no model"}
_CHANGES = {"type": "type", "nullable": "nullability", "default": "server default", "comment": "comment"}


def described(differences: Iterable[Any]) -> tuple[str, ...]:
    """Return a line for each difference that Alembic has found."""
    return tuple(line for difference in differences for line in _lines(difference))


def _lines(difference: Any) -> Iterator[str]:
    if isinstance(difference, list):
        for inner in difference:
            yield from _lines(inner)
        return
    operation, *rest = difference
    verb, _, kind = operation.partition("_")
    if verb == "modify":
        _, table, column, *_, before, after = rest
        what = f"its {_CHANGES.get(kind, kind)} is {_shown(before)} in the database, {_shown(after)} in the model"
        yield f"column {table}.{column}: {what}"
    elif kind == "column":
        _, table, column = rest
        yield f"column {table}.{column.name} {_VERBS.get(verb, verb)}"
    elif kind == "table":
        yield f"table {rest[0].fullname} {_VERBS.get(verb, verb)}"
    else:
        element = rest[0]
        table = getattr(element, "table", None)
        where = "" if table is None else f" of {table.fullname}"
        named = getattr(element, "name", None) or "without a name"
        yield f"{ {'fk': 'foreign key'}.get(kind, kind) } {named}{where} {_VERBS.get(verb, verb)}"


def _shown(value: Any) -> str:
    return str(getattr(value, "arg", value))
