"""show, graph, shell and dbshell: what they print, and what they leave in the databases."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from sqlalchemy import create_engine, text

from harness.commands import app_db, in_terminal
from harness.migrated import Project
from harness.paths import PYTHONPATH
from harness.poolers import PgBouncer
from harness.requiring import made, need, need_program
from harness.schemas import schemas, validated
from harness.servers import PASSWORD, PostgresServer

NewUrl = Callable[[], str]

SECRETS = (PASSWORD, quote(PASSWORD), quote(PASSWORD, safe=""), "s3cr3t")

SHOP = """
from app_db import Connection, DatabaseContainer, orm_base
from sqlalchemy.orm import Mapped, mapped_column

class Shop(DatabaseContainer):
    writer = Connection()
    reader = Connection()
    warehouse = Connection()
    nowhere = Connection()

class Item(orm_base("writer")):
    __tablename__ = "items"
    name: Mapped[str] = mapped_column(primary_key=True)

container = Shop()
overridden = Shop()
overridden.writer_session.override("another <one>")
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A module in the working directory, with a container and a model."""
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


def run(*arguments: str, environment: dict[str, str], code: int = 0, says: str = "") -> str:
    """Return what a command prints, which has this exit code, shows no secret and says why it fails."""
    done = app_db(*arguments, environment=environment)
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr
    assert (done.returncode, says in done.stderr) == (code, True), done.stdout + done.stderr
    assert done.stderr == "" or says, done.stderr
    return done.stdout


SETTINGS = {
    "APP_DB_CONNECTIONS__WRITER__URL": "postgresql+psycopg://shop:s3cr3t@db:5433/shop?sslpassword=s3cr3t",
    "APP_DB_CONNECTIONS__READER__URL": "postgresql+psycopg://shop:s3cr3t@db2/shop",
    "APP_DB_CONNECTIONS__READER__READ_ONLY": "true",
    "APP_DB_CONNECTIONS__READER__POOL__MAX_OVERFLOW": "-1",
    "APP_DB_CONNECTIONS__REPORT__MIRROR": "writer",
    "APP_DB_CONNECTIONS__REPORT__READ_ONLY": "true",
    "APP_DB_CONNECTIONS__REPORT__REPLICA_OF": "",
    "APP_DB_CONNECTIONS__WAREHOUSE__URL": "mysql+pymysql://shop:s3cr3t@dw/warehouse",
    "APP_DB_TWO_PHASE": "true",
    "APP_DB_CONTAINER": "shop:container",
}


# ---- show -------------------------------------------------------------------------------------------------------------------


def test_show_says_what_is_configured_and_who_said_so(shop: Path) -> None:
    (shop / ".env").write_text("APP_DB_CONNECTIONS__WAREHOUSE__POOL__SIZE=3\n")
    data = validated("show", run("show", "--json", environment=SETTINGS, code=1))
    by_name = {each["name"]: each for each in data["connections"]}
    assert [*by_name] == ["nowhere", "reader", "report", "warehouse", "writer"]
    assert (data["container"], data["decision_log"]) == ("Shop", "the table app_db_decisions of 'writer'")
    assert (by_name["nowhere"]["configured"], by_name["report"]["in_container"]) == (False, False)
    assert by_name["reader"]["capacity"] == {"threads": None, "coroutines": None}
    assert by_name["warehouse"]["capacity"] == {"threads": 13, "coroutines": 13}
    assert (by_name["reader"]["replica_of"], by_name["report"]["mirror"], by_name["report"]["replica_of"]) == (
        "writer",
        "writer",
        None,
    )
    assert [each["two_phase"] for each in by_name.values()] == [False, False, False, True, True]
    assert {"variable": "APP_DB_CONNECTIONS__WAREHOUSE__POOL__SIZE", "value": "3", "source": ".env"} in by_name["warehouse"][
        "settings"
    ]
    assert {"variable": "APP_DB_TWO_PHASE", "value": "true", "source": "environment"} in data["settings"]


def test_show_prints_a_table_and_marks_what_is_not_configured(shop: Path) -> None:
    lines = run("show", environment=SETTINGS, code=1).splitlines()
    assert lines[0].split() == ["connection", "database", "use", "pool", "capacity"]
    assert [line.split()[0] for line in lines[1:6]] == ["nowhere", "reader", "report", "warehouse", "writer"]
    assert "not configured" in lines[1]
    assert re.search(
        r"postgresql\+psycopg://shop:\*\*\*@db2/shop +read-only, replica of writer +5 \+ any number +no limit$", lines[2]
    )
    assert re.search(r"two-phase +5 \+ 10 +15$", lines[5])
    assert "APP_DB_CONNECTIONS__WRITER__URL" in lines[-1]
    assert lines[-1].endswith("environment")
    one = run("show", "writer", environment=SETTINGS)
    assert "reader" not in one
    assert "APP_DB_TWO_PHASE" not in one


def test_a_writer_that_is_not_configured_is_shown_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.py").write_text("from app_db import container_of\nContainer = container_of('writer', 'other')\n")
    given = ("--container", "app:Container")
    lines = run("show", *given, environment={"APP_DB_CONNECTIONS__OTHER__URL": "sqlite:///other.db"}, code=1).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["other", "writer"]
    assert "not configured" in lines[2]


def test_a_mirror_is_shown_with_the_settings_of_its_database(shop: Path) -> None:
    """They are those of what it mirrors, which says for itself how it is used."""
    url = ["APP_DB_CONNECTIONS__WRITER__URL"]
    given = {url[0]: "sqlite:///shop.db", "APP_DB_CONNECTIONS__WRITER__POOL__SIZE": "3"}
    [reader] = validated("show", run("show", "reader", "--json", "--container", "shop", environment=given))["connections"]
    assert [each["variable"] for each in reader["settings"]] == url
    assert [line.split()[0] for line in run("show", "reader", "--container", "shop", environment=given).splitlines()[-1:]] == url
    whole = run("show", "--container", "shop", environment=given, code=1)
    assert whole.count(f"{url[0]} ") == 1


def test_an_unknown_connection_is_explained_with_near_names(shop: Path) -> None:
    says = "There is no connection 'writr'. Did you mean 'writer'? There are: 'reader', 'report', 'warehouse', 'writer'.\n"
    for verb in ("show", "dbshell"):
        assert run(verb, "writr", environment=SETTINGS, code=2, says=says) == ""


def test_a_connection_of_the_container_without_settings_is_told_what_to_set(shop: Path) -> None:
    says = "The container has the connection 'nowhere', and it has no settings. Set APP_DB_CONNECTIONS__NOWHERE__URL.\n"
    for verb in ("show", "ping", "pool", "dbshell"):
        assert run(verb, "nowhere", environment=SETTINGS, code=2, says=says) == ""


def test_an_engine_of_the_applications_own_is_shown_by_its_url(shop: Path) -> None:
    (shop / "own.py").write_text(
        "from app_db import Connection, DatabaseContainer\nfrom sqlalchemy import create_engine\n"
        "class Own(DatabaseContainer):\n    log = Connection(engine=create_engine('postgresql+psycopg://me:s3cr3t@own/log'))\n"
        "container = Own()\n"
    )
    [shown] = validated("show", run("show", "--json", "--container", "own", environment={}))["connections"]
    assert (shown["own_engine"], shown["url"]) == (True, "postgresql+psycopg://me:***@own/log")


# ---- graph ------------------------------------------------------------------------------------------------------------------


def test_the_graph_shows_databases_and_what_depends_on_what(shop: Path) -> None:
    data = validated("graph", run("graph", "--json", environment=SETTINGS))
    assert [(each["from"], each["how"], each["to"]) for each in data["links"]] == [
        ("reader", "replica of", "writer"),
        ("report", "mirror of", "writer"),
    ]
    kept = {each["place"]: [connection["name"] for connection in each["connections"]] for each in data["databases"]}
    assert kept == {
        None: ["nowhere"],
        "shop@db2": ["reader"],
        "warehouse@dw": ["warehouse"],
        "shop@db:5433": ["writer", "report"],
    }
    lines = run("graph", environment=SETTINGS).splitlines()
    assert lines[-3:] == [
        "└─ postgresql shop@db:5433",
        "   ├─ writer  two-phase, decision log",
        "   └─ report  read-only, mirror of writer, not in the container",
    ]


def test_what_is_overridden_is_in_each_form_of_the_graph(shop: Path) -> None:
    arguments = ("graph", "--container", "shop:overridden")
    assert "writer  two-phase, decision log, overridden: session" in run(*arguments, environment=SETTINGS)
    assert "writer_session" in run(*arguments, "--format", "mermaid", environment=SETTINGS)
    assert "writer_session" in run(*arguments, "--format", "svg", environment=SETTINGS)
    assert json.loads(run(*arguments, "--json", environment=SETTINGS))["overridden"] == ["writer_session"]


def test_nothing_is_overridden_in_a_container_of_the_settings() -> None:
    environment = {"APP_DB_CONNECTIONS__WRITER__URL": "sqlite:///shop.db"}
    assert run("graph", environment=environment).splitlines() == ["Container", "└─ sqlite shop.db", "   └─ writer"]


def test_the_picture_is_valid_xml_whose_boxes_lie_within_it_and_do_not_overlap(shop: Path) -> None:
    environment = {**SETTINGS, "APP_DB_DECISION_LOG": f"file:{shop}/a<b>&c"}
    root = ET.fromstring(run("graph", "--format", "svg", environment=environment))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    texts = [each.text for each in root.iter(f"{space}text")]
    assert {"Shop", "writer", "reader", "report", "warehouse", "replica of", "mirror of", f"the file {shop}/a<b>&c"} <= {*texts}
    boxes = [tuple(float(each.get(name, "")) for name in ("x", "y", "width", "height")) for each in root.iter(f"{space}rect")]
    assert len(boxes) == 11
    for x, y, width, height in boxes:
        assert min(x, y) >= 0
        assert x + width <= float(root.get("width", ""))
        assert y + height <= float(root.get("height", ""))
    overlapping = [
        (a, b)
        for number, a in enumerate(boxes)
        for b in boxes[:number]
        if a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
    ]
    assert overlapping == []


def test_mermaid_gets_no_quote_and_no_angle_bracket_in_a_label(shop: Path) -> None:
    environment = {**SETTINGS, "APP_DB_CONNECTIONS__WAREHOUSE__URL": 'sqlite:///a"b<c>#d.db'}
    lines = run("graph", "--format", "mermaid", environment=environment).splitlines()
    assert lines[0] == "flowchart LR"
    assert any("a#quot;b#lt;c#gt;#35;d.db" in line for line in lines)
    assert all(line.count('"') % 2 == 0 for line in lines)


# ---- shell ------------------------------------------------------------------------------------------------------------------


def shell(program: str, *arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    """Run a program that is written on stdin."""
    environment = {"APP_DB_CONNECTIONS__WRITER__URL": url, "APP_DB_CONTAINER": "shop:container"}
    return app_db("shell", *arguments, environment=environment, stdin=program)


def names_in(url: str) -> list[str]:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return [*connection.scalars(text("SELECT name FROM items ORDER BY name"))]
    finally:
        engine.dispose()


def make_items(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE items (name VARCHAR(50) PRIMARY KEY)"))
    engine.dispose()


@pytest.mark.representative("sqlite")
def test_a_shell_commits_at_its_end_if_it_may_write(shop: Path, database_url: str) -> None:
    make_items(database_url)
    done = shell("writer_session.add(Item(name='kept')); print(unit, container)", "--write", url=database_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("<UnitOfWork")
    assert names_in(database_url) == ["kept"]


@pytest.mark.representative("sqlite")
def test_a_shell_is_read_only_and_says_what_it_did_not_keep(shop: Path, database_url: str) -> None:
    make_items(database_url)
    done = shell("print(1)\nwriter_session.add(Item(name='lost'))", url=database_url)
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert done.stderr == "Rolled back, because the unit is read-only. Start the shell with --write to keep changes.\n"
    refused = shell(
        "from sqlalchemy import text\nwriter_session.execute(text(\"INSERT INTO items VALUES ('x')\"))", url=database_url
    )
    assert (refused.returncode, "ReadOnlyViolation" in refused.stderr) == (1, True)
    assert names_in(database_url) == []


def test_a_program_that_fails_is_rolled_back_with_its_own_lines_in_the_traceback(shop: Path, sqlite_url: str) -> None:
    make_items(sqlite_url)
    done = shell("writer_session.add(Item(name='lost'))\nwriter_session.flush()\n1 / 0", "--write", url=sqlite_url)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "Traceback (most recent call last):",
        '  File "<stdin>", line 3, in <module>',
        "ZeroDivisionError: division by zero",
        "Rolled back, because the program failed.",
    ]
    assert names_in(sqlite_url) == []
    assert shell("raise SystemExit(3)", "--write", url=sqlite_url).returncode == 1


def test_a_shell_starts_where_a_database_is_down(shop: Path) -> None:
    done = shell("print(writer_session is not None)", url="postgresql+psycopg://app_db:s3cr3t@127.0.0.1:1/nowhere")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_modules_with_models_are_imported(shop: Path) -> None:
    (shop / "stock.py").write_text(SHOP.replace("Item", "Shelf").replace("items", "shelves"))
    environment = {**SETTINGS, "APP_DB_CONTAINER": "shop:container"}
    assert "Shelf" not in validated("shell", run("shell", "--json", environment=environment))["names"]
    named = validated("shell", run("shell", "--json", "--modules", "stock", environment=environment))["names"]
    assert (named["Shelf"], named["Item"], named["writer_session"], named["container"]) == (
        "model",
        "model",
        "session",
        "container",
    )
    (shop / "pyproject.toml").write_text("[tool.app_db]\nmodules = ['stock']\n")
    assert "Shelf" in run("shell", "--json", environment=environment)
    says = "--modules nothing: there is no module 'nothing'"
    assert run("shell", "--modules", "nothing", environment=environment, code=2, says=says) == ""


@pytest.mark.parametrize("prompt", ["--plain", pytest.param("", marks=pytest.mark.exhaustive)])
def test_a_shell_in_a_terminal_commits_what_is_typed(prompt: str, shop: Path, sqlite_url: str) -> None:
    make_items(sqlite_url)
    if not prompt:
        need("IPython")
    typed = "writer_session.add(Item(name='typed'))\nexit()\n"
    environment = {"APP_DB_CONNECTIONS__WRITER__URL": sqlite_url, "APP_DB_CONTAINER": "shop:container", "IPYTHONDIR": str(shop)}
    screen = in_terminal("shell", "--write", *filter(None, [prompt]), environment=environment, typed=typed)
    assert screen.code == 0, screen.text
    assert "Shop, in a unit of work. It commits at the end." in screen.text
    assert "At hand: unit, session, reader_session, writer_session, container" in screen.text
    assert "Models: Item" in screen.text
    assert names_in(sqlite_url) == ["typed"]


# ---- dbshell ----------------------------------------------------------------------------------------------------------------

RUNNING = {"postgresql": "SELECT pg_sleep(60)", "mariadb": "SELECT SLEEP(60)"}
"""Statements during which the program's command line is read."""


PROGRAMS = {
    "sqlite": ("sqlite3", "sqlite3"),
    "postgresql": ("postgresql-client", "psql"),
    "mariadb": ("mariadb-client", "mariadb", "mysql"),
}
"""By database: the package of its program, and what that is called."""


@pytest.mark.representative("mariadb")
@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_the_password_is_on_no_command_line_and_its_file_is_private_and_goes(
    database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    need_program(*PROGRAMS[database])
    url = request.getfixturevalue({"postgresql": "postgres_url"}.get(database, "mariadb_url"))
    option = "-c" if database == "postgresql" else "-e"
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "APP_DB_CONNECTIONS__WRITER__URL": url, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "app_db", "dbshell", "writer", "--", option, RUNNING[database]]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            child = waited(lambda: child_of(process.pid), process)
            line = Path(f"/proc/{child}/cmdline").read_bytes().decode()
            waited(lambda: is_sleeping(database, request, RUNNING[database]), process)
            files = [*tmp_path.glob("app-db-*")]
            modes = [stat.S_IMODE(file.stat().st_mode) for file in files]
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert RUNNING[database] in line
    assert not [secret for secret in SECRETS if secret in line + said]
    assert modes == ([] if database == "postgresql" else [0o600])
    assert (process.returncode, [*tmp_path.glob("app-db-*")]) == (1, [])


def waited(ask: Callable[[], int], process: subprocess.Popen[str]) -> int:
    """Return the first answer that is not 0, while a process runs."""
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        if found := ask():
            return found
        time.sleep(0.02)
    pytest.fail(
        f"it ended, or nothing was found: {process.stderr.read() if process.stderr and process.poll() is not None else ''}"
    )


def child_of(pid: int) -> int:
    """Return the id of a process's child, once that is the database's program."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        if b"psql" in (line := Path(f"/proc/{child}/cmdline").read_bytes()) or b"--defaults-file" in line:
            return int(child)
    return 0


def is_sleeping(database: str, request: pytest.FixtureRequest, statement: str) -> int:
    server = request.getfixturevalue("postgres" if database == "postgresql" else "mariadb")
    listed = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE query = %s",
        "mariadb": "SELECT count(*) FROM information_schema.processlist WHERE info = %s",
    }
    return int(server.execute(listed[database], [statement])[0][0])


@pytest.mark.representative("sqlite")
@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"])
def test_the_databases_own_program_is_on_the_database(database: str, request: pytest.FixtureRequest) -> None:
    need_program(*PROGRAMS[database])
    url = request.getfixturevalue({"postgresql": "postgres_url"}.get(database, f"{database}_url"))
    make_items(url)
    option = {"sqlite": [], "postgresql": ["-c"], "mariadb": ["-e"]}[database]
    environment = {
        "APP_DB_CONNECTIONS__WRITER__URL": url,
        "APP_DB_CONNECTIONS__READER__MIRROR": "writer",
        "APP_DB_CONNECTIONS__READER__READ_ONLY": "true",
    }
    run("dbshell", "writer", "--", *option, "INSERT INTO items VALUES ('by hand')", environment=environment)
    assert names_in(url) == ["by hand"]
    says = {"sqlite": "readonly", "postgresql": "read-only transaction", "mariadb": "READ ONLY transaction"}[database]
    run("dbshell", "reader", "--", *option, "INSERT INTO items VALUES ('refused')", environment=environment, code=1, says=says)
    assert names_in(url) == ["by hand"]


def test_a_program_that_is_missing_is_explained(tmp_path: Path) -> None:
    environment = {"APP_DB_CONNECTIONS__WRITER__URL": "postgresql+psycopg://shop:s3cr3t@db/shop", "PATH": str(tmp_path)}
    says = "writer: there is no program 'psql'. Install the client (Debian and Ubuntu: apt-get install postgresql-client).\n"
    assert run("dbshell", "writer", environment=environment, code=2, says=says) == ""
    assert validated("dbshell", run("dbshell", "writer", "--json", environment=environment))["program"] is None
    memory = {"APP_DB_CONNECTIONS__WRITER__URL": "sqlite://"}
    run("dbshell", "writer", environment=memory, code=2, says="APP_DB_CONNECTIONS__WRITER__URL is in memory")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql+psycopg://shop:s3cr3t@a/shop?host=b&host=c&sslmode=require&sslpassword=s3cr3t", "host='b,c'"),
        ("postgresql+psycopg://shop:s3cr3t@/shop?host=a:1&host=b:2", "host='a,b' port='1,2'"),
        ("postgresql+asyncpg://shop:s3cr3t@a/shop?ssl=require&prepared_statement_cache_size=0", "host=a dbname=shop user=shop"),
        ("postgresql+psycopg://sh%27op:s3cr3t@a/sh%5Cop", r"user='sh\'op'"),
    ],
)
def test_psql_gets_the_words_that_it_knows_and_no_secret(url: str, expected: str) -> None:
    data = validated("dbshell", run("dbshell", "writer", "--json", environment={"APP_DB_CONNECTIONS__WRITER__URL": url}))
    [conninfo] = data["arguments"]
    assert expected in " ".join(sorted(conninfo.split(), key=lambda word: word.startswith("port")))
    assert "cache" not in conninfo
    assert data["environment"] == ["PGPASSWORD"]


# ---- all of them ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pooled(postgres: PostgresServer) -> Iterator[PgBouncer]:
    pooler = made(lambda: PgBouncer(postgres))
    yield pooler
    pooler.close()


def test_behind_a_pooler_the_verbs_do_the_same(pooled: PgBouncer, postgres_url: str, shop: Path) -> None:
    need_program("postgresql-client", "psql")
    make_items(postgres_url)
    environment = {
        "APP_DB_CONNECTIONS__WRITER__URL": pooled.url(postgres_url.rpartition("/")[2]),
        "APP_DB_CONNECTIONS__WRITER__POOLER": "transaction",
        "APP_DB_CONNECTIONS__READER__MIRROR": "writer",
        "APP_DB_CONNECTIONS__READER__READ_ONLY": "true",
    }
    assert "pooler: transaction" in run("show", environment=environment)
    for name in ("writer", "reader"):
        assert "1 row" in run("dbshell", name, "--", "-c", "SELECT 1", environment=environment)


def test_a_wrong_password_and_a_database_that_is_down_are_explained(postgres_url: str) -> None:
    need_program("postgresql-client", "psql")
    wrong = {
        "APP_DB_CONNECTIONS__WRITER__URL": re.sub(r"app_db:[^@]*@", "app_db:wr0ng@", postgres_url),
        "APP_DB_CONNECTIONS__WRITER__TWO_PHASE": "true",
    }
    down = {**wrong, "APP_DB_CONNECTIONS__WRITER__URL": "postgresql+psycopg://app_db:wr0ng@127.0.0.1:1/shop"}
    for environment, says in ((wrong, "password authentication failed"), (down, "Connection refused")):
        assert "wr0ng" not in run("show", environment=environment) + run("graph", environment=environment)
        assert "wr0ng" not in run("dbshell", "writer", "--", "-c", "SELECT 1", environment=environment, code=1, says=says)
        data = validated("recover", run("recover", "--json", environment=environment, code=1))
        assert says.lower() in data["unreachable"]["writer"].lower()
        assert "wr0ng" not in str(data)


@pytest.mark.parametrize(
    ("command", "code"), [(("recover",), 1), (("current",), 2), (("pool",), 1), (("dbshell", "writer"), 2), (("ping",), 1)]
)
def test_the_words_of_a_password_provider_that_fails_are_not_shown(command: tuple[str, ...], code: int, tmp_path: Path) -> None:
    Path("passwords.py").write_text("def fail():\n    raise ValueError('s3cr3t')\n")
    Project(tmp_path, writer="sqlite://").write_three("writer")
    environment = {
        "APP_DB_CONNECTIONS__WRITER__URL": "postgresql+psycopg://shop@127.0.0.1:1/shop",
        "APP_DB_CONNECTIONS__WRITER__PASSWORD_PROVIDER": "passwords:fail",
        "APP_DB_CONNECTIONS__WRITER__TWO_PHASE": "true",
    }
    done = app_db(*command, environment=environment)
    assert done.returncode == code
    assert "s3cr3t" not in done.stdout + done.stderr
    assert "ValueError" in done.stdout + done.stderr


def test_every_verb_has_a_schema_that_is_one() -> None:
    from app_db.cli._commands import VERBS

    known = schemas()
    assert {verb for verbs in VERBS.values() for verb in verbs} | {"error", "version"} == {*known}
    for schema in known.values():
        jsonschema.Draft202012Validator.check_schema(schema)
