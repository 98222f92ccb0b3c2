"""From one run of tests to the next: runs that were killed, models that have changed, and databases that are kept."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, inspect, make_url, text
from sqlalchemy.pool import NullPool

from harness.projects import SHOP, Project
from harness.servers import PostgresServer

pytest_plugins = ["pytester"]

CHANGED = SHOP.replace("import func, select", "import String, func, select").replace(
    '__tablename__ = "orders"\n',
    '__tablename__ = "orders"\n        sku: Mapped[str] = mapped_column(String(20), default="A-1")\n',
)
USED = """
    import shop

    def test_used(app_db_isolation):
        assert shop.orders() == {before}
        shop.place_order()
        assert shop.orders() == {before} + 1
"""
KILLED = """
    import os, signal
    import pytest, shop

    @pytest.mark.app_db
    def test_killed():
        shop.place_order()
        os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_WITH_ROWS = KILLED.replace("@pytest.mark.app_db", "@pytest.mark.usefixtures('app_db_tables')")


class Place:
    """The database of the writer, in which a run was killed."""

    def __init__(self, project: Project, url: str) -> None:
        self.project, self.url = project, url
        project.set("WRITER__URL", url)

    def run(self, tests: str, *options: str, models: str = SHOP, plugins: tuple[str, ...] = ()) -> pytest.RunResult:
        self.project.file("shop.py", models)
        self.project.file("test_shop.py", tests)
        return self.project.run(*options, plugins=plugins)

    def kill(self, tests: str = KILLED, *options: str) -> None:
        assert self.run(tests, *options).ret == -9
        assert "app_db_test_run" in self.tables()

    def tables(self) -> list[str]:
        return sorted(inspect(self.engine()).get_table_names())

    def rows(self) -> int:
        with self.engine().connect() as connection:
            return int(connection.scalar(text("SELECT count(*) FROM orders")) or 0)

    def engine(self, database: str | None = None) -> Any:
        url = make_url(self.url)
        return create_engine(url if database is None else url.set(database=database), poolclass=NullPool)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: Path) -> Project:
    return Project(pytester, monkeypatch, installed)


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.exhaustive),
        pytest.param("mariadb", marks=pytest.mark.exhaustive),
    ]
)
def place(project: Project, request: pytest.FixtureRequest) -> Place:
    if request.param == "sqlite":
        return Place(project, f"sqlite:///{project.path / 'shop.db'}")
    return Place(project, request.getfixturevalue(f"new_{request.param}_url")())


def notes(result: pytest.RunResult) -> list[str]:
    """What the report says about the writer at its end."""
    told = [line.removeprefix("app_db: ") for line in result.stdout.lines if line.startswith("app_db: the ")]
    return [line for line in told if "warehouse" not in line]


# ---- without an option ----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
def test_empty_tables_of_a_killed_run_are_made_anew_although_the_models_have_changed(place: Place) -> None:
    place.kill()
    result = place.run(USED.format(before=0), models=CHANGED)
    result.assert_outcomes(passed=1)
    (told,) = notes(result)
    assert told.startswith("the tables of 'writer' were made anew: they were of a test run that was killed (process ")
    assert told.endswith("), and the models have changed since: orders")
    assert place.tables() == []


@pytest.mark.exhaustive
def test_rows_of_a_killed_run_are_told_and_left(place: Place) -> None:
    place.kill(KILLED_WITH_ROWS)
    result = place.run(USED.format(before=1))
    result.assert_outcomes(passed=1)
    (told,) = notes(result)
    assert told.startswith("the tables of 'writer' were made by a test run that was killed (process ")
    assert told.endswith("and have rows: orders (1). They were left as they are; `pytest --app-db-create` makes them anew")
    assert place.rows() == 1


@pytest.mark.exhaustive
def test_rows_of_a_killed_run_and_changed_models_end_the_session_with_one_error(place: Place) -> None:
    place.kill(KILLED_WITH_ROWS)
    result = place.run(USED.format(before=0), models=CHANGED)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    output = " ".join((result.stdout.str() + result.stderr.str()).split())
    assert (
        "The tests can't make the tables of the connection 'writer': the tables were made by a test run that was kill" in output
    )
    assert (
        "Since then the models have changed (orders), and there are rows in orders (1). `pytest --app-db-create` makes" in output
    )
    assert "no such column" not in output
    assert place.rows() == 1


# ---- --app-db-create ------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_tables_of_another_host_are_used_and_the_advice_is_told(place: Place) -> None:
    place.kill()
    with place.engine().begin() as connection:
        connection.execute(text("UPDATE app_db_test_run SET host = 'a-container-that-is-gone'"))
    result = place.run(USED.format(before=0))
    result.assert_outcomes(passed=1)
    (told,) = notes(result)
    assert "are in use by another test run: process " in told
    assert told.endswith("If that host is gone, `pytest --app-db-create` makes them anew")
    place.run(USED.format(before=0), "--app-db-create").assert_outcomes(passed=1)
    assert "app_db_test_run" not in place.tables()


@pytest.mark.exhaustive
def test_create_makes_anew_what_a_killed_run_has_left(place: Place) -> None:
    place.kill(KILLED_WITH_ROWS)
    result = place.run(USED.format(before=0), "--app-db-create", models=CHANGED)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["app_db: --app-db-create: make databases that are missing, and make anew what an earlier*"])
    result.stdout.fnmatch_lines(["app_db: the tables of 'writer' were made anew: as --app-db-create says"])
    assert place.tables() == []


@pytest.mark.exhaustive
def test_create_makes_a_database_that_is_missing_and_drops_it_at_the_end(place: Place) -> None:
    url = make_url(place.url)
    missing = str(
        Path(str(url.database)).with_name("missing.db") if url.get_backend_name() == "sqlite" else f"{url.database}_missing"
    )
    options = ["--app-db-create", f"--app-db-url=writer={url.set(database=missing).render_as_string(hide_password=False)}"]
    for tests, outcome in ((USED.format(before=0), 0), (KILLED_WITH_ROWS, -9), (USED.format(before=0), 0)):
        result = place.run(tests, *options)
        assert result.ret == outcome, result.stdout.str()
    result.stdout.fnmatch_lines(["app_db: the database *missing*' was made anew: as --app-db-create says"])
    if url.get_backend_name() == "sqlite":
        assert not Path(missing).exists()
    else:
        with pytest.raises(Exception, match=missing):
            place.engine(missing).connect()


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
def test_create_never_drops_what_no_test_run_has_made(place: Place) -> None:
    with place.engine().begin() as connection:
        orders = Table("orders", MetaData(), Column("id", Integer, primary_key=True))
        orders.create(connection)
        connection.execute(orders.insert())
    result = place.run(USED.format(before=0), "--app-db-create")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    output = " ".join((result.stdout.str() + result.stderr.str()).split())
    assert (
        "there is 'orders' already, which no test run has made, and --app-db-create drops only what a test run has made" in output
    )
    assert place.rows() == 1
    place.run(USED.format(before=1), "--app-db-reuse").assert_outcomes(passed=1)
    assert place.rows() == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
def test_tables_that_are_no_models_any_more_are_made_anew_too(place: Place) -> None:
    place.kill(KILLED_WITH_ROWS)
    renamed = SHOP.replace('"orders"', '"purchases"')
    result = place.run(USED.format(before=0), "--app-db-create", models=renamed)
    result.assert_outcomes(passed=1)
    assert place.tables() == []


# ---- --app-db-reuse -------------------------------------------------------------------------------------------------------

COUNTS_RUNS = """
    import pytest, shop
    from sqlalchemy import text

    def test_run(app_db_tables):
        with shop.container.transaction():
            shop.container.writer_session().execute(text("INSERT INTO orders (id) VALUES (DEFAULT)" if "sqlite" not in str(
                shop.container.writer_engine().url) else "INSERT INTO orders DEFAULT VALUES"))
        assert shop.orders() == {runs}
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
def test_reuse_keeps_the_tables_until_the_models_change(place: Place) -> None:
    place.run(COUNTS_RUNS.format(runs=1), "--app-db-reuse").assert_outcomes(passed=1)
    assert place.rows() == 1, "they are kept, and so is what a test committed outside its isolation"
    result = place.run(COUNTS_RUNS.format(runs=2), "--app-db-reuse")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["app_db: --app-db-reuse: keep the databases*"])
    assert "the tables of 'writer', which were kept, have rows: orders (1)" in notes(result)
    result = place.run(USED.format(before=0), "--app-db-reuse", models=CHANGED)
    result.assert_outcomes(passed=1)
    (told,) = notes(result)
    assert told.endswith(": orders")
    assert "made anew" in told
    assert "the models have changed since" in told
    assert place.rows() == 0
    result = place.run(USED.format(before=0), models=CHANGED)
    result.assert_outcomes(passed=1)
    assert "orders" not in place.tables(), "without the option, nothing is kept"


LINES = SHOP.replace(
    "    class Sale(Facts):",
    """    class Line(Base):
        __tablename__ = "lines"
        id: Mapped[int] = mapped_column(primary_key=True)
        order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))

    class Sale(Facts):""",
).replace("import func, select", "import ForeignKey, func, select")


@pytest.mark.exhaustive
def test_reuse_notices_that_a_model_was_removed(project: Project, postgres_url: str) -> None:
    place = Place(project, postgres_url)
    place.run(USED.format(before=0), "--app-db-reuse", models=LINES).assert_outcomes(passed=1)
    result = place.run(USED.format(before=0), "--app-db-reuse")
    result.assert_outcomes(passed=1)
    (told,) = notes(result)
    assert told.endswith("the models have changed since: lines (this run imports no model of it)")
    assert "lines" not in place.tables()


DEFINES_A_MODEL = """
    import shop
    from sqlalchemy.orm import Mapped, mapped_column

    def test_a_mixin(app_db_isolation):
        class Local(shop.Base):
            __tablename__ = "local"
            id: Mapped[int] = mapped_column(primary_key=True)
"""


@pytest.mark.exhaustive
def test_reuse_forgets_a_model_that_a_test_has_defined(project: Project) -> None:
    place = Place(project, f"sqlite:///{project.path / 'shop.db'}")
    for _ in range(2):
        result = place.run(DEFINES_A_MODEL, "--app-db-reuse")
        result.assert_outcomes(passed=1)
        assert notes(result) == [], "the table was never made"


@pytest.mark.exhaustive
def test_reuse_by_workers_forgets_a_model_that_a_test_has_defined(project: Project) -> None:
    place = Place(project, f"sqlite:///{project.path / 'shop.db'}")
    for _ in range(2):
        result = place.run(DEFINES_A_MODEL, "--app-db-reuse", "-n", "1", plugins=("xdist",))
        result.assert_outcomes(passed=1)
        assert notes(result) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
def test_reuse_makes_anew_what_a_killed_run_has_left(place: Place) -> None:
    place.run(USED.format(before=0), "--app-db-reuse").assert_outcomes(passed=1)
    place.kill(KILLED_WITH_ROWS, "--app-db-reuse")
    result = place.run(USED.format(before=0), "--app-db-reuse", models=CHANGED)
    result.assert_outcomes(passed=1)
    told = " ".join(notes(result))
    assert "made anew" in told
    assert "was killed" in told


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
def test_reuse_may_be_in_the_configuration_and_keeps_the_databases_of_workers(place: Place) -> None:
    place.project.file("pytest.ini", "[pytest]\napp_db_reuse = true\n")
    try:
        place.run(COUNTS_RUNS.format(runs=1), "-n", "1", plugins=("xdist",)).assert_outcomes(passed=1)
        place.run(COUNTS_RUNS.format(runs=2), "-n", "1", plugins=("xdist",)).assert_outcomes(passed=1)
        result = place.run(USED.format(before=0), "-n", "1", models=CHANGED, plugins=("xdist",))
        result.assert_outcomes(passed=1)
        result.stdout.fnmatch_lines(
            ["app_db: the database *_gw0*' was made anew: the models have changed since the last run: orders"]
        )
    finally:
        place.project.file("pytest.ini", "[pytest]\n")
        place.run(USED.format(before=0), "-n", "1", models=CHANGED, plugins=("xdist",)).assert_outcomes(passed=1)
    name = make_url(place.url).set(database=f"{make_url(place.url).database}_gw0")
    if name.get_backend_name() == "sqlite":
        assert [path.name for path in place.project.path.glob("*_gw0.db")] == []
    else:
        with pytest.raises(Exception, match="_gw0"):
            place.engine(name.database).connect()


# ---- --app-db-keep-failed -------------------------------------------------------------------------------------------------

FAILS = """
    import pytest, shop

    def test_passes(app_db_isolation):
        shop.place_order()

    def test_fails(app_db_session):
        shop.place_order()
        shop.place_order()
        assert shop.orders() == 3

    def test_after_it(app_db_isolation):
        assert shop.orders() == 0

    def test_fails_as_well(app_db_isolation):
        assert False
"""
FAILS_FRESH = """
    import pytest, shop

    @pytest.mark.app_db(fresh=True)
    def test_fails():
        shop.place_order()
        shop.place_order()
        assert shop.orders() == 3
"""


FAILS_IN_SETUP = """
    import pytest, shop

    @pytest.fixture
    def prepared(app_db_isolation):
        shop.place_order()
        raise ValueError

    def test_prepared(prepared): ...
"""


def kept_command(result: pytest.RunResult) -> str:
    lines = result.stdout.lines
    (at,) = [number for number, line in enumerate(lines) if "are kept as they were when it failed. Look at them with:" in line]
    return next(line for line in lines[at:] if line.startswith("writer: ")).removeprefix("writer: ")


@pytest.mark.exhaustive
@pytest.mark.parametrize("tests", [FAILS, FAILS_FRESH], ids=["isolated", "fresh"])
def test_keep_failed_keeps_the_rows_of_the_first_test_that_fails(place: Place, tests: str) -> None:
    failed, database = tests.count("assert False") + 1, ""
    for _ in range(2):
        result = place.run(tests, "--app-db-keep-failed")
        result.assert_outcomes(passed=2 if failed == 2 else 0, failed=failed)
        command = kept_command(result)
        assert "p@ss" not in result.stdout.str()
        found = re.search(r"[\w/.-]+_failed(\.db)?\b", command)
        assert found is not None
        database = found[0]
        with place.engine(database).connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM orders")) == 2
        assert place.tables() == []
    program = shlex.split(command)[0]
    if program == "sqlite3" and shutil.which(program):
        shown = subprocess.run([*shlex.split(command), "SELECT count(*) FROM orders"], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "2"
    drop(place, database)


@pytest.mark.exhaustive
def test_keep_failed_shows_the_databases_of_a_worker(place: Place) -> None:
    result = place.run(FAILS, "--app-db-keep-failed", "-n", "1", plugins=("xdist",))
    result.assert_outcomes(passed=2, failed=2)
    found = re.search(r"[\w/.-]+_gw0_failed(\.db)?\b", kept_command(result))
    assert found is not None
    with place.engine(found[0]).connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM orders")) == 2
    drop(place, found[0])


@pytest.mark.parametrize("option", ["--show-capture=no", pytest.param("--tb=line", marks=pytest.mark.exhaustive)])
def test_where_pytest_shows_no_sections_the_report_ends_with_the_databases(project: Project, option: str) -> None:
    result = Place(project, "sqlite:///shop.db").run(FAILS, "--app-db-keep-failed", option)
    result.assert_outcomes(passed=2, failed=2)
    assert "shop_failed.db" in kept_command(result)


@pytest.mark.exhaustive
def test_the_databases_of_a_test_whose_fixture_fails_are_shown_at_the_end_of_the_report(project: Project) -> None:
    result = Place(project, "sqlite:///shop.db").run(FAILS_IN_SETUP, "--app-db-keep-failed")
    result.assert_outcomes(errors=1)
    assert "shop_failed.db" in kept_command(result)
    result.stdout.fnmatch_lines(["app_db: The databases of test_shop.py::test_prepared are kept as they were when it failed.*"])
    assert project.rows("shop_failed") == 1


@pytest.mark.exhaustive
def test_copies_that_can_not_be_made_are_an_error_without_the_code_of_app_db(project: Project) -> None:
    for number in ("", *range(2, 21)):
        project.file(f"shop_failed{number}.db", "")  # no run of tests has made these
    result = Place(project, "sqlite:///shop.db").run(USED.format(before=0), "--app-db-keep-failed")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["The database 'shop_failed.db' could not be created for the connection 'writer' (there *"])
    result.stdout.no_fnmatch_line("*_fresh.py*")


def drop(place: Place, database: str) -> None:
    if not place.url.startswith("sqlite"):
        with place.engine().connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(text(f"DROP DATABASE {database}"))


@pytest.mark.exhaustive
def test_an_enumeration_of_postgresql_is_made_anew(project: Project, postgres_url: str, postgres: PostgresServer) -> None:
    place = Place(project, postgres_url)
    sized = SHOP.replace(
        "    Base = orm_base", '    import enum\n    Size = enum.Enum("Size", "S M")\n    Base = orm_base', 1
    ).replace(
        '__tablename__ = "orders"\n', '__tablename__ = "orders"\n        size: Mapped[Size] = mapped_column(default=Size.M)\n'
    )
    assert place.run(KILLED_WITH_ROWS, models=sized).ret == -9
    larger = sized.replace('"S M"', '"S L"').replace("Size.M", "Size.L")
    place.run(USED.format(before=0), "--app-db-create", models=larger).assert_outcomes(passed=1)
