"""The sessions of a unit of work.

A session is made when a unit first asks for it, and is kept on the unit's zope transaction, in
`Work.sessions`. zope.sqlalchemy joins it as changed, so its writes are committed whether or not
they are noticed. The session refuses to begin, commit, roll back or close, which its unit does,
with an error that says what to do instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import event
from sqlalchemy.orm import Mapper, Session
from transaction.interfaces import NoTransaction
from zope.sqlalchemy import datamanager
from zope.sqlalchemy.datamanager import STATUS_CHANGED, join_transaction

from app_db._compat.frames import caller_of, frame_at
from app_db._compat.sqlalchemy import hand_over, is_flushing, note_detached, prepare_to_commit
from app_db._databases.engines import built, next_checkout
from app_db._databases.holders import Checkout, LineAbove
from app_db._databases.registry import database_of
from app_db._databases.time_limits import limit_of_checkout
from app_db._units.branches import Branch
from app_db._units.coordinator import Coordinator
from app_db._units.held_units import HeldUnits
from app_db._units.owned_transactions import Owner
from app_db._units.savepoints import require_savepoints
from app_db._units.statement_events import watch
from app_db._units.work import Work
from app_db.errors import (
    ForeignUnitOfWork,
    InvalidUse,
    NoUnitOfWork,
    ReadOnlyViolation,
    SessionIsManaged,
    UnitOfWorkEnded,
    UnitOfWorkError,
)
from app_db.settings._urls import masked

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Dialect, Engine, RootTransaction
    from sqlalchemy.orm import SessionTransaction

    from app_db._units.interfaces import BranchedWork
    from app_db.settings import ConnectionSettings

log = logging.getLogger("app_db")

S = TypeVar("S", bound="UnitSession")

_line_above = LineAbove()


class SessionConfig:
    """The configuration that the sessions of one connection share."""

    asynchronous = False
    """Whether its sessions are async."""
    has_branches = True
    """Whether a unit can have a branch of the connection without a session."""

    def __init__(self, name: str, settings: ConnectionSettings, coordinator: Coordinator, engine: Callable[[], Engine]) -> None:
        self.name = name
        self.settings = settings
        self.coordinator = coordinator
        self.engine = engine
        self._dialect = settings.sqlalchemy_url().get_backend_name()
        self.database = database_of(self._dialect)
        self.verbs = self.database.prepare_verbs(settings.sqlalchemy_url().get_driver_name())
        self.read_only = settings.read_only
        self.autonomous = not settings.transactional
        self.two_phase = settings.two_phase
        self.held_units = None if settings.held_warning is None else HeldUnits(settings.held_warning)
        self.may_keep_decisions = self._locks_others_out()
        """Whether the table of decisions may be in this database, and must be made before a unit locks the database."""
        self.has_own_engine = False
        """Whether its engine is the application's own, which app_db has not tuned."""
        self.watched: Dialect | None = None
        """The dialect of the last connection that was passed to `watch`."""

    def engine_for(self, work: BranchedWork) -> Engine:
        """Return the current engine, with the options of a unit of work.

        Each session calls this when it begins, so that a replaced or overridden engine is used at
        once.
        """
        engine = self.engine()
        if not hasattr(engine, "dialect") or hasattr(engine, "sync_engine"):
            raise InvalidUse(
                f"The engine of {self.name!r} was overridden with a {type(engine).__name__}",
                "Override it with what create_engine() returns, or for coroutines create_async_engine()",
            )
        if engine.dialect.name != self._dialect:  # overridden, by an engine for another kind of database
            self._dialect, self.database = engine.dialect.name, database_of(engine.dialect.name)
            self.may_keep_decisions = self._locks_others_out()
            self.verbs = self.database.prepare_verbs(engine.url.get_driver_name())
        if not (work.read_only or work.timed or work.isolation):
            return engine
        if work.timed:
            watch(engine)  # now: BEGIN may take too long
        if work.rehearsal is not None:
            return work.rehearsal.engine_for_unit(engine, work)
        return self.database.engine_for_unit(engine, self.settings, work)

    def _locks_others_out(self) -> bool:
        """Return whether units may keep all other connections from the database: by a lock, or because a pooler has no more."""
        return self.database.has_one_writer or self.settings.pooler == "transaction"

    def note_next_checkout(self, work: BranchedWork) -> None:
        """Tell the unit of the next connection that is taken from the pool. An isolated test shares its connection instead."""
        if work.rehearsal is not None:
            return
        may_be_rolled_back = not (self.asynchronous or self.database.waits_for_answers)
        line = _line_above() if work.transaction.status == "Active" else None  # the end of a unit is no line of its own
        next_checkout.set(Checkout(work, work.checked_out, may_be_rolled_back, line))
        limit_of_checkout.set(work.time_limit)

    def watch(self, connection: Connection) -> None:
        watch(connection.engine)
        self.watched = connection.dialect
        self.has_own_engine = connection.dialect not in built

    def make_log(self) -> None:
        """Make the table of decisions, if it may be in this database, before the unit locks the database."""
        if not self.may_keep_decisions or self.coordinator.rehearsal is not None:
            return
        places = self.coordinator.places()
        self.may_keep_decisions = places.may_be_in(self.name)
        if self.may_keep_decisions:
            try:
                places.of(self.name).ensure()
            except Exception:  # the unit may not need it; if it does, it gets the error then
                log.debug("The table of decisions in %r could not be made", self.name, exc_info=True)


class UnitSession(Session):
    """A session of one unit of work. It belongs to the unit in which it is first used, and raises an error outside it."""

    def __init__(self, *args: Any, config: SessionConfig, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.config = config
        self.branch: Branch | None = None
        self._work: Work | None = None
        self._engine: Engine | None = None

    def get_bind(self, *args: Any, **arguments: Any) -> Engine | Connection:
        """Return the engine, after checking the unit. SQLAlchemy calls this before each use of the database."""
        self.require_unit()
        if self._work is not None and (self.branch is None or not self.branch.connections):
            self.config.note_next_checkout(self._work)
        bind = super().get_bind(*args, **arguments)
        if bind is not self._engine:
            self._refuse_other_engine(bind)
        return bind

    def _refuse_other_engine(self, bind: Any) -> None:
        """Raise unless this is the connection of the session's branch: what another one does would not commit with the unit."""
        if self.branch is None or bind not in self.branch.connections:
            raise InvalidUse(
                f"The {self.config.name!r} session was given another engine, {masked(bind.engine.url)}, which may commit alone",
                "Declare a connection for that database, and use the session of that",
            )

    def require_unit(self, attached: object = None) -> None:
        """Raise an error unless the session's unit of work is the current one.

        This is also the listener to `before_attach`, which passes an object.
        """
        coordinator = self.config.coordinator
        try:
            transaction = coordinator.manager.get()
        except (UnitOfWorkError, NoTransaction) as error:
            raise self._refusal(error) from None
        if self._work is None:
            self.enter(coordinator.work_of(transaction))
        elif transaction is not self._work.transaction:
            raise self._refusal(None)
        elif transaction.status != "Active" and not self._work.flushing and not self._work.is_open(self.branch):
            raise UnitOfWorkEnded(self._subject)

    def enter(self, work: Work) -> None:
        """Make this a session of `work`."""
        if work.transaction.status != "Active" and not work.is_open():
            raise UnitOfWorkEnded(self._subject)
        self.bind = self._engine = self.config.engine_for(work)
        self._work = work
        if self.config.held_units is not None:
            self.config.held_units.note(work)
        if self.config.may_keep_decisions and not (self.config.read_only or work.read_only):
            self.config.make_log()

    def take_part(self) -> None:
        """Join the unit of work, which commits the session."""
        # zope.sqlalchemy's listeners are not needed: they notice writes, and these sessions join as changed. Its listener to
        # do_orm_execute would make SQLAlchemy prepare every ORM statement twice.
        unit: Any = self._work  # has the methods of a manager that zope.sqlalchemy calls
        join_transaction(self, STATUS_CHANGED, unit)

    def begun_connection(self) -> Connection:
        """Return the connection, in the transaction of the session's branch."""
        return self.connection()

    def begin_on(self, connection: Connection) -> None:
        """Begin on a connection, and join the unit of work."""
        if self.branch is None:
            try:
                self.take_part()
            except UnitOfWorkError:
                connection.close()  # the unit was aborted while a thread waited for it, and nothing else returns it
                raise
        if connection.dialect is not self.config.watched:
            self.config.watch(connection)
        cast(Branch, self.branch).uses(connection)

    def take_over(self, branch: Branch, connection: Connection, transaction: RootTransaction) -> None:
        """Continue a branch whose transaction has begun, as if this session had begun it."""
        own = self.get_transaction() or super().begin()
        self.bind = self._engine = connection.engine
        hand_over(connection, transaction, own)
        self.branch = branch
        self.take_part()

    def flush_for_good(self) -> None:
        """Do everything that precedes COMMIT, including `before_commit` listeners."""
        prepare_to_commit(cast("SessionTransaction", self.get_transaction()))

    @property
    def has_unflushed(self) -> bool:
        """Whether objects were changed after the last flush."""
        return bool(self.new or self.deleted or any(self.is_modified(instance) for instance in self.dirty))

    @property
    def is_flushing(self) -> bool:
        """Whether a flush is running. Another thread that rolls back waits for it."""
        return is_flushing(self)

    @property
    def current_transaction(self) -> SessionTransaction | None:
        """The innermost savepoint, or else the transaction."""
        return self.get_nested_transaction() or self.get_transaction()

    @property
    def _subject(self) -> str:
        return f"The {self.config.name!r} {'async session' if self.config.asynchronous else 'session'}"

    def _refusal(self, error: Exception | None) -> UnitOfWorkError:
        if self._work is not None and not self._work.is_under_way():
            return UnitOfWorkEnded(self._subject)
        if isinstance(error, ForeignUnitOfWork):
            return ForeignUnitOfWork(self._subject, error.owner, error.user)  # it names processes too
        if self._work is None:
            return NoUnitOfWork(self._subject, awaited=self.config.asynchronous)
        return ForeignUnitOfWork(self._subject, self._work.owner(), str(Owner()))

    def _refuse(self, method: str) -> None:
        if self._is_managed:
            raise SessionIsManaged(self.config.name, method)

    @property
    def _is_managed(self) -> bool:
        return self._work is not None and not self._work.finishing and self._work.is_under_way()

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, object] | None = None) -> Connection:
        """Return the connection that the session uses. Raises InvalidUse for the isolation level AUTOCOMMIT."""
        level = str((execution_options or {}).get("isolation_level", "")).upper()
        if level == "AUTOCOMMIT" and not (self.config.read_only or self.config.autonomous):
            raise InvalidUse(
                f"The {self.config.name!r} session can't be in autocommit, because its unit of work could not be rolled back",
                "Use the engine for what must be committed at once, or a connection with transactional=false",
            )
        if execution_options:
            self._refuse_to_lift(execution_options)
        bind = (bind_arguments or {}).get("bind")
        if bind is not None and bind is not self._engine:
            self._refuse_other_engine(bind)
        return super().connection(bind_arguments, execution_options)

    def _refuse_to_lift(self, options: Mapping[str, object]) -> None:
        """Refuse execution options that would make a read-only session writable."""
        if not self.is_read_only:
            return
        if not options.get("postgresql_readonly", True):
            raise ReadOnlyViolation(self.config.name, "postgresql_readonly=False", not self.config.read_only)
        if "isolation_level" in options and not self.config.read_only:
            raise InvalidUse(
                f"The isolation level of the {self.config.name!r} session can't be changed in a read-only unit of work",
                "Give it to the unit: container.transaction(read_only=True, isolation=…)",
            )

    @property
    def is_read_only(self) -> bool:
        """Whether the connection, or the unit of work, is read-only."""
        return self.config.read_only or (self._work is not None and self._work.read_only)

    def commit(self) -> None:
        """Commit the transaction of an autonomous connection. In a unit of work, other sessions refuse this."""
        self.require_unit()
        if self._may_end_by_itself:
            self._end_by_itself(super().commit)
        else:
            self._refuse("commit")

    @property
    def _may_end_by_itself(self) -> bool:
        work = self._work
        return self.config.autonomous and work is not None and not work.finishing and work.is_under_way()

    def _end_by_itself(self, end: Callable[[], None]) -> None:
        """Commit or roll back as a session outside of units does, and take part in the unit again."""
        if self.branch is not None:
            cast("Work", self._work).restart(self.branch, end)

    def begin(self, nested: bool = False) -> SessionTransaction:
        self.require_unit()
        if not nested:
            if self._is_managed and caller_of(frame_at(0)) == datamanager.__name__:
                raise InvalidUse(
                    f"zope.sqlalchemy.mark_changed() came before the first use of the {self.config.name!r} session",
                    "Leave it out: a unit of work commits each session that it has used",
                )
            self._refuse("begin")
        else:
            self._refuse_savepoint()
        return super().begin(nested)

    def _refuse_savepoint(self) -> None:
        work, config = self._work, self.config
        require_savepoints(config)
        if not config.read_only:
            return
        is_alone = work is None or not (work.isolation or work.timed or work.rehearsal)
        if is_alone and config.database.isolation_level(config.settings) == "AUTOCOMMIT":
            raise InvalidUse(
                f"The {config.name!r} session reads in autocommit, where there are no savepoints",
                'Give the unit an isolation, such as transaction(isolation="REPEATABLE READ")',
            )

    def prepare(self) -> None:
        self.require_unit()
        self._refuse("prepare")

    def rollback(self) -> None:
        """Roll back a read-only or an autonomous connection. In a unit of work, other sessions refuse this."""
        if self._may_end_by_itself:
            self.require_unit()
            self._end_by_itself(super().rollback)
            return
        if self.is_read_only and self._work is not None and self._is_managed:
            self.require_unit()
            self.expunge_all()
            if self.branch is not None:
                self._work.roll_back(self.branch)
            return
        self._refuse("rollback")
        super().rollback()

    def undo(self) -> None:
        """Undo what the unit has done with this session."""
        self._end_by_itself(super().rollback)

    def forget_changes(self) -> None:
        """Take from the session what a flush would send: new and deleted objects leave it, and changed ones are read again."""
        for instance in [*self.new, *self.deleted]:
            if instance in self:  # a cascade may have taken it along
                self.expunge(instance)
        for instance in list(self.dirty):
            self.expire(instance)

    def close(self) -> None:
        if self._work is not None and not self._work.finishing:
            self._refuse("close")
        super().close()

    def reset(self) -> None:
        self._refuse("reset")
        super().reset()

    def invalidate(self) -> None:
        self._refuse("invalidate")
        super().invalidate()

    if not TYPE_CHECKING:  # their signatures are SQLAlchemy's
        # Check here: an error inside a bulk method would roll back the owner's transaction.

        def bulk_save_objects(self, *args, **arguments):
            with self._bulk():
                super().bulk_save_objects(*args, **arguments)

        def bulk_insert_mappings(self, *args, **arguments):
            with self._bulk():
                super().bulk_insert_mappings(*args, **arguments)

        def bulk_update_mappings(self, *args, **arguments):
            with self._bulk():
                super().bulk_update_mappings(*args, **arguments)

    @contextmanager
    def _bulk(self) -> Generator[None]:
        """Call a bulk method in this block. A denied one leaves its transaction unusable, so a reader begins anew."""
        self.require_unit()
        try:
            yield
        except ReadOnlyViolation:
            self.rollback()
            raise


# ---- listeners -----------------------------------------------------------------------------------------------------


event.listen(UnitSession, "before_attach", UnitSession.require_unit, raw=True)  # raw: saves looking up the object


@event.listens_for(UnitSession, "after_attach", raw=True)
def _join_with_object(session: UnitSession, state: object) -> None:
    if session.branch is None:
        session.take_part()


@event.listens_for(UnitSession, "after_begin")
def _join_with_connection(session: UnitSession, transaction: SessionTransaction, connection: Connection) -> None:
    session.begin_on(connection)


@event.listens_for(UnitSession, "before_flush")
def _check_flush(session: UnitSession, context: object, instances: object) -> None:
    session.require_unit()  # here, because an error later in the flush rolls back the owner's transaction
    work = session._work
    if (session.config.read_only or (work is not None and work.read_only)) and session.has_unflushed:
        session.forget_changes()
        raise ReadOnlyViolation(session.config.name, "Flushing changed objects", not session.config.read_only)


@event.listens_for(UnitSession, "before_commit")
def _refuse_foreign_commit(session: UnitSession) -> None:
    work = session._work
    if work is not None and not work.finishing and not session.in_nested_transaction():
        session._refuse("commit")


@event.listens_for(Mapper, "mapper_configured")
def _say_how_to_load(mapper: Mapper[Any], model: type[object]) -> None:
    def note(key: str | None) -> str:
        if key is None or key not in mapper.relationships:
            return f"app_db: read what you need of {model.__name__} before its unit of work, or its session, ends."
        return (
            f"app_db: load {model.__name__}.{key} before its unit of work, or its session, ends: "
            f"select({model.__name__}).options(selectinload({model.__name__}.{key}))."
        )

    note_detached(mapper, note)


OF_TRANSACTIONS: dict[str, list[object]] = {
    "after_begin": [_join_with_connection],
    "before_commit": [_refuse_foreign_commit],
    "after_commit": [],
    "after_rollback": [],
    "after_soft_rollback": [],
    "after_transaction_create": [],
    "after_transaction_end": [],
}
"""The events of a session that has no objects and sends no statements, with app_db's own listeners."""
