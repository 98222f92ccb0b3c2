"""The command line, `python -m app_db`. Its commands call methods of containers."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import cast

from app_db._two_phase.decisions import Verdict
from app_db._two_phase.recovery import GRACE, BranchInDoubt, BranchState, Settlement, UnitInDoubt
from app_db._wording import in_one_line
from app_db.cli import _checking
from app_db.container import Connection, DatabaseContainer, container_of
from app_db.errors import AppDbError
from app_db.settings import DatabaseSettings

EXIT_CODES = """\
exit codes:
  0  nothing is left to do
  1  something is left, or may be left; the output says what and why
  2  the command could not run
"""

NOTHING_LEFT, SOMETHING_LEFT, COULD_NOT_RUN = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 or 2, as `--help` says.

    Without `arguments` it reads those of the process. Errors are printed, and not raised.
    """
    options = _parser().parse_args(arguments)
    try:
        container = _container(options.container)
        with _without_log_records():
            try:
                return int(options.command(container, options))
            finally:
                container.shutdown_resources()
    except AppDbError as error:
        print(error, file=sys.stderr)
    except _NoContainer as error:
        print(f"--container {options.container}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted. Nothing is lost by that: run it again.", file=sys.stderr)
    except Exception as error:  # noqa: BLE001  # a traceback does not help an operator
        print(f"app_db could not go on: {in_one_line(error)}", file=sys.stderr)
    return COULD_NOT_RUN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app_db", description="Look after an application's databases.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    recover = commands.add_parser("recover", help="settle what a crash left prepared", description=_recover.__doc__)
    recover.add_argument("--dry-run", action="store_true", help="change nothing, and print what would be done")
    recover.add_argument(
        "--grace",
        type=_seconds,
        default=GRACE,
        metavar="SECONDS",
        help="wait for what was prepared less than so long ago, because its process may still commit it (default: %(default)g)",
    )
    recover.set_defaults(command=_recover)
    check = _checking.add_to(commands)
    for each in (parser, recover, check):
        each.formatter_class, each.epilog = argparse.RawDescriptionHelpFormatter, EXIT_CODES
    for command in (recover, check):
        command.add_argument(
            "--container",
            metavar="MODULE:NAME",
            help="the container, its class or a function that returns it (default: one with all connections in the settings)",
        )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("give seconds, 0 or more")
    return seconds


# ---- the container ------------------------------------------------------------------------------------------------------


class _NoContainer(Exception):
    """The value of --container can't be used. The message never quotes an error of the application, which may hold secrets."""


def _container(name: str | None) -> DatabaseContainer:
    if name is None:
        settings = DatabaseSettings()
        return container_of(*settings.connections)(settings=settings)
    module, _, path = name.partition(":")
    found: object = _imported(module)
    for part in (path or "container").split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise _NoContainer(f"there is no {part!r}. Name a container, its class, or a function: MODULE:NAME") from None
    made = _called(found) if callable(found) and not isinstance(found, Connection) else found
    if not hasattr(made, "session_of"):
        raise _NoContainer("it is no database container. Name one, its class, or a function that returns it: MODULE:NAME")
    return cast("DatabaseContainer", made)


def _imported(module: str) -> ModuleType:
    if not module:
        raise _NoContainer("it names no module. Give MODULE:NAME")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(module)
    except AppDbError:
        raise
    except ModuleNotFoundError as error:
        raise _NoContainer(f"there is no module {error.name!r}. Run this where the application runs") from None
    except Exception as error:  # noqa: BLE001  # the application may raise anything
        raise _NoContainer(
            f"the module {module!r} can't be imported ({type(error).__name__}). Import it in Python to see why"
        ) from None


def _called(make: Callable[[], object]) -> object:
    try:
        return make()
    except AppDbError:
        raise
    except Exception as error:  # noqa: BLE001  # the application may raise anything
        raise _NoContainer(f"calling it failed ({type(error).__name__}). Call it in Python to see why") from None


@contextmanager
def _without_log_records() -> Generator[None]:
    """Keep log records of recovery off the terminal, whose output says the same, unless the application configures logging."""
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


# ---- recover ------------------------------------------------------------------------------------------------------------


def _recover(container: DatabaseContainer, options: argparse.Namespace) -> int:
    """Commit or roll back the branches that a crash left prepared. You can run it at any time and from any host."""
    settlement = container.recovery().settle(grace=options.grace, dry_run=options.dry_run)
    for line in _report(settlement, container.settings().application, options.dry_run):
        print(line)
    return SOMETHING_LEFT if settlement.left else NOTHING_LEFT


def _report(settlement: Settlement, application: str, dry_run: bool) -> Iterator[str]:
    """Yield the lines of the report: the units of work, oldest first, then databases without an answer, and the totals."""
    for unit in settlement.units:
        yield f"{unit.unit}, begun {_moment(unit.begun_at)}: {_summary(unit, dry_run)}"
        width = max(len(branch.connection) for branch in unit.branches)
        for branch in unit.branches:
            yield f"  {branch.connection:{width}}  {_state(branch, unit, dry_run)}"
        yield ""
    for subject, reason in settlement.unreachable.items():
        yield f"Can't be asked: {subject} ({reason})"
    if settlement.unreachable:
        yield "What is prepared there keeps its locks. Run this again when it can be reached."
        yield ""
    yield _totals(settlement, application, dry_run)


def _summary(unit: UnitInDoubt, dry_run: bool) -> str:
    if all(branch.state is BranchState.GONE for branch in unit.branches):
        return "another process has settled it meanwhile"
    if unit.verdict is None:
        return f"{'under way' if unit.is_under_way else 'LEFT IN DOUBT'}, because {unit.reason}"
    decided = "it was decided to commit it" if unit.verdict is Verdict.COMMIT else "there was no decision to commit it"
    if unit.is_under_way:
        return f"under way, because {unit.reason}; later it would be {_participle(unit.verdict)}, because {decided}"
    if dry_run:
        return f"would be {_participle(unit.verdict)}, because {decided}"
    if unit.is_settled:
        return f"{_participle(unit.verdict)}, because {decided}"
    return f"LEFT, because not all of it could be {_participle(unit.verdict)}; {decided}"


def _participle(verdict: Verdict) -> str:
    return "committed" if verdict is Verdict.COMMIT else "rolled back"


def _state(branch: BranchInDoubt, unit: UnitInDoubt, dry_run: bool) -> str:
    if branch.is_settled:
        return str(branch.state)
    prepared = "prepared" if branch.prepared_at is None else f"prepared {_moment(branch.prepared_at)}"
    owner = "" if branch.owner is None else f" by the user {branch.owner!r}"
    text = f"{prepared}{owner} as {branch.xid}"
    if dry_run or branch.state is BranchState.PREPARED:
        return text
    if branch.state is BranchState.HELD:
        return f"LEFT {text}: the connection that prepared it is still open. Run this again when it is closed"
    return f"LEFT {text}: {branch.reason}"


def _moment(at: float) -> str:
    try:
        spelled = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # the letters of an xid may spell any number
        return "at an unknown time"
    return f"{spelled} ({_duration(time.time() - at)} ago)"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _totals(settlement: Settlement, application: str, dry_run: bool) -> str:
    if not (settlement.units or settlement.unreachable or settlement.forgotten):
        return f"Nothing of {application!r} is in doubt."
    settled = sum(unit.is_settled for unit in settlement.units)
    under_way = len(settlement.under_way)
    parts = [f"{_counted(len(settlement.units), 'unit')} of {application!r} in doubt"]
    if settlement.units and not dry_run:
        parts.append(f"{settled} settled, {len(settlement.units) - settled - under_way} left")
    if under_way:
        parts.append(f"{under_way} under way")
    if settlement.forgotten:
        would = "that would be " if dry_run else ""
        parts.append(f"{_counted(settlement.forgotten, 'decision')} {would}forgotten")
    return ", ".join(parts) + "."


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
