"""The verbs of migrations: migrate, revision, downgrade, current, history, stamp and sql."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from app_db.cli._calls import FINE, WRONG, Call, CannotRun, Commands, seconds

if TYPE_CHECKING:
    from app_db.migrations import Check, Migrated, Revision, Step


@dataclass(frozen=True)
class _Report:
    """What a verb has to say: lines for readers, data for programs, and the exit code."""

    lines: Sequence[str]
    data: Any
    code: int = FINE


def add_to(commands: Commands) -> None:
    """Add the verbs of migrations."""
    migrate = _added(commands, "migrate", _migrate, with_models=True)
    migrate.add_argument("revision", nargs="?", default="head", help="run those up to this one (default: all)")
    migrate.add_argument("--check", action="store_true", help="change nothing, and say what is pending and how models differ")
    revision = _added(commands, "revision", _revision, with_models=True)
    revision.add_argument("-m", "--message", required=True, help="what has changed, in a few words")
    revision.add_argument("--empty", action="store_true", help="write an empty one, to be filled by hand")
    downgrade = _added(commands, "downgrade", _downgrade)
    downgrade.add_argument("revision", help="undo those after this one: an id, -1 for the last one, base for all")
    stamp = _added(commands, "stamp", _stamp, with_models=True)
    stamp.add_argument("revision", nargs="?", default="head", help="the revision (default: the newest)")
    _added(commands, "current", _current)
    _added(commands, "history", _history)
    sql = _added(commands, "sql", _sql, with_models=True)
    sql.add_argument("revision", nargs="?", help="the SQL up to this revision (default: head; with --downgrade, base)")
    sql.add_argument(
        "--from", dest="start", metavar="REVISION", help="begin after this one (default: base; with --downgrade, head)"
    )
    sql.add_argument("--downgrade", action="store_true", help="print the SQL that undoes them")
    for each in (migrate, downgrade, stamp):
        each.add_argument(
            "--lock-timeout",
            type=seconds,
            default=60.0,
            metavar="SECONDS",
            help="how long to wait for another process that migrates (default: %(default)g)",
        )


def _added(commands: Commands, name: str, report: Callable[[Call], _Report], *, with_models: bool = False) -> ArgumentParser:
    def verb(call: Call) -> int:
        from app_db.cli._finding import import_modules

        if with_models:  # without them, their tables would look as if the models were deleted
            import_modules(())
        found = report(call)
        for line in found.lines:
            call.out.line(line)
        call.out.data(found.data)
        return found.code

    verb.__doc__ = report.__doc__
    parser = commands.add(name, verb)
    parser.add_argument(
        "--connection", action="append", dest="connections", metavar="NAME", help="only this one; may be repeated"
    )
    parser.add_argument(
        "--directory", metavar="FOLDER", help="where the migrations are (default: [tool.app_db] migrations, or ./migrations)"
    )
    return parser


def _places(call: Call) -> dict[str, Any]:
    return {"connections": call.options.connections, "directory": call.options.directory}


# ---- changing databases ---------------------------------------------------------------------------------------------------


def _migrate(call: Call) -> _Report:
    """Run the pending migrations of all connections. Any number of processes may do it at the same time."""
    from app_db.migrations import check, upgrade

    options = call.options
    if options.check:
        if options.revision != "head":
            raise CannotRun(f"--check looks at all revisions, and runs none. Leave out {options.revision!r}, or --check")
        with call.out.progress("Comparing models and databases"):
            return _checked(check(call.container, **_places(call)))
    with _noted(call, "Migrating") as note:
        done = upgrade(call.container, options.revision, lock_timeout=options.lock_timeout, on_step=note, **_places(call))
    return _changed(done)


@contextmanager
def _noted(call: Call, doing: str) -> Generator[Callable[[Step], None]]:
    """Show progress, and give the function that is to be called after each revision."""
    with call.out.progress(doing) as step:

        def note(done: Step) -> None:
            step(done.number, done.total, f"{done.connection} {done.revision}")

        yield note


def _downgrade(call: Call) -> _Report:
    """Undo migrations. Name the connection if several have migrations."""
    from app_db.migrations import downgrade

    options = call.options
    with _noted(call, "Undoing migrations") as note:
        done = downgrade(call.container, options.revision, lock_timeout=options.lock_timeout, on_step=note, **_places(call))
    return _changed(done)


def _stamp(call: Call) -> _Report:
    """Note that a database is at a revision, and run nothing: for tables that are there already."""
    from app_db.migrations import stamp

    options = call.options
    with call.out.progress("Stamping the databases"):
        return _changed(stamp(call.container, options.revision, lock_timeout=options.lock_timeout, **_places(call)))


def _changed(done: Sequence[Migrated]) -> _Report:
    return _Report([_change(each) for each in done], [asdict(each) for each in done])


def _change(done: Migrated) -> str:
    if done.before == done.after:
        return f"{done.connection}: nothing to do at {_named(done.after)}"
    run = f", {len(done.revisions)} run" if done.revisions else ""
    return f"{done.connection}: {_named(done.before)} -> {_named(done.after)}{run}"


def _named(revision: str | None) -> str:
    return revision or "no revision"


def _checked(found: Sequence[Check]) -> _Report:
    lines = []
    for each in found:
        lines += [f"{each.connection}: {revision} is pending" for revision in each.pending]
        lines += [f"{each.connection}: {difference}" for difference in each.drift]
        lines += [f"{each.connection}: nothing to do"] if each.is_clean else []
    return _Report(lines, [asdict(each) for each in found], FINE if all(each.is_clean for each in found) else WRONG)


# ---- files --------------------------------------------------------------------------------------------------------------


def _revision(call: Call) -> _Report:
    """Write a migration for each connection whose models differ from its database. Read it before you run it."""
    from app_db.migrations import revision
    from app_db.migrations._commands import tables_before_revisions

    with call.out.progress("Comparing models and databases"):
        existing = {} if call.options.empty else tables_before_revisions(call.container, **_places(call))
        written = revision(call.container, call.options.message, autogenerate=not call.options.empty, **_places(call))
    lines = [f"{each.connection}: {each.path}" for each in written] or ["Nothing was written: models and databases agree."]
    return _Report([*lines, *(_not_created(*each) for each in existing.items())], [asdict(each) for each in written])


def _not_created(name: str, tables: list[str]) -> str:
    """Return what to do about tables that a first revision does not create."""
    return (
        f"{name}: no revision creates {', '.join(tables)}, because the database has them already. For a first revision that "
        "creates them, delete the file above if there is one, run this on an empty database, and then app-db stamp here."
    )


# ---- looking at them ----------------------------------------------------------------------------------------------------


def _current(call: Call) -> _Report:
    """Show which revision each database has, and how many are pending."""
    from app_db.migrations import current

    with call.out.progress("Asking the databases"):
        found = current(call.container, **_places(call))
    lines = [f"{each.connection}: {_named(each.revision)}, {len(each.pending) or 'none'} pending" for each in found]
    return _Report(lines, [asdict(each) for each in found], WRONG if any(each.pending for each in found) else FINE)


def _history(call: Call) -> _Report:
    """List the migrations of each connection, from the first to the newest."""
    from app_db.migrations import history

    with call.out.progress("Asking the databases"):
        found = history(call.container, **_places(call))
    is_known = all(each.is_applied is not None for each in found)
    return _Report([_line(each) for each in found], [asdict(each) for each in found], FINE if is_known else WRONG)


def _line(revision: Revision) -> str:
    state = (
        " (unknown: the database can't be asked)" if revision.is_applied is None else "" if revision.is_applied else " (pending)"
    )
    return f"{revision.connection}: {revision.revision} {revision.message.strip()}{state}"


def _sql(call: Call) -> _Report:
    """Print the SQL of migrations, and connect to nothing."""
    from app_db.migrations import sql

    texts = sql(
        call.container, call.options.revision, start=call.options.start, downgrade=call.options.downgrade, **_places(call)
    )
    return _Report([f"-- {name}\n\n{text}" for name, text in texts.items()], texts)
