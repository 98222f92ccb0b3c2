"""A report comes within its limit, whatever the databases do, and callers at the same time ask each database once."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, make_url, text

from app_db import DatabaseContainer, container_of
from app_db.errors import InvalidUse
from app_db.health import Health
from harness.proxies import Proxy
from harness.servers import PASSWORD, MariaDBServer, PostgresServer

NewContainer = Callable[..., DatabaseContainer]

CALLERS = 100


Proxied = tuple[Proxy, str]
"""A proxy, and the URL of a database by way of it."""


@pytest.fixture
def proxied_postgres(postgres: PostgresServer, postgres_url: str) -> Iterator[Proxied]:
    with Proxy(postgres) as proxy:
        yield proxy, proxy.url(postgres_url)


@pytest.fixture
def proxied_mariadb(mariadb: MariaDBServer, mariadb_url: str) -> Iterator[Proxied]:
    with Proxy(mariadb) as proxy:
        yield proxy, proxy.url(mariadb_url)


def askers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "app_db-health"]


def wait_until(holds: Callable[[], bool], within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- full pools ---------------------------------------------------------------------------------------------------------


def test_a_full_pool_is_told_and_not_waited_for(new_container: NewContainer, postgres_url: str) -> None:
    pool = {"size": 1, "max_overflow": 1, "timeout": 60}
    container = new_container(writer={"url": postgres_url, "pool": pool})
    assert container.health(timeout=20).connections["writer"].pool is None, "no engine is made for that"
    with container.transaction():
        container.writer_session().execute(text("SELECT 1"))
        half = container.health(timeout=20).connections["writer"]
        assert (half.status, half.pool and half.pool.in_use) == ("up", 1)
        with container.transaction("requires_new"):
            container.writer_session().execute(text("SELECT 1"))
            report = container.health(timeout=20)
    full = report.connections["writer"]
    assert (report.status, full.status, full.reason) == ("degraded", "degraded", "its pool is full: 2 connections are in use")
    assert full.pool is not None
    assert (full.pool.in_use, full.pool.most, full.pool.is_full) == (2, 2, True)
    assert report.as_json()["status"] == "warn"
    assert container.health(timeout=20).status == "up"


def test_the_pools_of_event_loops_count_too(new_container: NewContainer, postgres_url: str) -> None:
    container = new_container(writer={"url": postgres_url, "pool": {"size": 1, "max_overflow": 0}})

    async def hold() -> Health:
        async with container.transaction():
            await container.writer_async_session().execute(text("SELECT 1"))
            report = await container.async_health(timeout=20)
        await container.shutdown_resources()
        return report

    with container.writer_engine().connect():
        full = asyncio.run(hold()).connections["writer"]
    assert full.pool is not None
    assert (full.pool.in_use, full.pool.most, full.status) == (2, 2, "degraded")


def test_a_pool_that_is_full_beside_one_that_is_not_is_told(new_container: NewContainer, postgres_url: str) -> None:
    container = new_container(writer={"url": postgres_url, "pool": {"size": 1, "max_overflow": 0}})

    async def hold() -> Health:
        async with container.transaction():
            await container.writer_async_session().execute(text("SELECT 1"))
            report = await container.async_health(timeout=20)
            assert container.pools()["writer"].is_full
        await container.shutdown_resources()
        return report

    container.writer_engine()
    half = asyncio.run(hold()).connections["writer"]
    assert half.pool is not None
    assert (half.pool.in_use, half.pool.most, half.status) == (1, 2, "degraded")


# ---- silence ------------------------------------------------------------------------------------------------------------


@contextmanager
def silent_port() -> Iterator[int]:
    """A port at which connections are welcome, and nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def check_port_that_never_answers(container: DatabaseContainer) -> None:
    container.writer_engine().connect().close()
    report = container.health(timeout=0.2)
    assert {name: each.status for name, each in report.connections.items()} == {"writer": "up", "warehouse": "down"}
    assert report.connections["warehouse"].reason.startswith("it has not answered for 0.")
    assert report.status == "down"
    assert container.health(timeout=0.2).connections["writer"].status == "up"
    assert len(askers()) <= 1, "the database is not asked again while the first question is open"
    wait_until(lambda: not askers())


@pytest.mark.representative("mysql+pymysql")
@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql"])
def test_a_port_that_never_answers_is_down_and_the_others_are_up(
    new_container: NewContainer, sqlite_url: str, driver: str
) -> None:
    with silent_port() as port:
        check_port_that_never_answers(new_container(writer=sqlite_url, warehouse=f"{driver}://shop@127.0.0.1:{port}/shop"))


@pytest.mark.usefixtures("only_for_coroutines")
@pytest.mark.representative("postgresql+asyncpg")
@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "mysql+asyncmy"])
def test_coroutines_drivers_are_not_waited_for_either(new_container: NewContainer, sqlite_url: str, driver: str) -> None:
    with silent_port() as port:
        check_port_that_never_answers(new_container(writer=sqlite_url, warehouse=f"{driver}://shop@127.0.0.1:{port}/shop"))


def test_an_own_engine_that_gets_no_answer_is_down() -> None:
    with silent_port() as port:
        engine = create_engine(f"mysql+pymysql://x@127.0.0.1:{port}/x", connect_args={"read_timeout": 0.3})
        container = container_of("writer")()
        container.writer_engine.override(engine)
        assert container.health(timeout=0.1).status == "down"
        wait_until(lambda: not askers())


def steps(proxy: Proxy, new: Callable[[], DatabaseContainer], chosen: range | None) -> Iterator[int]:
    """Ask while each of the server's answers is the one that never comes. Yield the number of each that was asked for."""
    for step in chosen or count():
        fault = proxy.lose("answer", to=b"", after=step, then="stall")
        container = new()
        report = container.health(timeout=0.3)
        if not fault.happened:
            proxy.cut()
            return
        assert report.connections["writer"].status == "down", step
        assert PASSWORD not in repr(report)
        wait_until(lambda: not askers())  # it gave up by itself
        proxy.cut()
        assert container.health(timeout=20).status == "up", "it is asked again as soon as it can be"
        yield step


EVERY = pytest.param(None, marks=pytest.mark.exhaustive, id="every")
ONE = pytest.param(range(4, 5), id="one")


@pytest.mark.parametrize("chosen", [EVERY, ONE])
def test_a_postgresql_that_falls_silent_at_any_step_is_down(
    new_container: NewContainer, proxied_postgres: Proxied, chosen: range | None
) -> None:
    proxy, url = proxied_postgres
    assert len(list(steps(proxy, lambda: new_container(writer=url), chosen))) >= (6 if chosen is None else 1)


@pytest.mark.exhaustive
def test_a_mariadb_that_falls_silent_at_any_step_is_down(new_container: NewContainer, proxied_mariadb: Proxied) -> None:
    proxy, url = proxied_mariadb
    assert len(list(steps(proxy, lambda: new_container(writer=url), None))) >= 6


@pytest.mark.exhaustive
@pytest.mark.usefixtures("only_for_coroutines")
def test_coroutines_drivers_are_not_waited_for_at_any_step(
    new_container: NewContainer, proxied_postgres: Proxied, proxied_mariadb: Proxied
) -> None:
    for (proxy, url), driver in ((proxied_postgres, "asyncpg"), (proxied_mariadb, "asyncmy")):
        awaited = url.replace("+psycopg", f"+{driver}").replace("+pymysql", f"+{driver}")
        assert len(list(steps(proxy, partial(new_container, writer=awaited), None))) >= 6


# ---- what nothing can cut off ---------------------------------------------------------------------------------------------


class Gate:
    """A password function that waits until it is opened, as a name server may."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.asked = 0

    def __call__(self) -> str:
        self.asked += 1
        assert self.opened.wait(60)
        return PASSWORD


gate = Gate()


@pytest.fixture
def closed_gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    new = Gate()
    monkeypatch.setattr(sys.modules[__name__], "gate", new)
    yield new
    new.opened.set()
    wait_until(lambda: not askers())


def behind_gate(url: str) -> dict[str, str]:
    """The settings of a database whose password comes through the gate."""
    parts = make_url(url)
    without = URL.create(parts.drivername, parts.username, None, parts.host, parts.port, parts.database)
    return {"url": without.render_as_string(), "password_provider": f"{__name__}:gate"}


def test_a_database_whose_asker_hangs_is_told_as_down_without_asking_it_again(
    new_container: NewContainer, closed_gate: Gate, postgres_url: str, sqlite_url: str
) -> None:
    container = new_container(writer=behind_gate(postgres_url), log=sqlite_url)
    container.log_engine().connect().close()
    for _ in range(5):
        report = container.health(timeout=0.1)
        assert (report.connections["writer"].status, report.connections["log"].status) == ("down", "up")
    assert (closed_gate.asked, len(askers())) == (1, 1)
    Path(str(make_url(sqlite_url).database)).unlink()
    assert container.health(timeout=0.1).connections["log"].status == "down", "the others are asked anew"
    closed_gate.opened.set()
    wait_until(lambda: not askers())
    assert container.health(timeout=20).connections["writer"].status == "up"


IN_A_CHILD = """
import os, socket, sys, threading
from app_db import DatabaseSettings, container_of

listener = socket.create_server(("127.0.0.1", 0))
url = f"postgresql://x@127.0.0.1:{listener.getsockname()[1]}/x"
container = container_of("writer")(settings=DatabaseSettings(connections={"writer": {"url": url}}))
assert container.health(timeout=0.1).status == "down"
child = os.fork()
if child == 0:
    container.health(timeout=0.1)
    os._exit(sum(thread.name == "app_db-health" for thread in threading.enumerate()))
print("threads in the child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.exhaustive
def test_a_forked_child_asks_by_threads_of_its_own() -> None:
    ran = subprocess.run([sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "threads in the child: 1\n"


# ---- callers at the same time -------------------------------------------------------------------------------------------


def are_waiting(threads: Iterable[int]) -> bool:
    """Whether each of these threads waits for something, below `health()`."""
    frames = sys._current_frames()

    def waits(ident: int) -> bool:
        frame = frames.get(ident)
        top = frame
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        return top is not None and top.f_code.co_name == "wait" and "health" in names

    return all(map(waits, threads))


def test_a_hundred_threads_ask_each_database_once(
    new_container: NewContainer, closed_gate: Gate, proxied_postgres: Proxied, proxied_mariadb: Proxied
) -> None:
    (postgres, url), (mariadb, other) = proxied_postgres, proxied_mariadb
    container = new_container(writer=behind_gate(url), maria=other, reader={"mirror": "writer", "read_only": True})
    idents: list[int] = []

    def ask() -> Health:
        idents.append(threading.get_ident())
        return container.health(timeout=50)

    with ThreadPoolExecutor(CALLERS) as threads:
        called = [threads.submit(ask) for _ in range(CALLERS)]
        wait_until(lambda: len(idents) == CALLERS and are_waiting(idents))
        closed_gate.opened.set()
        reports = [each.result() for each in called]
    assert (closed_gate.asked, postgres.accepted, mariadb.accepted) == (1, 1, 1)
    assert {report.status for report in reports} == {"up"}


def test_a_hundred_tasks_ask_each_database_once_and_the_loop_goes_on(
    new_container: NewContainer, closed_gate: Gate, proxied_postgres: Proxied, proxied_mariadb: Proxied
) -> None:
    (postgres, url), (mariadb, other) = proxied_postgres, proxied_mariadb
    container = new_container(writer=behind_gate(url), maria=other)

    async def ask() -> list[Health]:
        asking = [asyncio.create_task(container.async_health(timeout=50)) for _ in range(CALLERS)]
        cancelled = asyncio.create_task(container.async_health(timeout=50))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)  # if anything blocked the loop, the gate would stay closed
        assert cancelled.cancelled()
        assert not any(task.done() for task in asking)
        closed_gate.opened.set()
        return await asyncio.gather(*asking)

    reports = asyncio.run(ask())
    assert (closed_gate.asked, postgres.accepted, mariadb.accepted) == (1, 1, 1)
    assert {report.status for report in reports} == {"up"}


def test_threads_and_tasks_share_a_round(new_container: NewContainer, closed_gate: Gate, postgres_url: str) -> None:
    container = new_container(writer=behind_gate(postgres_url))
    with ThreadPoolExecutor(1) as thread:
        threads_report = thread.submit(container.health, timeout=50)
        wait_until(lambda: closed_gate.asked == 1)

        async def ask() -> Health:
            task = asyncio.create_task(container.async_health(timeout=50))
            await asyncio.sleep(0)
            closed_gate.opened.set()
            return await task

        assert (asyncio.run(ask()).status, threads_report.result().status) == ("up", "up")
    assert closed_gate.asked == 1


def test_a_caller_with_less_time_does_not_wait_for_the_others(
    new_container: NewContainer, closed_gate: Gate, postgres_url: str
) -> None:
    container = new_container(writer=behind_gate(postgres_url))
    with ThreadPoolExecutor(1) as thread:
        patient = thread.submit(container.health, timeout=50)
        wait_until(lambda: closed_gate.asked == 1)
        assert container.health(timeout=0.1).status == "down"
        assert not patient.done()
        closed_gate.opened.set()
        assert patient.result().status == "up"
    assert closed_gate.asked == 1


# ---- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), None, "2", True, 1e10])
def test_what_is_no_time_limit_is_refused(new_container: NewContainer, sqlite_url: str, timeout: Any) -> None:
    container = new_container(writer=sqlite_url)
    with pytest.raises(InvalidUse, match=r"health\(timeout=.*Give seconds, more than 0"):
        container.health(timeout=timeout)
    with pytest.raises(InvalidUse, match="Give seconds, more than 0"):
        asyncio.run(_awaited(container, timeout))


async def _awaited(container: DatabaseContainer, timeout: Any) -> Health:  # noqa: ASYNC109  # of the container's method
    return await container.async_health(timeout=timeout)


def test_a_container_class_has_no_health() -> None:
    with pytest.raises(InvalidUse, match="Make an instance"):
        container_of("writer").health()
