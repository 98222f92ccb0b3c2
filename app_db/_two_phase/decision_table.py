"""Decisions in a table of one of the databases, so that recovery may run on any host."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Double, Engine, MetaData, String, Table, Text, inspect
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.schema import CreateTable

from app_db._two_phase.decisions import Decision, Verdict, batches, by_age, made
from app_db._two_phase.xids import check_log_id, check_unit_id, log_id_for, new_log_id
from app_db.errors import code_of

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import URL


_TABLE = "app_db_decisions"
_ID_ROW = "log"
"""The key of the row that holds the log's id. No unit's id is as short."""


# MySQL compares text without regard to case unless told otherwise, and its default engine may be one without transactions.
@cache
def _table() -> Table:
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

_DURABLE = (
    "set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' "
    "ELSE current_setting('synchronous_commit') END, {local})"
)
"""With `synchronous_commit = off`, PostgreSQL answers COMMIT before the commit is on disk. It never does so for prepared
branches, and must not for what decides about them."""

_ATTEMPTS = 5


class TableLog:
    """Decisions in a table of one of the databases: recovery may then run on any host.

    `engine` is asked each time. A decision waits for at most about `lock_wait` seconds for another transaction that has written
    about the same unit, and is a DBAPIError then; SQLite waits as long as its connections are told to.
    """

    def __init__(
        self, connection: str, engine: Callable[[], Engine], application: str = "app_db", *, lock_wait: float = 5.0
    ) -> None:
        self.place = f"the table {_TABLE} of {connection!r}"
        self._engine = engine
        self._application = application
        self._lock_wait = lock_wait
        self._made: tuple[weakref.ref[Engine], str] | None = None

    @property
    def id(self) -> str:
        """The application's id of the log, which is on disk by then."""
        return log_id_for(self._application, self.ensure())

    def id_if_made(self) -> str | None:
        """Return the id of a log that is there. Looking makes nothing, not even an empty SQLite file."""
        file = _sqlite_file(self._engine().url)
        found = self._read(_select_id()) if file is None or file.exists() else []
        return log_id_for(self._application, check_log_id(found[0][0])) if found else None

    def ensure(self) -> str:
        """Make the table and the log's id unless they are there; return what was made. Others may do so at the same time.

        It is a transaction of its own, for which SQLite waits until nobody writes: do it before writing there.
        """
        engine, made = self._engine(), self._made
        if made is None or made[0]() is not engine:
            made = self._made = weakref.ref(engine), self._found_or_made(engine)
        return made[1]

    def decide(self, unit: str, verdict: Verdict, branches: Sequence[str]) -> Verdict:
        """Write a verdict in a transaction of its own, unless one stands; return the one that stands."""
        decision = made(unit, verdict, branches)
        self.ensure()
        with self._engine_for(verdict) as engine:
            return self._decide(decision, engine)

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
        found = self.decision(unit)
        return None if found is None else found.verdict

    def decision(self, unit: str) -> Decision | None:
        """Return all that stands about a unit, if something does."""
        return self._decision(unit, self._engine())

    def decisions(self) -> list[Decision]:
        """Return all decisions that stand, oldest first."""
        rows = self._read(f"SELECT {_COLUMNS} FROM {_TABLE} WHERE unit <> '{_ID_ROW}'")  # noqa: S608  # constants
        return sorted(map(_decision_of, rows), key=by_age)

    def forget(self, units: Collection[str]) -> None:
        """Remove what stands about `units`."""
        for batch in batches(units, 500):
            listed = ", ".join(f"'{unit}'" for unit in batch)
            self._write(self._engine(), f"DELETE FROM {_TABLE} WHERE unit IN ({listed})")  # noqa: S608  # checked

    @contextmanager
    def _engine_for(self, verdict: Verdict) -> Generator[Engine]:
        """Return the engine to write a verdict by: a unit that moves may itself hold the only connection of the usual one."""
        if verdict is Verdict.MOVED:
            with _beside(self._engine()) as engine:
                yield engine
        else:
            yield self._engine()

    def _decide(self, decision: Decision, engine: Engine) -> Verdict:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._write(engine, self._insert(decision, engine, f"{1000 * self._lock_wait:.0f}"))
                return decision.verdict
            except DBAPIError as error:
                refused = isinstance(error, IntegrityError)
                standing = self._decision(decision.unit, engine) if refused else None
                if standing is not None:
                    return standing.verdict
                # Forgotten since, lost with its connection, or rolled back: first one wins whoever asks, and however often.
                if attempt == _ATTEMPTS or not (refused or _is_worth_repeating(error)):
                    raise
        raise AssertionError("unreachable")

    def _decision(self, unit: str, engine: Engine) -> Decision | None:
        rows = self._read(f"SELECT {_COLUMNS} FROM {_TABLE} WHERE unit = '{check_unit_id(unit)}'", engine)  # noqa: S608  # checked
        return _decision_of(rows[0]) if rows else None

    def _found_or_made(self, usual: Engine) -> str:
        """Return what is in the row of the id, made at the same time by whoever needs it, and once."""
        give_up = time.monotonic() + self._lock_wait
        with _beside(usual) as engine:
            for attempt in range(_ATTEMPTS):
                found = self._read(_select_id(), engine)
                if found:
                    return check_log_id(found[0][0])
                try:
                    self._make(engine)
                except DBAPIError:  # most likely somebody else is doing the same, and IF NOT EXISTS helps PostgreSQL little
                    if attempt == _ATTEMPTS - 1 or time.monotonic() > give_up:
                        raise
                    time.sleep(0.01 * attempt)
            return check_log_id(self._read(_select_id(), engine)[0][0])

    def _make(self, engine: Engine) -> None:
        wait = max(1, round(self._lock_wait))
        with engine.begin() as connection:  # nobody else uses it: what is set stays
            if engine.dialect.name == "postgresql":
                durable = _DURABLE.format(local="false")
                connection.exec_driver_sql(f"SELECT {durable}, set_config('lock_timeout', '{wait}s', false)")
            elif engine.dialect.name in ("mysql", "mariadb"):
                connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {wait}, innodb_lock_wait_timeout = {wait}")
            if not inspect(connection).has_table(_TABLE):  # IF NOT EXISTS takes the right to create one
                connection.execute(CreateTable(_table(), if_not_exists=True))
            connection.exec_driver_sql(_insert_id(new_log_id()))

    def _insert(self, decision: Decision, on: Engine | Connection, lock_wait: str = "") -> str:
        values = f"'{decision.unit}', '{decision.verdict}', '{','.join(decision.branches)}', {decision.decided_at!r}"
        into = f"INSERT INTO {_TABLE} ({_COLUMNS})"
        if on.dialect.name != "postgresql":
            return f"{into} VALUES ({values})"
        # What the statement sets holds until the end of its transaction, and costs no round trip of its own.
        sets = f"{_DURABLE.format(local='true')} AS durable"
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

    def _read(self, statement: str, engine: Engine | None = None) -> Sequence[Any]:
        """Return the rows of one statement; none where there is no table yet."""
        engine = engine or self._engine()
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


def _decision_of(row: Sequence[Any]) -> Decision:
    unit, verdict, branches, decided_at = row
    return Decision(unit, Verdict(verdict), tuple(filter(None, branches.split(","))), decided_at)


@contextmanager
def _beside(engine: Engine) -> Generator[Engine]:
    """Give an engine with connections of its own: a unit that is about to commit may hold the only one of the usual pool.

    On SQLite that would help nobody, because a unit shuts all other connections out. There the pool may be the database.
    """
    if engine.dialect.name == "sqlite":
        yield engine
        return
    beside = Engine(engine.pool.recreate(), engine.dialect, engine.url)
    try:
        yield beside
    finally:
        beside.dispose()


def _sqlite_file(url: URL) -> Path | None:
    """Return the file of a SQLite database that has one."""
    name = url.database
    if url.get_backend_name() != "sqlite" or not name or name == ":memory:" or url.query.get("mode") == "memory":
        return None
    return Path(name.removeprefix("file:").partition("?")[0])


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
    return code_of(error) in ("42P01", 1146) or "no such table" in str(error.orig)


def _is_worth_repeating(error: DBAPIError) -> bool:
    """Return whether the same may work now: on another connection, or because the database picked a victim."""
    return error.connection_invalidated or code_of(error) in ("40001", "40P01", 1213)
