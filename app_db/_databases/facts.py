"""What a database tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["primary", "replica"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server tells about itself and a connection to it. None stands for what it does not tell."""

    version: str | None = None
    role: Role | None = None
    lag: float | None = None
    """Seconds by which a replica is behind."""
    galera: str | None = None
    """The state of a node of a Galera cluster."""
    pooler: bool | None = None
    """Whether a pooler stands before the server."""
    tls: str | None = None
    """The version of TLS; empty without TLS."""
    problem: str = ""
    """Why the database is not of full use although it answers."""
