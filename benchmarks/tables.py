"""Tables in Markdown, printed line by line as they are measured."""

from __future__ import annotations

from collections.abc import Iterable

from measuring import Measured


def heading(title: str, *columns: str) -> None:
    """Print a table's title and the names of its columns."""
    print(f"\n### {title}\n", flush=True)
    line(columns)
    line("---" for _ in columns)


def line(cells: Iterable[str]) -> None:
    """Print one line of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    return f"{seconds * 1e6:,.0f} µs" if seconds < 0.01 else f"{seconds * 1e3:,.1f} ms"


def limited(measured: Measured, at_most: float) -> str:
    """Return a ratio beside the limit that it should keep, marked where it does not."""
    return f"{measured} of at most {at_most:.2f}{' **!**' if measured.ratio > at_most else ''}"
