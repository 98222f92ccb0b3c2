"""The plugin beside others: one project that uses all of them, in any order, in several workers, again and again.

It is in `beside/`, and is run by another pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.choosing import turns
from harness.paths import TESTS
from harness.projects import Project
from harness.requiring import need, need_command
from harness.servers import PASSWORD, USER, PostgresServer, postgres_programs
from testing.test_isolated_only import files_of

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent / "beside"


class Beside:
    """Runs the project on a server of the tests."""

    def __init__(self, server: PostgresServer, installed: Path, place: Path) -> None:
        self.server = server
        self.place = place
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("APP_DB_", "PYTEST_"))}
        self.environment["PYTHONPATH"] = os.pathsep.join([str(installed), str(TESTS)])

    def run(self, *arguments: str, asyncio_mode: str = "strict", timeout: float = 110) -> dict[str, int]:
        """Run the project, and return how many tests had which outcome. Nothing may be left on the server."""
        before = self.databases()
        given = [f"--postgresql-{name}={value}" for name, value in self.options().items()]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE), *given, str(HERE)),
                *("-o", f"asyncio_mode={asyncio_mode}", "-p", "no:cacheprovider", "-p", "no:pytest_cov", "--tb=short", "-q"),
                *(f"--basetemp={self.place / 'temporary'}", *arguments),
            ],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert self.databases() == before
        assert self.server.execute("SELECT count(*) FROM pg_prepared_xacts") == [(0,)]
        words = done.stdout.strip().splitlines()[-1].replace("=", "").split(" in ")[0].split(", ")
        return {outcome: int(number) for number, outcome in (word.split() for word in words)}

    def options(self) -> dict[str, object]:
        return {"host": self.server.host, "port": self.server.port, "user": USER, "password": PASSWORD, "dbname": "beside"}

    def databases(self) -> set[str]:
        return {name for (name,) in self.server.execute("SELECT datname FROM pg_database")}


@pytest.fixture
def beside(postgres: PostgresServer, installed: Path, tmp_path: Path) -> Beside:
    need("trio", "anyio", "pytest_asyncio", "pytest_postgresql", "pytest_randomly", "xdist")
    need("factory", "hypothesis", "freezegun", "time_machine", "alembic")
    return Beside(postgres, installed, tmp_path)


IN_STRICT_MODE = f"--ignore={HERE / 'with_asyncio_auto.py'}"
IN_AUTO_MODE = f"--ignore={HERE / 'with_anyio.py'}"
"""In this mode, pytest-asyncio takes the tests for anyio, and runs those for trio under asyncio."""


@pytest.mark.exhaustive
def test_all_of_them_in_random_order_in_two_workers(beside: Beside) -> None:
    outcomes = beside.run("-n", "2", "--randomly-seed=1", IN_STRICT_MODE)
    assert outcomes.keys() == {"passed"}
    assert outcomes["passed"] >= 35


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(10, 10 + turns(10)))
def test_in_any_order_nothing_fails(beside: Beside, seed: int) -> None:
    assert beside.run("-n", "2", f"--randomly-seed={seed}", IN_STRICT_MODE).keys() == {"passed"}


@pytest.mark.exhaustive
def test_the_mode_auto_of_pytest_asyncio(beside: Beside) -> None:
    outcomes = beside.run("--randomly-seed=1", IN_AUTO_MODE, asyncio_mode="auto")
    assert outcomes.keys() == {"passed"}
    assert outcomes["passed"] >= 30


@pytest.mark.exhaustive
@pytest.mark.timeout(400)
def test_a_hundred_times_nothing_fails(beside: Beside) -> None:
    number = turns(100)
    outcomes = beside.run("-n", "2", "--randomly-seed=1", f"--repeat={number}", IN_STRICT_MODE, timeout=380)
    assert outcomes.keys() == {"passed"}
    assert outcomes["passed"] >= 25 * number


# ---- the page ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: Path) -> Project:
    """The project that is on the page, with the shop of the page about testing."""
    project = Project(pytester, monkeypatch, installed)
    for name, source in {**files_of("testing.md"), **files_of("how-to/beside-other-test-tools.md")}.items():
        if name not in ("test_shop.py", "test_cases.py"):
            project.file(name, source)
    return project


OTHERS = ("asyncio", "randomly", "xdist", "hypothesispytest", "pytest_postgresql")


@pytest.mark.exhaustive
def test_the_examples_of_the_page_work(page: Project) -> None:
    need("trio", "pytest_postgresql", "time_machine", "freezegun", "factory", "alembic")
    page.file("conftest.py", files_of("testing.md")["conftest.py"])
    options = ("-o", "asyncio_mode=strict", "-o", "asyncio_default_fixture_loop_scope=function", "--randomly-seed=1")
    page.run(*options, "-n", "2", plugins=OTHERS).assert_outcomes(passed=12)


@pytest.mark.exhaustive
def test_the_tables_of_the_page_come_from_revisions(page: Project) -> None:
    need("alembic", "time_machine", "freezegun")
    page.run("test_time.py").assert_outcomes(errors=2)  # there are no revisions
    command = [sys.executable, "-m", "app_db", "revision", "-m", "first", "--container", "shop:container"]
    subprocess.run(command, cwd=page.path, check=True, capture_output=True, timeout=60)
    page.run("test_time.py").assert_outcomes(passed=2)
    assert page.rows() == 0


@pytest.mark.exhaustive
def test_the_container_of_the_page_uses_a_database_of_pytest_postgresql(page: Project, postgres: PostgresServer) -> None:
    need("pytest_postgresql", "time_machine", "freezegun")
    programs = postgres_programs(16)
    command = page.path / "pg_ctl"
    # As root in a user namespace, the server sees another user than root, who owns the files that root makes.
    command.write_text(f'#!/bin/sh\nexec {"unshare --user " if os.geteuid() == 0 else ""}{programs / "pg_ctl"} "$@"\n')
    command.chmod(0o755)
    if os.geteuid() == 0:
        need_command("unshare", "--user", "true")
    page.file("conftest.py", (page.path / "conftest_postgresql.py").read_text())
    page.run("test_time.py", f"--postgresql-exec={command}", plugins=("pytest_postgresql",)).assert_outcomes(passed=2)

    source = (page.path / "conftest.py").read_text().replace("factories.postgresql_proc()", "factories.postgresql_noproc()")
    page.file("conftest.py", source)
    place = {"host": postgres.host, "port": postgres.port, "user": USER, "password": PASSWORD}
    given = [f"--postgresql-{name}={value}" for name, value in place.items()]
    before = {name for (name,) in postgres.execute("SELECT datname FROM pg_database")}
    page.run("test_time.py", *given, plugins=("pytest_postgresql",)).assert_outcomes(passed=2)
    assert {name for (name,) in postgres.execute("SELECT datname FROM pg_database")} == before
