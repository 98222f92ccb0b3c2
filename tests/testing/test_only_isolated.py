"""In a block of `only_isolated`, a connection of the container is refused where a test is not isolated."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, StaticPool, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from app_db import Connection, Container, DatabaseContainer, DatabaseSettings
from app_db._databases.pools import guards
from app_db.errors import NotIsolated, UnitOfWorkDoomed
from app_db.testing import RowCounts, isolated, made_tables, only_isolated, overridden, sqlite
from harness.applications import Application, running

HERE = "test_only_isolated.py"


@pytest.fixture
def app(new_database_url: Callable[[], str]) -> Iterator[Application]:
    """A writer with its reader, a warehouse, and a log whose writes survive an abort."""
    with running(
        atomicity="best_effort",
        writer=new_database_url(),
        reader={"mirror": "writer", "read_only": True},
        warehouse=new_database_url(),
        log={"url": new_database_url(), "transactional": False},
    ) as application:
        yield application
        assert guards == []
        for name in ("writer", "warehouse", "log"):
            assert application.names(name) == [], f"rows were left in {name}"


@pytest.fixture
def small(sqlite_url: str) -> Iterator[Application]:
    """A writer in a file of SQLite."""
    with running(writer=sqlite_url) as application:
        yield application
        assert guards == []


def write(app: Application, name: str = "writer") -> None:
    with app.unit():
        app.session(name).add(app.item(name="a"))


def connect(app: Application, name: str = "writer") -> None:
    with app.engine(name).connect() as connection:
        connection.execute(text("SELECT 1"))


def by_sessionmaker(app: Application) -> None:
    with app.container.writer_sessionmaker()() as session:
        session.execute(text("SELECT 1"))


USES: dict[str, tuple[str, Callable[[Application], object]]] = {
    "a session": ("writer", write),
    "a read-only session": ("reader", lambda app: app.unit().run(lambda: app.session("reader").execute(text("SELECT 1")))),
    "an autonomous session": ("log", lambda app: write(app, "log")),
    "an engine": ("warehouse", lambda app: connect(app, "warehouse")),
    "a sessionmaker": ("writer", by_sessionmaker),
    "a connection of the driver": ("writer", lambda app: app.engine("writer").raw_connection().close()),
    "an engine with options": (
        "writer",
        lambda app: app.engine("writer").execution_options(isolation_level="AUTOCOMMIT").connect().close(),
    ),
}


@pytest.mark.representative("sqlite-*", "*-a session")
@pytest.mark.parametrize("use", USES)
def test_a_use_raises_where_it_is_and_nothing_is_done(app: Application, use: str) -> None:
    name, function = USES[use]
    with only_isolated(app.container) as block:
        with pytest.raises(NotIsolated) as caught:
            function(app)
        assert caught.value.connection == name
        assert caught.value in block.uses
        assert HERE in str(caught.value.used_at)
        assert f"The connection {name!r} was used without isolation (at " in str(caught.value)
        assert "mark it with @pytest.mark.app_db, or put `isolated(container)` around it" in str(caught.value)
        block.uses.clear()
    function(app)  # afterwards all is as before
    app.run("DELETE FROM items", on="writer")
    app.run("DELETE FROM items", on="log")


def test_the_line_is_the_applications(small: Application) -> None:
    def place_order() -> None:
        write(small)

    with only_isolated(small.container) as block:
        with pytest.raises(NotIsolated) as caught:
            place_order()
        block.uses.clear()
    assert str(caught.value.used_at).endswith("in write")


def test_the_function_of_the_unit_is_named(small: Application) -> None:
    """Its session writes when it has returned, so that it is in no traceback."""

    def place_order() -> None:
        small.session().add(small.item(name="a"))

    with only_isolated(small.container) as block:
        with pytest.raises(NotIsolated) as caught:
            small.unit().run(place_order)
        block.uses.clear()
        with pytest.raises(NotIsolated) as later:
            connect(small)
        block.uses.clear()
    at, unit = str(caught.value.used_at).split(", in a unit of work of ")
    assert at.endswith("in test_the_function_of_the_unit_is_named")
    assert unit.endswith("in test_the_function_of_the_unit_is_named.<locals>.place_order")
    assert str(later.value.used_at).endswith("in connect")


@pytest.mark.representative("sqlite")
def test_what_is_isolated_is_not_refused(app: Application) -> None:
    with only_isolated(app.container) as block, isolated(app.container) as isolation:
        for name in ("writer", "warehouse", "log"):
            write(app, name)
            connect(app, name)
        connect(app, "reader")
        app.container.writer_sessionmaker()().close()
        with isolation.session("writer") as session:
            assert session.scalar(text("SELECT count(*) FROM items")) == 1
        assert block.uses == []


def test_an_error_that_the_application_caught_is_raised_at_the_end(small: Application) -> None:
    said = r"connection 'writer' was used without isolation .*in write\)"
    with pytest.raises(NotIsolated, match=said) as caught, only_isolated(small.container):
        with suppress(Exception):
            write(small)
        with suppress(Exception):
            connect(small)
    (note,) = caught.value.__notes__
    assert "in connect)" in note


def test_another_error_gets_it_as_a_note(small: Application) -> None:
    with pytest.raises(LookupError) as caught, only_isolated(small.container):
        with suppress(Exception):
            write(small)
        raise LookupError
    (note,) = caught.value.__notes__
    assert note.startswith("app_db: The connection 'writer' was used without isolation")


@pytest.mark.parametrize("wrap", ["from", "context", "group"])
def test_an_error_that_was_wrapped_is_said_once(small: Application, wrap: str) -> None:
    with pytest.raises(Exception) as caught, only_isolated(small.container):
        try:
            write(small)
        except NotIsolated as error:
            if wrap == "from":
                raise LookupError from error
            if wrap == "group":
                raise ExceptionGroup("several", [error]) from None
            raise LookupError  # noqa: B904
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.representative("sqlite")
def test_threads_and_coroutines_are_refused(app: Application) -> None:
    async def unit() -> None:
        async with app.unit():
            await app.container.warehouse_async_session().execute(text("SELECT 1"))

    async def engine() -> None:
        async with app.container.writer_async_engine().connect():
            pass

    async def coroutines() -> None:
        with pytest.raises(NotIsolated, match=r"'warehouse' .* in test_threads_and_coroutines_are_refused\.<locals>\.unit"):
            await unit()
        with pytest.raises(NotIsolated, match=r"'writer' .* in test_threads_and_coroutines_are_refused\.<locals>\.engine"):
            await engine()
        await app.container.shutdown_resources()  # the engines are this loop's

    with only_isolated(app.container) as block:
        with ThreadPoolExecutor(1, "pool") as threads, pytest.raises(NotIsolated, match=r"in write, by the thread 'pool_0'"):
            threads.submit(write, app).result()
        asyncio.run(coroutines())
        assert [use.connection for use in block.uses] == ["writer", "warehouse", "writer"]
        block.uses.clear()


def test_the_error_of_a_thread_is_raised_at_the_end(small: Application) -> None:
    def work() -> None:
        with suppress(NotIsolated):
            write(small)

    with pytest.raises(NotIsolated, match="by the thread 'worker'"), only_isolated(small.container):
        thread = threading.Thread(target=work, name="worker")
        thread.start()
        thread.join()


def test_an_engine_from_before_the_isolation_is_named(small: Application) -> None:
    engine = small.engine("writer")
    with only_isolated(small.container) as block, isolated(small.container):
        with pytest.raises(NotIsolated, match=r"taken from the container before\. Ask .*`container\.writer\.engine\(\)`"):
            engine.connect()
        block.uses.clear()


def test_a_connection_that_is_left_out_of_the_isolation_is_named(app: Application) -> None:
    with only_isolated(app.container) as block, isolated(app.container, ["writer"]):
        write(app)
        with pytest.raises(NotIsolated, match="'warehouse' is not among the connections"):
            write(app, "warehouse")
        block.uses.clear()


def test_connections_can_be_left_out_of_the_guard(app: Application) -> None:
    with only_isolated(app.container, ["warehouse"]):
        connect(app)


def test_a_database_that_is_never_written_is_free(sqlite_url: str) -> None:
    create_engine(sqlite_url, poolclass=NullPool).connect().close()
    with running(writer=sqlite_url, facts={"url": sqlite_url.replace(".db", "2.db")}) as app:
        settings = DatabaseSettings(
            _env_file=None,
            connections={"writer": {"url": sqlite_url}, "facts": {"url": sqlite_url.replace(".db", "2.db"), "read_only": True}},
        )
        with overridden(app.container, settings), only_isolated(app.container) as block:
            connect(app, "facts")
            with pytest.raises(NotIsolated):
                connect(app, "writer")
            block.uses.clear()


def test_the_parts_of_testing_may_use_the_databases(small: Application) -> None:
    with only_isolated(small.container), made_tables(small.container):
        RowCounts(small.container)


def test_other_settings_in_the_block_are_free_and_those_around_it_are_not(small: Application) -> None:
    with only_isolated(small.container):
        with sqlite(small.container):
            small.container.create_all()
            connect(small)
        with overridden(small.container, {"writer": "sqlite://"}):
            connect(small)
    with sqlite(small.container), only_isolated(small.container) as block:
        with pytest.raises(NotIsolated):
            connect(small)
        block.uses.clear()


def test_a_pause_lets_others_use_the_databases(small: Application) -> None:
    with only_isolated(small.container) as block:
        with block.paused(), block.paused():
            connect(small)
        with pytest.raises(NotIsolated):
            connect(small)
        block.uses.clear()


def test_without_refusing_it_notes_what_was_used_and_counts_rows_before(small: Application) -> None:
    with only_isolated(small.container, refuse=False) as block:
        assert block.rows is None
        write(small)
    (use,) = block.uses
    assert (use.connection, str(use.used_at).rpartition(" in ")[2]) == ("writer", "write")
    assert block.rows is not None


def test_a_second_container_is_its_own_affair(small: Application, new_sqlite_url: Callable[[], str]) -> None:
    with running(writer=new_sqlite_url()) as other, only_isolated(small.container):
        write(other)


def test_a_unit_that_swallowed_it_writes_nothing(app: Application) -> None:
    """The unit could not use one of its connections, so it must not commit the others in silence."""
    with pytest.raises((NotIsolated, UnitOfWorkDoomed)), only_isolated(app.container, ["warehouse"]), app.unit():
        app.session("writer").add(app.item(name="a"))
        app.session("writer").flush()
        app.session("warehouse").add(app.item(name="a"))


@pytest.mark.parametrize("nested", [False, True])
def test_an_engine_of_the_applications_own_is_guarded_and_keeps_its_rows(nested: bool) -> None:
    """Its pool would close a connection that was refused after it was given, and an SQLite in memory with it."""
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})

    class Own(DatabaseContainer):
        writer: Connection[Any, Any] = Connection(engine=engine)

    container = Own()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE numbers (number INTEGER)"))
    with only_isolated(container) as outer:
        if nested:
            with only_isolated(container) as inner:
                with pytest.raises(NotIsolated):
                    engine.connect()
                inner.uses.clear()
        with pytest.raises(NotIsolated):
            engine.connect()
        with isolated(container), container.writer.engine().connect() as connection:
            connection.execute(text("INSERT INTO numbers VALUES (1)"))
        outer.uses.clear()
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM numbers")) == 0
    assert "connect" not in vars(engine.pool)


def test_an_async_engine_of_the_applications_own_is_guarded(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'own.db'}", poolclass=NullPool)

    class Own(DatabaseContainer):
        writer: Connection[Any, Any] = Connection(engine=engine)

    async def use() -> None:
        async with engine.connect():
            pass

    with only_isolated(Own()) as block:
        with pytest.raises(NotIsolated, match=r"in test_an_async_engine\w+\.<locals>\.use"):
            asyncio.run(use())
        block.uses.clear()
    asyncio.run(use())


def test_wrong_settings_are_said_by_their_first_use_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITR__URL", "sqlite://")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__POOL__SIZ", "1")
    with only_isolated(Container()):
        pass
