"""The picture of `app-db graph --format svg`: the container at the left, its connections, and the databases at the right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from app_db.cli._graphs import Graph, notes_of

_LINE = 16
"""The height of a line of text."""
_LETTER = 7.3
"""The width of a letter, as wide as the widest of most fonts."""
_GAP = 18
_BETWEEN = 90
"""Room between columns, for lines."""

_STYLE = """\
text { font: 12px sans-serif; fill: #1f2328 } .name { font-weight: bold }
rect { stroke: #57606a; rx: 6 } .container { fill: #ddf4ff } .connection { fill: #fff } .database { fill: #dafbe1 }
.note { fill: #fff8c5 }
path { stroke: #57606a; fill: none } .link { stroke-dasharray: 4 3 } .how { font-size: 10px; fill: #57606a }"""


@dataclass
class _Box:
    """Lines of text in a frame."""

    kind: str
    lines: list[str]
    x: float = 0
    y: float = 0

    @property
    def width(self) -> float:
        return max(len(line) for line in self.lines) * _LETTER + 20

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 12

    @property
    def middle(self) -> float:
        return self.y + self.height / 2

    def drawn(self) -> Iterator[str]:
        yield f'<rect class="{self.kind}" x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}"/>'
        for number, line in enumerate(self.lines):
            name = "" if number else ' class="name"'
            yield f'<text{name} x="{self.x + 10:g}" y="{self.y + 18 + number * _LINE:g}">{escape(line)}</text>'


def picture_of(graph: Graph) -> str:
    """Return an SVG document. It needs nothing else: no font, no script, no style sheet."""
    container = _Box("container", [graph.container])
    databases = [_Box("database", [stored.kind or "no database", *filter(None, [stored.place])]) for stored in graph.databases]
    connections = [
        [_Box("connection", [each.name, *notes_of(graph, each)]) for each in stored.connections] for stored in graph.databases
    ]
    notes = []
    if graph.log and graph.log_holder is None:
        notes.append(_Box("database", ["decision log", graph.log]))
    if graph.overridden:
        notes.append(_Box("note", ["overridden", *graph.overridden]))
    width, height = _place(container, connections, databases, notes)
    shapes = [*_lines(graph, container, connections, databases)]
    for box in (container, *(box for group in connections for box in group), *databases, *notes):
        shapes += box.drawn()
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}">\n'
        f"<title>{escape(graph.container)}</title>\n<style>{_STYLE}</style>\n{body}\n</svg>"
    )


def _place(container: _Box, connections: list[list[_Box]], databases: list[_Box], notes: list[_Box]) -> tuple[float, float]:
    """Give each box its place, and return the width and height of the whole."""
    container.x = _GAP
    second = container.x + container.width + _BETWEEN
    third = second + max((box.width for group in connections for box in group), default=0) + _BETWEEN
    y: float = _GAP
    for group, database in zip(connections, databases, strict=True):
        top = y
        for box in group:
            box.x, box.y = second, y
            y += box.height + _GAP
        database.x = third
        database.y = max(top, (top + y - _GAP - database.height) / 2)
        y = max(y, database.y + database.height + _GAP)
    container.y = max(_GAP, (y - container.height) / 2)
    for box in notes:
        box.x, box.y = second, y
        y += box.height + _GAP
    boxes = [container, *(box for group in connections for box in group), *databases, *notes]
    return max(box.x + box.width for box in boxes) + _GAP, max(y, container.y + container.height + _GAP)


def _lines(graph: Graph, container: _Box, connections: list[list[_Box]], databases: list[_Box]) -> Iterator[str]:
    by_name = {box.lines[0]: box for group in connections for box in group}
    declared = {each.name for stored in graph.databases for each in stored.connections if each.declared}
    for group, database in zip(connections, databases, strict=True):
        for box in group:
            if box.lines[0] in declared:
                yield _curve(container.x + container.width, container.middle, box.x, box.middle)
            yield _curve(box.x + box.width, box.middle, database.x, database.middle)
    for name, how, other in graph.links():
        if name in by_name and other in by_name:
            yield from _link(by_name[name], by_name[other], how)


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = (x + to_x) / 2
    return f'<path d="M{x:g} {y:g} C{middle:g} {y:g} {middle:g} {to_y:g} {to_x:g} {to_y:g}"/>'


def _link(box: _Box, other: _Box, how: str) -> Iterator[str]:
    """Draw a dashed line at the right of two connections, with a word."""
    right = max(box.x + box.width, other.x + other.width) + 30
    start, end = box.x + box.width, other.x + other.width
    y, to_y = box.middle - 6, other.middle + 6
    yield f'<path class="link" d="M{start:g} {y:g} C{right:g} {y:g} {right:g} {to_y:g} {end:g} {to_y:g}"/>'
    yield f'<text class="how" x="{right - 8:g}" y="{(box.middle + other.middle) / 2:g}">{escape(how)}</text>'
