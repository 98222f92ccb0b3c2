"""The demonstration keeps its promises: the program is run as a user runs it, and its databases are read without app_db."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from harness.paths import ROOT

DEMO = [sys.executable, "-W", "error", str(ROOT / "examples" / "demo.py")]


def prepare(directory: Path) -> Path:
    """Do what `make demo` does before it starts the program."""
    directory.mkdir(exist_ok=True)
    shutil.copy(ROOT / "settings.example.env", directory / ".env")
    return directory


def environment(**more: str) -> dict[str, str]:
    """The environment without the developer's own settings, and with this checkout's app_db."""
    kept = {name: value for name, value in os.environ.items() if not re.match("APP_DB_|DATABASE_URL$|NO_COLOR$", name.upper())}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")]), **more}


def run_demo(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(DEMO, cwd=directory, env=environment(), capture_output=True, text=True, check=False)


def rows(database: Path, table: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(f"SELECT * FROM {table} ORDER BY id").fetchall()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def page(directory: Path) -> str:
    done = run_demo(prepare(directory))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def part(page: str, number: int) -> str:
    """A part of the page on one line, so that where its lines break doesn't matter."""
    text = page.split(f"\n{number}  ", 1)[1].split(f"\n{number + 1}  ", 1)[0]
    return " ".join(text.split())


def test_the_databases_hold_what_committed_and_nothing_else(directory: Path, page: str) -> None:
    assert rows(directory / "writer.db", "orders") == [(1, "tea", 3)]
    assert rows(directory / "warehouse.db", "movements") == [(1, "tea", 10), (2, "tea", -3)]


def test_the_log_survives_what_was_refused_and_what_was_aborted(directory: Path, page: str) -> None:
    entries = [text for _, text in rows(directory / "log.db", "entries")]
    assert entries == ["receive 10 tea", "order 3 tea", "order 3 tea", "order 30 tea"]


def test_the_page_says_where_the_settings_came_from_and_no_password(page: str) -> None:
    assert "CONNECTIONS__WRITER__URL .env sqlite:///writer.db" in part(page, 1)
    assert "CONNECTIONS__ARCHIVE__URL environment postgresql+psycopg://shop:***@archive.example/shop" in part(page, 1)
    assert "correct-horse" not in page


def test_the_page_shows_the_source_of_what_it_runs(page: str) -> None:
    for source in (ROOT / "examples" / "shop" / "services.py").read_text().split("def place_order(")[1].splitlines()[:5]:
        assert source.strip() in page


def test_strict_refuses_two_databases_that_cannot_commit_together(page: str) -> None:
    assert "NotAtomic: Nothing was committed: the unit of work wrote to 'warehouse', 'writer'" in part(page, 3)
    assert "writer.db orders (empty) warehouse.db movements tea 10 log.db entries receive 10 tea | order 3 tea" in part(page, 3)


def test_best_effort_commits_two_databases(page: str) -> None:
    assert "writer.db orders tea 3 warehouse.db movements tea 10 | tea -3" in part(page, 4)


def test_a_function_that_raises_leaves_both_as_they_were(page: str) -> None:
    assert '>>> stock("tea") 7 >>> place_order("tea", 30) OutOfStockError: tea >>> stock("tea") 7' in part(page, 5)
    assert "writer.db orders tea 3 warehouse.db movements tea 10 | tea -3" in part(page, 5)


def test_the_reader_refuses_to_write_and_sees_what_the_writer_committed(page: str) -> None:
    assert "ReadOnlyViolation: Flushing changed objects was refused: the connection 'reader' is read-only." in part(page, 6)
    assert '>>> ordered("tea") 3' in part(page, 6)


def test_the_page_fits_a_terminal_and_is_plain_text_in_a_pipe(page: str) -> None:
    assert max(len(line) for line in page.splitlines()) <= 100
    assert page.isascii()
    assert "\033" not in page


@pytest.mark.exhaustive
def test_two_runs_print_the_same(tmp_path: Path, page: str) -> None:
    assert run_demo(prepare(tmp_path / "again")).stdout == page


def test_a_directory_with_databases_is_left_alone(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "writer.db").close()
    done = run_demo(prepare(tmp_path))
    assert done.returncode == 1
    assert "writer.db is here already" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "writer.db"]


def test_a_directory_without_settings_is_left_alone(tmp_path: Path) -> None:
    done = run_demo(tmp_path)
    assert done.returncode == 1
    assert "there is no .env here" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_colours_unless_it_wants_none(tmp_path: Path) -> None:
    import pty

    def run_on_terminal(name: str, **more: str) -> str:
        ours, theirs = pty.openpty()
        program = subprocess.Popen(DEMO, cwd=prepare(tmp_path / name), env=environment(**more), stdout=theirs)
        os.close(theirs)
        output = b""
        while True:
            try:
                read = os.read(ours, 4096)
            except OSError:  # the other end is gone
                break
            if not read:
                break
            output += read
        os.close(ours)
        assert program.wait() == 0
        return output.decode()

    assert re.search("\033\\[1m", run_on_terminal("coloured"))
    assert "\033" not in run_on_terminal("plain", NO_COLOR="1")
