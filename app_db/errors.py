"""All errors of app_db.

The attributes of an error say what it is about. Printed, an error says what is wrong, and then what
to do, and where to read more. `args` are the arguments of the constructor, so that errors can be
pickled. Each class has a page in the documentation, which `page` names.

    AppDbError
     ├── SettingsError
     │    ├── NothingConfigured
     │    ├── UnknownVariable
     │    ├── ContradictorySettings
     │    └── TwoPhaseUnavailable
     ├── UnknownConnection (AttributeError)
     ├── ConnectionNotConfigured (LookupError)
     ├── UnknownModel (LookupError)
     ├── SpansDatabases
     ├── NotReflected (AttributeError)
     ├── CannotReflect
     ├── UnknownTable (AttributeError, KeyError)
     ├── NotWired
     ├── UnitOfWorkError
     │    ├── NoUnitOfWork (transaction.interfaces.NoTransaction)
     │    ├── UnitOfWorkEnded
     │    ├── ForeignUnitOfWork
     │    ├── UnitOfWorkInUse
     │    ├── AlreadyInUnitOfWork (transaction.interfaces.AlreadyInTransaction)
     │    ├── SessionIsManaged
     │    ├── AwaitRequired
     │    ├── UnitOfWorkDoomed (transaction.interfaces.DoomedTransaction)
     │    ├── UnitOfWorkTimeout (TimeoutError)
     │    ├── ReplicaUnavailable (transaction.interfaces.TransientError)
     │    └── ReadOnlyViolation
     ├── InvalidUse
     ├── CommitError
     │    ├── NotAtomic
     │    ├── PartialCommit
     │    ├── TransactionLost
     │    ├── OutcomeUnknown
     │    ├── CommitUnconfirmed
     │    ├── AbortedByRecovery (transaction.interfaces.TransientError)
     │    └── HookFailed
     ├── IsolationError
     │    ├── CannotIsolate
     │    ├── IsolationTimeout
     │    ├── IsolationBroken
     │    └── NotIsolated
     ├── UnexpectedStatements (AssertionError)
     ├── LiveServerError
     ├── CannotMakeDatabase
     ├── CannotMakeTables
     ├── MigrationError
     │    ├── AlembicMissing (ImportError)
     │    ├── UnusableMigrations
     │    ├── MigrationFailed
     │    └── MigrationLockTimeout (TimeoutError)
     └── DecisionFileUnusable
          ├── DecisionFileDamaged
          └── DecisionFileFull
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from transaction.interfaces import AlreadyInTransaction, DoomedTransaction, NoTransaction, TransientError

from app_db._wording import did_you_mean

__all__ = [
    "AbortedByRecovery",
    "AlembicMissing",
    "AlreadyInUnitOfWork",
    "AppDbError",
    "AwaitRequired",
    "CannotIsolate",
    "CannotMakeDatabase",
    "CannotMakeTables",
    "CannotReflect",
    "CommitError",
    "CommitUnconfirmed",
    "ConnectionNotConfigured",
    "ContradictorySettings",
    "DecisionFileDamaged",
    "DecisionFileFull",
    "DecisionFileUnusable",
    "ForeignUnitOfWork",
    "HookFailed",
    "InvalidUse",
    "IsolationBroken",
    "IsolationError",
    "IsolationTimeout",
    "LiveServerError",
    "MigrationAccount",
    "MigrationError",
    "MigrationFailed",
    "MigrationLockTimeout",
    "NoUnitOfWork",
    "NotAtomic",
    "NotIsolated",
    "NotReflected",
    "NotWired",
    "NothingConfigured",
    "OutcomeUnknown",
    "PartialCommit",
    "Problem",
    "ReadOnlyViolation",
    "ReplicaUnavailable",
    "SessionIsManaged",
    "SettingsError",
    "SpansDatabases",
    "TransactionLost",
    "TwoPhaseUnavailable",
    "UnexpectedStatements",
    "UnitOfWorkDoomed",
    "UnitOfWorkEnded",
    "UnitOfWorkError",
    "UnitOfWorkInUse",
    "UnitOfWorkTimeout",
    "UnknownConnection",
    "UnknownModel",
    "UnknownTable",
    "UnknownVariable",
    "Unreflectable",
    "UnusableMigrations",
]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


class AppDbError(Exception):
    """The base of all errors of app_db: `except AppDbError` catches each of them."""

    page: ClassVar[str] = "errors/app-db-error"
    """The page of the documentation about errors of this class."""

    pages_at: ClassVar[str] = "https://app-db.readthedocs.io/en/stable"
    """Where the pages are. Set it to your own copy of the documentation, or to "" for messages without an address."""

    def __str__(self) -> str:
        place = self.pages_at.rstrip("/")
        return f"{self.message}\nSee {place}/{self.page}.html" if place else self.message

    @property
    def message(self) -> str:
        """What is wrong, and what to do, without the address."""
        return self._text()

    def _text(self) -> str:
        return super().__str__()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__ == __name__:  # an application's own error keeps the page of its base
            cls.page = "errors/" + re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()


def _without_address(error: BaseException) -> str:
    return error.message if isinstance(error, AppDbError) else str(error)


# ---- settings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A problem with the settings: the variable, and what is wrong and what to do. It never contains the value."""

    variable: str
    message: str

    def __str__(self) -> str:
        return f"{self.variable}: {self.message}"


class SettingsError(AppDbError):
    """The settings can't be used. `problems` lists everything that is wrong with them.

    It is no ValueError on purpose: pydantic would wrap a ValueError, and print the input with it,
    passwords included.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.problems = tuple(problems)

    def _text(self) -> str:
        count = len(self.problems)
        head = "The database settings have a problem:" if count == 1 else f"The database settings have {count} problems:"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class NothingConfigured(SettingsError):
    """No connection is configured."""


class UnknownVariable(SettingsError):
    """A variable that begins with `APP_DB_` is set, and there is no such setting. Most often it is a typing error."""


class ContradictorySettings(SettingsError):
    """Two settings exclude each other."""


# ---- connections and wiring -------------------------------------------------------------------------------------


class TwoPhaseUnavailable(SettingsError):
    """The server of a two-phase connection can't prepare transactions, as it is configured."""


class UnknownConnection(AppDbError, AttributeError):
    """A container was asked for a connection, or for a provider of one, that it does not declare."""

    def __init__(self, name: str, known: Sequence[str], connection: str | None = None) -> None:
        super().__init__(name, known, connection)
        self.name = name
        self.known = tuple(known)
        self.connection = connection

    def _text(self) -> str:
        if self.connection is not None:
            return (
                f"The connection {self.connection!r} has no {self.name!r}.{did_you_mean(str(self.name), self.known)} "
                f"It provides {_listed(self.known)}."
            )
        connections = [name for name in self.known if f"{name}_session" in self.known]
        return (
            f"The container has no {self.name!r}.{did_you_mean(str(self.name), self.known)} Declare `NAME = Connection()` "
            f"in the container and ask for `NAME_session`. There are: {_listed(connections or self.known)}."
        )


class ConnectionNotConfigured(AppDbError, LookupError):
    """A container declares a connection, and the settings have no database for it."""

    def __init__(self, name: str, configured: Sequence[str], variable: str | None = None) -> None:
        super().__init__(name, configured, variable)
        self.name = name
        self.configured = tuple(configured)
        self.variable = variable or f"APP_DB_CONNECTIONS__{name.upper()}__URL"
        """The environment variable that configures the connection."""

    def _text(self) -> str:
        return (
            f"The connection {self.name!r} has no database.{did_you_mean(self.name, self.configured)} Set {self.variable}, "
            f"for example to sqlite:///{self.name}.db. Configured are: {_listed(self.configured)}."
        )


class UnknownModel(AppDbError, LookupError):
    """A model, table or statement belongs to no connection, or to one that the container does not declare."""

    def __init__(self, subject: str, known: Sequence[str], connection: str | None = None) -> None:
        super().__init__(subject, known, connection)
        self.subject = subject
        self.known = tuple(known)
        self.connection = connection

    def _text(self) -> str:
        if self.connection is None:
            return (
                f"No connection is known for {self.subject}. Derive the model from `orm_base('NAME')`, or put the table into "
                f"`metadata_of('NAME')`. Names in use are: {_listed(self.known)}."
            )
        return (
            f"The container has no connection for {self.subject}, which belongs to {self.connection!r}."
            f"{did_you_mean(self.connection, self.known)} Declare `{self.connection} = Connection()` in the container, or give "
            f"the model another base. There are: {_listed(self.known)}."
        )


class SpansDatabases(AppDbError):
    """A statement names tables of several connections. `places` has one table of each: its name, and that of the connection."""

    def __init__(self, places: Sequence[tuple[str, str]]) -> None:
        super().__init__(places)
        self.places = tuple(places)

    def _text(self) -> str:
        tables = " and ".join(f"the table {table!r} of {connection!r}" for table, connection in self.places)
        return (
            f"One statement can't reach several databases, and this statement names {tables}. Send a statement to each database, "
            "and combine the results in Python."
        )


class NotReflected(AppDbError, AttributeError):
    """A reflected model was used before `container.reflect()` had read its columns from the database."""

    def __init__(self, model: str, connection: str) -> None:
        super().__init__(model, connection)
        self.model = model
        self.connection = connection

    def _text(self) -> str:
        return (
            f"The model {self.model} has no columns yet: it gets them from the database of {self.connection!r}. Call "
            "`container.reflect()` once at start-up, after the modules of the models were imported."
        )


@dataclass(frozen=True)
class Unreflectable:
    """A reflected model whose columns can't be read from its database, and why."""

    model: str
    table: str
    connection: str
    problem: str

    def __str__(self) -> str:
        return f"{self.model}: the table {self.table!r} of {self.connection!r} {self.problem}."


class CannotReflect(AppDbError):
    """The columns of reflected models can't be read from the database. `models` lists these models. All others were reflected."""

    def __init__(self, models: Sequence[Unreflectable]) -> None:
        super().__init__(models)
        self.models = tuple(models)

    def _text(self) -> str:
        count = len(self.models)
        head = "A model can't be reflected:" if count == 1 else f"{count} models can't be reflected:"
        return "\n".join([head, *(f"  {model}" for model in self.models)])


class UnknownTable(AppDbError, AttributeError, KeyError):
    """A reflected schema was asked for a table that did not exist when the schema was read."""

    def __init__(self, table: str, connection: str, known: Sequence[str]) -> None:
        super().__init__(table, connection, known)
        self.table = table
        self.connection = connection
        self.known = tuple(known)

    def _text(self) -> str:
        return (
            f"The schema that was read from {self.connection!r} has no table {self.table!r}."
            f"{did_you_mean(self.table, self.known)} It has: {_listed(self.known)}. If the table is new, call "
            "`container.reflect_schema()` again."
        )


class NotWired(AppDbError):
    """A function was called before the container had injected its `Provide[...]` defaults."""

    def __init__(self, function: str, module: str, parameter: str | None = None, marker: str | None = None) -> None:
        super().__init__(function, module, parameter, marker)
        self.function = function
        self.module = module
        self.parameter = parameter
        self.marker = marker

    def _text(self) -> str:
        if self.parameter is None:
            return (
                f"{self.function} was called before a container was wired to its module. Call "
                f"`container.wire(modules=[{self.module!r}])` once at start-up, after the module was imported."
            )
        return (
            f"The parameter {self.parameter!r} of {self.function} was not injected: {self.marker} names nothing in the container "
            f"that is wired to {self.module!r}. Check the name; if a subclass of the container redefines it, use the string "
            "form, `Provide['NAME_session']`."
        )


# ---- units of work ----------------------------------------------------------------------------------------------


class UnitOfWorkError(AppDbError):
    """The base of errors in the use of a unit of work, or of its sessions."""


class NoUnitOfWork(UnitOfWorkError, NoTransaction):  # type: ignore[misc]  # transaction has no type hints
    """A session or the transaction manager was used outside a unit of work."""

    def __init__(self, subject: str = "The transaction manager", after_response: bool = False, awaited: bool = False) -> None:
        super().__init__(subject, after_response, awaited)
        self.subject = subject
        self.after_response = after_response
        self.awaited = awaited

    def _text(self) -> str:
        block = f"`{'async ' if self.awaited else ''}with container.transaction():`"
        if self.after_response:
            return (
                f"{self.subject} was used after the response had begun, by which the request's unit of work has ended. Begin "
                f"another one: put the code in {block} or in a function decorated with @transactional."
            )
        return (
            f"{self.subject} was used outside a unit of work. Put the code in {block} or in a function "
            "decorated with @transactional."
        )


class UnitOfWorkEnded(UnitOfWorkError):
    """A session, or a unit of work itself, was used after the unit had committed or aborted."""

    def __init__(self, subject: str) -> None:
        super().__init__(subject)
        self.subject = subject

    def _text(self) -> str:
        return (
            f"{self.subject} was used after its unit of work had ended. Don't keep a session between units: ask for it again "
            "(injected, or from the container) inside the next unit."
        )


class ForeignUnitOfWork(UnitOfWorkError):
    """A session, or a unit of work itself, was used from a thread, task or process that does not own it."""

    def __init__(self, subject: str, owner: str, user: str) -> None:
        super().__init__(subject, owner, user)
        self.subject = subject
        self.owner = owner
        self.user = user

    def _text(self) -> str:
        return f"{self.subject} belongs to {self.owner} and was used from {self.user}. {self._advice()}"

    def _advice(self) -> str:
        if self.user.startswith("task "):
            return (
                "A unit of work belongs to one task. Await the coroutine there instead of making a task of it; or give it "
                "`propagation='requires_new'`, for a unit of its own, which commits even if this one fails; or call "
                "`unit.adopt()` in the new task, which takes the unit over."
            )
        # A callback of the loop has inherited the unit of the task that registered it. There a
        # plain block is refused as well.
        options = "propagation='requires_new'" if self.owner.startswith("task ") else ""
        return f"Begin a unit of work there (`with container.transaction({options}):`) and ask for a session inside it."


class UnitOfWorkInUse(UnitOfWorkError):
    """A thread asked to take part in a unit of work while another thread takes part in it."""

    def __init__(self, user: str, other: str) -> None:
        super().__init__(user, other)
        self.user = user
        self.other = other

    def _text(self) -> str:
        return (
            f"{self.user} can't take part in the unit of work, because {self.other} is in a block of it. Sessions serve one "
            "thread at a time: let the threads follow each other, or give the function `propagation='requires_new'` for a unit "
            "of its own."
        )


class AlreadyInUnitOfWork(UnitOfWorkError, AlreadyInTransaction):  # type: ignore[misc]  # transaction has no type hints
    """An outermost unit of work was begun inside another one."""

    def __init__(self, wanted: str = "begin()") -> None:
        super().__init__(wanted)
        self.wanted = wanted

    def _text(self) -> str:
        return (
            f"{self.wanted} was called while a unit of work is under way. Use `with container.transaction():`, which joins it, "
            "or `transaction(propagation='requires_new')` for a unit of its own."
        )


class SessionIsManaged(UnitOfWorkError):
    """A session of a unit of work was told to begin or end its transaction. Only the unit does that."""

    def __init__(self, connection: str, method: str, by_text: bool = False) -> None:
        super().__init__(connection, method, by_text)
        self.connection = connection
        self.method = method
        self.by_text = by_text
        """Whether the text of a statement says so, and not a method."""

    def _text(self) -> str:
        if self.by_text:
            return (
                f"A statement has a {self.method.upper()} in it, and the {self.connection!r} session belongs to a unit of work. "
                "The unit begins and ends its transaction; session.begin_nested() takes a savepoint."
            )
        advice = {
            "commit": "The unit commits it, when its block ends; session.flush() sends what is pending now.",
            "connection().commit": "The unit commits it, when its block ends, and can't commit any more after this.",
            "begin": "Its transaction begins by itself; session.begin_nested() takes a savepoint.",
            "rollback": (
                "To undo a part, use `with session.begin_nested():`; to undo what the unit did on this connection, "
                f"call unit.rollback({self.connection!r}); to undo all, raise, or call unit.doom()."
            ),
        }.get(self.method, "To undo a part, use `with session.begin_nested():`; to undo all, raise, or call unit.doom().")
        return f"session.{self.method}() was called on the {self.connection!r} session, which belongs to a unit of work. {advice}"


class AwaitRequired(UnitOfWorkError):
    """A call that has to be awaited was made where it can't be awaited. Nothing was changed."""

    def __init__(self, subject: str, advice: str) -> None:
        super().__init__(subject, advice)
        self.subject = subject
        self.advice = advice

    def _text(self) -> str:
        return f"{self.subject} has to be awaited. {self.advice}."


class UnitOfWorkDoomed(UnitOfWorkError, DoomedTransaction):  # type: ignore[misc]  # transaction has no type hints
    """A doomed unit of work was told to commit. Nothing was committed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def _text(self) -> str:
        return (
            f"Nothing was committed, because the unit of work was doomed: {self.reason}. Let the error reach the outermost unit, "
            "or give the inner block propagation='nested' or 'requires_new' if the outer one may go on without it."
        )


class UnitOfWorkTimeout(UnitOfWorkError, TimeoutError):
    """A unit of work took longer than its `timeout`."""

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self.timeout = timeout

    def _text(self) -> str:
        return (
            f"The unit of work took longer than its timeout of {self.timeout:g} s and was stopped. "
            "Do less in it, or raise `timeout`."
        )


class ReplicaUnavailable(UnitOfWorkError, TransientError):  # type: ignore[misc]  # transaction has no type hints
    """A replica could not be reached. The read was not sent to the connection of which it is a replica."""

    def __init__(self, connection: str, replica_of: str, variable: str | None = None) -> None:
        super().__init__(connection, replica_of, variable)
        self.connection = connection
        self.replica_of = replica_of
        self.variable = variable or f"APP_DB_CONNECTIONS__{connection.upper()}__REPLICA_OF"

    def _text(self) -> str:
        return (
            f"The connection {self.connection!r}, a replica of {self.replica_of!r}, could not be reached; the cause says why. "
            f"Start its server; or read from {self.replica_of!r}, in a block of `session.using({self.replica_of!r})` or, in all "
            f"units, by setting {self.variable} to nothing."
        )


class InvalidUse(AppDbError):
    """A call that makes no sense. Most often its options contradict each other."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem, advice)
        self.problem = problem
        self.advice = advice

    def _text(self) -> str:
        return f"{self.problem}. {self.advice}."


class ReadOnlyViolation(UnitOfWorkError):
    """A write through the read-only session of `connection` was refused."""

    def __init__(self, connection: str, what: str, whole_unit: bool = False) -> None:
        super().__init__(connection, what, whole_unit)
        self.connection = connection
        self.what = what
        self.whole_unit = whole_unit

    def _text(self) -> str:
        if self.whole_unit:
            return (
                f"{self.what} was refused: the unit of work is read-only, and so is its {self.connection!r} session. "
                "Begin it without read_only=True."
            )
        return (
            f"{self.what} was refused: the connection {self.connection!r} is read-only. Use a session of a writable connection."
        )


# ---- committing -------------------------------------------------------------------------------------------------


class CommitError(AppDbError):
    """The base of errors in committing a unit of work."""


class NotAtomic(CommitError):
    """A unit of work wrote to several connections that can't commit together. Nothing was committed."""

    def __init__(
        self,
        connections: Sequence[str],
        two_phase: str = "APP_DB_CONNECTIONS__NAME__TWO_PHASE",
        atomicity: str = "APP_DB_ATOMICITY",
    ) -> None:
        super().__init__(connections, two_phase, atomicity)
        self.connections = tuple(connections)
        self.variables = (two_phase, atomicity)

    def _text(self) -> str:
        two_phase, atomicity = self.variables
        both_ways = ""
        if any(f"{name} (async)" in self.connections for name in self.connections):
            both_ways = "A session and an async session are two transactions, even of one connection. "
        return (
            f"Nothing was committed: the unit of work wrote to {_listed(self.connections)}, which can't commit together. "
            f"{both_ways}Write to one of them only, set {two_phase}=true for all of them but one, or set "
            f"{atomicity}=best_effort and accept that some of them may commit and others not."
        )


class PartialCommit(CommitError):
    """With `atomicity=best_effort`, a connection committed and a later one failed."""

    def __init__(self, committed: Sequence[str], failed: str, rolled_back: Sequence[str]) -> None:
        super().__init__(committed, failed, rolled_back)
        self.committed = tuple(committed)
        self.failed = failed
        self.rolled_back = tuple(rolled_back)

    def _text(self) -> str:
        return (
            f"Only a part was committed. Committed: {_listed(self.committed)}. Failed: {self.failed!r}. Rolled back: "
            f"{_listed(self.rolled_back)}. Repair the data by hand. The cause above says why {self.failed!r} failed."
        )


class TransactionLost(CommitError):
    """The database ended a transaction, and the unit of work did not know.

    Nothing was committed, unless `ended_by_statement` is true: then the transaction ended behind the unit, by a procedure that
    commits, for example, or by the driver's own `commit()`.
    """

    def __init__(self, connection: str, ended_by_statement: bool = False) -> None:
        super().__init__(connection, ended_by_statement)
        self.connection = connection
        self.ended_by_statement = ended_by_statement

    def _text(self) -> str:
        if self.ended_by_statement:
            return (
                f"The transaction of the connection {self.connection!r} ended behind the unit of work: by a procedure, for "
                "example, or by commit() or rollback() of the driver. What the unit had done there by then may be committed, "
                "and nothing later is. Leave the end of the transaction to the unit, or use an autonomous session."
            )
        return (
            f"Nothing was committed: the connection {self.connection!r} has lost its transaction. Either a statement failed, the "
            "code caught its error, and the database rolled the transaction back: put a statement that may fail in "
            "`with session.begin_nested():`. Or the code ended the transaction itself: leave that to the unit."
        )


class OutcomeUnknown(CommitError):
    """The connection was lost during COMMIT. The unit is either committed or rolled back, and app_db can't know which.

    `prepared` names the connections that recovery will commit or roll back.
    """

    def __init__(self, connection: str, committed: Sequence[str] = (), prepared: Sequence[str] = ()) -> None:
        super().__init__(connection, committed, prepared)
        self.connection = connection
        self.committed = tuple(committed)
        self.prepared = tuple(prepared)

    def _text(self) -> str:
        if self.prepared:
            return (
                f"The decision to commit was sent, and no answer came: {self.connection} can't be reached. "
                f"{_listed(self.prepared)} stay prepared until `python -m app_db recover` can read the decision, and commits all "
                "of them or none. Look in the database before trying again."
            )
        others = f" Committed before: {_listed(self.committed)}." if self.committed else ""
        return (
            f"The connection {self.connection!r} was lost during COMMIT, so its part is either committed or not.{others} "
            "Look in the database before trying again."
        )


class CommitUnconfirmed(CommitError):
    """The unit of work has committed, but a database that had prepared its branch did not confirm the commit."""

    def __init__(self, connections: Sequence[str]) -> None:
        super().__init__(connections)
        self.connections = tuple(connections)

    def _text(self) -> str:
        return (
            f"The unit of work was committed, but {_listed(self.connections)} did not confirm it. Don't repeat the unit: "
            "`python -m app_db recover` commits what is prepared there as soon as the database can be reached. Until then "
            "its rows are locked and not yet visible."
        )


class AbortedByRecovery(CommitError, TransientError):  # type: ignore[misc]  # transaction has no type hints
    """A recovery rolled the unit of work back before it decided to commit. Nothing was committed, and it can be repeated."""

    def __init__(self, unit: str) -> None:
        super().__init__(unit)
        self.unit = unit

    def _text(self) -> str:
        return (
            f"Nothing was committed: a recovery took the process of the unit of work {self.unit} for dead, and rolled it back. "
            "Repeat the unit (`attempts=2` does), or give recovery a longer grace."
        )


class HookFailed(CommitError):
    """Hooks failed after the unit of work had committed. `errors` are the exceptions that they raised."""

    def __init__(self, errors: Sequence[BaseException]) -> None:
        super().__init__(errors)
        self.errors = tuple(errors)

    def _text(self) -> str:
        causes = "; ".join(f"{type(error).__name__}: {_without_address(error)}" for error in self.errors)
        return (
            f"The unit of work was committed, and then {len(self.errors)} of its hooks failed ({causes}). "
            "Don't repeat the unit; do the work of these hooks in another way."
        )


# ---- tests -------------------------------------------------------------------------------------------------------------


class IsolationError(AppDbError):
    """The base of errors that happen only because a test is isolated."""


class CannotIsolate(IsolationError):
    """An isolated test asked for something that can't be rolled back with it. It was not done."""

    def __init__(self, connection: str, subject: str, advice: str) -> None:
        super().__init__(connection, subject, advice)
        self.connection = connection
        self.subject = subject
        self.advice = advice

    def _text(self) -> str:
        where = f" on {self.connection!r}" if self.connection else ""
        return f"{self.subject} can't be isolated{where}, and was not done. {self.advice}."


class IsolationTimeout(IsolationError):
    """A unit of work in an isolated test waited too long for another unit, which uses the same connection."""

    def __init__(self, connection: str, holders: Sequence[str], seconds: float) -> None:
        super().__init__(connection, holders, seconds)
        self.connection = connection
        self.holders = tuple(holders)
        self.seconds = seconds

    def _text(self) -> str:
        what = f"the connection {self.connection!r}" if self.connection else "a connection"
        return (
            f"Timed out after {self.seconds:g} s waiting for {what}: the units of an isolated test run one after the other, and "
            f"this one waits for {'; '.join(self.holders) or 'another thread or task'}. End that unit first, run this one inside "
            "it, or isolate with more `patience`."
        )


class IsolationBroken(IsolationError):
    """An isolated test left something open, or something in it did not happen as it would outside a test."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(problems)
        self.problems = tuple(problems)

    def _text(self) -> str:
        head = "The isolated test left something open, or could not be isolated completely:"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class NotIsolated(IsolationError):
    """A connection was used without isolation, where only isolated tests may use it. It was refused."""

    def __init__(self, connection: str, used_at: str | None, by: str, advice: str) -> None:
        super().__init__(connection, used_at, by, advice)
        self.connection = connection
        self.used_at = used_at
        """The line of the application or the test that used it."""
        self.by = by
        """The test or the fixture that led there, as text."""
        self.advice = advice

    def _text(self) -> str:
        where = ", ".join(filter(None, [f"at {self.used_at}" if self.used_at else "", f"by {self.by}" if self.by else ""]))
        used = f" ({where})" if where else ""
        return f"The connection {self.connection!r} was used without isolation{used}. It was refused. {self.advice}."


class UnexpectedStatements(AppDbError, AssertionError):
    """A block sent more statements than a test expected, or fewer. Test runners count it as a failure."""

    def __init__(self, problems: Sequence[str], sent: Sequence[str]) -> None:
        super().__init__(problems, sent)
        self.problems = tuple(problems)
        self.sent = tuple(sent)

    def _text(self) -> str:
        listed = [f"  {number}. {line}" for number, line in enumerate(self.sent, 1)]
        head = "The statements are, in the order in which they were sent:" if self.sent else "No statement was sent."
        return "\n".join([*self.problems, head, *listed])


class LiveServerError(AppDbError):
    """The server that a test wants for its application did not start, or did not end."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem, advice)
        self.problem = problem
        self.advice = advice

    def _text(self) -> str:
        return f"{self.problem}. {self.advice}."


class CannotMakeDatabase(AppDbError):
    """A database that tests need for themselves could not be created."""

    def __init__(self, connection: str, database: str, reason: str) -> None:
        super().__init__(connection, database, reason)
        self.connection = connection
        self.database = database
        self.reason = reason

    def _text(self) -> str:
        return (
            f"The database {self.database!r} could not be created for the connection {self.connection!r} ({self.reason}). Let "
            "the user of that connection create databases, and end what is in the way. For workers of pytest-xdist, you can also "
            "create it beforehand, or give each worker another URL and set app_db_worker_databases = false in the configuration "
            "of pytest."
        )


class CannotMakeTables(AppDbError):
    """The tables of the models are there already, and the tests can neither use nor drop them."""

    def __init__(self, connection: str, reason: str, advice: str) -> None:
        super().__init__(connection, reason, advice)
        self.connection = connection
        self.reason = reason
        self.advice = advice

    def _text(self) -> str:
        return f"The tests can't make the tables of the connection {self.connection!r}: {self.reason}. {self.advice}."


# ---- migrations --------------------------------------------------------------------------------------------------------


class MigrationError(AppDbError):
    """The base of errors of migrations."""


class AlembicMissing(MigrationError, ImportError):
    """Migrations are asked for, and Alembic is not installed."""

    def __init__(self) -> None:
        super().__init__()

    def _text(self) -> str:
        return "Migrations need Alembic, which is not installed. pip install 'app-db[alembic]'."


class UnusableMigrations(MigrationError):
    """The migrations of a connection can't be run as they are. Nothing was changed."""

    def __init__(self, connection: str, problem: str, advice: str) -> None:
        super().__init__(connection, problem, advice)
        self.connection = connection
        self.problem = problem
        self.advice = advice

    def _text(self) -> str:
        return f"The migrations of {self.connection!r} can't be used: {self.problem}. {self.advice}."


@dataclass(frozen=True)
class MigrationAccount:
    """What is in the databases after a migration has failed.

    `committed` has by connection the revisions that are there, and `rolled_back` the connections whose revisions were undone.
    `left` are those that were not begun. If `is_partial` is true, a part of the failed revision may be there too.
    """

    committed: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    rolled_back: Sequence[str] = ()
    left: Sequence[str] = ()
    is_partial: bool = False


class MigrationFailed(MigrationError):
    """A migration failed. `account` says what is in the databases now. `revision` is empty if a COMMIT failed."""

    def __init__(self, connection: str, revision: str, reason: str, account: MigrationAccount) -> None:
        super().__init__(connection, revision, reason, account)
        self.connection = connection
        self.revision = revision
        self.reason = reason
        self.account = account

    def _text(self) -> str:
        what = f"The revision {self.revision!r}" if self.revision else "The COMMIT of the migrations"
        lines = [f"{what} of {self.connection!r} failed: {self.reason}."]
        for name, revisions in self.account.committed.items():
            lines.append(f"Committed, of {name!r}: {', '.join(revisions)}.")
        if self.account.rolled_back:
            lines.append(f"Rolled back: {_listed(self.account.rolled_back)}.")
        if self.account.left:
            lines.append(f"Not begun: {_listed(self.account.left)}.")
        if self.account.is_partial:
            lines.append(
                f"Not all statements of {self.revision!r} can be rolled back, so a part of it may have stayed. Compare the "
                "tables with the file of the revision. Either undo that part, correct the cause, and migrate again. Or run the "
                f"statements that are missing, then `app-db stamp --connection {self.connection} {self.revision}` (after "
                f"a downgrade: the revision before {self.revision!r}), then `app-db migrate --check`, which lists what differs."
            )
            return " ".join(lines)
        if not self.account.committed:
            lines.append("Nothing was changed.")
        return " ".join([*lines, "Correct the cause, and migrate again."])


class MigrationLockTimeout(MigrationError, TimeoutError):
    """Another process held the lock of the migrations for too long. Nothing was changed in the database of `connection`."""

    def __init__(self, connection: str, seconds: float, holder: str, committed: Sequence[str] = ()) -> None:
        super().__init__(connection, seconds, holder, committed)
        self.connection = connection
        self.seconds = seconds
        self.holder = holder
        self.committed = tuple(committed)

    def _text(self) -> str:
        before = f"Migrated before: {_listed(self.committed)}. " if self.committed else ""
        return (
            f"The database of {self.connection!r} has been migrated by another process for more than {self.seconds:g} s. "
            f"The lock is held by {self.holder}. {before}Wait for it, end it if it hangs, or raise `lock_timeout`."
        )


# ---- decision files -----------------------------------------------------------------------------------------------


class DecisionFileUnusable(AppDbError):
    """The SQLite file of decisions can't be used. If `undecided` is true, the unit that failed was not decided."""

    def __init__(self, path: str, problem: str, remedy: str, undecided: bool = True) -> None:
        super().__init__(path, problem, remedy, undecided)
        self.path = path
        self.problem = problem
        self.remedy = remedy
        self.undecided = undecided

    def _text(self) -> str:
        return f"The decision file {self.path} can't be used: {self.problem}. {self.remedy}."


class DecisionFileDamaged(DecisionFileUnusable):
    """The SQLite file of decisions is damaged, or it is another file. Nothing was decided, and the file was not changed."""

    def __init__(self, path: str, problem: str) -> None:
        remedy = (
            "Don't delete it: it may be the only record of which units of work have committed. Restore it. Or read what it still "
            "says, commit or roll back by hand what is prepared in the databases, and then move it away together with its -wal "
            "and -shm files: app_db creates a new one"
        )
        super().__init__(path, problem, remedy)
        self.args = (path, problem)


class DecisionFileFull(DecisionFileUnusable):
    """The disk of the SQLite file of decisions is full. Nothing was decided."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "its disk is full", "Make room, then run `python -m app_db recover`")
        self.args = (path,)
