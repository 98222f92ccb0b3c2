"""Sessions that units of work have done with, and that may be used again: a new one is the dearest part of a unit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any
from weakref import getweakrefcount

from sqlalchemy.orm import sessionmaker
from sqlalchemy.orm.session import _new_sessionid, _sessions


def _references(held: Sequence[object]) -> int:
    """Return how many references there are to the one object in `held`."""
    return sys.getrefcount(held[0])


_HAS_EXACT_COUNTS = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
_NO_OTHERS = _references([object()]) if _HAS_EXACT_COUNTS else -1
_ITS_OWN = frozenset({"identity_map", "_new", "_deleted", "hash_key", "dispatch", "bind", "_work"})
"""What a session has for itself, and gets anew: all else is as the maker made it, or the session isn't used again."""


class _Make:
    """What sessions are like that one maker made with the same arguments, and those of them that wait for a unit."""

    def __init__(self, arguments: dict[str, Any], made: Any) -> None:
        dispatch: Any = made.dispatch
        settings = {name: value for name, value in made.__dict__.items() if name not in _ITS_OWN}
        self.arguments = arguments
        self.idle: list[Any] = []
        self._kind = type(made)
        self._usable = "info" not in settings  # which is a session's own, and may hold anything
        self._count = len(made.__dict__)
        self._settings_of = itemgetter(*settings)
        self._settings = tuple(dict(value) if isinstance(value, dict) else value for value in settings.values())
        self._listeners_of = attrgetter(*dispatch._empty_listeners)
        self._no_listeners = tuple(dispatch._empty_listeners.values())

    def fits(self, session: Any) -> bool:
        """Return whether a session is as it was made: with the settings it was made with, empty, and with no listeners."""
        state = session.__dict__
        try:
            return (
                self._usable
                and type(session) is self._kind
                and len(state) == self._count
                and self._settings_of(state) == self._settings
                and self._listeners_of(state["dispatch"]) == self._no_listeners
                and not (state["_new"] or state["_deleted"] or state["identity_map"])
            )
        except KeyError:
            return False


class IdleSessions:
    """The sessions of one maker that units have done with. The next unit gets one, which is much cheaper than a new one.

    That can't be told from getting a new one: a session waits here only if nobody holds it, not even weakly, and nobody has
    changed it; and it leaves its identity behind, so that objects of the unit that has ended don't find it.
    """

    _most = 64
    _listeners: dict[str, Collection[Any]] | None = None
    """Those of all sessions of the maker, as they stand: SQLAlchemy adds to them."""

    def __init__(self, maker: sessionmaker[Any]) -> None:
        self._maker = maker
        self._make: _Make | None = None
        self._arguments = dict(maker.kw)

    def are_of(self, maker: object) -> bool:
        """Return whether this is where the sessions of a maker are kept."""
        return maker is self._maker

    def hear_only(self, listeners: Mapping[str, Collection[Any]]) -> bool:
        """Return whether new ones are made as at first, and nobody but `listeners` hears of these events of theirs."""
        if self._listeners is None:
            dispatch: Any = self._maker().dispatch
            self._listeners = {name: dispatch._empty_listeners[name].parent_listeners for name in listeners}
        return self._listeners == listeners and self._maker.kw == self._arguments

    def get(self) -> Any:
        """Return a session for a unit of work that begins to use one."""
        make = self._make
        if make is None or make.arguments != self._maker.kw:
            arguments = dict(self._maker.kw)
            made = self._maker()
            self._make = _Make(arguments, made)
            return made
        try:
            session = make.idle.pop()
        except IndexError:
            return self._maker()
        session.hash_key = _new_sessionid()
        _sessions[session.hash_key] = session
        return session

    def offer(self, held: list[Any]) -> None:
        """Take the one session out of `held`, which has been committed and closed, and keep it unless that could be noticed."""
        make = self._make
        if make is None or _references(held) != _NO_OTHERS:
            return
        session = held.pop()
        # The one weak reference is SQLAlchemy's, by the session's identity. What stands for a session has none, and isn't kept.
        if getweakrefcount(session) == 1 and len(make.idle) < self._most and make.fits(session):
            _sessions.pop(session.hash_key, None)
            session.bind = session._work = None
            make.idle.append(session)


class NewSessions:
    """The same interface where sessions are not used again."""

    def __init__(self, maker: Callable[[], Any]) -> None:
        self.get = maker

    def are_of(self, maker: object) -> bool:
        """Return whether this is where new sessions of a maker are got."""
        return maker is self.get

    def hear_only(self, listeners: object) -> bool:
        """Say no: it isn't known."""
        return False

    def offer(self, held: list[Any]) -> None:
        """Let go of it."""
