"""Probes of `/livez` and `/readyz`, on real servers, alone and mounted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from wsgiref.validate import validator

import httpx
import pytest
from fastapi import FastAPI
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db.errors import InvalidUse
from app_db.integrations.health import asgi_health, wsgi_health
from harness.requiring import need
from harness.webs import client, serving, serving_wsgi

DEAD = "postgresql://shop:s3cr3t@127.0.0.1:1/shop"

Serve = Callable[[DatabaseContainer], Any]


def by_asgi(container: DatabaseContainer) -> Any:
    return serving(asgi_health(container, timeout=10))


def by_wsgi(container: DatabaseContainer) -> Any:
    return serving_wsgi(validator(wsgi_health(container, timeout=10)))


def mounted_by_asgi(container: DatabaseContainer) -> Any:
    app = FastAPI()
    app.mount("/health", asgi_health(container, timeout=10))
    return below_health(serving(app))


def mounted_by_wsgi(container: DatabaseContainer) -> Any:
    from flask import Flask

    app = Flask(__name__)
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/health": wsgi_health(container, timeout=10)})  # type: ignore[method-assign]
    return below_health(serving_wsgi(app))


@contextmanager
def below_health(served: Any) -> Iterator[str]:
    with served as address:
        yield f"{address}/health"


WAYS = [by_asgi, by_wsgi, mounted_by_asgi, mounted_by_wsgi]


@contextmanager
def container_with(**connections: Any) -> Iterator[DatabaseContainer]:
    settings = DatabaseSettings(_env_file=None, connections=connections)
    container = container_of(*connections)(settings=settings)
    container.writer_engine().dispose()
    yield container
    container.shutdown_resources()


@pytest.fixture
def sound(sqlite_url: str) -> Iterator[DatabaseContainer]:
    with container_with(writer={"url": sqlite_url}) as container:
        container.writer_engine().connect().close()
        yield container


@pytest.mark.representative("by_asgi", "mounted_by_wsgi")
@pytest.mark.parametrize("serve", WAYS)
def test_probes_are_answered(serve: Serve, sound: DatabaseContainer) -> None:
    with serve(sound) as address, client() as one:
        live, ready = one.get(f"{address}/livez"), one.get(f"{address}/readyz")
        assert (live.status_code, live.json()) == (200, {"status": "pass"})
        assert (ready.status_code, ready.json()["status"]) == (200, "pass")
        assert ready.json()["checks"]["writer:responseTime"][0]["status"] == "pass"
        for answer in (live, ready):
            assert answer.headers["content-type"] == "application/health+json"
            assert answer.headers["cache-control"] == "no-store"
            head = one.head(str(answer.url))
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == "application/health+json"
        for path in ("/", "/livez/", "/readyz/x", "/other"):
            assert one.get(f"{address}{path}").status_code == 404
        posted = one.post(f"{address}/readyz")
        assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.representative("by_wsgi")
@pytest.mark.parametrize("serve", [by_asgi, by_wsgi])
def test_a_required_database_that_is_down_makes_the_process_unready_and_not_dead(serve: Serve, sqlite_url: str) -> None:
    with container_with(writer={"url": sqlite_url}, warehouse={"url": DEAD}) as container:
        container.writer_engine().connect().close()
        with serve(container) as address, client() as one:
            ready = one.get(f"{address}/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, "fail")
            assert ready.json()["output"].startswith("warehouse: ")
            assert "s3cr3t" not in ready.text
            assert one.head(f"{address}/readyz").status_code == 503
            assert one.get(f"{address}/livez").status_code == 200
    with container_with(writer={"url": sqlite_url}, warehouse={"url": DEAD, "required": False}) as container:
        container.writer_engine().connect().close()
        with serve(container) as address, client() as one:
            ready = one.get(f"{address}/readyz")
            assert (ready.status_code, ready.json()["status"]) == (200, "warn")


@pytest.mark.parametrize("serve", [by_asgi, by_wsgi])
def test_settings_that_are_wrong_make_the_process_unready_and_not_dead(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", DEAD)
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__POOL__SIZ", "s3cr3t")
    with serve(container_of("writer")()) as address, client() as one:
        ready = one.get(f"{address}/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "fail")
        assert ready.headers["content-type"] == "application/health+json"
        assert "APP_DB_CONNECTIONS__WRITER__POOL__SIZ: is set, but app_db has no such setting." in ready.json()["output"]
        assert "s3cr3t" not in ready.text
        assert one.get(f"{address}/livez").status_code == 200


def alone(probes: Any) -> Any:
    return probes


def in_fastapi(probes: Any) -> Any:
    app = FastAPI()
    app.mount("/health", probes)
    return app


def in_a_sub_application(probes: Any) -> Any:
    app = FastAPI()
    app.mount("/shop", in_fastapi(probes))
    return app


@pytest.mark.parametrize(
    ("mount", "root", "path"),
    [
        (in_fastapi, "", "/health"),
        (in_fastapi, "/api", "/health"),
        (in_fastapi, "/api", "/api/health"),
        (in_a_sub_application, "", "/shop/health"),
        (in_a_sub_application, "/api", "/api/shop/health"),
        (alone, "/api", ""),
        (alone, "/api", "/api"),
    ],
)
async def test_they_are_found_wherever_they_are_mounted(
    mount: Callable[[Any], Any], root: str, path: str, sound: DatabaseContainer
) -> None:
    """A proxy may leave the root path to the server, as ASGI has it, or strip it."""
    transport = httpx.ASGITransport(mount(asgi_health(sound)), root_path=root)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as one:
        assert (await one.get(f"{path}/livez")).status_code == 200
        assert (await one.get(f"{path}/other")).status_code == 404


def test_livez_asks_no_database() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        url = f"postgresql://shop@127.0.0.1:{silent.getsockname()[1]}/shop"
        with container_with(writer={"url": url}) as container, by_wsgi(container) as address, client() as one:
            assert one.get(f"{address}/livez").status_code == 200
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_the_loop_answers_others_while_a_database_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://shop@127.0.0.1:{silent.getsockname()[1]}/shop"
        with container_with(writer={"url": url}) as container, serving(asgi_health(container, timeout=1)) as address:
            answers: list[httpx.Response] = []

            def ask() -> None:
                with client() as one:
                    answers.append(one.get(f"{address}/readyz"))

            asking = threading.Thread(target=ask)
            asking.start()
            connected, _ = silent.accept()  # so the database is being asked
            with connected, client() as one:
                assert one.get(f"{address}/livez").status_code == 200
                assert answers == []
            asking.join()
            assert answers[0].status_code == 503


def test_a_web_socket_is_refused(sound: DatabaseContainer) -> None:
    need("websockets")
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    with by_asgi(sound) as address, pytest.raises(InvalidStatus, match="403"):
        connect(f"{address.replace('http', 'ws')}/readyz", proxy=None)


@pytest.mark.parametrize("wrong", [container_of("writer"), None, "container"])
@pytest.mark.parametrize("make", [asgi_health, wsgi_health])
def test_what_is_no_container_is_refused(make: Callable[[Any], Any], wrong: object) -> None:
    with pytest.raises(InvalidUse, match="is no database container"):
        make(wrong)


def poolz_by_asgi(container: DatabaseContainer) -> Any:
    return serving(asgi_health(container, pools=True))


def poolz_by_wsgi(container: DatabaseContainer) -> Any:
    return serving_wsgi(validator(wsgi_health(container, pools=True)))


@pytest.mark.parametrize("serve", [poolz_by_asgi, poolz_by_wsgi])
def test_the_pools_are_told_where_that_is_asked_for(serve: Serve, sqlite_url: str) -> None:
    pool = {"max_overflow": -1, "stacks": True}
    with container_with(writer={"url": sqlite_url, "pool": pool}) as container, serve(container) as address, client() as one:
        with container.transaction() as unit:
            number = unit.number
            container.connection("writer").session().connection()
            answer = one.get(f"{address}/poolz")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        told = answer.json()["pools"]["writer"]
        [holder] = told.pop("holders")
        assert told == {"connection": "writer", "in_use": 1, "idle": 0, "most": None, "is_full": False}
        assert (holder["unit"], holder["owner"]) == (number, "thread 'MainThread'")
        assert holder["begun_at"].endswith(" in test_the_pools_are_told_where_that_is_asked_for")
        assert "stack" not in holder
        assert one.get(f"{address}/other").json()["output"] == "ask /livez, /readyz or /poolz"
        assert one.post(f"{address}/poolz").status_code == 405


@pytest.mark.representative("by_asgi")
@pytest.mark.parametrize("serve", [by_asgi, by_wsgi])
def test_the_pools_are_not_told_otherwise(serve: Serve, sound: DatabaseContainer) -> None:
    with serve(sound) as address, client() as one:
        assert one.get(f"{address}/poolz").status_code == 404


@pytest.mark.parametrize("make", [asgi_health, wsgi_health])
def test_the_pools_are_told_or_not(make: Callable[..., Any], sound: DatabaseContainer) -> None:
    with pytest.raises(InvalidUse, match="Give True to have /poolz answered"):
        make(sound, pools="writer")


@pytest.mark.parametrize("wrong", [0, -1, "2", True, None, float("inf"), float("nan"), 1e10])
@pytest.mark.parametrize("make", [asgi_health, wsgi_health])
def test_a_time_limit_that_is_none_is_refused_before_the_first_probe(
    make: Callable[..., Any], wrong: Any, sound: DatabaseContainer
) -> None:
    with pytest.raises(InvalidUse, match=rf"{make.__name__}\(timeout=.*Give seconds, more than 0 and up to 3600"):
        make(sound, timeout=wrong)


SERVED = """
import sys
from app_db import DatabaseSettings, container_of
from app_db.integrations.health import wsgi_health

connections = {"writer": {"url": "sqlite:///shop.db"}}
container = container_of("writer")(settings=DatabaseSettings(_env_file=None, connections=connections))
container.writer_engine().connect().close()
container.health()  # before gunicorn forks
application = wsgi_health(container)
if __name__ == "__main__":
    import waitress

    waitress.serve(application, host="127.0.0.1", port=int(sys.argv[1]))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("server", ["waitress", "gunicorn"])
def test_servers_of_wsgi_answer_too(server: str, tmp_path: Any) -> None:
    need(server)
    (tmp_path / "probed.py").write_text(SERVED)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    commands = {
        "waitress": ["probed.py", str(port)],
        "gunicorn": ["-m", "gunicorn", "--preload", "--workers", "2", "--bind", f"127.0.0.1:{port}", "probed:application"],
    }
    process = subprocess.Popen([sys.executable, *commands[server]], cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        ready = first_answer(f"http://127.0.0.1:{port}/readyz", process)
        assert (ready.status_code, ready.json()["status"]) == (200, "pass")
        with client() as one:
            head = one.head(f"http://127.0.0.1:{port}/readyz")
            assert (head.status_code, head.content) == (200, b"")
    finally:
        process.terminate()
        process.communicate(timeout=20)


def first_answer(url: str, process: subprocess.Popen[bytes]) -> httpx.Response:
    deadline = time.monotonic() + 30
    while True:
        try:
            with client() as one:
                return one.get(url)
        except httpx.ConnectError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_document_is_what_the_draft_asks_for(sound: DatabaseContainer) -> None:
    document = json.loads(json.dumps(sound.health(timeout=10).as_json()))
    assert document["status"] in ("pass", "warn", "fail")
    for name, measured in cast("dict[str, list[dict[str, Any]]]", document["checks"]).items():
        component, _, measurement = name.partition(":")
        assert component == "writer"
        assert measurement in ("responseTime", "connections")
        for check in measured:
            assert check["componentType"] == "datastore"
            assert check["status"] == "pass"
            assert check["time"].endswith("Z")
            assert isinstance(check["observedValue"], (int, float))
