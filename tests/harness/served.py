"""The frameworks' application in a process of its own, on a real server.

    with served("FastAPI", "uvicorn", postgres, {"writer": url}) as site:
        site.post("add-async", name="a")

The process reads what to serve from the variable SERVED. `python -m harness.served` runs the servers that are libraries;
gunicorn and pserve import this module.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
from sqlalchemy import text

from harness.applications import Application, running
from harness.frameworks import FRAMEWORKS, SET_UP, THERE, Doings, Framework
from harness.paths import ROOT
from harness.servers import PostgresServer, ServerFailed, free_port, guarded, quick_tempdir
from harness.webs import client

SERVED = "SERVED"


# ---- in the process that serves ---------------------------------------------------------------------------------------------


def application() -> Any:
    """Return the application that SERVED describes."""
    given = json.loads(os.environ[SERVED])
    framework = FRAMEWORKS[given["framework"]]
    outer, *others = (Application(each) for each in given["databases"])
    doings = Doings(outer, others[0] if others else None)
    inner = Doings(others[1]) if len(others) > 1 else None
    whole = framework.application(doings, inner, **given["options"])
    return _with_container(framework.interface, whole, others[0]) if others else whole


def _with_container(interface: str, app: Any, other: Application) -> Any:
    """Put the middleware of another container around an application."""
    from app_db.integrations import asgi, wsgi

    if interface == "aiohttp":
        from app_db.integrations.aiohttp import setup

        setup(app, other.container)
        return app
    return {"asgi": asgi, "wsgi": wsgi}[interface].UnitOfWorkMiddleware(app, other.container)


def for_pserve(global_config: object, **settings: str) -> Any:
    """Return the application, as an ini file's `use = call:...` asks for it."""
    return application()


def _by_uvicorn(port: int) -> None:
    import uvicorn

    uvicorn.run(application(), host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=3)


def _by_hypercorn(port: int) -> None:
    import asyncio

    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.graceful_timeout = 3
    asyncio.run(serve(application(), config))


def _by_waitress(port: int) -> None:
    import waitress

    waitress.serve(application(), host="127.0.0.1", port=port, threads=24)


def _by_aiohttp(port: int) -> None:
    from aiohttp import web

    web.run_app(application(), host="127.0.0.1", port=port, access_log=None, shutdown_timeout=3, print=None)


# ---- in the test ------------------------------------------------------------------------------------------------------------


def _command(server: str, port: int, directory: Path) -> list[str]:
    """Return what starts a server."""
    gunicorn = ["gunicorn", "--bind", f"127.0.0.1:{port}", "--threads", "8", "harness.served:application()"]
    if server.startswith("gunicorn"):
        workers = ["--workers", "3", *(["--preload"] if server.endswith("preload") else [])]
        return [sys.executable, "-m", *gunicorn, *workers]
    if server == "pserve":
        ini = directory / "shop.ini"
        ini.write_text(
            "[app:main]\nuse = call:harness.served:for_pserve\n"
            f"[server:main]\nuse = egg:waitress#main\nlisten = 127.0.0.1:{port}\nthreads = 24\n"
        )
        return [sys.executable, "-c", "from pyramid.scripts.pserve import main; main()", str(ini)]
    return [sys.executable, "-m", "harness.served", server, str(port)]


class Site:
    """An application on a real server, its databases, and a client."""

    def __init__(
        self,
        framework: Framework,
        databases: PostgresServer,
        apps: Sequence[Application],
        address: str,
        process: subprocess.Popen[bytes],
    ) -> None:
        self.framework, self.databases, self.address, self.process = framework, databases, address, process
        self.app, *self.others = apps
        self.client = client(address)

    # ---- what clients do

    def post(self, path: str, body: bytes = b"", /, **query: Any) -> httpx.Response:
        """Send a request on a connection of its own: some servers close that of an application that raised."""
        headers = {"Connection": "close"}
        return self.client.post(f"/{path}", params=query, content=body, headers=headers)

    @property
    def names(self) -> list[str]:
        """The items in the first database, without those that were there from the beginning."""
        return self.names_in(self.app)

    def names_in(self, app: Application, connection: str = "writer") -> list[str]:
        return [name for name in app.names(connection) if name not in THERE]

    @contextmanager
    def request(self, path: str, **query: str) -> Iterator[None]:
        """Send a request. At the end of the block, go without having read the answer."""
        host, port = self.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            target = f"/{path}?{urlencode(query)}"
            connection.sendall(f"POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
            yield

    # ---- what the databases know

    def _of_each_database(self) -> Iterator[str]:
        for app in (self.app, *self.others):
            for name in app.connections:
                yield str(app.plain_engine(name).url.database)

    def activity(self) -> dict[object, object]:
        """Return what each connection of the server has done last: by its process, when its state has changed."""
        statement = """
            SELECT pid, state_change FROM pg_stat_activity
            WHERE datname = %s AND application_name <> 'app_db tests' AND backend_type = 'client backend'
            """
        rows = [self.databases.execute(statement, [each]) for each in self._of_each_database()]
        return {pid: changed for each in rows for pid, changed in each}

    def settled(self) -> None:
        """Wait until no transaction is open."""
        for each in self._of_each_database():
            assert self.databases.open_transactions(each, within=20) == []

    def prepared(self) -> list[str]:
        """Return the ids of prepared transactions."""
        return [gid for each in self._of_each_database() for gid in self.databases.prepared_transactions(each)]

    @contextmanager
    def locked(self, lock: int) -> Iterator[Callable[[], bool]]:
        """Hold an advisory lock of the first database. The block gets a function that says whether a statement waits for it."""
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = :lock AND NOT granted"
        with self.app.plain_engine().connect() as holding, self.app.plain_engine().connect() as looking:
            holding.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
            looking.execution_options(isolation_level="AUTOCOMMIT")
            yield lambda: bool(looking.scalar(text(waiting), {"lock": lock}))

    # ---- the end

    def kill(self) -> None:
        """Kill the server, and the processes that it has started, as `kill -9` does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(
    framework: str,
    server: str,
    databases: PostgresServer,
    *containers: Mapping[str, str],
    two_phase: bool = False,
    **options: Any,
) -> Iterator[Site]:
    """Serve an application. `containers` are the URLs of its container, of another one, and of an application inside."""
    settings: dict[str, Any] = {"two_phase": True} if two_phase else {}
    described = [{name: {"url": url, **settings} for name, url in each.items()} for each in containers]
    with ExitStack() as stack:
        apps = [stack.enter_context(running("strict", **each)) for each in described]
        for app in apps:
            for name in app.connections:
                app.run(*SET_UP, on=name)
        yield stack.enter_context(served_again(framework, server, databases, apps, described, **options))


@contextmanager
def served_again(
    framework: str,
    server: str,
    databases: PostgresServer,
    apps: Sequence[Application],
    described: Sequence[Mapping[str, Any]],
    **options: Any,
) -> Iterator[Site]:
    """Serve an application on databases that are set up. `described` are the connections of `apps`."""
    with ExitStack() as stack:
        given = {"framework": framework, "databases": described, "options": options}
        process, address = _started(server, given, stack)
        site = Site(FRAMEWORKS[framework], databases, apps, address, process)
        stack.callback(site.client.close)
        yield site


def _started(server: str, given: dict[str, Any], stack: ExitStack) -> tuple[subprocess.Popen[bytes], str]:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="app_db-served-", dir=quick_tempdir())))
    port = free_port()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            _command(server, port, directory),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            env={**os.environ, "PYTHONPATH": path, SERVED: json.dumps(given)},
            start_new_session=True,
        )
    guard = guarded(-process.pid, directory)
    stack.callback(_ended, process, guard)
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return process, f"http://127.0.0.1:{port}"
        time.sleep(0.05)
    raise ServerFailed(f"{server} did not start: {(directory / 'log').read_text()[-3000:]}")


def _ended(process: subprocess.Popen[bytes], guard: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the processes that it has started
    process.wait()
    with suppress(BrokenPipeError):
        guard.communicate(b"done\n")


if __name__ == "__main__":
    _, wanted, on = sys.argv
    by = {"uvicorn": _by_uvicorn, "hypercorn": _by_hypercorn, "waitress": _by_waitress, "aiohttp": _by_aiohttp}
    by[wanted](int(on))
