"""The programs of `make compare` say what the driver of the comparison can read. What they print is too slow to make here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from harness.paths import ROOT

PEERS = ROOT / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def compare() -> Iterator[Any]:
    """The driver, which has the name of another benchmark's."""
    spec = importlib.util.spec_from_file_location("compare_run", PEERS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        del sys.modules[spec.name]


def test_what_a_program_says_is_not_offered_is_a_line_of_the_table(compare: Any) -> None:
    known = set(compare.KEYS.values())
    said = {program.name: set(program.constant("NOT_OFFERED", {})) - known for program in compare.PROGRAMS}
    assert {name: keys for name, keys in said.items() if keys} == {}


def test_each_program_marks_its_wiring_and_its_endpoint(compare: Any) -> None:
    counted = {p.name: (compare.wiring(p), compare.lines_between(p.path, "endpoint")) for p in compare.PROGRAMS}
    assert {name: lines for name, lines in counted.items() if 0 in lines} == {}


def test_each_marker_that_begins_also_ends() -> None:
    for path in PEERS.glob("*.py"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        for word in ("wiring", "endpoint"):
            assert lines.count(f"# {word} begins") == lines.count(f"# {word} ends"), path.name


def test_the_page_has_a_column_for_each_program(compare: Any) -> None:
    page = (ROOT / "docs" / "compare.md").read_text()
    for framework in {program.framework for program in compare.PROGRAMS}:
        table = page.partition(f"\n## {framework}\n")[2].partition("\n## ")[0]
        head = next(line for line in table.splitlines() if line.startswith("|"))
        titles = [program.title for program in compare.PROGRAMS if program.framework == framework]
        heads = [cell.strip() for cell in head.split("|")[2:-1]]
        assert all(cell.startswith(title) for cell, title in zip(heads, titles, strict=True)), heads


def test_a_cell_says_what_happened_instead(compare: Any) -> None:
    assert compare.judged("201", 1, "201", 1) == "right"
    assert compare.judged("201", 0, "201", 1) == "201, no row"
    assert compare.judged("409", 1, "409", 0) == "409, row kept"
    assert compare.judged("500", 0, "409", 0) == "500"
