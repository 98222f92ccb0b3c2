"""A decision log in a table of one of the application's databases."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING

from sqlalchemy import Engine, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateTable

from app_db._compat.clocks import monotonic
from app_db._databases.database import Database, Rows
from app_db._databases.registry import database_of
from app_db._two_phase.decisions import INSERT, SELECT_ID, TABLE, Decision, DecisionLog, Verdict, decisions_table, insert_id
from app_db._two_phase.xids import check_log_id, new_log_id

if TYPE_CHECKING:
    from sqlalchemy import Connection


class TableLog(DecisionLog):
    """Decisions in a table of one of the databases, so that recovery may run on any host.

    `engine` is called at each use. A decision waits at most about `lock_wait` seconds for another transaction that writes about
    the same unit, and then raises DBAPIError. On SQLite, the settings of the connection say how long.
    """

    def __init__(
        self, connection: str, engine: Callable[[], Engine], application: str = "app_db", *, lock_wait: float = 5.0
    ) -> None:
        super().__init__(application)
        self.place = f"the table {TABLE} of {connection!r}"
        self._engine = engine
        self._lock_wait = lock_wait
        self._made: tuple[weakref.ref[Engine], str] | None = None

    @property
    def _database(self) -> Database:
        return database_of(self._engine().dialect.name)

    def ensure(self) -> str:
        """Create the table and the row with the log's id unless they exist. Return the content of that row.

        This is a transaction of its own. On SQLite it waits for other writers, so call it before writing there.
        """
        engine, made = self._engine(), self._made
        if made is None or made[0]() is not engine:
            with self._on_own_connections() as log:
                made = self._made = weakref.ref(engine), log._found_or_made()
        return made[1]

    def id_if_made(self) -> str | None:
        file = self._database.file_of(self._engine().url)
        return super().id_if_made() if file is None or file.exists() else None  # connecting would create an empty SQLite file

    def decide_within(self, connection: Connection, unit: str, branches: Sequence[str]) -> None:
        """Write `commit` in the open transaction of `connection`, whose COMMIT is then the decision.

        Raises IntegrityError if the unit has a decision. That transaction can't commit then.
        """
        connection.exec_driver_sql(self.statement(unit, branches))

    def statement(self, unit: str, branches: Sequence[str]) -> str:
        """Return the statement that `decide_within` executes. It has no parameters."""
        return self._database.durable_insert(INSERT, Decision(unit, Verdict.COMMIT, tuple(branches)).as_row())

    def _decide(self, decision: Decision) -> Verdict:
        if decision.verdict is not Verdict.MOVED:
            return super()._decide(decision)
        with self._on_own_connections() as log:
            return super(TableLog, log)._decide(decision)

    @contextmanager
    def _on_own_connections(self) -> Generator[TableLog]:
        """Give the same log with a pool of its own: the unit that is about to commit may hold the only connection of the pool.

        Where a database has one writer (SQLite), a second connection would wait for the unit in vain.
        """
        if self._database.has_one_writer:
            yield self
            return
        log, engine = copy(self), self._engine()
        own = Engine(engine.pool.recreate(), engine.dialect, engine.url)
        log._engine = lambda: own
        try:
            yield log
        finally:
            own.dispose()

    def _found_or_made(self) -> str:
        """Return the content of the row with the id. Several processes may create it at once; the first wins."""
        give_up = monotonic() + self._lock_wait
        for attempt in range(self._attempts):
            found = self._read(SELECT_ID)
            if found:
                return check_log_id(found[0][0])
            try:
                self._make()
            except DBAPIError:  # probably another process creates it too: IF NOT EXISTS does not prevent that error on PostgreSQL
                if attempt == self._attempts - 1 or monotonic() > give_up:
                    raise
                time.sleep(0.01 * attempt)
        return check_log_id(self._read(SELECT_ID)[0][0])

    def _make(self) -> None:
        with self._engine().begin() as connection:  # of a pool that is used for nothing else, so its settings need not be undone
            self._database.limit_log_creation(connection, self._lock_wait)
            if not inspect(connection).has_table(TABLE):  # IF NOT EXISTS needs the privilege to create a table
                connection.execute(CreateTable(decisions_table(), if_not_exists=True))
            connection.exec_driver_sql(insert_id(new_log_id()))

    def _is_victim(self, error: DBAPIError) -> bool:
        return error.orig is not None and self._database.is_victim(error.orig)

    def _insert(self, decision: Decision) -> str:
        return self._database.durable_insert(INSERT, decision.as_row(), self._lock_wait)

    def _write(self, statement: str) -> None:
        with self._engine().connect() as connection:
            self._database.write_alone(connection, statement, self._lock_wait)

    def _read(self, statement: str) -> Rows:
        try:
            return self._database.read_alone(self._engine(), statement)
        except DBAPIError as error:
            if self._database.says_there_is_no_table(error):
                return []
            raise
