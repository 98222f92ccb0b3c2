"""What a finding is, and how it names the place where something is set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from app_db.settings import DatabaseSettings

Severity = Literal["error", "warning", "hint"]
"""An error keeps units of work from doing what they promise, a warning can do so later, and a hint is advice."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "hint")
"""The worst first."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or may go wrong. It contains no secret."""

    matter: str
    """The name of what was found, as in the table of `docs/how-to/check.md`."""
    severity: Severity
    connection: str | None
    what: str
    """What is wrong: a sentence. A list below it has a line for each item."""
    where: str
    """The variable, file or module that sets it."""
    remedy: str
    """What to do: a sentence."""


class Matter(NamedTuple):
    """A kind of finding."""

    name: str
    severity: Severity
    about: str
    """What is found, for the documentation."""

    def found(self, connection: str | None, what: str, where: str, remedy: str) -> Finding:
        return Finding(self.name, self.severity, connection, what, where, remedy)


def place_of(settings: DatabaseSettings, *path: str) -> str:
    """Return the variable of a setting, with the source of its value if it is set."""
    variable = settings.variable(*path)
    source = next((origin.source for origin in settings.origins() if origin.variable == variable), None)
    return variable if source is None else f"{variable} ({source})"


def place_of_database(settings: DatabaseSettings, name: str) -> str:
    """Return the variable that says which database a connection uses."""
    own = settings.connections.get(name)
    fields = ("mirror", "url", "host", "database", "driver")
    field = next((field for field in fields if own is not None and getattr(own, field) is not None), "url")
    return place_of(settings, "connections", name, field)
