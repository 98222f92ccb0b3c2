"""`python -m app_db` prints what an operator has to know, exits with what a script has to know, and shows no secret."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

import pytest
from sqlalchemy import text

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db._two_phase.decisions import Verdict
from app_db._two_phase.recovery import GRACE, BranchInDoubt, BranchState, Settlement, UnitInDoubt
from app_db._two_phase.xids import Xid, new_log_id, new_unit_id
from app_db.cli import _recovering, _settlements, main
from app_db.cli._commands import VERBS
from harness import commands
from harness.crashing import Zygote, variables
from harness.paths import PYTHONPATH, ROOT, run_python
from harness.servers import PASSWORD, PostgresServer
from harness.stranded import Scene, stranded

NewUrl = Callable[[], str]


NOWHERE = "postgresql+psycopg://app_db:s3cr3t@127.0.0.1:1/nowhere"
SECRETS = (PASSWORD, quote(PASSWORD), quote(PASSWORD, safe=""), "s3cr3t")


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def app_db(
    *arguments: str, scene: Scene | None = None, environment: Mapping[str, str] = MappingProxyType({}), afresh: bool = False
) -> Done:
    """Run the command line in a process of its own, with the settings of a scene."""
    given = {} if scene is None else variables(scene.given)
    done = commands.app_db(*arguments, environment={**given, **environment}, afresh=afresh)
    assert "Traceback" not in done.stdout + done.stderr
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def scene(new_postgres_url: NewUrl) -> Iterator[Scene]:
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url()) as scene:
        scene.make_tables()
        yield scene


# ---- recover ------------------------------------------------------------------------------------------------------------


def test_where_nothing_is_in_doubt_that_is_said(scene: Scene) -> None:
    done = app_db("recover", scene=scene, afresh=True)
    assert (done.code, done.err) == (0, "")
    assert done.lines == [f"Nothing of {scene.settings.application!r} is in doubt."]


def test_each_unit_is_printed_with_what_was_decided_and_done(scene: Scene) -> None:
    committed = scene.prepare(scene.new_unit(), "writer", "warehouse")
    aborted = scene.prepare(scene.new_unit(), "warehouse")
    scene.decide(committed, "warehouse", "writer")
    done = app_db("recover", "--grace", "0", scene=scene)
    assert (done.code, done.err) == (0, "")
    [first] = [line for line in done.lines if line.startswith(committed)]
    assert " s ago): committed, because it was decided to commit it" in first
    [second] = [line for line in done.lines if line.startswith(aborted)]
    assert "rolled back, because there was no decision to commit it" in second
    assert done.lines.count("  warehouse  committed") == done.lines.count("  writer     committed") == 1
    assert done.lines.count("  warehouse  rolled back") == 1
    assert done.lines[-1] == f"2 units of {scene.settings.application!r} in doubt, 2 settled, 0 left."
    assert scene.rows("warehouse") == [committed]


def test_a_dry_run_prints_what_would_be_done(scene: Scene) -> None:
    committed, aborted = (scene.prepare(scene.new_unit(), "writer", "warehouse") for _ in "ab")
    scene.decide(committed, "warehouse", "writer")
    done = app_db("recover", "--dry-run", "--grace", "0", scene=scene)
    assert done.code == 1
    assert f"{committed}, begun" in done.out
    assert "would be committed, because it was decided to commit it" in done.out
    assert "would be rolled back, because there was no decision to commit it" in done.out
    assert f"by the user 'app_db' as {scene.settings.application}:{aborted}:writer" in done.out
    assert "LEFT" not in done.out
    assert len(scene.ours("writer")) == 2


def test_a_dry_run_says_what_will_become_of_a_young_unit(scene: Scene) -> None:
    scene.decide(scene.prepare(scene.new_unit(), "writer"), "writer")
    done = app_db("recover", "--dry-run", "--grace", "60", scene=scene)
    assert "under way, because it was prepared less than 60 s ago, and is left to its committer" in done.out
    assert "later it would be committed, because it was decided to commit it" in done.out
    assert done.lines[-1].endswith(" in doubt, 1 under way.")
    assert done.code == 0


def test_what_is_left_is_printed_with_its_reason(scene: Scene) -> None:
    scene.new_unit()
    unit = scene.prepare(new_unit_id(new_log_id()), "writer", "warehouse")
    scene.given["connections"] = {
        **scene.given["connections"],
        "audit": {"url": NOWHERE, "two_phase": True},
        "old": {"url": NOWHERE, "two_phase": False},
    }
    done = app_db("recover", "--grace", "0", scene=scene)
    assert (done.code, done.err) == (1, "")
    assert f"{unit}, begun " in done.out
    assert "LEFT IN DOUBT, because its decision is in another log, or one that can't be reached. Run this where" in done.out
    assert f"as {scene.settings.application}:{unit}:writer" in done.out
    assert "Can't be asked: audit (OperationalError: " in done.out
    assert "Can't be asked: the table app_db_decisions of 'old' (OperationalError: " in done.out
    assert "Run this again when it can be reached." in done.out
    assert done.lines[-1].endswith("0 settled, 1 left.")


def test_a_held_branch_is_explained(new_postgres_url: NewUrl, new_mariadb_url: NewUrl) -> None:
    with stranded(writer=new_postgres_url(), maria=new_mariadb_url()) as scene:
        scene.make_tables()
        scene.prepare(scene.new_unit(), "maria", hold=True)
        done = app_db("recover", "--grace", "0", scene=scene)
        assert done.code == 1
        assert "the connection that prepared it is still open" in done.out


def test_decisions_that_are_forgotten_are_counted(scene: Scene) -> None:
    scene.decide(scene.new_unit(), "warehouse")
    scene.age(4000)
    assert "1 decision that would be forgotten" in app_db("recover", "--dry-run", scene=scene).out
    done = app_db("recover", scene=scene)
    assert (done.code, done.lines[-1]) == (0, f"0 units of {scene.settings.application!r} in doubt, 1 decision forgotten.")


def test_what_a_killed_process_left_is_recovered(postgres: PostgresServer, new_postgres_url: NewUrl, tmp_path: Path) -> None:
    connections = {name: {"url": new_postgres_url(), "two_phase": "true"} for name in ("writer", "warehouse", "audit")}
    settings = {"application": "killed", "connections": connections}
    with Zygote() as zygote, zygote.application(settings) as application:
        assert application.run("first").committed  # and has made the log
        steps = application.run("whole").steps
        prepared = max(number for number, step in enumerate(steps) if "PREPARE TRANSACTION" in step and "answer" in step)
        decided = next(number for number, step in enumerate(steps) if step == "after COMMIT")
        for name, step in (("undecided", prepared), ("decided", decided)):
            assert application.run(name, die_at=step).killed
        done = application.recover()
    assert done.returncode == 0
    assert done.stdout.count("rolled back, because there was no decision") == 1
    assert done.stdout.count("committed, because it was decided") == 1
    for connection in connections.values():
        database = connection["url"].rpartition("/")[2]
        names = [name for (name,) in postgres.execute("SELECT name FROM item ORDER BY name", database=database)]
        assert names == ["decided", "first", "whole"]
        assert postgres.prepared_transactions(database) == []


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon"])
@pytest.mark.parametrize(("verb", "option"), [("recover", "--grace"), ("migrate", "--lock-timeout"), ("ping", "--timeout")])
def test_what_is_no_number_of_seconds_is_refused(verb: str, option: str, seconds: str) -> None:
    done = app_db(verb, f"{option}={seconds}", environment={"APP_DB_CONNECTIONS__WRITER__URL": "sqlite://"})
    assert done.code == 2
    assert f"argument {option}: {seconds!r} is no number of seconds. Give 0 or more" in done.err


# ---- the page, where a server can't easily be made to fill it ------------------------------------------------------------


def page(*units: UnitInDoubt, dry_run: bool = False) -> str:
    return "\n".join(_settlements.report(Settlement(list(units)), "shop", dry_run))


def unit_of(*states: BranchState, verdict: Verdict | None = Verdict.COMMIT, unit: str = "", begun_at: float = 0) -> UnitInDoubt:
    unit = unit or new_unit_id(new_log_id())
    branches = [BranchInDoubt(Xid("shop", unit, "writer"), ["writer"], state=state) for state in states]
    return UnitInDoubt(unit, begun_at, branches, verdict)


def test_the_grace_is_that_of_recovery() -> None:
    assert _recovering._GRACE == GRACE


def test_a_unit_that_others_settled_is_not_said_to_be_rolled_back() -> None:
    shown = page(unit_of(BranchState.GONE, BranchState.GONE, verdict=Verdict.ABORT))
    assert "another process has settled it" in shown
    assert "rolled back" not in shown


def test_a_unit_of_which_a_part_is_left_is_called_left() -> None:
    shown = page(unit_of(BranchState.COMMITTED, BranchState.FAILED))
    assert "LEFT, because not all of it could be committed" in shown
    assert shown.endswith("0 settled, 1 left.")


@pytest.mark.parametrize("begun_at", [-1e20, 0.0, 62.0**6, 1e300])
def test_any_time_can_be_printed(begun_at: float) -> None:
    """An xid's six letters may be anything."""
    assert "begun " in page(unit_of(BranchState.COMMITTED, begun_at=begun_at))


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-5, "0 s"), (1.2, "1 s"), (119, "119 s"), (121, "2 min"), (7201, "2 h"), (86400 * 3, "3 d")]
)
def test_ages_are_rounded_to_what_matters(seconds: float, shown: str) -> None:
    assert _settlements._duration(seconds) == shown


def test_without_two_phase_connections_there_is_nothing_to_recover_and_nothing_connects() -> None:
    environment = {"APP_DB_CONNECTIONS__WRITER__URL": NOWHERE, "APP_DB_CONNECTIONS__LITE__URL": "sqlite:///lite.db"}
    assert app_db("recover", environment=environment).lines == ["Nothing of 'app_db' is in doubt."]
    assert not Path("lite.db").exists()


# ---- the container ------------------------------------------------------------------------------------------------------

SHOP = """
from app_db import Connection, DatabaseContainer
from dependency_injector import containers, providers

class Shop(DatabaseContainer):
    writer = Connection()

class Application(containers.DeclarativeContainer):
    db = providers.Container(Shop)

container = Shop()
application = Application()
number = 7

def make():
    return Shop()

def needs(something):
    return Shop()

def fails():
    raise ValueError("s3cr3t")

def leaves():
    raise SystemExit(0)

async def waits():
    return Shop()
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A module in the working directory."""
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "program.py").write_text("raise SystemExit(0)")
    (tmp_path / "broken.py").write_text("raise ValueError('s3cr3t')")
    (tmp_path / "lacking.py").write_text("import something_that_is_not_there")
    return tmp_path


@pytest.mark.parametrize("name", ["shop", "shop:container", "shop:Shop", "shop:make", "shop:application.db"])
def test_a_container_may_be_named(name: str, shop: Path, scene: Scene) -> None:
    """The class declares the writer only, and the settings have two connections."""
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
    done = app_db("recover", "--grace", "0", "--container", name, scene=scene, afresh=name == "shop")
    assert (done.code, done.err) == (0, "")
    assert unit in done.out
    assert scene.prepared("writer") == scene.prepared("warehouse") == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere:Shop", "there is no module 'nowhere'"),
        ("lacking", "there is no module 'something_that_is_not_there'"),
        ("broken", "can't be imported (ValueError)"),
        ("shop:Shoop", "there is no 'Shoop'"),
        ("shop:Shop.nothing", "there is no 'nothing'"),
        ("shop:number", "it is no database container"),
        ("shop:Shop.writer", "it is no database container"),
        ("shop:needs", "calling it failed (TypeError)"),
        ("shop:fails", "calling it failed (ValueError)"),
        ("shop:leaves", "calling it failed (SystemExit)"),
        ("shop:waits", "it is a coroutine function. Name a function that returns the container without waiting"),
        ("program", "the module 'program' can't be imported (SystemExit)"),
        ("", "the module is missing. Give MODULE:NAME"),
        (":Shop", "the module is missing. Give MODULE:NAME"),
    ],
)
def test_a_container_that_is_none_is_explained_in_one_line(name: str, says: str, shop: Path) -> None:
    done = app_db("recover", "--container", name, environment={"APP_DB_CONNECTIONS__WRITER__URL": "sqlite:///w.db"})
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert done.err.startswith(f"--container {name}: ")
    assert says in done.err


@pytest.mark.parametrize("command", ["recover", "check"])
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "APP_DB_CONNECTIONS__WRITER__URL: is not set"),
        ({"APP_DB_CONNECTIONS__WRITER__URL": f"{NOWHERE}@"}, "can't be read as a database URL"),
        ({"APP_DB_CONNECTIONS__WRITER__URL": NOWHERE, "APP_DB_TYPO": "s3cr3t"}, "APP_DB_TYPO"),
    ],
)
def test_settings_that_are_wrong_are_explained(command: str, environment: dict[str, str], says: str) -> None:
    done = app_db(command, environment=environment)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


def test_a_database_that_is_not_there_is_explained() -> None:
    environment = {"APP_DB_CONNECTIONS__WRITER__URL": NOWHERE, "APP_DB_CONNECTIONS__WRITER__TWO_PHASE": "true"}
    recover = app_db("recover", environment=environment)
    assert (recover.code, recover.err) == (1, "")
    assert "Can't be asked: writer (OperationalError: " in recover.out
    check = app_db("check", environment=environment)
    assert (check.code, check.err) == (1, "")
    assert "error: The server can't be reached: OperationalError: " in check.out


@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
def test_tables_of_mariadb_that_have_no_transactions_are_named(new_mariadb_url: NewUrl, driver: str) -> None:
    url = new_mariadb_url()
    given = {"APP_DB_CONNECTIONS__WRITER__URL": url.replace("pymysql", driver), "APP_DB_CONNECTIONS__READER__MIRROR": "writer"}
    container: DatabaseContainer = container_of("writer")(
        settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": url}})
    )
    engine = container.writer_engine()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE fine (name VARCHAR(20)) ENGINE=InnoDB"))
        connection.execute(text("CREATE VIEW seen AS SELECT * FROM fine"))
    assert app_db("check", environment=given).code == 0
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE old (name VARCHAR(20)) ENGINE=MyISAM"))
        connection.execute(text("CREATE TABLE `select` (name VARCHAR(20)) ENGINE=Aria TRANSACTIONAL=1"))
    with pytest.raises(LookupError), container.transaction():
        for table in ("fine", "old", "`select`"):
            container.writer_session().execute(text(f"INSERT INTO {table} VALUES ('kept')"))
        raise LookupError
    with container.transaction():
        counts = [
            container.writer_session().scalar(text(f"SELECT count(*) FROM {table}")) for table in ("fine", "old", "`select`")
        ]
    assert counts == [0, 1, 1], "the fact guarded: they survive a rollback"
    container.shutdown_resources()
    done = app_db("check", environment=given)
    assert (done.code, done.err) == (1, "")
    assert [line for line in done.lines if "has no transactions" in line or "ENGINE=InnoDB" in line] == [
        line
        for table, quoted, storage in (("old", "old", "MyISAM"), ("select", "`select`", "Aria"))
        for line in (
            f"  warning: The table {table} has no transactions ({storage}). Its rows stay if the unit of work aborts.",
            f"    to do: ALTER TABLE {quoted} ENGINE=InnoDB gives it some.",
        )
    ]


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("{app_db} completion bash | head -c 0", 0, ""),
        ("{app_db} --version | true", 0, ""),
        ("{app_db} migrate --help | true", 0, ""),
        ("{app_db} --help >/dev/full", 2, "No space left on device"),
        ("{app_db} completion bash >&-", 0, ""),
        ("{app_db} nonsense 2>&-", 2, ""),
        ("{app_db} completion bash >/dev/full", 2, "No space left on device"),
    ],
)
def test_what_can_not_be_printed_is_no_traceback(command: str, code: int, says: str) -> None:
    """A pipe whose reader has ended, closed streams, and a full disk."""
    done = subprocess.run(
        ["bash", "-c", "set -o pipefail; " + command.format(app_db=f"{sys.executable} -m app_db")],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    if not says:
        assert done.stderr == ""


def test_an_interruption_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite://")
    monkeypatch.setattr("app_db._two_phase.recovery.Recovery.settle", lambda *arguments, **options: raised(KeyboardInterrupt()))
    assert main(["recover"]) == 2
    assert "run it again" in capsys.readouterr().err


def raised(error: BaseException) -> None:
    raise error


def test_the_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["recover", "--help"], ["check", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert all(f"  {code}  " in shown for code in (0, 1, 2))


@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", "nonsense", "completion bash", *(f"{verb} --help" for verbs in VERBS.values() for verb in verbs)],
)
@pytest.mark.representative("--help", "--version", "nonsense", "completion bash", "recover --help")
def test_what_needs_no_container_imports_none_of_the_libraries(arguments: str) -> None:
    """Importing them takes seconds on a small machine."""
    program = """
import sys
from app_db.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print("exit code", code, *sorted({name.partition(".")[0] for name in sys.modules}))
"""
    code, *modules = run_python("-c", program, *arguments.split()).stdout.rpartition("exit code")[2].split()
    assert code == ("2" if arguments == "nonsense" else "0")
    heavy = {"sqlalchemy", "dependency_injector", "pydantic", "pydantic_settings", "transaction", "rich", "alembic", "IPython"}
    assert heavy & set(modules) == set()


def test_the_command_is_a_program_of_the_package() -> None:
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"app-db": "app_db.cli:main"}
