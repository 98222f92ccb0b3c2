"""`app-db graph`: the container as it is configured, as text, as mermaid or as a picture. It connects to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from app_db.cli._calls import FINE, Call, Commands

if TYPE_CHECKING:
    from app_db.cli._graphs import Graph


def add_to(commands: Commands) -> None:
    """Add `graph`."""
    graph = commands.add("graph", _graph)
    graph.add_argument("--format", choices=["text", "mermaid", "svg"], default="text", help="how to draw it (default: text)")


def _graph(call: Call) -> int:
    """Draw the container as it is configured: connections, databases, replicas, mirrors, the decision log, and the providers
    that are overridden. Nothing is connected to.
    """
    from app_db.cli._graphs import graph_of
    from app_db.cli._pictures import picture_of

    graph = graph_of(call.container)
    if call.options.format == "svg":
        call.out.line(picture_of(graph))
    else:
        for line in {"text": _text, "mermaid": _mermaid}[call.options.format](graph):
            call.out.line(line)
    call.out.data(_data(graph))
    return FINE


# ---- text -----------------------------------------------------------------------------------------------------------------


def _text(graph: Graph) -> Iterator[str]:
    from app_db.cli._graphs import notes_of

    yield graph.container
    branches = [(stored.text, stored.connections) for stored in graph.databases]
    if graph.log and graph.log_holder is None:
        branches.append((f"decision log: {graph.log}", []))
    overridden = [name for name in graph.overridden if not _is_of_connection(graph, name)]
    if overridden:
        branches.append((f"overridden: {', '.join(overridden)}", []))
    for number, (text, connections) in enumerate(branches):
        last = number == len(branches) - 1
        yield f"{'└─' if last else '├─'} {text}"
        width = max((len(each.name) for each in connections), default=0)
        for inner, each in enumerate(connections):
            corner = "└─" if inner == len(connections) - 1 else "├─"
            yield f"{' ' if last else '│'}  {corner} {each.name:{width}}  {', '.join(notes_of(graph, each))}".rstrip()


def _is_of_connection(graph: Graph, name: str) -> bool:
    """Return whether an overridden provider is named beside its connection."""
    return any(
        name == f"{each.name}_{kind}" for stored in graph.databases for each in stored.connections for kind in each.overridden
    )


# ---- mermaid --------------------------------------------------------------------------------------------------------------


def _mermaid(graph: Graph) -> Iterator[str]:
    from app_db.cli._graphs import notes_of

    yield "flowchart LR"
    yield f"  container([{_quoted(graph.container)}])"
    for number, stored in enumerate(graph.databases):
        yield f"  database{number}[({_quoted(stored.kind or 'no database', stored.place)})]"
        for each in stored.connections:
            yield f"  c_{each.name}[{_quoted(each.name, *notes_of(graph, each))}]"
            yield f"  {'container --> ' if each.declared else ''}c_{each.name} --> database{number}"
    for name, how, other in graph.links():
        yield f"  c_{name} -. {how} .-> c_{other}"
    if graph.log and graph.log_holder is None:
        yield f"  log[({_quoted('decision log', graph.log)})]"
        yield "  container --> log"
    if graph.overridden:
        yield f"  overridden>{_quoted('overridden', *graph.overridden)}]"
        yield "  overridden -.-> container"


def _quoted(*lines: str) -> str:
    """Return a label. Mermaid reads entities with a # in place of the &."""
    escaped = (line.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;") for line in lines)
    return f'"{"<br/>".join(filter(None, escaped))}"'


# ---- data -----------------------------------------------------------------------------------------------------------------


def _data(graph: Graph) -> dict[str, Any]:
    from app_db.cli._graphs import notes_of

    return {
        "container": graph.container,
        "databases": [
            {
                "kind": stored.kind or None,
                "place": stored.place or None,
                "connections": [
                    {"name": each.name, "notes": notes_of(graph, each), "overridden": each.overridden}
                    for each in stored.connections
                ],
            }
            for stored in graph.databases
        ],
        "links": [{"from": name, "how": how, "to": other} for name, how, other in graph.links()],
        "decision_log": graph.log,
        "overridden": graph.overridden,
    }
