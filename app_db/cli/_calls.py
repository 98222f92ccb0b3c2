"""A call of the command line, and the form in which each verb's file adds its verbs.

    def add_to(commands: Commands) -> None:
        greet = commands.add("greet", _greet)
        greet.add_argument("--loudly", action="store_true")

    def _greet(call: Call) -> int:
        \"\"\"Greet each connection.\"\"\"
        for name in call.names():
            call.out.line(f"Hello {name}")
        call.out.data({"greeted": call.names()})
        return FINE

The verb and its line in `--help` stand in `_commands.VERBS`, and the schema of its JSON in `schemas/greet.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from app_db._wording import did_you_mean

if TYPE_CHECKING:
    from app_db.cli._printing import Printer
    from app_db.container import DatabaseContainer

FINE, WRONG, COULD_NOT_RUN = 0, 1, 2
"""The exit codes, as EXIT_CODES says."""

EXIT_CODES = """\
exit codes:
  0  success, nothing is pending
  1  something is pending or wrong; the output says what and why
  2  the command could not run, or a migration failed
"""


class CannotRun(Exception):
    """The command can't run. The text is one line, without secrets: what is wrong, where that was said, and what to do."""


class Call:
    """One call of the command line: what a verb is given."""

    def __init__(self, options: argparse.Namespace, out: Printer, program: str, find: Callable[[], DatabaseContainer]) -> None:
        self.options = options
        self.out = out
        self.program = program
        """How the command line was started: `app-db`, `python -m app_db` or `flask app-db`."""
        self._find = find

    @cached_property
    def container(self) -> DatabaseContainer:
        """The application's container. Raises CannotRun or an AppDbError if there is none."""
        return self._find()

    def names(self, given: Sequence[str] = ()) -> list[str]:
        """Return the names of the connections that were given; of all in the container and the settings, if none was.

        Raises CannotRun for a name that no connection has, or one that has no settings.
        """
        known = names_in(self.container)
        for name in given:
            if name not in known and name in self.without_settings():
                raise CannotRun(f"The container has the connection {name!r}, and it has no settings. Set {self.url_of(name)}.")
            if name not in known:
                raise CannotRun(f"There is no connection {name!r}.{did_you_mean(name, known)} {listed('There are', known)}")
        return list(dict.fromkeys(given)) or known

    def without_settings(self) -> list[str]:
        """Return the names of the container's connections that have no settings."""
        from app_db.container import Connection

        declared = [name for name, provider in self.container.providers.items() if isinstance(provider, Connection)]
        return sorted({*declared} - {*names_in(self.container)})

    def url_of(self, name: str) -> str:
        """Return the variable that has the URL of a connection."""
        return self.container.settings().variable("connections", name, "url")

    def close(self) -> None:
        """Close the container's connections, if it was asked for."""
        if "container" in self.__dict__:
            self.container.shutdown_resources()


def names_in(container: DatabaseContainer) -> list[str]:
    """Return the names of the connections of a container that are configured, and of those that only the settings have."""
    from app_db.container import Connection
    from app_db.errors import ConnectionNotConfigured

    settings = container.settings()
    names = [name for name, provider in container.providers.items() if isinstance(provider, Connection)]
    found = []
    for name in sorted({*names, *settings.connections}):
        try:
            settings.connection(name)
        except ConnectionNotConfigured:
            continue
        found.append(name)
    return found


def listed(head: str, names: Iterable[str]) -> str:
    """Return `There are: 'reader', 'writer'.`"""
    return f"{head}: {', '.join(map(repr, names)) or 'none'}."


def seconds(text: str) -> float:
    """Return the value of an option that takes seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds. Give 0 or more")
    return value


Verb = Callable[[Call], int]
"""Does what a verb says, and returns the exit code."""


class Commands(Protocol):
    """Where a verb's file adds its verbs."""

    def add(self, name: str, verb: Verb) -> argparse.ArgumentParser:
        """Return the parser of a verb. Its description is the docstring of `verb`."""
        ...
