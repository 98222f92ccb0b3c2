"""Choose a block's role by its propagation: begin a unit of work, take part in the current one, or neither."""

from __future__ import annotations

from app_db._liveness import Liveness, tear_down
from app_db._units.coordinator import Coordinator
from app_db._units.manager import ContextTransactionManager, current
from app_db._units.options import Options, Propagation
from app_db._units.own_unit import OwnUnit
from app_db._units.roles import NestedParticipant, OutsideUnits, Participant, Refused, Role

_ROLES: dict[Propagation, tuple[type[Role], type[Role]]] = {
    # propagation: (inside a unit, outside a unit)
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
    """Return the role of a block with these options in the current context."""
    manager = coordinator.manager
    inside, outside = _ROLES[options.propagation]
    if isinstance(manager, ContextTransactionManager):
        # A task that was started inside a unit must not begin its own: that would commit even if the outer unit aborts.
        outer = manager.current_or_refuse() if inside in _TAKES_PART else manager.current()
    else:
        outer = current(manager)
        if outer is not None:
            tear_down(coordinator.work_of(outer).liveness)  # zope's managers don't check whether the block still runs
            outer = current(manager)
    return (outside if outer is None else inside)(coordinator, options, outer, liveness, asynchronous)
