"""The savepoints on a shared connection that stand for the transactions of an isolated test.

A transaction is a savepoint: COMMIT releases it, and ROLLBACK rolls back to it. A database keeps
savepoints as a stack, while transactions end in any order. A savepoint can be released only after
every later savepoint is gone, so the release waits. Only the sessions that a test prepares and checks
with make nothing wait: their savepoints are taken again, above what was released or rolled back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from app_db._databases.database import new_mark
from app_db._databases.statements import Effect
from app_db.testing._serial_units import Holder


@dataclass(eq=False)
class Checkout:
    """A use of the shared connection, from its checkout to its return. To its user it is a connection like any other."""

    connection: str
    """The name of the connection in the container."""
    autocommit: bool
    """Whether each statement is a transaction of its own: in autocommit mode, and where the connection is read-only."""
    read_only: bool
    beside: bool = False
    """Whether the test itself uses it, beside the units of work: its transactions make no unit wait."""
    is_isolation: bool = False
    """Whether an inner `isolated` block uses it. At the end of that, everything inside is rolled back."""
    effect: Effect = Effect.READS
    failed: bool = False
    holder: Holder | None = None
    given_back: dict[str, str] = field(default_factory=dict)
    """What undoes, at the end of its transaction, what was set for the length of that. By what was set."""

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to undo."""
        return self.effect < Effect.MAY_WRITE and not self.failed


@dataclass(eq=False)
class Savepoint:
    """The transaction of a checkout, or a savepoint inside it."""

    checkout: Checkout
    asked_for: str | None = None
    """The name that SQLAlchemy gave it; None for a transaction."""
    outcome: bool | None = None
    """Whether it is to be released (True) or rolled back (False), as soon as later savepoints are gone."""
    committed_inside: set[str] = field(default_factory=set)
    """The connections of other checkouts whose commits would be undone with it."""
    name: str = field(default_factory=new_mark)

    @property
    def stays_beside(self) -> bool:
        """Whether it may be taken again above later ones: it is open, and of a session of the test."""
        return self.outcome is None and self.checkout.beside


class SavepointStack:
    """The savepoints of a shared connection, the oldest first. `execute` sends statements on that connection."""

    def __init__(self, execute: Callable[..., object]) -> None:
        self._execute = execute
        self._stack: list[Savepoint] = []
        self.undone: list[str] = []
        """A sentence for each connection whose commit was undone."""
        self._unseen: list[str] = []
        """Those that the end of a transaction of the test itself has undone. They matter if the test goes on."""

    def clear(self) -> None:
        """Forget all savepoints: the transaction that they are in was rolled back."""
        self._stack.clear()
        self.undone.clear()
        self._unseen.clear()

    def look(self) -> None:
        """Note that the test executes a statement, which sees what was undone."""
        self.undone += self._unseen
        self._unseen.clear()

    def begin(self, checkout: Checkout) -> None:
        """Begin the transaction of a checkout."""
        self.settle()  # an interruption may have left something to do
        self._push(Savepoint(checkout))

    def note_end(self, checkout: Checkout, *, commit: bool) -> None:
        """Note that a checkout has ended its transaction. `settle` carries it out."""
        for savepoint in self._stack:
            if savepoint.checkout is checkout and savepoint.outcome is None:
                savepoint.outcome = commit

    def note_write(self, checkout: Checkout) -> None:
        """Note a write of a session of the test inside the transaction of a unit that began later. It is undone with that."""
        own = max((index for index, each in enumerate(self._stack) if each.checkout is checkout), default=len(self._stack))
        for later in self._stack[own + 1 : own + 2]:
            later.committed_inside.add(checkout.connection)

    def savepoint(self, checkout: Checkout, name: str) -> None:
        """Take a savepoint inside a transaction."""
        self._push(Savepoint(checkout, name))

    def release(self, checkout: Checkout, name: str) -> None:
        """Release a savepoint."""
        self._stack[self._index(checkout, name)].outcome = True
        self.settle()

    def roll_back_to(self, checkout: Checkout, name: str) -> None:
        """Undo what was done since a savepoint. Transactions of other checkouts that began later are undone and begun again."""
        index = self._index(checkout, name)
        savepoint = self._stack[index]
        later = [later for later in self._stack[index + 1 :] if later.checkout is not checkout]
        self._execute(f"ROLLBACK TO SAVEPOINT {savepoint.name}", f"RELEASE SAVEPOINT {savepoint.name}")
        written = {later.checkout.connection for later in later if later.checkout.effect is Effect.WRITES}
        self._note_undone(checkout, savepoint.committed_inside | written)
        del self._stack[index:]
        checkout.failed = False
        for other in later:
            self._push(other)

    def settle(self) -> None:
        """Release or roll back the savepoints at the top of the stack whose transactions have ended."""
        while True:
            end = len(self._stack)
            while end and self._stack[end - 1].stays_beside:
                end -= 1
            if not end or self._stack[end - 1].outcome is None:
                return
            first = self._first_ended(end)
            if self._stack[first].outcome and not all(above.checkout.is_clean for above in self._stack[end:]):
                return  # its release would take away what those above can roll back to
            self._end(first, end)

    def _first_ended(self, end: int) -> int:
        """Return where the transaction begins that has ended at the top: the savepoints inside a transaction end with it."""
        first = end - 1
        while self._stack[first].asked_for is not None and first:
            before = self._stack[first - 1]
            if before.checkout is not self._stack[first].checkout or before.outcome is None:
                break
            first -= 1
        return first

    def keep(self, committed: Iterable[str]) -> None:
        """Move savepoints that have nothing to undo behind what these connections committed, so that they don't undo it."""
        committed, first = set(committed), len(self._stack)
        if not committed:
            return
        while first and self._stack[first - 1].checkout.is_clean:
            first -= 1
        moved = self._stack[first:]
        if moved:
            self._execute(f"RELEASE SAVEPOINT {moved[0].name}", *(f"SAVEPOINT {savepoint.name}" for savepoint in moved))
        if first:
            self._stack[first - 1].committed_inside |= committed

    def _push(self, savepoint: Savepoint) -> None:
        self._execute(f"SAVEPOINT {savepoint.name}")
        self._stack.append(savepoint)

    def _index(self, checkout: Checkout, name: str) -> int:
        return max(index for index, each in enumerate(self._stack) if each.checkout is checkout and each.asked_for == name)

    def _end(self, first: int, end: int) -> None:
        ended, above = self._stack[first:end], self._stack[end:]
        savepoint, committed = ended[0], set[str]().union(*(each.committed_inside for each in ended))
        if not savepoint.outcome:
            self._execute(f"ROLLBACK TO SAVEPOINT {savepoint.name}")  # repeated if this is interrupted now
        del self._stack[first:]
        self._execute(f"RELEASE SAVEPOINT {savepoint.name}")
        if not savepoint.outcome:
            for each in above:
                committed |= each.committed_inside | ({each.checkout.connection} if not each.checkout.is_clean else set())
            self._note_undone(savepoint.checkout, committed)
        else:
            if savepoint.asked_for is None and savepoint.checkout.effect is Effect.WRITES:
                committed.add(savepoint.checkout.connection)
            self.keep(committed)
        for each in above:
            self._push(each)

    def _note_undone(self, by: Checkout, connections: Iterable[str]) -> None:
        noted = self._unseen if by.beside else self.undone
        noted += [f"{connection}: {_how_undone(by)}" for connection in sorted(connections)]


def _how_undone(by: Checkout) -> str:
    """Say what has undone a commit, and what to do."""
    if by.is_isolation:
        return (
            "what a session of the outer `isolated` block committed inside an inner one was rolled back at the end of the inner "
            "block. Commit it before the inner block, or use a session of the inner block"
        )
    if by.beside:
        return (
            "what was committed was undone with the transaction of a session of the test itself, which had begun before, which "
            "would not happen outside a test. Commit what the session has prepared before units use it"
        )
    return (
        "what was committed inside another unit of work of the same database was undone with that, which would not happen "
        "outside a test"
    )
