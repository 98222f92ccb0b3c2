"""A request beside the same application without app_db, each on a real server, sent by one client
that keeps its connection open: the time of a request, the memory of a request in flight, and how
long the event loop stands still.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
from sqlalchemy import create_engine

from databases import Databases, Place
from harness.servers import free_port
from measuring import Batch, Effort, Measured, measure, on_server_core
from tables import duration, heading, limited, line
from web_contestants import Base

ROUNDS = 200
WITHOUT_SESSION = 1.03
IN_FLIGHT = 500
AT_ONCE = 200


def run(databases: Databases, effort: Effort) -> None:
    """Print the tables."""
    with databases.postgres_socket("psycopg") as place:
        heading("A request without a session", "framework", "without app_db", "with app_db")
        for framework, bare in (("fastapi", "fastapi_by_hand"), ("starlette", "starlette_bare"), ("flask", "flask_by_hand")):
            measured = _measured(place, effort, "nothing", bare, f"{framework}_with_app_db")
            first, second = measured.values()
            line([framework, duration(first.seconds), limited(second, WITHOUT_SESSION)])
        heading(
            "A request that adds a row", "framework", "`sessionmaker.begin()` in the endpoint", "by a dependency", "with app_db"
        )
        for framework, path in (("fastapi", "add"), ("fastapi", "add-sync"), ("flask", "add")):
            names = [f"{framework}_by_hand", f"{framework}_with_app_db"]
            names += ["fastapi_by_dependency"] if (framework, path) == ("fastapi", "add") else []
            measured = _measured(place, effort, path, *names)
            dependency = str(measured["fastapi_by_dependency"]) if len(names) > 2 else "not measured"
            title = f"{framework}, {'a coroutine' if (framework, path) == ('fastapi', 'add') else 'a function'}"
            line([title, duration(measured[names[0]].seconds), dependency, str(measured[names[1]])])
        heading("FastAPI under load", "what", "`sessionmaker.begin()` in the endpoint", "with app_db")
        memory = [_memory(place, name) for name in ("fastapi_by_hand", "fastapi_with_app_db")]
        line([f"memory of a request in flight, of {IN_FLIGHT}", *(f"{each / 1024:,.1f} KiB" for each in memory)])
        for path in ("add", "add-sync"):
            still = [_standstill(place, name, path) for name in ("fastapi_by_hand", "fastapi_with_app_db")]
            line([f"longest standstill of the event loop, {AT_ONCE} requests at once, `/{path}`", *map(duration, still)])


def _measured(place: Place, effort: Effort, path: str, *names: str) -> Mapping[str, Measured]:
    with ExitStack() as stack:
        ports = {name: stack.enter_context(_served(name, place)) for name in names}
        batches = {name: stack.enter_context(_requests(port, path)) for name, port in ports.items()}
        for batch in batches.values():
            batch(50)
        return measure(batches, effort, rounds=ROUNDS, seconds=0.02)


@contextmanager
def _served(name: str, place: Place) -> Iterator[int]:
    """Serve a contestant with a database of its own, and give its port."""
    url = place.new()
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()
    port = free_port()
    program = Path(__file__).with_name("web_contestants.py")
    with on_server_core():
        process = subprocess.Popen([sys.executable, str(program), name, str(port), json.dumps(url)])
    try:
        give_up = time.monotonic() + 30
        while time.monotonic() < give_up:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _requests(port: int, path: str) -> Iterator[Batch]:
    """Give what sends so many requests, one after the other, by a connection that stays open."""
    request = f"POST /{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def batch(units: int) -> float:
            began = time.perf_counter()
            for _ in range(units):
                connection.sendall(request)
                answer = b""
                while b"{}" not in answer:
                    part = connection.recv(65536)
                    if not part or b" 500 " in part[:20]:
                        raise RuntimeError(f"/{path} failed: {answer + part!r}")
                    answer += part
            return time.perf_counter() - began

        yield batch


def _memory(place: Place, name: str) -> float:
    """Return the bytes that a request in flight holds."""

    async def main(port: int) -> float:
        async with _client(port) as client:
            await client.post("/nothing")
            before = (await client.post("/asked", params={"what": "trace"})).json()["memory"]
            waiting = [asyncio.create_task(client.post("/wait")) for _ in range(IN_FLIGHT)]
            await asyncio.sleep(2)  # until all of them have come
            during = (await client.post("/asked", params={"what": "memory"})).json()["memory"]
            await client.post("/asked", params={"what": "go-on"})
            await asyncio.gather(*waiting)
            return float(during - before) / IN_FLIGHT

    with _served(name, place) as port:
        return asyncio.run(main(port))


def _standstill(place: Place, name: str, path: str) -> float:
    """Return the longest time for which the event loop stands still under requests at once."""

    async def main(port: int) -> float:
        async with _client(port) as client:
            await asyncio.gather(*(client.post(f"/{path}") for _ in range(AT_ONCE)))
            await client.post("/asked", params={"what": "watch"})
            longest: list[float] = []
            for _ in range(5):
                await asyncio.gather(*(client.post(f"/{path}") for _ in range(AT_ONCE)))
                longest.append((await client.post("/asked", params={"what": "standstill"})).json()["standstill"])
            return longest[-1]

    with _served(name, place) as port:
        return asyncio.run(main(port))


def _client(port: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=IN_FLIGHT + 10)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False, limits=limits)
