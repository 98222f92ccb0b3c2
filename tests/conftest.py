"""What all tests share: a clean environment, real servers, and fresh databases on them.

| fixture | gives |
|---|---|
| `postgres`, `mariadb` | the session's server, shared by all tests: don't stop it |
| `new_standby` | starts a streaming replica of a PostgreSQL server |
| `new_postgres`, `new_mariadb` | starts servers of the test's own, to be stopped and killed at will |
| `postgres_url`, `mariadb_url`, `sqlite_url` | the URL of an empty database, which is the test's own |
| `new_postgres_url`, `new_mariadb_url`, `new_sqlite_url` | as many of those as the test asks for |
| `redis`, `broker` | a Redis that all tests share, and its URL when it is empty |
| `browser` | a headless Chromium |
| `database_url`, `new_database_url` | runs the test three times: on SQLite, PostgreSQL and MariaDB |

A server that this machine doesn't have skips its tests, and the report says so at its end. With APP_DB_TEST_REQUIRE_SERVERS=1
those tests fail instead. APP_DB_TEST_WITHOUT=mariadb hides a server that the machine has.

The marks `exhaustive`, `representative` and `soak` say what `make test` leaves to `make test-all`: see CONTRIBUTING.md.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import os
import re
import signal
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.brokers import RedisServer
from harness.coroutines import Awaited, InThreads, driven
from harness.environments import forget_variables
from harness.installing import install
from harness.requiring import made, started
from harness.servers import (
    MariaDBServer,
    PostgresServer,
    PostgresStandby,
    Server,
    Setting,
    available,
    chromium_program,
    quick_tempdir,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DATABASES = ("sqlite", "postgresql", "mariadb")

QUIET = (
    "--no-sandbox",  # tests run as root, too
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
)
"""Arguments of Chromium: it asks nothing of the network but what a test visits."""

collect_ignore = ["testing/beside"]
"""A project of its own, which testing/test_beside.py runs."""

_numbers = count(1)


# ---- what the report says ---------------------------------------------------------------------------------------------


def pytest_configure() -> None:
    # The tests of interruptions are to be interrupted where the shell has told its background jobs to ignore that, too.
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # SQLite and files of decisions wait for the disk, which is of no use to those who kill processes and pull no plug.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(quick_tempdir()))
    # PyMySQL reads all certificates that the machine trusts, for each connection. Nobody here has one to show.
    os.environ["SSL_CERT_FILE"] = os.environ["SSL_CERT_DIR"] = os.devnull


def pytest_collection_finish() -> None:
    """Spare the garbage collector, which some tests call, thousands of tests and modules that are there to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases `exhaustive` that a test's `representative` mark does not name."""
    unused: set[tuple[str, str]] = set()
    used: set[tuple[str, str]] = set()
    for item in items:
        for mark in item.iter_markers("representative"):
            case, test = item.callspec.id, item.nodeid.partition("[")[0]  # type: ignore[attr-defined]  # of a Function alone
            unused |= {(test, pattern) for pattern in mark.args}
            kept = {(test, pattern) for pattern in mark.args if fnmatchcase(case, pattern)}
            if item.get_closest_marker("exhaustive"):
                continue  # by its fixture, so that it represents nothing
            if not kept:
                item.add_marker("exhaustive")
            used |= kept
    whole = not any("::" in argument for argument in config.args)
    if whole and (wrong := unused - used):
        lines = [f"{test} has no case {pattern!r}; its mark `representative` names it" for test, pattern in sorted(wrong)]
        raise pytest.UsageError(*lines)


def pytest_report_header() -> list[str]:
    found = {"sqlite": sqlite3.sqlite_version, **available()}
    return ["databases:", *(f"  {name:<11}{'MISSING, ' if _is_missing(what) else ''}{what}" for name, what in found.items())]


def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
    """Count what is skipped for want of a server apart, so that pytest does not list hundreds of tests that say the same."""
    missing = _missing_server(report)
    return missing and (f"without {missing[0]}", "s", f"SKIPPED ({missing[0]} is missing)")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Say in one line for each server that is missing what was skipped, and how to get it, after all else."""
    yield
    for reports in list(terminalreporter.stats.values()):
        if missing := reports and _missing_server(reports[0]):
            server, why = missing
            tests = "1 test was" if len(reports) == 1 else f"{len(reports)} tests were"
            terminalreporter.write_line(f"{tests} skipped, because {server} is missing: {why}", yellow=True, bold=True)


def _missing_server(report: object) -> tuple[str, str] | None:
    """Return which server a test was skipped for, and what is wrong with it, if it was skipped for one."""
    reason = getattr(report, "skipped", False) and getattr(report, "longrepr", None)
    found = re.match(r"Skipped: ([\w ]+) is missing: (.*)", reason[2]) if isinstance(reason, tuple) else None
    return None if found is None else (found[1], found[2])


def _is_missing(what: str) -> bool:
    return what.startswith("not found")


# ---- coroutines -------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """Run a test that is a coroutine function on a loop of its own; without a loop, if its application is one of threads.

    The applications among its fixtures see at its end that no connection is in use, and close what belongs to the loop.
    """
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    if any(isinstance(application, InThreads) for application in given.values()):
        driven(pyfuncitem.obj(**given))
        return True

    async def supervised() -> None:
        async with AsyncExitStack() as stack:
            for application in given.values():
                if isinstance(application, Awaited):
                    await stack.enter_async_context(application.supervised())
            await pyfuncitem.obj(**given)

    asyncio.run(supervised())
    return True


# ---- the environment ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the developer's reaches a test: neither a variable nor a `.env` file."""
    forget_variables(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def clean_logging() -> Iterator[None]:
    """What a framework makes of the root logger, as Litestar does, does not reach the next test."""
    level, handlers = logging.root.level, logging.root.handlers[:]
    yield
    logging.root.setLevel(level)
    for handler in logging.root.handlers[:]:
        if handler not in handlers and not type(handler).__module__.startswith("_pytest"):
            logging.root.removeHandler(handler)


# ---- servers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = started(PostgresServer)
    yield server
    server.close()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDBServer]:
    server = started(MariaDBServer)
    yield server
    server.close()


@pytest.fixture
def new_postgres() -> Iterator[Callable[..., PostgresServer]]:
    """`new_postgres(version=18, settings={...})` starts a server of the test's own; all end with the test."""
    with ExitStack() as stack:

        def new(version: int = 18, *, settings: Mapping[str, Setting] | None = None) -> PostgresServer:
            server = started(lambda: PostgresServer(version, settings=settings))
            stack.callback(server.close)
            return server

        yield new


@pytest.fixture
def new_standby() -> Iterator[Callable[[PostgresServer], PostgresStandby]]:
    """`new_standby(primary)` starts a streaming replica of a server; all end with the test."""
    with ExitStack() as stack:

        def new(primary: PostgresServer) -> PostgresStandby:
            standby = started(lambda: PostgresStandby(primary))
            stack.callback(standby.close)
            return standby

        yield new


@pytest.fixture
def new_mariadb() -> Iterator[Callable[..., MariaDBServer]]:
    """`new_mariadb(settings={...})` starts a server of the test's own; all end with the test."""
    with ExitStack() as stack:

        def new(*, settings: Mapping[str, Setting] | None = None) -> MariaDBServer:
            server = started(lambda: MariaDBServer(settings=settings))
            stack.callback(server.close)
            return server

        yield new


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    server = made(RedisServer)
    yield server
    server.close()


@pytest.fixture
def broker(redis: RedisServer) -> str:
    """The URL of an empty Redis."""
    redis.flush()
    return redis.url()


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A headless Chromium, driven by Playwright, whose event loop runs in this thread until the test has ended."""
    program = made(chromium_program)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=list(QUIET))


# ---- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the wheel is installed, without what it depends on."""
    return install(tmp_path_factory.mktemp("installed"))


# ---- databases ------------------------------------------------------------------------------------------------------


def _fresh_urls(server: Server) -> Iterator[Callable[[], str]]:
    with ExitStack() as stack:

        def new() -> str:
            return server.url(stack.enter_context(server.lend_database()))

        yield new


@pytest.fixture
def new_sqlite_url(tmp_path: Path) -> Callable[[], str]:
    return lambda: f"sqlite:///{tmp_path / f'test_{next(_numbers)}.db'}"


@pytest.fixture
def new_postgres_url(postgres: PostgresServer) -> Iterator[Callable[[], str]]:
    yield from _fresh_urls(postgres)


@pytest.fixture
def new_mariadb_url(mariadb: MariaDBServer) -> Iterator[Callable[[], str]]:
    yield from _fresh_urls(mariadb)


@pytest.fixture(params=DATABASES)
def new_database_url(request: pytest.FixtureRequest) -> Callable[[], str]:
    name = {"postgresql": "new_postgres_url"}.get(request.param, f"new_{request.param}_url")
    factory: Callable[[], str] = request.getfixturevalue(name)
    return factory


@pytest.fixture
def sqlite_url(new_sqlite_url: Callable[[], str]) -> str:
    return new_sqlite_url()


@pytest.fixture
def postgres_url(new_postgres_url: Callable[[], str]) -> str:
    return new_postgres_url()


@pytest.fixture
def mariadb_url(new_mariadb_url: Callable[[], str]) -> str:
    return new_mariadb_url()


@pytest.fixture
def database_url(new_database_url: Callable[[], str]) -> str:
    return new_database_url()
