"""A decision log in an SQLite file of one host, whose threads and processes share it.

The rows are those of a log in a table, and so are the statements. The file is in WAL mode: a decision is then one write and one
wait for the disk, which the threads that decide at the same time share. SQLite has the damage of crashes and the turns of
processes in hand. What it does not notice is looked for here: a file that was deleted, replaced, or given another name, and a
file system that several hosts share.
"""

from __future__ import annotations

import os
import sqlite3
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy.dialects.sqlite import dialect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from app_db._compat.os import after_fork_in_child
from app_db._liveness import LivingLock, WithBlock
from app_db._two_phase.decision_table import DecisionRows, decisions_table, insert_id, select_id
from app_db._two_phase.decisions import Decision
from app_db._two_phase.mounts import mount_of
from app_db._two_phase.xids import check_log_id, new_log_id
from app_db.errors import DecisionFileDamaged, DecisionFileFull, DecisionFileUnusable

T = TypeVar("T")

_APPLICATION_ID = 0x61706462
"""What SQLite has a place for in a file's header: `apdb`."""

_FORMER_FORMAT = b"app_db-decisions 1"

_LOST_WAKE_UP = 0.01
"""Seconds after which a thread looks for itself whether its turn has come: the thread that was to tell it may be interrupted."""


class FileLog(DecisionRows):
    """Decisions in an SQLite file of this host; its threads and processes may share it.

    A link is followed once, when this is made. Whoever waits for others longer than about `lock_wait` seconds gets an error.
    """

    def __init__(self, path: str | os.PathLike[str], application: str = "app_db", *, lock_wait: float = 10.0) -> None:
        super().__init__(application)
        self._path = Path(path).resolve()
        self.place = f"the file {self._path}"
        self._lock_wait = lock_wait
        self._id = ""
        self._begin_afresh()
        _logs.add(self)

    def _begin_afresh(self) -> None:
        self._threads = LivingLock()
        self._waiting: deque[_Waiting] = deque()
        self._database: _Database | None = None

    def ensure(self) -> str:
        """Make the file and the log's id unless they are there; return what was made. Others may do so at the same time."""
        if not self._id:
            self._alone(lambda database, _: database.id)
        return self._id

    def _decision_of(self, row: Sequence[Any]) -> Decision:
        try:
            return super()._decision_of(row)
        except (AttributeError, TypeError, ValueError) as error:
            raise DecisionFileDamaged(str(self._path), "what is in one of its rows is no decision") from error

    def _read(self, statement: str) -> Sequence[Any]:
        if not self._id and not _is_there(self._path) and not _is_there(_beside(self._path, "-wal")):
            return []
        return self._alone(lambda database, give_up: database.read(statement, give_up))

    def _alone(self, use: Callable[[_Database, float], T]) -> T:
        """Use the file while no other thread of this process does."""
        give_up = time.monotonic() + self._lock_wait
        while True:
            with _Turn(self) as is_ours:
                if is_ours:
                    return use(self._open(give_up), give_up)
            if time.monotonic() > give_up:
                raise _busy(self._path)
            time.sleep(0.0002)

    # -- writing: one of the threads that want to writes for all of them

    def _write(self, statement: str) -> None:
        ours = _Waiting(statement)
        self._waiting.append(ours)
        try:
            self._have_written(ours, time.monotonic() + self._lock_wait)
        except BaseException:
            # An exception from outside: if no thread has the statement in hand yet, none should execute it any more.
            with suppress(ValueError):
                self._waiting.remove(ours)
            raise
        if ours.error is not None:
            raise copy(ours.error) from ours.error.__cause__

    def _have_written(self, ours: _Waiting, give_up: float) -> None:
        while True:
            with _Turn(self) as is_ours:
                if is_ours and not ours.is_answered:
                    self._write_for_all(ours, give_up)
            if is_ours:
                self._wake_next()
            if ours.is_answered:
                return
            if time.monotonic() > give_up:
                raise self._withdrawn(ours)
            ours.sleep()

    def _write_for_all(self, ours: _Waiting, give_up: float) -> None:
        """Execute all statements that wait in one transaction. If an exception from outside comes, each thread asks anew."""
        all_of_them = [ours]

        def statements() -> list[str]:
            with suppress(IndexError):
                while True:
                    waiting = self._waiting.popleft()
                    if waiting is not ours:
                        all_of_them.append(waiting)
            return [waiting.statement for waiting in all_of_them]

        answers: Sequence[Exception | None]
        try:
            answers = self._open(give_up).write(statements, give_up)
        except DecisionFileUnusable as error:
            answers = [error] * len(all_of_them)
        for waiting, answer in zip(all_of_them, answers, strict=True):
            waiting.answer(answer)

    def _wake_next(self) -> None:
        with suppress(IndexError):
            self._waiting[0].wake()

    def _withdrawn(self, ours: _Waiting) -> DecisionFileUnusable:
        """Take a statement back that nobody has executed; return the error that says so, or that it is not known."""
        try:
            self._waiting.remove(ours)
        except ValueError:  # a thread has it in hand
            return _busy(self._path, undecided=False)
        return _busy(self._path)

    # -- the file

    def _open(self, give_up: float) -> _Database:
        if self._database is None:
            try:
                database = _Database(self._path, give_up, is_new=not self._id)
            except OSError as error:
                raise _not_let_in(self._path, str(error)) from error
            if self._id not in ("", database.id):
                problem = f"it is another log, {database.id}, than it was before, {self._id}"
                raise DecisionFileDamaged(str(self._path), problem)
            self._database, self._id = database, database.id
        self._database.require_in_place()
        return self._database

    def roll_back(self) -> None:
        """End the transaction that an exception from outside has left open."""
        if self._database is not None:
            self._database.roll_back()

    def leave_to_parent(self) -> None:
        """Begin afresh in a forked child, which must not touch its parent's connections, not even to close them."""
        if self._database is not None:
            self._database.leave_open()
        self._begin_afresh()


class _Turn(WithBlock):
    """A thread's turn to use the file of a log, if no other thread has it."""

    __slots__ = ("_log", "_user")

    def __init__(self, log: FileLog) -> None:
        self._log = log

    def __enter__(self) -> bool:
        self._user = self.liveness_to_enter()
        is_ours = self._log._threads.try_to_take(self._user)
        if is_ours:
            self._log.roll_back()
        return is_ours

    def _leave(self, error: BaseException | None) -> None:
        if error is not None and self._log._threads.is_held_by(self._user):
            self._log.roll_back()  # other processes wait
        self._log._threads.leave(self._user)


class _Waiting:
    """A statement that waits to be executed, and its answer. No lock is written in Python here: it might be left locked."""

    def __init__(self, statement: str) -> None:
        self.statement = statement
        self.is_answered = False
        self.error: Exception | None = None
        self._told: SimpleQueue[None] = SimpleQueue()

    def answer(self, error: Exception | None) -> None:
        self.error = error
        self.is_answered = True
        self.wake()

    def wake(self) -> None:
        self._told.put(None)

    def sleep(self) -> None:
        with suppress(Empty):
            self._told.get(timeout=_LOST_WAKE_UP)


class _Database:
    """The SQLite file, open. Never to be opened by other means: closing that would take SQLite's locks on it away."""

    def __init__(self, path: Path, give_up: float, *, is_new: bool) -> None:
        self._path = path
        self._in_commit = False
        _require_local(path)
        if not is_new and not path.exists():
            raise _moved(path)
        _require_one_name(path)
        _require_no_orphan(path)
        self._connection = self._connected(is_new=is_new)
        try:
            self.id = self._prepare(give_up)
            self._files = _identities(path)
            _sync(path)
        except BaseException:
            self._connection.close()
            raise
        self._finalizer = weakref.finalize(self, self._connection.close)

    def read(self, statement: str, give_up: float) -> list[Any]:
        """Return the rows of a statement. They are on disk."""
        rows = self._execute(statement, give_up)
        self.require_in_place()
        return rows

    def write(self, statements: Callable[[], Sequence[str]], give_up: float) -> list[Exception | None]:
        """Execute statements in one transaction. Return an IntegrityError for each that found a decision where it was to be.

        Which statements is asked when no other process writes any more: there may be more of them by then.
        """
        try:
            return self._write(statements, give_up)
        except DecisionFileFull:
            # What is in the -wal goes to its place in the file, and the -wal's room can be used again.
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
        """End a transaction that is open."""
        self._in_commit = False
        if self._connection.in_transaction:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")

    def require_in_place(self) -> None:
        """Raise an error unless the file, its -wal and its -shm are the ones that were opened: others would not see more."""
        if not _are_in_place(self._files):
            raise _moved(self._path, undecided=not self._in_commit)

    def leave_open(self) -> None:
        """Never close the connection, not even when Python ends: it gets a reference that nothing takes away."""
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
        """Make of the file what it is to be, if it is not yet; return the log's id."""
        self._execute("PRAGMA synchronous = FULL", give_up)
        if self._execute("PRAGMA application_id", give_up) != [(_APPLICATION_ID,)]:
            self._execute("BEGIN IMMEDIATE", give_up)
            self._make(give_up)
            self._execute("COMMIT", give_up)
        [(mode,)] = self._execute("PRAGMA journal_mode = WAL", give_up)
        if mode != "wal":
            raise _not_let_in(self._path, f"SQLite's journal mode is {mode} there, and not WAL")
        [(found,)] = self._execute("PRAGMA integrity_check(1)", give_up)
        if found != "ok":
            raise DecisionFileDamaged(str(self._path), f"SQLite says, {found}")
        try:
            [(log_id,)] = self._execute(select_id(), give_up)
            return check_log_id(log_id)
        except (TypeError, ValueError) as error:
            raise DecisionFileDamaged(str(self._path), "the row with the id of the log is not in it") from error

    def _make(self, give_up: float) -> None:
        [(application_id,)] = self._execute("PRAGMA application_id", give_up)
        if application_id == _APPLICATION_ID:
            return  # others have made it meanwhile
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
                if _code(error) not in _OTHERS_HAVE_IT or time.monotonic() > give_up:
                    raise self._problem(error) from error
            time.sleep(pause)
            pause = min(2 * pause, 0.001)

    def _problem(self, error: sqlite3.Error) -> DecisionFileUnusable:
        path, code, undecided = self._path, _code(error), not self._in_commit
        if code == sqlite3.SQLITE_FULL or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHMSIZE:
            return DecisionFileFull(str(path))  # also of COMMIT: what could not be written whole does not count
        if code in _OTHERS_HAVE_IT:
            return _busy(path, undecided=undecided)
        if code == sqlite3.SQLITE_NOTADB and _begins_with(path, _FORMER_FORMAT):
            return _of_former_format(path)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR) and undecided:
            return DecisionFileDamaged(str(path), f"SQLite says, {error}")
        return _not_let_in(path, f"SQLite says, {error}", undecided=undecided)


_OTHERS_HAVE_IT = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


# ---- what SQLite does not look for --------------------------------------------------------------------------------------


_Identity = tuple[int, int]
"""Device and inode."""


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _is_there(path: Path) -> bool:
    """Return whether a file is there that is not empty. What can't be looked at may be."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _identities(path: Path) -> dict[str, _Identity]:
    """Return which files SQLite has open by now."""
    return {file: _identity(file) for file in (str(path), f"{path}-wal", f"{path}-shm")}


def _identity(file: str) -> _Identity:
    found = os.stat(file)  # noqa: PTH116  # nine times a decision, and a Path costs as much as asking
    return found.st_dev, found.st_ino


def _are_in_place(files: dict[str, _Identity]) -> bool:
    try:
        return files == {file: _identity(file) for file in files}
    except OSError:
        return False


def _require_local(path: Path) -> None:
    """Raise an error if several hosts may see the file, or if it is seen without its directory."""
    mount = mount_of(path)
    if mount is not None and mount.is_shared:
        raise DecisionFileUnusable(
            str(path),
            f"it is on {mount.kind}, a file system of the network, where SQLite's locks and shared memory don't work",
            "Put it on a disk of this host, or keep decisions in a table: set APP_DB_DECISION_LOG to the name of a connection",
        )
    if mount is not None and mount.point == str(path):
        raise DecisionFileUnusable(
            str(path),
            "it is mounted without its directory, so that its -wal would be another one for others",
            "Mount the directory",
        )


def _require_one_name(path: Path) -> None:
    if path.exists() and path.stat().st_nlink > 1:
        raise DecisionFileUnusable(
            str(path), "it has several names (hard links), and SQLite would keep a -wal for each", "Remove the other names"
        )


def _require_no_orphan(path: Path) -> None:
    """Raise an error if there are decisions in a -wal whose file is gone: SQLite would delete it."""
    if not _is_there(path) and _is_there(_beside(path, "-wal")) and not _is_there(path):  # which others may have made meanwhile
        raise DecisionFileDamaged(str(path), f"it is missing or empty, and {path.name}-wal, which belongs to it, is not")


def _sync(path: Path) -> None:
    """Make sure that what was read survives a power failure, and so does the name of the file.

    A process that was killed has perhaps written a decision that did not reach the disk, and SQLite takes it up all the same.
    """
    on_windows = os.name == "nt"  # which opens no directories, and syncs only what can be written
    for file in [_beside(path, "-wal")] if on_windows else [_beside(path, "-wal"), path.parent]:
        fd = os.open(file, os.O_RDWR if on_windows else os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _begins_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _of_former_format(path: Path) -> DecisionFileUnusable:
    return DecisionFileUnusable(
        str(path),
        "it is of the format that app_db had before this version",
        "Run `python -m app_db recover` with the version that wrote it until that exits with 0, then move it away: "
        "a new one is made when it is needed",
    )


def _not_let_in(path: Path, problem: str, *, undecided: bool = True) -> DecisionFileUnusable:
    remedy = (
        "Its directory must exist, on a disk that works, and the user of this process must be able to write there and to the "
        "file, its -wal and its -shm"
    )
    return DecisionFileUnusable(str(path), problem, remedy, undecided)


def _busy(path: Path, *, undecided: bool = True) -> DecisionFileUnusable:
    return DecisionFileUnusable(
        str(path), "others have held it for too long", "Look for a process that was stopped while it wrote", undecided
    )


def _moved(path: Path, *, undecided: bool = True) -> DecisionFileUnusable:
    return DecisionFileUnusable(
        str(path),
        "it, its -wal or its -shm was deleted, moved or replaced while this process had it open",
        "Put the same files back, or stop all processes that use it, see that nothing is prepared in the databases, and start "
        "them again",
        undecided,
    )


# ---- forked children ---------------------------------------------------------------------------------------------------------


_logs: weakref.WeakSet[FileLog] = weakref.WeakSet()


def _leave_parents_files() -> None:
    for log in list(_logs):
        log.leave_to_parent()


after_fork_in_child(_leave_parents_files)
