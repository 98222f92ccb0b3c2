"""Five tests for the migrations of each connection, ready to be collected by pytest.

# tests/test_migrations.py
from app_db.migrations.testing import migration_tests

TestMigrations = migration_tests(empty_container)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

from app_db._databases.migrating import MigrationRules
from app_db._databases.registry import database_of
from app_db.container import DatabaseContainer
from app_db.errors import InvalidUse
from app_db.migrations._chains import VERSION_TABLE
from app_db.migrations._commands import check, current, downgrade, history, upgrade
from app_db.migrations._folders import folder_of
from app_db.migrations._selecting import chains, with_engines

__all__ = ["migration_tests"]

T = TypeVar("T")


def migration_tests(
    make_container: Callable[[], DatabaseContainer],
    *,
    connections: Sequence[str] | None = None,
    directory: str | Path | None = None,
) -> type[Any]:
    """Return a class of tests for the migrations of all connections in the folder, or of those in `connections`.

    `make_container` returns a container whose databases are empty. Each test clears what it has made in them, and nothing else:
    it refuses a database that has tables. The tests are: there is one newest revision; all revisions can be run; afterwards the
    database is what the models say; each revision can be undone and run again; and undoing all of them leaves nothing behind.
    """
    import pytest

    folder = folder_of(directory)
    names = sorted(path.parent.name for path in folder.glob("*/versions")) if connections is None else [*connections]
    if not names:
        raise InvalidUse(f"There are no migrations to test in {folder}", "Give the folder with `directory`")

    class MigrationTests:
        """The tests of the migrations."""

        @pytest.fixture
        def database(self, connection: str) -> Generator[_Database]:
            with _empty_database(make_container, connection, folder) as database:
                yield database

        def test_there_is_one_newest_revision(self, connection: str) -> None:
            container = make_container()
            try:
                with_engines(container, [connection], lambda engines: chains(container, engines, folder))
            finally:
                container.shutdown_resources()

        def test_all_revisions_can_be_run(self, database: _Database) -> None:
            upgrade(database.container, **database.where)
            _require("pending", current(database.container, **database.where)[0].pending, ())

        def test_the_database_is_what_the_models_say(self, database: _Database) -> None:
            upgrade(database.container, **database.where)
            _require("differs from the models", check(database.container, **database.where)[0].drift, ())

        def test_each_revision_can_be_undone_and_run_again(self, database: _Database) -> None:
            downs = {each.revision: each.down_revision for each in history(database.container, **database.where)}
            while pending := current(database.container, **database.where)[0].pending:
                before = upgrade(database.container, pending[0], **database.where)[0]
                if before.before not in (None, *downs) or downs[pending[0]] != before.before:
                    continue  # in branches that are merged later, and at their merge, no single step goes back
                undone = downgrade(database.container, "-1", **database.where)[0]
                _require("revision after it was undone", undone.after, before.before)
                again = upgrade(database.container, pending[0], **database.where)[0]
                _require("revision after it was run again", again.after, before.after)

        def test_undoing_all_revisions_leaves_nothing(self, database: _Database) -> None:
            upgrade(database.container, **database.where)
            downgrade(database.container, "base", **database.where)
            _require("left behind", database.left(), [])

    marked: type[Any] = pytest.mark.parametrize("connection", names)(MigrationTests)
    return marked


def _require(what: str, found: object, wanted: object) -> None:
    """Raise AssertionError if something is not as it should be. pytest does not explain an `assert` of a library."""
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, and not {wanted!r}")


class _Database:
    """The database of one connection, which was empty when the test began."""

    def __init__(self, container: DatabaseContainer, name: str, folder: Path) -> None:
        self.container = container
        self.where: dict[str, Any] = {"connections": [name], "directory": folder}
        self._name = name

    def left(self) -> list[str]:
        """Return what is in the database, without the version table."""
        return _on_database(self.container, self._name, _left_in)


def _on_database(container: DatabaseContainer, name: str, work: Callable[[MigrationRules, Connection], T]) -> T:
    def connected(engines: dict[str, Engine]) -> T:
        with engines[name].connect() as connection:
            found = work(database_of(engines[name].dialect.name).migrating, connection)
            connection.commit()
            return found

    return with_engines(container, [name], connected)


def _left_in(rules: MigrationRules, connection: Connection) -> list[str]:
    return [each for each in rules.left_in(connection) if not each.startswith(f"table {VERSION_TABLE}")]


@contextmanager
def _empty_database(make_container: Callable[[], DatabaseContainer], name: str, folder: Path) -> Generator[_Database]:
    """Give the database of a connection, and clear it at the end. Raises InvalidUse if it is not empty."""
    container = make_container()
    try:
        left = _on_database(container, name, _left_in)
        if left:
            raise InvalidUse(
                f"The database of {name!r} is not empty ({', '.join(left[:3])}), and the tests of migrations would clear it",
                "Return a container with empty databases",
            )
        try:
            yield _Database(container, name, folder)
        finally:
            _on_database(container, name, lambda rules, connection: rules.clear(connection))
    finally:
        container.shutdown_resources()
