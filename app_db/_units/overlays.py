"""A session over the branches of a unit: it uses their connections, and has no transaction of its own in any database.

What it sends is a part of the branch on whose connection it is sent, and is committed and rolled back with that. What it has
itself are objects: those are flushed before the branches, follow the unit's savepoints, and end with the unit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from app_db._compat.sqlalchemy import take_away
from app_db._units.branches import PATIENCE
from app_db._units.interfaces import TakingPart
from app_db._units.off_loop import off_loop

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import SessionTransaction


log = logging.getLogger("app_db")

P = ParamSpec("P")
R = TypeVar("R")


class OverlaidSession(TakingPart, Protocol):
    """What an overlay has to know of the session that it is."""

    overlay: Overlay | None
    last_used: str

    @property
    def current_transaction(self) -> SessionTransaction | None: ...
    def close(self) -> None: ...
    def forget(self) -> None: ...


class Overlay:
    """A session over the branches of one unit of work, as the unit sees it."""

    has_savepoints = True
    finished = False
    _is_flushed_for_good = False

    def __init__(self, session: OverlaidSession, transaction: SessionTransaction, *, blocks_loop: bool) -> None:
        self.session = session
        self._transaction = transaction
        self._blocks_loop = blocks_loop
        self.levels: list[SessionTransaction] = [transaction]
        """What is the unit's of the session's transactions: in the databases its branches see to those."""

    @property
    def name(self) -> str:
        """The connection that the session has used last: where its flush has failed, the one on which it did."""
        return self.session.last_used

    def flush(self) -> None:
        """Send what is pending."""
        self._wait_for(self.session.flush)

    def flush_for_good(self) -> None:
        """Do all that precedes the commit, the listeners to `before_commit` included; from here on the session refuses SQL."""
        self._wait_for(self.session.flush_for_good)
        self._is_flushed_for_good = True

    @property
    def has_unflushed(self) -> bool:
        """Whether objects were changed that no flush has reached."""
        return self.session.has_unflushed

    def has_lost_transaction(self) -> bool:
        """Return whether what the session has done is not what the databases have done."""
        nested = self.session.get_nested_transaction()
        if nested is not None and not nested.is_active:
            return True
        return not (self._transaction.is_active or self._is_flushed_for_good)

    def savepoint(self) -> SessionTransaction:
        """Flush, and take a savepoint."""
        savepoint = self._wait_for(self.session.begin_nested)
        self.levels.append(savepoint)
        return savepoint

    def roll_back_to(self, savepoint: SessionTransaction) -> None:
        """Undo what was done since a savepoint."""
        self._wait_for(savepoint.rollback)
        del self.levels[self.levels.index(savepoint) :]

    def release(self, savepoint: SessionTransaction) -> None:
        """Keep what was done since a savepoint, and give that up."""
        self._wait_for(savepoint.commit)
        self.levels.remove(savepoint)

    def end(self) -> None:
        """Detach the objects, as a session does that has committed."""
        try:
            self._transaction.commit()
        finally:
            self._close()

    def roll_back(self) -> None:
        """Undo what became of the objects, and detach them. The databases are rolled back by their branches."""
        if not self.finished:
            self._wait_for(self._roll_back)

    def _roll_back(self) -> None:
        give_up = time.monotonic() + PATIENCE
        while self.session.is_flushing and time.monotonic() < give_up:  # in another thread, as Branch says
            time.sleep(0.005)
        try:
            for transaction in self._transactions():
                take_away(transaction)  # their branches are rolled back, and this has nothing of its own there
            if self.session.get_transaction() is self._transaction:
                self._transaction.rollback()
        except Exception:
            log.debug("A listener failed while a unit of work was rolled back", exc_info=True)
        finally:
            self._close()

    def abandon(self) -> None:
        """Let go of everything after an exception from outside, which may have come between two steps of the session."""
        try:
            for transaction in self._transactions():
                take_away(transaction)
            self._close()
        except Exception:
            log.debug("A session could not be closed when its unit of work was torn down", exc_info=True)

    def leave(self, connections: Iterable[Connection]) -> None:
        """Let go of connections that are about to be rolled back as a whole, the savepoints on them included."""
        for transaction in self._transactions():
            take_away(transaction, connections)

    def _transactions(self) -> Iterator[SessionTransaction]:
        transaction = self.session.current_transaction
        while transaction is not None:
            yield transaction
            transaction = transaction.parent

    def _close(self) -> None:
        self.finished = True
        self.session.close()
        self.session.overlay = None  # a circle would keep both until the collector comes by
        self.session.forget()

    def _wait_for(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return off_loop(function, *args, **kwargs) if self._blocks_loop else function(*args, **kwargs)
