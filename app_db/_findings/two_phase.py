"""Two-phase commit: whether servers can prepare, what is in doubt, and whether decisions can be written."""

from __future__ import annotations

from collections.abc import Iterator

from app_db._findings import matters
from app_db._findings.asking import Asked, Question
from app_db._findings.finding import Finding, place_of
from app_db._two_phase.checks import log_problems
from app_db._two_phase.recovery import GRACE
from app_db._two_phase.xids import Xid
from app_db.container import DatabaseContainer
from app_db.settings import DatabaseSettings
from app_db.settings._database_settings import FILE


def _the_ability_to_prepare(asked: Asked) -> Iterator[Finding]:
    verbs = asked.container.core.decision_logs().prepare_verbs(asked.name) if asked.own.two_phase else None
    problem = None if verbs is None else verbs.problem(asked.connection)
    if problem is not None:
        what, _, remedy = problem.partition(". ")
        yield matters.CANNOT_PREPARE.found(asked.name, f"{what}.", asked.place("two_phase"), remedy)


def _branches_in_doubt(asked: Asked) -> Iterator[Finding]:
    verbs = asked.container.core.decision_logs().prepare_verbs(asked.name) if asked.own.two_phase else None
    if verbs is None:
        return
    old = 0
    for prepared in verbs.prepared(asked.connection):
        xid = Xid.parse(prepared.xid)
        if xid is not None and xid.application == asked.settings.application and _is_of(xid, asked):
            old += asked.now() - (prepared.prepared_at or xid.begun_at) > GRACE
    if old:
        what = (
            "1 prepared branch is in doubt, and keeps its"
            if old == 1
            else f"{old} prepared branches are in doubt, and keep their"
        )
        yield matters.IN_DOUBT.found(
            asked.name,
            f"{what} locks.",
            f"the prepared transactions of {asked.settings.application!r} in the database",
            "Run `app-db recover`, and have it run every minute.",
        )


def _is_of(xid: Xid, asked: Asked) -> bool:
    """Return whether a branch is to be shown with a connection. MariaDB and MySQL list those of the whole server."""
    name = xid.connection.partition(".")[0]
    return name == asked.name or name not in asked.settings.connections


QUESTIONS: tuple[Question, ...] = (_the_ability_to_prepare, _branches_in_doubt)


# ---- the decision log -----------------------------------------------------------------------------------------------------


def place_of_log(container: DatabaseContainer, settings: DatabaseSettings) -> str | None:
    """Return the connection in whose database the configured decision log is; None if it is a file, or there is none."""
    logs = container.core.decision_logs()
    names: list[str] = [name for name in logs.two_phase() if settings.decision_log is None] or [settings.decision_log or FILE]
    return next((name for name in names if not name.startswith(FILE) and logs.are_in(name)), None)


def decision_log(container: DatabaseContainer, settings: DatabaseSettings) -> list[Finding]:
    """Return what keeps decisions from being written. This writes one about no unit of work, and removes it."""
    logs = container.core.decision_logs()
    found = []
    for problem in log_problems(logs):
        remedy = "Create its directory, and let the process write there: give DECISION_LOG an absolute path."
        if place_of_log(container, settings) is not None:
            remedy = "Let the user create the table app_db_decisions, or create it, and grant SELECT, INSERT and DELETE on it."
        what = f"{problem.message[0].upper()}{problem.message[1:]}"
        found.append(matters.DECISION_LOG.found(None, what, place_of(settings, "decision_log"), remedy))
    return found


def apart(settings: DatabaseSettings) -> Iterator[Finding]:
    """Yield a hint if the decision log is in a database that takes no part in two-phase commit."""
    chosen = settings.decision_log
    if chosen is None or chosen.startswith(FILE) or settings.connections[chosen].two_phase:
        return
    yield matters.DECISION_LOG_APART.found(
        None,
        f"The decision log is in the database of {chosen!r}, which takes no part in two-phase commit: without that database, no "
        "unit of work can commit that wrote to several.",
        place_of(settings, "decision_log"),
        "Unset it, or name a two-phase connection, unless units write to that database as the last resource anyway.",
    )
