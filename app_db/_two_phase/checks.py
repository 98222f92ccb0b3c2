"""Start-up checks for two-phase commit."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from app_db._databases.telling import described
from app_db._two_phase.decision_logs import DecisionLogs
from app_db._two_phase.decisions import Verdict
from app_db._two_phase.xids import new_unit_id
from app_db.errors import Problem, TwoPhaseUnavailable

log = logging.getLogger("app_db")


def check(logs: DecisionLogs) -> None:
    """Raise TwoPhaseUnavailable if the server of a two-phase connection can't prepare, or decisions can't be written.

    This connects to the two-phase connections and to the decision log. It creates the log if needed, writes a decision about no
    unit, and removes it. Without two-phase connections it does nothing.
    """
    problems = [*_servers(logs), *log_problems(logs)] if logs.two_phase() else []
    if problems:
        raise TwoPhaseUnavailable(problems)


def _servers(logs: DecisionLogs) -> Iterator[Problem]:
    for name in logs.two_phase():
        problem = _server(logs, name)
        if problem is not None:
            yield Problem(logs.variable("connections", name, "two_phase"), problem)


def _server(logs: DecisionLogs, name: str) -> str | None:
    verbs = logs.prepare_verbs(name)
    if verbs is None:
        return f"is not there for {logs.driver(name)}."
    try:
        with logs.engine(name).connect() as connection:
            return verbs.problem(connection)
    except Exception as error:
        log.debug("The server of %r can't be asked", name, exc_info=True)
        return f"the server can't be asked whether it can prepare ({described(error)})."


def log_problems(logs: DecisionLogs) -> Iterator[Problem]:
    """Yield what keeps decisions from being written to the configured log.

    This writes a decision about no unit, and removes it.
    """
    configured = logs.configured
    try:
        unit = new_unit_id(configured.id)  # asking for the id creates the log
        configured.decide(unit, Verdict.ABORT, [])
        configured.forget([unit])
    except Exception as error:
        log.debug("Nothing can be written to %s", configured.place, exc_info=True)
        yield Problem(logs.variable("decision_log"), f"decisions can't be written to {configured.place} ({described(error)}).")
