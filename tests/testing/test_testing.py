"""The switches of `app_db.testing`: they change what they say, for as long as they say, and leave nothing behind."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from app_db import Connection, Container, DatabaseContainer, DatabaseSettings, container_of, metadata_of, transactional
from app_db.container import KINDS
from app_db.errors import AwaitRequired, CannotMakeDatabase, HookFailed, InvalidUse, ReadOnlyViolation, SettingsError
from app_db.testing import (
    CapturedHook,
    RowCounts,
    captured_hooks,
    isolated,
    made_tables,
    overridden,
    sqlite,
    worker_databases,
)
from harness.servers import PostgresServer

NOWHERE = "postgresql+psycopg://nobody:hunter2@127.0.0.1:1/nothing"
"""Nobody listens there: whoever connects is found out."""


def settings_for(**urls: Any) -> DatabaseSettings:
    connections = {name: {"url": what} if isinstance(what, str) else what for name, what in urls.items()}
    return DatabaseSettings(connections=connections, _env_file=None)


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], str]:
    """`place("a")` is the URL of a SQLite database with a table in which its name is."""

    def make(name: str) -> str:
        url = f"sqlite:///{tmp_path / name}.db"
        with create_engine(url, poolclass=NullPool).begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS place (name TEXT)"))
            connection.execute(text("INSERT INTO place VALUES (:name)"), {"name": name})
        return url

    return make


@pytest.fixture
def container(place: Callable[[str], str]) -> Iterator[Container]:
    made = Container(settings=settings_for(writer=place("before")))
    yield made
    made.unwire()
    made.shutdown_resources()


WHERE = text("SELECT name FROM place")


@transactional
def injected(session: Session = Provide["writer_session"]) -> str:
    return str(session.scalar(WHERE))


def where(container: DatabaseContainer, name: str = "writer") -> str:
    with container.transaction():
        return str(container.providers[f"{name}_session"]().scalar(WHERE))


async def where_async(container: DatabaseContainer, name: str = "writer") -> str:
    async with container.transaction():
        return str(await container.providers[f"{name}_async_session"]().scalar(WHERE))


def everything(container: DatabaseContainer) -> dict[str, object]:
    """What the container's connections hold: engines, makers, scoped sessions."""
    kinds = [kind for kind in KINDS if not kind.endswith("session") or "scoped" in kind]
    held = {f"{name}_{kind}": container.providers[f"{name}_{kind}"]() for name in ("writer", "reader") for kind in kinds}
    return {**held, "settings": container.settings(), "decision_logs": container.core.decision_logs()}


def open_files(name: str) -> list[str]:
    """Which of this process's files are open whose names begin so."""
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return [path for path in opened if Path(path).name.startswith(name)]


def settles_at(measure: Callable[[], int], value: int) -> bool:
    """Whether a number becomes what it should be: threads end a moment after their connections are closed."""
    give_up = time.monotonic() + 20
    while measure() != value and time.monotonic() < give_up:
        time.sleep(0.01)
    return measure() == value


# ---- other settings --------------------------------------------------------------------------------------------------


def test_everything_follows_the_settings_and_comes_back(container: Container, place: Callable[[str], str]) -> None:
    """dependency-injector leaves what was made from the old settings as it is."""
    container.wire(modules=[__name__])
    before = everything(container)
    assert (where(container), where(container, "reader"), injected()) == ("before", "before", "before")
    others = settings_for(writer=place("meanwhile"))
    with overridden(container, others) as given:
        assert given is others is container.settings()
        meanwhile = everything(container)
        assert [name for name in before if before[name] is meanwhile[name]] == []
        assert (where(container), where(container, "reader"), injected()) == ("meanwhile", "meanwhile", "meanwhile")
    assert [name for name, value in everything(container).items() if value is not before[name]] == []
    assert (where(container), where(container, "reader"), injected()) == ("before", "before", "before")


def test_what_was_not_made_before_is_not_made_by_it(container: Container, place: Callable[[str], str]) -> None:
    with overridden(container, settings_for(writer=place("meanwhile"))):
        assert where(container) == "meanwhile"
    assert not container.writer.engine.is_built
    assert where(container) == "before"


def test_everything_comes_back_after_an_error(container: Container, place: Callable[[str], str]) -> None:
    before = everything(container)
    with pytest.raises(LookupError), overridden(container, settings_for(writer=place("meanwhile"))):
        raise LookupError(where(container))
    assert everything(container) == before
    assert where(container) == "before"


def test_overrides_nest(container: Container, place: Callable[[str], str]) -> None:
    with overridden(container, settings_for(writer=place("outer"))):
        outer = everything(container)
        with overridden(container, settings_for(writer=place("inner"))):
            assert where(container) == "inner"
        assert everything(container) == outer
        assert where(container) == "outer"
    assert where(container) == "before"


@pytest.mark.parametrize("by_coroutines", [False, True])
def test_blocks_that_are_not_nested_are_refused_and_leave_nothing(
    container: Container, place: Callable[[str], str], by_coroutines: bool
) -> None:
    before = everything(container)
    first, second = (overridden(container, {"writer": place(name)}) for name in ("first", "second"))
    first.__enter__()
    assert where(container) == "first"
    second.__enter__()
    meanwhile = everything(container)
    assert where(container) == "second"
    with pytest.raises(InvalidUse, match="ended before a block inside it"):
        if by_coroutines:
            asyncio.run(first.__aexit__(None, None, None))
        else:
            first.__exit__(None, None, None)
    assert everything(container) == meanwhile
    assert not open_files("first.db")
    second.__exit__(None, None, None)
    assert everything(container) == before
    assert where(container) == "before"


def test_the_error_of_a_block_that_is_not_nested_goes_on(container: Container, place: Callable[[str], str]) -> None:
    inner = overridden(container, {"writer": place("inner")})
    with pytest.raises(LookupError), overridden(container, {"writer": place("outer")}):
        inner.__enter__()
        raise LookupError
    inner.__exit__(None, None, None)
    assert where(container) == "before"


def test_what_code_does_to_the_providers_meanwhile_is_undone(container: Container, place: Callable[[str], str]) -> None:
    """An override laid over the providers would be no shelter: `reset_singletons()` reaches what is below."""
    before = everything(container)
    with overridden(container, settings_for(writer=place("meanwhile"))):
        assert where(container) == "meanwhile"
        container.reset_singletons()
        assert where(container) == "meanwhile"
        container.shutdown_resources()
        assert where(container) == "meanwhile"
        container.writer_engine.override(create_engine(place("elsewhere"), poolclass=NullPool))
        assert where(container) == "elsewhere"
        container.settings.reset_override()
    assert everything(container) == before
    assert where(container) == "before"


def test_overrides_of_the_whole_container_may_be_reset_meanwhile(container: Container, place: Callable[[str], str]) -> None:
    before = everything(container)
    with overridden(container, settings_for(writer=place("meanwhile"))):
        assert where(container) == "meanwhile"
        cast("Any", container).reset_override()
        with suppress(SettingsError):  # none were in the environment
            container.writer.engine.reset()
            container.writer_engine()
    assert everything(container) == before
    assert where(container) == "before"


def test_resetting_the_singletons_of_an_application_reaches_the_blocks_and_not_what_is_set_aside(
    place: Callable[[str], str],
) -> None:
    class Application(containers.DeclarativeContainer):
        db = providers.Container(Container, settings=settings_for(writer=place("before")))

    application = cast("Any", Application())
    before = everything(application.db)
    with overridden(application.db, {"writer": place("meanwhile")}):
        meanwhile = application.db.writer_engine()
        application.reset_singletons()
        assert application.db.writer_engine() is not meanwhile
        assert where(application.db) == "meanwhile"
    assert everything(application.db) == before
    application.shutdown_resources()


def test_settings_of_an_applications_own_provider_are_made_anew_when_it_resets_them_meanwhile(
    place: Callable[[str], str],
) -> None:
    """What that provider holds is not the container's, so nothing can set it aside."""
    own = settings_for(writer=place("before"))

    class Own(Container):
        settings = providers.ThreadSafeSingleton(own.with_connections, own.connections)

    container = Own()
    before: dict[str, Any] = everything(container)
    with overridden(container, {"writer": place("meanwhile")}):
        assert where(container) == "meanwhile"
        container.reset_singletons()
    after: dict[str, Any] = everything(container)
    assert {name for name in before if after[name] is not before[name]} == {"settings"}
    assert after["settings"].connection("writer").place == before["settings"].connection("writer").place
    container.shutdown_resources()


def test_a_copy_that_is_made_meanwhile_shares_nothing(container: Container, place: Callable[[str], str]) -> None:
    others = settings_for(writer=place("meanwhile"))
    with overridden(container, others):
        meanwhile = everything(container)
        copied = copy.deepcopy(container)
        held = everything(copied)
        assert [name for name in meanwhile if held[name] is meanwhile[name]] == ["settings"]
        assert where(copied) == "meanwhile"
    assert everything(copied) == held
    assert where(container) == "before"
    copied.shutdown_resources()


def test_the_session_that_finds_its_database_follows_too(container: Container, place: Callable[[str], str]) -> None:
    def autoflush() -> bool:
        with container.transaction():
            assert container.session().scalar(WHERE) in ("before", "meanwhile")
            return container.session().autoflush

    assert autoflush()
    with overridden(container, settings_for(writer={"url": place("meanwhile"), "session": {"autoflush": False}})):
        assert not autoflush()
    assert autoflush()


@pytest.mark.exhaustive
def test_threads_never_make_an_engine_of_one_blocks_settings_that_another_one_keeps(
    container: Container, place: Callable[[str], str]
) -> None:
    others = settings_for(writer=place("meanwhile"))
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            container.writer_engine()

    threads = [threading.Thread(target=use) for _ in range(4)]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    wrong = []
    try:
        for thread in threads:
            thread.start()
        for _ in range(300):
            container.writer.engine.reset()
            with overridden(container, others):
                wrong += [url for url in [str(container.writer_engine().url)] if "meanwhile" not in url]
            wrong += [url for url in [str(container.writer_engine().url)] if "before" not in url]
    finally:
        done.set()
        sys.setswitchinterval(switching)
        for thread in threads:
            thread.join()
    assert wrong == []


def test_overrides_that_were_there_are_set_aside(container: Container, place: Callable[[str], str]) -> None:
    engine = create_engine(place("by hand"))
    with container.writer_engine.override(engine), container.writer_session.override("a fake"):
        with overridden(container, settings_for(writer=place("meanwhile"))):
            assert where(container) == "meanwhile"
        assert container.writer_engine() is engine
        assert container.writer_session() == "a fake"
    assert where(container) == "before"


def test_settings_from_the_environment_are_not_read_again(monkeypatch: pytest.MonkeyPatch, place: Callable[[str], str]) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", place("before"))
    container = Container()
    before = container.settings()
    with overridden(container, settings_for(writer=place("meanwhile"))):
        container.reset_singletons()
    assert container.settings() is before


def test_a_unit_that_is_under_way_keeps_its_sessions(container: Container, place: Callable[[str], str]) -> None:
    with container.transaction():
        session = container.writer_session()
        assert session.scalar(WHERE) == "before"
        with overridden(container, settings_for(writer=place("meanwhile"))):
            assert container.writer_session() is session
            session.execute(text("INSERT INTO place VALUES ('z')"))
            with container.transaction(propagation="requires_new"):
                assert container.writer_session().scalar(WHERE) == "meanwhile"
        assert container.writer_session() is session
    with container.transaction():
        assert container.writer_session().scalars(WHERE).all() == ["before", "z"]


def test_a_unit_that_outlives_the_block_keeps_its_sessions(container: Container, place: Callable[[str], str]) -> None:
    override = overridden(container, settings_for(writer=place("meanwhile")))
    override.__enter__()
    with container.transaction():
        session = container.writer_session()
        session.execute(text("INSERT INTO place VALUES ('z')"))
        override.__exit__(None, None, None)
        assert container.writer_session() is session
        assert session.scalars(WHERE).all() == ["meanwhile", "z"]
        assert open_files("meanwhile.db")
    assert not open_files("meanwhile.db"), "what it used was closed when it ended"
    assert where(container) == "before"


async def test_coroutines_follow_the_settings_inside_a_running_loop(container: Container, place: Callable[[str], str]) -> None:
    before = everything(container)
    assert await where_async(container) == "before"
    async with overridden(container, settings_for(writer=place("meanwhile"))):
        assert await where_async(container) == "meanwhile"
        threads = threading.active_count()
    assert settles_at(threading.active_count, threads - 1), "the thread of aiosqlite's connection has ended"
    assert everything(container) == before
    with overridden(container, settings_for(writer=place("again"))):
        assert await where_async(container) == "again"
    assert await where_async(container) == "before"
    await container.shutdown_resources()


def test_engines_of_other_loops_are_put_back_and_disposed_too(container: Container, place: Callable[[str], str]) -> None:
    loop, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    before = [loop.run_until_complete(_engine_of(container)) for loop in (loop, other)]
    with overridden(container, settings_for(writer=place("meanwhile"))):
        assert loop.run_until_complete(where_async(container)) == "meanwhile"
        assert loop.run_until_complete(_engine_of(container)) is not before[0]
        assert open_files("meanwhile.db")
    assert not open_files("meanwhile.db")
    assert [loop.run_until_complete(_engine_of(container)) for loop in (loop, other)] == before
    for each in (loop, other):
        each.run_until_complete(container.shutdown_resources())
        each.close()


async def _engine_of(container: Container) -> AsyncEngine:
    engine: AsyncEngine = container.writer_async_engine()
    return engine


def test_decisions_go_where_the_settings_say(new_postgres: Any) -> None:
    server: PostgresServer = new_postgres(settings={"max_prepared_transactions": 10})
    for name in ("a", "b", "c", "d"):
        server.execute(f"CREATE DATABASE {name}")
    each = {"two_phase": True}
    container = container_of("writer", "warehouse")(
        settings=settings_for(writer={"url": server.url("a"), **each}, warehouse={"url": server.url("b"), **each})
    )
    before = container.core.decision_logs()
    with overridden(container, {"writer": server.url("c"), "warehouse": server.url("d")}):
        with container.transaction():
            for name in ("writer", "warehouse"):
                container.providers[f"{name}_session"]().execute(text("CREATE TABLE written (name TEXT)"))
        assert container.core.decision_logs() is not before
    assert container.core.decision_logs() is before
    tables = text("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    seen = {}
    for name in ("a", "b", "c", "d"):
        engine = create_engine(server.url(name))
        with engine.connect() as connection:
            seen[name] = list(connection.scalars(tables))
            assert not seen[name] or connection.scalar(text("SELECT count(*) FROM pg_prepared_xacts")) == 0
            if "app_db_decisions" in seen[name]:
                left = connection.scalar(text("SELECT count(*) FROM app_db_decisions WHERE verdict = 'commit'"))
                assert left == 0, "what all databases of the block have acknowledged is forgotten there"
        engine.dispose()
    assert [bool(seen[name]) for name in ("a", "b", "c", "d")] == [False, False, True, True]
    assert "app_db_decisions" in [*seen["c"], *seen["d"]]
    container.shutdown_resources()


def test_an_override_is_entered_once_at_a_time(container: Container, place: Callable[[str], str]) -> None:
    override = overridden(container, settings_for(writer=place("meanwhile")))
    with override, pytest.raises(InvalidUse, match="entered twice"):
        override.__enter__()
    assert where(container) == "before"
    with override:
        assert where(container) == "meanwhile"


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_two_hundred_overrides_leave_nothing_behind(request: pytest.FixtureRequest, kind: str) -> None:
    new_url = request.getfixturevalue(f"new_{kind}_url")
    container = Container(settings=settings_for(writer=new_url()))
    others = settings_for(writer=new_url())
    engines: weakref.WeakSet[Engine] = weakref.WeakSet()

    async def use() -> None:
        async with overridden(container, others):
            with container.transaction():
                container.writer_session().execute(text("SELECT 1"))
            async with container.transaction():
                await container.writer_async_session().execute(text("SELECT 1"))
            engines.update((container.writer_engine(), container.writer_async_engine().sync_engine))

    async def main() -> None:
        for number in range(205):
            await use()
            if number == 4:
                counted.append(left_over())
        counted.append(left_over())

    def left_over() -> dict[str, int]:
        settles_at(threading.active_count, counted[0]["threads"] if counted else threads)
        if counted and kind == "postgres":
            settles_at(lambda: _backends(request), counted[0]["backends"])
        gc.collect()
        return {
            "engines": len(engines),
            "threads": threading.active_count(),
            "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            "backends": _backends(request) if kind == "postgres" else 0,
        }

    counted: list[dict[str, int]] = []
    threads = threading.active_count()
    asyncio.run(main())
    first, last = counted
    assert first["engines"] <= 2, "none but the last block's, which something may still hold"
    assert last == first
    container.shutdown_resources()


def _backends(request: pytest.FixtureRequest) -> int:
    server: PostgresServer = request.getfixturevalue("postgres")
    engine = create_engine(server.url("postgres"), pool_pre_ping=True)
    with engine.connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'app_db'"
        count = int(connection.scalar(text(query)) or 0)
    engine.dispose()
    return count


def test_other_settings_inside_an_isolation_are_not_isolated_and_it_goes_on_afterwards(
    container: Container, place: Callable[[str], str]
) -> None:
    add, count = text("INSERT INTO place VALUES ('z')"), text("SELECT count(*) FROM place")

    def write_and_count() -> int:
        with container.transaction():
            container.writer_session().execute(add)
        with container.transaction(read_only=True):
            return int(container.writer_session().scalar(count) or 0)

    coordinator = container.core.coordinator()
    with isolated(container) as isolation:
        assert write_and_count() == 2
        with overridden(container, settings_for(writer=place("meanwhile"))):
            assert coordinator.rehearsal is None, "units there commit for good, in two phases where they should"
            assert write_and_count() == 2
            with isolated(container):
                assert write_and_count() == 3
            assert write_and_count() == 3
        assert coordinator.rehearsal is isolation
        assert write_and_count() == 3
    with container.transaction():
        assert container.writer_session().scalar(count) == 1


# ---- other URLs ------------------------------------------------------------------------------------------------------


def test_a_mapping_replaces_just_the_urls(container: Container, place: Callable[[str], str]) -> None:
    with overridden(container, {"writer": place("meanwhile")}) as given:
        assert given.connections.keys() == {"writer"}
        assert (where(container), where(container, "reader")) == ("meanwhile", "meanwhile")
    assert where(container) == "before"


def test_how_a_connection_is_used_stays_as_it_is(place: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__HOST", "not.read.again")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__DRIVER", "postgresql")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__USER", "shop")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__PASSWORD_PROVIDER", "os:getlogin")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__CONNECT_ARGS", '{"keepalives": 1}')
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__POOL__SIZE", "3")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__POOL__CLASS", "queue")
    monkeypatch.setenv("APP_DB_CONNECTIONS__READER__MIRROR", "writer")
    monkeypatch.setenv("APP_DB_CONNECTIONS__READER__READ_ONLY", "true")
    monkeypatch.setenv("APP_DB_APPLICATION", "shop")
    container = Container()
    with overridden(container, {"writer": "postgresql://other/shop"}) as given:
        writer = given.connection("writer")
        assert writer.masked_url == "postgresql+psycopg://other/shop"
        assert (writer.password_provider, writer.connect_args) == ("os:getlogin", {"keepalives": 1})
        assert (writer.pool.size, writer.pool.class_, given.application) == (3, "queue", "shop")
    with overridden(container, {"writer": "postgresql://app:word@other/shop"}) as given:
        assert given.connection("writer").password_provider is None, "the password is in the URL"
    with overridden(container, {"writer": place("a"), "reader": place("b")}) as given:
        writer = given.connection("writer")
        assert (writer.connect_args, writer.password_provider) == ({}, None), "they are another driver's words"
        assert (where(container), where(container, "reader")) == ("a", "b")
        assert given.connection("reader").read_only
    assert container.settings().connection("reader").sqlalchemy_url().host == "not.read.again"


def test_a_reader_that_nobody_configured_can_have_a_url_of_its_own(container: Container, place: Callable[[str], str]) -> None:
    with overridden(container, {"reader": place("replica")}) as given:
        assert (where(container), where(container, "reader")) == ("before", "replica")
        assert given.connection("reader").read_only


def test_a_mapping_is_enough_where_nothing_is_configured(place: Callable[[str], str]) -> None:
    container = Container()
    with overridden(container, {"writer": place("given")}):
        assert where(container) == "given"
    with pytest.raises(SettingsError):
        container.settings()


def test_what_is_wrong_with_a_mapping_is_said_at_once_without_passwords(container: Container) -> None:
    before = everything(container)
    wrong = {"wrter": NOWHERE, "reader": "postgresql//u:hunter2@x", "writer": "nonsense://u:hunter2@x"}
    with pytest.raises(SettingsError) as caught, overridden(container, wrong):
        pass
    assert [problem.variable for problem in caught.value.problems] == [
        "APP_DB_CONNECTIONS__WRTER__URL",
        "APP_DB_CONNECTIONS__READER__URL",
    ]
    assert "Did you mean 'writer'? There are: 'reader', 'writer'" in str(caught.value)
    with pytest.raises(SettingsError, match=r"APP_DB_CONNECTIONS__WRITER__URL: names a dialect") as unknown:
        overridden(container, {"writer": wrong["writer"]}).__enter__()
    assert "hunter2" not in f"{caught.value} {unknown.value}"
    assert everything(container) == before


# ---- throw-away databases --------------------------------------------------------------------------------------------


class Everything(DatabaseContainer):
    writer = Connection()
    reader = Connection()
    warehouse = Connection()
    replica = Connection()
    audit_log = Connection()
    copy = Connection()


PRODUCTION: dict[str, Any] = {
    "writer": {
        "url": "postgresql://shop@db/shop",
        "two_phase": True,
        "isolation_level": "REPEATABLE READ",
        "connect_args": {"sslmode": "require"},
        "pool": {"size": 7, "class": "queue", "recycle": 60},
        "session": {"expire_on_commit": False},
    },
    "reader": {"url": "postgresql+asyncpg://shop@replica/shop", "read_only": True, "isolation_level": "AUTOCOMMIT"},
    "warehouse": {"url": "mysql://shop@warehouse/facts", "two_phase": True, "statement_timeout": 2.5},
    "replica": {"url": "mysql://other@warehouse/facts", "read_only": True},
    "audit_log": {"url": "postgresql://shop@db/shop", "transactional": False, "password_provider": "os:getlogin"},
    "copy": {"mirror": "warehouse", "read_only": True},
}


def test_every_connection_gets_a_throw_away_database_and_is_used_as_before() -> None:
    container = Everything(
        settings=DatabaseSettings(connections=PRODUCTION, decision_log="file:/not/there", recover_at_start=True)
    )
    with sqlite(container) as given:
        files = {name: Path(given.connection(name).sqlalchemy_url().database or "") for name in PRODUCTION}
        directory = files["writer"].parent
        with container.transaction():
            for name in ("writer", "warehouse", "audit_log"):
                container.providers[f"{name}_session"]().execute(text("CREATE TABLE t (id INTEGER)"))
                container.providers[f"{name}_session"]().execute(text("INSERT INTO t VALUES (1)"))
        for name in PRODUCTION:
            with container.transaction():
                assert container.providers[f"{name}_session"]().scalar(text("SELECT id FROM t")) == 1, name
        for name in ("reader", "replica", "copy"):
            with pytest.raises(ReadOnlyViolation), container.transaction():
                container.providers[f"{name}_session"]().execute(text("DELETE FROM t"))
        with pytest.raises(LookupError), container.transaction():
            container.audit_log_session().execute(text("INSERT INTO t VALUES (2)"))
            raise LookupError
        with container.transaction():
            assert container.audit_log_session().scalar(text("SELECT count(*) FROM t")) == 2, "it is autonomous"
        assert {file.name for file in files.values()} == {"writer.db", "warehouse.db", "audit_log.db"}
        assert files["reader"] == files["writer"]
        assert files["copy"] == files["replica"] == files["warehouse"]
        writer = given.connection("writer")
        assert (writer.pool.size, writer.pool.class_, writer.session.expire_on_commit) == (7, None, False)
        assert given.connection("warehouse").statement_timeout == 2.5
        assert (given.atomicity, given.decision_log) == ("best_effort", None)
    assert not directory.exists()
    assert container.settings().atomicity == "strict"


def test_throw_away_databases_keep_atomicity_strict_where_it_is_for_single_databases() -> None:
    container = Container(settings=settings_for(writer=NOWHERE))
    with sqlite(container) as given:
        assert given.atomicity == "strict"


def test_throw_away_databases_need_no_settings() -> None:
    container = Everything()
    with sqlite(container) as given, container.transaction():
        container.writer_session().execute(text("CREATE TABLE t (id INTEGER)"))
        assert given.connection("reader").sqlalchemy_url() == given.connection("writer").sqlalchemy_url()


def test_coroutines_use_throw_away_databases_too() -> None:
    container = Container(settings=settings_for(writer=NOWHERE.replace("psycopg", "asyncpg")))

    async def main() -> Path:
        async with sqlite(container) as given:
            async with container.transaction():
                await container.writer_async_session().execute(text("CREATE TABLE t (id INTEGER)"))
            with container.transaction():
                assert container.writer_session().scalar(text("SELECT count(*) FROM t")) == 0
            return Path(given.connection("writer").sqlalchemy_url().database or "").parent

    assert not asyncio.run(main()).exists()


def test_a_throw_away_database_is_removed_after_an_error_too() -> None:
    container = Container(settings=settings_for(writer=NOWHERE))
    with pytest.raises(LookupError) as caught, sqlite(container) as given:
        raise LookupError(given.connection("writer").sqlalchemy_url().database)
    assert not Path(str(caught.value)).parent.exists()


class Facts(DeclarativeBase):
    metadata = metadata_of("facts")


class Fact(Facts):
    __tablename__ = "testing_facts"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.parametrize("read_only", [False, True])
def test_throw_away_databases_have_the_tables_of_the_models(read_only: bool) -> None:
    settings = settings_for(facts={"url": NOWHERE, "read_only": read_only})
    container = container_of("facts")(settings=settings)
    with sqlite(container), container.transaction():
        assert container.providers["facts_session"]().query(Fact).count() == 0


# ---- what a test has left ---------------------------------------------------------------------------------------------


@pytest.fixture
def facts(new_database_url: Callable[[], str]) -> Iterator[DatabaseContainer]:
    container = container_of("facts")(settings=settings_for(facts=new_database_url()))
    yield container
    container.shutdown_resources()


def add_fact(container: DatabaseContainer) -> None:
    with container.transaction():
        container.providers["facts_session"]().add(Fact())


def test_rows_that_were_committed_are_told_by_table_and_deleted_where_the_tables_are_the_tests_own(
    facts: DatabaseContainer,
) -> None:
    with made_tables(facts) as own:
        assert own == {"facts"}
        counts = RowCounts(facts)
        assert counts.differences() == []
        add_fact(facts)
        told = "the table 'testing_facts' of 'facts' has 1 row more than before, committed outside the isolation"
        assert counts.differences() == [told]
        after = RowCounts(facts)
        assert counts.differences(own) == [f"{told} (deleted again)"]
        assert counts.differences(own) == []
        assert after.differences(own) == [told.replace("more", "fewer")], "there were rows before, which nobody can give back"
        with isolated(facts):
            add_fact(facts)
            inside = RowCounts(facts)
            add_fact(facts)
            assert inside.differences(own) == []
        assert RowCounts(facts, ["facts"]).differences() == counts.differences() == []


def test_tables_that_were_there_are_not_dropped(facts: DatabaseContainer) -> None:
    facts.create_all()
    with made_tables(facts) as own:
        assert own == frozenset()
    add_fact(facts)


@pytest.mark.exhaustive
def test_a_lock_that_a_test_has_left_is_told_and_not_waited_for(new_postgres_url: Callable[[], str]) -> None:
    container = container_of("facts")(settings=settings_for(facts=new_postgres_url()))
    container.create_all()
    counts = RowCounts(container)
    with container.providers["facts_engine"]().connect() as connection:
        connection.execute(text("LOCK TABLE testing_facts IN ACCESS EXCLUSIVE MODE"))
        (told,) = counts.differences()
    assert told.startswith("the rows of 'facts' can't be counted any more: LockNotAvailable")
    assert counts.differences() == []
    container.shutdown_resources()


# ---- databases of a worker ---------------------------------------------------------------------------------------------


def test_a_worker_has_databases_of_its_own_which_connections_that_read_them_follow(new_database_url: Callable[[], str]) -> None:
    url = new_database_url()
    connections: dict[str, Any] = {
        "writer": url,
        "audit": {"url": url, "transactional": False},
        "a_replica": {"url": url, "read_only": True},
        "mirror": {"mirror": "writer", "read_only": True},
        "elsewhere": {"url": NOWHERE, "read_only": True},
        "memory": "sqlite://",
        "not_declared": NOWHERE,
    }
    container = container_of(*(name for name in connections if name != "not_declared"))(settings=settings_for(**connections))
    before = {name: container.settings().connection(name).sqlalchemy_url() for name in connections}
    with worker_databases(container, "gw7") as given:
        after = {name: given.connection(name).sqlalchemy_url() for name in connections}
        with container.transaction():
            container.providers["writer_session"]().execute(text("CREATE TABLE t (id INTEGER)"))
        for name in ("audit", "a_replica", "mirror"):
            with container.transaction():
                assert container.providers[f"{name}_session"]().scalar(text("SELECT count(*) FROM t")) == 0
        assert given.connection("a_replica").read_only
        assert not given.connection("audit").transactional
    for name in ("elsewhere", "memory", "not_declared"):
        assert after[name] == before[name]
    own = str(after["writer"].database)
    assert Path(own).name.replace("_gw7", "") == Path(str(before["writer"].database)).name
    with pytest.raises(DBAPIError), create_engine(after["writer"], poolclass=NullPool).connect() as connection:
        connection.execute(text("SELECT count(*) FROM t"))  # SQLite makes the file again, empty


WORKER_KILLED = """
import os, signal
from app_db import DatabaseSettings, container_of
from app_db.testing import worker_databases
container = container_of("writer")(settings=DatabaseSettings(connections={{"writer": {{"url": {url!r}}}}}))
with worker_databases(container, "gw7"), container.transaction():
    container.writer_session().connection().exec_driver_sql("CREATE TABLE left_over (id INTEGER)")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.exhaustive
def test_a_workers_database_that_a_killed_run_has_left_is_made_anew(
    postgres: PostgresServer, new_postgres_url: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = new_postgres_url()
    name = url.rpartition("/")[2]
    subprocess.run([sys.executable, "-c", WORKER_KILLED.format(url=url)], check=False, timeout=60)
    assert is_there(postgres, f"{name}_gw7")
    container = container_of("writer")(settings=settings_for(writer=url))
    kept = []
    with worker_databases(container, "gw7"):
        (told,) = [record.getMessage() for record in caplog.records]
        assert told.startswith(f"the database '{name}_gw7' was made anew: the run that made it was killed (process ")
        with container.transaction():
            assert container.writer_session().scalar(text("SELECT to_regclass('left_over')")) is None
        other = create_engine(postgres.url(f"{name}_gw7"))
        kept.append(other.connect())  # whoever is still there does not keep it
    assert not is_there(postgres, f"{name}_gw7")
    kept[0].invalidate()
    kept[0].close()
    other.dispose()


def test_a_workers_database_that_no_test_run_has_made_is_used_and_left(postgres: PostgresServer, new_postgres_url: Any) -> None:
    url = new_postgres_url()
    name = url.rpartition("/")[2]
    postgres.execute(f"CREATE DATABASE {name}_gw7")
    try:
        container = container_of("writer")(settings=settings_for(writer=url))
        with worker_databases(container, "gw7"):
            assert container.writer_engine().url.database == f"{name}_gw7"
        assert is_there(postgres, f"{name}_gw7")
    finally:
        postgres.execute(f"DROP DATABASE {name}_gw7")


def is_there(postgres: PostgresServer, name: str) -> bool:
    return postgres.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]) != []


@pytest.mark.exhaustive
def test_a_workers_database_that_another_run_uses_is_refused(new_postgres_url: Any) -> None:
    settings = settings_for(writer=new_postgres_url())
    with worker_databases(container_of("writer")(settings=settings), "gw7"):
        source = WORKER_KILLED.format(url=settings.connection("writer").sqlalchemy_url().render_as_string(hide_password=False))
        done = subprocess.run([sys.executable, "-c", source], check=False, timeout=60, capture_output=True, text=True)
    assert "CannotMakeDatabase" in done.stderr
    assert f"another test run uses it: process {os.getpid()} on" in done.stderr


def test_a_server_that_is_not_there_is_said_without_a_password() -> None:
    container = container_of("writer")(settings=settings_for(writer=NOWHERE))
    before = container.settings()
    with pytest.raises(CannotMakeDatabase) as caught, worker_databases(container, "gw7"):
        pass
    assert (caught.value.connection, caught.value.database) == ("writer", "nothing_gw7")
    assert "hunter2" not in str(caught.value)
    assert container.settings() is before


# ---- hooks that are only noted ---------------------------------------------------------------------------------------


def send(*args: Any, **kwargs: Any) -> None:
    sent.append((args, kwargs))


sent: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_sent() -> None:
    sent.clear()


def test_hooks_are_noted_in_order_and_not_run(container: Container) -> None:
    with captured_hooks(container) as hooks:
        with container.transaction() as unit:
            unit.on_commit(send, "A-1", to="x@example.org")
            unit.on_commit(send)
            assert hooks == []
        with container.transaction() as unit:
            unit.on_commit(send, 2)
    assert hooks == [CapturedHook(send, "A-1", to="x@example.org"), CapturedHook(send), CapturedHook(send, 2)]
    assert repr(hooks) == "[send('A-1', to='x@example.org'), send(), send(2)]"
    assert (hooks[0].function, hooks[0].args, hooks[0].kwargs) == (send, ("A-1",), {"to": "x@example.org"})
    assert hooks[0] != hooks[1]
    assert sent == []
    with container.transaction() as unit:
        unit.on_commit(send, "after the block")
    assert sent == [(("after the block",), {})]


def test_hooks_of_what_was_undone_are_not_noted(container: Container) -> None:
    with captured_hooks(container) as hooks:
        with pytest.raises(LookupError), container.transaction() as unit:
            unit.on_commit(send, "aborted")
            raise LookupError
        with container.transaction() as unit:
            unit.on_commit(send, "kept")
            with pytest.raises(LookupError), container.transaction(propagation="nested") as inner:
                inner.on_commit(send, "rolled back")
                raise LookupError
            unit.on_abort(send, "aborted")
    assert hooks == [CapturedHook(send, "kept")]


def test_other_hooks_run_as_ever(container: Container) -> None:
    with captured_hooks(container):
        with container.transaction() as unit:
            unit.before_commit(send, "before")
        with pytest.raises(LookupError), container.transaction() as unit:
            unit.on_abort(send, "aborted")
            raise LookupError
    assert sent == [(("before",), {}), (("aborted",), {})]


def test_noted_hooks_are_run_once_with_those_of_the_units_that_they_begin(container: Container) -> None:
    def begin_another() -> None:
        with container.transaction() as unit:
            unit.on_commit(send, "inner")

    with captured_hooks(container) as hooks:
        with container.transaction() as unit:
            unit.on_commit(begin_another)
            unit.on_commit(send, "outer")
        hooks.run()
        assert hooks == []
    assert sent == [(("outer",), {}), (("inner",), {})]


def test_all_noted_hooks_run_whatever_one_raises(container: Container) -> None:
    with captured_hooks(container) as hooks, container.transaction() as unit:
        unit.on_commit(int, "no number")
        unit.on_commit(send, "still")
    with pytest.raises(HookFailed, match="no number"):
        hooks.run()
    assert sent == [(("still",), {})]


async def test_noted_coroutine_hooks_are_awaited(container: Container) -> None:
    async def later(what: str) -> None:
        await asyncio.sleep(0)
        send(what)

    with captured_hooks(container) as hooks:
        async with container.transaction() as unit:
            unit.on_commit(later, "coroutine")
            unit.on_commit(send, "function")
    assert hooks == [CapturedHook(later, "coroutine"), CapturedHook(send, "function")]
    with pytest.raises(AwaitRequired, match="run_awaited"):
        hooks.run()
    assert len(hooks) == 2, "nothing was run"
    await hooks.run_awaited()
    assert sent == [(("coroutine",), {}), (("function",), {})]
    await container.shutdown_resources()


def test_noted_hooks_nest_and_are_the_containers_in_all_threads(container: Container) -> None:
    def in_a_thread() -> None:
        with container.transaction() as unit:
            unit.on_commit(partial(send, "thread"))

    with captured_hooks(container) as outer:
        with captured_hooks(container) as inner:
            thread = threading.Thread(target=in_a_thread)
            thread.start()
            thread.join()
        in_a_thread()
    assert inner == outer == [CapturedHook(send, "thread")]


def test_what_compares_with_a_noted_hook_may_be_anything() -> None:
    hook = CapturedHook(send, [1])
    assert hook != "send([1])"
    assert hook == CapturedHook(send, [1])
    assert repr(CapturedHook(partial(int, base=2), "1")).endswith("('1')")
    assert providers.Object(hook)() is hook
