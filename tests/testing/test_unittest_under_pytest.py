"""unittest's cases under pytest: the databases of the run, and nothing left there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.projects import CONFTEST, Project

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: Path) -> Project:
    return Project(pytester, monkeypatch, installed)


MADE = "unittest.enterModuleContext(made_tables(shop.container))"

CASES = """
    import pathlib, unittest
    import shop
    from app_db.testing import IsolatedTestCase, made_tables

    def setUpModule():
        unittest.enterModuleContext(made_tables(shop.container))

    class TestOrders(IsolatedTestCase):
        container = shop.container

        def test_one(self):
            shop.place_order()
            self.assertEqual(shop.orders(), 1)
            url = shop.container.writer_engine().url
            with pathlib.Path("names").open("a") as file:
                print(pathlib.Path(url.database).name, file=file)

        test_two = test_three = test_four = test_one
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("conftest", ["no fixture", "fixture"])
@pytest.mark.parametrize("tables", ["made_tables", "IsolatedTestCase"])
def test_cases_use_the_url_of_the_command_line_and_drop_what_they_made(project: Project, conftest: str, tables: str) -> None:
    project.set("WRITER__URL", "postgresql://nobody:hunter2@127.0.0.1:1/nothing")
    project.file("conftest.py", CONFTEST if conftest == "fixture" else "")
    source = CASES if tables == "made_tables" else CASES.replace(MADE, "pass")
    for module in ("test_shop.py", "test_again.py"):
        project.file(module, source)
    project.run("--app-db-url", "writer=sqlite:///given.db").assert_outcomes(passed=8)
    assert set(project.noted("names")) == {"given.db"}
    assert project.tables("given") == project.tables("facts") == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("conftest", ["no fixture", "fixture"])
def test_cases_of_workers_have_databases_of_their_own(project: Project, conftest: str) -> None:
    project.file("conftest.py", CONFTEST if conftest == "fixture" else "")
    slow = "def test_one(self):\n            __import__('time').sleep(0.2)"
    project.file("test_shop.py", CASES.replace("def test_one(self):", slow))
    project.run("-n", "2", plugins=("xdist",)).assert_outcomes(passed=4)
    assert set(project.noted("names")) == {"shop_gw0.db", "shop_gw1.db"}
    assert list(project.path.glob("*.db*")) == []


@pytest.mark.exhaustive
def test_under_unittest_cases_use_the_databases_of_the_settings(project: Project) -> None:
    project.file("pytest.ini", "[pytest]\napp_db_urls = writer=sqlite:///given.db\n")
    project.file("test_shop.py", CASES)
    subprocess.run([sys.executable, "-m", "unittest"], cwd=project.path, check=True, timeout=60)
    assert set(project.noted("names")) == {"shop.db"}
    assert project.tables() == []


@pytest.mark.exhaustive
def test_set_up_of_a_module_uses_the_databases_of_the_run(project: Project) -> None:
    project.file("conftest.py", "")
    project.file("test_shop.py", CASES.replace(MADE, "shop.container.create_all()"))
    project.run("--app-db-url", "writer=sqlite:///given.db").assert_outcomes(passed=4)
    assert project.tables("given") == ["orders"], "the project made it"
    assert not (project.path / "shop.db").exists()


@pytest.mark.exhaustive
def test_a_block_of_the_tests_own_is_left_alone(project: Project) -> None:
    project.file("conftest.py", "")
    own = "unittest.enterModuleContext(overridden(shop.container, {'writer': 'sqlite:///own.db'}))"
    project.file("test_shop.py", CASES.replace(MADE, own).replace("made_tables", "overridden"))
    project.run("--app-db-url", "writer=sqlite:///given.db").assert_outcomes(passed=4)
    assert set(project.noted("names")) == {"own.db"}


@pytest.mark.exhaustive
def test_what_was_given_to_add_module_cleanup_is_called(project: Project) -> None:
    project.file("test_shop.py", CASES)
    cleanup = f"{MADE}\n        unittest.addModuleCleanup(print, 'CLEANED', 'UP')"
    project.file("test_two.py", CASES.replace(MADE, cleanup))
    result = project.run("-s")
    result.assert_outcomes(passed=8)
    assert result.stdout.str().count("CLEANED UP") == 1


REFUSED = """
    import unittest
    import pytest, shop
    from app_db.testing import IsolatedTestCase

    class TestPlain(unittest.TestCase):
        def test_arguments(self, app_db_session):
            pass

        @pytest.mark.app_db
        def test_marked(self):
            shop.place_order()

        @pytest.mark.usefixtures("app_db_isolation")
        def test_by_usefixtures(self):
            shop.place_order()

    class TestIsolated(IsolatedTestCase):
        container = shop.container

        @pytest.mark.app_db(isolation=False)
        def test_not_isolated(self):
            shop.place_order()

        @pytest.mark.app_db(connections=["writer"])
        def test_one_connection(self):
            shop.place_order()

        @pytest.mark.app_db
        def test_twice(self):
            shop.place_order()
"""
SAID = [
    "test_shop.py::TestPlain::test_arguments: unittest passes no fixtures, and the method takes app_db_session. Derive the class",
    "TestIsolated::test_not_isolated: an IsolatedTestCase isolates its tests itself, so @pytest.mark.app_db(isolation=False)",
    "TestIsolated::test_one_connection: an IsolatedTestCase isolates its tests itself, so @pytest.mark.app_db(connections=['wr",
]


@pytest.mark.exhaustive
def test_what_can_not_work_in_a_case_is_a_usage_error(project: Project) -> None:
    project.file("test_shop.py", REFUSED)
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    output = result.stdout.str() + result.stderr.str()
    assert [said for said in SAID if said not in output] == []


@pytest.mark.exhaustive
def test_what_can_not_work_in_a_case_fails_in_a_worker(project: Project) -> None:
    project.file("test_shop.py", REFUSED)
    result = project.run("-n", "1", plugins=("xdist",))
    result.assert_outcomes(errors=3, passed=3)
    assert [said for said in SAID if said not in result.stdout.str()] == []


@pytest.mark.exhaustive
def test_the_marker_isolates_a_plain_case(project: Project) -> None:
    project.make_tables()
    project.file("test_shop.py", REFUSED)
    project.run("-k", "marked or usefixtures or twice").assert_outcomes(passed=3)
    assert project.rows() == 0
