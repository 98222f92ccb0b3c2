"""A decision log in a file of one host, whose threads and processes share it."""

from __future__ import annotations

import errno
import os
import time
import weakref
import zlib
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from app_db._compat.os import after_fork_in_child
from app_db._two_phase.decisions import Decision, Verdict, batches, by_age, made
from app_db._two_phase.xids import check_log_id, check_unit_id, log_id_for, new_log_id
from app_db._units.liveness import Liveness, LivingLock, WithBlock
from app_db.errors import DecisionFileDamaged, DecisionFileFull, InvalidUse

_FORMAT = "app_db-decisions 1"
_NONE = "-"
_LEAST_WORTH_REWRITING = 64 * 1024


class FileLog:
    """Decisions in a file of this host, a line each; threads and processes of the host may share it.

    Every line ends with a checksum over itself and all lines before it. A last line that is cut off was never answered for and
    does not count; any other line that is not as it was written is an error, for who knows what it said. When most of it is
    forgotten, the file is written anew with what stands. It never grows beyond `max_bytes`, whose last quarter is kept for
    aborts: recovery must not be stopped by what it is called to clear up.

    Who waits for the others for longer than about `lock_wait` seconds gets a TimeoutError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        application: str = "app_db",
        *,
        max_bytes: int = 16 * 1024 * 1024,
        lock_wait: float = 10.0,
    ) -> None:
        _require_locks()
        self._path = Path(path).resolve()
        self._application = application
        self.place = f"the file {self._path}"
        self._max_bytes = max_bytes
        self._lock_wait = lock_wait
        self._id = ""
        self._threads = LivingLock()  # the lock on the file is the process's, and keeps no threads apart
        self._file: _File | None = None
        self._is_in_use = False
        _logs.add(self)

    @property
    def id(self) -> str:
        """The application's id of the log, made of what is in the file's first line."""
        if not self._id:
            with self._locked():
                pass
        return log_id_for(self._application, self._id)

    def id_if_made(self) -> str | None:
        """Return the id of a log that is there. Looking makes nothing."""
        try:
            made = self._path.stat().st_size >= _HEADING_LENGTH
        except FileNotFoundError:
            made = False
        return self.id if made else None

    def decide(self, unit: str, verdict: Verdict, branches: Sequence[str]) -> Verdict:
        """Write a verdict unless one stands; return the one that stands. It is on disk by then."""
        decision = made(unit, verdict, branches)
        with self._locked() as file:
            standing = file.decisions.get(unit)
            holder = file if standing is not None else self._add(file, decision)
            end = holder.end
        # Others may write meanwhile, and wait for the disk together with this one. What they read of it, they sync themselves.
        holder.sync(end)
        return verdict if standing is None else standing.verdict

    def find(self, unit: str) -> Verdict | None:
        """Return the verdict that stands about a unit, if there is one. It is on disk by then, whoever wrote it."""
        found = self.decision(unit)
        return None if found is None else found.verdict

    def decision(self, unit: str) -> Decision | None:
        """Return all that stands about a unit, if something does. It is on disk by then, whoever wrote it."""
        return self._read().get(check_unit_id(unit))

    def decisions(self) -> list[Decision]:
        """Return all decisions that stand, oldest first."""
        return sorted(self._read().values(), key=by_age)

    def forget(self, units: Collection[str]) -> None:
        """Remove what stands about `units`, without waiting for the disk."""
        for batch in batches(units, 100):
            with self._locked() as file:
                known = [unit for unit in batch if unit in file.decisions]
                if not known:
                    continue
                line = _line(f"forget {' '.join(known)}", file.checksum)
                if file.end + len(line) <= self._max_bytes:
                    file.append(line)
                else:
                    self._rewrite(file, [found for unit, found in file.decisions.items() if unit not in known])

    def _read(self) -> dict[str, Decision]:
        if self._file is None and not self._id and not self._path.exists():
            return {}
        with self._locked() as file:
            found, end = dict(file.decisions), file.end
        file.sync(end)
        return found

    def _add(self, file: _File, decision: Decision) -> _File:
        """Write a decision that is not there yet. Return the file that it is in."""
        line = _line(_record(decision), file.checksum)
        limit = self._max_bytes if decision.verdict is Verdict.ABORT else self._max_bytes - self._max_bytes // 4
        standing = file.standing + len(line)
        if standing > limit:
            raise DecisionFileFull(str(self._path), self._max_bytes, len(file.decisions))
        if file.end + len(line) <= min(limit, max(_LEAST_WORTH_REWRITING, 2 * standing)):
            file.append(line)
            return file
        try:
            return self._rewrite(file, [*file.decisions.values(), decision])
        except OSError:  # a full disk, say
            if file.end + len(line) > limit or not file.is_at(self._path):
                raise
            file.append(line)
            return file

    def _locked(self) -> _Locked:
        """Hold the file against all other threads and processes, knowing everything that is in it."""
        return _Locked(self)

    def _lock(self, user: Liveness) -> _File:
        give_up = time.monotonic() + self._lock_wait
        if not self._threads.take(user, self._lock_wait):
            raise self._too_late()
        if self._is_in_use:
            # An exception came between two lines of what follows, the last time. What is known of the file may be half of
            # what it was to be, and what is written by that would damage it: read it anew.
            self._forget_file()
        self._is_in_use = True
        try:
            return self._lock_and_read(give_up)
        except BaseException:
            self._forget_file()
            raise

    def _unlock(self, user: Liveness, error: BaseException | None) -> None:
        if self._file is not None:
            self._file.unlock()
        self._is_in_use = error is not None
        self._threads.leave(user)

    def _let_go(self, user: Liveness) -> None:
        """Unlock what an exception from outside has kept from being unlocked."""
        if self._threads.is_held_by(user):
            self._forget_file()
            self._threads.leave(user)

    def _too_late(self) -> TimeoutError:
        problem = f"Others have held the decision file for {self._lock_wait:g} s. Look for a process that was stopped"
        return TimeoutError(errno.ETIMEDOUT, problem, str(self._path))

    def _forget_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.unlock()

    def _lock_and_read(self, give_up: float) -> _File:
        while True:
            if self._file is None:
                self._file = _File(self._path, os.O_RDWR if self._id else os.O_RDWR | os.O_CREAT)
            file = self._file
            self._wait_for_lock(file, give_up)
            if file.is_at(self._path):
                break
            file.unlock()  # somebody has written it anew, and this is the old one
            self._file = None
        if not file.id:
            file.begin_unless_begun()
            _sync_directory(self._path)  # whoever put the file there may have died before doing so
        file.read()
        if self._id not in ("", file.id):
            raise DecisionFileDamaged(str(self._path), 0, f"it is another log, {file.id}, than it was before, {self._id}")
        self._id = file.id
        return file

    def _wait_for_lock(self, file: _File, give_up: float) -> None:
        pause = 0.0002
        while not file.try_to_lock():
            if time.monotonic() > give_up:
                raise self._too_late()
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def _rewrite(self, file: _File, decisions: Iterable[Decision]) -> _File:
        """Put a new file with `decisions` in the place of the one that is locked. All of it is on disk when this returns."""
        path = self._path.with_name(f"{self._path.name}.new")
        path.unlink(missing_ok=True)  # of somebody who died doing this
        try:
            new = _File(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            new.path = self._path
            new.try_to_lock()  # nobody has it yet; when they do, they must not write to it before its name is safe
            new.take_owner_of(file)
            new.write_anew(file.id, decisions)
            path.replace(self._path)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
        self._file = new
        file.unlock()
        _sync_directory(self._path)
        return new

    def _leave_to_parent(self) -> None:
        """Begin afresh in a forked child: it shares its parent's locks on the file, and may have copied a locked lock."""
        self._threads = LivingLock()
        self._file = None


class _Locked(WithBlock):
    """Holds the file of a log for a block."""

    __slots__ = ("_log", "_user")

    def __init__(self, log: FileLog) -> None:
        self._log = log

    def __enter__(self) -> _File:
        self._user = self.liveness_to_enter()
        self._user.torn = self
        return self._log._lock(self._user)

    def _leave(self, error: BaseException | None) -> None:
        self._log._unlock(self._user, error)
        self._user.torn = None

    def torn_down(self) -> None:
        """Let others have the file."""
        self._log._let_go(self._user)


class _File:
    """A file that is, or was, the log, and what has been read of it."""

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self._fd = os.open(path, flags | os.O_APPEND, 0o666)
        # Not before the last one who uses it is done: its number would be given to another file.
        self.close = weakref.finalize(self, os.close, self._fd)
        self.close.atexit = False
        self._forget()
        self._synced = 0
        _files.add(self)

    def _forget(self) -> None:
        self.id = ""
        self.decisions: dict[str, Decision] = {}
        self.end = 0
        """Where the next line begins."""
        self.checksum = 0
        """Of all lines so far."""
        self.standing = 0
        """How many bytes a file has that holds only what stands."""

    def try_to_lock(self) -> bool:
        from fcntl import LOCK_EX, LOCK_NB, flock

        try:
            flock(self._fd, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        from fcntl import LOCK_UN, flock

        flock(self._fd, LOCK_UN)

    def is_at(self, path: Path) -> bool:
        """Return whether this file is still the one of that name."""
        return os.path.samestat(os.fstat(self._fd), path.stat())

    def sync(self, end: int) -> None:
        """Return when everything before `end` is on disk."""
        if end > self._synced:
            _to_disk(self._fd)
            self._synced = max(end, self._synced)

    def take_owner_of(self, other: _File) -> None:
        """Let in who may use `other`: recovery may run as another user than the application."""
        wanted, own = os.fstat(other._fd), os.fstat(self._fd)
        if (wanted.st_uid, wanted.st_gid) != (own.st_uid, own.st_gid):
            os.fchown(self._fd, wanted.st_uid, wanted.st_gid)
        os.fchmod(self._fd, wanted.st_mode & 0o777)

    def begin_unless_begun(self) -> None:
        """Write the first line of a new log if there is none, or if it was cut off."""
        first = os.pread(self._fd, _HEADING_LENGTH, 0)
        if len(first) == _HEADING_LENGTH:
            return
        if not _FORMAT.encode().startswith(first[: len(_FORMAT)]):
            raise DecisionFileDamaged(str(self.path), 0, "it does not begin as a decision file does")
        self.write_anew(new_log_id(), ())

    def write_anew(self, log: str, decisions: Iterable[Decision]) -> None:
        """Make this the log of that id, with `decisions`, on disk."""
        lines = [_line(_heading(log), 0)]
        for decision in sorted(decisions, key=by_age):
            lines.append(_line(_record(decision), _checksum(lines[-1])))
        os.ftruncate(self._fd, 0)
        self._forget()
        self._write(b"".join(lines))
        self.read()
        self.sync(self.end)

    def append(self, line: bytes) -> None:
        """Write a line, made with the checksum so far, without waiting for the disk."""
        try:
            if os.fstat(self._fd).st_size > self.end:
                os.ftruncate(self._fd, self.end)  # a line that was cut off
            self._write(line)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._fd, self.end)  # nobody has read it
            raise
        self._take(line)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def read(self) -> None:
        """Read what was written since the last time. The lock must be held: a line is not written at once."""
        size = os.fstat(self._fd).st_size
        if size == self.end:
            return
        if size < self.end:
            raise DecisionFileDamaged(str(self.path), size, "it ends there, and was longer")
        *lines, rest = os.pread(self._fd, size - self.end, self.end).split(b"\n")
        for line in lines:
            self._take(line + b"\n")
        if rest and (not self.id or _is_whole(rest[:-1] + b"\n", self.checksum)):
            raise DecisionFileDamaged(str(self.path), self.end, "the line there has no end")

    def _take(self, line: bytes) -> None:
        if not _is_whole(line, self.checksum):
            raise DecisionFileDamaged(str(self.path), self.end, "the line there is not as it was written")
        try:
            self._understand(line)
        except ValueError as error:
            raise DecisionFileDamaged(
                str(self.path), self.end, "the line there makes no sense to this version of app_db"
            ) from error
        self.end += len(line)
        self.checksum = _checksum(line)

    def _understand(self, line: bytes) -> None:
        kind, *words = line[:-10].decode("ascii").split(" ")
        if not self.id:
            format_, self.id = f"{kind} {words[0]}", check_log_id(words[-1])
            if format_ != _FORMAT:
                raise ValueError(format_)
            self.standing = len(line)
        elif kind == "forget":
            for unit in words:
                forgotten = self.decisions.pop(unit, None)
                self.standing -= 0 if forgotten is None else len(_line(_record(forgotten), 0))
        else:
            unit, branches, decided_at = words
            names = () if branches == _NONE else tuple(branches.split(","))
            if unit not in self.decisions:
                self.decisions[unit] = Decision(unit, Verdict(kind), names, float(decided_at))
                self.standing += len(line)


def _heading(log: str) -> str:
    return f"{_FORMAT} {log}"


def _record(decision: Decision) -> str:
    return f"{decision.verdict} {decision.unit} {','.join(decision.branches) or _NONE} {decision.decided_at!r}"


def _line(text: str, checksum: int) -> bytes:
    """Return the line that says `text` behind lines of that checksum."""
    return f"{text} {zlib.crc32(text.encode(), checksum):08x}\n".encode()


def _checksum(line: bytes) -> int:
    return int(line[-9:-1], 16)


def _is_whole(line: bytes, checksum: int) -> bool:
    return line[-10:] == b" %08x\n" % zlib.crc32(line[:-10], checksum)


def _require_locks() -> None:
    """Raise an error unless this Python can lock files as Unix does: Windows has no `fcntl`."""
    if find_spec("fcntl") is None:
        raise InvalidUse(
            "A decision file needs the locks of Unix, and this Python has no module fcntl",
            "Keep the decisions in a table: set APP_DB_DECISION_LOG to the name of a connection",
        )


_HEADING_LENGTH = len(_line(_heading("000000"), 0))


def _to_disk(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has only the one


def _sync_directory(path: Path) -> None:
    """Make sure that the name of a file survives a power failure as what is in it does."""
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_files: weakref.WeakSet[_File] = weakref.WeakSet()
_logs: weakref.WeakSet[FileLog] = weakref.WeakSet()


def _leave_parents_files() -> None:
    """Let a forked child use files of its own. If its parent dies holding a lock, the child must not go on holding it."""
    for file in list(_files):
        file.close()
    for log in list(_logs):
        log._leave_to_parent()


after_fork_in_child(_leave_parents_files)
