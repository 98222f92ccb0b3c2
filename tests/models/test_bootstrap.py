"""Tables are made, dropped and filled once, whoever asks, however often, and however many at the same time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Column, Integer, NullPool, String, Table, create_engine, inspect, text

from app_db import DatabaseContainer, DatabaseSettings, container_of, metadata_of, orm_base
from app_db.errors import InvalidUse, NotAtomic, UnknownConnection
from harness.paths import ROOT

_numbers = count(1)


def new_name(prefix: str = "made") -> str:
    """A connection that no other test has tables for: metadata is the process's."""
    return f"{prefix}{next(_numbers)}"


def new_table(connection: str, table: str = "things") -> Table:
    return Table(table, metadata_of(connection), Column("id", Integer, primary_key=True), Column("name", String(20)))


@contextmanager
def container_for(connections: Mapping[str, Any], **common: Any) -> Iterator[DatabaseContainer]:
    given = {name: {"url": what} if isinstance(what, str) else what for name, what in connections.items()}
    container = container_of(*given)(settings=DatabaseSettings(connections=given, **common))
    try:
        yield container
        engines = [getattr(container, f"{name}_engine") for name in given]
        assert [engine().pool.checkedout() for engine in engines if engine.is_built] == [0] * sum(e.is_built for e in engines)
    finally:
        container.shutdown_resources()


def tables_in(url: str) -> set[str]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return set(inspect(connection).get_table_names())


def rows_in(url: str, table: str = "things") -> int:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return int(connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0)


# ---- create_all and drop_all ------------------------------------------------------------------------------------------


def test_each_connection_gets_its_own_tables_and_no_others(new_database_url: Callable[[], str]) -> None:
    shop, warehouse, empty = new_name(), new_name(), new_name()
    urls = {shop: new_database_url(), warehouse: new_database_url(), empty: new_database_url()}
    new_table(shop, "orders")
    new_table(warehouse, "sales")
    with container_for(urls) as container:
        container.create_all()
        container.create_all()
        assert [tables_in(url) for url in urls.values()] == [{"orders"}, {"sales"}, set()]
        assert not getattr(container, f"{empty}_engine").is_built
        container.drop_all(warehouse)
        assert [tables_in(url) for url in urls.values()] == [{"orders"}, set(), set()]
        container.drop_all()
        container.drop_all()
        assert [tables_in(url) for url in urls.values()] == [set(), set(), set()]
        container.create_all(warehouse)
        assert [tables_in(url) for url in urls.values()] == [set(), {"sales"}, set()]
        with pytest.raises(UnknownConnection):
            container.create_all("nobody")


def test_other_peoples_tables_stay(database_url: str) -> None:
    name = new_name()
    new_table(name)
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE app_db_decisions (unit INTEGER)"))
        connection.execute(text("CREATE TABLE legacy (id INTEGER PRIMARY KEY)"))
    legacy: Any = type("Legacy", (orm_base(name, reflected=True),), {"__tablename__": "legacy"})
    missing: Any = type("Missing", (orm_base(name, reflected=True),), {"__tablename__": "missing"})
    with container_for({name: database_url}) as container:
        container.create_all()
        assert tables_in(database_url) == {"app_db_decisions", "legacy", "things"}
        container.drop_all()
        assert tables_in(database_url) == {"app_db_decisions", "legacy"}
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE referred_to (id INTEGER PRIMARY KEY)"))
            connection.execute(
                text("CREATE TABLE missing (id INTEGER PRIMARY KEY, FOREIGN KEY (id) REFERENCES referred_to (id))")
            )
        container.reflect()
        container.drop_all()
        assert tables_in(database_url) == {"app_db_decisions", "legacy", "missing", "referred_to"}
        assert legacy(id=1).id == missing(id=1).id


def test_a_reader_and_a_mirror_are_passed_over_and_refused_when_named(sqlite_url: str) -> None:
    own, mirror, shut, reader = new_name(), new_name(), new_name(), "reader"
    connections = {
        "writer": {"url": sqlite_url},
        own: {"url": sqlite_url},
        mirror: {"mirror": own},
        shut: {"url": sqlite_url, "read_only": True},
    }
    new_table(own)
    new_table(mirror, "not_made")
    new_table(shut, "not_made")
    container = container_of(own, mirror, shut, reader)(settings=DatabaseSettings(connections=connections))
    container.create_all()
    assert tables_in(sqlite_url) == {"things"}
    for verb in (container.create_all, container.drop_all):
        with pytest.raises(InvalidUse, match=f"'{mirror}' can't be created or dropped: it mirrors another connection"):
            verb(own, mirror)
        with pytest.raises(InvalidUse, match=f"APP_DB_CONNECTIONS__{shut.upper()}__READ_ONLY"):
            verb(shut)
        with pytest.raises(InvalidUse, match="'reader' can't be created or dropped: it mirrors another connection"):
            verb(reader)
    assert tables_in(sqlite_url) == {"things"}
    container.shutdown_resources()


@pytest.mark.parametrize("verb", ["create_all", "drop_all", "bootstrap"])
def test_tables_are_not_made_inside_a_unit_that_uses_the_database(database_url: str, verb: str) -> None:
    name, other = new_name(), new_name()
    new_table(name)
    with container_for({name: database_url, other: "sqlite://"}) as container:
        with container.transaction():
            getattr(container, f"{name}_session")().execute(text("SELECT 1"))
            with pytest.raises(InvalidUse, match=f"tables of '{name}'.*inside a unit of work that uses its database"):
                getattr(container, verb)()
        with container.transaction():
            getattr(container, f"{other}_session")().execute(text("SELECT 1"))
            getattr(container, verb)()


def test_tables_of_a_connection_in_autocommit_are_made(postgres_url: str) -> None:
    name = new_name()
    new_table(name)
    settings = {"url": postgres_url, "transactional": False, "isolation_level": "AUTOCOMMIT"}
    with container_for({name: settings}) as container:
        container.create_all()
        assert tables_in(postgres_url) == {"things"}


# ---- bootstrap --------------------------------------------------------------------------------------------------------


def seeding(container: DatabaseContainer, name: str, table: Table, failures: list[Exception] | None = None) -> Callable[[], None]:
    def seed() -> None:
        getattr(container, f"{name}_session")().execute(table.insert().values(name="seed"))
        if failures:
            raise failures.pop()

    return seed


def test_tables_are_made_and_the_callback_runs_once(database_url: str) -> None:
    name = new_name()
    table = new_table(name)
    with container_for({name: database_url}) as container:
        assert container.bootstrap() is False
        assert tables_in(database_url) == {"things"}
        assert container.bootstrap(seeding(container, name, table)) is True
        assert container.bootstrap(seeding(container, name, table)) is False
        assert rows_in(database_url) == 1
        assert container.bootstrap(seeding(container, name, table), step="more") is True
        assert container.bootstrap(seeding(container, name, table), step="more") is False
        assert rows_in(database_url) == 2
        assert tables_in(database_url) == {"things", "app_db_bootstrap"}
        container.drop_all()
        assert tables_in(database_url) == set()
        assert container.bootstrap(seeding(container, name, table)) is True
        assert rows_in(database_url) == 1


def test_a_callback_that_failed_runs_again(database_url: str) -> None:
    name = new_name()
    table = new_table(name)
    with container_for({name: database_url}) as container:
        failing = seeding(container, name, table, [ValueError("no seeds")])
        with pytest.raises(ValueError, match="no seeds"):
            container.bootstrap(failing)
        assert rows_in(database_url) == 0
        assert container.bootstrap(failing) is True
        assert rows_in(database_url) == 1


def test_a_callback_that_fills_another_database_follows_the_rules_for_several(new_sqlite_url: Callable[[], str]) -> None:
    name, other = new_name(), new_name()
    table = new_table(other)
    new_table(name)
    urls = {name: new_sqlite_url(), other: new_sqlite_url()}
    with container_for(urls) as container:
        with pytest.raises(InvalidUse, match=f"Several connections, or none, can store bootstrap steps: '{name}', '{other}'"):
            container.bootstrap(seeding(container, other, table))
        with pytest.raises(NotAtomic):
            container.bootstrap(seeding(container, other, table), on=name)
        assert rows_in(urls[other]) == 0
        assert container.bootstrap(seeding(container, other, table), on=other) is True
        assert container.bootstrap(seeding(container, other, table), on=other) is False
        assert rows_in(urls[other]) == 1


def test_the_writer_remembers_unless_another_one_is_named(sqlite_url: str) -> None:
    with container_for({"writer": sqlite_url, new_name(): "sqlite://"}) as container:
        assert container.bootstrap(lambda: None) is True
        assert "app_db_bootstrap" in tables_in(sqlite_url)


def test_a_connection_that_can_not_remember_is_refused(sqlite_url: str) -> None:
    audit, shut = new_name(), new_name()
    connections = {audit: {"url": sqlite_url, "transactional": False}, shut: {"url": sqlite_url, "read_only": True}}
    with container_for(connections) as container:
        with pytest.raises(InvalidUse, match="can't store bootstrap steps"):
            container.bootstrap(lambda: None, on=audit)
        with pytest.raises(InvalidUse, match="read-only"):
            container.bootstrap(lambda: None, on=shut)


async def _coroutine() -> None:
    """Does nothing."""


def test_a_coroutine_function_has_a_verb_of_its_own(sqlite_url: str) -> None:
    with container_for({"writer": sqlite_url}) as container:
        with pytest.raises(InvalidUse, match="async_bootstrap"):
            container.bootstrap(_coroutine)
        with pytest.raises(InvalidUse, match=r"Use `container\.bootstrap"):
            asyncio.run(wait_for(container.async_bootstrap(lambda: None)))


async def wait_for(awaitable: Any) -> Any:
    return await awaitable


@pytest.mark.parametrize("driver", ["aiosqlite", "psycopg", "asyncpg", "asyncmy"])
async def test_coroutines_bootstrap_once(driver: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip(driver)
    fixture = {"aiosqlite": "sqlite_url", "asyncmy": "mariadb_url"}.get(driver, "postgres_url")
    url: str = request.getfixturevalue(fixture)
    name = new_name()
    table = new_table(name)
    with container_for({name: f"{url.partition('+')[0].partition(':')[0]}+{driver}{url[url.index('://') :]}"}) as container:

        async def seed() -> None:
            await getattr(container, f"{name}_async_session")().execute(table.insert().values(name="seed"))

        runs = await asyncio.gather(*(container.async_bootstrap(seed) for _ in range(3)))
        assert sorted(runs) == [False, False, True]
        assert await container.async_bootstrap(seed) is False
        await container.shutdown_resources()
    assert rows_in(url) == 1


# ---- several processes ------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, time
from sqlalchemy import Column, Enum, ForeignKey, Integer, String, Table, insert, text
from app_db import DatabaseSettings, container_of, metadata_of

kinds = Enum("a", "b", name="kind_of_thing")  # PostgreSQL makes a type of it
for number in range(8):
    before = [ForeignKey(f"things_{number - 1}.id")] if number else []
    Table(f"things_{number}", metadata_of("made"), Column("id", Integer, *before, primary_key=True), Column("kind", kinds))
seeds = Table("seeds", metadata_of("made"), Column("id", Integer, primary_key=True), Column("process", Integer))
url = sys.argv[1]
container = container_of("made")(settings=DatabaseSettings(connections={"made": {"url": url}}))

def seed():
    container.made_session().execute(insert(seeds).values(process=os.getpid()))
    while len(sys.argv) > 2:  # until it is killed
        print("seeding", flush=True)
        time.sleep(3600)
    container.made_session().execute(insert(seeds).values(process=os.getpid()))

container.made_engine().connect().close()
print("ready", flush=True)
for line in sys.stdin:
    verb = getattr(container, line.strip())
    try:
        print(verb(seed) if verb is container.bootstrap else verb())
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
    sys.stdout.flush()
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start a process, which imports app_db from this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def processes(url: str, number: int) -> Iterator[Callable[..., list[str]]]:
    """Start processes; the function tells them what to do, all at once, and returns what they say."""
    started = [start(url) for _ in range(number)]

    def tell(*what: str) -> list[str]:
        for process, word in zip(started, what * number, strict=False):
            assert process.stdin is not None
            process.stdin.write(word + "\n")
            process.stdin.flush()
        return [said(process) for process in started]

    try:
        assert [said(process) for process in started] == ["ready"] * number
        yield tell
    finally:
        for process in started:
            process.communicate(timeout=30)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.exhaustive
def test_processes_make_and_drop_tables_at_once(database_url: str) -> None:
    with processes(database_url, 3) as tell:
        for _ in range(3):
            assert tell("create_all") == ["None"] * 3
            assert len(tables_in(database_url)) == 9
            assert tell("drop_all") == ["None"] * 3
            assert tables_in(database_url) == set()
        assert tell("create_all", "drop_all") == ["None"] * 3


@pytest.mark.exhaustive
def test_processes_that_bootstrap_at_once_do_it_once(database_url: str) -> None:
    with processes(database_url, 2) as tell:
        for _ in range(4):
            assert sorted(tell("bootstrap")) == ["False", "True"]
            assert rows_in(database_url, "seeds") == 2
            assert tell("bootstrap") == ["False", "False"]
            assert rows_in(database_url, "seeds") == 2
            tell("drop_all")


@pytest.mark.exhaustive
def test_a_process_that_is_killed_while_it_bootstraps_leaves_that_to_another(database_url: str) -> None:
    with processes(database_url, 2) as tell, start(database_url, "slow") as victim:
        assert said(victim) == "ready"
        assert victim.stdin is not None
        victim.stdin.write("bootstrap\n")
        victim.stdin.flush()
        assert said(victim) == "seeding"
        killing = threading.Timer(1, victim.kill)  # when the others are most likely waiting already
        killing.start()
        try:
            assert sorted(tell("bootstrap")) == ["False", "True"]
        finally:
            killing.cancel()
            victim.kill()
    assert rows_in(database_url, "seeds") == 2


def test_bootstrapping_waits_for_longer_than_sqlite_does(sqlite_url: str) -> None:
    """A connection gives up after five seconds, which is less than filling a database may take."""
    name = new_name()
    table = new_table(name)
    settings = {"url": sqlite_url, "connect_args": {"timeout": 0.1}}
    with container_for({name: settings}) as container, container_for({name: settings}) as other:
        container.create_all()
        begun = threading.Event()
        finish = threading.Event()

        def seed() -> None:
            seeding(container, name, table)()
            begun.set()
            finish.wait(30)

        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(container.bootstrap, seed)
            assert begun.wait(30)
            second = pool.submit(other.bootstrap, seeding(other, name, table))
            threading.Timer(0.5, finish.set).start()
            assert (first.result(30), second.result(30)) == (True, False)
    assert rows_in(sqlite_url) == 1
