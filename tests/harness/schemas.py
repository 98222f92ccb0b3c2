"""The schemas of what commands print with --json."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
from referencing import Registry, Resource

from harness.paths import ROOT

SCHEMAS = ROOT / "app_db" / "cli" / "schemas"


def schemas() -> dict[str, Any]:
    """Return the schemas by verb."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(SCHEMAS.glob("*.json"))}


def validated(verb: str, printed: str) -> Any:
    """Return what a command has printed with --json, which is as the schema of the verb says."""
    known = schemas()
    registry: Registry[Any] = Registry().with_resources(
        (f"{name}.json", Resource.from_contents(content)) for name, content in known.items()
    )
    validator = jsonschema.Draft202012Validator(known[verb], registry=registry, format_checker=jsonschema.FormatChecker())
    data = json.loads(printed)
    validator.validate(data)
    return data
