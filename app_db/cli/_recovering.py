"""`app-db recover` and `app-db in-doubt`: what a crash left prepared."""

from __future__ import annotations

from app_db.cli._calls import FINE, WRONG, Call, Commands, seconds

_GRACE = 10.0
"""That of recovery, whose module takes longer to import than `--help` to print."""


def add_to(commands: Commands) -> None:
    """Add `recover` and `in-doubt`."""
    recover = commands.add("recover", _recover)
    recover.add_argument("--dry-run", action="store_true", help="change nothing, and print what would be done")
    in_doubt = commands.add("in-doubt", _in_doubt)
    for each in (recover, in_doubt):
        each.add_argument(
            "--grace",
            type=seconds,
            default=_GRACE,
            metavar="SECONDS",
            help="wait for what was prepared less than so long ago, because its process may still commit it "
            "(default: %(default)g)",
        )


def _recover(call: Call) -> int:
    """Commit or roll back the branches that a crash left prepared. You can run it at any time and from any host."""
    return _settle(call, dry_run=call.options.dry_run)


def _in_doubt(call: Call) -> int:
    """List the branches that a crash left prepared, and what `recover` would do. Nothing is changed."""
    return _settle(call, dry_run=True)


def _settle(call: Call, *, dry_run: bool) -> int:
    from app_db.cli._settlements import data, report

    recovery, application = call.container.recovery(), call.container.settings().application
    doing = f"{'Looking for' if dry_run else 'Settling'} what of {application!r} is in doubt"
    with call.out.progress(doing) as step:

        def note(done: int, total: int) -> None:
            step(done, total, f"{doing}: {done} of {total}")

        settlement = recovery.settle(grace=call.options.grace, dry_run=dry_run, on_unit=note)
    for line in report(settlement, application, dry_run):
        call.out.line(line)
    call.out.data(data(settlement, application, dry_run))
    return WRONG if settlement.left else FINE
