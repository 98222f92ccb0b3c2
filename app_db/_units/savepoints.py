"""Savepoints across the branches of a unit of work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from app_db._units.branches import Branch
from app_db._units.interfaces import BranchConfig
from app_db._units.overlays import Overlay
from app_db.errors import InvalidUse


def require_savepoints(config: BranchConfig) -> None:
    """Raise InvalidUse if the database of a connection has no savepoints."""
    if not config.database.has_savepoints:
        raise InvalidUse(
            f"The database of {config.name!r} has no savepoints",
            'Write to it outside nested units (propagation="nested", unit.savepoint(), session.begin_nested())',
        )


def require_savepoints_of(work: SavepointWork) -> None:
    """Raise InvalidUse if a savepoint of the unit can't be taken. If it were tried, zope would fail the unit."""
    for branch in work.branches:
        if branch.has_savepoints:
            require_savepoints(branch.config)


class SavepointWork(Protocol):
    """The unit of work, as its savepoints see it."""

    finishing: bool
    branches: list[Branch]
    overlays: list[Overlay]
    savepoints: list[WorkSavepoint]


class WorkSavepoint:
    """A savepoint across the branches of a unit of work. Roll back to it any number of times, or release it once."""

    def __init__(self, work: SavepointWork, parts: Sequence[Branch | Overlay]) -> None:
        self._work = work
        require_savepoints_of(work)  # before the first one is taken
        self._nested = [(part, part.savepoint()) for part in parts]

    def has_any(self, parts: Sequence[Branch | Overlay]) -> bool:
        """Return whether the savepoint was taken on one of these."""
        return any(part in parts for part, _ in self._nested)

    def rollback(self) -> None:
        """Undo what was done since the savepoint. Sessions that joined later start again."""
        older = [part for part, _ in self._nested]
        self._work.finishing = True
        try:
            for overlay in self._work.overlays:
                if overlay not in older:
                    overlay.roll_back()
            for branch in self._work.branches:
                if branch.has_savepoints and branch not in older:
                    for overlay in self._work.overlays:
                        overlay.leave(branch.connections)
                    branch.roll_back()
        finally:
            self._work.finishing = False
        self._work.overlays[:] = [overlay for overlay in self._work.overlays if not overlay.finished]
        self._work.branches[:] = [branch for branch in self._work.branches if not branch.finished]
        for part, nested in reversed(self._nested):
            part.roll_back_to(nested)
        self._nested = [(part, part.savepoint()) for part in older]
        self._forget_later_ones()

    def release(self) -> None:
        for part, nested in reversed(self._nested):
            if nested.is_active:
                part.release(nested)
        self._nested = []
        self._forget_later_ones()
        if self in self._work.savepoints:
            self._work.savepoints.remove(self)

    def _forget_later_ones(self) -> None:
        savepoints = self._work.savepoints
        if self in savepoints:
            del savepoints[savepoints.index(self) + 1 :]
