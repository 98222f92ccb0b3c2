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
        heading("A request that adds a row", "framework", "`sessionmaker.begin()` in the endpoint", "with app_db")
        for title, path, framework in (
            ("fastapi, a coroutine", "add", "fastapi"),
            ("fastapi, a function", "add-sync", "fastapi"),
            ("flask", "add", "flask"),
        ):
            measured = _measured(place, effort, path, f"{framework}_by_hand", f"{framework}_with_app_db")
            first, second = measured.values()
            line([title, duration(first.seconds), str(second)])
        heading("The same by a dependency that yields the session", "framework", "in the endpoint", "by a dependency")
        first, second = _measured(place, effort, "add", "fastapi_by_hand", "fastapi_by_dependency").values()
        line(["fastapi, a coroutine", duration(first.seconds), str(second)])
        heading("FastAPI under load", "what", "`sessionmaker.begin()` in the endpoint", "with app_db")
        in_flight, at_once = (20, 10) if effort.quick else (IN_FLIGHT, AT_ONCE)
        by_hand, ours = (_memory(place, name, in_flight) for name in ("fastapi_by_hand", "fastapi_with_app_db"))
        line([f"memory of a request in flight, of {in_flight}", f"{by_hand / 1024:,.1f} KiB", f"{ours / by_hand:.2f}"])
        for path in ("add", "add-sync"):
            by_hand, ours = (_standstill(place, name, path, at_once) for name in ("fastapi_by_hand", "fastapi_with_app_db"))
            what = f"longest standstill of the event loop, {at_once} requests at once, `/{path}`"
            line([what, duration(by_hand), f"{ours / by_hand:.2f}"])


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


def _memory(place: Place, name: str, in_flight: int) -> float:
    """Return the bytes that a request in flight holds."""

    async def main(port: int) -> float:
        async with _client(port) as client:
            await client.post("/nothing")
            before = (await client.post("/asked", params={"what": "trace"})).json()["memory"]
            waiting = [asyncio.create_task(client.post("/wait")) for _ in range(in_flight)]
            await asyncio.sleep(in_flight / 250)  # until all of them have come
            during = (await client.post("/asked", params={"what": "memory"})).json()["memory"]
            await client.post("/asked", params={"what": "go-on"})
            await asyncio.gather(*waiting)
            return float(during - before) / in_flight

    with _served(name, place) as port:
        return asyncio.run(main(port))


def _standstill(place: Place, name: str, path: str, at_once: int) -> float:
    """Return the longest time for which the event loop stands still under requests at once."""

    async def main(port: int) -> float:
        async with _client(port) as client:
            await asyncio.gather(*(client.post(f"/{path}") for _ in range(at_once)))
            await client.post("/asked", params={"what": "watch"})
            longest: list[float] = []
            for _ in range(5):
                await asyncio.gather(*(client.post(f"/{path}") for _ in range(at_once)))
                longest.append((await client.post("/asked", params={"what": "standstill"})).json()["standstill"])
            return longest[-1]

    with _served(name, place) as port:
        return asyncio.run(main(port))


def _client(port: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=IN_FLIGHT + 10, keepalive_expiry=1)  # uvicorn closes idle connections after 5 s
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False, limits=limits)
