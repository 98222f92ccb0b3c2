"""What a block of code is to units of work: it begins one of its own, takes part in the one under way, or neither."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from app_db._liveness import Liveness, tear_down
from app_db._units.coordinator import Coordinator
from app_db._units.manager import ContextTransactionManager, current
from app_db._units.options import Options, Propagation
from app_db._units.own_unit import OwnUnit
from app_db._units.roles import NestedParticipant, OutsideUnits, Participant, Refused, Role

if TYPE_CHECKING:
    pass

log = logging.getLogger("app_db")


_ROLES: dict[Propagation, tuple[type[Role], type[Role]]] = {
    # propagation: (where a unit is under way, where none is)
    Propagation.REQUIRED: (Participant, OwnUnit),
    Propagation.REQUIRES_NEW: (OwnUnit, OwnUnit),
    Propagation.NESTED: (NestedParticipant, OwnUnit),
    Propagation.MANDATORY: (Participant, Refused),
    Propagation.SUPPORTS: (Participant, OutsideUnits),
    Propagation.NOT_SUPPORTED: (OutsideUnits, OutsideUnits),
    Propagation.NEVER: (Refused, OutsideUnits),
}

_TAKES_PART = frozenset({Participant, NestedParticipant})


def role_for(coordinator: Coordinator, options: Options, liveness: Liveness, *, asynchronous: bool = False) -> Role:
    """Return the role of a block with these options, here and now."""
    manager = coordinator.manager
    inside, outside = _ROLES[options.propagation]
    if isinstance(manager, ContextTransactionManager):
        # In a task that was begun inside a unit, a unit of its own would commit whatever becomes of the outer one.
        outer = manager.current_or_refuse() if inside in _TAKES_PART else manager.current()
    else:
        outer = current(manager)
        if outer is not None:
            tear_down(coordinator.work_of(outer).liveness)  # zope's managers don't ask whether its block still runs
            outer = current(manager)
    return (outside if outer is None else inside)(coordinator, options, outer, liveness, asynchronous)
