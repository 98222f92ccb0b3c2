"""How the program is started with which a database is used by hand: psql, mariadb, sqlite3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FILE = "{file}"
"""In an argument: stands for the path of the file with `private`."""


@dataclass(frozen=True)
class Shell:
    """What to start. No secret is among the arguments, which every user of the machine can read."""

    programs: Sequence[str]
    """The names of the program. The first one that is installed is used."""
    install: str
    """How to get it."""
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    private: str = field(default="", repr=False)
    """What is in a file that only its owner can read."""
