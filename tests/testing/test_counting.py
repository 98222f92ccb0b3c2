"""The plugin counts statements: of a block by a fixture, and of a whole test by a marker."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.projects import Project

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: Path) -> Project:
    return Project(pytester, monkeypatch, installed)


@pytest.mark.exhaustive
def test_the_fixture_and_the_marker_count(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import unittest
        import pytest, shop

        @pytest.fixture
        def an_order():
            shop.place_order()

        def test_a_block(app_db_isolation, app_db_expecting):
            with app_db_expecting(statements={"writer": 1, "warehouse": 1}):
                shop.place_order()

        def test_a_block_with_more(app_db_isolation, app_db_expecting):
            with app_db_expecting(at_most=1) as counted:
                shop.place_order()

        @pytest.mark.app_db
        @pytest.mark.app_db_statements(2, insert=2)
        def test_marked(an_order):
            shop.place_order()

        @pytest.mark.app_db
        @pytest.mark.app_db_statements(at_most=1)
        def test_marked_with_more(an_order):
            shop.place_order()

        @pytest.mark.app_db
        @pytest.mark.app_db_statements(at_most=1)
        def test_an_error_of_its_own():
            shop.place_order()
            raise ValueError("of its own")

        @pytest.mark.app_db_statements({"writr": 1})
        def test_a_misspelt_connection():
            raise AssertionError("it does not run")

        @pytest.mark.app_db
        @pytest.mark.app_db_statements(4)
        class TestWithSetUp(unittest.TestCase):
            def setUp(self):
                shop.place_order()

            def test_in_a_case(self):
                shop.place_order()

        @pytest.mark.app_db
        @pytest.mark.app_db_statements(1)
        class TestCase(unittest.TestCase):
            def test_in_a_case(self):
                shop.place_order()

            @pytest.mark.app_db_statements(2)
            def test_the_closest_mark_counts(self):
                shop.place_order()
        """,
    )
    result = project.run("-v", "--strict-markers")
    result.assert_outcomes(passed=4, failed=5)
    result.stdout.fnmatch_lines(
        [
            "*test_a_block_with_more*",
            "E * app_db.errors.UnexpectedStatements: 2 statements were sent, and at most 1 was expected.",
            "E * 1. 'writer' from test_shop.py:15 in test_a_block_with_more: INSERT INTO orders *",
            "*test_marked_with_more*",
            "@pytest.mark.app_db_statements: 2 statements were sent, and at most 1 was expected.",
            "*test_an_error_of_its_own*",
            "E * ValueError: of its own",
            "*test_a_misspelt_connection*",
            "@pytest.mark.app_db_statements: There is no connection 'writr' to count statements of. Did you mean 'writer'? *",
            "*test_in_a_case*",
            "@pytest.mark.app_db_statements: 2 statements were sent, and 1 was expected.",
        ]
    )
    assert result.stdout.str().count("2 statements were sent") == 3
    result.stdout.no_fnmatch_line("*During handling of*")


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["asyncio", "anyio"])
def test_coroutines_are_counted(project: Project, way: str) -> None:
    project.file(
        "test_shop.py",
        f"""
        import pytest, shop

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.mark.{way}
        @pytest.mark.app_db
        @pytest.mark.app_db_statements(1)
        async def test_marked():
            await shop.place_order_async()

        @pytest.mark.{way}
        async def test_a_block(app_db_isolation, app_db_expecting):
            async with app_db_expecting(insert=1):
                await shop.place_order_async()

        @pytest.mark.{way}
        @pytest.mark.app_db
        @pytest.mark.app_db_statements(2)
        async def test_too_few():
            await shop.place_order_async()
        """,
    )
    plugins = ("asyncio",) if way == "asyncio" else ()
    result = project.run(plugins=plugins)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*1 statement was sent, and 2 were expected."])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("", "test_shop.py::test_marked: no number is given"),
        ("-1", "test_shop.py::test_marked: statements=-1 is no number of statements. Give a number, or numbers by *"),
        ("statement=1", "test_shop.py::test_marked: there is no argument 'statement'"),
        ("1, 2", "test_shop.py::test_marked: (1, 2) was given without a name"),
        ("1, at_most=2", "test_shop.py::test_marked: statements= and at_most= exclude each other. *"),
    ],
)
def test_a_marker_that_can_not_be_meant_ends_the_session(project: Project, arguments: str, problem: str) -> None:
    project.file("test_shop.py", f"import pytest\n@pytest.mark.app_db_statements({arguments})\ndef test_marked():\n    pass\n")
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: @pytest.mark.app_db_statements takes statements= or at_most=*", problem])


@pytest.mark.exhaustive
def test_a_wrong_marker_fails_its_test_in_workers(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import pytest, shop

        @pytest.mark.app_db_statements(statement=1)
        def test_wrong():
            pass

        @pytest.mark.app_db_statements({"writr": 1})
        def test_a_wrong_name():
            pass

        @pytest.mark.app_db
        @pytest.mark.app_db_statements(2)
        def test_right():
            shop.place_order()
        """,
    )
    result = project.run("-n", "2", plugins=("xdist",))
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines_random(
        ["*test_wrong: there is no argument 'statement'", "*There is no connection 'writr' to count*Did you mean 'writer'?*"]
    )


@pytest.mark.exhaustive
def test_without_a_container_the_marker_says_what_is_missing(project: Project) -> None:
    project.file("conftest.py", "")
    project.file("test_shop.py", "import pytest\n@pytest.mark.app_db_statements(1)\ndef test_marked():\n    pass\n")
    result = project.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["The fixtures of app_db need the container of your application.*"])
