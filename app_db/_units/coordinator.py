"""One data manager for all the databases of a unit of work.

zope sees one data manager for each unit, its `Work`, which votes last. zope.sqlalchemy joins
sessions to that `Work`, which orders, checks and commits their data managers as branches. `Work` is
stored on the zope transaction (`transaction.data`), so nothing has to be cleaned up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from app_db._databases.containers import Container
from app_db._two_phase.decision_logs import DecisionLogs
from app_db._units.work import Work

if TYPE_CHECKING:
    from transaction import Transaction

    from app_db._units.hooks import CapturedHooks
    from app_db._units.interfaces import Rehearsal
    from app_db._units.manager import TransactionManager


class Coordinator:
    """Finds the `Work` of the current unit, under any zope transaction manager."""

    rehearsal: Rehearsal | None = None
    """The isolated test that is running, if there is one."""

    def __init__(
        self,
        manager: TransactionManager,
        *,
        atomicity: Callable[[], str],
        application: Callable[[], str],
        places: Callable[[], DecisionLogs],
        may_write_to_several: Callable[[], bool],
        connections: Callable[[], Mapping[str, str | None]],
    ) -> None:
        self.manager = manager
        self.atomicity = atomicity
        self.application = application
        self.places = places
        self.may_write_to_several = may_write_to_several
        self.connections = connections
        """Returns the names of the connections. The values are the connections whose transactions they share, or None."""
        self.captures: list[CapturedHooks] = []

    def get(self) -> Work:
        """Return the work of the current unit. Raises the manager's error if there is none."""
        transaction = self.manager.get()
        try:
            work: Work = transaction.data(self)
        except KeyError:
            work = Work(transaction, self)
        return work

    def work_of(self, transaction: Transaction) -> Work:
        try:
            work: Work = transaction.data(self)
        except KeyError:
            work = Work(transaction, self)
        return work


def build_coordinator(container: Container, places: Callable[[], DecisionLogs]) -> Coordinator:
    """Return the coordinator of a container. It reads the settings at each use, because they may change."""
    return Coordinator(
        cast("TransactionManager", container.transaction_manager()),
        atomicity=lambda: str(container.settings().atomicity),
        application=lambda: str(container.settings().application),
        places=places,
        may_write_to_several=several_writable(container),
        connections=lambda: {name: container.settings().lender_of(name, container.providers) for name in _names_in(container)},
    )


def _names_in(container: Container) -> set[str]:
    names = {name.removesuffix("_sessionmaker") for name in container.providers if name.endswith("_sessionmaker")}
    return names - {f"{name}_async" for name in names}


def several_writable(container: Container) -> Callable[[], bool]:
    """Return a function that tells whether several connections of a container can be written in one unit.

    Each unit on MariaDB calls it. It computes the answer anew if the container has other settings or providers.
    """
    known: tuple[object, int, bool] | None = None

    def is_so() -> bool:
        nonlocal known
        settings, number = container.settings(), len(container.providers)
        if known is None or known[0] is not settings or known[1] != number:
            known = (settings, number, _has_several_writable(container))
        return known[2]

    return is_so


def _has_several_writable(container: Container) -> bool:
    """Return whether several connections of a container can be written in one unit, and have to commit together."""
    settings = container.settings()
    names = _names_in(container) - ({"reader"} - settings.connections.keys())
    # A connection without settings has an engine of the application's own.
    declared = map(settings.connections.get, names)
    writable = [own for own in declared if own is None or (own.transactional and not own.read_only)]
    return len(writable) > 1 and (settings.atomicity == "strict" or any(own is not None and own.two_phase for own in writable))
