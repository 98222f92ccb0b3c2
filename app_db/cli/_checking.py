"""`app-db check`: everything that can be known beforehand."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app_db.container import DatabaseContainer
from app_db.errors import InvalidUse

if TYPE_CHECKING:
    from app_db._findings.finding import Finding

FINE, WRONG = 0, 1

PROJECT = Path("pyproject.toml")


def add_to(commands: Any) -> argparse.ArgumentParser:
    """Add `check`, and return its parser."""
    check: argparse.ArgumentParser = commands.add_parser(
        "check", help="check whether units of work can commit as promised", description=_check.__doc__
    )
    check.add_argument(
        "--modules",
        nargs="+",
        metavar="PACKAGE",
        help="modules and packages of the application, to check their markers (default: [tool.app_db] modules in pyproject.toml)",
    )
    check.add_argument("--strict", action="store_true", help="exit with 1 for hints, too")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.set_defaults(command=_check)
    return check


def _check(container: DatabaseContainer, options: argparse.Namespace) -> int:
    """Find everything about the databases that can be known beforehand: whether they can be reached, read and written as the
    settings say, whether their servers and tables are as units of work need them, and whether markers find their providers.
    """
    from app_db._findings.find import find

    modules = options.modules if options.modules is not None else configured_modules(PROJECT)
    if modules and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    found = find(container, modules)
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2, ensure_ascii=False))
    else:
        for line in report(found, [*container.settings().connections] if not _has_no_settings(found) else []):
            print(line)
    return exit_code(found, strict=options.strict)


def exit_code(found: Sequence[Finding], *, strict: bool) -> int:
    """Return 1 if there is an error or a warning, and with `strict` also if there is a hint."""
    return WRONG if any(strict or finding.severity != "hint" for finding in found) else FINE


def configured_modules(file: Path) -> list[str]:
    """Return `modules` of `[tool.app_db]` in a pyproject.toml. Raises InvalidUse if that can't be read."""
    import tomllib

    if not file.is_file():
        return []
    try:
        modules: object = tomllib.loads(file.read_text("utf-8")).get("tool", {}).get("app_db", {}).get("modules", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, AttributeError) as error:
        raise InvalidUse(f"{file} can't be read ({type(error).__name__})", "Correct it, or give --modules") from None
    if not (isinstance(modules, list) and all(isinstance(module, str) for module in modules)):
        raise InvalidUse(f"{file}: modules in [tool.app_db] is no list of names", 'Write modules = ["shop"]')
    return modules


# ---- the report -----------------------------------------------------------------------------------------------------------


def report(found: Sequence[Finding], names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the report: the findings by connection, the worst first, and how many there are."""
    heading: str | None = ""
    for finding in found:
        if finding.connection != heading:
            heading = finding.connection
            yield "All connections" if heading is None else heading
        yield f"  {finding.severity}: {finding.what}"
        yield f"    where: {finding.where}"
        yield f"    to do: {finding.remedy}"
    if found:
        yield ""
    yield _totals(found, names)


def _totals(found: Sequence[Finding], names: Sequence[str]) -> str:
    if not found:
        return f"Nothing is wrong with {', '.join(names)}."
    counts = Counter(finding.severity for finding in found)
    return ", ".join(f"{number} {severity}{'' if number == 1 else 's'}" for severity, number in counts.most_common()) + "."


def _has_no_settings(found: Sequence[Finding]) -> bool:
    return any(finding.matter == "settings" and finding.connection is None for finding in found)
