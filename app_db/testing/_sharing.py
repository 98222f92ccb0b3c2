"""One DBAPI connection, in one transaction that is never committed, for all who would have connections of their own.

The engines of a `SharedConnection` hand it out again and again. Who begins a transaction there takes a savepoint in truth, a
COMMIT releases it, and a ROLLBACK goes back to it. So what was committed is there for everybody who comes later, and gone when
the sharing ends. Units of work can't overlap on one connection: they take turns, and those inside another one are nested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sqlalchemy.util.concurrency import await_only, greenlet_spawn, in_greenlet

from app_db._compat.asyncio import begin_unseen, outlast
from app_db._databases.interruptions import interrupted
from app_db._databases.registry import database_of
from app_db._databases.sharing_rules import new_mark
from app_db._databases.statements import Effect, effect_of
from app_db._wording import in_one_line
from app_db.errors import CannotIsolate
from app_db.testing._turns import Holder, OnTheWire, Turns, Wire

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

P = ParamSpec("P")
R = TypeVar("R")

SHARER = "app_db_sharer"
"""Key in a connection's info: what it is to the shared connection."""

SHARED = "app_db_shared"
"""Attribute of a dialect whose engine's connections are a shared one: that."""


@dataclass(eq=False)
class Sharer:
    """What whoever checked out a connection takes for his own."""

    name: str
    at_once: bool
    """Whether each statement is for itself: in autocommit, or read-only."""
    read_only: bool
    effect: Effect = Effect.READS
    failed: bool = False
    holder: Holder | None = None
    limit_before: str | None = None
    """The statement that gives the server's own time limit back."""

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to be undone."""
        return self.effect < Effect.MAY_WRITE and not self.failed


@dataclass(eq=False)
class Mark:
    """A savepoint on the shared connection: the transaction of a sharer, or a savepoint inside it."""

    sharer: Sharer
    asked_for: str | None = None
    """The name that SQLAlchemy gave it; None for a transaction."""
    outcome: bool | None = None
    """Whether it ended well, which can't be carried out while others began later that still go on."""
    holds: set[str] = field(default_factory=set)
    """The connections of others whose commits would be undone with it."""
    name: str = field(default_factory=new_mark)


# ---- the connection that is shared ----------------------------------------------------------------------------------------


class SharedConnection:
    """A connection of a real engine, in a transaction that is rolled back at the end, and the engines that share it."""

    def __init__(self, dialect: str) -> None:
        self._database = database_of(dialect)
        self.rules = self._database.sharing
        self.engines: dict[Any, Any] = {}
        """The engines that share it, as whoever made them files them. They last, and with them what they have compiled."""
        self._wire = Wire()
        self._real: Engine | None = None
        self._turns: Turns | None = None
        self._patience = 0.0
        self._connection: Connection | None = None
        self._bottom = ""
        self._stack: list[Mark] = []
        self._checked_out: dict[int, Sharer] = {}
        self._undone: list[str] = []
        self._claim: Callable[[], None] = lambda: None

    def begin(self, real: Engine, turns: Turns, patience: float, claim: Callable[[], None]) -> None:
        """Be ready to share a connection of `real`, which is made when it is asked for, and if `claim` doesn't raise."""
        self._real, self._turns, self._patience, self._claim = real, turns, patience, claim

    @property
    def is_open(self) -> bool:
        """Whether there is a connection to end."""
        return self._connection is not None

    def dbapi_connection(self) -> Any:
        """Return the connection as the driver made it. It is opened when this is called first."""
        with self.on_the_wire():
            connection = self._connection or self._opened()
            return connection.connection.dbapi_connection

    def _opened(self) -> Connection:
        if self._real is None:
            raise _over("An engine")
        self._claim()
        connection: Connection | None = None
        try:
            connection = self._real.connect()
            connection.begin()
            self._bottom = new_mark()
            self._connection = connection
            if shared_by(self._real) is None:
                self._say(*self.rules.first)
            else:  # one isolation inside another has a transaction already, and says past that one what it says
                connection.info[SHARER].effect = Effect.WRITES
            self._say(f"SAVEPOINT {self._bottom}")
        except BaseException:
            self._connection = None
            if connection is not None:
                connection.close()
            raise
        return connection

    def end(self, *, answers: bool = True) -> list[str]:
        """Roll everything back, return the connection, and say what was not as it should be.

        Where the event loop is closed that could wait for the database's answers, the connection is closed without them.
        """
        problems = [_leak(sharer) for sharer in self._checked_out.values()] + self._undone
        connection, self._connection, self._real, self._turns = self._connection, None, None, None
        self._stack.clear()
        self._checked_out.clear()
        self._undone.clear()
        if connection is None:
            return problems
        return problems + (self._roll_back(connection) if answers else self._hang_up(connection))

    def _roll_back(self, connection: Connection) -> list[str]:
        problems = []
        try:
            self.rules.execute(connection.connection, f"ROLLBACK TO SAVEPOINT {self._bottom}")
        except Exception as error:  # noqa: BLE001  # reported, with what else there is
            problems.append(f"the transaction around the test was ended by somebody ({in_one_line(error)})")
        try:
            connection.rollback()
        except Exception:  # noqa: BLE001  # closing it rolls back as well
            connection.invalidate()
        connection.close()
        return problems

    def _hang_up(self, connection: Connection) -> list[str]:
        connection.dialect.do_close = connection.dialect.do_terminate = database_of(connection.dialect.name).hang_up  # type: ignore[method-assign]
        connection.invalidate()
        connection.close()
        return []

    # -- what is said on it

    def on_the_wire(self) -> OnTheWire:
        """Keep others from saying something at the same time: threads, and coroutines that wait for an answer."""
        return OnTheWire(self._wire, self._patience)

    def _say(self, *statements: str) -> Any:
        if self._connection is None:
            return None
        return self.uncut(self.rules.execute, self._connection.connection, *statements)

    def uncut(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function that waits for the database: to its end, where the connection could not be used after less."""
        if self.rules.survives_cancellation or not in_greenlet():
            return function(*args, **kwargs)
        task = begin_unseen(greenlet_spawn(partial(function, *args, **kwargs)))
        cancelled = await_only(outlast(task))
        if cancelled is not None:
            raise cancelled
        return task.result()

    # -- what a dialect of an engine does that shares it

    def _turns_of(self, sharer: Sharer) -> Turns:
        if self._turns is None or not self._has(sharer):
            raise _over("A connection")
        return self._turns

    def _has(self, sharer: Sharer) -> bool:
        """Return whether a sharer is one of now: otherwise the connection that he had is back in its pool, rolled back."""
        return id(sharer) in self._checked_out

    def start(self, sharer: Sharer | None) -> None:
        """Begin what is to the sharer a transaction."""
        if sharer is None or sharer.at_once:
            return
        turns = self._turns_of(sharer)
        sharer.effect, sharer.failed = Effect.READS, False
        holder = turns.enter(sharer.name)
        try:
            with self.on_the_wire():
                self._settle()  # what an interruption kept from being carried out
                self._push(Mark(sharer))
        except BaseException:
            turns.leave(holder)
            raise
        sharer.holder = holder

    def finish(self, sharer: Sharer | None, *, commit: bool) -> None:
        """End what is to the sharer a transaction."""
        if sharer is None or sharer.holder is None or not (commit or self._has(sharer)):
            return
        turns = self._turns_of(sharer)
        with self.on_the_wire():
            if commit and sharer.effect >= Effect.MAY_WRITE:
                self.rules.check_deferred(self._say)
            for mark in self._stack:
                if mark.sharer is sharer:
                    mark.outcome = commit
            holder, sharer.holder = sharer.holder, None
            try:
                self._settle()
                self._give_limit_back(sharer)
            finally:
                turns.leave(holder)

    def _give_limit_back(self, sharer: Sharer) -> None:
        if sharer.limit_before is not None:
            statement, sharer.limit_before = sharer.limit_before, None
            self._say(statement)

    def check_deferred(self) -> None:
        """Raise what a COMMIT would, were it sent now."""
        with self.on_the_wire():
            self.rules.check_deferred(self._say)

    def savepoint(self, sharer: Sharer, name: str) -> None:
        """Take a savepoint inside the sharer's transaction."""
        with self.on_the_wire():
            self._push(Mark(sharer, name))

    def release(self, sharer: Sharer, name: str) -> None:
        """Give a savepoint up."""
        with self.on_the_wire():
            self._stack[self._index(sharer, name)].outcome = True
            self._settle()

    def roll_back_to(self, sharer: Sharer, name: str) -> None:
        """Undo what was done since a savepoint. What others began since is undone with it, and begun again."""
        with self.on_the_wire():
            index = self._index(sharer, name)
            mark, later = self._stack[index], [later for later in self._stack[index + 1 :] if later.sharer is not sharer]
            self._say(f"ROLLBACK TO SAVEPOINT {mark.name}", f"RELEASE SAVEPOINT {mark.name}")
            self._note_undone(mark.holds | {later.sharer.name for later in later if later.sharer.effect is Effect.WRITES})
            del self._stack[index:]
            sharer.failed = False
            for other in later:
                self._push(other)

    def statement(self, sharer: Sharer | None, text: str, send: Callable[[], None]) -> None:
        """Send a statement, if it may be sent."""
        if sharer is None:
            send()  # a dialect that looks around on its first connection, and has the wire for it
            return
        self.rules.refuse(sharer.name, text)
        turns = self._turns_of(sharer)
        if sharer.at_once:
            with turns.turn(sharer.name), self.on_the_wire():
                self._send_for_itself(sharer, text, send)
            return
        with self.on_the_wire():
            if sharer.limit_before is None:
                sharer.limit_before = self.rules.limit_before(text, self._ask)
            try:
                send()
            except BaseException as error:
                sharer.failed = True
                self._close_if_interrupted(error)
                raise
            sharer.effect = max(sharer.effect, effect_of(text))

    def _send_for_itself(self, sharer: Sharer, text: str, send: Callable[[], None]) -> None:
        before, after, after_failure = self.rules.around(new_mark(), sharer.read_only)
        self._say(*before)
        try:
            send()
        except BaseException as error:
            self._close_if_interrupted(error)
            with suppress(Exception):  # the failure itself is what has to be known
                self._say(*after_failure)
            raise
        self._say(*after)
        if effect_of(text) is Effect.WRITES:
            self._keep({sharer.name})

    def _close_if_interrupted(self, error: BaseException) -> None:
        """Close the connection if an exception from outside came while the driver waited: the test can only fail then.

        Otherwise the next statement would get the answer to this one.
        """
        connection = self._connection
        if connection is None or not self._database.waits_for_answers or in_greenlet():
            return
        driver_connection = connection.connection.driver_connection
        if driver_connection is not None and isinstance(error, Exception) and interrupted(error, driver_connection):
            driver_connection.close()

    def _ask(self, question: str) -> Any:
        return self._say(question)[0][0]

    # -- the stack of savepoints

    def _push(self, mark: Mark) -> None:
        self._say(f"SAVEPOINT {mark.name}")
        self._stack.append(mark)

    def _index(self, sharer: Sharer, name: str) -> int:
        return max(index for index, mark in enumerate(self._stack) if mark.sharer is sharer and mark.asked_for == name)

    def _settle(self) -> None:
        """Carry out how the last marks ended, as far as nobody began later who still goes on."""
        while self._stack and self._stack[-1].outcome is not None:
            first = len(self._stack) - 1
            sharer = self._stack[first].sharer
            while first and self._stack[first - 1].sharer is sharer and self._stack[first - 1].outcome is not None:
                first -= 1  # the savepoints inside a transaction end with it
            self._carry_out(first)

    def _carry_out(self, first: int) -> None:
        ended = self._stack[first:]
        mark, held = ended[0], set[str]().union(*(each.holds for each in ended))
        if not mark.outcome:
            self._say(f"ROLLBACK TO SAVEPOINT {mark.name}")  # which may be said again if this is interrupted now
        del self._stack[first:]
        if mark.outcome:
            self._say(f"RELEASE SAVEPOINT {mark.name}")
            if mark.asked_for is None and mark.sharer.effect is Effect.WRITES:
                held.add(mark.sharer.name)
            self._keep(held)
        else:
            self._say(f"RELEASE SAVEPOINT {mark.name}")
            self._note_undone(held)

    def _keep(self, committed: Iterable[str]) -> None:
        """Have what was committed outlive the transactions around it: those that did nothing yet begin anew, after it."""
        committed, first = set(committed), len(self._stack)
        if not committed:
            return
        while first and self._stack[first - 1].sharer.is_clean:
            first -= 1
        again = self._stack[first:]
        if again:
            self._say(f"RELEASE SAVEPOINT {again[0].name}", *(f"SAVEPOINT {mark.name}" for mark in again))
        if first:
            self._stack[first - 1].holds |= committed

    def _note_undone(self, names: Iterable[str]) -> None:
        self._undone += [
            f"{name}: what was committed inside another unit of work of the same database was undone with that, "
            "which would not happen outside a test"
            for name in sorted(names)
        ]

    # -- connections that come and go

    def check_out(self, info: dict[Any, Any], name: str, *, at_once: bool, read_only: bool) -> None:
        """Note that somebody has a connection now."""
        sharer = info[SHARER] = Sharer(name, at_once or read_only, read_only)
        self._checked_out[id(sharer)] = sharer

    def check_in(self, info: dict[Any, Any]) -> None:
        """Note that nobody has it any more, and undo what was not committed."""
        sharer = info.get(SHARER)
        if sharer is None:
            return
        try:
            if self._has(sharer):
                self.finish(sharer, commit=False)
        finally:
            self._checked_out.pop(id(sharer), None)
        del info[SHARER]


def _over(subject: str) -> CannotIsolate:
    return CannotIsolate("", f"{subject} of an isolation that has ended", "Ask the container for it again")


def shared_by(engine: Engine) -> SharedConnection | None:
    """Return the connection that an engine's connections share, if they do."""
    return getattr(engine.dialect, SHARED, None)


def _leak(sharer: Sharer) -> str:
    if sharer.holder is None:
        return f"{sharer.name}: a connection is still checked out"
    return f"{sharer.name}: a unit of work or transaction is still open, in {sharer.holder}"
