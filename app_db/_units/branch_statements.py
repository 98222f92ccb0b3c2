"""What a branch notices of the statements on its connection, and which of them it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import TYPE_CHECKING

from app_db._databases.database import PROTECTED
from app_db._databases.statements import (
    Effect,
    SavepointVerb,
    calls_code,
    effect_of,
    locks_rows,
    refused_to_readers,
    savepoint_verb,
    transaction_verb,
    writes_unnoticed,
)
from app_db.errors import InvalidUse, ReadOnlyViolation, SessionIsManaged, TransactionLost, UnitOfWorkEnded

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from app_db._units.interfaces import BranchConfig, BranchedWork


class BranchStatements:
    """The statements of one branch of a unit of work: what they do, and what they may not do."""

    effect = Effect.READS
    """The strongest effect of its statements, judged by their text, or by the database once that was asked."""
    has_ended_transaction = False
    """Whether a statement has ended the transaction."""
    was_rolled_back = False
    """Whether code has rolled it back by SQLAlchemy, so that nothing of it can be committed."""
    _rolled_back_by: int | None = None  # a thread
    _may_have_locked = False
    _writes_unnoticed = False
    _beginning: object = None
    _was_in_transaction = False
    _has_sent = False
    _is_marked = False
    _savepoints: tuple[tuple[str, Effect, bool], ...] = ()
    """By the order in which they were taken: name, effect by then, and whether nothing had changed."""
    _savepoint_sent: tuple[SavepointVerb, int, object] | None = None
    """The last statement about a savepoint, how many statements had failed before it, and what was changed by then."""
    _failures: Sequence[BaseException] = ()
    _done = Effect.READS
    """The strongest effect of the statements that did not fail, without the last one."""
    _last = Effect.READS
    """The effect of the last statement, unless it failed."""

    def __init__(self, work: BranchedWork, config: BranchConfig) -> None:
        self._work = work
        self.config = config
        self.name = config.name
        self.read_only = config.read_only or work.read_only
        self._connections: dict[Connection, dict[str, object]] = {}  # with their info: an invalidated one has none

    @property
    def wrote(self) -> bool:
        """Whether it has written, and so takes part in an atomic commit."""
        return self.effect >= Effect.MAY_WRITE and not self.read_only and not self.config.autonomous

    @property
    def lost_nothing(self) -> bool:
        """Whether it may be rolled back alone: it is a reader, or its user was denied each statement that would have written."""
        if self.config.read_only:
            return True
        if not self._failures or max(self._done, self._last) > Effect.LOCKS:
            return False
        return all(map(self.config.database.denies, self._failures))

    @property
    def connection(self) -> Connection:
        """Its first connection. A branch in an atomic commit has exactly one."""
        return next(iter(self._connections))

    def before_statement(self, statement: str) -> None:
        """Note the effect of a statement that is about to be sent, or raise if it is not allowed."""
        if self._rolled_back_by not in (None, get_ident()):
            raise UnitOfWorkEnded(f"The {self.name!r} session")  # another thread is aborting the unit
        database = self.config.database
        syntax = database.syntax
        verb = transaction_verb(statement, syntax)
        if verb is not None and not self._work.finishing:
            raise SessionIsManaged(self.name, verb, by_text=True)
        if database.tells_transaction and self._work.rehearsal is None:
            self._guard_transaction(statement)
        if self._savepoint_sent is not None:
            self._note_savepoint()
        savepoint = savepoint_verb(statement, syntax)
        if savepoint is not None:
            # Count now: what a cursor of the driver changes before the next statement came after this one.
            changes = None if self._beginning is None else database.note_beginning(self.connection)
            self._savepoint_sent = savepoint, len(self._failures), changes
        if self.read_only:
            self._guard_reader(statement)
        words = database.refused_in_unit(statement)
        if words is not None:
            raise InvalidUse(
                f"{words} can't be executed on the connection {self.name!r} in a unit of work, because later units would get it",
                database.instead_in_unit,
            )
        effect = effect_of(statement, syntax)
        self._done, self._last = max(self._done, self._last), effect
        if effect > self.effect:
            if effect is Effect.WRITES and self.read_only:
                raise ReadOnlyViolation(self.name, "The statement", not self.config.read_only)
            self.effect = effect
        if effect is not Effect.READS:
            self._may_have_locked = self._may_have_locked or locks_rows(statement, syntax)
            self._writes_unnoticed = self._writes_unnoticed or writes_unnoticed(statement, syntax)
        if self._work.time_limit is not None:
            self._work.time_limit.refuse_overtime()
        self._has_sent = not (self.read_only or self.config.autonomous)  # others may be in autocommit

    def _guard_reader(self, statement: str) -> None:
        """Refuse what may lift the protection, and close a connection whose protection is gone all the same."""
        syntax = self.config.database.syntax
        refused = None if effect_of(statement, syntax) is Effect.WRITES else refused_to_readers(statement, syntax)
        if refused is not None:
            raise ReadOnlyViolation(self.name, refused, not self.config.read_only)
        for connection, info in self._connections.items():
            if PROTECTED not in info or connection.closed or connection.invalidated:
                continue
            if self.config.database.may_write(connection.connection.driver_connection):
                connection.invalidate()
                raise ReadOnlyViolation(self.name, "A statement after one that lifted the protection", False)

    def _guard_transaction(self, statement: str) -> None:
        """Refuse what would end the transaction, and notice that it has ended behind the unit."""
        self.note_transaction()
        if self.has_ended_transaction:
            raise self.lost()
        database = self.config.database
        if self._was_in_transaction and database.commits_by_itself(statement):
            raise InvalidUse(
                f"The database of {self.name!r} would commit what the unit of work did so far before this "
                + statement.partition(" ")[0].upper(),
                "Execute it before the unit, or in a unit of its own",
            )
        if not self.config.autonomous and calls_code(statement, database.syntax):
            self._is_marked = True
            for connection in self._connections:
                database.mark_transaction(connection)

    def lost(self) -> TransactionLost:
        """Return the error of a transaction that is lost."""
        return TransactionLost(self.name, ended_by_statement=self.has_ended_transaction and not self.was_rolled_back)

    def note_transaction(self) -> None:
        """Note whether the transaction is open: by the last answer of the server, and by its mark after a call of code."""
        database = self.config.database
        is_marked, self._is_marked = self._is_marked, False
        if self._has_sent and database.begins_with_first_statement and not self._failures:
            self._was_in_transaction = True
        for connection in self._connections:
            if connection.closed or connection.invalidated:
                continue
            is_open = database.is_in_transaction(connection)
            has_ended = is_open is None or (self._was_in_transaction and not is_open)
            if has_ended or (is_marked and not database.has_kept_mark(connection)):
                self.has_ended_transaction = True
            elif is_open:
                self._was_in_transaction = True

    def _note_savepoint(self) -> None:
        """Keep what is known at a savepoint, and go back to that once the savepoint was rolled back to, unless that failed."""
        if self._savepoint_sent is None:
            return
        (verb, name), failures_before, changes = self._savepoint_sent
        self._savepoint_sent = None
        if len(self._failures) > failures_before:
            return
        if verb == "take":
            self._savepoints = (*self._savepoints, (name, self.effect, changes == self._beginning))
            return
        places = [place for place, (taken, _, _) in enumerate(self._savepoints) if taken == name]
        if not places:
            return
        if verb == "undo":
            _, self.effect, had_changed_nothing = self._savepoints[places[-1]]
            self._may_have_locked = True
            if had_changed_nothing:
                self._beginning = changes
        self._savepoints = self._savepoints[: places[-1] + (verb == "undo")]

    def ask_whether_it_wrote(self, *, also_if_certain: bool = False) -> None:
        """Ask the database whether the transaction has changed anything.

        With `also_if_certain` it is asked as well where the text of a statement says so: an UPDATE may have found no row.
        """
        if self.read_only or self.config.autonomous or self._writes_unnoticed or len(self._connections) != 1:
            return
        self._note_savepoint()
        if self._work.rehearsal is not None or (self.effect is Effect.WRITES and not also_if_certain):
            return
        known = self.effect  # which the question itself may change
        wrote = self.config.database.has_written(self.connection, self._beginning, may_have_locked=self._may_have_locked)
        if wrote is None:
            self.effect = known
        else:
            self.effect = max(known, Effect.MAY_WRITE) if wrote else min(known, Effect.LOCKS)

    def statement_failed(self, error: BaseException) -> BaseException | None:
        """Note that the database refused a statement. Return a clearer error, or None."""
        self._failures = [*self._failures, error]
        self._last = Effect.READS
        if self.read_only and self.config.database.refuses_write(error):
            return ReadOnlyViolation(self.name, "The statement", not self.config.read_only)
        limit = self._work.time_limit
        return None if limit is None else limit.overtime()
