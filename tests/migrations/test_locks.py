"""Any number of processes may migrate at the same time, and may be killed at any step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from app_db import DatabaseContainer, errors
from app_db.migrations import Migrated, current, downgrade, upgrade
from harness.choosing import turns
from harness.migrated import Child, Project, at_once
from harness.poolers import PgBouncer
from harness.requiring import made
from harness.servers import PostgresServer

DATABASES = ("sqlite", "postgresql", "mariadb")


def migrating(project: Project, **options: Any) -> Callable[[DatabaseContainer], object]:
    return lambda container: upgrade(container, directory=project.folder, **options)


# ---- many at once ----------------------------------------------------------------------------------------------------------

COUNTING = "op.execute(\"INSERT INTO counted VALUES ('{revision}')\")"


def three_counted(project: Project) -> None:
    """Write three revisions that leave a row each time they are run."""
    for down, revision in zip([None, "a", "b"], "abc", strict=True):
        count = COUNTING.format(revision=revision)
        create = "op.create_table('counted', sa.Column('what', sa.String(5)))\n" if revision == "a" else ""
        project.write("writer", revision, create + count, down=down)


def counted(project: Project) -> list[str]:
    with project.container.writer_engine().connect() as connection:
        return sorted(connection.execute(text("SELECT what FROM counted")).scalars())


def migrate_at_once(project: Project, number: int) -> None:
    three_counted(project)
    reports = at_once(project, number, migrating(project))
    assert [report for report in reports if "error" in report] == []
    assert sum("('a', 'b', 'c')" in report["done"] for report in reports) == 1, reports
    assert counted(project) == ["a", "b", "c"]
    assert project.revision_in("writer") == ["c"]


@pytest.mark.representative("*-2")
@pytest.mark.parametrize("number", [2, 8])
def test_processes_that_begin_at_once_migrate_once(tmp_path: Path, database_url: str, number: int) -> None:
    with Project(tmp_path, writer=database_url) as project:
        migrate_at_once(project, number)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [2, 8])
def test_they_do_so_fifty_times(tmp_path: Path, new_database_url: Callable[[], str], number: int) -> None:
    for turn in range(turns(50)):
        with Project(tmp_path / str(turn), writer=new_database_url()) as project:
            migrate_at_once(project, number)


@pytest.mark.representative("sqlite")
def test_threads_migrate_once_too(tmp_path: Path, database_url: str) -> None:
    with Project(tmp_path, writer=database_url) as project:
        three_counted(project)
        found: list[Any] = []

        def work() -> None:
            try:
                found.append(upgrade(project.container)[0].revisions)
            except Exception as error:
                found.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(str, found)) == ["('a', 'b', 'c')", "()", "()", "()"]
        assert counted(project) == ["a", "b", "c"]


# ---- the holder ------------------------------------------------------------------------------------------------------------


@contextmanager
def in_the_middle(project: Project) -> Iterator[Callable[[], dict[str, Any]]]:
    """A process that has the lock and is in the middle of its revision, until the block calls what it is given."""
    read, write = os.pipe()
    arrived_read, arrived_write = os.pipe()
    project.write("writer", "a", f"os.write({arrived_write}, b'x')\nos.read({read}, 1)")
    child = Child(project, migrating(project))
    try:
        assert os.read(arrived_read, 1) == b"x"

        def go_on() -> dict[str, Any]:
            os.write(write, b"x")
            return child.result()

        yield go_on
    finally:
        child.kill()
        for descriptor in (read, write, arrived_read, arrived_write):
            os.close(descriptor)


@pytest.mark.parametrize(
    ("database", "holder"),
    [
        ("sqlite", r"a process that writes to the file"),
        ("postgres", r"the connection \d+ \(app_db.*\), since 20\d\d-.* UTC"),
        ("mariadb", r"the connection \d+ \(app_db@.*\)"),
    ],
)
def test_the_holder_is_named(tmp_path: Path, request: pytest.FixtureRequest, database: str, holder: str) -> None:
    with Project(tmp_path, writer=request.getfixturevalue(f"{database}_url")) as project, in_the_middle(project) as go_on:
        with pytest.raises(errors.MigrationLockTimeout, match=rf"for more than 0\.1 s\. The lock is held by {holder}"):
            upgrade(project.container, lock_timeout=0.1)
        assert "a" in go_on()["done"]
        assert upgrade(project.container)[0].before == "a"


@pytest.mark.parametrize("more", ["", "autocommit = True"], ids=["in its transaction", "beside it"])
def test_the_server_does_not_end_the_transaction_that_holds_the_lock(tmp_path: Path, postgres_url: str, more: str) -> None:
    short = {"options": "-c idle_in_transaction_session_timeout=200"}
    wait = "import time\ntime.sleep(0.5)" if not more else "op.execute('SELECT pg_sleep(0.5)')"
    with Project(tmp_path, writer={"url": postgres_url, "connect_args": short}) as project:
        project.write("writer", "a", wait, more=more)
        assert upgrade(project.container)[0].after == "a"


def test_nothing_is_locked_when_nothing_is_pending(tmp_path: Path, database_url: str) -> None:
    """A process that holds the lock, and a transaction that writes, keep nobody from starting."""
    with Project(tmp_path, writer=database_url) as project:
        project.write_three("writer")
        upgrade(project.container)
        with project.container.transaction():
            session = project.container.writer_session()
            session.execute(text("INSERT INTO table_a VALUES (1)"))
            worker = Child(project, migrating(project, lock_timeout=0))
            assert worker.result() == {"done": repr((Migrated("writer", "c", "c", ()),))}


def test_few_statements_are_sent_when_nothing_is_pending(tmp_path: Path, postgres_url: str) -> None:
    with Project(tmp_path, writer=postgres_url) as project:
        project.write_three("writer")
        upgrade(project.container)
        sent: list[str] = []
        event.listen(project.container.writer_engine(), "before_cursor_execute", lambda *arguments: sent.append(arguments[2]))
        upgrade(project.container)
        assert len(sent) <= 3
        assert not any("advisory" in statement for statement in sent)


# ---- killed in the middle --------------------------------------------------------------------------------------------------


@pytest.mark.representative("postgresql-*")
@pytest.mark.parametrize("step", ["a", "b", "c"])
def test_a_process_that_is_killed_in_a_revision_is_made_good_by_the_next(tmp_path: Path, database_url: str, step: str) -> None:
    with Project(tmp_path, writer=database_url) as project:
        project.write_three("writer")
        file = project.folder / "writer" / "versions" / f"{step}.py"
        usual = file.read_text()
        file.write_text(usual.replace("\ndef downgrade", f"    os.kill(os.getpid(), {signal.SIGKILL})\n\ndef downgrade"))
        assert Child(project, migrating(project)).result() == {}
        file.write_text(usual)
        upgrade(project.container)
        assert project.tables("writer") == {"table_a", "table_b", "table_c"}
        assert current(project.container)[0].pending == ()


@pytest.mark.representative("sqlite-4")
@pytest.mark.parametrize("moment", range(24))
def test_a_process_may_be_killed_before_any_statement(tmp_path: Path, database_url: str, moment: int) -> None:
    """It dies before the statement of that number; another process then gets to the newest revision and back."""

    def work(container: DatabaseContainer) -> object:
        sent = iter(range(1000))

        @event.listens_for(container.writer_engine(), "before_cursor_execute")
        def die(*arguments: object) -> None:
            if next(sent) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        return upgrade(container, directory=project.folder)

    with Project(tmp_path, writer=database_url) as project:
        project.write_three("writer")
        assert "error" not in Child(project, work).result()
        upgrade(project.container)
        assert project.tables("writer") == {"table_a", "table_b", "table_c"}
        downgrade(project.container, "base")
        assert project.tables("writer") == set()


# ---- behind a pooler, by drivers for coroutines ----------------------------------------------------------------------------


def test_behind_a_transaction_pooler(tmp_path: Path, postgres: PostgresServer, postgres_url: str) -> None:
    """Each process needs one connection of the server at a time, and two where a revision leaves its transaction."""
    pooler = made(lambda: PgBouncer(postgres, size=2))
    try:
        url = pooler.url(postgres_url.rpartition("/")[2])
        with Project(tmp_path, writer={"url": url, "pooler": "transaction"}) as project:
            migrate_at_once(project, 4)
            project.write("writer", "d", CONCURRENTLY, down="c")
            reports = at_once(project, 3, migrating(project))
            assert [report for report in reports if "error" in report] == []
            assert current(project.container)[0].revision == "d"
    finally:
        pooler.close()


CONCURRENTLY = """
with op.get_context().autocommit_block():
    op.execute("CREATE INDEX CONCURRENTLY by_what ON counted (what)")
"""


@pytest.mark.parametrize("driver", ["asyncpg", "aiosqlite", "asyncmy"])
@pytest.mark.representative("asyncpg")
def test_urls_for_coroutines(tmp_path: Path, request: pytest.FixtureRequest, driver: str) -> None:
    fixture, usual = {"asyncpg": ("postgres", "psycopg"), "aiosqlite": ("sqlite", ""), "asyncmy": ("mariadb", "pymysql")}[driver]
    url: str = request.getfixturevalue(f"{fixture}_url")
    url = url.replace(f"+{usual}", f"+{driver}") if usual else url.replace("sqlite:", f"sqlite+{driver}:")
    with Project(tmp_path, writer=url) as project:
        migrate_at_once(project, 2)


@pytest.mark.parametrize("driver", ["asyncpg", "asyncmy"])
@pytest.mark.representative("asyncpg")
def test_without_the_driver_for_threads(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    fixture, usual = {"asyncpg": ("postgres", "psycopg"), "asyncmy": ("mariadb", "pymysql")}[driver]
    url: str = request.getfixturevalue(f"{fixture}_url").replace(f"+{usual}", f"+{driver}")
    with Project(tmp_path, writer=url) as project:
        project.write_three("writer")
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, usual, None)
            assert upgrade(project.container)[0].revisions == ("a", "b", "c")
            assert downgrade(project.container, "a")[0].revisions == ("c", "b")
        assert project.tables("writer") == {"table_a"}
