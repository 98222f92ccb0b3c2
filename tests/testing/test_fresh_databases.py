"""Copies of the databases for one test: what an isolated test can't show, and what is left afterwards."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, ForeignKey, create_engine, make_url, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from app_db import DatabaseSettings, container_of, metadata_of
from app_db.errors import CannotMakeDatabase, InvalidUse, IsolationBroken
from app_db.testing import fresh_databases, isolated, kept_templates
from harness.projects import Project
from harness.servers import MariaDBServer, PostgresServer

pytest_plugins = ["pytester"]


class Base(DeclarativeBase):
    metadata = metadata_of("fresh_shop")


class Job(Base):
    __tablename__ = "fresh_jobs"
    id: Mapped[int] = mapped_column(primary_key=True)


class Step(Base):
    __tablename__ = "fresh_a_step_of_a_job"
    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("fresh_jobs.id"))


ROWS = text("SELECT count(*) FROM fresh_jobs")


def container_at(**connections: Any) -> Any:
    """A container whose first connection has two jobs, one of which has a step."""
    container = container_of(*connections)(settings=DatabaseSettings(connections=connections, _env_file=None))
    container.create_all("fresh_shop")
    with container.transaction():
        container.fresh_shop_session().add_all([Job(), Job()])
    with container.transaction():
        container.fresh_shop_session().add(Step(job_id=2))
    return container


@pytest.fixture
def shop(new_database_url: Callable[[], str]) -> Iterator[Any]:
    container = container_at(fresh_shop={"url": new_database_url()})
    yield container
    container.shutdown_resources()


@pytest.fixture
def on_postgres(postgres_url: str) -> Iterator[Any]:
    container = container_at(fresh_shop={"url": postgres_url})
    yield container
    container.shutdown_resources()


def jobs(container: Any, connection: str = "fresh_shop") -> int:
    with container.transaction():
        return int(container.providers[f"{connection}_session"]().scalar(ROWS))


def add_job(container: Any) -> None:
    with container.transaction():
        container.fresh_shop_session().add(Job())


# ---- copies ---------------------------------------------------------------------------------------------------------------


def test_a_copy_has_tables_and_rows_and_what_is_committed_stays_in_it(shop: Any) -> None:
    place = shop.fresh_shop_engine().url
    with fresh_databases(shop):
        assert jobs(shop) == 2
        add_job(shop)
        assert jobs(shop) == 3
        with shop.transaction():
            assert shop.fresh_shop_session().scalars(text("SELECT job_id FROM fresh_a_step_of_a_job")).all() == [2]
        copy = shop.fresh_shop_engine().url
        assert copy.database == place.set(database=copy.database).database != place.database
        with pytest.raises(Exception, match=r"(?i)foreign key"), shop.transaction():
            shop.fresh_shop_session().add(Step(job_id=99))
    assert shop.fresh_shop_engine().url == place
    assert jobs(shop) == 2
    with fresh_databases(shop):
        assert jobs(shop) == 2, "the first copy was dropped"


def test_copies_come_from_a_template(shop: Any) -> None:
    with kept_templates(shop):
        with fresh_databases(shop):
            add_job(shop)
        with shop.transaction():
            shop.fresh_shop_session().execute(text("UPDATE fresh_jobs SET id = 7 WHERE id = 1"))
        with fresh_databases(shop):
            with shop.transaction():
                assert shop.fresh_shop_session().get(Job, 1), "as when the template was made"
            with fresh_databases(shop):
                assert jobs(shop) == 2
    with fresh_databases(shop), shop.transaction():
        assert shop.fresh_shop_session().get(Job, 1) is None


def test_a_template_is_made_anew_when_there_are_more_rows(shop: Any) -> None:
    with kept_templates(shop):
        with fresh_databases(shop):
            add_job(shop)
        add_job(shop)  # as a fixture of a module does that all its tests share
        with fresh_databases(shop):
            assert jobs(shop) == 3


async def test_coroutines_have_copies(postgres_url: str) -> None:
    container = container_at(fresh_shop={"url": postgres_url})
    async with fresh_databases(container):
        async with container.transaction():
            container.fresh_shop_async_session().add(Job())
        async with container.transaction():
            assert await container.fresh_shop_async_session().scalar(ROWS) == 3
    async with container.transaction():
        assert await container.fresh_shop_async_session().scalar(ROWS) == 2
    await container.shutdown_resources()


def test_connections_to_the_same_database_follow(new_database_url: Callable[[], str]) -> None:
    url, elsewhere = new_database_url(), new_database_url()
    container = container_at(
        fresh_shop={"url": url},
        replica={"url": url, "read_only": True},
        mirror={"mirror": "fresh_shop", "read_only": True},
        elsewhere={"url": elsewhere, "read_only": True},
    )
    before = container.settings().connection("elsewhere").sqlalchemy_url()
    with fresh_databases(container) as settings:
        add_job(container)
        assert [jobs(container, name) for name in ("replica", "mirror")] == [3, 3]
        assert settings.connection("replica").read_only
        assert settings.connection("elsewhere").sqlalchemy_url() == before
    assert jobs(container, "replica") == 2
    container.shutdown_resources()


def test_what_a_reader_without_settings_has_read_is_not_in_the_way(postgres_url: str) -> None:
    settings = DatabaseSettings(connections={"writer": {"url": postgres_url}}, _env_file=None)
    container: Any = container_of("writer", "reader")(settings=settings)
    with container.transaction():
        container.reader_session().execute(text("SELECT 1"))
    with fresh_databases(container), container.transaction():
        container.writer_session().execute(text("CREATE TABLE fresh_parcels ()"))
    container.shutdown_resources()


def test_a_database_in_memory_is_copied() -> None:
    container = container_at(fresh_shop={"url": "sqlite://"})
    with fresh_databases(container):
        add_job(container)
        assert jobs(container) == 3
    assert jobs(container) == 2
    container.shutdown_resources()


def test_a_file_is_copied_with_what_is_only_in_its_wal(sqlite_url: str) -> None:
    container = container_at(fresh_shop={"url": sqlite_url})
    with closing(sqlite3.connect(str(make_url(sqlite_url).database))) as reader:  # so that the WAL is not emptied
        reader.execute(str(ROWS))
        add_job(container)
        with fresh_databases(container):
            assert jobs(container) == 3
    container.shutdown_resources()


WHOLE = """
    CREATE SEQUENCE numbers START WITH 40;
    SELECT NEXTVAL(numbers);
    CREATE TABLE parts (id INT PRIMARY KEY AUTO_INCREMENT, price DECIMAL(8, 2), twice DECIMAL(8, 2) AS (price * 2) STORED);
    INSERT INTO parts (id, price) VALUES (5, 1.25);
    SET SESSION sql_mode = CONCAT(@@sql_mode, ',NO_AUTO_VALUE_ON_ZERO');
    INSERT INTO parts (id, price) VALUES (0, 0.5);
    CREATE VIEW a_view AS SELECT sum(twice) AS total FROM z_view;
    CREATE VIEW z_view AS SELECT twice FROM parts;
    CREATE FUNCTION tripled(n INT) RETURNS INT DETERMINISTIC RETURN n * 3;
    CREATE TRIGGER checks BEFORE INSERT ON parts FOR EACH ROW SET NEW.price = COALESCE(NEW.price, 9);
"""


@pytest.mark.exhaustive
def test_a_schema_of_mariadb_is_copied_with_all_that_is_in_it(mariadb_url: str) -> None:
    container = container_at(fresh_shop={"url": mariadb_url})
    statements = [line.strip().rstrip(";") for line in WHOLE.strip().splitlines()]
    statements[6], statements[7] = statements[7], statements[6]  # so that one view can be made of the other
    with container.fresh_shop_engine().connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.commit()
    with fresh_databases(container), container.transaction():
        session = container.fresh_shop_session()
        session.execute(text("INSERT INTO parts (price) VALUES (NULL)"))
        assert session.execute(text("SELECT id, price, twice FROM parts ORDER BY id")).all() == [
            (0, 0.5, 1),
            (5, 1.25, 2.5),
            (6, 9, 18),
        ]
        assert session.scalar(text("SELECT total FROM a_view")) == 21.5
        assert session.scalar(text("SELECT tripled(2)")) == 6
        assert session.scalar(text("SELECT NEXTVAL(numbers)")) > 40
    with container.transaction():
        assert container.fresh_shop_session().scalar(text("SELECT total FROM a_view")) == 3.5
    container.shutdown_resources()


# ---- what isolation can't show -------------------------------------------------------------------------------------------


def serializable(container: Any) -> None:
    engine = container.fresh_shop_engine().execution_options(isolation_level="SERIALIZABLE")
    with engine.connect() as one, engine.connect() as two:
        assert one.scalar(ROWS) == two.scalar(ROWS) == 2
        one.execute(text("INSERT INTO fresh_jobs VALUES (10)"))
        two.execute(text("INSERT INTO fresh_jobs VALUES (11)"))
        one.commit()
        with pytest.raises(Exception, match="could not serialize access"):
            two.commit()


def skip_locked(container: Any) -> None:
    engine: Engine = container.fresh_shop_engine()
    next_job = text("SELECT id FROM fresh_jobs ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED")
    with engine.connect() as one, engine.connect() as two:
        assert (one.scalar(next_job), two.scalar(next_job)) == (1, 2)


def notify(container: Any) -> None:
    with container.fresh_shop_engine().connect() as listener:
        listener.execute(text("LISTEN jobs"))
        listener.commit()
        with container.transaction():
            container.fresh_shop_session().execute(text("NOTIFY jobs, 'A-1'"))
        driver_connection: Any = listener.connection.driver_connection
        assert [told.payload for told in driver_connection.notifies(timeout=0.5, stop_after=1)] == ["A-1"]


def overlapping(container: Any) -> None:
    engine: Engine = container.fresh_shop_engine()
    with engine.connect() as one, engine.connect() as two:
        one.execute(text("INSERT INTO fresh_jobs VALUES (10)"))
        assert two.scalar(ROWS) == 2
        one.commit()
        assert two.scalar(ROWS) == 3


def several_connections(container: Any) -> None:
    engine: Engine = container.fresh_shop_engine()
    with engine.connect() as one, engine.connect() as two:
        own = text("SELECT pg_backend_pid()")
        assert one.scalar(own) != two.scalar(own)


def two_phase(container: Any) -> None:
    with container.fresh_shop_engine().connect() as connection:
        prepared = connection.begin_twophase()
        connection.execute(text("INSERT INTO fresh_jobs VALUES (10)"))
        prepared.prepare()
        connection.invalidate()  # as if the process were killed: the transaction stays prepared, and does not keep the copy
    with container.fresh_shop_engine().connect() as connection:
        in_doubt = text("SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()")
        assert connection.scalar(in_doubt) == 1


CANNOT_SHOW = [serializable, skip_locked, notify, overlapping, several_connections, two_phase]


@pytest.mark.parametrize("case", CANNOT_SHOW)
def test_what_isolation_can_not_show_can_be_tested_in_a_copy(
    on_postgres: Any, postgres: PostgresServer, postgres_url: str, case: Any
) -> None:
    with fresh_databases(on_postgres):
        case(on_postgres)
    assert databases_like(postgres, postgres_url) == [""]
    assert jobs(on_postgres) == 2
    with pytest.raises(BaseException), isolated(on_postgres, patience=0.2):  # noqa: B017  # whatever says that it fails
        case(on_postgres)


# ---- names, and what is left ----------------------------------------------------------------------------------------------


def databases_like(server: PostgresServer, url: str) -> list[str]:
    """What the names of the databases have behind that of a URL."""
    name = url.rpartition("/")[2]
    found = [row[0] for row in server.execute("SELECT datname FROM pg_database")]
    return sorted(each.removeprefix(name) for each in found if f"{each}_".startswith(f"{name}_"))


def test_copies_of_two_containers_have_different_names(on_postgres: Any, postgres: PostgresServer, postgres_url: str) -> None:
    other = container_of("fresh_shop")(settings=on_postgres.settings())
    with fresh_databases(on_postgres), fresh_databases(other):
        assert databases_like(postgres, postgres_url) == ["", "_fresh", "_fresh2"]
        add_job(other)
        assert jobs(on_postgres) == 2
    assert databases_like(postgres, postgres_url) == [""]
    other.shutdown_resources()


KILLED = """
import os, signal
from app_db import DatabaseSettings, container_of
from app_db.testing import fresh_databases, kept_templates
container = container_of("fresh_shop")(settings=DatabaseSettings(connections={{"fresh_shop": {{"url": {url!r}}}}}))
with kept_templates(container), fresh_databases(container):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.exhaustive
def test_what_a_killed_run_has_left_is_dropped_by_the_next(on_postgres: Any, postgres: PostgresServer, postgres_url: str) -> None:
    on_postgres.shutdown_resources()
    subprocess.run([sys.executable, "-c", KILLED.format(url=postgres_url)], check=False, timeout=60)
    assert databases_like(postgres, postgres_url) == ["", "_fresh", "_template"]
    with kept_templates(on_postgres), fresh_databases(on_postgres):
        assert databases_like(postgres, postgres_url) == ["", "_fresh", "_template"]
    assert databases_like(postgres, postgres_url) == [""]


def test_a_database_that_no_test_run_has_made_is_left_alone(
    on_postgres: Any, postgres: PostgresServer, postgres_url: str
) -> None:
    name = postgres_url.rpartition("/")[2]
    postgres.execute(f"CREATE DATABASE {name}_fresh")
    try:
        with fresh_databases(on_postgres):
            assert on_postgres.fresh_shop_engine().url.database == f"{name}_fresh2"
        assert databases_like(postgres, postgres_url) == ["", "_fresh"]
    finally:
        postgres.execute(f"DROP DATABASE {name}_fresh")


@pytest.mark.exhaustive  # PostgreSQL waits 5 s for the other one to go
def test_another_program_in_the_database_is_told(on_postgres: Any, postgres_url: str) -> None:
    other = create_engine(postgres_url, poolclass=NullPool)
    with kept_templates(on_postgres):
        with (
            other.connect(),
            pytest.raises(CannotMakeDatabase, match="is being accessed by other users"),
            fresh_databases(on_postgres),
        ):
            pass
        assert jobs(on_postgres) == 2
        with fresh_databases(on_postgres):
            pass
        with other.connect(), fresh_databases(on_postgres):
            assert jobs(on_postgres) == 2, "the template is there"


def test_in_an_isolated_test_there_are_no_copies(on_postgres: Any) -> None:
    with (
        isolated(on_postgres),
        pytest.raises(InvalidUse, match="can't be copied in an isolated test"),
        fresh_databases(on_postgres),
    ):
        pass
    assert jobs(on_postgres) == 2


def test_a_unit_that_is_left_is_told(shop: Any) -> None:
    left = shop.transaction()
    with pytest.raises(IsolationBroken, match="a unit of work is still under way, in"), fresh_databases(shop):
        left.__enter__()
        shop.fresh_shop_session().add(Job())
    assert jobs(shop) == 2
    with fresh_databases(shop):
        add_job(shop)


@pytest.mark.exhaustive
def test_a_connection_that_is_left_does_not_keep_the_copy(mariadb: MariaDBServer, mariadb_url: str) -> None:
    container = container_at(fresh_shop={"url": mariadb_url})
    with fresh_databases(container):
        own = create_engine(container.fresh_shop_engine().url, poolclass=NullPool)
        left = own.connect()
        left.execute(text("INSERT INTO fresh_jobs VALUES (10)"))
    name = mariadb_url.rpartition("/")[2]
    assert [row[0] for row in mariadb.execute("SHOW DATABASES") if row[0].startswith(f"{name}_")] == []
    left.invalidate()
    left.close()
    container.shutdown_resources()


# ---- pytest ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: Path) -> Project:
    return Project(pytester, monkeypatch, installed)


MARKED = """
    import pathlib, threading
    import pytest, shop

    @pytest.mark.app_db(fresh=True)
    def test_marked():
        place_by_two()

    def test_by_fixture(app_db_fresh):
        assert app_db_fresh is shop.container
        place_by_two()

    def test_beside_the_isolation(app_db_fresh, app_db_isolation):  # which app_db_live_server asks for, too
        assert app_db_isolation is None
        place_by_two()

    def test_isolated(app_db_isolation):
        assert shop.orders() == 0

    @pytest.fixture
    def an_order():
        shop.place_order()

    @pytest.mark.app_db(fresh=True)
    def test_what_its_fixtures_write(an_order):
        assert shop.orders() == 1

    def place_by_two():
        assert shop.orders() == 0
        with shop.container.transaction():
            shop.container.writer_session().add(shop.Order())
            shop.container.writer_session().flush()
            found = []
            thread = threading.Thread(target=lambda: found.append(shop.orders()))
            thread.start()
            thread.join(10)
            assert found == [0]
        assert shop.orders() == 1
"""


@pytest.mark.representative("1-sqlite")
@pytest.mark.parametrize("kind", ["sqlite", "postgres", "mariadb"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_marked_test_has_databases_of_its_own(
    project: Project, request: pytest.FixtureRequest, workers: int, kind: str
) -> None:
    servers: Any = None
    if kind != "sqlite":
        servers = request.getfixturevalue(kind)
        project.set("WRITER__URL", request.getfixturevalue(f"new_{kind}_url")())
        before = [
            row[0] for row in servers.execute("SELECT datname FROM pg_database" if kind == "postgres" else "SHOW DATABASES")
        ]
    project.file("test_shop.py", MARKED)
    options = ["-n", "2"] if workers == 2 else []
    project.run(*options, plugins=("xdist",) if workers == 2 else ()).assert_outcomes(passed=5)
    if servers is not None:
        after = [row[0] for row in servers.execute("SELECT datname FROM pg_database" if kind == "postgres" else "SHOW DATABASES")]
        assert after == before
    assert {path.name for path in project.path.glob("*.db")} <= {"shop.db", "facts.db"}


@pytest.mark.exhaustive
def test_copies_have_the_rows_that_shared_fixtures_have_changed_without_making_more_or_fewer(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import pytest, shop
        from sqlalchemy import text, update

        pytestmark = pytest.mark.app_db(fresh=True)

        def change(number):
            with shop.container.transaction():
                shop.container.writer_session().execute(update(shop.Order).values(id=number))

        def numbers():
            with shop.container.transaction():
                return list(shop.container.reader_session().scalars(text("SELECT id FROM orders")))

        @pytest.fixture(scope="module")
        def first(app_db_tables):
            shop.place_order()
            yield
            change(1)

        @pytest.fixture(scope="class")
        def ninth(first):
            change(9)
            yield
            change(2)

        def test_as_it_was_made(first):
            assert numbers() == [1]

        class TestOfClass:
            def test_set_up(self, ninth):
                assert numbers() == [9]
                change(5)  # in the copy

        def test_torn_down(first):
            assert numbers() == [2]
        """,
    )
    project.run().assert_outcomes(passed=3)


@pytest.mark.exhaustive
def test_what_a_marker_can_not_say_with_fresh(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import pytest

        @pytest.mark.app_db(fresh=True, connections=["writer"])
        def test_one(): pass

        @pytest.mark.app_db(fresh="yes")
        def test_two(): pass
        """,
    )
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*test_one: with fresh=True all databases are copied*", "*test_two: fresh='yes' is neither True nor*"]
    )


@pytest.mark.exhaustive
def test_what_can_not_be_had_in_a_test_with_copies_is_told(project: Project) -> None:
    project.file(
        "test_shop.py",
        """
        import pytest, shop

        @pytest.fixture(autouse=True)
        def everywhere(app_db_isolation): pass

        @pytest.mark.app_db(fresh=True)
        def test_marked():
            shop.place_order()
            assert shop.orders() == 1

        @pytest.mark.app_db(fresh=True)
        def test_session(app_db_session): pass

        def test_by_fixture(app_db_fresh): pass

        @pytest.mark.app_db(fresh=True)
        def test_left(app_db_fresh):
            kept.append(shop.container.transaction())
            kept[-1].__enter__()

        kept = []
        """,
    )
    result = project.run()
    result.assert_outcomes(passed=2, errors=3)
    output = result.stdout.str()
    assert "app_db_session needs an isolated test, and the marker says fresh=True" in output
    assert "Databases can't be copied in an isolated test" in output
    assert "During handling of" not in output, "each error is shown once"
    assert "test_left has left something behind:\n  a unit of work is still under way" in output.replace("E   ", "")
