"""`pytest --app-db-isolated-only`: a test that uses a database without isolation fails, and the error says what did it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.paths import ROOT
from harness.projects import CONFTEST, Project

pytest_plugins = ["pytester"]

ONLY = "--app-db-isolated-only"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: Path) -> Project:
    project = Project(pytester, monkeypatch, installed)
    project.make_tables()
    return project


def errors_of(output: str) -> dict[str, str]:
    """Return what each test of a run reports, by the test and the phase: "error at setup of test_one" and the like."""
    parts = re.split(r"^_+ ((?:ERROR at (?:setup|teardown) of )?[\w\[\]. -]+) _+$", output, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


TESTS = """
    import asyncio, threading
    import pytest, shop

    @pytest.fixture(scope="module", autouse=True)
    def shared(app_db_container, app_db_tables):
        shop.place_order()  # what tests share may be prepared
        yield
        assert shop.orders() == 2  # with that of `test_real`

    @pytest.fixture
    def an_order():
        shop.place_order()

    @pytest.fixture
    def an_order_swallowed():
        try:
            shop.place_order()
        except Exception:
            pass

    @pytest.fixture
    def cleans():
        yield
        shop.orders()

    @pytest.fixture
    async def an_async_order():
        await shop.place_order_async()

    # refused

    def test_itself():
        shop.place_order()

    def test_engine():
        shop.container.writer_engine().connect()

    def test_swallowed():
        try:
            shop.place_order()
        except Exception:
            pass

    def test_another_failure():
        try:
            shop.place_order()
        except Exception:
            pass
        assert 1 == 2

    def test_fixture(an_order):
        pass

    def test_fixture_swallowed(an_order_swallowed):
        pass

    def test_fixture_before_the_isolation(an_order, app_db_session):
        pass

    def test_fixture_after_the_isolation(cleans, app_db_session):
        pass

    def test_thread():
        thread = threading.Thread(target=ask, name="worker")
        thread.start()
        thread.join()

    def ask():
        try:
            shop.orders()
        except Exception:
            pass

    async def test_coroutine():
        await shop.place_order_async()

    async def test_async_fixture(an_async_order):
        pass

    @pytest.mark.app_db(connections=["warehouse"])
    def test_left_out():
        shop.place_order()

    class TestCase(__import__("unittest").TestCase):
        def setUp(self):
            shop.orders()

        def test_in_a_case(self):
            pass

    # free

    @pytest.mark.app_db
    def test_marked(an_order):
        assert shop.orders() == 2

    @pytest.mark.app_db
    async def test_marked_coroutine(an_async_order):
        assert shop.orders() == 2

    def test_isolated(app_db_session, an_order):
        assert shop.orders() == 2

    @pytest.mark.app_db(isolation=False)
    def test_real(an_order):
        assert shop.orders() == 2

    def test_nothing():
        pass

    def test_throw_away():
        from app_db.testing import sqlite
        with sqlite(shop.container):
            shop.place_order()
            assert shop.orders() == 1

    @pytest.mark.app_db
    def test_last():
        assert shop.orders() == 2
"""

SAID = {
    "test_itself": (
        r"\(at test_shop\.py:\d+ in test_itself, in a unit of work of shop\.py:\d+ in place_order, by the test "
        r"test_shop\.py::test_itself\)"
    ),
    "test_engine": r"\(at test_shop\.py:\d+ in test_engine, by the test test_shop\.py::test_engine\)",
    "test_swallowed": r"\(at test_shop\.py:\d+ in test_swallowed, in a unit of work of shop\.py:\d+ in place_order, by the test ",
    "test_another_failure": r"assert 1 == 2\n(.*\n)*E +app_db: The connection 'writer' was used without isolation \(at test_sho",
    "ERROR at setup of test_fixture": r"by the fixture 'an_order' \(test_shop\.py:\d+\) of the test test_shop\.py::test_fix",
    "ERROR at setup of test_fixture_swallowed": r"in place_order, by the fixture 'an_order_swallowed' \(test_shop\.py:\d+\)",
    "ERROR at setup of test_fixture_before_the_isolation": (
        r"begins after that fixture\. Name app_db_isolation before 'an_order', or mark the test with @pytest\.mark\.app_db\."
    ),
    "ERROR at teardown of test_fixture_after_the_isolation": r"in orders, by the teardown of the test test_shop\.py",
    "test_thread": r"\(at shop\.py:\d+ in orders, by the test test_shop\.py::test_thread in the thread 'worker'\)",
    "test_coroutine": r"in a unit of work of shop\.py:\d+ in place_order_async, by the test test_shop\.py::test_coroutine\)",
    "ERROR at setup of test_async_fixture": r"in place_order_async, by the fixture 'an_async_order' \(test_shop\.py:\d+\)",
    "test_left_out": r"'writer' is not among the connections that were given\. Add 'writer' to them\.",
    "TestCase.test_in_a_case": r"in orders, by the test test_shop\.py::TestCase::test_in_a_case\)",
}


@pytest.mark.exhaustive
def test_a_test_that_is_not_isolated_fails_and_says_what_did_it(project: Project) -> None:
    project.file("test_shop.py", TESTS)
    project.file("pytest.ini", "[pytest]\napp_db_isolated_only = true\n")
    result = project.run(
        "-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function", "--tb=short", plugins=("asyncio",)
    )
    output = result.stdout.str()
    found = errors_of(output)
    assert found.keys() == SAID.keys(), output
    for name, said in SAID.items():
        assert re.search(said, found[name]), found[name]
        assert "was used without isolation" in found[name]
    result.assert_outcomes(passed=8, failed=8, errors=5)
    result.stdout.fnmatch_lines(["app_db: only isolated tests may use the databases"])
    # The module's fixture and `test_real` have committed one each.
    assert (project.rows(), project.rows("facts", "sales")) == (2, 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [False, True])
def test_without_the_option_nothing_is_refused(project: Project, workers: bool) -> None:
    project.file("test_shop.py", "import shop\ndef test_one(): shop.place_order()\ndef test_two(): shop.place_order()\n")
    project.run().assert_outcomes(passed=2)
    assert project.rows() == 2
    arguments, plugins = (["-n", "1"], ("xdist",)) if workers else ([], ())
    project.run(ONLY, *arguments, plugins=plugins).assert_outcomes(failed=2)
    assert project.rows() == 2


@pytest.mark.exhaustive
def test_the_container_is_asked_for_once_for_tests_that_name_no_fixture(project: Project) -> None:
    project.file("test_shop.py", "def test_one(): pass")
    project.file("conftest.py", "")
    result = project.run(ONLY)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*Put this into conftest.py:"])


BEFORE = """
    import pytest, shop

    @pytest.fixture
    def an_order():
        shop.place_order()

    @pytest.fixture
    def looks():
        shop.orders()

    def test_spoiled(looks, an_order, app_db_session):
        pass

    def test_next(app_db_session):
        assert shop.orders() == 0

    def test_that_looks(looks, app_db_isolation):
        pass

    def test_named_first(app_db_isolation, an_order):
        pass

    @pytest.mark.app_db
    def test_marked(an_order):
        pass

    @pytest.mark.app_db(connections=["writer"])
    def test_left_out():
        pass

    def test_not_isolated(looks):
        pass

    class TestSetUp:
        def setup_method(self):
            shop.place_order()

        def test_set_up(self, app_db_isolation):
            pass
"""


def test_rows_of_a_fixture_before_the_isolation_are_found_without_the_option(project: Project) -> None:
    for name in ("shop", "facts"):  # the plugin makes the tables, so that it deletes the rows again
        for path in project.path.glob(f"{name}.db*"):
            path.unlink()
    project.file(
        "conftest.py",
        CONFTEST
        + """
    @pytest.fixture(scope="session", autouse=True)
    def tables(app_db_tables):
        pass
    """,
    )
    project.file("test_shop.py", BEFORE)
    result = project.run()
    result.assert_outcomes(passed=6, errors=2)
    result.stdout.re_match_lines(
        [
            r"test_shop\.py::test_spoiled: rows were committed before its isolation began:",
            r"  the table 'orders' of 'writer' has 1 row more than before, committed outside the isolation \(deleted again\)",
            r"  the table 'sales' of 'warehouse' has 1 row more than before.*",
            r"  the fixture 'looks' \(test_shop\.py:\d+\) of the test .*::test_spoiled used 'reader' at shop\.py:\d+ in orders",
            r"  the fixture 'an_order' \(test_shop\.py:\d+\) of the test .* used 'writer' at test_shop\.py:\d+ in an_o.*",
        ]
    )
    result.stdout.fnmatch_lines(
        [
            "*Name app_db_isolation before 'an_order', or mark the test with @pytest.mark.app_db",
            "  the setup of the test *::test_set_up used 'writer' at test_shop.py:* in TestSetUp.setup_method*",
            "  The isolation of this test begins after that. Mark the test with @pytest.mark.app_db",
        ]
    )


@pytest.mark.exhaustive
def test_without_counting_rows_what_fixtures_do_before_the_isolation_is_not_watched(project: Project) -> None:
    project.file("test_shop.py", BEFORE)
    project.file("pytest.ini", "[pytest]\napp_db_row_counts = false\n")
    project.run("-k", "spoiled").assert_outcomes(passed=1)
    assert project.rows() == 1


@pytest.mark.exhaustive
def test_a_container_without_settings_for_a_connection_can_be_guarded(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APP_DB_CONNECTIONS__WAREHOUSE__URL")
    project.file("test_shop.py", "import shop\ndef test_one(): shop.orders()\ndef test_two(): pass")
    project.run(ONLY).assert_outcomes(failed=1, passed=1)


def files_of(page: str) -> dict[str, str]:
    """Return the files on a page, whose first lines are their names."""
    blocks = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return {name: block for block, name in blocks}


@pytest.mark.exhaustive
def test_the_tests_in_the_documentation_do_what_it_says(project: Project) -> None:
    for path in project.path.glob("*.db*"):
        path.unlink()
    page = (ROOT / "docs" / "how-to" / "isolated-tests-only.md").read_text()
    files = files_of("testing.md")
    for name in ("shop.py", "conftest.py"):
        project.file(name, files[name])
    project.file("test_orders.py", files_of("how-to/isolated-tests-only.md")["test_orders.py"])
    said = [" ".join(block.split()) for text in re.findall(r"```text\n(.*?)```", page, re.DOTALL) for block in text.split("\n\n")]

    project.file("pytest.ini", re.findall(r"```ini\n(.*?)```", page, re.DOTALL)[0])
    result = project.run("--tb=short")
    result.assert_outcomes(passed=2, errors=2)
    printed = " ".join(line.removeprefix("E ").strip() for line in result.stdout.lines)
    assert said[0] in printed
    assert said[1] in printed

    project.file("pytest.ini", "[pytest]")
    result = project.run("-k", "too_late")
    result.assert_outcomes(errors=1)
    assert said[2] in " ".join(" ".join(result.stdout.lines).split())


# ---- expected failures ---------------------------------------------------------------------------------------------------

EXPECTED = """
    import unittest
    import pytest, shop

    @pytest.fixture
    def an_order():
        shop.place_order()

    @pytest.mark.xfail
    def test_itself():
        shop.place_order()

    @pytest.mark.xfail
    def test_fixture(an_order):
        pass

    @pytest.mark.xfail
    def test_swallowed():
        try:
            shop.place_order()
        except Exception:
            pass

    class TestCases(unittest.TestCase):
        @unittest.expectedFailure
        def test_case(self):
            shop.place_order()

    # not refused, or expected

    @pytest.mark.xfail(raises=Exception)
    def test_that_expects_it():
        shop.place_order()

    @pytest.mark.xfail
    @pytest.mark.app_db
    def test_another_failure():
        shop.place_order()
        assert shop.orders() == 2
"""


@pytest.mark.exhaustive
def test_a_refusal_is_not_the_failure_that_a_test_expects(project: Project) -> None:
    project.file("test_shop.py", EXPECTED)
    result = project.run(ONLY, "--tb=short")
    result.assert_outcomes(failed=3, errors=1, xfailed=2)
    errors = errors_of(result.stdout.str())
    assert list(errors) == ["ERROR at setup of test_fixture", "test_itself", "test_swallowed", "TestCases.test_case"]
    assert all("was used without isolation" in error for error in errors.values())
    assert project.rows() == 0
