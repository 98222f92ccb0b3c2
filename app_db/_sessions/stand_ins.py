"""What a connection has instead of a session that the unit has not been asked for: its branch, and nothing else.

Only the session that finds its database uses it, and needs of it no more than the connection. A session costs most of what such a
branch would cost; so there is none until somebody asks for it, and then it goes on with the connection and the transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol

from app_db._units.branches import Branch, BranchSession, Home
from app_db.errors import InvalidUse

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine, RootTransaction
    from sqlalchemy.orm import SessionTransaction, sessionmaker

    from app_db._units.coordinator import Coordinator, Work


class StandInHome(Home, Protocol):
    """What a stand-in has to know of its connection."""

    coordinator: Coordinator

    def engine_for(self, work: Work) -> Engine: ...
    def make_log(self) -> None: ...
    def note_next_checkout(self, work: Work) -> None: ...
    def watch(self, connection: Connection) -> None: ...


class Successor(BranchSession, Protocol):
    """The session that a stand-in stands for."""

    def connection(self) -> Connection: ...
    def take_over(self, branch: Branch, connection: Connection, transaction: RootTransaction) -> None: ...


class StandIns:
    """Says whether stand-ins may be used for the sessions of one maker: whether nobody could tell one from a session."""

    def __init__(self, maker: sessionmaker[Any], listeners: Mapping[str, list[Any]]) -> None:
        self._maker = maker
        self._arguments = dict(maker.kw)
        self._own_listeners = listeners
        self._all_listeners: list[Iterable[Any]] | None = None

    def may_be_for(self, maker: object) -> bool:
        """Return whether `maker` is still as app_db made it, and only app_db listens to what a session without objects does."""
        if maker is not self._maker or self._maker.kw != self._arguments:
            return False
        if self._all_listeners is None:
            dispatch = self._maker().dispatch  # SQLAlchemy adds to these when somebody begins to listen to the class
            self._all_listeners = [getattr(dispatch, name) for name in self._own_listeners]
        return [*map(list, self._all_listeners)] == [*self._own_listeners.values()]


class _DataManager:
    """The transaction of a stand-in: what zope.sqlalchemy's data manager is to the branch of a session."""

    def __init__(self, stand_in: StandIn, connection: Connection) -> None:
        self.session = stand_in
        self.connection = connection
        self.tx: RootTransaction | None = connection.begin()

    def tpc_vote(self, transaction: object) -> None:
        """Commit, and return the connection to its pool."""
        if self.tx is not None:
            self.tx.commit()
            self._end()

    def abort(self, transaction: object) -> None:
        """Return the connection to its pool."""
        if self.tx is not None:
            self._end()

    def _end(self) -> None:
        self.tx = None
        self.session.forget()
        self.connection.close()


class StandIn:
    """Stands for the unit's session of a connection while nobody has asked for that: to its branch, a session without objects."""

    branch: Branch | None = None
    has_unflushed = False
    is_flushing = False
    _connection: Connection | None = None
    current_transaction: RootTransaction | None = None
    _is_beginning = False
    _successor: Successor | None = None

    def __init__(self, home: StandInHome, work: Work, session: Callable[[], Successor]) -> None:
        self.home = home
        self._work = work
        self._session = session
        self._lock = RLock()  # the thread that has it may come back: by a listener, say

    def connection(self) -> Connection:
        """Return the connection, on which a transaction has begun as a branch of the unit."""
        if self.current_transaction is not None and self._connection is not None:
            return self._connection
        with self._lock:
            self._refuse_another_thread()
            if self._successor is not None:
                return self._successor.connection()
            self._is_beginning = True
        try:
            return self._begin()
        finally:
            self._is_beginning = False

    def _begin(self) -> Connection:
        if not (self.home.read_only or self._work.read_only):
            self.home.make_log()
        self.home.note_next_checkout(self._work)
        connection = self.home.engine_for(self._work).connect()
        try:
            begun = _DataManager(self, connection)
            self.home.coordinator.get().join(begun)
        except BaseException:
            connection.close()  # the unit was aborted while a thread waited for it, say, and nobody else will return it
            raise
        try:
            self.home.watch(connection)
            if self.branch is not None:
                self.branch.uses(connection)
        finally:  # not before, or another thread would use it as it is
            self._connection, self.current_transaction = connection, begun.tx
        return connection

    def give_way_to(self, session: Successor) -> Successor:
        """Have a session go on in this one's place, and return it: another one, if another thread has been first."""
        with self._lock:
            self._refuse_another_thread()
            if self._successor is None:
                self._successor = session
                try:
                    self._hand_over_to(session)
                except BaseException:
                    self._successor = None
                    raise
            return self._successor

    def _hand_over_to(self, session: Successor) -> None:
        if self.branch is not None and self._connection is not None and self.current_transaction is not None:
            session.take_over(self.branch, self._connection, self.current_transaction)
            self.forget()

    def _refuse_another_thread(self) -> None:
        if self._is_beginning:
            raise InvalidUse(
                f"The connection {self.home.name!r} is wanted while another thread of the unit of work waits for it",
                "Let the threads of a unit use its sessions one after the other",
            )

    def forget(self) -> None:
        """Let go of the connection: its transaction has ended, or is another's."""
        self._connection = self.current_transaction = None

    # -- what a branch asks of a session

    def get_transaction(self) -> RootTransaction | None:
        """Return the transaction in which the connection is."""
        return self.current_transaction

    def get_nested_transaction(self) -> None:
        """Return nothing: where there are savepoints, there is a session."""

    def begin_nested(self) -> SessionTransaction:
        """Leave it to the session, which can follow savepoints."""
        return self._session().begin_nested()

    def flush(self) -> None:
        """Nothing is pending."""

    def flush_for_good(self) -> None:
        """Nothing is pending."""

    def invalidate(self) -> None:
        """Close the connection for good."""
        if self._connection is not None:
            self._connection.invalidate()
