"""What the package brings along and what it lets out: imports, type information, log records without secrets."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

import app_db
from app_db import ConnectionSettings, Container, DatabaseSettings
from harness.servers import MariaDBServer, PostgresServer

PACKAGE = Path(app_db.__file__).parent
ROOT = PACKAGE.parent

DEPENDENCIES = (
    "dependency_injector.containers, dependency_injector.providers, dependency_injector.wiring, sqlalchemy, sqlalchemy.orm, \
zope.sqlalchemy, transaction, pydantic_settings"
)

FRAMEWORKS = set("fastapi starlette flask werkzeug pyramid django aiohttp sanic litestar quart tornado click typer".split())
DRIVERS = set("psycopg psycopg2 asyncpg pymysql MySQLdb aiomysql asyncmy mariadb aiosqlite oracledb cx_Oracle pyodbc".split())


# ---- imports -------------------------------------------------------------------------------------------------------------


def imported_by(statement: str) -> set[str]:
    """The top-level modules that a new interpreter has after a statement, seen from a place where none of ours are."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_importing_app_db_adds_nothing_but_itself_and_the_standard_library_to_its_dependencies() -> None:
    added = imported_by("from app_db import *") - imported_by(f"import {DEPENDENCIES}")
    assert added - set(sys.stdlib_module_names) == {"app_db"}


def test_app_db_alone_imports_no_framework_and_no_driver() -> None:
    """Those below import fastapi, starlette, werkzeug and psycopg where they are, so these are held off."""
    held_off = "\n".join(f"sys.modules[{name!r}] = None" for name in sorted(FRAMEWORKS | DRIVERS))
    imported_by(f"{held_off}\nfrom app_db import *")


def test_the_sources_name_no_framework() -> None:
    words = {f"{verb} {name}" for verb in ("import", "from") for name in FRAMEWORKS}
    for path in PACKAGE.rglob("*.py"):
        if "integrations" in path.parts or "_compat" in path.parts:  # a module of each is about one of them
            continue
        lines = {" ".join(line.split()[:2]).partition(".")[0] for line in path.read_text().splitlines()}
        assert not lines & words, path


def test_importing_connects_nowhere_and_reads_no_settings(tmp_path: Path) -> None:
    program = "import app_db; app_db.Container(); print('made')"
    environment = {"PYTHONPATH": str(ROOT), "APP_DB_CONNECTIONS__WRITER__URL": "nonsense", "APP_DB_TYPO": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "made"), done.stderr


# ---- what is shipped -----------------------------------------------------------------------------------------------------


def test_type_information_is_shipped() -> None:
    assert (PACKAGE / "py.typed").read_bytes() == b""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    included = ["app_db", "pytest_app_db"]
    assert wheel["only-include"] == included, "the whole package is in the wheel, py.typed included, and the plugin beside it"


def test_the_plugin_of_pytest_imports_nothing_but_pytest_and_the_standard_library() -> None:
    """Every project that has app_db installed imports it when pytest starts."""
    added = imported_by("import pytest_app_db") - imported_by("import pytest")
    assert {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names) == {"pytest_app_db"}
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"pytest11": {"app_db": "pytest_app_db"}}


def test_the_version_is_the_projects() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert declared["name"] == "app-db"
    parts = declared["version"].split(".")
    assert len(parts) == 3
    assert all(part.isdigit() for part in parts)
    try:
        installed = distribution("app-db").version
    except PackageNotFoundError:
        pytest.skip("app-db is used from its checkout, and not installed")
    assert installed == declared["version"]


# ---- logging -------------------------------------------------------------------------------------------------------------


def test_all_logging_goes_to_the_loggers_of_app_db() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        if "getLogger" in source:
            assert source.count('getLogger("app_db")') == source.count("getLogger("), path
        assert "basicConfig" not in source, path
        assert "print(" not in source or path.parent.name == "cli" or path.name == "__main__.py", path


def test_the_logger_has_no_handler_and_no_level_of_its_own() -> None:
    logger = logging.getLogger("app_db")
    assert logger.handlers == []
    assert logger.level == logging.NOTSET


def test_a_failing_hook_is_logged_by_app_db(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    container = Container(settings=DatabaseSettings(connections={"writer": ConnectionSettings(url=sqlite_url)}))

    def fail() -> None:
        raise LookupError("in the hook")

    with pytest.raises(app_db.errors.HookFailed), container.transaction() as unit:
        unit.on_commit(fail)
    assert [(record.name, record.levelname) for record in caplog.records if record.name.startswith("app_db")] == [
        ("app_db", "ERROR")
    ]
    container.shutdown_resources()


# ---- secrets -------------------------------------------------------------------------------------------------------------


SECRET = "hunter2:p@ss/w%rd?#"


class Everything:
    """All that a program may show: log records, with their tracebacks, and what is asked for below."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self._texts: list[str] = []

    def note(self, *things: object) -> None:
        for thing in things:
            self._texts += [str(thing), repr(thing)]
            if isinstance(thing, BaseException):
                self._texts += traceback.format_exception(thing)
                self._texts += [str(thing.args), repr(getattr(thing, "__notes__", ""))]

    def __str__(self) -> str:
        formatter = logging.Formatter("%(name)s %(message)s %(args)s")
        return "\n".join([*self._texts, *(formatter.format(record) for record in self._caplog.records)])


@pytest.fixture
def everything(caplog: pytest.LogCaptureFixture) -> Everything:
    caplog.set_level(logging.DEBUG)
    for name in ("sqlalchemy.engine", "sqlalchemy.pool", "sqlalchemy.orm", "psycopg", "pymysql", "txn", "app_db"):
        caplog.set_level(logging.DEBUG, logger=name)
    return Everything(caplog)


def given(how: str, monkeypatch: pytest.MonkeyPatch, *, driver: str, host: str, port: int, database: str) -> DatabaseSettings:
    """Settings with the secret in them, given in one of the ways there are."""
    parts: dict[str, Any] = {
        "driver": driver,
        "host": host,
        "port": port,
        "user": "app_db",
        "password": SECRET,
        "database": database,
    }
    url = f"{driver}://app_db:{quote(SECRET, safe='')}@{host}:{port}/{database}"
    if how == "url":
        return DatabaseSettings(connections={"writer": ConnectionSettings(url=url, echo=True)})
    if how == "parts":
        return DatabaseSettings(connections={"writer": ConnectionSettings(**parts)})
    if how == "provider":
        del parts["password"]
        return DatabaseSettings(connections={"writer": ConnectionSettings(**parts, password_provider=f"{__name__}:secret")})
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", url)
    return DatabaseSettings()


def secret() -> str:
    return SECRET


def require_no_secret(everything: Everything) -> None:
    shown = str(everything)
    assert len(shown) > 500
    for form in (SECRET, quote(SECRET), quote(SECRET, safe=""), "hunter2"):
        assert form not in shown


@pytest.mark.parametrize("how", ["url", "parts", "provider", "environment"])
@pytest.mark.parametrize("server", ["postgres", "mariadb"])
def test_a_refused_login_shows_no_password(
    request: pytest.FixtureRequest, everything: Everything, monkeypatch: pytest.MonkeyPatch, how: str, server: str
) -> None:
    running: PostgresServer | MariaDBServer = request.getfixturevalue(server)
    database = request.getfixturevalue(f"{server}_url").rpartition("/")[2]
    settings = given(how, monkeypatch, driver=running.driver, host=running.host, port=running.port, database=database)
    container = Container(settings=settings)
    with pytest.raises(OperationalError, match=r"(?i)password|denied") as caught, container.transaction():
        container.writer_session().execute(text("SELECT 1"))
    engine = container.writer_engine()
    everything.note(caught.value, settings, settings.connection("writer"), settings.model_dump(), settings.origins())
    everything.note(settings.model_dump_json(), settings.connection("writer").model_dump())
    everything.note(
        engine,
        engine.url,
        container,
        container.writer_sessionmaker(),
        container.writer_scoped_session().session_factory.kw["config"],
    )
    require_no_secret(everything)
    container.shutdown_resources()


@pytest.mark.parametrize("how", ["url", "parts", "provider"])
def test_a_server_that_is_not_there_shows_no_password(everything: Everything, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    container = Container(
        settings=given(how, monkeypatch, driver="postgresql+psycopg", host="127.0.0.1", port=1, database="shop")
    )
    with pytest.raises(OperationalError) as caught, container.transaction():
        container.writer_session().execute(text("SELECT 1"))
    everything.note(caught.value)
    require_no_secret(everything)


@pytest.mark.parametrize("server", ["postgres", "mariadb"])
def test_a_unit_that_works_shows_no_password(request: pytest.FixtureRequest, everything: Everything, server: str) -> None:
    running: PostgresServer | MariaDBServer = request.getfixturevalue(server)
    user = f"hidden_{server}"
    create, drop = {
        "postgres": (f"CREATE ROLE {user} LOGIN PASSWORD '{SECRET}'", f"DROP ROLE {user}"),
        "mariadb": (f"CREATE USER {user} IDENTIFIED BY '{SECRET}'", f"DROP USER {user}"),
    }[server]
    database = request.getfixturevalue(f"{server}_url").rpartition("/")[2]
    running.execute(create)
    if server == "mariadb":
        running.execute(f"GRANT ALL ON `{database}`.* TO {user}")
    try:
        url = f"{running.driver}://{user}:{quote(SECRET, safe='')}@{running.host}:{running.port}/{database}"
        container = Container(settings=DatabaseSettings(connections={"writer": ConnectionSettings(url=url, echo=True)}))
        with container.transaction() as unit:
            session = container.writer_session()
            session.execute(text("SELECT 1"))
            everything.note(unit, unit.transaction, session, session.connection(), session.get_transaction(), session.get_bind())
        with pytest.raises(Exception, match="nowhere") as caught, container.transaction():
            container.writer_session().execute(text("SELECT * FROM nowhere"))
        everything.note(caught.value)
        container.shutdown_resources()
    finally:
        running.execute(drop)
    require_no_secret(everything)


@pytest.mark.parametrize(
    "broken",
    [
        lambda url: {"writer": {"url": url, "user": "also"}},
        lambda url: {"writer": {"url": url.replace("%40", "@")}},
        lambda url: {"writer": {"url": "postgresql+psycopg:/" + url}},
        lambda url: {"writer": {"url": url, "read_only": True, "two_phase": True}},
        lambda url: {"writer": {"url": url, "password_provider": "a:b"}},
        lambda url: {"writer": {"url": url, "pool": {"size": url}}},
        lambda url: {"writer": {"url": url}, "log": {"mirror": url}},
        lambda url: {"writer": {"url": url.replace("+psycopg", "+nonsense")}},
    ],
)
def test_settings_that_are_refused_show_no_password(everything: Everything, broken: Callable[[str], dict[str, Any]]) -> None:
    url = f"postgresql+psycopg://app_db:{quote(SECRET, safe='')}@db/shop"
    with pytest.raises(app_db.errors.SettingsError) as caught:
        Container(settings=DatabaseSettings(connections=broken(url))).settings()
    everything.note(caught.value, "padding" * 50)
    require_no_secret(everything)
