"""What it takes, on each kind of database, to share a connection inside a transaction that is never committed."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from typing import Any

from app_db._databases.statements import transaction_verb
from app_db.errors import CannotIsolate

_numbers = count(1)


def new_mark() -> str:
    """Return a name that no savepoint of this process has: where names are equal, one savepoint hides another, or ends it."""
    return f"app_db_{next(_numbers)}"


class Kind:
    """What sharing takes on any database."""

    first: tuple[str, ...] = ()
    """What begins a transaction that the driver would begin later."""
    survives_cancellation = True
    """Whether drivers for coroutines can use a connection on which they were cancelled while they waited for an answer."""
    reads_at_once = True
    """Whether a result has been read when its statement has been executed, so that later ones can't change it."""

    def refuse(self, name: str, statement: str) -> None:
        """Raise when a statement would end the transaction that all share."""
        verb = transaction_verb(statement)
        if verb is not None:
            raise CannotIsolate(name, f"A {verb.upper()} sent as SQL", "Begin and end transactions by SQLAlchemy's own methods")

    def around(self, mark: str, read_only: bool) -> tuple[list[str], list[str], list[str]]:
        """Return what to say before a statement that is for itself, after it, and after it has failed."""
        return [], [], []

    def check_deferred(self, say: Callable[..., Any]) -> None:
        """Raise what COMMIT would: the violation of a constraint that is checked only then."""

    def limit_before(self, statement: str, ask: Callable[[str], Any]) -> str | None:
        """Return what sets the server's limit for statements as it was, where this statement is about to change it."""
        return None


class _PostgreSQL(Kind):
    _prepares = re.compile(r"\s*PREPARE\s+TRANSACTION\b", re.IGNORECASE)

    def refuse(self, name: str, statement: str) -> None:
        super().refuse(name, statement)
        if self._prepares.match(statement):
            raise CannotIsolate(
                name, "PREPARE TRANSACTION", "Leave it to the unit of work, or take the test out of the isolation"
            )

    def around(self, mark: str, read_only: bool) -> tuple[list[str], list[str], list[str]]:
        back = [f"ROLLBACK TO SAVEPOINT {mark}", f"RELEASE SAVEPOINT {mark}"]
        if read_only:  # which ends with the savepoint
            return [f"SAVEPOINT {mark}", "SET LOCAL transaction_read_only = on"], back, back
        return [f"SAVEPOINT {mark}"], back[1:], back

    def check_deferred(self, say: Callable[..., Any]) -> None:
        mark = f"app_db_{next(_numbers)}"  # to leave it to later units when their constraints are checked
        checks = [
            f"SAVEPOINT {mark}",
            "SET CONSTRAINTS ALL IMMEDIATE",
            f"ROLLBACK TO SAVEPOINT {mark}",
            f"RELEASE SAVEPOINT {mark}",
        ]
        say(*checks)

    def limit_before(self, statement: str, ask: Callable[[str], Any]) -> str | None:
        if not statement.startswith("SET LOCAL statement_timeout"):
            return None
        return f"SET LOCAL statement_timeout = '{ask('SHOW statement_timeout')}'"


class _MySQL(Kind):
    first = ("START TRANSACTION",)
    survives_cancellation = False
    _limit = re.compile(r"SET SESSION (max_statement_time|max_execution_time)")
    _commits = re.compile(
        r"\s*(?:(?:CREATE|DROP)\s+(?!TEMPORARY\b)|ALTER\b|RENAME\b|TRUNCATE\b|LOCK\s+TABLES|UNLOCK\s+TABLES|GRANT\b|REVOKE\b"
        r"|ANALYZE\b|OPTIMIZE\b|REPAIR\b|LOAD\s+INDEX|FLUSH\b|SET\s+PASSWORD|SET\s+(?:SESSION\s+)?AUTOCOMMIT|XA\b)",
        re.IGNORECASE,
    )

    def refuse(self, name: str, statement: str) -> None:
        super().refuse(name, statement)
        if self._commits.match(statement):
            words = " ".join(statement.split()[:2])
            raise CannotIsolate(
                name,
                f"{words} (MariaDB and MySQL commit before it, whatever comes afterwards)",
                "Do it before the isolation begins, or take the test out of it",
            )

    def limit_before(self, statement: str, ask: Callable[[str], Any]) -> str | None:
        changed = self._limit.match(statement)
        return None if changed is None else f"{changed[0]} = {ask(f'SELECT @@SESSION.{changed[1]}')}"


class _SQLite(Kind):
    reads_at_once = False
    survives_cancellation = False  # aiosqlite's thread goes on with what was cancelled, past what is said here meanwhile

    def around(self, mark: str, read_only: bool) -> tuple[list[str], list[str], list[str]]:
        if not read_only:
            return [], [], []
        off = ["PRAGMA query_only = OFF"]
        return ["PRAGMA query_only = ON"], off, off

    def check_deferred(self, say: Callable[..., Any]) -> None:
        if not say("SELECT 1 FROM sqlite_master WHERE sql LIKE '%INITIALLY DEFERRED%' LIMIT 1"):
            return
        violations = say("PRAGMA foreign_key_check")
        if violations:
            from sqlite3 import IntegrityError

            raise IntegrityError(f"FOREIGN KEY constraint failed ({violations[0][0]})")


_KINDS: dict[str, Kind] = {"postgresql": _PostgreSQL(), "mysql": _MySQL(), "mariadb": _MySQL(), "sqlite": _SQLite()}


def kind_of(dialect: str) -> Kind:
    """Return what sharing a connection takes on the databases of a SQLAlchemy dialect."""
    return _KINDS.get(dialect, Kind())
