"""A session that uses the connections of a unit's branches, and has no database transaction of its own.

A statement of the session belongs to the branch on whose connection it is sent. The branch commits
it or rolls it back. The session's objects are flushed before the branches, follow the unit's
savepoints, and are detached when the unit ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from app_db._compat.clocks import monotonic
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
    """The session of an overlay."""

    overlay: Overlay | None
    last_used: str

    def close(self) -> None: ...
    def forget(self) -> None: ...


class Overlay:
    """The part in a unit of work of a session that uses the connections of the unit's branches."""

    has_savepoints = True
    finished = False
    _is_flushed_for_good = False

    def __init__(self, session: OverlaidSession, transaction: SessionTransaction, *, blocks_loop: bool) -> None:
        self.session = session
        self._transaction = transaction
        self._blocks_loop = blocks_loop
        self.levels: list[SessionTransaction] = [transaction]
        """The session's transaction and the savepoints of the unit in it. The branches end them in the databases."""

    @property
    def name(self) -> str:
        """The connection that the session used last. After a failed flush, it is the one on which the flush failed."""
        return self.session.last_used

    def flush(self) -> None:
        self._wait_for(self.session.flush)

    def flush_for_good(self) -> None:
        """Do everything that precedes COMMIT, including `before_commit` listeners. The session refuses SQL afterwards."""
        self._wait_for(self.session.flush_for_good)
        self._is_flushed_for_good = True

    @property
    def has_unflushed(self) -> bool:
        return self.session.has_unflushed

    def has_lost_transaction(self) -> bool:
        """Return whether a transaction of the session has failed, so that its objects no longer match the databases."""
        nested = self.session.get_nested_transaction()
        if nested is not None and not nested.is_active:
            return True
        return not (self._transaction.is_active or self._is_flushed_for_good)

    def savepoint(self) -> SessionTransaction:
        """Flush, take a savepoint and return it."""
        savepoint = self._wait_for(self.session.begin_nested)
        self.levels.append(savepoint)
        return savepoint

    def roll_back_to(self, savepoint: SessionTransaction) -> None:
        self._wait_for(savepoint.rollback)
        del self.levels[self.levels.index(savepoint) :]

    def release(self, savepoint: SessionTransaction) -> None:
        self._wait_for(savepoint.commit)
        self.levels.remove(savepoint)

    def end(self) -> None:
        """Detach the objects, as after a commit."""
        try:
            self._transaction.commit()
        finally:
            self._close()

    def roll_back(self) -> None:
        """Roll back the state of the objects, and detach them. The branches roll back the databases."""
        if not self.finished:
            self._wait_for(self._roll_back)

    def _roll_back(self) -> None:
        give_up = monotonic() + PATIENCE
        while self.session.is_flushing and monotonic() < give_up:  # in another thread, as in Branch
            time.sleep(0.005)
        try:
            for transaction in self._transactions():
                take_away(transaction)  # the branches roll back the connections
            if self.session.get_transaction() is self._transaction:
                self._transaction.rollback()
        except Exception:
            log.debug("A listener failed while a unit of work was rolled back", exc_info=True)
        finally:
            self._close()

    def abandon(self) -> None:
        """Close the session after an exception from outside, which may have interrupted it halfway."""
        try:
            for transaction in self._transactions():
                take_away(transaction)
            self._close()
        except Exception:
            log.debug("A session could not be closed when its unit of work was torn down", exc_info=True)

    def leave(self, connections: Iterable[Connection]) -> None:
        """Forget connections that are about to be rolled back, including the savepoints on them."""
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
        self.session.overlay = None  # breaks a reference cycle, so that both are freed at once
        self.session.forget()

    def _wait_for(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return off_loop(function, *args, **kwargs) if self._blocks_loop else function(*args, **kwargs)
