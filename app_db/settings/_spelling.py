"""How the settings are named where they are given: as environment variables, or as keys of a mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PREFIX = "APP_DB_"
DELIMITER = "__"


@dataclass(frozen=True)
class Spelling:
    """The names of the settings in one place.

    `roots` has the names of the fields that have an alias. `places` has the prefix of each
    connection whose settings have keys of their own, `sqlalchemy_reader.` for example.
    """

    prefix: str = PREFIX
    delimiter: str = DELIMITER
    upper: bool = True
    roots: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def variable(self, path: Iterable[object]) -> str:
        """Return the name of a setting: of the environment variable, or of the key."""
        root, *keys = (str(key) for key in path)
        if root == "connections" and keys and keys[0] in self.places:
            return (self.places[keys[0]] + ".".join(keys[1:])).rstrip(".")
        name = self.delimiter.join([self.roots.get(root, self.prefix + root), *keys])
        return name.upper() if self.upper else name
