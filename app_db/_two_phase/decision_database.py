"""The SQLite file of a decision log: opening it, and executing statements that are on disk when they return."""

from __future__ import annotations

import sqlite3
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy.dialects.sqlite import dialect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from app_db._compat.clocks import monotonic
from app_db._databases.database import Rows
from app_db._two_phase.decisions import SELECT_ID, decisions_table, insert_id
from app_db._two_phase.file_checks import are_in_place, identities, require_usable, sync
from app_db._two_phase.xids import check_log_id, new_log_id
from app_db.errors import DecisionFileDamaged, DecisionFileFull, DecisionFileUnusable

_APPLICATION_ID = 0x61706462
"""The `application_id` in the header of the SQLite file: `apdb`."""

_FORMER_FORMAT = b"app_db-decisions 1"

_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


class DecisionDatabase:
    """The open SQLite file. Never open it by other means: closing it there would remove SQLite's locks of this process."""

    def __init__(self, path: Path, give_up: float, *, is_new: bool) -> None:
        self._path = path
        self._in_commit = False
        try:
            if not is_new and not path.exists():
                raise moved(path)
            require_usable(path)
            self._connection = self._connected(is_new=is_new)
            try:
                self.id = self._prepare(give_up)
                self._files = identities(path)
                sync(path)
            except BaseException:
                self._connection.close()
                raise
        except OSError as error:
            raise _no_access(path, str(error)) from error
        self._finalizer = weakref.finalize(self, self._connection.close)

    def read(self, statement: str, give_up: float) -> Rows:
        """Return the rows of a statement. They are on disk."""
        rows = self._execute(statement, give_up)
        self.require_in_place()
        return rows

    def write(self, statements: Callable[[], Sequence[str]], give_up: float) -> list[Exception | None]:
        """Execute statements in one transaction. Return an IntegrityError for each that would have replaced a decision.

        `statements` is called once no other process can write: more statements may be waiting by then.
        """
        try:
            return self._write(statements, give_up)
        except DecisionFileFull:
            # A checkpoint moves what is in the -wal into the file, and the room in the -wal can be used again.
            self._execute("PRAGMA wal_checkpoint(RESTART)", give_up)
            return self._write(statements, give_up)

    def _write(self, statements: Callable[[], Sequence[str]], give_up: float) -> list[Exception | None]:
        try:
            self._execute("BEGIN IMMEDIATE", give_up)
            answers = [self._refusal(statement, give_up) for statement in statements()]
            self.require_in_place()
            self._in_commit = True
            self._execute("COMMIT", give_up)
            self.require_in_place()
            self._in_commit = False
        except BaseException:
            self.roll_back()
            raise
        return answers

    def _refusal(self, statement: str, give_up: float) -> Exception | None:
        try:
            self._execute(statement, give_up)
        except IntegrityError as error:
            return error
        return None

    def roll_back(self) -> None:
        """Roll back the transaction that is open, if one is."""
        self._in_commit = False
        if self._connection.in_transaction:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")

    def require_in_place(self) -> None:
        """Raise an error if the file, its -wal or its -shm was replaced: other processes would not see what is written."""
        if not are_in_place(self._files):
            raise moved(self._path, undecided=not self._in_commit)

    def leave_open(self) -> None:
        """Never close the connection, not even when Python ends: add a reference that is never removed."""
        from ctypes import py_object, pythonapi

        self._finalizer.detach()
        pythonapi.Py_IncRef(py_object(self._connection))

    # -- opening

    def _connected(self, *, is_new: bool) -> sqlite3.Connection:
        try:
            uri = f"{self._path.as_uri()}?mode={'rwc' if is_new else 'rw'}"
            return sqlite3.connect(uri, timeout=0, isolation_level=None, check_same_thread=False, uri=True)
        except sqlite3.Error as error:
            raise self._problem(error) from error

    def _prepare(self, give_up: float) -> str:
        """Create the table and set the journal mode unless that is done. Return the log's id."""
        self._execute("PRAGMA synchronous = FULL", give_up)
        if self._execute("PRAGMA application_id", give_up) != [(_APPLICATION_ID,)]:
            self._execute("BEGIN IMMEDIATE", give_up)
            self._make(give_up)
            self._execute("COMMIT", give_up)
        [(mode,)] = self._execute("PRAGMA journal_mode = WAL", give_up)
        if mode != "wal":
            raise _no_access(self._path, f"SQLite's journal mode is {mode} there, and not WAL")
        [(found,)] = self._execute("PRAGMA integrity_check(1)", give_up)
        if found != "ok":
            raise DecisionFileDamaged(str(self._path), f"SQLite says, {found}")
        try:
            [(log_id,)] = self._execute(SELECT_ID, give_up)
            return check_log_id(log_id)
        except (TypeError, ValueError) as error:
            raise DecisionFileDamaged(str(self._path), "the row with the id of the log is not in it") from error

    def _make(self, give_up: float) -> None:
        [(application_id,)] = self._execute("PRAGMA application_id", give_up)
        if application_id == _APPLICATION_ID:
            return  # another process has made it meanwhile
        if application_id or self._execute("SELECT name FROM sqlite_master", give_up):
            raise DecisionFileDamaged(str(self._path), "it is an SQLite database of something else")
        self._execute(f"PRAGMA application_id = {_APPLICATION_ID}", give_up)
        self._execute(str(CreateTable(decisions_table()).compile(dialect=dialect())), give_up)
        self._execute(insert_id(new_log_id()), give_up)

    # -- SQLite

    def _execute(self, statement: str, give_up: float) -> list[Any]:
        pause = 0.0002
        while True:
            try:
                return self._connection.execute(statement).fetchall()
            except sqlite3.IntegrityError as error:
                raise IntegrityError(statement, None, error) from error
            except sqlite3.Error as error:
                if _code(error) not in _LOCKED or monotonic() > give_up:
                    raise self._problem(error) from error
            time.sleep(pause)
            pause = min(2 * pause, 0.001)

    def _problem(self, error: sqlite3.Error) -> DecisionFileUnusable:
        path, code, undecided = self._path, _code(error), not self._in_commit
        if code == sqlite3.SQLITE_FULL or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHMSIZE:
            return DecisionFileFull(str(path))  # after COMMIT too: SQLite ignores a transaction that was not written whole
        if code in _LOCKED:
            return busy(path, undecided=undecided)
        if code == sqlite3.SQLITE_NOTADB and _is_of_former_format(path):
            return DecisionFileUnusable(
                str(path),
                "it is of the format that app_db had before this version",
                "Run `python -m app_db recover` with the version that wrote it until that exits with 0, then move it away: "
                "a new one is made when it is needed",
            )
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR) and undecided:
            return DecisionFileDamaged(str(path), f"SQLite says, {error}")
        return _no_access(path, f"SQLite says, {error}", undecided=undecided)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _is_of_former_format(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_FORMER_FORMAT)) == _FORMER_FORMAT


# ---- errors -------------------------------------------------------------------------------------------------------------


def _no_access(path: Path, problem: str, *, undecided: bool = True) -> DecisionFileUnusable:
    remedy = (
        "Its directory must exist, on a disk that works, and the user of this process must be able to write there and to the "
        "file, its -wal and its -shm"
    )
    return DecisionFileUnusable(str(path), problem, remedy, undecided)


def busy(path: Path, *, undecided: bool = True) -> DecisionFileUnusable:
    """Return the error for a file that another process or thread did not release in time."""
    problem, remedy = "another process or thread has held it for too long", "Look for a process that was stopped while it wrote"
    return DecisionFileUnusable(str(path), problem, remedy, undecided)


def moved(path: Path, *, undecided: bool = True) -> DecisionFileUnusable:
    """Return the error for a file that is not the one that was opened."""
    return DecisionFileUnusable(
        str(path),
        "it, its -wal or its -shm was deleted, moved or replaced while this process had it open",
        "Put the same files back, or stop all processes that use it, see that nothing is prepared in the databases, and start "
        "them again",
        undecided,
    )
