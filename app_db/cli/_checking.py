"""`app-db check`: everything that can be known beforehand."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from app_db._findings.find import find
from app_db._findings.finding import Finding, Severity
from app_db.cli._calls import FINE, WRONG, Call, Commands
from app_db.cli._finding import modules_in_project
from app_db.cli._printing import Style

_STYLES: dict[Severity, Style] = {"error": "bad", "warning": "warning", "hint": "dim"}


def add_to(commands: Commands) -> None:
    """Add `check`."""
    check = commands.add("check", _check)
    check.add_argument(
        "--modules",
        nargs="+",
        metavar="PACKAGE",
        help="modules and packages of the application, to check their markers (default: [tool.app_db] modules in pyproject.toml)",
    )
    check.add_argument("--strict", action="store_true", help="exit with 1 for hints, too")


def _check(call: Call) -> int:
    """Find everything about the databases that can be known beforehand: whether they can be reached, read and written as the
    settings say, whether their servers and tables are as units of work need them, and whether markers find their providers.
    """
    container = call.container
    modules: Sequence[str] = call.options.modules
    if modules is None:
        modules = modules_in_project()
    if modules and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    with call.out.progress("Asking the databases"):
        found = find(container, modules)
    names = [] if _has_no_settings(found) else [*container.settings().connections]
    for line, style in report(found, names):
        call.out.line(line, style)
    call.out.data({"findings": [asdict(finding) for finding in found]})
    return exit_code(found, strict=call.options.strict)


def exit_code(found: Sequence[Finding], *, strict: bool) -> int:
    """Return 1 if there is an error or a warning, and with `strict` also if there is a hint."""
    return WRONG if any(strict or finding.severity != "hint" for finding in found) else FINE


# ---- the report -----------------------------------------------------------------------------------------------------------


def report(found: Sequence[Finding], names: Sequence[str]) -> Iterator[tuple[str, Style]]:
    """Yield the lines of the report: the findings by connection, the worst first, and how many there are."""
    heading: str | None = ""
    for finding in found:
        if finding.connection != heading:
            heading = finding.connection
            yield "All connections" if heading is None else heading, "bold"
        yield f"  {finding.severity}: {finding.what}", _STYLES[finding.severity]
        yield f"    where: {finding.where}", ""
        yield f"    to do: {finding.remedy}", ""
    if found:
        yield "", ""
    yield _totals(found, names), "" if found else "good"


def _totals(found: Sequence[Finding], names: Sequence[str]) -> str:
    if not found:
        return f"Nothing is wrong with {', '.join(names)}."
    counts = Counter(finding.severity for finding in found)
    return ", ".join(f"{number} {severity}{'' if number == 1 else 's'}" for severity, number in counts.most_common()) + "."


def _has_no_settings(found: Sequence[Finding]) -> bool:
    return any(finding.matter == "settings" and finding.connection is None for finding in found)
