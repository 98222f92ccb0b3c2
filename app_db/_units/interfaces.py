"""The interfaces between the parts of a unit of work, its sessions and its connections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.orm import SessionTransaction
    from transaction import Transaction

    from app_db._databases.database import Database, Terms
    from app_db._databases.holders import Line, Taken
    from app_db._databases.prepare_verbs import PrepareVerbs
    from app_db._databases.time_limits import TimeLimit
    from app_db._two_phase.decision_logs import DecisionLogs
    from app_db._two_phase.xids import Xid
    from app_db._units.hooks import CapturedHooks
    from app_db._units.manager import TransactionManager


class BranchConfig(Protocol):
    """The configuration of the connection that a branch belongs to."""

    name: str
    read_only: bool
    autonomous: bool
    asynchronous: bool
    two_phase: bool
    database: Database
    verbs: PrepareVerbs | None

    @property
    def coordinator(self) -> Units: ...
    def engine_for(self, work: BranchedWork) -> Engine: ...

    has_own_engine: bool

    def make_log(self) -> None: ...
    def note_next_checkout(self, work: BranchedWork) -> None: ...
    def watch(self, connection: Connection) -> None: ...


class Units(Protocol):
    """Finds the current unit."""

    def get(self) -> BranchedWork: ...


class BranchedWork(Protocol):
    """The unit of work, as its branches see it."""

    transaction: Transaction
    asynchronous: bool
    read_only: bool
    isolation: str | None
    finishing: bool
    errors_afterwards: list[Exception]
    interruption: BaseException | None
    rehearsal: Rehearsal | None
    checked_out: Taken
    time_limit: TimeLimit | None
    number: int

    @property
    def begun_at(self) -> Line | None: ...
    def owner(self) -> str: ...
    def add(self, branch: Any) -> None: ...
    def xid_for(self, branch: Any) -> Xid: ...
    @property
    def connections(self) -> MutableMapping[str, Any]: ...
    @property
    def timed(self) -> bool: ...
    def may_write_to_several(self) -> bool: ...


class TakingPart(Protocol):
    """A session that takes part in a unit."""

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
    """An isolated test, in which a unit of work runs and only seems to commit."""

    def engine_for_unit(self, engine: Engine, terms: Terms) -> Engine: ...
    def check_commit(self, connection: Connection) -> None: ...


class UnitContext(Protocol):
    """The container, as its units see it."""

    manager: TransactionManager
    captures: list[CapturedHooks]
    rehearsal: Rehearsal | None
    places: Callable[[], DecisionLogs]
    application: Callable[[], str]
    atomicity: Callable[[], str]
    may_write_to_several: Callable[[], bool]
    connections: Callable[[], Mapping[str, str | None]]
