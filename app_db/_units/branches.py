"""One connection's share of one unit of work, and what is noticed of it while it goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from enum import Enum
from functools import cache, partial
from threading import RLock, get_ident
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from sqlalchemy.exc import DBAPIError, IllegalStateChangeError, InvalidRequestError
from sqlalchemy.util.concurrency import await_only, in_greenlet

from app_db._compat.os import after_fork_in_child
from app_db._databases.interruptions import came_from_outside, interrupted
from app_db._databases.prepare_verbs import PrepareVerbs, Settling
from app_db._databases.statements import Effect, effect_of, lifts_read_only, transaction_verb
from app_db.errors import InvalidUse, ReadOnlyViolation, SessionIsManaged, UnitOfWorkEnded, UnitOfWorkTimeout

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine, RootTransaction
    from sqlalchemy.orm import SessionTransaction
    from transaction import Transaction

    from app_db._databases.database import Database
    from app_db._two_phase.xids import Xid

log = logging.getLogger("app_db")

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE = 10.0
"""Seconds for which the end of a unit waits until another thread has left one of its sessions."""

BRANCH = "app_db_branch"
"""Key in a DBAPI connection's info: the branch that is using it."""


class Home(Protocol):
    """What a branch has to know of the named connection whose share it is."""

    name: str
    read_only: bool
    autonomous: bool
    asynchronous: bool
    two_phase: bool
    database: Database
    verbs: PrepareVerbs | None

    @property
    def coordinator(self) -> Units: ...
    def engine_for(self, work: Any) -> Engine: ...
    def make_log(self) -> None: ...
    def note_next_checkout(self, work: Any) -> None: ...
    def watch(self, connection: Connection) -> None: ...


class Units(Protocol):
    """Finds the unit that is under way."""

    def get(self) -> BranchedWork: ...


class BranchedWork(Protocol):
    """What a branch has to know of the unit whose branch it is."""

    transaction: Transaction
    read_only: bool
    finishing: bool
    errors_afterwards: list[Exception]
    interruption: BaseException | None
    connections: dict[str, Branch]
    rehearsal: Any

    def add(self, branch: Branch) -> None: ...
    def xid_for(self, branch: Branch) -> Xid: ...
    @property
    def timed(self) -> bool: ...
    def remaining(self) -> float: ...
    def overtime(self) -> UnitOfWorkTimeout | None: ...
    def refuse_overtime(self) -> None: ...


class TakingPart(Protocol):
    """What a unit has to know of a session that takes part in it."""

    @property
    def has_unflushed(self) -> bool: ...
    @property
    def is_flushing(self) -> bool: ...
    @property
    def current_transaction(self) -> SessionTransaction | None: ...
    def get_transaction(self) -> SessionTransaction | None: ...
    def get_nested_transaction(self) -> SessionTransaction | None: ...
    def begin_nested(self) -> SessionTransaction: ...
    def flush(self) -> None: ...
    def flush_for_good(self) -> None: ...


class BranchSession(TakingPart, Protocol):
    """What a branch has to know of its session."""

    branch: Branch | None

    def connection(self) -> Connection: ...
    def invalidate(self) -> None: ...
    def take_over(self, branch: Branch, connection: Connection, transaction: RootTransaction) -> None: ...


class Stage(Enum):
    """How far a branch is, as far as its database knows of it."""

    ACTIVE = "active"
    """Its transaction is open."""
    PREPARED = "prepared"
    """It has been asked to prepare, and may have done so: only by its xid can it be ended."""
    ENDED = "ended"
    """It was ended by its xid, or is left to recovery: nothing more may be sent."""


class Branch:
    """One connection's share of one unit of work: zope.sqlalchemy's data manager, and what was noticed beside it."""

    effect = Effect.READS
    committed = False
    """Whether COMMIT was sent and answered."""
    is_commit_unanswered = False
    """Whether COMMIT was sent, and how the database answered is not known yet."""
    tried = False
    """Whether it was told to commit: an autonomous one is told once, even if the unit aborts."""
    stage = Stage.ACTIVE
    _xid: str | None = None
    _begun_by_xid = False
    _is_flushed_for_good = False
    _rolled_back_by: int | None = None  # a thread
    _is_beginning = False
    _has_ended = False
    _failures: Sequence[BaseException] = ()
    _usual_limits: Mapping[Connection, float] = MappingProxyType({})

    def __init__(self, work: BranchedWork, home: Home, make_session: Callable[[], BranchSession] | None = None) -> None:
        self._work = work
        self.home = home
        self.name = home.name
        self.read_only = home.read_only or work.read_only
        self.session: BranchSession | None = None
        """None until a session of the connection is asked for: the one that finds its database needs the connection only."""
        self._make_session = make_session
        self._lock = None if make_session is None else RLock()  # a thread that has it may come back, by a listener
        self._data_manager: Any = None  # zope.sqlalchemy's, where there is a session
        self._transaction: SessionTransaction | RootTransaction | None = None
        self._own_connection: Connection | None = None
        self._connections: dict[Connection, dict[Any, Any]] = {}  # with their info, which an invalidated one doesn't give out

    @property
    def wrote(self) -> bool:
        """Whether it takes part in the atomic commit."""
        return self.effect >= Effect.MAY_WRITE and not self.read_only and not self.home.autonomous

    @property
    def has_savepoints(self) -> bool:
        """Whether a savepoint of the unit is one of this connection, too."""
        return not (self.home.read_only or self.home.autonomous)

    @property
    def can_prepare(self) -> bool:
        """Whether it can be prepared, so that others may commit together with it."""
        return self.home.two_phase and self.home.verbs is not None and len(self._connections) == 1

    @property
    def verbs(self) -> PrepareVerbs:
        """How its database prepares. Raises InvalidUse where it doesn't."""
        if self.home.verbs is None:
            raise InvalidUse(f"The connection {self.name!r} can't be prepared", "Set its two_phase to false")
        return self.home.verbs

    @property
    def xid(self) -> str:
        """The name by which its database knows it."""
        if self._xid is None:
            self._xid = str(self._work.xid_for(self))
        return self._xid

    @property
    def connection(self) -> Connection:
        """Its connection; a branch that takes part in an atomic commit has exactly one."""
        return next(iter(self._connections))

    @property
    def connections(self) -> Iterable[Connection]:
        """All connections that its session has begun on."""
        return self._connections

    @property
    def finished(self) -> bool:
        """Whether its transaction has ended."""
        return self._has_ended if self._data_manager is None else self._data_manager.tx is None

    # -- how it begins

    def join(self, data_manager: Any) -> None:
        """Be the branch of a session, by the data manager that zope.sqlalchemy has made."""
        self._data_manager, self.session, self._transaction = data_manager, data_manager.session, data_manager.tx

    def begun_connection(self) -> Connection:
        """Return the connection, in the transaction of this branch. It begins one where there is neither one nor a session."""
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
        home = self.home
        if not self.read_only:
            home.make_log()
        home.note_next_checkout(self._work)
        connection = home.engine_for(self._work).connect()
        try:
            self._own_connection, self._transaction = connection, connection.begin()
            home.coordinator.get().add(self)
        except BaseException:
            self._own_connection = self._transaction = None
            connection.close()  # the unit was aborted while a thread waited for the connection, for example
            raise
        home.watch(connection)
        self.uses(connection)
        return connection

    def give_to(self, session: BranchSession) -> BranchSession:
        """Have a session go on in this branch, and return it; or return the session of another thread that was first."""
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
                    f"The connection {self.name!r} is wanted while another thread of the unit of work waits for it",
                    "Let the threads of a unit use its sessions one after the other",
                )
            yield

    @property
    def current_transaction(self) -> SessionTransaction | RootTransaction | None:
        """The innermost savepoint of its session, or the transaction if there is none."""
        if self.session is not None:
            return self.session.current_transaction
        return None if self._own_connection is None else self._transaction

    def uses(self, connection: Connection) -> None:
        """Note that the session has begun on `connection`."""
        if connection in self._connections:
            return
        if self._rolled_back_by is not None:
            connection.close()  # as it came too late
            raise UnitOfWorkEnded(f"The {self.name!r} session")
        info = self._connections[connection] = connection.info
        if self.home.two_phase and not self.read_only and self._work.rehearsal is None:
            self._begin_by_xid(connection)
        info[BRANCH] = self
        if self._work.timed:
            self.apply_time_limit()

    def _begin_by_xid(self, connection: Connection) -> None:
        """Begin by xid where a transaction that began otherwise can't be prepared. Before it listens: this is no write."""
        verbs = self.home.verbs
        if verbs is None or not verbs.begins_by_xid:
            return  # without an xid, for which the decision log would be asked
        for statement in verbs.start(self.xid):
            connection.exec_driver_sql(statement)
        self._begun_by_xid = True

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

    def is_interrupted_by(self, error: BaseException) -> bool:
        """Return whether an exception from outside came while the driver waited, so that the connection has to be closed."""
        if not self.home.database.waits_for_answers or self._work.rehearsal is not None:
            return False
        return any(
            not (connection.closed or connection.invalidated) and interrupted(error, connection.connection.driver_connection)
            for connection in self._connections
        )

    def statement_failed(self, error: BaseException) -> BaseException | None:
        """Note that the database refused a statement; return the error that says better what happened, if there is one."""
        self._failures = [*self._failures, error]
        if self.read_only and self.home.database.refuses_write(error):
            return ReadOnlyViolation(self.name, "The statement", not self.home.read_only)
        return self._work.overtime()

    def better_error(self, statement: str, error: BaseException) -> BaseException:
        """Return a driver's error as SQLAlchemy would have raised it, and give the connection up if it was lost."""
        connection, dialect = self.connection, self.connection.dialect
        if connection.closed or connection.invalidated or not isinstance(error, dialect.loaded_dbapi.Error):
            return error
        lost = dialect.is_disconnect(error, connection.connection.dbapi_connection, None)
        wrapped = DBAPIError.instance(
            statement, None, error, dialect.loaded_dbapi.Error, connection_invalidated=lost, dialect=dialect
        )
        if lost and self.stage is not Stage.PREPARED:  # one that may be prepared is still to be told elsewhere
            self.abandon()
        return wrapped

    def send_commit(self, dbapi_connection: Any, plainly: Callable[[Any], None]) -> None:
        """Send COMMIT, in whatever form the transaction was begun; nothing, where it was ended by its xid."""
        if not self._work.finishing:
            raise SessionIsManaged(self.name, "connection().commit")
        if self.stage is Stage.ACTIVE:
            self.is_commit_unanswered = True
            if self._begun_by_xid:
                say(dbapi_connection, self.verbs.commit_unprepared(self.xid))
            else:
                plainly(dbapi_connection)
        self.committed = True  # what fails from here on fails afterwards
        self.is_commit_unanswered = False

    def send_rollback(self, dbapi_connection: Any, plainly: Callable[[Any], None]) -> None:
        """Send ROLLBACK, in whatever form the transaction was begun; nothing, where it is ended by its xid."""
        if not self._begun_by_xid:
            plainly(dbapi_connection)
        elif self.stage is Stage.ACTIVE:
            say(dbapi_connection, self.verbs.roll_back_unprepared(self.xid), regardless=True)

    def has_lost_transaction(self) -> bool:
        """Return whether the database would answer COMMIT with a rollback."""
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
        return any(map(self._has_lost_transaction_on, self._connections))

    def _has_lost_transaction_on(self, connection: Connection) -> bool:
        if self._failures:
            return self.home.database.has_lost_transaction(connection, self._failures)
        return self.wrote and self.home.database.has_ended_transaction(connection)

    def check_commit(self, rehearsal: Any) -> None:
        """Raise what preparing it would, in a test that keeps it from being prepared."""
        try:
            rehearsal.check_commit(self.connection)
        except Exception as error:
            raise self.better_error("COMMIT", error) from error

    def flush_for_good(self) -> None:
        """Do all that precedes COMMIT, the listeners to `before_commit` included; from here on the session refuses SQL."""
        if self.session is not None:
            self.session.flush_for_good()
        self._is_flushed_for_good = True

    @property
    def has_unflushed(self) -> bool:
        """Whether objects of its session were changed that no flush has reached."""
        return self.session is not None and self.session.has_unflushed

    @property
    def driver_connection(self) -> Any:
        """The driver's own connection."""
        return self.connection.connection.driver_connection

    def abandon(self) -> None:
        """Close the connection and leave what it may have prepared to whoever recovers it."""
        self.stage = Stage.ENDED
        connection = self.connection
        if not (connection.closed or connection.invalidated):
            connection.invalidate()

    def settle_elsewhere(self, *, commit: bool) -> bool:
        """End by its xid, on another connection, a branch that did not answer. Return whether its database knows by now."""
        try:
            with self.connection.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                return self.verbs.settle(connection, self.xid, commit=commit) is not Settling.HELD
        except Exception:
            log.warning("%r could not be reached a second time, and is left to recovery", self.name, exc_info=True)
            return False

    def end_session(self) -> None:
        """Let go of the session and the connection of a branch that has committed by its xid."""
        if self.finished:
            return
        if self.connection.invalidated:
            self.roll_back()
            return
        try:
            self.commit()  # which sends nothing any more
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

    def close_if_interrupted(self, error: BaseException) -> None:
        """Close the connection if the exception that ends the unit came while the driver waited, by a cursor of its own, say."""
        if self.is_interrupted_by(error):
            self._close_connections()

    def roll_back(self) -> None:
        """Roll back and return the connection to its pool, or close it when it can't be rolled back.

        Only an interruption is raised, after the connection was closed.
        """
        if self.finished:
            return
        self._rolled_back_by = get_ident()
        if self.stage is Stage.PREPARED:
            self.abandon()  # interrupted before it was told how the unit ends, which recovery finds out
        try:
            # The rollback comes first: closing alone leaves a transaction open whose COMMIT was refused.
            self._roll_back_transaction()
        except BaseException as error:
            log.debug("Rolling back %r failed; its connection is closed instead", self.name, exc_info=True)
            try:
                if self.session is None:
                    self._close_connections()
                else:
                    self.session.invalidate()
            except InvalidRequestError:  # SQLAlchemy was interrupted inside the session, or a thread still is
                self._close_connections()
            if not isinstance(error, Exception):
                raise
        finally:
            with suppress(InvalidRequestError):
                self._close_session()
            self._let_go()

    def _close_session(self) -> None:
        """Close the session, which returns its connection to the pool; or return the connection, where there is no session."""
        if self._data_manager is not None:
            self._data_manager.abort(self._work.transaction)
        elif self._own_connection is not None:
            connection, self._own_connection, self._has_ended = self._own_connection, None, True
            connection.close()

    def _roll_back_transaction(self) -> None:
        # Another thread may be inside the session: the worker of a coroutine that was cancelled, say. It would go on with a
        # connection of its own if the session were closed meanwhile.
        give_up = time.monotonic() + PATIENCE
        while self.session is not None and self.session.is_flushing and time.monotonic() < give_up:
            time.sleep(0.005)
        while True:
            try:
                if self._transaction is not None:
                    self._transaction.rollback()
            except IllegalStateChangeError:  # it is waiting for its connection
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.005)
            else:
                return

    def abandon_work(self) -> None:
        """Give the connection back after an exception from outside, which may have come between two steps of anything.

        It is closed, because the driver may be waiting for an answer to an earlier statement: what is prepared is left to
        recovery, and what is not is rolled back by the server. Where the driver never waits (SQLite), it is rolled back.
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
        if self.home.asynchronous:
            return False  # nothing can be awaited here
        return self._work.rehearsal is not None or not self.home.database.waits_for_answers

    def _close_connections(self) -> None:
        self.stage = Stage.ENDED
        for connection in self._connections:
            with suppress(Exception):
                if not (connection.closed or connection.invalidated):
                    connection.invalidate()

    def flush(self) -> None:
        """Send what is pending."""
        if self.session is not None:
            self.session.flush()

    def savepoint(self) -> SessionTransaction:
        """Flush, and take a savepoint. Raises InvalidUse where the database has none."""
        if not self.home.database.has_savepoints:
            raise InvalidUse(
                f"The database of {self.name!r} has no savepoints",
                'Write to it outside nested units (propagation="nested", unit.savepoint())',
            )
        if self.session is None:  # which can follow savepoints
            cast("Callable[[], BranchSession]", self._make_session)()
        return cast("BranchSession", self.session).begin_nested()

    def roll_back_to(self, savepoint: SessionTransaction) -> None:
        """Undo what was done since a savepoint."""
        savepoint.rollback()

    def release(self, savepoint: SessionTransaction) -> None:
        """Keep what was done since a savepoint, and give that up."""
        savepoint.commit()

    def _let_go(self) -> None:
        for info in self._connections.values():
            info.pop(BRANCH, None)
        self._has_ended, self._transaction = True, None
        if self._work.connections.get(self.name) is self:
            del self._work.connections[self.name]
        if self.session is not None:
            self.session.branch = None  # a circle would keep both until the collector comes by


class BranchOffLoop(Branch):
    """A branch whose driver blocks, in a unit that a coroutine ends: what waits for the database does so in a thread."""

    def flush(self) -> None:
        off_loop(super().flush)

    def flush_for_good(self) -> None:
        off_loop(super().flush_for_good)

    def has_lost_transaction(self) -> bool:
        return off_loop(super().has_lost_transaction)

    def check_commit(self, rehearsal: Any) -> None:
        off_loop(super().check_commit, rehearsal)

    def commit(self) -> None:
        off_loop(super().commit)

    def roll_back(self) -> None:
        off_loop(super().roll_back)

    def savepoint(self) -> SessionTransaction:
        return off_loop(super().savepoint)

    def roll_back_to(self, savepoint: SessionTransaction) -> None:
        off_loop(super().roll_back_to, savepoint)

    def release(self, savepoint: SessionTransaction) -> None:
        off_loop(super().release, savepoint)

    def apply_time_limit(self) -> None:
        off_loop(super().apply_time_limit)

    def settle_elsewhere(self, *, commit: bool) -> bool:
        return off_loop(super().settle_elsewhere, commit=commit)


def off_loop(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that blocks: in a thread, where an event loop would have to wait for it."""
    if not in_greenlet():
        return function(*args, **kwargs)
    work = partial(copy_context().run, partial(function, *args, **kwargs))
    return await_only(asyncio.get_running_loop().run_in_executor(own_threads(), work))


@cache
def own_threads() -> ThreadPoolExecutor:
    """Return threads for what blocks: those of the event loop may all be waiting for what the unit holds that ends here."""
    return ThreadPoolExecutor(1000, "app_db")


after_fork_in_child(own_threads.cache_clear)


def say(dbapi_connection: Any, statements: Sequence[str], *, regardless: bool = False) -> None:
    """Execute statements below SQLAlchemy, which has its own idea of how transactions begin and end.

    Only the last one counts when they are said `regardless` of what is refused before.
    """
    cursor = dbapi_connection.cursor()
    for statement in statements[:-1]:
        try:
            cursor.execute(statement)
        except Exception:
            if not regardless:
                raise
            log.debug("%s was refused", statement, exc_info=True)
    cursor.execute(statements[-1])
    cursor.close()


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
