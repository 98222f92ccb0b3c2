"""How verbs print: plain text, tables and colour in a terminal by rich (the extra `cli`), or JSON."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Literal, NamedTuple, TextIO

from app_db._compat.clocks import monotonic

if TYPE_CHECKING:
    from rich.console import Console

Style = Literal["", "good", "warning", "bad", "dim", "bold"]

_COLOURS = {"good": "green", "warning": "yellow", "bad": "red", "dim": "dim", "bold": "bold", "": ""}

_UNTIL_PROGRESS = 1.0
"""Seconds after which progress is shown: what is done sooner needs none."""


class Styled(NamedTuple):
    """A cell of a table in a colour, where there are colours."""

    text: str
    style: Style


Cell = str | Styled
Step = Callable[..., None]
"""Notes progress: `step(done, total)`. Both are numbers of the same things."""


class Printer:
    """Prints what a verb has to say. `line` and `table` are for readers, `data` is for programs: the other prints nothing."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    def line(self, text: str = "", style: Style = "") -> None:
        """Print a line of text. It is not wrapped, so that programs can read it, too."""
        if self.as_json:
            return
        with while_read():
            if style and (console := _console(sys.stdout)):
                console.print(text, style=_COLOURS[style], markup=False, highlight=False, soft_wrap=True)
            else:
                print(text)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Print a table. A cell may have several lines. A terminal that is too narrow for the headings has blocks."""
        if self.as_json:
            return
        listed = [list(row) for row in rows]
        with while_read():
            if console := _console(sys.stdout):
                if len("  ".join(columns)) > console.width:
                    for each in _records(columns, listed):
                        console.print(each)
                else:
                    console.print(_rich_table(columns, listed))
            else:
                for line in plain_table(columns, listed):
                    print(line)

    def data(self, data: object) -> None:
        """Print what there is to say as JSON, by the schema of the verb."""
        if self.as_json:
            with while_read():
                print(_json(data))

    def error(self, text: str) -> None:
        """Print to stderr why the command could not run."""
        if self.as_json:
            print(_json({"error": text}), file=sys.stderr)
        elif console := _console(sys.stderr):
            console.print(text, style=_COLOURS["bad"], markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr)

    @contextmanager
    def progress(self, doing: str) -> Generator[Step]:
        """Show on the terminal what is being done, once that takes longer than a second.

        The block is given a function: `step(done, total)` says how far it is. Without rich, a line says what is being done.
        """
        if not sys.stderr.isatty() or self.as_json:
            yield lambda *_: None
        elif console := _console(sys.stderr):
            with _bar(console, doing) as step:
                yield step
        else:
            timer = Timer(_UNTIL_PROGRESS, lambda: print(f"{doing} …", file=sys.stderr))
            timer.daemon = True
            timer.start()
            try:
                yield lambda *_: None
            finally:
                timer.cancel()


@contextmanager
def while_read() -> Generator[None]:
    """Print nothing more once the reader of a pipe has ended, as `head` does: what the verb did is done, and so is its code."""
    try:
        yield
    except OSError as error:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the process ends, which would write again
        if not isinstance(error, BrokenPipeError):
            raise


def flush() -> None:
    """Write out what is printed, so that what can't be written is an error now, and not when the process ends."""
    with while_read():
        sys.stdout.flush()


def _json(data: object) -> str:
    return json.dumps(data, indent=2, ensure_ascii=not _is_unicode(sys.stdout))


def make_printable() -> None:
    """Replace characters that the encoding of stdout and stderr lacks by similar ones, and streams that are closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  # until the process ends
        elif mode == "w" and isinstance(stream, TextIOWrapper) and not _is_unicode(stream):
            codecs.register_error("app_db_similar", _similar)
            stream.reconfigure(errors="app_db_similar")


_SIMILAR = {"─": "-", "│": "|", "├": "|", "└": "`", "→": "->", "…": "..."}
"""What stands for a character that an encoding lacks. The others become question marks."""


def _similar(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SIMILAR.get(each, "?") for each in error.object[error.start : error.end]), error.end


def _is_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "utf-8").lower().replace("-", "").startswith("utf")


# ---- plain text -----------------------------------------------------------------------------------------------------------


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Iterable[str]:
    """Yield the lines of a table whose columns are as wide as what is in them."""
    cells = [[[column] for column in columns], *([_text(cell).splitlines() or [""] for cell in row] for row in rows)]
    widths = [max(len(line) for row in cells for line in row[number]) for number in range(len(columns))]
    for row in cells:
        for number in range(max(len(lines) for lines in row)):
            parts = [lines[number] if number < len(lines) else "" for lines in row]
            yield "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Styled) else cell


# ---- rich -----------------------------------------------------------------------------------------------------------------


def _console(stream: TextIO) -> Console | None:
    """Return rich's console for a terminal; None if `stream` is none, or rich is not installed."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb" or find_spec("rich") is None:
        return None
    from rich.console import Console

    return Console(file=stream, no_color=bool(os.environ.get("NO_COLOR")) or None)


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> object:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell.text, _COLOURS[cell.style]) if isinstance(cell, Styled) else Text(cell) for cell in row))
    return table


def _records(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Iterable[object]:
    """Yield a block for each row, with a line for each cell that is not empty, and a blank line between blocks."""
    from rich.table import Table
    from rich.text import Text

    for row in rows:
        block = Table.grid(padding=(0, 2, 0, 0))
        block.add_column(no_wrap=True)
        block.add_column(overflow="fold")
        for column, cell in zip(columns, row, strict=True):
            if text := _text(cell):
                block.add_row(Text(column, "bold"), Text(text, _COLOURS[cell.style] if isinstance(cell, Styled) else ""))
        yield block
        if row is not rows[-1]:
            yield ""


@contextmanager
def _bar(console: Console, doing: str) -> Generator[Step]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(doing, total=None)
    began = monotonic()
    timer = Timer(_UNTIL_PROGRESS, bar.start)
    timer.daemon = True
    timer.start()

    def step(done: float, total: float, what: str = doing) -> None:
        bar.update(task, completed=done, total=total, description=what)

    try:
        yield step
    finally:
        timer.cancel()
        if monotonic() - began >= _UNTIL_PROGRESS:
            timer.join()  # or it could start after the end
        bar.stop()
