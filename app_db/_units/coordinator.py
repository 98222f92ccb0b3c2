"""One data manager for all the databases of a unit of work.

To zope.sqlalchemy a `Coordinator` is the transaction manager that sessions join; to zope, the `Work` of a unit is one
data manager that votes last. In between, zope.sqlalchemy's data managers are the branches, which `Work` orders, checks
and commits. It hangs on the zope transaction (`transaction.data`), so there is nothing to clean up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from app_db._databases.containers import Container
from app_db._two_phase.decision_places import DecisionPlaces
from app_db._units.work import Work

if TYPE_CHECKING:
    from transaction import Transaction

    from app_db._units.hooks import CapturedHooks
    from app_db._units.interfaces import Rehearsal

log = logging.getLogger("app_db")


class Coordinator:
    """Finds, under any zope transaction manager, the `Work` of the unit that is under way."""

    rehearsal: Rehearsal | None = None
    """Set while a test is isolated."""

    def __init__(
        self, manager: Any, atomicity: Callable[[], str], application: Callable[[], str], places: Callable[[], DecisionPlaces]
    ) -> None:
        self.manager = manager
        self.atomicity = atomicity
        self.application = application
        self.places = places
        self.captures: list[CapturedHooks] = []

    def get(self) -> Work:
        """Return the work of the current unit. Raises what the manager raises when there is none."""
        transaction = self.manager.get()
        try:
            work: Work = transaction.data(self)
        except KeyError:
            work = Work(transaction, self)
        return work

    def work_of(self, transaction: Transaction) -> Work:
        """Return the work of a transaction."""
        try:
            work: Work = transaction.data(self)
        except KeyError:
            work = Work(transaction, self)
        return work


def build_coordinator(container: Container, places: Callable[[], DecisionPlaces]) -> Coordinator:
    """Return the coordinator of a container. The container's settings are asked when they matter, so they may change."""
    return Coordinator(
        container.transaction_manager(),
        atomicity=lambda: str(container.settings().atomicity),
        application=lambda: str(container.settings().application),
        places=places,
    )
