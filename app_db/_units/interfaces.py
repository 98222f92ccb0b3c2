"""What the parts of a unit of work have to know of each other, and of the sessions and connections in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.orm import SessionTransaction
    from transaction import Transaction

    from app_db._databases.database import Database, Terms
    from app_db._databases.prepare_verbs import PrepareVerbs
    from app_db._two_phase.decision_places import DecisionPlaces
    from app_db._two_phase.xids import Xid
    from app_db._units.hooks import CapturedHooks
    from app_db.errors import UnitOfWorkTimeout


class BranchConfig(Protocol):
    """What a branch has to know of the named connection whose share it is."""

    name: str
    read_only: bool
    autonomous: bool
    asynchronous: bool
    two_phase: bool
    database: Database
    verbs: PrepareVerbs | None

    @property
    def coordinator(self) -> Units: ...
    def engine_for(self, work: Any) -> Engine: ...
    def make_log(self) -> None: ...
    def note_next_checkout(self, work: Any) -> None: ...
    def watch(self, connection: Connection) -> None: ...


class Units(Protocol):
    """Finds the unit that is under way."""

    def get(self) -> BranchedWork: ...


class BranchedWork(Protocol):
    """What a branch has to know of the unit whose branch it is."""

    transaction: Transaction
    read_only: bool
    finishing: bool
    errors_afterwards: list[Exception]
    interruption: BaseException | None
    connections: dict[str, Any]
    rehearsal: Any

    def add(self, branch: Any) -> None: ...
    def xid_for(self, branch: Any) -> Xid: ...
    @property
    def timed(self) -> bool: ...
    def remaining(self) -> float: ...
    def overtime(self) -> UnitOfWorkTimeout | None: ...
    def refuse_overtime(self) -> None: ...


class TakingPart(Protocol):
    """What a unit has to know of a session that takes part in it."""

    @property
    def has_unflushed(self) -> bool: ...
    @property
    def is_flushing(self) -> bool: ...
    @property
    def current_transaction(self) -> SessionTransaction | None: ...
    def get_transaction(self) -> SessionTransaction | None: ...
    def get_nested_transaction(self) -> SessionTransaction | None: ...
    def begin_nested(self) -> SessionTransaction: ...
    def flush(self) -> None: ...
    def flush_for_good(self) -> None: ...


class Rehearsal(Protocol):
    """What a unit of work asks of an isolated test, in which it only seems to commit."""

    def engine_for_unit(self, engine: Engine, terms: Terms) -> Engine: ...
    def check_commit(self, connection: Connection) -> None: ...


class UnitContext(Protocol):
    """What a unit asks of its container."""

    manager: Any
    captures: list[CapturedHooks]
    rehearsal: Rehearsal | None
    places: Callable[[], DecisionPlaces]
    application: Callable[[], str]
    atomicity: Callable[[], str]
