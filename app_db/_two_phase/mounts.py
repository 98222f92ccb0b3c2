"""On what file system a file is, where Linux tells."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")

_SHARED = frozenset(
    "9p afs beegfs ceph cifs coda davfs gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs pvfs2 smb2 smb3 smbfs".split()
)
"""File systems that other hosts may see as well."""

_SHARED_BY_FUSE = frozenset("ceph curlftpfs davfs davfs2 gcsfuse glusterfs goofys juicefs mfs rclone s3fs sshfs".split())


@dataclass(frozen=True)
class Mount:
    """What is mounted somewhere."""

    kind: str
    """The type of the file system: `ext4`, `nfs4`, `fuse.sshfs`."""
    point: str

    @property
    def is_shared(self) -> bool:
        """Whether several hosts may see it."""
        return self.kind in _SHARED or (self.kind.startswith("fuse.") and self.kind.removeprefix("fuse.") in _SHARED_BY_FUSE)


def mount_of(path: Path) -> Mount | None:
    """Return on what file system a file is, or would be; None where that can't be told."""
    try:
        lines = _TABLE.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None  # no Linux
    found: Mount | None = None
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        covers = os.path.commonpath([point, path]) == point
        if covers and (found is None or len(point) >= len(found.point)):  # of two at one place, the later hides the other
            found = Mount(after.split(" ")[0], point)
    return found
