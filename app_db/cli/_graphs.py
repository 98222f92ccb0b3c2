"""What `app-db graph` draws: databases, the connections to them, and what depends on what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from app_db.cli._connections import (
    Configured,
    configured,
    decision_log,
    holder_of_decisions,
    name_of,
    overridden_elsewhere,
)
from app_db.container import DatabaseContainer


@dataclass(frozen=True)
class Stored:
    """A database, and the connections to it."""

    kind: str
    place: str
    connections: list[Configured] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it is, in a line."""
        return f"{self.kind} {self.place}".rstrip() if self.kind else "no database"


@dataclass(frozen=True)
class Graph:
    """What there is to draw."""

    container: str
    databases: list[Stored]
    log: str | None
    """Where decisions are written, in words."""
    log_holder: str | None
    """The connection in whose database they are."""
    overridden: list[str]

    def links(self) -> Iterator[tuple[str, str, str]]:
        """Yield each connection that depends on another one, how, and that one."""
        for each in (each for stored in self.databases for each in stored.connections):
            for how, other in (("mirror of", each.mirror), ("replica of", each.replica_of), ("transaction of", each.shares_with)):
                if other and not (how == "replica of" and other == each.mirror):
                    yield each.name, how, other


def graph_of(container: DatabaseContainer) -> Graph:
    """Return what there is to draw of a container."""
    databases: dict[object, Stored] = {}
    found = configured(container)
    for each in sorted(found, key=lambda each: (each.mirror is not None, each.name)):
        databases.setdefault(each.identity, Stored(each.database, each.place)).connections.append(each)
    overridden = [f"{each.name}_{kind}" for each in found for kind in each.overridden]
    return Graph(
        name_of(container),
        [*databases.values()],
        decision_log(container),
        holder_of_decisions(container, [each.name for each in found]),
        sorted([*overridden, *overridden_elsewhere(container)]),
    )


def notes_of(graph: Graph, each: Configured) -> list[str]:
    """Return what a drawing says of a connection."""
    notes = [*each.use, *(["decision log"] if each.name == graph.log_holder else [])]
    return [*notes, f"overridden: {', '.join(each.overridden)}"] if each.overridden else notes
