"""Commit the branches of a unit of work: one after the other, or together by two-phase commit.

Two-phase commit takes four steps:

1. Choose the decision log. The unit's id contains the id of the log.
2. Prepare every branch but the last resource. A prepared database promises that it can commit.
3. Write the decision to commit into the log, durably.
4. Tell every branch to commit.

If the process dies in between, it leaves prepared branches, and perhaps a decision. Recovery
commits the branches if there is a decision, and rolls them back if there is none. Steps 2 and 4
address all branches at once, so each takes as long as the slowest branch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.util.concurrency import await_only

from app_db._databases.concurrent_statements import (
    Answer,
    AwaitedConnection,
    NonBlockingConnection,
    Outcome,
    Results,
    execute_together,
    execute_together_async,
)
from app_db._databases.statements import Effect
from app_db._two_phase.decisions import DecisionLog, Verdict
from app_db._two_phase.xids import log_of
from app_db._units.branch_connections import Stage
from app_db._units.branches import Branch, position
from app_db._units.off_loop import BranchOffLoop, off_loop, own_threads
from app_db._units.overlays import Overlay
from app_db.errors import (
    AbortedByRecovery,
    CommitUnconfirmed,
    DecisionFileUnusable,
    InvalidUse,
    OutcomeUnknown,
    PartialCommit,
    TransactionLost,
)

if TYPE_CHECKING:
    from app_db._databases.time_limits import TimeLimit
    from app_db._two_phase.decision_logs import DecisionLogs
    from app_db._units.interfaces import Rehearsal

log = logging.getLogger("app_db")

P = ParamSpec("P")
R = TypeVar("R")


class CommittingWork(Protocol):
    """The unit of work, as its commit sees it."""

    asynchronous: bool
    branches: list[Branch]
    errors_afterwards: list[Exception]
    interruption: BaseException | None
    time_limit: TimeLimit | None
    decided: bool
    rehearsal: Rehearsal | None

    @property
    def unit_id(self) -> str: ...
    def name_unit(self, decided_in: DecisionLog) -> str: ...
    @property
    def places(self) -> DecisionLogs: ...


def flush_for_good(overlays: Sequence[Overlay], branches: Sequence[Branch]) -> None:
    """Do everything that precedes COMMIT on every session. A listener may write to another session, or make one join."""
    for part in chain[Overlay | Branch](overlays, branches):  # the lists may grow meanwhile
        part.flush_for_good()
    late = next((part.name for part in chain[Overlay | Branch](overlays, branches) if part.has_unflushed), None)
    if late is not None:
        raise InvalidUse(
            f"A listener to before_commit changed objects of the {late!r} session after their last flush",
            "Change them in a before_commit hook of the unit of work",
        )


def commit_branches(work: CommittingWork) -> None:
    """Commit several branches: together those that wrote, if at most one of them can't be prepared."""
    waiting = sorted(work.branches, key=position)
    written = [branch for branch in waiting if branch.wrote]
    if len(written) < 2 or len(unpreparable(written)) > 1:
        commit_one_by_one(waiting)
        return
    first = waiting.index(written[0])
    commit_one_by_one(waiting[:first])
    if work.rehearsal is None:
        AtomicCommit(work, written).run()
    else:
        _rehearse_commit(work.rehearsal, written)
    for branch in waiting[first + len(written) :]:
        commit_or_log(branch)


def _rehearse_commit(rehearsal: Rehearsal, written: list[Branch]) -> None:
    """Commit without preparing, in a test that rolls everything back."""
    for branch in written:
        branch.check_commit(rehearsal)
    commit_one_by_one(written)


def unpreparable(branches: Sequence[Branch]) -> list[Branch]:
    return [branch for branch in branches if not branch.can_prepare]


def commit_one_by_one(waiting: list[Branch]) -> None:
    """Commit branches in this order. If one fails, the error lists those that have committed."""
    committed: list[str] = []
    while waiting:
        branch = waiting.pop(0)
        if committed and branch.effect is Effect.LOCKS:
            commit_or_log(branch)
            continue
        try:
            branch.commit()
        except BaseException as error:
            if branch.wrote and _is_lost(error):
                raise OutcomeUnknown(branch.name, committed) from error
            if branch.wrote and branch.is_commit_unanswered and not isinstance(error, DBAPIError):
                error.add_note(str(OutcomeUnknown(branch.name, committed)))  # an exception from outside keeps its type
                raise
            if committed:
                partial = PartialCommit(committed, branch.name, [other.name for other in waiting if other.wrote])
                if isinstance(error, Exception):
                    raise partial from error
                error.add_note(str(partial))  # an interruption keeps its type
            raise
        if waiting and branch.wrote:
            committed.append(branch.name)


def commit_or_log(branch: Branch) -> None:
    """Commit a branch. If that fails, log it: it must not change how the unit ends."""
    try:
        if branch.has_lost_transaction():
            raise TransactionLost(branch.name)
        branch.commit()
    except Exception:
        log.exception("The connection %r could not be committed", branch.name)
        branch.roll_back()


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, DBAPIError) and error.connection_invalidated


class AtomicCommit:
    """Prepare, decide and commit one unit."""

    def __init__(self, work: CommittingWork, written: Sequence[Branch]) -> None:
        self._work = work
        self._written = written
        self._last = self._last_resource()
        self._prepared = [branch for branch in written if branch is not self._last]
        self._log: DecisionLog = work.places.configured if self._last is None else work.places.of(self._last.name)
        self._logs = [self._log]
        """The logs that have a record of the unit once it is decided."""

    def run(self) -> None:
        """Commit, or roll everything back and raise. After the decision to commit it raises nothing.

        An exception from outside may arrive between any two steps. After `_prepare` only the log
        knows how the unit ends. So nothing is rolled back then without asking the log; recovery
        settles what is still prepared.
        """
        try:
            self._apart(self._settle_on_log)
            self._prepare()
            if self._work.time_limit is not None:
                self._work.time_limit.refuse_overtime()
        except BaseException:
            self._take_back()
            raise
        refusal = self._decide()
        if refusal is not None:
            self._take_back()
            raise refusal
        self._commit_prepared()

    def _apart(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function of a decision log, which blocks: in a thread, if a coroutine ends the unit."""
        return off_loop(function, *args, **kwargs) if self._work.asynchronous else function(*args, **kwargs)

    def _last_resource(self) -> Branch | None:
        """Return the branch whose own COMMIT is the decision, or None.

        It is the branch that can't be prepared, or else one whose database has a table of
        decisions: that saves a write.
        """
        places = self._work.places
        candidates = unpreparable(self._written) or [branch for branch in self._written if places.are_in(branch.name)]
        return candidates[0] if candidates else None

    def _settle_on_log(self) -> None:
        """Make the xids of prepared branches lead recovery to the log in which the unit is decided."""
        unit, decides = self._work.name_unit(self._log), self._log.id
        if log_of(unit) == decides:
            return
        # A branch has begun by its xid, before the last resource was known.
        named_after = self._work.places.configured
        if log_of(unit) != named_after.id:
            raise InvalidUse("The decision log was replaced while a unit of work was under way", "Run the unit again")
        if named_after.decide(unit, Verdict.MOVED, [decides, *self._names]) is Verdict.ABORT:
            raise AbortedByRecovery(unit)
        self._logs.append(named_after)

    # -- prepare

    def _prepare(self) -> None:
        words = {branch: branch.verbs.prepare(branch.xid) for branch in self._prepared}
        if self._last is not None:
            words |= self._words_of_decision(self._last)
        for branch in self._prepared:
            branch.stage = Stage.PREPARED  # it may be prepared from here on
        asked = _exchange(words)
        for branch in asked.with_outcome(Outcome.REFUSED):
            branch.stage = Stage.ACTIVE
        if asked.interruption is not None:
            raise asked.interruption
        for branch, answer in asked.answers.items():
            if answer.error is not None:
                self._raise_refusal(branch, words[branch][-1], answer.error)

    def _words_of_decision(self, last: Branch) -> dict[Branch, list[str]]:
        """Return the statement that writes the decision in the last resource's transaction.

        If the database can't take part in the exchange, write the decision now and return nothing.
        """
        table, unit, names = self._work.places.of(last.name), self._work.unit_id, self._names
        if last.config.verbs is not None:
            return {last: [table.statement(unit, names)]}
        try:
            if isinstance(last, BranchOffLoop):
                off_loop(table.decide_within, last.connection, unit, names)
            else:
                table.decide_within(last.connection, unit, names)
        except IntegrityError as error:
            raise AbortedByRecovery(unit) from error
        return {}

    @property
    def _names(self) -> list[str]:
        return sorted({branch.name for branch in self._prepared})

    def _raise_refusal(self, branch: Branch, statement: str, error: BaseException) -> None:
        better = branch.better_error(statement, error)
        if branch is self._last and isinstance(better, IntegrityError):
            raise AbortedByRecovery(self._work.unit_id) from better
        overtime = None if self._work.time_limit is None else self._work.time_limit.overtime()
        if overtime is not None:
            raise overtime from better
        raise better from None if better is error else error

    # -- decide

    def _decide(self) -> BaseException | None:
        """Decide to commit. Return the error if the decision is to abort."""
        try:
            stands = self._decision_to_commit()
        except BaseException as error:  # noqa: BLE001  # returned, or raised when the unit has ended
            if self._last is not None and self._last.committed:
                stands = Verdict.COMMIT
            elif self._last is not None and isinstance(error, DBAPIError) and not _is_lost(error):
                return error  # its database refused the COMMIT that is the decision
            elif isinstance(error, DecisionFileUnusable) and error.undecided:
                return error  # no decision is written and none will be: that means abort
            else:
                stands = self._settle_doubt(error)
                if stands is Verdict.ABORT:
                    return error
            if not isinstance(error, DBAPIError):
                self._work.interruption = error  # from outside, or from a listener: the unit commits anyway
        return AbortedByRecovery(self._work.unit_id) if stands is Verdict.ABORT else None

    def _decision_to_commit(self) -> Verdict:
        if self._last is None:
            return self._apart(self._log.decide, self._work.unit_id, Verdict.COMMIT, self._names)
        self._last.commit()
        return Verdict.COMMIT

    def _settle_doubt(self, doubt: BaseException) -> Verdict:
        """Find out whether a decision was written whose answer got lost: try to decide ABORT, and the first decision wins."""
        try:
            if self._last is not None:
                self._last.abandon()
            return self._apart(self._log.decide, self._work.unit_id, Verdict.ABORT, self._names)
        except BaseException as error:  # noqa: BLE001  # one of the two errors is raised
            for branch in self._prepared:
                branch.abandon()
            unknown = OutcomeUnknown(self._log.place, prepared=self._names)
            if isinstance(error, Exception) and isinstance(doubt, Exception):
                raise unknown from doubt
            interruption = doubt if isinstance(error, Exception) else error
            interruption.add_note(str(unknown))
            raise interruption from None

    # -- carry out what was decided

    def _commit_prepared(self) -> None:
        self._work.decided = True
        unconfirmed = [branch.name for branch in self._tell(commit=True)]
        for branch in self._written:
            branch.end_session()
        if unconfirmed:
            error = CommitUnconfirmed(sorted(unconfirmed))
            log.error("%s", error)
            self._work.errors_afterwards.append(error)
        else:
            for decision_log in self._logs:
                self._apart(self._work.places.acknowledged, decision_log, self._work.unit_id)

    def _take_back(self) -> None:
        for branch in self._tell(commit=False):
            log.warning("%r stays prepared as %s until it is recovered", branch.name, branch.xid)

    def _tell(self, *, commit: bool) -> list[Branch]:
        """Tell all prepared branches how they end. Return those that may not have received it."""
        prepared = [branch for branch in self._prepared if branch.stage is Stage.PREPARED]
        told = _exchange({branch: _words_of_end(branch, commit) for branch in prepared})
        if told.interruption is not None:
            self._work.interruption = told.interruption
        return [branch for branch in prepared if not self._has_heard(branch, told.answers[branch], commit)]

    def _has_heard(self, branch: Branch, answer: Answer, commit: bool) -> bool:
        branch.stage = Stage.ENDED
        if answer.outcome is Outcome.DONE or (answer.error is not None and branch.verbs.is_missing(answer.error)):
            return True
        log.warning("%r did not answer when it was told how the unit ends", branch.name, exc_info=answer.error)
        branch.abandon()
        return branch.settle_elsewhere(commit=commit)


def _exchange(words: dict[Branch, list[str]]) -> Results[Branch]:
    if any(branch.config.asynchronous or isinstance(branch, BranchOffLoop) for branch in words):
        return await_only(
            execute_together_async({branch: (_any_channel(branch), said) for branch, said in words.items()}, own_threads())
        )
    return execute_together({branch: (_channel(branch), said) for branch, said in words.items()})


def _any_channel(branch: Branch) -> NonBlockingConnection | AwaitedConnection:
    if branch.config.asynchronous:
        return branch.verbs.awaited(branch.connection.connection.dbapi_connection)
    return _channel(branch)


def _channel(branch: Branch) -> NonBlockingConnection:
    return branch.verbs.non_blocking(branch.driver_connection)


def _words_of_end(branch: Branch, commit: bool) -> list[str]:
    return branch.verbs.commit_prepared(branch.xid) if commit else branch.verbs.roll_back_prepared(branch.xid)
