"""The chain of revisions of one connection: its folder, its settings for Alembic, and the table that has its revision."""

from __future__ import annotations

import io
import re
from argparse import Namespace
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from importlib.util import decode_source
from inspect import iscoroutinefunction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError, RevisionError
from alembic.util.exc import CommandError
from sqlalchemy import inspect

from app_db._databases.capacity import most_of
from app_db._databases.database import Database
from app_db._databases.registry import database_of
from app_db._wording import in_one_line
from app_db.errors import UnusableMigrations

if TYPE_CHECKING:
    from alembic.script import Script
    from sqlalchemy import Connection, Engine

ENVIRONMENT = Path(__file__).parent / "_environment"
VERSION_TABLE = "alembic_version"
AUTOCOMMIT_BLOCK = "autocommit_block"

_NUMBER = re.compile(r"^(down_)?revision\b[^=\n]*=\s*\d+\s*$", re.MULTILINE)
_ID = re.compile(r"""^revision\b[^=\n]*=\s*["']([^"'\n]+)["']""", re.MULTILINE)


class Chain:
    """The revisions of a connection, in the folder `versions`. `beside` are the folders of others in the same database."""

    def __init__(self, name: str, versions: Path, engine: Engine, beside: Sequence[Path]) -> None:
        self.name = name
        self.versions = versions
        self.engine = engine
        self.beside = tuple(beside)
        self.database: Database = database_of(engine.dialect.name)
        self.reload()

    def config(self, **attributes: Any) -> Config:
        """Return a configuration for Alembic's commands. Its environment is app_db's, and not an env.py of the application."""
        config = Config(stdout=io.StringIO(), cmd_opts=Namespace(quiet=True), attributes=attributes)
        for option, value in {
            "script_location": str(ENVIRONMENT),
            "version_locations": str(self.versions),
            "path_separator": "newline",
            "version_path_separator": "newline",  # of Alembic before 1.16
        }.items():
            config.set_main_option(option, value.replace("%", "%%"))
        return config

    # ---- what is in the folder

    def reload(self) -> None:
        """Import all revisions. Raise UnusableMigrations if one can't be, or if there are two newest ones."""
        self._require_different_ids()
        self.script = ScriptDirectory.from_config(self.config())
        try:
            heads = self.script.get_heads()
            self.revisions: dict[str, Script] = {each.revision: each for each in self.script.walk_revisions()}
        except KeyError as error:  # Alembic has warned, and goes on until it misses the revision
            missing = error.args[0]
            raise self.unusable(
                f"a file in {self.versions} has the down_revision {missing!r}, which is not there", "Bring its file back"
            ) from None
        except (Exception, SystemExit) as error:  # a revision is a program, which may raise anything
            raise self.unusable(f"{self._place(error)} can't be loaded ({in_one_line(error)})", "Correct it") from error
        if len(heads) > 1:
            raise self.unusable(
                f"{self.versions} has {len(heads)} newest revisions, {', '.join(sorted(heads))}",
                f"Write the id of one as the down_revision of another, as in down_revision = {min(heads)!r}",
            )
        self.head: str | None = heads[0] if heads else None
        self._require("upgrade", self.revisions.values())

    def _require_different_ids(self) -> None:
        """Raise UnusableMigrations if an id is no text, or two files have the same: Alembic would warn, and run one of them."""
        files: dict[str, Path] = {}
        for file in sorted(self.versions.glob("*.py")):
            with suppress(SyntaxError, UnicodeDecodeError):  # which is explained when the file is imported
                source = decode_source(file.read_bytes())
                if number := _NUMBER.search(source):
                    raise self.unusable(f"{file} has {number[0].strip()}, which is no text", "Write the id in quotes")
                if found := _ID.search(source):
                    if found[1] in files:
                        raise self.unusable(
                            f"{files[found[1]]} and {file.name} have the same id {found[1]!r}", "Give one of them another id"
                        )
                    files[found[1]] = file

    def _require(self, function: str, revisions: Iterable[Script]) -> None:
        for each in revisions:
            found = getattr(each.module, function, None)
            if not callable(found):
                raise self.unusable(f"{each.path} has no function {function}()", "Write one")
            if iscoroutinefunction(found):
                raise self.unusable(f"{function}() of {each.path} is a coroutine function, which would not run", "Write def")

    def require_two_connections(self) -> None:
        """Raise UnusableMigrations if the pool has no second connection, which would be waited for in vain."""
        if most_of(self.engine.pool) < 2:
            raise self.unusable(
                f"a revision that commits by itself ({AUTOCOMMIT_BLOCK}) needs a second connection, which holds the lock, and "
                "the pool has only one",
                "Raise POOL__SIZE or POOL__MAX_OVERFLOW of the connection",
            )

    def _place(self, error: BaseException) -> str:
        """Return the file that an error is about."""
        files = [str(getattr(error, "filename", "") or "")]
        trace = error.__traceback__
        while trace is not None:
            files.append(trace.tb_frame.f_code.co_filename)
            trace = trace.tb_next
        found = [file for file in files if Path(file).parent == self.versions]
        return found[-1] if found else f"a file in {self.versions}"

    def unusable(self, problem: str, advice: str) -> UnusableMigrations:
        """Return the error about this chain."""
        return UnusableMigrations(self.name, problem, advice)

    def up_to(self, target: str, current: tuple[str, ...]) -> list[Script]:
        """Return the revisions to run in order to get from the revision `current` up to `target`."""
        with self._translated(target, "upgrade", current):
            found = self.script.iterate_revisions(target, current, implicit_base=True)
            return [*reversed([*found])]

    def down_to(self, target: str, current: tuple[str, ...]) -> list[Script]:
        """Return the revisions to undo in order to get from the revision `current` down to `target`."""
        with self._translated(target, "downgrade", current):
            found = [*self.script.iterate_revisions(current, target, select_for_downgrade=True)]
        self._require("downgrade", found)
        return found

    def named(self, target: str) -> list[Script]:
        """Return the revision that `target` names, in a list that is empty for `base`. It names one of its own: not `-1`."""
        with self._translated(target):
            if target.startswith(("+", "-")):
                raise self.unusable(
                    f"{target!r} counts from another revision", f"Give an id, head or base. The revisions are: {self.listed()}"
                )
            return [*filter(None, self.script.get_revisions(target))]  # Alembic gives None for `base`

    @contextmanager
    def _translated(self, target: str, verb: str = "", current: tuple[str, ...] = ()) -> Generator[None]:
        if not target:  # of which Alembic makes an AssertionError, or `base`
            raise self.unusable(f"{target!r} names no revision", f"The revisions are: {self.listed()}")
        try:
            yield
        except (CommandError, RevisionError, AssertionError) as error:
            is_unknown = isinstance(error.__cause__ or error, ResolutionError)
            if is_unknown or not verb:
                problem = f"there is no revision {target!r}"
            else:
                problem = f"no {verb} leads to {target!r}: the database is at {self._standing(current)}"
            raise self.unusable(problem, f"The revisions are: {self.listed()}") from error

    def _standing(self, current: tuple[str, ...]) -> str:
        """Return where a database is, and how many revisions can be undone and run from there."""
        below = {each.revision for each in self.script.iterate_revisions(current, "base")} if current else set[str]()
        above = len(self.revisions) - len(below)
        place = f"{shown(current)!r}" if current else "its base"
        undone = {0: "no revision", 1: "1 revision"}.get(len(below), f"{len(below)} revisions")
        return f"{place}, with {undone} to undo and {above or 'none'} to run"

    def listed(self) -> str:
        """Return the ids of all revisions, from the first to the newest."""
        return ", ".join(reversed(self.revisions)) or "none"

    # ---- what is in the database

    def current(self, connection: Connection) -> tuple[str, ...]:
        """Return the revision of a database, as a tuple that is empty if it has none.

        There are several after a process was killed between two revisions that a later one merges, where each is committed by
        itself.
        """
        found: tuple[str, ...] = self.context(connection).get_current_heads()
        if unknown := set(found) - set(self.revisions):
            raise self.unusable(
                f"the database is at the revision {', '.join(sorted(unknown))}, which is not in {self.versions}",
                "Run the code that has this revision, or bring its file back",
            )
        return found

    def context(self, connection: Connection, **options: Any) -> MigrationContext:
        """Return Alembic's view of a database."""
        return MigrationContext.configure(connection, opts={"version_table": self.version_table(connection), **options})

    def version_table(self, connection: Connection | None) -> str:
        """Return the table that has the revision: `alembic_version`, or `alembic_version_NAME` if that belongs to another chain.

        What is in the database decides first, so that the name stays when a connection moves to a database of its own, or no
        longer is alone in it. Offline, without `connection`, nothing is known of that.
        """
        own = f"{VERSION_TABLE}_{self.name}"
        usual = own if self.beside else VERSION_TABLE
        if connection is None:
            return usual
        inspector = inspect(connection)
        if inspector.has_table(own):
            return own
        if not (self.beside and inspector.has_table(VERSION_TABLE)):
            return usual
        found = set(MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_heads())
        others = set[str]().union(*(ids_in(versions) for versions in self.beside))
        is_of_another = not found or (not found <= set(self.revisions) and found <= others)
        return own if is_of_another else VERSION_TABLE


def shown(current: tuple[str, ...]) -> str | None:
    """Return the revision of a database as results have it: usually one id, None if there is none."""
    return ", ".join(sorted(current)) or None


def ids_in(versions: Path) -> set[str]:
    """Return the ids of the revisions in a folder."""
    return {each.revision for each in ScriptDirectory(ENVIRONMENT, version_locations=[versions]).walk_revisions()}
