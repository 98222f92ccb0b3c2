"""Without rich, a terminal shows plain text. With it, a progress bar appears only after a while."""

from __future__ import annotations

import io
import re
import sys
import threading
from pathlib import Path

import pytest

from app_db.cli import _printing, main
from app_db.cli._printing import Cell, Printer, Styled
from harness.migrated import Project
from harness.requiring import need


class Screen(io.StringIO):
    """A terminal that notes when something is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        count = super().write(text)
        if "Settling" in text:
            self.written.set()
        return count


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_printing, "find_spec", lambda name: None)


def new_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Return the terminal to which this process writes. Not a fixture: pytest's own capturing begins after those."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    return screen


ROWS: list[list[Cell]] = [["writer", Styled("down", "bad")], ["a", "two\nlines"]]
PLAIN = ["name    state", "writer  down", "a       two", "        lines"]


def test_a_terminal_that_the_headings_of_a_table_do_not_fit_has_a_block_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    need("rich")
    screen = new_screen(monkeypatch)
    monkeypatch.setenv("COLUMNS", "24")
    rows: list[list[Cell]] = [["warehouse", Styled("down", "bad"), ""], ["writer", "up", "a text that is folded"]]
    Printer().table(["connection", "status", "milliseconds"], rows)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert [line.rstrip() for line in shown.splitlines()] == [
        *("connection  warehouse", "status      down", ""),
        *("connection    writer", "status        up", "milliseconds  a text", "              that is", "              folded"),
    ]


def test_without_rich_a_terminal_has_plain_text(monkeypatch: pytest.MonkeyPatch, without_rich: None) -> None:
    screen = new_screen(monkeypatch)
    Printer().table(["name", "state"], ROWS)
    Printer().line("[bold]no markup", "bad")
    Printer().error("wrong")
    assert screen.getvalue().splitlines() == [*PLAIN, "[bold]no markup", "wrong"]


def test_with_rich_it_has_colours_and_takes_no_text_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = new_screen(monkeypatch)
    need("rich")
    Printer().table(["[i]name", "state"], ROWS)
    Printer().line("[bold]no markup", "bad")
    shown = screen.getvalue()
    assert "\x1b[31mdown" in shown
    assert "[i]name" in shown
    assert "[bold]no markup" in shown


@pytest.mark.parametrize("rich", [True, False])
def test_progress_is_shown_in_a_terminal_once_it_takes_long(
    rich: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    screen = new_screen(monkeypatch)
    if rich:
        need("rich")
    else:
        request.getfixturevalue("without_rich")
    with Printer().progress("Settling") as step:
        step(1, 2)
    assert screen.getvalue() == ""
    monkeypatch.setattr(_printing, "_UNTIL_PROGRESS", 0.0)
    with Printer().progress("Settling") as step:
        step(1, 2)
        assert screen.written.wait(10)


@pytest.mark.parametrize(
    "command",
    [
        *("ping", "pool", "check", "recover", "in-doubt", "revision -m x --empty", "migrate"),
        *("migrate --check", "current", "history", "downgrade base", "stamp"),
    ],
)
def test_each_verb_that_asks_databases_shows_progress(
    command: str, monkeypatch: pytest.MonkeyPatch, sqlite_url: str, tmp_path: Path
) -> None:
    need("rich")
    Project(tmp_path, writer=sqlite_url).write_three("writer")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", sqlite_url)
    if command.startswith("revision"):
        assert main(["migrate"]) == 0
    screen = new_screen(monkeypatch)
    monkeypatch.setattr(_printing, "_UNTIL_PROGRESS", 0.0)
    assert main(command.split()) in (0, 1), screen.getvalue()
    assert "━" in screen.getvalue()


def test_letters_that_an_encoding_lacks_are_replaced_and_escaped_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite:///\u0416.db")
    for command, shown in ((["graph"], "`- sqlite ?.db"), (["graph", "--json"], r"\u0416.db")):
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "latin-1"))
        assert main(command) == 0
        assert shown in output.getvalue().decode("latin-1")


def test_with_json_nothing_but_data_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = new_screen(monkeypatch)
    monkeypatch.setattr(_printing, "_UNTIL_PROGRESS", 0.0)
    printer = Printer(as_json=True)
    with printer.progress("Settling"):
        printer.line("text")
        printer.table(["name"], [["a"]])
        printer.data({"name": "ä"})
    assert screen.getvalue() == '{\n  "name": "ä"\n}\n'
