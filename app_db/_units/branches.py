"""Branches: the share of one connection in a unit of work, with or without a session."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Protocol, cast

from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError

from app_db._compat.clocks import monotonic
from app_db._databases.interruptions import came_from_outside
from app_db._databases.statements import Effect
from app_db._units.branch_connections import BRANCH, BranchConnection, Stage
from app_db._units.interfaces import TakingPart
from app_db.errors import InvalidUse

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, RootTransaction
    from sqlalchemy.orm import SessionTransaction
    from transaction import Transaction

    from app_db._units.interfaces import BranchConfig, BranchedWork, Rehearsal

log = logging.getLogger("app_db")

PATIENCE = 10.0
"""Seconds for which the end of a unit waits until another thread has left one of its sessions."""


class BranchSession(TakingPart, Protocol):
    """The session of a branch."""

    branch: Branch | None

    @property
    def config(self) -> BranchConfig: ...
    def connection(self) -> Connection: ...
    def close(self) -> None: ...
    def invalidate(self) -> None: ...
    def take_over(self, branch: Branch, connection: Connection, transaction: RootTransaction) -> None: ...
    def take_part(self) -> None: ...
    def undo(self) -> None: ...


class SessionDataManager(Protocol):
    """zope.sqlalchemy's data manager of a session."""

    session: BranchSession
    tx: SessionTransaction | None
    keep_session: bool

    def tpc_vote(self, trans: Transaction) -> None: ...
    def abort(self, trans: Transaction) -> None: ...


class Branch(BranchConnection):
    """One connection's share of one unit of work, with or without a session."""

    tried = False
    """Whether `commit()` was called. An autonomous branch is committed once, even if the unit aborts."""
    _is_flushed_for_good = False
    _is_beginning = False
    _has_ended = False

    def __init__(self, work: BranchedWork, config: BranchConfig, make_session: Callable[[], BranchSession] | None = None) -> None:
        super().__init__(work, config)
        self.session: BranchSession | None = None
        """None until a session of the connection is asked for. A routing session needs only the connection."""
        self._make_session = make_session
        self._lock = None if make_session is None else RLock()  # reentrant: a listener may call back
        self._data_manager: SessionDataManager | None = None  # where there is a session
        self._transaction: SessionTransaction | RootTransaction | None = None
        self._own_connection: Connection | None = None

    @property
    def has_savepoints(self) -> bool:
        """Whether the unit's savepoints are taken on this connection."""
        return not (self.config.read_only or self.config.autonomous)

    @property
    def finished(self) -> bool:
        return self._has_ended if self._data_manager is None else self._data_manager.tx is None

    def join(self, data_manager: SessionDataManager) -> None:
        """Take the session and the transaction of a data manager that zope.sqlalchemy has made."""
        self._data_manager, self.session, self._transaction = data_manager, data_manager.session, data_manager.tx

    def begun_connection(self) -> Connection:
        """Return the connection, in the transaction of this branch. Begin one if there is none."""
        if self.session is not None:
            return self.session.connection()
        if self._own_connection is not None and not self._is_beginning:
            return self._own_connection
        with self._guarded():
            if self.session is not None:
                return self.session.connection()
            self._is_beginning = True
        try:
            return self._begin()
        finally:
            self._is_beginning = False

    def _begin(self) -> Connection:
        config = self.config
        if not self.read_only:
            config.make_log()
        config.note_next_checkout(self._work)
        connection = config.engine_for(self._work).connect()
        try:
            self._own_connection, self._transaction = connection, connection.begin()
            config.coordinator.get().add(self)
        except BaseException:
            self._own_connection = self._transaction = None
            connection.close()  # for example if the unit was aborted while a thread waited for the connection
            raise
        config.watch(connection)
        self.uses(connection)
        return connection

    def give_to(self, session: BranchSession) -> BranchSession:
        """Let `session` continue this branch, and return it. If another thread was first, return that thread's session."""
        with self._guarded():
            if self.session is None:
                self.session = session
                try:
                    if self._own_connection is not None:
                        session.take_over(self, self._own_connection, cast("RootTransaction", self._transaction))
                        self._own_connection = None
                except BaseException:
                    self.session = None
                    raise
            return self.session

    @contextmanager
    def _guarded(self) -> Generator[None]:
        with self._lock or nullcontext():
            if self._is_beginning:
                raise InvalidUse(
                    f"The connection {self.name!r} can't be used, because another thread of the unit of work waits for it",
                    "Let the threads of a unit use its sessions one after the other",
                )
            yield

    @property
    def current_transaction(self) -> SessionTransaction | RootTransaction | None:
        """The innermost savepoint of its session, or else the transaction."""
        if self.session is not None:
            return self.session.current_transaction
        return None if self._own_connection is None else self._transaction

    def has_lost_transaction(self) -> bool:
        """Return whether the database would roll back on COMMIT."""
        transaction = self._transaction
        if transaction is None:
            return False
        if self.session is not None:
            nested = self.session.get_nested_transaction()
            if self.session.get_transaction() is not transaction or (nested and not nested.is_active):
                return True
        if not (transaction.is_active or self._is_flushed_for_good):
            return True
        if self.effect is Effect.READS:
            return False
        if self.config.database.tells_transaction and self._work.rehearsal is None:
            self.note_transaction()
        return self.has_ended_transaction or any(map(self.has_lost_transaction_on, self._connections))

    def check_commit(self, rehearsal: Rehearsal) -> None:
        """Raise the errors of a PREPARE, in an isolated test that sends none."""
        try:
            rehearsal.check_commit(self.connection)
        except Exception as error:
            raise self.better_error("COMMIT", error) from error

    def flush_for_good(self) -> None:
        """Do everything that precedes COMMIT, including `before_commit` listeners. The session refuses SQL afterwards."""
        if self.session is not None:
            self.session.flush_for_good()
        self._is_flushed_for_good = True

    @property
    def has_unflushed(self) -> bool:
        """Whether objects of its session were changed after the last flush."""
        return self.session is not None and self.session.has_unflushed

    def end_session(self) -> None:
        """Close the session and the connection of a branch that its xid has committed."""
        if self.finished:
            return
        if self.connection.invalidated:
            self.roll_back()
            return
        try:
            self.commit()  # sends nothing, because the stage is ENDED
        except Exception:
            log.exception("The session of %r could not be ended after its commit", self.name)
            self.roll_back()

    def commit(self) -> None:
        """Commit, return the connection to its pool and detach the objects."""
        self.tried = True
        try:
            if self._data_manager is not None:
                self._data_manager.tpc_vote(self._work.transaction)  # commits, and closes the session
            else:
                self._commit_without_session()
        except Exception as error:
            if not self.committed:
                raise
            log.exception("The connection %r has committed, and then a listener of its session failed", self.name)
            if came_from_outside(error):
                self._work.interruption = error
            else:
                self._work.errors_afterwards.append(error)
            self.roll_back()
        self._let_go()

    def _commit_without_session(self) -> None:
        if self._transaction is not None and self._own_connection is not None:
            self._transaction.commit()
            self._close_session()

    def roll_back(self) -> None:
        """Roll back and return the connection to its pool. If that fails, close the connection.

        It raises only interruptions, after the connection was closed.
        """
        if self.finished:
            return
        self._rolled_back_by = get_ident()
        if self.stage is Stage.PREPARED:
            self.abandon()  # interrupted before it was told how the unit ends: recovery settles it
        try:
            # Roll back first: closing the session leaves a transaction open whose COMMIT was refused.
            self._roll_back_transaction()
        except BaseException as error:
            log.debug("Rolling back %r failed; its connection is closed instead", self.name, exc_info=True)
            try:
                if self.session is None:
                    self._close_connections()
                else:
                    self.session.invalidate()
            except InvalidRequestError:  # SQLAlchemy was interrupted in the session, or a thread is in it
                self._close_connections()
            if not isinstance(error, Exception):
                raise
        finally:
            with suppress(InvalidRequestError):
                self._close_session()
            self._let_go()

    def _close_session(self) -> None:
        """Close the session, or the connection if there is no session. The connection returns to its pool."""
        if self._data_manager is not None:
            self._abort_data_manager(self._data_manager)
        elif self._own_connection is not None:
            connection, self._own_connection, self._has_ended = self._own_connection, None, True
            connection.close()

    def _abort_data_manager(self, data_manager: SessionDataManager) -> None:
        try:
            data_manager.abort(self._work.transaction)
        except KeyError:
            if data_manager.tx is None:  # it is a listener's
                raise
            # An exception from outside came between two lines of zope.sqlalchemy, which did not note the session.
            session, data_manager.tx = data_manager.session, None
            session.close()

    def _roll_back_transaction(self) -> None:
        # Another thread may be in the session, such as the worker of a cancelled coroutine. If the session were closed now,
        # that thread would go on with a new connection.
        give_up = monotonic() + PATIENCE
        while self.session is not None and self.session.is_flushing and monotonic() < give_up:
            time.sleep(0.005)
        while True:
            try:
                if self._transaction is not None:
                    self._transaction.rollback()
            except IllegalStateChangeError:  # it is waiting for its connection
                if monotonic() > give_up:
                    raise
                time.sleep(0.005)
            else:
                return

    def restart(self, end: Callable[[], None]) -> None:
        """End the transaction of the session by `end`, and let the session, with its objects, take part in the unit again."""
        session, data_manager = self.session, self._data_manager
        if session is None or data_manager is None:
            raise InvalidUse(f"The connection {self.name!r} has no session", "Ask the container for it first")
        end()
        data_manager.keep_session = True
        data_manager.abort(self._work.transaction)  # zope.sqlalchemy forgets the session
        self._let_go()
        session.take_part()

    def abandon_work(self) -> None:
        """Close the connection after an exception from outside, which may have interrupted the session or the driver halfway.

        The driver may still wait for an answer, so nothing is sent: the server rolls back, and
        recovery settles what is prepared. If the driver never waits (SQLite), the branch is rolled
        back and the connection returns to its pool.
        """
        if self.finished:
            return
        self._rolled_back_by = get_ident()
        try:
            if self._may_be_rolled_back() and self._transaction is not None:
                self._transaction.rollback()
            else:
                self._close_connections()
        except Exception:
            log.debug("Rolling back %r failed; its connection is closed instead", self.name, exc_info=True)
            self._close_connections()
        with suppress(Exception):
            self._close_session()
        self._let_go()

    def _may_be_rolled_back(self) -> bool:
        if self.config.asynchronous:
            return False  # nothing can be awaited here
        return self._work.rehearsal is not None or not self.config.database.waits_for_answers

    def flush(self) -> None:
        if self.session is not None:
            self.session.flush()

    def savepoint(self) -> SessionTransaction:
        """Flush, take a savepoint and return it. The session raises InvalidUse if the database has no savepoints."""
        if self.session is None:  # a session is needed for nested transactions
            cast("Callable[[], BranchSession]", self._make_session)()
        return cast("BranchSession", self.session).begin_nested()

    def roll_back_to(self, savepoint: SessionTransaction) -> None:
        savepoint.rollback()

    def release(self, savepoint: SessionTransaction) -> None:
        savepoint.commit()

    def _let_go(self) -> None:
        for info in self._connections.values():
            info.pop(BRANCH, None)
        self._has_ended, self._transaction = True, None
        if self._work.connections.get(self.name) is self:
            del self._work.connections[self.name]
        if self.session is not None:
            self.session.branch = None  # breaks a reference cycle, so that both are freed at once


def position(branch: Branch) -> tuple[int, str]:
    """Return the sort key by which the branches of a unit are committed."""
    # Autonomous branches first: they commit in any case. Readers before writers: only COMMIT tells a reader whether what it
    # read was consistent. Branches with locks last: their locks guard what the writers write.
    if branch.config.autonomous:
        group = 0
    elif branch.wrote:
        group = 2
    else:
        group = 3 if branch.effect is Effect.LOCKS else 1
    return group, branch.name
