"""One DBAPI connection, in one transaction that is never committed, which all engines of an isolated database share.

To the engines of a `SharedConnection` each checkout is a connection of its own. Its transactions
are savepoints in truth. So later checkouts see what was committed, and it is gone when the
isolation ends. Units of work can't overlap on one connection: they run one after the other, and
those inside another one are nested.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from sqlalchemy.util.concurrency import await_only, greenlet_spawn, in_greenlet

from app_db._compat.asyncio import begin_unseen, outlast
from app_db._databases.database import new_mark
from app_db._databases.engines import SHARED
from app_db._databases.interruptions import interrupted
from app_db._databases.registry import database_of
from app_db._databases.statements import Effect, effect_of
from app_db._wording import in_one_line
from app_db.errors import CannotIsolate
from app_db.testing._outside import checkouts
from app_db.testing._savepoints import Checkout, SavepointStack
from app_db.testing._serial_units import Held, StatementLock, UnitLock

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from app_db._liveness import Liveness

P = ParamSpec("P")
R = TypeVar("R")

CHECKOUT = "app_db_checkout"
"""The key in a connection's `info` under which its Checkout stands."""


class SharedConnection:
    """A connection of a real engine, in a transaction that is rolled back at the end, and the engines that share it."""

    def __init__(self, dialect: str) -> None:
        self._database = database_of(dialect)
        self.rules = self._database.sharing
        self.engines: dict[str, Engine] = {}
        """The engines that share it, by connection. They are kept for later tests, with the statements they have compiled."""
        self.async_engines: dict[str, AsyncEngine] = {}
        self._statements = StatementLock()
        self._real: Engine | None = None
        self._units: UnitLock | None = None
        self._patience = 0.0
        self._connection: Connection | None = None
        self._outermost = ""
        """The savepoint around all others."""
        self.savepoints = SavepointStack(self._execute)
        self._checked_out: dict[int, Checkout] = {}
        self._claim: Callable[[], None] | None = None

    def begin(self, real: Engine, units: UnitLock, patience: float, claim: Callable[[], None]) -> None:
        """Get ready to share a connection of `real`. It is opened at its first use, unless `claim` raises then."""
        self._real, self._units, self._patience, self._claim = real, units, patience, claim

    @property
    def is_open(self) -> bool:
        """Whether there is a connection to end."""
        return self._connection is not None

    def dbapi_connection(self) -> DBAPIConnection:
        """Return the connection that the driver made. The first call opens it."""
        with self.statement_lock():
            connection = self._connection or self._open()
            return cast("DBAPIConnection", connection.connection.dbapi_connection)

    def _open(self) -> Connection:
        if self._real is None or self._claim is None:
            raise _has_ended("An engine")
        self._claim()
        connection: Connection | None = None
        try:
            connection = self._real.connect()
            if shared_by(self._real) is None:
                checkouts.note_isolated()
            # Not by connection.begin(), which would call the listeners of the application: they are called for each unit.
            connection.dialect.do_begin(connection.connection)
            self._outermost = new_mark()
            self._connection = connection
            if shared_by(self._real) is None:
                self._execute(*self.rules.first)
            else:  # an isolation inside another one: its savepoints bypass the outer one, which must count them as a write
                outer: Checkout = connection.info[CHECKOUT]
                outer.effect, outer.is_isolation = Effect.WRITES, True
            self._execute(f"SAVEPOINT {self._outermost}")
        except BaseException:
            self._connection = None
            if connection is not None:
                connection.close()
            raise
        return connection

    def end(self, *, answers: bool = True) -> list[str]:
        """Roll everything back, return the connection to its pool, and return a sentence for each problem.

        Without `answers`, the connection is closed without waiting for the database, because its
        event loop is closed.
        """
        # The sessions of the test itself are closed when everything is rolled back.
        problems = [_leak(checkout) for checkout in self._checked_out.values() if not checkout.beside] + self.savepoints.undone
        connection = self._connection
        left = [statement for checkout in self._checked_out.values() for statement in checkout.given_back.values()]
        self._connection = self._real = self._units = self._claim = None
        self.savepoints.clear()
        self._checked_out.clear()
        if connection is None:
            return problems
        return problems + (self._roll_back(connection, left) if answers else self._hang_up(connection))

    def _roll_back(self, connection: Connection, left: Sequence[str]) -> list[str]:
        problems = []
        try:
            self.rules.execute(connection.connection, f"ROLLBACK TO SAVEPOINT {self._outermost}", *left)
        except Exception as error:  # noqa: BLE001  # it becomes one of the problems
            problems.append(f"the transaction around the test was ended inside it ({in_one_line(error)})")
        try:
            connection.dialect.do_rollback(connection.connection)
        except Exception:  # noqa: BLE001  # closing it rolls back as well
            connection.invalidate()
        connection.close()
        return problems

    def _hang_up(self, connection: Connection) -> list[str]:
        connection.dialect.do_close = connection.dialect.do_terminate = self._database.hang_up  # type: ignore[method-assign]
        connection.invalidate()
        connection.close()
        return []

    # -- sending statements

    def statement_lock(self) -> Held[Liveness]:
        """Return a block that keeps other threads and coroutines from using the connection."""
        return Held(partial(self._statements.acquire, self._patience), self._statements.leave)

    def _execute(self, *statements: str) -> Any:
        if self._connection is None:
            return None
        return self.uncancelled(self.rules.execute, self._connection.connection, *statements)

    def uncancelled(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function that waits for the database, and delay a cancellation that would leave the connection unusable."""
        if self.rules.survives_cancellation or not in_greenlet():
            return function(*args, **kwargs)
        task = begin_unseen(greenlet_spawn(partial(function, *args, **kwargs)))
        cancelled = await_only(outlast(task))
        if cancelled is not None:
            raise cancelled
        return task.result()

    # -- what the dialects of the engines call

    def _unit_lock(self, checkout: Checkout) -> UnitLock:
        if self._units is None or not self._has(checkout):
            raise _has_ended("A connection")
        return self._units

    def _has(self, checkout: Checkout) -> bool:
        """Return whether a checkout is of this isolation. The connections of an earlier one were rolled back and returned."""
        return id(checkout) in self._checked_out

    def start(self, checkout: Checkout | None) -> None:
        """Begin the transaction of a checkout."""
        if checkout is None or checkout.autocommit or checkout.holder is not None:
            return
        units = self._unit_lock(checkout)
        checkout.effect, checkout.failed = Effect.READS, False
        holder = units.acquire(checkout.connection)
        try:
            with self.statement_lock():
                self.savepoints.begin(checkout)
        except BaseException:
            units.release(holder)
            raise
        checkout.holder = holder
        if checkout.beside:
            units.release(holder)

    def finish(self, checkout: Checkout | None, *, commit: bool) -> None:
        """Commit or roll back the transaction of a checkout."""
        if checkout is None or checkout.holder is None or not (commit or self._has(checkout)):
            return
        units = self._unit_lock(checkout)
        if checkout.beside:
            with Held(partial(units.acquire, checkout.connection), units.release):
                # A server that has failed a transaction answers COMMIT with ROLLBACK.
                self._finish(checkout, units, commit=commit and not checkout.failed)
        else:
            self._finish(checkout, units, commit=commit)

    def _finish(self, checkout: Checkout, units: UnitLock, *, commit: bool) -> None:
        with self.statement_lock():
            if commit and checkout.effect >= Effect.MAY_WRITE:
                self.rules.check_deferred(self._execute)
            self.savepoints.note_end(checkout, commit=commit)
            try:
                self.savepoints.settle()
                self._give_back(checkout)
            finally:
                holder, checkout.holder = checkout.holder, None
                if holder is not None:
                    units.release(holder)

    def _give_back(self, checkout: Checkout) -> None:
        """Undo what was set for the length of a transaction, which to the database goes on."""
        statements = list(checkout.given_back.values())
        checkout.given_back.clear()
        self._execute(*statements)

    def _note_what_to_give_back(self, checkout: Checkout, text: str, parameters: object) -> None:
        for what, statement in self.rules.given_back(text, parameters, self._execute).items():
            checkout.given_back.setdefault(what, statement)

    def check_deferred(self) -> None:
        """Raise what a COMMIT would raise now: violations of deferred constraints."""
        with self.statement_lock():
            self.rules.check_deferred(self._execute)

    def statement(self, checkout: Checkout | None, text: str, parameters: object, send: Callable[[], None]) -> None:
        """Call `send`, which executes the statement `text`. Raises CannotIsolate for one that would end the transaction."""
        if checkout is None:
            send()  # a dialect reads the server's version on its first connection, and holds the lock for that
            return
        self.rules.refuse(checkout.connection, text)
        units = self._unit_lock(checkout)
        self.savepoints.look()
        if checkout.autocommit or checkout.beside:
            with Held(partial(units.acquire, checkout.connection), units.release), self.statement_lock():
                self._alone(checkout, text, parameters, send)
            return
        with self.statement_lock():
            self._note_what_to_give_back(checkout, text, parameters)
            try:
                send()
            except BaseException as error:
                checkout.failed = True
                self._close_if_interrupted(error)
                raise
            checkout.effect = max(checkout.effect, effect_of(text, self.rules.syntax))

    def _alone(self, checkout: Checkout, text: str, parameters: object, send: Callable[[], None]) -> None:
        """Send a statement whose failure must not disturb others: in autocommit mode, or of a session of the test itself."""
        before, after, after_failure = self.rules.around(new_mark(), checkout.read_only)
        self._note_what_to_give_back(checkout, text, parameters)
        self._execute(*before)
        try:
            if checkout.failed:
                self.rules.fail(self._execute)
            send()
        except BaseException as error:
            checkout.failed = checkout.beside and self.rules.fails_as_a_whole
            self._close_if_interrupted(error)
            with suppress(Exception):  # the caller has to see why the statement failed, not this
                self._execute(*after_failure)
            raise
        self._execute(*after)
        effect = effect_of(text, self.rules.syntax)
        if checkout.autocommit:
            self._give_back(checkout)
            if effect is Effect.WRITES:
                self.savepoints.keep({checkout.connection})
            return
        checkout.effect = max(checkout.effect, effect)
        if effect is Effect.WRITES:
            self.savepoints.note_write(checkout)

    def _close_if_interrupted(self, error: BaseException) -> None:
        """Close the connection if an exception from a signal handler came while the driver waited: the test can only fail then.

        Otherwise the next statement would get the answer to this one.
        """
        connection = self._connection
        if connection is None or not self._database.waits_for_answers or in_greenlet():
            return
        driver_connection = connection.connection.driver_connection
        if driver_connection is not None and isinstance(error, Exception) and interrupted(error, driver_connection):
            driver_connection.close()

    # -- checkouts

    def check_out(self, info: MutableMapping[str, object], connection: str, *, autocommit: bool, read_only: bool) -> None:
        """Note that the shared connection was checked out."""
        checkouts.note_isolated()
        checkout = info[CHECKOUT] = Checkout(connection, autocommit or read_only, read_only)
        self._checked_out[id(checkout)] = checkout

    def check_in(self, info: MutableMapping[str, object]) -> None:
        """Note that it was returned, and undo what was not committed."""
        checkout = checkout_in(info)
        if checkout is None:
            return
        try:
            if self._has(checkout):
                self.finish(checkout, commit=False)
        finally:
            self._checked_out.pop(id(checkout), None)
        info.clear()  # with the unit's time limit, by which SQLite would interrupt statements of later units and tests


def checkout_in(info: MutableMapping[str, object]) -> Checkout | None:
    """Return the checkout that a connection's `info` tells of, if it is checked out."""
    checkout = info.get(CHECKOUT)
    return checkout if isinstance(checkout, Checkout) else None


def shared_by(engine: Engine) -> SharedConnection | None:
    """Return the connection that an engine's checkouts share, or None for an engine that is not isolated."""
    return getattr(engine.dialect, SHARED, None)


def _has_ended(subject: str) -> CannotIsolate:
    return CannotIsolate("", f"{subject} of an isolation that has ended", "Ask the container for it again")


def _leak(checkout: Checkout) -> str:
    if checkout.holder is None:
        return f"{checkout.connection}: a connection is still checked out"
    return f"{checkout.connection}: a unit of work or transaction is still open, in {checkout.holder}"
