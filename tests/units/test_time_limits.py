"""The `timeout` of a unit bounds all that it waits for: a pool, a connection, a statement, COMMIT, a server that stands still."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text

from app_db import DatabaseSettings, container_of
from app_db.errors import CommitUnconfirmed, InvalidUse, OutcomeUnknown, UnitOfWorkTimeout
from harness.applications import Application, Item, running
from harness.proxies import Proxy
from harness.servers import Server
from harness.two_phasing import TwoPhaseApplication, two_phasing

LIMIT = 1.0
EARLIEST, LATEST = 0.9, 1.5
ATTEMPTS = 3
"""A busy machine may be late once. The limit must be kept in one of so many attempts."""

DRIVERS = dict.fromkeys(("psycopg", "psycopg (async)", "asyncpg"), "postgresql") | dict.fromkeys(("pymysql", "asyncmy"), "mysql")
SCHEMES = {"psycopg (async)": "psycopg"}
SLEEP = {"postgresql": "SELECT pg_sleep(8)", "mysql": "SELECT SLEEP(8)"}

Work = Callable[[Any], Any]


class Stage:
    """A database, a network before it, and an application that reaches it by one driver."""

    def __init__(self, driver: str, request: pytest.FixtureRequest) -> None:
        self.driver, self.kind = driver, DRIVERS[driver]
        self.asynchronous = driver in ("psycopg (async)", "asyncpg", "asyncmy")
        self.server: Server = request.getfixturevalue("postgres" if self.kind == "postgresql" else "mariadb")
        new_url = request.getfixturevalue("new_postgres_url" if self.kind == "postgresql" else "new_mariadb_url")
        scheme = f"{self.kind}+{SCHEMES.get(driver, driver)}"
        self.direct = str(new_url()).replace(str(new_url()).partition("://")[0], scheme, 1)

    @contextmanager
    def application(self, *, rtt: float = 0.0, **settings: Any) -> Iterator[tuple[Application, Proxy]]:
        with Proxy(self.server, rtt=rtt) as proxy, running(writer={"url": proxy.url(self.direct), **settings}) as app:
            try:
                yield app, proxy
            finally:
                proxy.cut()

    def seconds(self, app: Application, work: Work, *, warm: bool = True) -> tuple[float, BaseException]:
        """Run a unit of work with a limit. Return how long it took, and the error that it raised."""
        if self.asynchronous:
            return asyncio.run(self._seconds_awaited(app, work, warm=warm))
        if warm:
            with app.unit():
                app.session().execute(text("SELECT 1"))
        began = time.monotonic()
        try:
            with app.unit(timeout=LIMIT):
                work(app.session())
        except Exception as error:
            return time.monotonic() - began, error
        pytest.fail("the unit was not stopped")

    async def _seconds_awaited(self, app: Application, work: Work, *, warm: bool) -> tuple[float, BaseException]:
        try:
            if warm:
                async with app.unit():
                    await app.container.writer_async_session().execute(text("SELECT 1"))
            began = time.monotonic()
            try:
                async with app.unit(timeout=LIMIT):
                    await app.container.writer_async_session().run_sync(work)
            except Exception as error:
                return time.monotonic() - began, error
            pytest.fail("the unit was not stopped")
        finally:
            await app.container.shutdown_resources()


def drivers(*ordinary: str) -> list[Any]:
    """The drivers. All but these are left to the exhaustive tests."""
    return [driver if driver in ordinary else pytest.param(driver, marks=pytest.mark.exhaustive) for driver in DRIVERS]


@pytest.fixture(params=drivers("psycopg"))
def stage(request: pytest.FixtureRequest) -> Stage:
    return Stage(request.param, request)


def in_time(measure: Callable[[], tuple[float, BaseException]], error: type[BaseException] = UnitOfWorkTimeout) -> BaseException:
    """Measure until the limit was kept. Return the error, which must be of that type each time."""
    seen = []
    for _ in range(ATTEMPTS):
        seconds, raised = measure()
        assert isinstance(raised, error), repr(raised)
        seen.append(seconds)
        if EARLIEST <= seconds <= LATEST:
            return raised
    pytest.fail(f"took {seen} s with a limit of {LIMIT} s")


def sleep(session: Any, kind: str) -> None:
    session.execute(text(SLEEP[kind]))


def read(session: Any) -> None:
    session.execute(text(f"SELECT 1 AS n{time.monotonic_ns()}")).all()  # a new text: asyncpg sends a prepared one without it


def write(session: Any) -> None:
    session.add(Item(name=f"item {time.monotonic_ns()}"))
    session.flush()


# ---- what a unit waits for ---------------------------------------------------------------------------------------------


def test_a_slow_statement_is_stopped(stage: Stage) -> None:
    with stage.application() as (app, _):
        in_time(lambda: stage.seconds(app, lambda session: sleep(session, stage.kind)))


@pytest.mark.parametrize("stage", drivers("psycopg", "asyncpg"), indirect=True)
def test_a_statement_that_is_never_answered_is_stopped(stage: Stage) -> None:
    with stage.application() as (app, proxy):

        def measure() -> tuple[float, BaseException]:
            proxy.lose("request", to=rb"SELECT 1", after=1, then="stall")
            return stage.seconds(app, read)

        in_time(measure)


def test_a_statement_late_in_the_unit_is_stopped(stage: Stage) -> None:
    """The server was told the limit at the beginning, and would let each statement take that long."""

    def read_then_sleep(session: Any) -> None:
        read(session)
        time.sleep(0.7)
        sleep(session, stage.kind)

    with stage.application() as (app, _):
        in_time(lambda: stage.seconds(app, read_then_sleep))


def test_a_silent_port_is_not_waited_for(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = stage.direct.replace(f":{stage.server.port}/", f":{port}/")
        with silent_application(url) as app:
            in_time(lambda: stage.seconds(app, read, warm=False))


@contextmanager
def silent_application(url: str) -> Iterator[Application]:
    app = Application({"writer": url}, copies=["writer"])
    try:
        yield app
    finally:
        app.container.shutdown_resources()


def test_a_slow_authentication_is_not_waited_for(stage: Stage) -> None:
    with Proxy(stage.server, rtt=700) as slow, silent_application(slow.url(stage.direct)) as app:
        in_time(lambda: stage.seconds(app, read, warm=False))


@contextmanager
def slow_to_connect(stage: Stage) -> Iterator[Application]:
    """An application whose driver takes half a second to connect."""
    driver: Any = import_module(stage.driver)

    def connect(*arguments: Any, connect: Callable[..., Any] = driver.connect, **parameters: Any) -> Any:
        time.sleep(0.5)
        return connect(*arguments, **parameters)

    with running(writer=stage.direct) as app, pytest.MonkeyPatch.context() as patched:
        app.engine().dispose()
        patched.setattr(driver, "connect", connect)
        yield app


def connecting() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "app_db-connect"]


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_a_connection_that_comes_too_late_for_one_unit_is_for_the_next(driver: str, request: pytest.FixtureRequest) -> None:
    stage = Stage(driver, request)
    with slow_to_connect(stage) as app:
        refused = 0
        for _ in range(20):
            try:
                with app.unit(timeout=0.2):
                    app.session().connection()
            except UnitOfWorkTimeout:
                refused += 1
                assert len(connecting()) <= 1
            else:
                break
        assert 0 < refused < 20
        assert connecting() == []


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_attempts_that_come_to_nothing_do_not_pile_up(driver: str, request: pytest.FixtureRequest) -> None:
    """All units wait for one attempt, or for the one after it: a silent port answers nobody."""
    stage = Stage(driver, request)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = make_url(stage.direct).set(host="127.0.0.1", port=silent.getsockname()[1], query={})
        settings = DatabaseSettings(_env_file=None, connections={"writer": {"url": url.render_as_string(hide_password=False)}})
        container = container_of("writer")(settings=settings)
        for _ in range(8):
            with pytest.raises(UnitOfWorkTimeout), container.transaction(timeout=0.1):
                container.writer_session().connection()
            assert len(connecting()) <= 1
    give_up = time.monotonic() + 20  # closing the port ends the attempt
    while connecting() and time.monotonic() < give_up:
        time.sleep(0.02)
    assert connecting() == []
    container.shutdown_resources()


def test_a_connection_that_nobody_takes_is_closed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr("app_db._databases.time_limits._KEPT", 0.2)
    stage = Stage("psycopg", request)
    with slow_to_connect(stage) as app:
        with pytest.raises(UnitOfWorkTimeout), app.unit(timeout=0.2):
            app.session().connection()
        give_up = time.monotonic() + 10
        while connecting() and time.monotonic() < give_up:
            time.sleep(0.02)
        assert connecting() == []
        with app.unit():
            assert app.session().scalar(text("SELECT 1")) == 1


STEPS = 30
"""More requests than any driver sends for a unit on a new connection, until that is closed."""

PROFILES: dict[str, dict[str, Any]] = {
    "writer": {},
    "reader": {"read_only": True},
    "serializable": {"isolation_level": "SERIALIZABLE"},
    "no pool": {"pool": {"class": "null"}},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", list(DRIVERS), indirect=True)
@pytest.mark.parametrize("profile", PROFILES)
def test_no_step_of_a_new_connection_is_waited_for(profile: str, stage: Stage) -> None:
    """Logging in, what SQLAlchemy asks a new server, what listeners set, the unit's own statements: each hangs once."""
    with stage.application():
        """Makes the tables."""
    with ThreadPoolExecutor(STEPS) as threads:
        seen = list(threads.map(partial(hang_at, stage, PROFILES[profile]), range(STEPS)))
    in_the_unit = [error for error in seen if error is not None]
    assert len(in_the_unit) > 6
    assert [repr(error) for error in in_the_unit if not isinstance(error, UnitOfWorkTimeout)] == []


def hang_at(stage: Stage, profile: dict[str, Any], step: int) -> Exception | None:
    """Run a unit that only reads, whose request of that number is never answered. Return its error."""
    with stage.application(**profile) as (app, proxy):
        proxy.lose("request", to=rb"(?s).", after=step, then="stall")
        try:
            if stage.asynchronous:
                asyncio.run(read_in_time_awaited(app, proxy))
            else:
                with app.unit(timeout=LIMIT):
                    read(app.session())
        except Exception as error:
            return error
        finally:
            proxy.cut()
    return None


async def read_in_time_awaited(app: Application, proxy: Proxy) -> None:
    try:
        async with app.unit(timeout=LIMIT):
            await app.container.writer_async_session().execute(text("SELECT 1"))
    finally:
        proxy.cut()
        await app.container.shutdown_resources()


def test_a_full_pool_is_not_waited_for(stage: Stage) -> None:
    with stage.application(pool={"size": 1, "max_overflow": 0, "timeout": 10}) as (app, _):
        if stage.asynchronous:
            in_time(lambda: asyncio.run(full_pool_awaited(app)))
            return
        engine = app.engine()
        with engine.connect():
            error = in_time(lambda: stage.seconds(app, read, warm=False))
        assert "'writer'" in "".join(getattr(error, "__notes__", ())), "it names the connection"


async def full_pool_awaited(app: Application) -> tuple[float, BaseException]:
    try:
        async with app.container.writer_async_engine().connect():
            began = time.monotonic()
            try:
                async with app.unit(timeout=LIMIT):
                    await app.container.writer_async_session().execute(text("SELECT 1"))
            except Exception as error:
                return time.monotonic() - began, error
        pytest.fail("the unit was not stopped")
    finally:
        await app.container.shutdown_resources()


def test_a_commit_that_is_cut_off_is_unknown(stage: Stage) -> None:
    with stage.application() as (app, proxy):

        def measure() -> tuple[float, BaseException]:
            proxy.lose("answer", to=rb"(?i)(?<!AUTO)COMMIT", after=1, then="stall")
            return stage.seconds(app, write)

        error = in_time(measure, OutcomeUnknown)
        assert isinstance(error, OutcomeUnknown)
        assert error.connection == "writer"
        assert "timeout of 1 s" in notes_of(error)


def notes_of(error: BaseException | None) -> str:
    notes = ""
    while error is not None:
        notes += "".join(getattr(error, "__notes__", ()))
        error = error.__cause__ or error.__context__
    return notes


@pytest.mark.representative("asyncpg")
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_slow_commit_is_unknown(driver: str, request: pytest.FixtureRequest) -> None:
    """A trigger that runs at COMMIT, where PostgreSQL's `statement_timeout` does not count."""
    stage = Stage(driver, request)
    with stage.application() as (app, _):
        app.run(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(3); RETURN NULL; END $$",
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION wait()",
        )
        in_time(lambda: stage.seconds(app, write), OutcomeUnknown)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_locked_file_of_sqlite_is_not_waited_for(asynchronous: bool, sqlite_url: str) -> None:
    with running(writer=sqlite_url) as app:
        lock = sqlite3.connect(str(make_url(sqlite_url).database), isolation_level=None)

        def measure() -> tuple[float, BaseException]:
            lock.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            try:
                if asynchronous:
                    asyncio.run(write_awaited(app))
                else:
                    with app.unit(timeout=LIMIT):
                        write(app.session())
            except Exception as error:
                return time.monotonic() - began, error
            finally:
                lock.execute("ROLLBACK")
            pytest.fail("the unit was not stopped")

        with closing(lock):
            in_time(measure)
            with app.unit():
                waits = app.session().connection().exec_driver_sql("PRAGMA busy_timeout").scalar()
                write(app.session())
        assert waits == 5000, "the next unit waits as long as ever"


async def write_awaited(app: Application) -> None:
    try:
        async with app.unit(timeout=LIMIT):
            await app.container.writer_async_session().run_sync(write)
    finally:
        await app.container.shutdown_resources()


@contextmanager
def standing_still(server: Server) -> Iterator[None]:
    """Stop all processes of a server by SIGSTOP."""
    pids = [server.pid, *(int(child) for child in children(server.pid))]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # it was about to end
                os.kill(pid, signal.SIGCONT)


def children(pid: int) -> list[str]:
    found: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return found


@pytest.fixture
def own_server(stage: Stage, new_postgres: Any, new_mariadb: Any) -> Server:
    server: Server = new_postgres() if stage.kind == "postgresql" else new_mariadb()
    database = stage.direct.rpartition("/")[2]
    server.create_database("still")
    stage.direct = stage.direct.replace(f":{stage.server.port}/", f":{server.port}/").replace(database, "still")
    stage.server = server
    return server


@pytest.mark.parametrize("warm", [True, False], ids=["connected", "not connected"])
@pytest.mark.parametrize("stage", drivers("psycopg"), indirect=True)
def test_a_server_that_stands_still_is_not_waited_for(warm: bool, stage: Stage, own_server: Server) -> None:
    url = stage.direct
    with running(writer=url) as app:
        if stage.asynchronous:
            seconds, error = asyncio.run(stand_still_awaited(app, own_server, warm=warm))
        else:
            if warm:
                with app.unit():
                    read(app.session())
            with standing_still(own_server):
                seconds, error = stage.seconds(app, read, warm=False)
        assert isinstance(error, UnitOfWorkTimeout), repr(error)
        assert EARLIEST <= seconds <= 2 * LATEST


async def stand_still_awaited(app: Application, server: Server, *, warm: bool) -> tuple[float, BaseException]:
    try:
        if warm:
            async with app.unit():
                await app.container.writer_async_session().execute(text("SELECT 1"))
        with standing_still(server):
            began = time.monotonic()
            with pytest.raises(Exception) as caught:  # looked at by the caller
                async with app.unit(timeout=LIMIT):
                    await app.container.writer_async_session().execute(text("SELECT 1"))
            return time.monotonic() - began, caught.value
    finally:
        await app.container.shutdown_resources()


# ---- two-phase commit --------------------------------------------------------------------------------------------------

STEPS_OF_TWO_PHASES = {
    "prepare": ("writer", rb"PREPARE TRANSACTION|XA PREPARE", UnitOfWorkTimeout),
    "decide": ("ledger", rb"INSERT INTO app_db_decisions", OutcomeUnknown),
    "commit": ("writer", rb"COMMIT PREPARED|XA COMMIT", CommitUnconfirmed),
}
"""By step: the connection that hangs, what it does not answer, and the error."""


@pytest.mark.representative("psycopg-prepare")
@pytest.mark.parametrize("step", STEPS_OF_TWO_PHASES)
@pytest.mark.parametrize("stage", drivers("psycopg"), indirect=True)
def test_a_step_of_two_phase_commit_that_hangs_is_not_waited_for(step: str, stage: Stage, request: pytest.FixtureRequest) -> None:
    hangs, words, error = STEPS_OF_TWO_PHASES[step]
    postgres, new_url = request.getfixturevalue("postgres"), request.getfixturevalue("new_postgres_url")
    driver = "+asyncpg" if stage.asynchronous else "+psycopg"
    with Proxy(stage.server) as before_writer, Proxy(postgres) as before_ledger:
        proxy = before_writer if hangs == "writer" else before_ledger
        warehouse, ledger = (str(url).replace("+psycopg", driver) for url in (new_url(), before_ledger.url(new_url())))
        with two_phasing("ledger", writer=before_writer.url(stage.direct), warehouse=warehouse, ledger=ledger) as app:

            def measure() -> tuple[float, BaseException]:
                write_to_both(app, stage)
                proxy.lose("answer", to=words, then="stall")
                began = time.monotonic()
                with pytest.raises(error) as caught:
                    write_to_both(app, stage, timeout=LIMIT)
                seconds = time.monotonic() - began
                proxy.cut()
                app.recover()
                assert app.names("writer") == app.names("warehouse")
                return seconds, caught.value

            in_time(measure, error)


def write_to_both(app: TwoPhaseApplication, stage: Stage, **options: float) -> None:
    name = f"item {time.monotonic_ns()}"
    if stage.asynchronous:
        asyncio.run(write_to_both_awaited(app, name, **options))
    else:
        with app.unit(**options):
            app.add_to_each(name, "writer", "warehouse")


async def write_to_both_awaited(app: TwoPhaseApplication, name: str, **options: float) -> None:
    try:
        async with app.unit(**options):
            for session in (app.container.writer_async_session(), app.container.warehouse_async_session()):
                session.add(Item(name=name))
                await session.flush()
    finally:
        await app.container.shutdown_resources()


# ---- nested units ------------------------------------------------------------------------------------------------------


def test_a_unit_of_its_own_has_no_more_time_than_the_one_that_waits_for_it(new_postgres_url: Callable[[], str]) -> None:
    def measure() -> tuple[float, BaseException]:
        began = time.monotonic()
        with pytest.raises(UnitOfWorkTimeout) as caught, app.unit(timeout=LIMIT):
            read(app.session())
            with app.unit(propagation="requires_new", timeout=20):
                sleep(app.session(), "postgresql")
        return time.monotonic() - began, caught.value

    with running(writer=new_postgres_url()) as app:
        in_time(measure)


def test_a_unit_of_its_own_does_not_wait_longer_for_a_connection(new_postgres_url: Callable[[], str]) -> None:
    def measure() -> tuple[float, BaseException]:
        began = time.monotonic()
        with pytest.raises(UnitOfWorkTimeout) as caught, app.unit(timeout=LIMIT):
            read(app.session())
            with app.unit(propagation="requires_new"):
                read(app.session())
        return time.monotonic() - began, caught.value

    with running(writer={"url": new_postgres_url(), "pool": {"size": 1, "max_overflow": 0}}) as app:
        in_time(measure)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5"])
def test_what_is_no_time_is_refused(timeout: Any, sqlite_url: str) -> None:
    with running(writer=sqlite_url) as app, pytest.raises(InvalidUse, match="is no time limit"):
        app.unit(timeout=timeout)
