"""Decisions in a table: what is said to one in SQL, and the log in a table of one of the application's databases."""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Double, Engine, MetaData, String, Table, Text, inspect
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.schema import CreateTable

from app_db._databases.registry import database_of
from app_db._two_phase.decisions import Decision, Verdict, batches, by_age, made
from app_db._two_phase.xids import check_log_id, check_unit_id, log_id_for, new_log_id

if TYPE_CHECKING:
    from sqlalchemy import Connection


_TABLE = "app_db_decisions"
_ID_ROW = "log"
"""The key of the row that holds the log's id. No unit's id is as short."""


# MySQL compares text without regard to case unless told otherwise, and its default engine may be one without transactions.
@cache
def decisions_table() -> Table:
    """Return the table of decisions, as SQLAlchemy describes it."""
    from sqlalchemy.dialects import mysql  # imported where a table is made: it takes longer than all of app_db's own modules

    return Table(
        _TABLE,
        MetaData(),
        Column(
            "unit",
            String(32).with_variant(mysql.VARCHAR(32, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"),
            primary_key=True,
        ),
        Column("verdict", String(8), nullable=False),
        Column("branches", Text, nullable=False),
        Column("decided_at", Double, nullable=False),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )


_COLUMNS = "unit, verdict, branches, decided_at"
_INSERT = f"INSERT INTO {_TABLE} ({_COLUMNS})"

_ATTEMPTS = 5


class DecisionRows(ABC):
    """A log whose decisions are rows of a table. What differs between databases is how a statement is executed."""

    def __init__(self, application: str) -> None:
        self._application = application

    @property
    def id(self) -> str:
        """The application's id of the log, which is on disk by then."""
        return log_id_for(self._application, self.ensure())

    def id_if_made(self) -> str | None:
        """Return the id of a log that is there. Looking makes nothing, not even an empty SQLite file."""
        found = self._read(select_id())
        return log_id_for(self._application, check_log_id(found[0][0])) if found else None

    @abstractmethod
    def ensure(self) -> str:
        """Make the table and the log's id unless they are there; return what was made. Others may do so at the same time."""

    def decide(self, unit: str, verdict: Verdict, branches: Sequence[str]) -> Verdict:
        """Write a verdict in a transaction of its own, unless one stands; return the one that stands."""
        decision = made(unit, verdict, branches)
        self.ensure()
        return self._decide(decision)

    def find(self, unit: str) -> Verdict | None:
        """Return the verdict that stands about a unit, if there is one."""
        found = self.decision(unit)
        return None if found is None else found.verdict

    def decision(self, unit: str) -> Decision | None:
        """Return all that stands about a unit, if something does."""
        rows = self._read(f"SELECT {_COLUMNS} FROM {_TABLE} WHERE unit = '{check_unit_id(unit)}'")  # noqa: S608  # checked
        return self._decision_of(rows[0]) if rows else None

    def decisions(self) -> list[Decision]:
        """Return all decisions that stand, oldest first."""
        rows = self._read(f"SELECT {_COLUMNS} FROM {_TABLE} WHERE unit <> '{_ID_ROW}'")  # noqa: S608  # constants
        return sorted(map(self._decision_of, rows), key=by_age)

    def forget(self, units: Collection[str]) -> None:
        """Remove what stands about `units`."""
        for batch in batches(units, 500):
            listed = ", ".join(f"'{unit}'" for unit in batch)
            self._write(f"DELETE FROM {_TABLE} WHERE unit IN ({listed})")  # noqa: S608  # checked

    def _decide(self, decision: Decision) -> Verdict:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._write(self._insert(decision))
                return decision.verdict
            except DBAPIError as error:
                refused = isinstance(error, IntegrityError)
                standing = self.decision(decision.unit) if refused else None
                if standing is not None:
                    return standing.verdict
                # Forgotten since, lost with its connection, or rolled back: first one wins whoever asks, and however often.
                if attempt == _ATTEMPTS or not (refused or error.connection_invalidated or self._is_victim(error)):
                    raise
        raise AssertionError("unreachable")

    def _insert(self, decision: Decision) -> str:
        """Return the statement that writes a decision, which the table refuses where one stands."""
        return f"{_INSERT} VALUES ({_values(decision)})"

    def _decision_of(self, row: Sequence[Any]) -> Decision:
        unit, verdict, branches, decided_at = row
        return Decision(unit, Verdict(verdict), tuple(filter(None, branches.split(","))), decided_at)

    def _is_victim(self, error: DBAPIError) -> bool:
        """Return whether the database rolled back what was written in favour of another transaction."""
        return False

    @abstractmethod
    def _write(self, statement: str) -> None:
        """Execute one statement and commit it. Raises IntegrityError where a decision stands already."""

    @abstractmethod
    def _read(self, statement: str) -> Sequence[Any]:
        """Return the rows of one statement; none where there is no table yet."""


class TableLog(DecisionRows):
    """Decisions in a table of one of the databases: recovery may then run on any host.

    `engine` is asked each time. A decision waits for at most about `lock_wait` seconds for another transaction that has written
    about the same unit, and is a DBAPIError then; SQLite waits as long as its connections are told to.
    """

    def __init__(
        self, connection: str, engine: Callable[[], Engine], application: str = "app_db", *, lock_wait: float = 5.0
    ) -> None:
        super().__init__(application)
        self.place = f"the table {_TABLE} of {connection!r}"
        self._engine = engine
        self._lock_wait = lock_wait
        self._made: tuple[weakref.ref[Engine], str] | None = None

    def ensure(self) -> str:
        """Make the table and the log's id unless they are there; return what was made. Others may do so at the same time.

        It is a transaction of its own, for which SQLite waits until nobody writes: do it before writing there.
        """
        engine, made = self._engine(), self._made
        if made is None or made[0]() is not engine:
            with self._beside() as log:
                made = self._made = weakref.ref(engine), log._found_or_made()
        return made[1]

    def id_if_made(self) -> str | None:
        """Return the id of a log that is there. Looking makes nothing, not even an empty SQLite file."""
        engine = self._engine()
        file = database_of(engine.dialect.name).file_of(engine.url)
        return super().id_if_made() if file is None or file.exists() else None

    def decide_within(self, connection: Connection, unit: str, branches: Sequence[str]) -> None:
        """Write commit in the transaction under way on `connection`, whose COMMIT is then the decision.

        Raises IntegrityError where something stands: that transaction can't commit then.
        """
        connection.exec_driver_sql(_insert_on(connection, made(unit, Verdict.COMMIT, branches)))

    def statement(self, unit: str, branches: Sequence[str]) -> str:
        """Return the statement that `decide_within` executes, without parameters."""
        return _insert_on(self._engine(), made(unit, Verdict.COMMIT, branches))

    def _decide(self, decision: Decision) -> Verdict:
        if decision.verdict is not Verdict.MOVED:
            return super()._decide(decision)
        with self._beside() as log:  # a unit that moves may itself hold the only connection of the usual pool
            return super(TableLog, log)._decide(decision)

    @contextmanager
    def _beside(self) -> Generator[TableLog]:
        """Give the same log by connections of its own."""
        with _beside(self._engine()) as engine:
            log = copy(self)
            log._engine = lambda: engine
            yield log

    def _found_or_made(self) -> str:
        """Return what is in the row of the id, made at the same time by whoever needs it, and once."""
        give_up = time.monotonic() + self._lock_wait
        for attempt in range(_ATTEMPTS):
            found = self._read(select_id())
            if found:
                return check_log_id(found[0][0])
            try:
                self._make(self._engine())
            except DBAPIError:  # most likely somebody else is doing the same, and IF NOT EXISTS helps PostgreSQL little
                if attempt == _ATTEMPTS - 1 or time.monotonic() > give_up:
                    raise
                time.sleep(0.01 * attempt)
        return check_log_id(self._read(select_id())[0][0])

    def _make(self, engine: Engine) -> None:
        with engine.begin() as connection:  # nobody else uses it: what is set stays
            database_of(engine.dialect.name).limit_log_creation(connection, self._lock_wait)
            if not inspect(connection).has_table(_TABLE):  # IF NOT EXISTS takes the right to create one
                connection.execute(CreateTable(decisions_table(), if_not_exists=True))
            connection.exec_driver_sql(insert_id(new_log_id()))

    def _is_victim(self, error: DBAPIError) -> bool:
        return error.orig is not None and database_of(self._engine().dialect.name).is_victim(error.orig)

    def _insert(self, decision: Decision) -> str:
        return _insert_on(self._engine(), decision, self._lock_wait)

    def _write(self, statement: str) -> None:
        engine = self._engine()
        with engine.connect() as connection:
            database_of(engine.dialect.name).write_alone(connection, statement, self._lock_wait)

    def _read(self, statement: str) -> Sequence[Any]:
        engine = self._engine()
        database = database_of(engine.dialect.name)
        try:
            return database.read_alone(engine, statement)
        except DBAPIError as error:
            if database.says_there_is_no_table(error):
                return []
            raise


def select_id() -> str:
    """Return the statement that reads what the log's id is made of."""
    return f"SELECT branches FROM {_TABLE} WHERE unit = '{_ID_ROW}'"  # noqa: S608  # constants


def insert_id(log: str) -> str:
    """Return the statement that writes what the log's id is made of."""
    return f"{_INSERT} VALUES ('{_ID_ROW}', 'id', '{check_log_id(log)}', {time.time()!r})"


def _values(decision: Decision) -> str:
    # A Decision has checked that it is harmless in SQL.
    return f"'{decision.unit}', '{decision.verdict}', '{','.join(decision.branches)}', {decision.decided_at!r}"


def _insert_on(on: Engine | Connection, decision: Decision, wait: float | None = None) -> str:
    return database_of(on.dialect.name).durable_insert(_INSERT, _values(decision), wait)


@contextmanager
def _beside(engine: Engine) -> Generator[Engine]:
    """Give an engine with connections of its own: a unit that is about to commit may hold the only one of the usual pool.

    Where a unit shuts all other connections out (SQLite), that would help nobody.
    """
    if database_of(engine.dialect.name).has_one_writer:
        yield engine
        return
    beside = Engine(engine.pool.recreate(), engine.dialect, engine.url)
    try:
        yield beside
    finally:
        beside.dispose()
