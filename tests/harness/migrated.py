"""An application with migrations, in a directory: revisions that tests write by hand, and processes that run them.

    project = Project(tmp_path, writer=url)
    project.write("writer", "a", create="orders")
    upgrade(project.container)

A process is a fork of this one, which has imported all that it needs. It has a container of its own.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from textwrap import indent
from typing import Any, Self

from sqlalchemy import NullPool, create_engine, inspect, text

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db.settings._urls import for_threads

REVISION = """
import os
import sqlalchemy as sa
from alembic import op

revision = {revision!r}
down_revision = {down!r}
{more}

def upgrade():
{upgrade}

def downgrade():
{downgrade}
"""

_numbers = count(1)


def new_name() -> str:
    """Return the name of a connection that no other test has models for."""
    return f"migrated_{next(_numbers)}"


class Project:
    """An application's directory and container. `upgrade` and the others find its migrations with `directory=project.folder`."""

    def __init__(self, directory: Path, **connections: str | Mapping[str, Any]) -> None:
        self.folder = directory / "migrations"
        self._given = {name: {"url": what} if isinstance(what, str) else dict(what) for name, what in connections.items()}
        self.container = self.new_container()

    def new_container(self) -> DatabaseContainer:
        settings = DatabaseSettings(_env_file=None, connections=self._given)
        container: DatabaseContainer = container_of(*self._given)(settings=settings)
        return container

    def write(
        self,
        name: str,
        revision: str,
        upgrade: str = "pass",
        downgrade: str = "pass",
        *,
        down: str | None = None,
        create: str = "",
        more: str = "",
    ) -> Path:
        """Write a revision that executes Python, or creates a table."""
        if create:
            idempotent = ", if_not_exists=True"
            upgrade = f"op.create_table({create!r}, sa.Column('id', sa.Integer, primary_key=True){idempotent})\n{upgrade}"
            downgrade = f"op.drop_table({create!r}, if_exists=True)\n{downgrade}"
        file = self.folder / name / "versions" / f"{revision}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            REVISION.format(
                revision=revision, down=down, more=more, upgrade=indent(upgrade, "    "), downgrade=indent(downgrade, "    ")
            )
        )
        return file

    def write_three(self, name: str, *, prefix: str = "") -> list[str]:
        """Write three revisions that make a table each, and return their ids."""
        ids = [f"{prefix}{letter}" for letter in "abc"]
        for down, revision in zip([None, *ids], ids, strict=False):
            self.write(name, revision, down=down, create=f"table_{revision}")
        return ids

    def tables(self, name: str) -> set[str]:
        """Return the tables that are in a database, as a stranger sees them; without those that have revisions."""
        return {table for table in self.all_tables(name) if not table.startswith("alembic_version")}

    def all_tables(self, name: str) -> set[str]:
        with self._plain(name) as connection:
            return {*inspect(connection).get_table_names()}

    def revision_in(self, name: str, table: str = "alembic_version") -> list[str]:
        """Return the revisions that a version table has."""
        with self._plain(name) as connection:
            return [*connection.execute(text(f"SELECT version_num FROM {table}")).scalars()]

    def execute(self, name: str, *statements: str) -> None:
        """Run statements beside the application."""
        with self._plain(name) as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
            connection.commit()

    def _plain(self, name: str) -> Any:
        url = for_threads(self.container.settings().connection(name).sqlalchemy_url())
        return create_engine(url, poolclass=NullPool).connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.container.shutdown_resources()


class Child:
    """A process that does something with a container of its own, and reports what came of it."""

    def __init__(
        self, project: Project, work: Callable[[DatabaseContainer], object], barrier: tuple[int, int] | None = None
    ) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            if barrier is not None:
                os.close(barrier[1])
                os.read(barrier[0], 1)  # nothing comes: the pipe ends when all processes are there
            os.write(write, json.dumps(_outcome(project, work)).encode())
            os._exit(0)
        os.close(write)
        self._read = read
        self._ended = False

    def result(self) -> dict[str, Any]:
        """Wait for the end, and return `{"done": …}` or `{"error": …}`; nothing if it was killed."""
        with os.fdopen(self._read) as pipe:
            said = pipe.read()
        self._wait()
        found: dict[str, Any] = json.loads(said) if said else {}
        return found

    def kill(self) -> None:
        """End it if it is still there."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self._wait()

    def _wait(self) -> None:
        os.waitpid(self.pid, 0)
        self._ended = True


def _outcome(project: Project, work: Callable[[DatabaseContainer], object]) -> dict[str, Any]:
    try:
        container = project.new_container()
        found = work(container)
        container.shutdown_resources()
        return {"done": repr(found)}
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}


def at_once(project: Project, number: int, work: Callable[[DatabaseContainer], object]) -> list[dict[str, Any]]:
    """Have `number` processes do the same thing at the same time, and return their reports."""
    barrier = read, write = os.pipe()
    children: list[Child] = []
    try:
        for _ in range(number):
            children.append(Child(project, work, barrier))  # noqa: PERF401  # those that there are end if one can't begin
        os.close(write)
        return [child.result() for child in children]
    finally:
        os.close(read)
        for child in children:
            child.kill()
