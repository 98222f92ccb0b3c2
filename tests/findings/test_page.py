"""The table of docs/how-to/check.md lists what is found."""

from __future__ import annotations

from app_db._findings.matters import MATTERS
from harness.paths import ROOT

PAGE = ROOT / "docs" / "how-to" / "check.md"


def table() -> list[str]:
    rows = [f"| `{matter.name}` | {matter.severity} | {matter.about} |" for matter in MATTERS]
    return ["| matter | severity | what is found |", "|---|---|---|", *rows]


def test_the_page_lists_every_matter_and_no_other() -> None:
    """`python -m findings.test_page`, in tests/, prints the table."""
    lines = PAGE.read_text().splitlines()
    first = lines.index(table()[0])
    assert lines[first : first + len(table()) + 1] == [*table(), ""]


if __name__ == "__main__":
    print(*table(), sep="\n")
