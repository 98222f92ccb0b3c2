"""Where the sessions of a unit of work are found: on the unit itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy.orm import scoped_session
from sqlalchemy.util import ScopedRegistry
from transaction.interfaces import NoTransaction

from app_db._sessions.makers import UnitSessionmaker
from app_db._sessions.sessions import OF_TRANSACTIONS, SessionConfig, UnitSession
from app_db._units.branches import Branch
from app_db._units.work import Work
from app_db.errors import InvalidUse, NoUnitOfWork, UnitOfWorkEnded


class UnitRegistry(ScopedRegistry[Any]):
    """The registry of a scoped session. It keeps each session on its unit of work, so that nothing accumulates."""

    def __init__(self, maker: UnitSessionmaker) -> None:
        super().__init__(maker, lambda: None)
        self._maker = maker
        self._config: SessionConfig = maker.kw["config"]
        self._key = f"{self._config.name} (async)" if self._config.asynchronous else self._config.name
        self._listeners: list[Iterable[object]] | None = None

    def __call__(self) -> Any:
        try:
            work = self._config.coordinator.get()
        except (NoTransaction, UnitOfWorkEnded) as error:
            raise self._no_unit(error) from None
        found = work.sessions.get(self._key)
        if found is not None:
            return found
        made = self._maker()
        made.enter(work)
        branch = work.connections.get(self._key)
        if branch is not None:
            found = work.sessions[self._key] = branch.give_to(made)
            return found
        found = work.sessions.setdefault(self._key, made)  # all threads of a unit get the same session
        branch = work.connections.get(self._key)
        if branch is not None:
            branch.give_to(found)  # another thread has made the branch meanwhile
        return found

    def holder(self) -> UnitSession | Branch:
        """Return the unit's session of the connection, or its branch if no session has been asked for."""
        work = self._work()
        found = work.sessions.get(self._key)
        if found is None and self._may_do_without():
            branch = work.connections.get(self._key)
            if branch is None:
                branch = work.connections.setdefault(self._key, work.new_branch(self._config, self))
            found = work.sessions.get(self._key) or branch  # another thread may have made the session meanwhile
        held: UnitSession | Branch = self() if found is None else found
        return held

    def _may_do_without(self) -> bool:
        """Return whether the unit can do without a session, because the application would not notice.

        It would notice if it has changed the sessionmaker or the session's class, or listens to
        events of a session that has no objects.
        """
        if not (self._config.has_branches and self._maker.is_as_made):
            return False
        if self._listeners is None:
            dispatch = self._maker().dispatch  # these lists grow when a listener to the class is added
            self._listeners = [getattr(dispatch, name) for name in OF_TRANSACTIONS]
        return [*map(list, self._listeners)] == [*OF_TRANSACTIONS.values()]

    def has(self) -> bool:
        return self._work().sessions.get(self._key) is not None

    def set(self, obj: Any) -> None:
        if not hasattr(obj, "enter"):
            raise InvalidUse(
                f"The scoped session of {self._config.name!r} was given a session that belongs to no unit of work",
                "Make one by calling the scoped session, or leave that to app_db",
            )
        work = self._work()
        obj.enter(work)
        branch = work.connections.get(self._key)
        if branch is not None:
            branch.give_to(obj)
        work.sessions[self._key] = obj

    def clear(self) -> None:
        if self.has():
            self._work().sessions.pop(self._key, None)

    def _no_unit(self, error: Exception) -> NoUnitOfWork:
        subject = f"The {self._config.name!r} session"
        return NoUnitOfWork(subject, getattr(error, "after_response", False), self._config.asynchronous)

    def _work(self) -> Work:
        try:
            return self._config.coordinator.get()
        except (NoTransaction, UnitOfWorkEnded) as error:
            raise self._no_unit(error) from None


def build_scoped_session(maker: UnitSessionmaker) -> scoped_session[Any]:
    """Return the proxy of the current unit's session."""
    scoped: scoped_session[Any] = scoped_session(maker)
    scoped.registry = UnitRegistry(maker)
    return scoped
