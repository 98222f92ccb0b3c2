"""One list of cases for all web frameworks, on real servers: what the client hears is what the database holds.

`PYTHONPATH=tests python -m integrations.test_every_framework` prints the list and the frameworks, and writes them into
docs/every-framework.md.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from harness.applications import running
from harness.commands import app_db
from harness.crashing import variables
from harness.environments import forget_variables
from harness.frameworks import COMMIT_LOCK, FRAMEWORKS, LOCK, SET_UP, THERE
from harness.paths import ROOT
from harness.served import Site, served, served_again
from harness.servers import PostgresServer
from harness.webs import client

NewUrl = Callable[[], str]
Case = Callable[[Site], None]

DOCUMENT = ROOT / "docs" / "every-framework.md"
CASES: dict[str, tuple[str, Case]] = {}
"""By name: what is right, and the test of it."""


MANY = "500 requests of all kinds, 20 at once"


def case(name: str, right: str) -> Callable[[Case], Case]:
    def note(function: Case) -> Case:
        CASES[name] = right, function
        return function

    return note


def add_path(site: Site) -> str:
    """Return a route that adds an item, in the framework's own way."""
    return "add-sync" if site.framework.interface == "wsgi" else "add-async"


def check(site: Site, path: str, heard: int, /, *, is_kept: bool, **query: Any) -> httpx.Response:
    """Send a request. Look at the answer, and at the databases as soon as it is there."""
    name = f"item {random.randrange(10**12)}"
    answer = site.post(path, name=name, **query)
    assert (path, query, answer.status_code, answer.text) == (path, query, heard, answer.text)
    for connection in site.app.connections:
        assert (path, query, name in site.names_in(site.app, connection)) == (path, query, is_kept)
    return answer


# ---- the list -----------------------------------------------------------------------------------------------------------------


@case("a request without a session", "opens no connection and no transaction")
def nothing_is_opened(site: Site) -> None:  # the first case: nothing is connected yet
    before = site.activity()
    assert site.client.get("/nothing").status_code == 200
    assert site.activity() == before
    check(site, add_path(site), 201, is_kept=True)
    site.settled()
    before = site.activity()
    assert site.client.get("/nothing").status_code == 200
    assert site.activity() == before


@case("success", "commits before the client hears it")
def success(site: Site) -> None:
    with site.client.stream("POST", "/stream", params={"name": "streamed"}) as answer:
        assert (answer.status_code, "streamed" in site.names) == (200, True)
    check(site, add_path(site), 201, is_kept=True)


@case("COMMIT fails", "500, and no row")
def commit_fails(site: Site) -> None:
    for path in (add_path(site), "stream", "redirect", "in-background"):
        before = site.names
        assert (path, site.post(path, name="taken").status_code) == (path, 500)
        assert site.names == before
    check(site, add_path(site), 201, is_kept=True)


@case("the handler of errors", "gets the original error of a COMMIT")
def handler_gets_the_error(site: Site) -> None:
    said = site.post(add_path(site), name="taken").text  # of the server, where there is no such handler
    assert "".join(said.split()) == '{"handled":"IntegrityError"}'


@case("4xx returned", "aborts")
def refused(site: Site) -> None:
    check(site, add_path(site), 409, is_kept=False, status=409)


@case("4xx by the framework's own exception", "aborts")
def aborted(site: Site) -> None:
    check(site, "fail", 409, is_kept=False, kind="http")


@case("an exception with a handler, which reads", "reads what the unit wrote; a 4xx aborts")
def handled(site: Site) -> None:
    answer = check(site, "fail", 409, is_kept=False, kind="handled")
    assert any(name.startswith("item ") for name in set(answer.json()["names"]) - set(site.names))


@case("raised", "aborts")
def raised(site: Site) -> None:
    assert check(site, "fail", 500, is_kept=False, kind="boom").json() == {"handled": "Boom"}


@case("5xx returned", "aborts")
def failed(site: Site) -> None:
    check(site, add_path(site), 503, is_kept=False, status=503)


@case("redirect", "commits")
def redirected(site: Site) -> None:
    check(site, "redirect", 303, is_kept=True)


@case("veto by the header X-Tm", "of the response; that of a request has no effect")
def veto_by_header(site: Site) -> None:
    path = add_path(site)
    check(site, path, 409, is_kept=True, status=409, tm="commit")
    check(site, path, 201, is_kept=False, tm="abort")
    check(site, path, 201, is_kept=True, tm="something else")
    answer = site.client.post(f"/{path}", params={"name": "by request"}, headers={"X-Tm": "abort"})
    assert (answer.status_code, "by request" in site.names) == (201, True)


@case("veto by the route", "aborts")
def veto_by_route(site: Site) -> None:
    check(site, "doom", 200, is_kept=False)


@case("sync endpoint", "commits, or aborts")
def sync_endpoint(site: Site) -> None:
    check(site, "add-sync", 201, is_kept=True)
    check(site, "add-sync", 404, is_kept=False, status=404)
    assert site.post("add-sync", name="taken").status_code == 500


@case("async endpoint", "commits, or aborts")
def async_endpoint(site: Site) -> None:
    check(site, "add-async", 201, is_kept=True)
    check(site, "add-async", 404, is_kept=False, status=404)
    assert site.post("add-async", name="taken").status_code == 500


@case("stream", "commits before it begins; a session asked for in it is refused")
def stream(site: Site) -> None:
    said = check(site, "stream", 200, is_kept=True).text
    assert said.startswith("first;The 'writer' session was used")
    assert "with container.transaction():" in said


@case("work after the response", "has no unit, is told how to begin one, and does")
def background(site: Site) -> None:
    name = f"task {random.randrange(10**9)}"
    assert site.post("in-background", name=name).status_code == 200
    eventually(lambda: f"after {name}: begin another" in site.names)


@case("web socket", "has no unit, is told how to begin one, and does")
def web_socket(site: Site) -> None:
    with connect(f"{site.address.replace('http', 'ws')}/socket", proxy=None) as socket:
        assert "with container.transaction():" in str(socket.recv())
    eventually(lambda: "by the socket" in site.names)


@case("the client goes during the request", "aborts")
def client_goes(site: Site) -> None:
    with site.locked(LOCK) as is_waited_for:
        with site.request("slow", name="for nobody"):
            eventually(is_waited_for)
        assert site.client.get("/nothing").status_code == 200  # by now the server has noticed
    site.settled()
    assert "for nobody" not in site.names


@case("the client goes during COMMIT", "the COMMIT goes on")
def client_goes_in_commit(site: Site) -> None:
    name = f"waits {random.randrange(10**9)}"
    with site.locked(COMMIT_LOCK) as is_waited_for, site.request(add_path(site), name=name):
        eventually(is_waited_for)
    eventually(lambda: name in site.names)
    site.settled()


@case("a COMMIT that waits", "keeps no other request waiting, also that of a plain function")
def commit_waits(site: Site) -> None:
    path = add_path(site) if "sync endpoint" in site.framework.lacks else "add-sync"
    name = f"waits {random.randrange(10**9)}"
    with ThreadPoolExecutor(1) as pool, site.locked(COMMIT_LOCK) as is_waited_for:
        waiting = pool.submit(site.post, path, name=name)
        eventually(is_waited_for)
        assert site.post("nothing").status_code == 200
        assert not waiting.done()
    assert (waiting.result().status_code, name in site.names) == (201, True)


@case("a serialization failure", "is repeated, with the request's body")
def repeated(site: Site) -> None:
    name = f"again {random.randrange(10**9)}"
    answer = site.post("count", b"x" * 100_000, name=name)
    assert (answer.status_code, answer.text) == (200, answer.text)
    assert answer.json() == {"attempts": 2, "bytes": 100_000}
    assert site.names.count(name) == 1


@case("two containers", "each has its unit; the response decides about both")
def two_containers(site: Site) -> None:
    for name, status in (("both", 201), ("neither", 409)):
        assert site.post("two", name=name, status=status).status_code == status
        kept = status == 201
        assert (name in site.names, name in site.names_in(site.others[0])) == (kept, kept)


@case("an application inside another", "has the units of its own container")
def inside(site: Site) -> None:
    path = f"inner/{add_path(site)}"
    for name, status in (("inner", 201), ("inner lost", 409)):
        assert site.post(path, name=name, status=status).status_code == status
        assert (name in site.names, name in site.names_in(site.others[1])) == (False, status == 201)


@case(MANY, "rows are those acknowledged; nothing is left open")
def many(site: Site) -> None:
    before = set(site.names)
    acknowledged = asyncio.run(many_requests(site, 500))
    site.settled()
    for connection in site.app.connections:
        eventually(lambda: sorted(set(site.names_in(site.app, connection)) - before) == sorted(acknowledged))  # noqa: B023
    assert site.prepared() == []


KINDS: list[tuple[str, dict[str, Any], bool]] = [
    ("add", {}, True),
    ("add", {"status": 409}, False),
    ("add-sync", {}, True),
    ("add-async", {"status": 503}, False),
    ("fail", {"kind": "boom"}, False),
    ("fail", {"kind": "handled"}, False),
    ("fail", {"kind": "http"}, False),
    ("stream", {}, True),
    ("redirect", {}, True),
    ("doom", {}, False),
    ("add", {"name": "taken"}, False),
    ("count", {}, True),
    ("nothing", {}, False),
    ("add", {"tm": "abort"}, False),
]
"""A route, its query, and whether an answer below 400 means that there is a row."""


async def many_requests(site: Site, number: int) -> list[str]:
    """Send requests of all kinds, 20 at once. Return the names of the items that were acknowledged."""
    acknowledged: list[str] = []
    at_once = asyncio.Semaphore(20)

    async def one(number: int, client: httpx.AsyncClient) -> None:
        path, query, writes = KINDS[number % len(KINDS)]
        asked = {"name": f"many {number}", **query}
        async with at_once:
            answer = await client.post(f"/{add_path(site) if path == 'add' else path}", params=asked)
        if answer.status_code < 400 and writes:
            acknowledged.append(asked["name"])

    limits = httpx.Limits(max_keepalive_connections=0)  # uvicorn closes the connection of a request whose application raised
    async with httpx.AsyncClient(base_url=site.address, timeout=60, trust_env=False, limits=limits) as client:
        await asyncio.gather(*(one(each, client) for each in range(number)))
    return acknowledged


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    give_up = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def mark_unless(is_ordinary: bool, each: str) -> Any:
    return each if is_ordinary else pytest.param(each, marks=pytest.mark.exhaustive)


# ---- who is tried -------------------------------------------------------------------------------------------------------------


SERVER = {"asgi": "uvicorn", "wsgi": "waitress", "aiohttp": "aiohttp"}
ORDINARY = ("FastAPI", "Flask")
"""What `make test` tries. `make test-all` tries all."""


@pytest.fixture(scope="module", params=[mark_unless(each in ORDINARY, each) for each in FRAMEWORKS])
def site(request: pytest.FixtureRequest, postgres: PostgresServer) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patched:
        forget_variables(patched)  # the fixture of conftest.py that does it comes later
        with opened(request.param, SERVER[FRAMEWORKS[request.param].interface], postgres, 3) as opened_site:
            yield opened_site


@contextmanager
def opened(framework: str, server: str, postgres: PostgresServer, containers: int, **options: Any) -> Iterator[Site]:
    """Serve one of the frameworks, with a database for each of its containers."""
    with ExitStack() as stack:
        urls = [{"writer": postgres.url(stack.enter_context(postgres.lend_database()))} for _ in range(containers)]
        yield stack.enter_context(served(framework, server, postgres, *urls, **options))


def test_what_the_client_hears_is_what_the_database_holds(site: Site) -> None:
    """All cases but the last. Those that a framework lacks must fail, or else the page is wrong."""
    wrong: dict[str, str] = {}
    for name, (_, run) in CASES.items():
        if name == MANY:
            continue
        try:
            run(site)
        except (AssertionError, InvalidStatus) as error:
            if name not in site.framework.lacks:
                wrong[name] = str(error)
        else:
            if name in site.framework.lacks:
                wrong[name] = "passed"
    assert wrong == {}


@pytest.mark.exhaustive
def test_many_requests_at_once_leave_what_was_acknowledged(site: Site) -> None:
    CASES[MANY][1](site)


# ---- on every server, with two databases --------------------------------------------------------------------------------------


SERVERS = {
    "uvicorn": "FastAPI",
    "hypercorn": "Starlette",
    "gunicorn": "Flask",
    "gunicorn --preload": "Flask",
    "waitress": "Pyramid",
    "pserve": "Pyramid with pyramid_tm",
    "aiohttp": "aiohttp",
}
SHORT_LIST = ("success", "COMMIT fails", "4xx returned", "raised", "redirect", "stream", "a serialization failure", MANY)


@contextmanager
def with_two_databases(server: str, postgres: PostgresServer) -> Iterator[Site]:
    """Serve an application whose items go into two databases, by two-phase commit."""
    with ExitStack() as stack:
        names = {name: postgres.url(stack.enter_context(postgres.lend_database())) for name in ("writer", "warehouse")}
        yield stack.enter_context(served(SERVERS[server], server, postgres, names, two_phase=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("server", SERVERS)
def test_two_databases_under_two_phase_commit_on_every_server(server: str, postgres: PostgresServer) -> None:
    with with_two_databases(server, postgres) as site:
        for name in SHORT_LIST:
            if name not in site.framework.lacks:
                CASES[name][1](site)
        assert site.names_in(site.app, "writer") == site.names_in(site.app, "warehouse")


@pytest.mark.exhaustive
@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
def test_a_server_that_is_killed_under_load_leaves_what_clients_have_heard(server: str, postgres: PostgresServer) -> None:
    """kill -9, three times, while 8 clients send requests. Then recovery, and both databases have the same rows."""
    heard: set[str] = set()
    asked: set[str] = set()
    with ExitStack() as stack:
        names = {name: stack.enter_context(postgres.lend_database()) for name in ("writer", "warehouse")}
        settings = {name: {"url": postgres.url(database), "two_phase": True} for name, database in names.items()}
        app = stack.enter_context(running("strict", **settings))
        for name in names:
            app.run(*SET_UP, on=name)
        for turn in range(3):
            with served_again(SERVERS[server], server, postgres, [app], [settings]) as site:
                under_load_until_killed(site, f"turn {turn}", asked, heard)
        app_db("recover", "--grace", "0", environment=variables({"connections": settings}))
        rows, others = (set(app.names(name)) - set(THERE) for name in names)
        assert rows == others
        assert heard <= rows <= asked
        assert len(heard) >= 300
        assert [postgres.prepared_transactions(database) for database in names.values()] == [[], []]


def under_load_until_killed(site: Site, label: str, asked: set[str], heard: set[str]) -> None:
    """Send requests by 8 threads, kill the server once 100 were answered, and note what was asked and acknowledged."""
    enough = threading.Event()
    before = len(heard)

    def keep_asking(thread: int) -> None:
        with client(site.address) as asking:
            for number in count():
                name = f"{label} {thread} {number}"
                asked.add(name)
                try:
                    answer = asking.post(f"/{add_path(site)}", params={"name": name})
                except httpx.HTTPError:
                    return  # the server is gone
                assert answer.status_code == 201
                heard.add(name)
                if len(heard) - before >= 100:
                    enough.set()

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(keep_asking, each) for each in range(8)]
        assert enough.wait(60)
        site.kill()
        for each in asking:
            each.result()


# ---- the page -----------------------------------------------------------------------------------------------------------------


def table() -> str:
    """Return the list of cases and frameworks in Markdown."""
    columns = [name.replace(" BaseHTTPMiddleware", "¹") for name in FRAMEWORKS]
    lines = [f"| case | what is right | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    why: list[str] = []
    for name, (right, _) in CASES.items():
        cells = []
        for framework in FRAMEWORKS.values():
            reason = framework.lacks.get(name)
            if reason is not None and reason not in why:
                why.append(reason)
            cells.append("✓" if reason is None else f"no, {chr(ord('a') + why.index(reason))}")
        lines.append(f"| {name} | {right} | {' | '.join(cells)} |")
    notes = [f"{chr(ord('a') + number)}: {reason}." for number, reason in enumerate(why)]
    return "\n".join([*lines, "", "¹ a BaseHTTPMiddleware, which runs the application in a task of its own.", *notes, ""])


def page() -> str:
    return DOCUMENT.read_text().partition("| case |")[0] + table()


def test_the_page_has_the_list() -> None:
    assert DOCUMENT.read_text() == page()


if __name__ == "__main__":
    print(table())
    DOCUMENT.write_text(page())
