"""Ask the same requests of app_db and of its peers, look at the database after each response, and print what was there.

make compare                                                # all of them
python benchmarks/peers/run.py app_db_fastapi fastapi_yield # two of them
python benchmarks/peers/run.py --write                      # put the tables into docs/compare.md
"""

from __future__ import annotations

import argparse
import ast
import datetime as dt
import json
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psycopg
from websockets.sync.client import connect

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the tests' server

from harness.servers import PASSWORD, USER, PostgresServer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "compare"
PAGE = ROOT / "docs" / "compare.md"
BEGIN, END = "<!-- tables begin: `make compare COMPARE=--write` writes them -->", "<!-- tables end -->"

RIGHT = "right"
NOT_OFFERED = "not offered"
NO_SUCH_THING = "–"  # noqa: RUF001  # a dash
PATIENCE = 8.0
"""Seconds after which what was waited for won't come."""

FRESH = httpx.Limits(max_keepalive_connections=0)
"""A connection for each request: a server may close one that is kept while a request is on its way."""

NEVER = "nothing"  # the name of an item that no request adds

ASGI = ("uvicorn", "websockets", "psycopg[binary]", "sqlalchemy", "greenlet")
WSGI = ("waitress", "psycopg[binary]", "sqlalchemy")

PEERS: dict[str, tuple[str, ...]] = {
    "app_db": (
        *("--editable", f"{ROOT}[postgresql,asyncio]", "fastapi", "starlette", "litestar", "flask"),
        *("pyramid", "pyramid_tm", "pyramid_retry"),
        *("waitress", *ASGI),
    ),
    "fastapi": ("fastapi", *ASGI),
    "fastapi_sqla": ("fastapi-sqla", *ASGI),
    "advanced_alchemy": ("advanced-alchemy", "starlette", "litestar", "fastapi", *ASGI),
    "dishka": ("dishka", "starlette", "fastapi", *ASGI),
    "wireup": ("wireup", "fastapi", "flask", "waitress", *ASGI),
    "flask_sqlalchemy": ("flask-sqlalchemy", *WSGI),
    "pyramid_tm": ("pyramid", "pyramid_tm", "pyramid_retry", "zope.sqlalchemy", *WSGI),
}
"""By environment: what is installed into it."""


@dataclass(frozen=True, eq=False)
class Program:
    """A program, and what it stands for."""

    name: str
    framework: str
    title: str
    peer: str
    distributions: tuple[str, ...] = ()
    module: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Return the kind of its server."""
        return "wsgi" if self.framework in ("Flask", "Pyramid") else "asgi"

    @property
    def path(self) -> Path:
        """Return its file."""
        return HERE / f"{self.module or self.name}.py"

    def constant(self, name: str, default: Any) -> Any:
        """Return a constant of the program. It can't be imported here: its peer is not installed here."""
        for node in ast.parse(self.path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return ast.literal_eval(node.value)  # type: ignore[attr-defined]
        return default


PROGRAMS = (
    Program("app_db_fastapi", "FastAPI", "app_db", "app_db"),
    Program(*("fastapi_yield", "FastAPI", "`yield` dependency", "fastapi", (), "fastapi_yield", {"COMPARE_SCOPE": "request"})),
    Program(
        *("fastapi_yield_function", "FastAPI", '`yield`, `scope="function"`', "fastapi", (), "fastapi_yield"),
        {"COMPARE_SCOPE": "function"},
    ),
    Program("fastapi_sqla_fastapi", "FastAPI", "fastapi-sqla", "fastapi_sqla", ("fastapi-sqla",)),
    Program("advanced_alchemy_fastapi", "FastAPI", "Advanced Alchemy", "advanced_alchemy", ("advanced-alchemy",)),
    Program("dishka_fastapi", "FastAPI", "dishka", "dishka", ("dishka",)),
    Program("wireup_fastapi", "FastAPI", "wireup", "wireup", ("wireup",)),
    Program("app_db_starlette", "Starlette", "app_db", "app_db"),
    Program("advanced_alchemy_starlette", "Starlette", "Advanced Alchemy", "advanced_alchemy", ("advanced-alchemy",)),
    Program("dishka_starlette", "Starlette", "dishka", "dishka", ("dishka",)),
    Program("app_db_litestar", "Litestar", "app_db", "app_db"),
    Program("advanced_alchemy_litestar", "Litestar", "Advanced Alchemy", "advanced_alchemy", ("advanced-alchemy",)),
    Program("app_db_flask", "Flask", "app_db", "app_db"),
    Program("flask_sqlalchemy_flask", "Flask", "Flask-SQLAlchemy", "flask_sqlalchemy", ("Flask-SQLAlchemy",)),
    Program("wireup_flask", "Flask", "wireup", "wireup", ("wireup",)),
    Program("app_db_pyramid", "Pyramid", "app_db", "app_db", ("pyramid_tm", "pyramid-retry")),
    Program("pyramid_tm_pyramid", "Pyramid", "pyramid_tm", "pyramid_tm", ("pyramid_tm", "pyramid-retry", "zope.sqlalchemy")),
)

SCHEMA = """
    CREATE TABLE items (id serial PRIMARY KEY, name text NOT NULL);
    ALTER TABLE items ADD CONSTRAINT one_of_each UNIQUE (name) DEFERRABLE INITIALLY DEFERRED;
    INSERT INTO items (name) VALUES ('taken');
    CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.name LIKE 'slow%') EXECUTE FUNCTION dawdle();
    """
"""A second "taken" makes COMMIT fail.

A name that begins with "slow" makes it take 0.4 s: a client that hears of it earlier looks earlier.
"""

OPEN = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND state <> 'idle'
    """
COMMITTING = f"{OPEN} AND state = 'active' AND query ~ '^(COMMIT|PREPARE)'"
WAITING = f"{OPEN} AND state = 'idle in transaction'"


# ---- a program that runs ---------------------------------------------------------------------------------------------


class Site:
    """A program on a server of its own, with a client, and a look at its databases that it has no part in."""

    def __init__(self, program: Program, server: PostgresServer, databases: Sequence[str], process: Any, port: int) -> None:
        self.program, self.server, self.databases, self.process, self.port = program, server, databases, process, port
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False, limits=FRESH)
        self._looks = [self._look(database) for database in databases]
        self._numbers = count(1)
        self.absent: dict[str, str] = program.constant("NOT_OFFERED", {})

    def _look(self, database: str) -> psycopg.Connection[Any]:
        return psycopg.connect(
            host=self.server.host,
            port=self.server.port,
            user=USER,
            password=PASSWORD,
            dbname=database,
            autocommit=True,
            application_name="onlooker",
        )

    def query(self, sql: str, *parameters: object, second: bool = False) -> Any:
        """Return the first value of a query."""
        row = self._looks[second].execute(sql.encode(), parameters or None).fetchone()
        return row[0] if row else None

    def name(self, prefix: str = "item") -> str:
        """Return a name that was not used yet."""
        return f"{prefix}-{next(self._numbers)}"

    def rows(self, name: str, *, second: bool = False) -> int:
        """Return how many rows a name has."""
        return int(self.query("SELECT count(*) FROM items WHERE name = %s", name, second=second))

    def post(self, path: str, **query: Any) -> str:
        """Return the status of a response, or that there was none."""
        try:
            return str(self.client.post(f"/{path}", params=query).status_code)
        except httpx.HTTPError:
            return "no answer"

    def is_settled(self) -> bool:
        """Return whether no transaction is open any more."""
        return not self.query(OPEN) and not self.query(OPEN, second=True)

    def settled(self) -> str:
        """Wait until no transaction is open, and return "right" or what is left."""
        if not until(self.is_settled):
            return "a transaction is left open"
        prepared = self.query("SELECT count(*) FROM pg_prepared_xacts WHERE database = ANY(%s)", list(self.databases))
        return f"{prepared} left prepared" if prepared else RIGHT

    def close(self) -> None:
        """Close the client and the looks."""
        self.client.close()
        for look in self._looks:
            look.close()


def until(condition: Callable[[], object], patience: float = PATIENCE) -> bool:
    """Return whether a condition came true in time."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Failed(Exception):
    """A program could not be installed, or did not start."""


@contextmanager
def running(program: Program, server: PostgresServer, place: str = "") -> Iterator[Site]:
    """Serve a program for the length of the block, on two fresh databases."""
    databases = [server_database(server) for _ in range(2)]
    urls = [server.url(database) for database in databases]
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    port = listening.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(("APP_DB_", "SQLALCHEMY_"))}
    environment |= {"COMPARE_URL": urls[0], "COMPARE_SECOND_URL": urls[1], "COMPARE_PLACE": place, **program.variables}
    log = BUILD / f"{program.name}{place and f'-{place}'}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [python_of(program.peer), HERE / "serve.py", program.path.stem, program.kind, str(listening.fileno())],
            pass_fds=[listening.fileno()],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    listening.close()
    site = Site(program, server, databases, process, port)
    try:
        if not until(lambda: process.poll() is not None or answers(site), 60) or process.poll() is not None:
            lines = log.read_text().strip().splitlines() or ["it said nothing"]
            raise Failed(f"did not start: {lines[-1]}")
        yield site
    finally:
        site.close()
        process.kill()
        process.wait()
        for database in databases:
            server.drop_database(database)


def answers(site: Site) -> bool:
    """Return whether a server answers."""
    with suppress(httpx.HTTPError):
        return site.client.get("/openapi-or-anything", timeout=2).status_code == 404
    return False


_databases = count(1)


def server_database(server: PostgresServer) -> str:
    """Return a fresh database with the table."""
    name = f"compare{next(_databases)}"
    server.create_database(name)
    server.execute(SCHEMA, database=name)
    return name


# ---- what is asked ---------------------------------------------------------------------------------------------------

Check = Callable[[Site], str]
CHECKS: dict[str, Check] = {}
"""By the line of the table: what is asked. The answer is "right", or what happened instead."""

KEYS: dict[str, str] = {}
"""By the line: the key under which a program says that its peer doesn't offer it."""

KINDS: dict[str, tuple[str, ...]] = {}
"""By the line: the frameworks that can have such a thing; all of them if there is none."""


def line(title: str, *, key: str = "", frameworks: tuple[str, ...] = ()) -> Callable[[Check], Check]:
    """Make a function the line of the table."""

    def add(check: Check) -> Check:
        CHECKS[title], KEYS[title], KINDS[title] = check, key, frameworks
        return check

    return add


ASGI_FRAMEWORKS = ("FastAPI", "Starlette", "Litestar")
STARLETTES = ("FastAPI", "Starlette")


def judged(status: str, rows: int, wanted_status: str, wanted_rows: int) -> str:
    """Return "right", or what happened instead."""
    if (status, rows) == (wanted_status, wanted_rows):
        return RIGHT
    if rows == wanted_rows:
        return status
    return f"{status}, {'row kept' if rows else 'no row'}"


def added(site: Site, path: str, wanted: str, rows: int, prefix: str = "item", **query: Any) -> str:
    """Add an item by a route, and return whether the status and the rows are as wanted."""
    name = site.name(prefix)
    answer = site.post(path, name=name, **query)
    found = site.rows(name)
    if not found:
        until(lambda: site.rows(name), 3 if rows else 0.5)  # it may be committed after the response
        if rows and site.rows(name):
            return f"{answer}, row later"
    return judged(answer, site.rows(name), wanted, rows)


@line("success: committed before the client hears of it")
def success(site: Site) -> str:
    return added(site, "place", "201", 1, "slow")


@line("COMMIT fails: 500 and no row")
def commit_fails(site: Site) -> str:
    before = site.rows("taken")
    status = site.post("place", name="taken")
    until(site.is_settled)
    more = site.rows("taken") - before
    return RIGHT if status == "500" and not more else f"{status}, {'row' if more else 'no row'}"


@line("the framework's own 409 raised: no row")
def http_error(site: Site) -> str:
    return added(site, "fail", "409", 0, kind="http")


@line("an error with a handler, 409: no row")
def handled(site: Site) -> str:
    return added(site, "fail", "409", 0, kind="handled")


@line("that handler reads from the database", key="exception handler reads")
def handler_reads(site: Site) -> str:
    name = site.name()
    status = site.post("fail", name=name, kind="handled")
    return RIGHT if status == "409" else status  # the handler has read, or failed


@line("an error without a handler: 500 and no row")
def raised(site: Site) -> str:
    return added(site, "fail", "500", 0, kind="boom")


@line("409 returned: no row")
def returned_409(site: Site) -> str:
    return added(site, "add", "409", 0, status=409)


@line("503 returned: no row")
def returned_503(site: Site) -> str:
    return added(site, "add", "503", 0, status=503)


@line("redirect: committed")
def redirected(site: Site) -> str:
    return added(site, "redirect", "303", 1, "slow")


@line("veto by a response header: no row", key="veto by header")
def veto_by_header(site: Site) -> str:
    return added(site, "add", "201", 0, tm="abort")


@line("veto by the route, 200: no row")
def veto_by_route(site: Site) -> str:
    return added(site, "veto", "200", 0)


@line("endpoint that is a plain function", key="sync endpoint", frameworks=ASGI_FRAMEWORKS)
def sync_endpoint(site: Site) -> str:
    return added(site, "add-sync", "201", 1, "slow")


@line("stream: committed before its first byte, no transaction while it runs")
def stream(site: Site) -> str:
    name = site.name("slow")
    try:
        with site.client.stream("POST", "/stream", params={"name": name}) as response:
            parts = response.iter_raw()
            next(parts)
            row, still_open = site.rows(name), site.query(OPEN)
            site.post("release")
            for _ in parts:
                pass
    except (httpx.HTTPError, StopIteration):
        return "no answer"
    if row and not still_open:
        return RIGHT
    if row:
        return "a transaction is open while it runs"
    return "row only after the stream" if until(lambda: site.rows(name)) else "no row"


@line("background task: committed before it, no transaction while it runs", frameworks=ASGI_FRAMEWORKS)
def in_background(site: Site) -> str:
    name = site.name()
    status = site.post("in-background", name=name)
    row, still_open = site.rows(name), site.query(OPEN)
    if not row and not still_open:
        until(lambda: site.rows(name), 1)  # it may be about to be sent
        row, still_open = site.rows(name), site.query(OPEN)
    site.post("release")
    if status == "201" and row and not still_open:
        return RIGHT
    if row:
        return "a transaction is open while it runs"
    return f"{status}, row only after the task" if until(lambda: site.rows(name)) else f"{status}, no row"


@line("web socket: a message is committed when it is answered", frameworks=ASGI_FRAMEWORKS)
def web_socket(site: Site) -> str:
    names = [site.name("slow"), site.name("slow")]
    seen = []
    with connect(f"ws://127.0.0.1:{site.port}/messages", proxy=None) as talking:
        for name in names:
            talking.send(name)
            talking.recv(timeout=10)
            seen.append((site.rows(name), site.query(OPEN)))
    return RIGHT if seen == [(1, 0), (1, 0)] else "row later"


@line("the client leaves during the handler: nothing is left open")
def leaves_in_handler(site: Site) -> str:
    with left(site, f"/wait?name={site.name()}"):
        if not until(lambda: site.query(WAITING)):
            return "did not wait"
    until(lambda: not site.query(WAITING), 0.2)  # a server may cancel the handler
    site.post("release")
    return still_serves(site)


@line("the client leaves during COMMIT: nothing is left open")
def leaves_in_commit(site: Site) -> str:
    with left(site, f"/place?name={site.name('slow')}"):
        if not until(lambda: site.query(COMMITTING)):
            return "did not commit"
    return still_serves(site)


def still_serves(site: Site) -> str:
    """Return whether nothing is left open, and the next request is served."""
    verdict, name = site.settled(), site.name()
    if verdict == RIGHT:
        status = site.post("place", name=name)
        verdict = RIGHT if status == "201" and until(lambda: site.rows(name)) else f"then {status}"
    return verdict


@contextmanager
def left(site: Site, path: str) -> Iterator[None]:
    """Send a request, and reset the connection at the end of the block."""
    with socket.create_connection(("127.0.0.1", site.port)) as sending:
        sending.sendall(f"POST {path} HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\n\r\n".encode())
        yield
        sending.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@line("a serialization failure: the request is repeated with its body", key="retry")
def retried(site: Site) -> str:
    name = site.name()
    response = site.client.post("/retry", json={"name": name})
    return judged(str(response.status_code), site.rows(name), "201", 1)


@line("two databases, COMMIT fails in one: no row in the other", key="two databases")
def two_databases(site: Site) -> str:
    name, second = site.name(), site.name()
    if site.post("both", name=name, second=second) != "201" or not until(lambda: site.rows(second, second=True)):
        return "could not write to both"
    first, other = site.name(), site.name()
    statuses = [site.post("both", name=first, second="taken"), site.post("both", name="taken", second=other)]
    until(lambda: site.rows(first) and site.rows(other, second=True), 1)  # they may be committed after the response
    halves = site.rows(first) + site.rows(other, second=True)
    if statuses == ["500", "500"] and not halves:
        return site.settled()
    return f"{' and '.join(dict.fromkeys(statuses))}, {f'{halves} of 2 requests kept a half' if halves else 'no row'}"


@line("a request without a session: no connection, no statement")
def no_session(site: Site) -> str:
    site.settled()
    log, database = site.server.log, site.databases[0]
    before = log.stat().st_size
    for _ in range(5):
        site.client.get("/nothing")
    with log.open("rb") as reading:
        reading.seek(before)
        lines = [text for text in reading.read().decode().splitlines() if f" {database} " in text and " onlooker " not in text]
    return RIGHT if not lines else f"{len(lines)} lines in the server's log for 5 requests"


REQUESTS, CONCURRENCY = 500, 20


@line(f"{REQUESTS} requests of all kinds, {CONCURRENCY} at once: rows are what was acknowledged, nothing is left")
def many(site: Site) -> str:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("place", {}),
        ("fail", {"kind": "http"}),
        ("fail", {"kind": "handled"}),
        ("fail", {"kind": "boom"}),
        ("add", {"status": 409}),
        ("add", {"status": 503}),
        ("redirect", {}),
        ("place", {"name": "taken"}),
        ("stream", {"free": "1"}),
        ("nothing", {}),
    ]
    if site.program.kind == "asgi":
        kinds.append(("in-background", {"free": "1"}))
        if "sync endpoint" not in site.absent:
            kinds.append(("add-sync", {}))

    def ask(number: int) -> tuple[str, str]:
        path, query = kinds[number % len(kinds)]
        if path == "nothing":
            return NEVER, str(site.client.get("/nothing").status_code)
        name = query.get("name", f"many-{number}")
        return name, site.post(path, **{"name": name, **query})

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answered = list(pool.map(ask, range(REQUESTS)))
    promised = {name for name, status in answered if status < "4"} - {NEVER, "taken"}
    until(lambda: promised <= names_of_many(site), 3)  # they may be committed after the responses
    time.sleep(0.5)  # so may be what was refused
    end, rows = site.settled(), names_of_many(site)
    lost = sum(status < "4" and name not in rows and name != NEVER for name, status in answered)
    kept = sum(status.isdigit() and status >= "4" and name in rows for name, status in answered)
    silent = sum(not status.isdigit() for _, status in answered)
    found = [f"{lost} acknowledged without a row" if lost else "", f"{kept} refused and kept" if kept else ""]
    found.append(f"{silent} without an answer" if silent else "")
    found.append(end if end != RIGHT else "")
    return ", ".join(filter(None, found)) or RIGHT


def names_of_many(site: Site) -> set[str]:
    """Return the names of the items that the many requests have left."""
    return set(json.loads(site.query("SELECT coalesce(json_agg(name), '[]')::text FROM items WHERE name LIKE 'many-%%'")))


PLACES = {"inside": "a BaseHTTPMiddleware inside of it", "outside": "a BaseHTTPMiddleware outside of it"}
BEHIND: tuple[Check, ...] = (success, commit_fails, http_error, raised, stream)


def behind(program: Program, server: PostgresServer, place: str, alone: Mapping[str, str]) -> str:
    """Return whether some of the answers are right, too, where a BaseHTTPMiddleware stands."""
    if program.framework not in STARLETTES:
        return NO_SUCH_THING
    with running(program, server, place) as site:
        for title, check in CHECKS.items():
            if check in BEHIND:
                verdict = check(site)
                if verdict not in (RIGHT, alone[title]):
                    return f"{title.partition(':')[0]}: {verdict}"
    return RIGHT if all(alone[title] == RIGHT for title, check in CHECKS.items() if check in BEHIND) else "as without it"


def asked(program: Program, server: PostgresServer) -> dict[str, str]:
    """Return the column of a program."""
    column: dict[str, str] = {}
    with running(program, server) as site:
        for title in (title for title in CHECKS if CHECKS[title] is no_session):  # before anything was asked for
            column[title] = CHECKS[title](site)
        for title, check in CHECKS.items():
            if KINDS[title] and program.framework not in KINDS[title]:
                column[title] = NO_SUCH_THING
            elif KEYS[title] in site.absent:
                column[title] = NOT_OFFERED
            elif title not in column:
                column[title] = safely(check, site)
    for place, title in PLACES.items():
        column[title] = behind(program, server, place, column)
    return column


def safely(check: Check, site: Site) -> str:
    """Return what a check says. A check that fails in itself says so, and does not end the run."""
    try:
        return check(site)
    except Exception as error:  # noqa: BLE001  # whatever it is, the other cells are worth having
        return f"could not be asked: {type(error).__name__}"
    finally:
        site.post("release")


# ---- environments, lines, versions -----------------------------------------------------------------------------------


def python_of(peer: str) -> Path:
    """Return the interpreter of an environment."""
    return BUILD / peer / "bin" / "python"


def install(peer: str) -> None:
    """Make the environment of a peer, unless it is there."""
    wanted = "\n".join(PEERS[peer])
    done = BUILD / peer / "installed.txt"
    if done.exists() and done.read_text() == wanted:
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    print(f"installing {peer}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", BUILD / peer], check=True)
    pip = [python_of(peer), "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *PEERS[peer]]
    ended = subprocess.run(pip, capture_output=True, text=True, check=False)
    if ended.returncode:
        problem = [text for text in ended.stderr.splitlines() if "ERROR" in text] or ["pip failed"]
        raise Failed(f"can't be installed: {problem[-1].removeprefix('ERROR: ')}")
    done.write_text(wanted)


def versions(peer: str, distributions: Sequence[str]) -> list[str]:
    """Return the names and versions of what is installed."""
    code = "import sys, importlib.metadata as m\nfor name in sys.argv[1:]:\n    print(name, m.version(name))"
    ended = subprocess.run([python_of(peer), "-c", code, *distributions], capture_output=True, text=True, check=False)
    return ended.stdout.split("\n")[:-1]


def lines_between(path: Path, word: str) -> int:
    """Return how many lines of code stand between "# WORD begins" and "# WORD ends"."""
    total, counts = 0, False
    for text in map(str.strip, path.read_text().splitlines()):
        if text in (f"# {word} begins", f"# {word} ends"):
            counts = text.endswith("begins")
        elif counts and text and not text.startswith("#") and "# for two databases" not in text:
            total += 1
    return total


def wiring(program: Program) -> int:
    """Return the lines that wire the peer, besides imports, models and endpoints."""
    modules = [program.path, *(HERE / f"{name}.py" for name in program.constant("WIRED_IN", []))]
    return sum(lines_between(path, "wiring") for path in modules)


# ---- the tables ------------------------------------------------------------------------------------------------------


def tables(columns: Mapping[Program, Mapping[str, str] | Failed]) -> Iterator[str]:
    """Return the tables, one for each framework."""
    titles = [*CHECKS, *PLACES.values()]
    for framework in dict.fromkeys(program.framework for program in columns):
        programs = [program for program in columns if program.framework == framework]
        yield f"## {framework}"
        head = [f"{program.title} {version_of(program)}".strip() for program in programs]
        rows = [["", *head], ["---"] * (len(head) + 1)]
        for title in titles:
            cells = [cell(columns[program], title) for program in programs]
            if set(cells) != {NO_SUCH_THING}:
                rows.append([title, *cells])
        rows.append(["lines that wire it", *(str(wiring(program)) for program in programs)])
        rows.append(["lines of an endpoint that adds a row", *(str(lines_between(p.path, "endpoint")) for p in programs)])
        yield "\n".join(f"| {' | '.join(row)} |" for row in rows)
        for program in programs:
            reasons = program.constant("NOT_OFFERED", {})
            if reasons:
                listed = "; ".join(f"{key}: {why}" for key, why in reasons.items())
                yield f"{program.title} does not offer — {listed}."


def cell(column: Mapping[str, str] | Failed, title: str) -> str:
    """Return one cell."""
    if isinstance(column, Failed):
        return str(column).replace("|", "/")
    text = column[title]
    return text if text in (RIGHT, NOT_OFFERED, NO_SUCH_THING) else f"**{text}**"


def version_of(program: Program) -> str:
    """Return the version of a peer."""
    if program.peer == "app_db":
        return ""
    return "".join(text.split()[-1] for text in versions(program.peer, program.distributions[:1]))


def stood_on(programs: Sequence[Program], server: PostgresServer) -> str:
    """Return the date and the versions."""
    said = [f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, Python {platform.python_version()}, PostgreSQL {postgres_version(server)}."]
    common = ("SQLAlchemy", "psycopg", "fastapi", "starlette", "litestar", "Flask", "pyramid", "uvicorn", "waitress")
    for peer in dict.fromkeys(program.peer for program in programs):
        own = [name for program in programs if program.peer == peer for name in program.distributions]
        present = [text for name in dict.fromkeys([*own, *common]) for text in versions(peer, [name])]
        said.append(f"- {peer}: {', '.join(present)}")
    return "\n".join([said[0], "", *said[1:]])


def postgres_version(server: PostgresServer) -> str:
    """Return the server's version."""
    return str(server.execute("SHOW server_version")[0][0])


def main() -> None:
    """Ask everything, and print or write the tables."""
    arguments = _arguments()
    programs = [program for program in PROGRAMS if program.name in (arguments.names or [program.name])]
    columns: dict[Program, Mapping[str, str] | Failed] = {}
    server = PostgresServer(settings={"log_statement": "all", "log_connections": True}).start()
    try:
        for program in programs:
            print(program.name, file=sys.stderr)
            try:
                install(program.peer)
                columns[program] = asked(program, server)
            except Failed as failed:
                columns[program] = failed
        text = "\n\n".join([stood_on(programs, server), *tables(columns)])
    finally:
        server.close()
    print(text)
    if arguments.write:
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__ or "")[0])
    names = [program.name for program in PROGRAMS]
    parser.add_argument("names", nargs="*", metavar="PROGRAM", help=f"one of {', '.join(names)}; all of them if none is named")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"no program is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if arguments.write and arguments.names:
        parser.error("--write puts all the tables into the page, so name no program with it")
    return arguments


if __name__ == "__main__":
    main()
