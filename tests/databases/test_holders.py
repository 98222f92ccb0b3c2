"""Who holds a connection: in the error of a full pool, in `container.pools()`, and in the log."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dependency_injector.wiring import Provide
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app_db import Connection, Container, DatabaseContainer, DatabaseSettings, transactional
from app_db.errors import SettingsError, UnitOfWorkTimeout
from harness.applications import Application, running

SMALL = {"size": 2, "max_overflow": 0, "timeout": 0.3}


@pytest.fixture
def app(new_sqlite_url: Callable[[], str]) -> Iterator[Application]:
    with running(writer={"url": new_sqlite_url(), "pool": SMALL}) as app:
        yield app


def line_here() -> int:
    """Return the number of the line that calls this."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def owner_in(line: str) -> str:
    return line.partition(" by ")[2]


# ---- what is known -----------------------------------------------------------------------------------------------------------


def test_a_holder_knows_its_unit_and_the_lines_that_began_it_and_took_the_connection(app: Application) -> None:
    begun = line_here() + 1
    with app.unit() as unit:
        app.session().connection(), (taken := line_here())
        [holder] = app.container.pools()["writer"].holders
        assert (holder.connection, holder.unit, holder.owner) == ("writer", unit.number, "thread 'MainThread'")
        assert holder.begun_at is not None
        assert holder.begun_at.endswith(f"test_holders.py:{begun} in {inspect.stack()[0].function}")
        assert holder.taken_at is not None
        assert holder.taken_at.endswith(f"test_holders.py:{taken} in {inspect.stack()[0].function}")
        assert str(holder).startswith("'writer' for 0.0 s by thread 'MainThread', unit ")
        assert holder.stack is None
    assert app.container.pools()["writer"].holders == ()


class Shop(DatabaseContainer):
    writer = Connection()


@transactional
def place_order(
    seen: list[Any], session: Session = Provide[Shop.writer_session], pools: Any = Provide[Shop.pools.provider]
) -> None:
    session.execute(text("SELECT 1"))
    seen += pools()["writer"].holders


@transactional
async def await_order(
    seen: list[Any], session: AsyncSession = Provide[Shop.writer_async_session], pools: Any = Provide[Shop.pools.provider]
) -> None:
    await session.execute(text("SELECT 1"))
    seen += pools()["writer"].holders


@pytest.fixture
def shop(new_sqlite_url: Callable[[], str]) -> Iterator[Shop]:
    shop = Shop(settings=DatabaseSettings(connections={"writer": {"url": new_sqlite_url()}}))
    shop.wire(modules=[__name__])
    yield shop
    shop.unwire()
    shop.shutdown_resources()


def test_a_unit_of_a_function_is_named_after_the_function(shop: Shop) -> None:
    seen: list[Any] = []
    place_order(seen)
    assert "test_holders.py" in seen[0].begun_at
    assert seen[0].begun_at.endswith(" in place_order")
    assert seen[0].taken_at.endswith(" in place_order")


def test_a_coroutine_is_found_above_the_greenlet_that_waits_for_the_driver(shop: Shop) -> None:
    seen: list[Any] = []

    async def main() -> None:
        await await_order(seen)
        await shop.shutdown_resources()

    asyncio.run(main())
    assert seen[0].begun_at.endswith(" in await_order")
    assert seen[0].taken_at.endswith(" in await_order")
    assert seen[0].owner.startswith("task 'Task-")


def test_a_connection_outside_of_units_knows_its_line(app: Application) -> None:
    with app.engine().connect():
        [holder] = app.container.pools()["writer"].holders
    assert holder.unit is None
    assert holder.begun_at is None
    assert holder.taken_at is not None
    assert holder.taken_at.endswith(" in test_a_connection_outside_of_units_knows_its_line")
    assert "no unit of work" in str(holder)


def test_the_whole_stack_is_kept_on_request(new_sqlite_url: Callable[[], str]) -> None:
    with running(writer={"url": new_sqlite_url(), "pool": {"stacks": True}}) as app, app.unit():
        app.session().connection()
        [holder] = app.container.pools()["writer"].holders
    assert holder.stack is not None
    assert "app.session().connection()" in holder.stack


def test_a_pool_tells_how_full_it_is(app: Application) -> None:
    app.container.reset_singletons()
    assert (app.container.pools()["writer"].most, app.container.pools()["writer"].is_full) == (0, False), "nothing has connected"
    with app.engine().connect(), app.engine().connect():
        state = app.container.pools()["writer"]
        assert (state.in_use, state.idle, state.is_full) == (2, 0, True)
    assert (app.container.pools()["writer"].in_use, app.container.pools()["writer"].idle) == (0, 2)
    assert str(state).count("\n") == 2


def test_an_engine_of_the_applications_own_counts_and_knows_no_holders(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)

    class Own(DatabaseContainer):
        writer = Connection(engine=engine)

    container = Own()
    with engine.connect():
        state = container.pools()["writer"]
        assert (state.in_use, state.holders) == (1, ())
    container.shutdown_resources()
    engine.dispose()


def test_a_unit_that_is_dropped_gives_its_connection_back(app: Application) -> None:
    """What is noted of it must not keep it."""

    def begin_and_forget() -> None:
        block = app.unit()
        block.__enter__()
        app.session().connection()

    begin_and_forget()
    gc.collect()
    assert app.container.pools()["writer"].holders == ()


# ---- the error of a full pool --------------------------------------------------------------------------------------------------


def test_threads_that_wait_in_vain_are_told_who_holds_the_connections(new_postgres_url: Callable[[], str]) -> None:
    both_hold, is_told = threading.Barrier(3), threading.Event()

    def hold(app: Application) -> None:
        with app.unit():
            app.session().connection()
            both_hold.wait(20)
            is_told.wait(20)

    with running(writer={"url": new_postgres_url(), "pool": SMALL}) as app, ThreadPoolExecutor(2, "holder") as threads:
        holding = [threads.submit(hold, app) for _ in range(2)]
        both_hold.wait(20)
        try:
            with pytest.raises(PoolTimeout) as caught, app.unit():
                app.session().connection()
            with pytest.raises(UnitOfWorkTimeout) as in_time, app.unit(timeout=0.1):
                app.session().connection()
        finally:
            is_told.set()
        [done.result() for done in holding]
    for error in (caught.value, in_time.value):
        lines = notes_of(error).splitlines()
        assert lines[0].endswith("They are held by:")
        assert len(lines) == 3
        for number, line in enumerate(sorted(lines[1:], key=owner_in)):
            assert f"by thread 'holder_{number}', unit " in line
            assert "in test_threads_that_wait_in_vain_are_told_who_holds_the_connections.<locals>.hold" in line


def test_tasks_that_wait_in_vain_are_told_who_holds_the_connections(new_postgres_url: Callable[[], str]) -> None:
    url = new_postgres_url().replace("+psycopg", "+asyncpg")

    async def hold(app: Application, holds: asyncio.Event, is_told: asyncio.Event) -> None:
        async with app.unit():
            await app.container.writer_async_session().connection()
            holds.set()
            await is_told.wait()

    async def main(app: Application) -> BaseException:
        is_told, events = asyncio.Event(), [asyncio.Event(), asyncio.Event()]
        tasks = [asyncio.create_task(hold(app, event, is_told), name=f"holder {n}") for n, event in enumerate(events)]
        for event in events:
            await event.wait()
        with pytest.raises(PoolTimeout) as caught:
            async with app.unit():
                await app.container.writer_async_session().connection()
        is_told.set()
        await asyncio.gather(*tasks)
        await app.container.shutdown_resources()
        return caught.value

    with running(writer={"url": url, "pool": SMALL}) as app:
        lines = notes_of(asyncio.run(main(app))).splitlines()
    assert len(lines) == 3
    for number, line in enumerate(sorted(lines[1:], key=owner_in)):
        assert f"by task 'holder {number}', unit " in line
        assert "in test_tasks_that_wait_in_vain_are_told_who_holds_the_connections.<locals>.hold" in line


def test_only_the_longest_are_named_of_many(new_sqlite_url: Callable[[], str]) -> None:
    with running(writer={"url": new_sqlite_url(), "pool": {**SMALL, "size": 10}}) as app:
        held = [app.engine().connect() for _ in range(10)]
        with pytest.raises(PoolTimeout) as caught:
            app.engine().connect()
        for connection in held:
            connection.close()
    assert notes_of(caught.value).endswith("\n  and 2 more")


def test_holders_are_named_although_the_working_directory_is_gone(
    app: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with app.engine().connect(), app.engine().connect(), pytest.raises(PoolTimeout) as caught:
        app.engine().connect()
    assert notes_of(caught.value).count(f"taken at {__file__}:") == 2


# ---- logs --------------------------------------------------------------------------------------------------------------------


@contextmanager
def records(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], list[logging.LogRecord]]]:
    with caplog.at_level(logging.WARNING, "app_db"):
        yield lambda start: [record for record in caplog.records if record.getMessage().startswith(start)]


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, "it did not come"
        time.sleep(0.01)


def test_a_connection_that_is_held_too_long_is_logged_once_and_when_it_comes_back(
    new_sqlite_url: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    with running(writer={"url": new_sqlite_url(), "held_warning": 0.05}) as app, records(caplog) as logged:
        with app.unit() as unit:
            number = unit.number
            app.session().connection()
            until(lambda: logged("Held too long"))
            time.sleep(0.15)  # the thread looks again several times
            assert len(logged("Held too long")) == 1
            assert logged("Given back") == []
        [held], [given_back] = logged("Held too long"), logged("Given back")
        for record in (held, given_back):
            assert (vars(record)["connection"], vars(record)["unit"]) == ("writer", number)
            assert " in test_a_connection_that_is_held_too_long_is_logged_once" in record.getMessage()


def test_a_unit_that_is_open_too_long_without_a_connection_is_logged_too(
    new_sqlite_url: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    with running(writer={"url": new_sqlite_url(), "held_warning": 0.05}) as app, records(caplog) as logged:
        with app.unit() as unit:
            app.session()
            until(lambda: logged("Open for"))
            time.sleep(0.15)  # the thread looks again several times
        until(lambda: logged("Ended after"))
        [opened], [ended] = logged("Open for"), logged("Ended after")
        for record in (opened, ended):
            assert f": unit {unit.number} of thread 'MainThread', begun at " in record.getMessage()
            assert vars(record)["unit"] == unit.number
        assert logged("Held too long") == []


def test_a_unit_with_sessions_of_several_connections_is_logged_once(
    new_sqlite_url: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    writer, log_ = ({"url": new_sqlite_url(), "held_warning": 0.05} for _ in range(2))
    with running(writer=writer, log=log_) as app, records(caplog) as logged:
        with app.unit():
            app.session("writer"), app.session("log")
            until(lambda: logged("Open for"))
            time.sleep(0.15)  # each connection's thread looks several times
        until(lambda: logged("Ended after"))
        time.sleep(0.15)
        assert (len(logged("Open for")), len(logged("Ended after"))) == (1, 1)


def test_a_unit_with_the_session_that_finds_its_database_is_logged_too(
    new_sqlite_url: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = DatabaseSettings(_env_file=None, held_warning=0.05, connections={"writer": {"url": new_sqlite_url()}})
    container = Container(settings=settings)
    with records(caplog) as logged:
        with container.transaction() as unit:
            container.session()
            until(lambda: logged("Open for"))
        assert f": unit {unit.number} of thread 'MainThread', begun at " in logged("Open for")[0].getMessage()
        until(lambda: logged("Ended after"))
        formatter = logging.Formatter("%(connection)s %(unit)s")
        said = [formatter.format(record) for record in logged("Open for") + logged("Ended after")]
        assert said == [f"None {unit.number}"] * 2
    container.shutdown_resources()


def test_a_unit_with_a_connection_is_named_once(new_sqlite_url: Callable[[], str], caplog: pytest.LogCaptureFixture) -> None:
    with running(writer={"url": new_sqlite_url(), "held_warning": 0.05}) as app, records(caplog) as logged:
        with app.unit():
            app.session().connection()
            until(lambda: logged("Held too long"))
            time.sleep(0.15)
        assert logged("Open for") == []


def test_a_detached_connection_is_the_pools_no_more(app: Application) -> None:
    with app.engine().connect() as connection:
        connection.detach()
        assert app.container.pools()["writer"].holders == ()
        connection.close()


def test_a_connection_that_is_not_held_too_long_is_not_logged(
    new_sqlite_url: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    with running(writer={"url": new_sqlite_url(), "held_warning": 60}) as app, records(caplog) as logged:
        with app.unit():
            app.session().connection()
        assert logged("Held too long") + logged("Given back") == []


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_slow_statement_is_logged_with_the_line_that_sent_it(
    asynchronous: bool, new_postgres_url: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    statement = text("SELECT pg_sleep(0.2), :secret")

    async def send_awaited(app: Application) -> None:
        async with app.unit():
            await app.container.writer_async_session().execute(statement, {"secret": "hunter2"})
            await app.container.writer_async_session().execute(text("SELECT 1"))
        await app.container.shutdown_resources()

    def send(app: Application) -> None:
        with app.unit():
            app.session().execute(statement, {"secret": "hunter2"})
            app.session().execute(text("SELECT 1"))

    with running(writer={"url": new_postgres_url(), "slow_statement": 0.15}) as app, records(caplog) as logged:
        asyncio.run(send_awaited(app)) if asynchronous else send(app)
        slow = [record for record in logged("Slow statement on 'writer'") if "pg_sleep" in record.getMessage()]
    assert len(slow) == 1
    message = slow[0].getMessage()
    assert f".<locals>.{'send_awaited' if asynchronous else 'send'}: SELECT pg_sleep(0.2), " in message
    assert "hunter2" not in message
    assert isinstance(vars(slow[0])["unit"], int)


def test_a_slow_statement_that_fails_is_logged_too(new_postgres_url: Callable[[], str], caplog: pytest.LogCaptureFixture) -> None:
    settings = {"url": new_postgres_url(), "slow_statement": 0.15, "statement_timeout": 0.2}
    with running(writer=settings) as app, records(caplog) as logged:
        with pytest.raises(OperationalError), app.unit():
            app.session().execute(text("SELECT pg_sleep(10)"))
        assert any(", and failed, sent at " in record.getMessage() for record in logged("Slow statement"))


@pytest.mark.parametrize("server", ["postgres", "mariadb"])
def test_a_slow_statement_that_the_timeout_of_its_unit_stops_is_logged(
    server: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    url = request.getfixturevalue(f"new_{server}_url")()
    slow = {"postgres": "SELECT pg_sleep(10)", "mariadb": "SELECT sleep(10)"}[server]
    with running(writer={"url": url, "slow_statement": 0.05}) as app, records(caplog) as logged:
        with pytest.raises(UnitOfWorkTimeout), app.unit(timeout=0.5):
            app.session().execute(text(slow))
        assert any(f": {slow}" in record.getMessage() for record in logged("Slow statement"))


def test_what_is_not_asked_for_costs_no_listener_and_no_thread(app: Application) -> None:
    threads = set(threading.enumerate())
    with app.unit():
        app.session().execute(text("SELECT 1"))
    dispatch: Any = app.engine().dispatch
    assert [*dispatch.before_cursor_execute, *dispatch.after_cursor_execute] == []
    assert set(threading.enumerate()) <= threads


def test_settings_of_all_connections_are_those_of_each_that_does_not_say_itself() -> None:
    settings = DatabaseSettings(
        _env_file=None,
        held_warning=10,
        slow_statement=2,
        connections={"writer": {"url": "sqlite://"}, "log": {"url": "sqlite://", "slow_statement": None, "held_warning": 1}},
    )
    writer, reader, log = map(settings.connection, ("writer", "reader", "log"))
    assert (writer.held_warning, writer.slow_statement) == (reader.held_warning, reader.slow_statement) == (10, 2)
    assert (log.held_warning, log.slow_statement) == (1, None)


@pytest.mark.parametrize("never", ["0", "", "0.0"])
def test_a_connection_can_switch_off_what_is_set_for_all(never: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HELD_WARNING", "SLOW_STATEMENT"):
        monkeypatch.setenv(f"APP_DB_{variable}", "10")
        monkeypatch.setenv(f"APP_DB_CONNECTIONS__WRITER__{variable}", never)
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite://")
    settings = DatabaseSettings(_env_file=None)
    writer = settings.connection("writer")
    assert (writer.held_warning, writer.slow_statement) == (None, None)
    assert (settings.held_warning, settings.slow_statement) == (10, 10)
    for variable in ("HELD_WARNING", "SLOW_STATEMENT"):
        monkeypatch.setenv(f"APP_DB_{variable}", never)
    settings = DatabaseSettings(_env_file=None)
    assert (settings.held_warning, settings.slow_statement) == (None, None)


@pytest.mark.parametrize("wrong", ["-1", "nan", "inf"])
def test_what_is_no_number_of_seconds_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_HELD_WARNING", wrong)
    with pytest.raises(SettingsError, match="APP_DB_HELD_WARNING: must be"):
        DatabaseSettings(_env_file=None)


def test_the_unit_has_a_number_of_its_own() -> None:
    container = Container(settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": "sqlite://"}}))
    with container.transaction() as outer:
        with container.transaction() as same:
            assert same.number == outer.number
        with container.transaction("requires_new") as inner:
            assert inner.number != outer.number
            assert container.unit().number == inner.number
