"""The plugin for pytest, from the wheel: each test is a project with tests of its own, run by another pytest.

Plugins that these projects use, and that would disturb the tests of app_db itself, are loaded only there: `addopts` of
pyproject.toml keeps them out of here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from harness.paths import ROOT
from harness.projects import CONFTEST, HELD_OFF, Project
from harness.servers import MariaDBServer, PostgresServer

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: Path) -> Project:
    return Project(pytester, monkeypatch, installed)


# ---- isolation --------------------------------------------------------------------------------------------------------


def test_what_a_test_commits_is_rolled_back_in_every_database(project: Project) -> None:
    project.make_tables()
    project.file(
        "test_shop.py",
        """
        import pytest, shop

        @pytest.mark.parametrize("number", range(3))
        def test_by_the_fixture(app_db_isolation, number):
            shop.place_order()
            assert shop.orders() == 1

        @pytest.mark.app_db
        def test_by_the_marker():
            shop.place_order()
            assert shop.orders() == 1

        @pytest.fixture
        def an_order():
            shop.place_order()

        @pytest.mark.app_db
        def test_what_other_fixtures_commit(an_order):
            assert shop.orders() == 1

        @pytest.mark.app_db
        def test_what_fixtures_commit_that_are_named_first(an_order, app_db_isolation):
            assert shop.orders() == 1

        @pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.app_db)])
        def test_one_of_several(request, number):
            if number == 2:
                shop.place_order()

        def test_the_session(app_db_session):
            shop.place_order()
            assert app_db_session.scalar(shop.ORDERS) == 1
            app_db_session.add(shop.Order())
            app_db_session.flush()
            assert shop.orders() == 2
        """,
    )
    result = project.run("-v")
    result.assert_outcomes(passed=9)
    assert (project.rows(), project.rows("facts", "sales")) == (0, 0)


@pytest.mark.exhaustive
def test_what_tests_share_is_made_before_they_are_isolated(project: Project) -> None:
    project.make_tables()
    project.file(
        "test_shop.py",
        """
        import pytest, shop

        @pytest.fixture(scope="module", autouse=True)
        def seed():
            shop.place_order()

        @pytest.fixture(scope="session")
        def more():
            shop.place_order()

        @pytest.mark.app_db
        @pytest.mark.parametrize("number", range(2))
        def test_with_the_seed(number, more):
            shop.place_order()
            assert shop.orders() == 3
        """,
    )
    project.run().assert_outcomes(passed=2)
    assert project.rows() == 2


@pytest.mark.exhaustive
def test_fixtures_of_a_module_or_class_use_the_databases_and_the_tables_of_the_run(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import pytest, shop

        @pytest.fixture(scope="module", autouse=True)
        def seed():
            shop.place_order()

        class TestShared:
            @classmethod
            def setup_class(cls):
                shop.place_order()

            @pytest.mark.app_db
            def test_isolated(self):
                assert shop.orders() == 2

        @pytest.mark.app_db(isolation=False)
        def test_that_may_commit():
            assert shop.orders() == 2
        """,
    )
    project.file(
        "test_first.py",
        """
        import shop

        class TestUnmarked:
            @classmethod
            def setup_class(cls):
                shop.container.writer_engine().connect().close()

            def test_nothing(self):
                pass
        """,
    )
    project.run("--app-db-url", "writer=sqlite:///given.db", "--app-db-isolated-only").assert_outcomes(passed=3)
    assert not (project.path / "shop.db").exists()


@pytest.mark.exhaustive
def test_fixtures_of_a_module_come_after_those_of_the_run_that_a_test_names(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import pytest, shop

        @pytest.fixture(scope="module", autouse=True)
        def seed():
            shop.place_order()

        def test_named(app_db_session):
            assert shop.orders() == 1
        """,
    )
    project.run("--app-db-url", "writer=sqlite:///given.db").assert_outcomes(passed=1)
    assert not (project.path / "shop.db").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("names", ["", "app_db_tables"])
def test_a_fixture_of_the_session_uses_the_databases_of_the_run_if_it_names_the_tables(project: Project, names: str) -> None:
    project.make_tables()
    project.file(
        "test_shop.py",
        f"""
        import pytest, shop

        @pytest.fixture(scope="session", autouse=True)
        def seed({names}):
            shop.place_order()

        def test_seed(app_db_session):
            assert shop.orders() == {int(bool(names))}
        """,
    )
    project.run("--app-db-url", "writer=sqlite:///given.db").assert_outcomes(passed=1)
    assert project.rows() == int(not names)


@pytest.mark.exhaustive
def test_rows_that_a_fixture_of_a_class_has_written_by_the_driver_are_no_fault_of_its_tests(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import pytest, shop, sqlite3, time

        @pytest.mark.app_db
        def test_before():
            assert shop.orders() == 0

        class TestShared:
            @pytest.fixture(scope="class", autouse=True)
            def seed(self):
                connection = sqlite3.connect("shop.db")
                connection.execute("INSERT INTO orders DEFAULT VALUES")
                connection.commit()
                time.sleep(0.5)  # so that rows are counted
                yield
                connection.execute("DELETE FROM orders")
                connection.commit()

            @pytest.mark.app_db
            @pytest.mark.parametrize("number", range(2))
            def test_shared(self, number):
                assert shop.orders() == 1

        @pytest.mark.app_db
        def test_after():
            assert shop.orders() == 0
        """,
    )
    project.run().assert_outcomes(passed=4)


@pytest.mark.exhaustive
def test_the_session_is_of_the_first_connection_without_a_writer(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WRITER", "WAREHOUSE"):
        monkeypatch.delenv(f"APP_DB_CONNECTIONS__{name}__URL")
    project.set("SALES__URL", "sqlite:///sales.db")
    project.set("FACTS__URL", "sqlite:///facts.db")
    project.file(
        "shop.py",
        """
        from app_db import container_of

        container = container_of("sales", "facts")()
        """,
    )
    project.file(
        "test_shop.py",
        """
        def test_first(app_db_session):
            assert app_db_session.get_bind().url.database == "sales.db"
        """,
    )
    project.run().assert_outcomes(passed=1)


@pytest.mark.exhaustive
def test_the_session_of_a_test_keeps_nobody_waiting(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import threading, shop

        def test_held(app_db_session, app_db_isolation):
            app_db_session.add(shop.Order())
            app_db_session.flush()
            assert app_db_session.scalar(shop.ORDERS) == 1
            thread = threading.Thread(target=shop.place_order)
            thread.start()
            thread.join(4)
            assert not thread.is_alive()
            assert app_db_session.scalar(shop.ORDERS) == 2
        """,
    )
    project.run().assert_outcomes(passed=1)


COROUTINES = """
    import pytest, shop

    {mark}
    @pytest.mark.parametrize("number", range(2))
    async def test_committed(app_db_async_session, number):
        await shop.place_order_async()
        assert await app_db_async_session.scalar(shop.ORDERS) == 1
        app_db_async_session.add(shop.Order())
        await app_db_async_session.flush()
        assert shop.orders() == 2

    {mark}
    @pytest.mark.app_db
    async def test_marked(an_order):
        await shop.place_order_async()
        assert shop.orders() == 2

    {mark}
    async def test_a_session_of_the_isolation(app_db_isolation):
        async with app_db_isolation.async_session() as session:
            session.add(shop.Order())
            await session.commit()
        assert shop.orders() == 1

    {fixture}
    async def an_order():
        await shop.place_order_async()
"""
WAYS = {
    "strict": (("asyncio",), "strict", "@pytest.mark.asyncio", "@pytest_asyncio.fixture"),
    "auto": (("asyncio",), "auto", "", "@pytest.fixture"),
    "anyio": ((), "", "@pytest.mark.anyio", "@pytest.fixture"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("way", "driver"),
    [
        *((way, "sqlite") for way in WAYS),
        ("strict", "postgresql+psycopg"),
        ("anyio", "postgresql+asyncpg"),
        ("auto", "mysql+asyncmy"),
    ],
)
def test_coroutines_are_isolated(project: Project, request: pytest.FixtureRequest, way: str, driver: str) -> None:
    """Their fixtures and they themselves run in different tasks, and each test may have an event loop of its own."""
    plugins, mode, mark, fixture = WAYS[way]
    if driver != "sqlite":
        url: str = request.getfixturevalue("mariadb_url" if driver == "mysql+asyncmy" else "postgres_url")
        project.set("WRITER__URL", f"{driver}:{url.partition(':')[2]}")
    source = COROUTINES.format(mark=mark, fixture=fixture)
    if driver in ("postgresql+asyncpg", "mysql+asyncmy"):  # threads can't use their connections
        source = source.replace("assert shop.orders() == 2", "pass").replace("assert shop.orders() == 1", "pass")
    extra = (
        "    import pytest_asyncio\n" if plugins else "    @pytest.fixture\n    def anyio_backend():\n        return 'asyncio'\n"
    )
    project.file("test_shop.py", dedent(source).replace("import pytest, shop\n", "import pytest, shop\n" + dedent(extra), 1))
    options = ["-o", f"asyncio_mode={mode}", "-o", "asyncio_default_fixture_loop_scope=function"] if plugins else []
    project.run(*options, plugins=plugins).assert_outcomes(passed=4)


# ---- the marker -------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_marker_limits_isolation_or_takes_a_test_out_of_it(project: Project) -> None:
    project.make_tables()
    project.file(
        "test_shop.py",
        """
        import unittest
        import pytest, shop

        @pytest.fixture(autouse=True)
        def everywhere(app_db_isolation):
            pass

        @pytest.mark.app_db(connections=["writer"])
        def test_one_of_them():
            shop.place_order()

        @pytest.mark.app_db(isolation=False)
        def test_none():
            shop.place_order()

        def test_all():
            shop.place_order()

        @pytest.mark.app_db(isolation=False)
        def test_no_session(app_db_session):
            pass

        @pytest.mark.app_db
        class TestCase(unittest.TestCase):
            def test_in_a_case(self):
                shop.place_order()

        @pytest.mark.app_db(connections=["wrehouse"])
        def test_a_wrong_name():
            pass
        """,
    )
    result = project.run()
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines(["*app_db_session needs an isolated test, and the marker says isolation=False*"])
    result.stdout.fnmatch_lines(["*There is no connection 'wrehouse' to isolate. Did you mean 'warehouse'?*"])
    assert (project.rows(), project.rows("facts", "sales")) == (1, 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [False, True])
def test_a_wrong_marker_is_a_usage_error(project: Project, workers: bool) -> None:
    project.file(
        "test_shop.py",
        """
        import pytest

        @pytest.mark.app_db("writer", conections=["writer"])
        def test_one(): pass

        @pytest.mark.app_db(connections="writer", isolation=0)
        def test_two(): pass
        """,
    )
    result = project.run(*(["-n", "1"] if workers else []), plugins=("xdist",) if workers else ())
    output = result.stdout.str() + result.stderr.str()
    assert result.ret != 0
    assert "test_shop.py::test_one: there is no argument 'conections'" in output
    assert "test_shop.py::test_one: ('writer',) was given without a name" in output
    assert "test_shop.py::test_two: connections='writer' is no list of names" in output
    assert "test_shop.py::test_two: isolation=0 is neither True nor False" in output
    if workers:
        result.assert_outcomes(errors=2)
    else:
        assert result.ret == pytest.ExitCode.USAGE_ERROR


# ---- the container and its databases ------------------------------------------------------------------------------------


def test_without_a_container_the_lines_to_paste_are_shown(project: Project) -> None:
    project.file("conftest.py", "")
    project.file("test_shop.py", "def test_one(app_db_session): pass")
    result = project.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*Put this into conftest.py:", "*def app_db_container():"])


@pytest.mark.exhaustive
def test_what_is_no_database_container_is_refused(project: Project) -> None:
    project.file("conftest.py", CONFTEST.replace("return shop.container", "return object()"))
    project.file("test_shop.py", "def test_one(app_db_session): pass")
    result = project.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*app_db_container returned object, which is no container of app_db*"])


@pytest.mark.exhaustive
def test_urls_of_the_command_line_go_to_whatever_container_the_project_has(project: Project) -> None:
    project.set("WRITER__URL", "postgresql://nobody:hunter2@127.0.0.1:1/nothing")
    project.file(
        "conftest.py",
        CONFTEST
        + """
    def pytest_unconfigure():
        print("BACK AGAIN:", shop.container.writer_engine().url.host)
    """,
    )
    project.file(
        "test_shop.py",
        """
        import shop

        def test_where(app_db_session):
            shop.place_order()
            urls = [shop.container.providers[f"{name}_engine"]().url.database for name in ("writer", "reader", "warehouse")]
            assert urls == ["shop.db", "shop.db", "ini.db"]
        """,
    )
    project.file("pytest.ini", "[pytest]\napp_db_urls =\n    writer=sqlite:///loses.db\n    warehouse = sqlite:///ini.db\n")
    result = project.run("--app-db-url", "writer=sqlite:///shop.db", "-s")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["app_db: writer=sqlite:///shop.db", "app_db: warehouse=sqlite:///ini.db", "*BACK AGAIN: 127.0.0.1"]
    )


@pytest.mark.representative("writr=*")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("writr=sqlite:///a.db", "*Did you mean 'writer'? There are: 'reader', 'warehouse', 'writer'.*"),
        ("writer=postgresql://u:hunter2@p@h/d", "*APP_DB_CONNECTIONS__WRITER__URL: can't be read as a database URL*"),
        ("writer=nonsense://u:hunter2@h/d", "*names a dialect that SQLAlchemy does not have*"),
        ("postgresql://u:hunter2@h/d?a=b", "*--app-db-url takes NAME=URL, for example writer=sqlite:///test.db*"),
        ("writer=", "*--app-db-url takes NAME=URL*"),
    ],
)
def test_a_wrong_url_is_a_usage_error_without_a_password(project: Project, given: str, said: str) -> None:
    project.file("test_shop.py", "def test_one(app_db_session): pass\ndef test_two(app_db_session): pass")
    result = project.run("--app-db-url", given)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    output = result.stdout.str() + result.stderr.str()
    pytest.LineMatcher(output.splitlines()).fnmatch_lines([said])
    assert "hunter2" not in output


@pytest.mark.exhaustive
def test_a_password_is_not_in_the_header(project: Project) -> None:
    project.file("test_shop.py", "def test_one(): pass")
    result = project.run("--app-db-url", "writer=postgresql://u:hunter2@h/d")
    result.stdout.fnmatch_lines(["app_db: writer=postgresql+psycopg://u:[*][*][*]@h/d"])
    assert "hunter2" not in result.stdout.str()


@pytest.mark.exhaustive
def test_tables_are_made_and_dropped_for_the_session_unless_they_were_there(project: Project) -> None:
    project.file("test_shop.py", "import shop\ndef test_one(app_db_session): assert app_db_session.scalar(shop.ORDERS) == 0")
    project.run().assert_outcomes(passed=1)
    with pytest.raises(Exception, match="no such table"):
        project.rows()
    project.make_tables()
    project.run().assert_outcomes(passed=1)
    assert project.rows() == 0


@pytest.mark.exhaustive
def test_tables_that_come_from_elsewhere_are_the_projects(project: Project) -> None:
    project.file(
        "conftest.py",
        CONFTEST
        + """
    @pytest.fixture(scope="session")
    def app_db_tables(app_db_container):
        shop.Base.metadata.create_all(app_db_container.writer_engine())
    """,
    )
    project.file("test_shop.py", "import shop\ndef test_one(app_db_session): assert app_db_session.scalar(shop.ORDERS) == 0")
    project.run().assert_outcomes(passed=1)
    assert project.rows() == 0
    with pytest.raises(Exception, match="no such table"):
        project.rows("facts", "sales")


@pytest.mark.exhaustive
def test_the_fixtures_on_the_page_have_the_scopes_that_it_says(project: Project) -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    said = dict(re.findall(r"^\| `(app_db_\w+)` \| (\w+) \|", page, re.MULTILINE))
    found = re.findall(r"^(app_db_\w+)(?: \[(\w+) scope\])? --", project.run("--fixtures").stdout.str(), re.MULTILINE)
    scopes = {name: scope or "function" for name, scope in found}
    assert len(said) == 9
    assert said == {name: scopes.get(name) for name in said}


@pytest.mark.exhaustive
def test_hooks_are_noted(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import shop
        from app_db.testing import CapturedHook

        def test_hooks(app_db_isolation, app_db_hooks):
            with shop.container.transaction() as unit:
                unit.on_commit(print, "A-1")
            assert app_db_hooks == [CapturedHook(print, "A-1")]
        """,
    )
    project.run().assert_outcomes(passed=1)


# ---- what tests leave behind ----------------------------------------------------------------------------------------------

LEAKS = """
    import subprocess, sys
    import pytest, shop
    from sqlalchemy import create_engine, insert

    def url():
        return shop.container.settings().connection("writer").sqlalchemy_url()

    @pytest.fixture(scope="session")
    def engine(app_db_container):
        return app_db_container.writer_engine()  # the real one: no test is isolated yet

    def test_a_unit(app_db_isolation):
        kept.append(shop.container.transaction())
        kept[-1].__enter__()
        shop.container.writer_session().add(shop.Order())
        shop.container.writer_session().flush()

    def test_a_connection(app_db_isolation):
        kept.append(shop.container.writer_engine().connect())

    def test_a_row_by_the_real_engine(engine, app_db_isolation):
        with engine.begin() as connection:
            connection.execute(insert(shop.Order))

    def test_rows_by_an_engine_of_its_own(app_db_isolation):
        own = create_engine(url())
        with own.begin() as connection:
            connection.execute(insert(shop.Order), [{}, {}])
        own.dispose()

    def test_a_row_by_a_second_process(app_db_isolation):
        subprocess.run([sys.executable, "-c", "import shop; shop.place_order()"], check=True)

    def test_which_fails_itself(app_db_isolation):
        kept.append(shop.container.transaction())
        kept[-1].__enter__()
        raise LookupError

    kept = []
"""
EACH_BEGINS_CLEAN = """
    @pytest.fixture(autouse=True)
    def begins_clean(app_db_session):
        assert app_db_session.scalar(shop.ORDERS) == 0
"""


def test_what_a_test_leaves_is_reported_by_its_name_and_does_not_disturb_the_next(
    project: Project, new_postgres_url: Callable[[], str]
) -> None:
    project.set("WRITER__URL", new_postgres_url())
    project.set("WAREHOUSE__URL", new_postgres_url())
    project.file("test_shop.py", LEAKS + EACH_BEGINS_CLEAN)
    result = project.run("-v", "-rA")
    result.assert_outcomes(passed=5, failed=1, errors=6)
    left = {
        "test_a_unit": "a unit of work is still under way, in thread 'MainThread'",
        "test_a_connection": "writer: a connection is still checked out",
        "test_a_row_by_the_real_engine": "the table 'orders' of 'writer' has 1 row more than before, committed outside*",
        "test_rows_by_an_engine_of_its_own": "the table 'orders' of 'writer' has 2 rows more than before, committed outside*",
        "test_a_row_by_a_second_process": "the table 'sales' of 'warehouse' has 1 row more than before, committed outside*",
        "test_which_fails_itself": "a unit of work is still under way, in thread 'MainThread'",
    }
    for name, what in left.items():
        result.stdout.fnmatch_lines([f"test_shop.py::{name} has left something behind:", f"  {what}*"], consecutive=False)


@pytest.mark.exhaustive
def test_rows_of_tables_that_are_not_the_tests_own_are_left_alone(project: Project) -> None:
    project.make_tables()
    project.file("test_shop.py", LEAKS)
    project.run("-k", "own or process").assert_outcomes(passed=2, errors=2)
    assert project.rows() == 3


@pytest.mark.exhaustive
def test_counting_rows_can_be_switched_off(project: Project) -> None:
    project.make_tables()
    project.file("test_shop.py", LEAKS)
    project.file("pytest.ini", "[pytest]\napp_db_row_counts = false\n")
    project.run("-k", "engine_of_its_own").assert_outcomes(passed=1)


# ---- workers -------------------------------------------------------------------------------------------------------------

WHO = """
    import os, time, pathlib, pytest, shop

    @pytest.mark.parametrize("number", range(6))
    def test_where(app_db_session, number):
        shop.place_order()
        assert shop.orders() == 1
        names = [shop.container.providers[f"{name}_engine"]().url.database for name in ("writer", "reader", "warehouse")]
        with pathlib.Path("names").open("a") as file:
            print(*(pathlib.Path(name).name for name in names), file=file)
        time.sleep(0.2)  # for the other worker to get some
"""


def names_of_databases(project: Project) -> set[str]:
    return set((project.path / "names").read_text().splitlines())


@pytest.mark.exhaustive
def test_each_worker_has_files_of_its_own(project: Project) -> None:
    project.file("test_shop.py", WHO)
    project.run("-n", "2", plugins=("xdist",)).assert_outcomes(passed=6)
    assert names_of_databases(project) == {f"shop_gw{n}.db shop_gw{n}.db facts_gw{n}.db" for n in (0, 1)}
    assert list(project.path.glob("*.db*")) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_each_worker_has_databases_of_its_own_on_the_server(project: Project, request: pytest.FixtureRequest, kind: str) -> None:
    server: PostgresServer | MariaDBServer = request.getfixturevalue(kind)
    new_url: Callable[[], str] = request.getfixturevalue(f"new_{kind}_url")
    shop, facts = new_url(), new_url()
    shop_name, facts_name = (url.rpartition("/")[2] for url in (shop, facts))
    project.set("WRITER__URL", shop)
    project.set("READER__URL", shop)
    project.set("READER__READ_ONLY", "true")
    project.set("WAREHOUSE__URL", facts)
    before = databases_on(server)
    project.file("test_shop.py", WHO)
    project.run("-n", "2", plugins=("xdist",)).assert_outcomes(passed=6)
    assert names_of_databases(project) == {f"{shop_name}_gw{n} {shop_name}_gw{n} {facts_name}_gw{n}" for n in (0, 1)}
    assert databases_on(server) == before


def databases_on(server: PostgresServer | MariaDBServer) -> set[str]:
    is_postgres = isinstance(server, PostgresServer)
    engine = create_engine(server.url("postgres" if is_postgres else "mysql"), poolclass=NullPool)
    with engine.connect() as connection:
        return set(connection.scalars(text("SELECT datname FROM pg_database" if is_postgres else "SHOW DATABASES")))


@pytest.mark.exhaustive
def test_a_worker_that_may_make_no_database_is_told_what_to_do(
    project: Project, postgres: PostgresServer, postgres_url: str
) -> None:
    postgres.execute("CREATE ROLE nobody_much LOGIN PASSWORD 'hunter2'")
    try:
        url = f"postgresql://nobody_much:hunter2@{postgres.host}:{postgres.port}/{postgres_url.rpartition('/')[2]}"
        project.set("WRITER__URL", url)
        project.file("test_shop.py", WHO)
        result = project.run("-n", "2", plugins=("xdist",))
        result.assert_outcomes(errors=6)
        result.stdout.fnmatch_lines(
            ["*could not be created for the connection 'writer' (*permission denied*app_db_worker_databases*"]
        )
        assert "hunter2" not in result.stdout.str()
    finally:
        postgres.execute("DROP ROLE nobody_much")


@pytest.mark.exhaustive
def test_workers_databases_can_be_switched_off(project: Project) -> None:
    project.file("test_shop.py", WHO)
    project.file("pytest.ini", "[pytest]\napp_db_worker_databases = false\n")
    project.run("-n", "1", plugins=("xdist",)).assert_outcomes(passed=6)
    assert names_of_databases(project) == {"shop.db shop.db facts.db"}


@pytest.mark.exhaustive
def test_workers_may_have_urls_of_the_projects_own(project: Project) -> None:
    project.file("test_shop.py", WHO)
    project.file("pytest.ini", "[pytest]\napp_db_worker_databases = false\n")
    project.file(
        "conftest.py",
        """
        import pytest, shop
        from app_db.testing import overridden

        @pytest.fixture(scope="session")
        def app_db_container(worker_id):
            with overridden(shop.container, {"writer": f"sqlite:///own_{worker_id}.db"}):
                yield shop.container
        """,
    )
    project.run("-n", "1", plugins=("xdist",)).assert_outcomes(passed=6)
    assert names_of_databases(project) == {"own_gw0.db own_gw0.db facts.db"}


@pytest.mark.exhaustive
def test_workers_databases_are_those_of_the_command_lines_urls(project: Project) -> None:
    project.file("test_shop.py", WHO)
    project.run("-n", "1", "--app-db-url", "writer=sqlite:///other.db", plugins=("xdist",)).assert_outcomes(passed=6)
    assert names_of_databases(project) == {"other_gw0.db other_gw0.db facts_gw0.db"}


@pytest.mark.exhaustive
def test_a_fixture_over_the_projects_own_changes_nothing_twice(project: Project) -> None:
    source = """
        import pytest

        @pytest.fixture(scope="session")
        def app_db_container(app_db_container):
            return app_db_container
        """
    project.file("test_shop.py", dedent(source) + dedent(WHO))
    project.run("-n", "1", plugins=("xdist",)).assert_outcomes(passed=6)
    assert names_of_databases(project) == {"shop_gw0.db shop_gw0.db facts_gw0.db"}


@pytest.mark.exhaustive
def test_tests_in_any_order_are_isolated(project: Project) -> None:
    project.file("test_shop.py", WHO.replace("time.sleep(0.2)", "pass"))
    project.run("-p", "randomly", plugins=("randomly",)).assert_outcomes(passed=6)


# ---- unittest ------------------------------------------------------------------------------------------------------------

CASES = """
    import unittest, shop
    from app_db.testing import IsolatedTestCase

    class TestOrders(IsolatedTestCase):
        container = shop.container

        def test_one(self):
            shop.place_order()
            self.assertEqual(shop.orders(), 1)

        def test_two(self):
            self.test_one()
            with self.isolation.session() as session:
                self.assertEqual(session.scalar(shop.ORDERS), 1)

    class TestCoroutines(IsolatedTestCase, unittest.IsolatedAsyncioTestCase):
        container = shop.container

        async def asyncSetUp(self):
            await shop.place_order_async()

        async def test_one(self):
            await shop.place_order_async()
            self.assertEqual(shop.orders(), 2)

        async def test_two(self):
            await self.test_one()

    class TestOneConnection(IsolatedTestCase):
        container = shop.container
        connections = ["warehouse"]

        def test_names(self):
            self.assertEqual(self.isolation.names, ["warehouse"])

    class TestLeak(IsolatedTestCase):
        container = shop.container

        def test_leak(self):
            self.left_open = shop.container.transaction()
            self.left_open.__enter__()

    class TestWithout(IsolatedTestCase):
        def test_without(self):
            pass
"""


@pytest.mark.representative("unittest")
@pytest.mark.parametrize("runner", ["unittest", "pytest"])
def test_unittest_cases_are_isolated_under_both_runners(project: Project, runner: str) -> None:
    project.make_tables()
    project.file("test_shop.py", CASES)
    if runner == "pytest":
        result = project.run("-v")
        result.assert_outcomes(passed=5, failed=2)
        output = result.stdout.str()
    else:
        done = subprocess.run(
            [sys.executable, "-m", "unittest"], cwd=project.path, capture_output=True, text=True, timeout=60, check=False
        )
        output = done.stderr
        assert "Ran 7 tests" in output
        assert "FAILED (errors=2)" in output
    assert "a unit of work is still under way, in thread 'MainThread'" in output
    assert "TestWithout has no container to isolate. Write `container = container`" in output
    assert project.rows() == 0


def test_the_project_in_the_documentation_works(project: Project) -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    files = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL))
    assert sorted(files) == ["conftest.py", "shop.py", "test_cases.py", "test_shop.py"]
    for name, source in files.items():
        project.file(name, source)
    project.run().assert_outcomes(passed=6)


PAYMENTS = """
    from datetime import datetime

    from app_db import Connection, DatabaseContainer, orm_base
    from sqlalchemy import select
    from sqlalchemy.orm import Mapped, mapped_column

    class User(orm_base()):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Payment(orm_base("warehouse")):
        __tablename__ = "payments"
        id: Mapped[int] = mapped_column(primary_key=True)
        amount: Mapped[int]
        paid: Mapped[datetime] = mapped_column(default=datetime.now)

    class Container(DatabaseContainer):
        writer = Connection()
        warehouse = Connection()

    container = Container()

    def pay(name, amount):
        with container.transaction():
            container.writer_session().add(User(name=name))
            container.warehouse_session().add(Payment(amount=amount))

    def payments():
        with container.transaction():
            return list(container.session().scalars(select(Payment.amount).order_by(Payment.paid)))
"""


@pytest.mark.exhaustive
def test_the_fixtures_for_those_who_come_from_pyramid_sqlalchemy_work(project: Project) -> None:
    page = (ROOT / "docs" / "coming-from" / "pyramid-sqlalchemy.md").read_text()
    files = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL))
    assert sorted(files) == ["conftest.py", "test_shop.py"]
    project.file("shop.py", PAYMENTS)
    for name, source in files.items():
        project.file(name, source)
    project.run().assert_outcomes(passed=2)
    assert not (project.path / "shop.db").exists()  # the throw-away databases were used


# ---- what it costs those who do not use it ---------------------------------------------------------------------------------


def test_nothing_but_pytest_is_imported_before_a_fixture_is_used(project: Project) -> None:
    project.file("conftest.py", "")
    project.file(
        "test_nothing.py",
        """
        import sys

        def test_nothing():
            assert "pytest_app_db" in sys.modules
            assert not {"app_db", "sqlalchemy", "pydantic", "dependency_injector", "transaction"} & set(sys.modules)
        """,
    )
    off = [argument for name in HELD_OFF for argument in ("-p", f"no:{name}")]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pytest", "-s", *off],
        cwd=project.path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "import time:" in done.stderr
    assert "sqlalchemy" not in done.stderr
    assert "app_db: " not in done.stdout


@pytest.mark.exhaustive
def test_coverage_sees_what_the_package_does_when_it_is_imported(project: Project) -> None:
    """A plugin inside the package would have it imported before anybody measures."""
    project.file("test_shop.py", "import shop\ndef test_one(app_db_session): shop.place_order()")
    result = project.run("--cov=app_db", "--cov-report=term-missing", "--cov-report=json:coverage.json", plugins=("pytest_cov",))
    result.assert_outcomes(passed=1)
    files = json.loads((project.path / "coverage.json").read_text())["files"]
    (root,) = (found for name, found in files.items() if name.endswith("app_db/__init__.py"))
    lines = (ROOT / "app_db" / "__init__.py").read_text().splitlines()
    function = lines.index("    def __getattr__(name):") + 1  # its body runs when somebody asks for the version
    for_checkers = range(lines.index("if _typing.TYPE_CHECKING:") + 1, lines.index("    __version__: str") + 2)
    assert [line for line in root["missing_lines"] if line <= function and line not in for_checkers] == []
    assert root["summary"]["num_statements"] > 5
    (container,) = (found for name, found in files.items() if name.endswith("app_db/container.py"))
    source = (ROOT / "app_db" / "container.py").read_text().splitlines()
    definitions = {n for n, line in enumerate(source, 1) if line.startswith(("class ", "import ", "def "))}
    assert definitions <= set(container["executed_lines"])
