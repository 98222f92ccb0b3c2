"""`app-db check`: everything that can be known beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from app_db.cli._calls import FINE, WRONG, Call, Commands

if TYPE_CHECKING:
    from app_db._findings.finding import Finding, Severity
    from app_db.cli._printing import Printer, Style

_STYLES: dict[Severity, Style] = {"error": "bad", "warning": "warning", "hint": "dim"}


def add_to(commands: Commands) -> None:
    """Add `check`."""
    check = commands.add("check", _check)
    check.add_argument(
        "--modules",
        nargs="+",
        default=[],
        metavar="PACKAGE",
        help="modules and packages of the application, to check their markers (default: [tool.app_db] modules in pyproject.toml)",
    )
    check.add_argument("--strict", action="store_true", help="exit with 1 for hints, too")


def _check(call: Call) -> int:
    """Find everything about the databases that can be known beforehand: whether they can be reached, read and written as the
    settings say, whether their servers and tables are as units of work need them, and whether markers find their providers.
    """
    from app_db._findings.find import find
    from app_db.cli._finding import module_names

    modules = module_names(call.options.modules)
    with call.out.progress("Checking the databases"):
        found = find(call.container, modules)
    _report(found, call)
    call.out.data([asdict(finding) for finding in found])
    return WRONG if any(call.options.strict or finding.severity != "hint" for finding in found) else FINE


def _report(found: Sequence[Finding], call: Call) -> None:
    """Print the findings by connection, the worst first, and how many there are."""
    from app_db._findings.finding import SEVERITIES

    if not found:
        call.out.line(f"Nothing is wrong with {', '.join(call.container.settings().connections)}.")
        return
    heading: str | None = ""
    for finding in found:
        if finding.connection != heading:
            heading = finding.connection
            call.out.line("All connections" if heading is None else heading, "bold")
        _print(finding, call.out)
    counts = Counter(finding.severity for finding in found)
    numbers = (f"{counts[each]} {each}{'' if counts[each] == 1 else 's'}" for each in SEVERITIES if counts[each])
    call.out.line()
    call.out.line(f"{', '.join(numbers)}.")


def _print(finding: Finding, out: Printer) -> None:
    what = finding.what.replace("\n", "\n      ")
    out.line(f"  {finding.severity}: {what}", _STYLES[finding.severity])
    out.line(f"    where: {finding.where}")
    out.line(f"    to do: {finding.remedy}")
