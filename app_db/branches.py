"""One connection's share of one unit of work, and what is noticed of it while it goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from threading import get_ident
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from app_db.errors import ReadOnlyViolation, SessionIsManaged, UnitOfWorkEnded, UnitOfWorkTimeout
from app_db.statements import Effect, effect_of, lifts_read_only, transaction_verb

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import SessionTransaction
    from transaction import Transaction

    from app_db.dialects import Database

log = logging.getLogger("app_db")

BRANCH = "app_db_branch"
"""Key in a DBAPI connection's info: the branch that is using it."""


class Home(Protocol):
    """What a branch has to know of the connection whose share it is."""

    name: str
    read_only: bool
    autonomous: bool
    database: Database


class BranchedWork(Protocol):
    """What a branch has to know of the unit whose branch it is."""

    transaction: Transaction
    read_only: bool
    finishing: bool
    errors_afterwards: list[Exception]

    @property
    def timed(self) -> bool: ...
    def remaining(self) -> float: ...
    def overtime(self) -> UnitOfWorkTimeout | None: ...
    def refuse_overtime(self) -> None: ...


class BranchSession(Protocol):
    """What a branch has to know of the session that it is."""

    branch: Branch | None

    def get_transaction(self) -> SessionTransaction | None: ...
    def get_nested_transaction(self) -> SessionTransaction | None: ...
    def begin_nested(self) -> SessionTransaction: ...
    def flush(self) -> None: ...
    def invalidate(self) -> None: ...


class Branch:
    """One connection's share of one unit of work: zope.sqlalchemy's data manager, and what was noticed beside it."""

    effect = Effect.READS
    committed = False
    """Whether COMMIT was sent and answered."""
    tried = False
    """Whether it was told to commit: an autonomous one is told once, even if the unit aborts."""
    _rolled_back_by: int | None = None  # a thread
    _failures: Sequence[BaseException] = ()
    _usual_limits: Mapping[Connection, float] = MappingProxyType({})

    def __init__(self, work: BranchedWork, data_manager: Any, session: BranchSession, home: Home) -> None:
        self._work = work
        self._data_manager = data_manager
        self.session = session
        self.home = home
        self._connections: dict[Connection, dict[Any, Any]] = {}  # with their info, which an invalidated one doesn't give out

    @property
    def name(self) -> str:
        return self.home.name

    @property
    def read_only(self) -> bool:
        return self.home.read_only or self._work.read_only

    @property
    def wrote(self) -> bool:
        """Whether it takes part in the atomic commit."""
        return self.effect >= Effect.MAY_WRITE and not self.read_only and not self.home.autonomous

    @property
    def has_savepoints(self) -> bool:
        """Whether a savepoint of the unit is one of this connection, too."""
        return not (self.home.read_only or self.home.autonomous)

    @property
    def finished(self) -> bool:
        return self._data_manager.tx is None

    def uses(self, connection: Connection) -> None:
        """Note that the session has begun on `connection`."""
        if connection in self._connections:
            return
        info = self._connections[connection] = connection.info
        info[BRANCH] = self
        if self._work.timed:
            self.apply_time_limit()

    def apply_time_limit(self) -> None:
        """Have the server stop statements that take longer than the unit has left; what it does by itself stays the least."""
        database, remaining = self.home.database, self._work.remaining()
        for connection in self._connections:
            if connection not in self._usual_limits:
                self._usual_limits = {**self._usual_limits, connection: database.statement_limit(connection)}
            database.limit_statements(connection, min(remaining, self._usual_limits[connection]))

    def before_statement(self, statement: str) -> None:
        """Note what a statement does, and refuse what can't be allowed before it is sent."""
        if self._rolled_back_by not in (None, get_ident()):
            raise UnitOfWorkEnded(f"The {self.name!r} session")  # the thread goes on while its unit is being aborted
        verb = transaction_verb(statement)
        if verb is not None and not self._work.finishing:
            raise SessionIsManaged(self.name, verb)
        if self.read_only and lifts_read_only(statement):
            raise ReadOnlyViolation(self.name, "Lifting the protection", not self.home.read_only)
        effect = effect_of(statement)
        if effect > self.effect:
            if effect is Effect.WRITES and self.read_only:
                raise ReadOnlyViolation(self.name, "The statement", not self.home.read_only)
            self.effect = effect
        if self._work.timed:
            self._work.refuse_overtime()

    def statement_failed(self, error: BaseException) -> BaseException | None:
        """Note that the database refused a statement; return the error that says better what happened, if there is one."""
        self._failures = [*self._failures, error]
        if self.read_only and self.home.database.refuses_write(error):
            return ReadOnlyViolation(self.name, "The statement", not self.home.read_only)
        return self._work.overtime()

    def refuse_foreign_commit(self) -> None:
        """Raise unless it is the unit of work that commits."""
        if not self._work.finishing:
            raise SessionIsManaged(self.name, "connection().commit")

    def note_commit(self) -> None:
        """Note that the database has committed: what fails from here on fails afterwards."""
        self.committed = True

    def has_lost_transaction(self) -> bool:
        """Return whether the database would answer COMMIT with a rollback."""
        transaction: SessionTransaction | None = self._data_manager.tx
        if transaction is None:
            return False
        nested = self.session.get_nested_transaction()
        if self.session.get_transaction() is not transaction or not transaction.is_active or (nested and not nested.is_active):
            return True
        if self.effect is Effect.READS:
            return False
        database = self.home.database
        if not self._failures:
            return self.wrote and any(database.has_ended_transaction(connection) for connection in self._connections)
        return any(database.has_lost_transaction(connection, self._failures) for connection in self._connections)

    def commit(self) -> None:
        """Commit, return the connection to its pool and detach the objects."""
        self.tried = True
        try:
            self._data_manager.tpc_vote(self._work.transaction)
        except Exception as error:
            if not self.committed:
                raise
            log.exception("The connection %r has committed, and then a listener of its session failed", self.name)
            self._work.errors_afterwards.append(error)
            self.roll_back()
        self._let_go()

    def roll_back(self) -> None:
        """Roll back and return the connection to its pool, or close it when it can't be rolled back.

        Only an interruption is raised, after the connection was closed.
        """
        if self.finished:
            return
        self._rolled_back_by = get_ident()
        try:
            # The rollback comes first: closing alone leaves a transaction open whose COMMIT was refused.
            self._data_manager.tx.rollback()
        except BaseException as error:
            log.debug("Rolling back %r failed; its connection is closed instead", self.name, exc_info=True)
            self.session.invalidate()
            if not isinstance(error, Exception):
                raise
        finally:
            self._data_manager.abort(self._work.transaction)
            self._let_go()

    def savepoint(self) -> SessionTransaction:
        """Flush, and take a savepoint."""
        return self.session.begin_nested()

    def _let_go(self) -> None:
        for info in self._connections.values():
            info.pop(BRANCH, None)
        self.session.branch = None  # a circle would keep both until the collector comes by


def position(branch: Branch) -> tuple[int, str]:
    """Return where a branch stands in the order in which the branches of a unit are committed."""
    # Autonomous ones first, since their fate is their own. Readers before writers, because only a reader's COMMIT tells
    # whether what it read was consistent. Lockers last: their locks guard what the writers write.
    if branch.home.autonomous:
        group = 0
    elif branch.wrote:
        group = 2
    else:
        group = 3 if branch.effect is Effect.LOCKS else 1
    return group, branch.name
