"""Where the decision about a unit of work is written, so that no crash can lose it.

A decision stands under its unit's id, and whoever writes first wins: the committer, who writes commit once every branch is
prepared, or a recovery, which writes abort before it rolls anything back. Both obey what stands.

A unit about which nothing stands has not committed. So a decision to commit may be forgotten only when no branch of the unit is
prepared any more, and one to abort only when no committer can come to ask.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import Column, Double, MetaData, String, Table, Text
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.schema import CreateTable

from app_db.xids import check_connection_name, check_log_id, check_unit_id, new_log_id

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, RootTransaction


class Verdict(StrEnum):
    """What becomes of a unit of work."""

    COMMIT = "commit"
    ABORT = "abort"


@dataclass(frozen=True)
class Decision:
    """What stands about one unit of work. What has the wrong form raises ValueError, so that all of it is harmless in SQL."""

    unit: str
    verdict: Verdict
    branches: tuple[str, ...]
    decided_at: float

    def __post_init__(self) -> None:
        check_unit_id(self.unit)
        for branch in self.branches:
            check_connection_name(branch)


class DecisionLog(Protocol):
    """Keeps decisions, one for each unit. Threads and processes may share it."""

    @property
    def place(self) -> str:
        """Where the log is, as people are told."""
        ...

    @property
    def id(self) -> str:
        """The log's id, which is made with the log and stays; asking for it makes the log."""
        ...

    def decide(self, unit: str, verdict: Verdict, branches: Sequence[str]) -> Verdict:
        """Write a verdict unless one stands; return the one that stands. It is durable by then.

        After an error it is not known whether the verdict stands. Asking again is safe.
        """
        ...

    def find(self, unit: str) -> Verdict | None:
        """Return the verdict that stands about a unit, if there is one."""
        ...

    def decisions(self) -> list[Decision]:
        """Return all decisions that stand, oldest first."""
        ...

    def forget(self, units: Collection[str]) -> None:
        """Remove what stands about `units`. A crash may bring it back."""
        ...


def made(unit: str, verdict: Verdict, branches: Iterable[str]) -> Decision:
    return Decision(unit, verdict, tuple(branches), time.time())


def by_age(decision: Decision) -> tuple[float, str]:
    return decision.decided_at, decision.unit


def batches(units: Collection[str], size: int) -> Iterator[list[str]]:
    ordered = sorted(map(check_unit_id, units))  # two that forget the same rows then meet in the same order, and don't deadlock
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


# ---- a table -------------------------------------------------------------------------------------------------------------

_TABLE = "app_db_decisions"
_ID_ROW = "log"
"""The key of the row that holds the log's id. No unit's id is as short."""

# MySQL compares text without regard to case unless told otherwise, and its default engine may be one without transactions.
_table = Table(
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

_DURABLE = (
    "set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' "
    "ELSE current_setting('synchronous_commit') END, true)"
)
"""With `synchronous_commit = off`, PostgreSQL answers COMMIT before the commit is on disk. It never does so for prepared
branches, and must not for what decides about them."""

_ATTEMPTS = 5


class TableLog:
    """Decisions in a table of one of the databases: recovery may then run on any host.

    `engine` is asked each time. A decision waits for at most about `lock_wait` seconds for another transaction that has written
    about the same unit, and is a DBAPIError then; SQLite waits as long as its connections are told to.
    """

    def __init__(self, connection_name: str, engine: Callable[[], Engine], *, lock_wait: float = 5.0) -> None:
        self.place = f"the table {_TABLE} of {connection_name!r}"
        self._engine = engine
        self._lock_wait = lock_wait
        self._id: str | None = None
        self._ensured: weakref.ref[Engine] | None = None
        self._creation: weakref.ref[RootTransaction] | None = None

    @property
    def id(self) -> str:
        """The log's id. Where `ensure_within` may have to make the log, ask after it."""
        if self._id is None:
            self.ensure()
        if self._id is None:
            raise RuntimeError("ensure() has found no id")  # can't happen
        return self._id

    def exists(self) -> bool:
        """Return whether the log has been made, without making it."""
        return bool(self._read(_select_id()))

    def ensure(self) -> None:
        """Make the table and the log's id unless they are there. Others may do so at the same time."""
        engine = self._engine()
        if not self._is_ensured(engine):
            self._remember(self._found_or_created(engine), engine)

    def ensure_within(self, connection: Connection) -> None:
        """Do the same inside the transaction under way on `connection` if its database is one that has one writer at a time.

        Should that transaction roll back, so does this, and the next call does it again.
        """
        if connection.dialect.name != "sqlite":
            self.ensure()
        elif not self._is_ensured(self._engine()):
            self._ensure_within(connection)

    def _ensure_within(self, connection: Connection) -> None:
        connection.execute(CreateTable(_table, if_not_exists=True))
        found = connection.exec_driver_sql(_select_id()).scalar()
        transaction = connection.get_transaction()
        if found is None:
            self._id = self._id or new_log_id()
            connection.exec_driver_sql(_insert_id(self._id))
            self._creation = None if transaction is None else weakref.ref(transaction)
        elif self._creation is not None and self._creation() is transaction:
            self._id = check_log_id(found)
        else:  # made by another transaction, which has committed, or this one would not see it
            self._remember(check_log_id(found), self._engine())

    def decide(self, unit: str, verdict: Verdict, branches: Sequence[str]) -> Verdict:
        """Write a verdict in a transaction of its own, unless one stands; return the one that stands."""
        decision = made(unit, verdict, branches)
        self.ensure()
        for attempt in range(1, _ATTEMPTS + 1):
            engine = self._engine()
            try:
                self._write(engine, self._insert(decision, engine, f"{1000 * self._lock_wait:.0f}"))
                return verdict
            except DBAPIError as error:
                refused = isinstance(error, IntegrityError)
                standing = self.find(unit) if refused else None
                if standing is not None:
                    return standing
                # Forgotten since, lost with its connection, or rolled back: first one wins whoever asks, and however often.
                if attempt == _ATTEMPTS or not (refused or _is_worth_repeating(error)):
                    raise
        raise AssertionError("unreachable")

    def decide_within(self, connection: Connection, unit: str, branches: Sequence[str]) -> None:
        """Write commit in the transaction under way on `connection`, whose COMMIT is then the decision.

        Raises IntegrityError where something stands: that transaction can't commit then.
        """
        connection.exec_driver_sql(self._insert(made(unit, Verdict.COMMIT, branches), connection))

    def statement(self, unit: str, branches: Sequence[str]) -> str:
        """Return the statement that `decide_within` executes, without parameters."""
        return self._insert(made(unit, Verdict.COMMIT, branches), self._engine())

    def find(self, unit: str) -> Verdict | None:
        """Return the verdict that stands about a unit, if there is one."""
        rows = self._read(f"SELECT verdict FROM {_TABLE} WHERE unit = '{check_unit_id(unit)}'")  # noqa: S608  # checked
        return Verdict(rows[0][0]) if rows else None

    def decisions(self) -> list[Decision]:
        """Return all decisions that stand, oldest first."""
        rows = self._read(f"SELECT {_COLUMNS} FROM {_TABLE} WHERE unit <> '{_ID_ROW}'")  # noqa: S608  # constants
        found = [
            Decision(unit, Verdict(verdict), tuple(filter(None, branches.split(","))), decided_at)
            for unit, verdict, branches, decided_at in rows
        ]
        return sorted(found, key=by_age)

    def forget(self, units: Collection[str]) -> None:
        """Remove what stands about `units`."""
        for batch in batches(units, 500):
            listed = ", ".join(f"'{unit}'" for unit in batch)
            self._write(self._engine(), f"DELETE FROM {_TABLE} WHERE unit IN ({listed})")  # noqa: S608  # checked

    def _is_ensured(self, engine: Engine) -> bool:
        return self._ensured is not None and self._ensured() is engine

    def _remember(self, log: str, engine: Engine) -> None:
        self._id = log
        self._creation = None
        self._ensured = weakref.ref(engine)

    def _found_or_created(self, engine: Engine) -> str:
        for attempt in range(1, _ATTEMPTS + 1):
            found = self._read(_select_id())
            if found:
                return check_log_id(found[0][0])
            try:
                with engine.begin() as connection:
                    connection.execute(CreateTable(_table, if_not_exists=True))
                    connection.exec_driver_sql(_insert_id(self._id or new_log_id()))
            except DBAPIError:  # most likely somebody else is doing the same, and IF NOT EXISTS helps PostgreSQL little
                if attempt == _ATTEMPTS and not self._read(_select_id()):
                    raise
                time.sleep(0.01 * attempt)
        return check_log_id(self._read(_select_id())[0][0])

    def _insert(self, decision: Decision, on: Engine | Connection, lock_wait: str = "") -> str:
        values = f"'{decision.unit}', '{decision.verdict}', '{','.join(decision.branches)}', {decision.decided_at!r}"
        into = f"INSERT INTO {_TABLE} ({_COLUMNS})"
        if on.dialect.name != "postgresql":
            return f"{into} VALUES ({values})"
        # What the statement sets holds until the end of its transaction, and costs no round trip of its own.
        sets = f"{_DURABLE} AS durable"
        if lock_wait:
            sets += f", set_config('lock_timeout', '{lock_wait}', true) AS patient"
        return f"{into} SELECT {values} FROM {sets}"  # noqa: S608  # a Decision has checked it

    def _write(self, engine: Engine, statement: str) -> None:
        """Execute one statement and commit it."""
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement)  # one round trip, not three
            elif engine.dialect.name in ("mysql", "mariadb"):
                self._write_to_mysql(connection, statement)
            else:
                connection.exec_driver_sql(statement)
                connection.commit()

    def _write_to_mysql(self, connection: Connection, statement: str) -> None:
        wait = max(1, round(self._lock_wait))
        if getattr(connection.dialect, "is_mariadb", False):
            connection.exec_driver_sql(f"SET STATEMENT innodb_lock_wait_timeout = {wait} FOR {statement}")
            return connection.commit()
        usual = int(connection.exec_driver_sql("SELECT @@SESSION.innodb_lock_wait_timeout").scalar_one())
        connection.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {wait}")
        try:
            connection.exec_driver_sql(statement)
            connection.commit()
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {usual}")

    def _read(self, statement: str) -> Sequence[Any]:
        """Return the rows of one statement; none where there is no table yet."""
        engine = self._engine()
        try:
            if engine.dialect.name == "sqlite":
                return _read_beside_writers(engine, statement)
            with engine.connect() as connection:
                if engine.dialect.name == "postgresql":
                    connection.execution_options(isolation_level="AUTOCOMMIT")
                return connection.exec_driver_sql(statement).all()
        except DBAPIError as error:
            if _says_there_is_no_table(error):
                return []
            raise


def _select_id() -> str:
    return f"SELECT branches FROM {_TABLE} WHERE unit = '{_ID_ROW}'"  # noqa: S608  # constants


def _insert_id(log: str) -> str:
    values = f"'{_ID_ROW}', 'id', '{check_log_id(log)}', {time.time()!r}"
    return f"INSERT INTO {_TABLE} ({_COLUMNS}) VALUES ({values})"  # noqa: S608  # checked


def _read_beside_writers(engine: Engine, statement: str) -> list[Any]:
    """Read without a transaction of SQLAlchemy's, which would be one that writes: they wait for each other on SQLite."""
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute(statement)
        return list(cursor.fetchall())
    except engine.dialect.loaded_dbapi.Error as error:
        raise OperationalError(statement, None, error) from error
    finally:
        connection.close()


def _says_there_is_no_table(error: DBAPIError) -> bool:
    return _code(error) in ("42P01", 1146) or "no such table" in str(error.orig)


def _is_worth_repeating(error: DBAPIError) -> bool:
    """Return whether the same may work now: on another connection, or because the database picked a victim."""
    return error.connection_invalidated or _code(error) in ("40001", "40P01", 1213)


def _code(error: DBAPIError) -> object:
    """Return PostgreSQL's SQLSTATE or MySQL's number of an error."""
    arguments: tuple[object, ...] = getattr(error.orig, "args", ())
    if arguments and isinstance(arguments[0], int):
        return arguments[0]
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
