"""What `app-db recover` and `app-db in-doubt` print."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from app_db._two_phase.decisions import Verdict
from app_db._two_phase.recovery import BranchInDoubt, BranchState, Settlement, UnitInDoubt


def data(settlement: Settlement, application: str, dry_run: bool) -> dict[str, Any]:
    return {
        "application": application,
        "dry_run": dry_run,
        "left": settlement.left,
        "units": [_unit_data(unit, dry_run) for unit in settlement.units],
        "unreachable": settlement.unreachable,
        "forgotten_decisions": settlement.forgotten,
    }


def _unit_data(unit: UnitInDoubt, dry_run: bool) -> dict[str, Any]:
    return {
        "unit": unit.unit,
        "begun_at": _timestamp(unit.begun_at),
        "verdict": None if unit.verdict is None else unit.verdict.value,
        "settled": unit.is_settled,
        "under_way": unit.is_under_way,
        "summary": _summary(unit, dry_run),
        "branches": [
            {
                "connection": branch.connection,
                "xid": str(branch.xid),
                "state": branch.state.value,
                "prepared_at": None if branch.prepared_at is None else _timestamp(branch.prepared_at),
                "owner": branch.owner,
                "reason": branch.reason,
            }
            for branch in unit.branches
        ],
    }


# ---- the report -----------------------------------------------------------------------------------------------------------


def report(settlement: Settlement, application: str, dry_run: bool) -> Iterator[str]:
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
    moment = _datetime(at)
    if moment is None:
        return "at an unknown time"
    return f"{moment.strftime('%Y-%m-%d %H:%M:%S UTC')} ({_duration(time.time() - at)} ago)"


def _timestamp(at: float) -> str | None:
    moment = _datetime(at)
    return None if moment is None else moment.isoformat(timespec="seconds")


def _datetime(at: float) -> datetime | None:
    try:
        return datetime.fromtimestamp(at, UTC)
    except (ValueError, OverflowError, OSError):  # the letters of an xid may spell any number
        return None


def _duration(took: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if took >= 2 * length:
            return f"{took / length:.0f} {unit}"
    return f"{max(took, 0):.0f} s"


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
