"""What the functions of this package return."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check", "Current", "Migrated", "Revision", "Step"]


@dataclass(frozen=True)
class Migrated:
    """What was done to one connection: its revision before and after (None: no revision), and the revisions that were run."""

    connection: str
    before: str | None
    after: str | None
    revisions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A revision that was just run, the `number`-th of `total` of this connection. It may still be rolled back."""

    connection: str
    revision: str
    number: int
    total: int


@dataclass(frozen=True)
class Current:
    """The revision of a connection's database (None: no revision), the newest in the folder, and those between them.

    A database may be at several, such as `b, c`, in the middle of branches that a later revision merges.
    """

    connection: str
    revision: str | None
    head: str | None
    pending: tuple[str, ...]


@dataclass(frozen=True)
class Revision:
    """A revision of a connection: its id, that of the one before, its message, its file, and whether it was run.

    `is_applied` is None if the database can't be asked.
    """

    connection: str
    revision: str
    down_revision: str | None
    message: str
    path: str
    is_applied: bool | None


@dataclass(frozen=True)
class Check:
    """What is to be done for one connection: revisions to run, and differences between the models and the database.

    The differences are looked for only if no revision is pending.
    """

    connection: str
    pending: tuple[str, ...]
    drift: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing is to be done."""
        return not (self.pending or self.drift)
