"""Checks on the file of a decision log that SQLite does not make.

SQLite does not notice a file that was deleted, replaced or renamed while it is open, nor a file system that several hosts share.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from app_db.errors import DecisionFileDamaged, DecisionFileUnusable

_MOUNT_TABLE = Path("/proc/self/mountinfo")

_SHARED = frozenset(
    "9p afs beegfs ceph cifs coda davfs gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs pvfs2 smb2 smb3 smbfs".split()
)
"""File systems that other hosts may see as well."""

_SHARED_BY_FUSE = frozenset("ceph curlftpfs davfs davfs2 gcsfuse glusterfs goofys juicefs mfs rclone s3fs sshfs".split())

Identities = dict[str, tuple[int, int]]
"""Device and inode of each file, by its path."""


def wal_of(path: Path) -> Path:
    """Return the write-ahead log that SQLite keeps beside a file."""
    return path.with_name(f"{path.name}-wal")


def has_content(path: Path) -> bool:
    """Return whether a file exists and is not empty. A file that this process may not look at counts as one."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
    except OSError:
        return True


def identities(path: Path) -> Identities:
    """Return the identities of an SQLite file, its -wal and its -shm."""
    return {file: _identity(file) for file in (str(path), f"{path}-wal", f"{path}-shm")}


def are_in_place(files: Identities) -> bool:
    """Return whether the paths still lead to the same files."""
    try:
        return all(_identity(file) == identity for file, identity in files.items())
    except OSError:
        return False


def _identity(file: str) -> tuple[int, int]:
    found = os.stat(file)  # noqa: PTH116  # nine times a decision, and a Path costs as much as the system call
    return found.st_dev, found.st_ino


def require_usable(path: Path) -> None:
    """Raise an error where SQLite could lose decisions without noticing."""
    mount = _mount_of(path)
    if mount is not None and mount.is_shared:
        raise DecisionFileUnusable(
            str(path),
            f"it is on {mount.kind}, a file system of the network, where SQLite's locks and shared memory don't work",
            "Put it on a disk of this host, or keep decisions in a table: set DECISION_LOG to the name of a connection",
        )
    if mount is not None and mount.point == str(path):
        problem = "it is mounted without its directory, so that other processes would use another -wal"
        raise DecisionFileUnusable(str(path), problem, "Mount the directory")
    if path.exists() and path.stat().st_nlink > 1:
        problem = "it has several names (hard links), and SQLite would keep a -wal for each"
        raise DecisionFileUnusable(str(path), problem, "Remove the other names")
    # Asked twice, because another process may have made the file between the first two questions.
    if not has_content(path) and has_content(wal_of(path)) and not has_content(path):  # SQLite would delete the -wal
        raise DecisionFileDamaged(str(path), f"it is missing or empty, and {path.name}-wal, which belongs to it, is not")


def sync(path: Path) -> None:
    """Make the -wal of a file and the names in its directory survive a power failure.

    A process that was killed may have written a decision that has not reached the disk. SQLite reads it all the same.
    """
    on_windows = os.name == "nt"  # which opens no directories, and syncs only files that are open for writing
    for file in [wal_of(path)] if on_windows else [wal_of(path), path.parent]:
        fd = os.open(file, os.O_RDWR if on_windows else os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class _Mount(NamedTuple):
    """A mounted file system."""

    kind: str
    """The type of the file system: `ext4`, `nfs4`, `fuse.sshfs`."""
    point: str

    @property
    def is_shared(self) -> bool:
        return self.kind in _SHARED or (self.kind.startswith("fuse.") and self.kind.removeprefix("fuse.") in _SHARED_BY_FUSE)


def _mount_of(path: Path) -> _Mount | None:
    """Return the mount that a file is on, or would be on. Only Linux tells; None elsewhere."""
    try:
        lines = _MOUNT_TABLE.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    found: _Mount | None = None
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        covers = os.path.commonpath([point, path]) == point
        if covers and (found is None or len(point) >= len(found.point)):  # a later mount hides an earlier one at the same point
            found = _Mount(after.split(" ")[0], point)
    return found
