"""With psycopg, BEGIN goes along with the first statement of a transaction. Nothing else is different."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.orm import sessionmaker

from app_db._databases import psycopg_cursors
from app_db.errors import TransactionLost
from async_applications import opened_awaited
from items import Databases, Item, opened
from servers import PostgresServer

ONE_CONNECTION = {"pool": {"size": 1, "max_overflow": 0}}
NAMED = text("SELECT name FROM item WHERE amount = :amount ORDER BY name")
BACKEND = text("SELECT pg_backend_pid() WHERE 1 = :one")
ONE = {"one": 1}


@pytest.fixture
def databases(postgres_url: str) -> Iterator[Databases]:
    with opened({"writer": postgres_url}, each=ONE_CONNECTION) as databases:
        databases.put("a")
        yield databases


def pgconn_of(databases: Databases) -> Any:
    """The libpq connection, of which there is one, in its pool."""
    with databases.engine().connect() as connection:
        return connection.connection.driver_connection.pgconn  # type: ignore[union-attr]


@contextmanager
def counted_round_trips(pgconn: Any) -> Iterator[Callable[[], int]]:
    """Count how often the server was waited for: it says that it is ready for more once for each time."""
    with tempfile.TemporaryFile("w+") as trace:
        pgconn.trace(trace.fileno())

        def count() -> int:
            pgconn.untrace()
            trace.seek(0)
            return trace.read().count("ReadyForQuery")

        try:
            yield count
        finally:
            pgconn.untrace()


def sleepers(databases: Databases) -> list[int]:
    """The backends that sleep in the database."""
    asleep = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    with databases.outside().connect() as outside:
        return list(outside.exec_driver_sql(asleep).scalars())


def when_asleep(databases: Databases, act: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a statement sleeps."""

    def wait() -> None:
        while not sleepers(databases):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def backend(databases: Databases) -> int:
    with databases.container.transaction():
        return int(databases.session().scalar(BACKEND, ONE) or 0)


def read(databases: Databases) -> list[str]:
    with databases.container.transaction():
        return list(databases.session().scalars(NAMED, {"amount": 0}))


# ---- what it is for -----------------------------------------------------------------------------------------------------


def test_a_unit_that_reads_a_row_or_writes_one_takes_two_round_trips(databases: Databases) -> None:
    pgconn = pgconn_of(databases)
    with counted_round_trips(pgconn) as count:
        assert read(databases) == ["a"]
        assert count() == 2
    with counted_round_trips(pgconn) as count:
        with databases.container.transaction():
            databases.session().add(Item(name="b"))
        assert count() == 2
    assert databases.items() == ["a", "b"]


def test_by_itself_psycopg_takes_three(databases: Databases, postgres_url: str) -> None:
    """The fact that all of this is about. Where it is one no more, there is nothing to be sent along."""
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        pgconn: Any = connection.connection.driver_connection.pgconn  # type: ignore[union-attr]
    with counted_round_trips(pgconn) as count:
        with sessionmaker(engine).begin() as session:
            assert session.scalars(NAMED, {"amount": 0}).all() == ["a"]
        assert count() == 3
    engine.dispose()


def test_each_further_statement_is_one_more(databases: Databases) -> None:
    with counted_round_trips(pgconn_of(databases)) as count:
        with databases.container.transaction():
            for _ in range(3):
                assert databases.session().scalars(NAMED, {"amount": 0}).all() == ["a"]
        assert count() == 4


def test_coroutines_save_it_too(postgres_url: str) -> None:
    with opened_awaited(postgres_url, "psycopg", each=ONE_CONNECTION) as databases:
        databases.put("a")

        async def main() -> int:
            async with databases.container.transaction():
                connection = await (await databases.awaited_session().connection()).get_raw_connection()
                pgconn: Any = connection.driver_connection.pgconn  # type: ignore[union-attr]
            with counted_round_trips(pgconn) as count:
                async with databases.container.transaction():
                    assert (await databases.awaited_session().scalars(NAMED, {"amount": 0})).all() == ["a"]
                return count()

        assert databases.run(main) == 2


def test_the_release_of_psycopg_is_known(databases: Databases) -> None:
    """It rests on how psycopg's cursors are put together. A release of which that isn't known gets its own cursors."""
    with databases.engine().connect() as connection:
        driver_connection: Any = connection.connection.driver_connection
        assert issubclass(driver_connection.cursor_factory, psycopg_cursors._SendingBeginAlong)


# ---- what is as it was ----------------------------------------------------------------------------------------------------


def test_statements_are_prepared_as_ever(databases: Databases) -> None:
    """After psycopg has seen one five times, by the sixth, which here goes along with BEGIN."""
    for _ in range(8):
        assert read(databases) == ["a"]
    with databases.engine().connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar() == 1
    databases.put("b")
    assert read(databases) == ["a", "b"]


def test_no_more_statements_stay_prepared_than_psycopg_is_told(postgres_url: str) -> None:
    with opened({"writer": postgres_url}, each={"connect_args": {"prepare_threshold": 0}, **ONE_CONNECTION}) as databases:
        with databases.engine().connect() as connection:
            driver_connection: Any = connection.connection.driver_connection
            driver_connection.prepared_max = 2
        for number in range(6):
            with databases.container.transaction():
                databases.session().execute(text(f"SELECT :what + {number}"), {"what": 1})
        driver_connection.prepare_threshold = None  # or the question would be one of them
        with databases.engine().connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar() == 2


@pytest.mark.parametrize("times", [1, 5, 6, 9])
def test_a_first_statement_that_fails_says_why(databases: Databases, times: int) -> None:
    """Prepared or not, or about to be: preparing one that is wrong fails first."""
    for _ in range(times):
        with pytest.raises(IntegrityError, match="duplicate key"), databases.container.transaction():
            databases.session().execute(text("INSERT INTO item (name, amount) VALUES (:name, 0)"), {"name": "a"})
        with pytest.raises(ProgrammingError, match='relation "nowhere" does not exist'), databases.container.transaction():
            databases.session().execute(text("SELECT * FROM nowhere WHERE id = :id"), {"id": 1})
    assert read(databases) == ["a"]


def test_a_statement_that_can_no_longer_be_prepared_says_why(databases: Databases) -> None:
    doomed = text("SELECT * FROM doomed WHERE id = :id")
    databases.rival("CREATE TABLE doomed (id integer)")
    for _ in range(5):
        with databases.container.transaction():
            databases.session().execute(doomed, {"id": 1})
    databases.rival("DROP TABLE doomed")
    with pytest.raises(ProgrammingError, match='relation "doomed" does not exist'), databases.container.transaction():
        databases.session().execute(doomed, {"id": 1})
    assert read(databases) == ["a"]


def test_a_first_statement_that_failed_can_not_be_swallowed(databases: Databases) -> None:
    with pytest.raises(TransactionLost), databases.container.transaction(), pytest.raises(IntegrityError):
        databases.session().execute(text("INSERT INTO item (name, amount) VALUES (:name, 0)"), {"name": "a"})
    assert read(databases) == ["a"]


def test_a_parameter_that_can_not_be_sent_is_refused_and_nothing_stays_open(databases: Databases) -> None:
    before = backend(databases)
    with pytest.raises(ProgrammingError, match="cannot adapt type"), databases.container.transaction():
        databases.session().execute(text("SELECT :what"), {"what": object()})
    assert pgconn_of(databases).pipeline_status == psycopg.pq.PipelineStatus.OFF
    assert backend(databases) == before


def test_several_statements_at_once_are_still_several(databases: Databases) -> None:
    """A pipeline takes no such thing. psycopg does, where no parameter is used."""
    driver_sql = "INSERT INTO item (name, amount) VALUES ('b', 0); INSERT INTO item (name, amount) VALUES ('c', 0)"
    for parameters in ({}, {"unused": 1}):
        with databases.container.transaction():
            databases.session().connection().exec_driver_sql(driver_sql, parameters)
        assert databases.items() == ["a", "b", "c"]
        databases.rival("DELETE FROM item WHERE name <> 'a'")


def test_many_rows_server_side_cursors_and_copies_may_come_first(databases: Databases) -> None:
    with databases.container.transaction():
        databases.session().execute(insert(Item), [{"name": f"n{number}", "amount": 1} for number in range(2500)])
    with databases.container.transaction():
        rows = databases.session().scalars(select(Item.name).where(Item.amount == 1).execution_options(yield_per=100))
        assert len(list(rows)) == 2500
    with databases.container.transaction():
        driver_connection: Any = databases.session().connection().connection.driver_connection
        with driver_connection.cursor() as cursor, cursor.copy("COPY item (name, amount) FROM STDIN") as copy:
            copy.write_row(("copied", 2))
        databases.session().execute(NAMED, {"amount": 2})
    assert "copied" in databases.items()


def test_a_unit_begins_on_the_terms_that_it_asks_for(databases: Databases) -> None:
    level, read_only = text("SELECT current_setting(:what)"), {"what": "transaction_read_only"}
    for wanted in ("SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"):
        with databases.container.transaction(isolation=wanted):
            assert databases.session().scalar(level, {"what": "transaction_isolation"}) == wanted.lower()
    with databases.container.transaction(read_only=True):
        assert databases.session().scalar(level, read_only) == "on"
    with databases.container.transaction():
        assert databases.session().scalar(level, read_only) == "off"


def test_a_unit_without_time_left_is_stopped(databases: Databases) -> None:
    with pytest.raises(TimeoutError), databases.container.transaction(timeout=0.2):
        databases.session().execute(text("SELECT pg_sleep(:seconds)"), {"seconds": 20})
    assert read(databases) == ["a"]


def test_notices_of_the_first_statement_are_heard(databases: Databases) -> None:
    heard: list[Any] = []
    databases.rival(
        "CREATE FUNCTION say(what text) RETURNS text LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''%'', what; RETURN what; END'"
    )
    with databases.engine().connect() as connection:
        driver_connection: Any = connection.connection.driver_connection
        driver_connection.add_notice_handler(lambda notice: heard.append(notice.message_primary))
    with databases.container.transaction():
        assert databases.session().scalar(text("SELECT say(:what)"), {"what": "hello"}) == "hello"
    assert heard == ["hello"]


# ---- what goes wrong on the way --------------------------------------------------------------------------------------------


def test_an_interrupted_first_statement_ends_on_the_server_too(databases: Databases) -> None:
    interrupter = when_asleep(databases, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), databases.container.transaction():
        databases.session().execute(text("SELECT pg_sleep(:seconds)"), {"seconds": 60})
    interrupter.join()
    assert sleepers(databases) == []
    assert read(databases) == ["a"]


def test_a_cancelled_first_statement_leaves_a_connection_that_works(postgres_url: str) -> None:
    with opened_awaited(postgres_url, "psycopg", each=ONE_CONNECTION) as databases:
        databases.put("a")

        async def unit() -> None:
            async with databases.container.transaction():
                await databases.say("SELECT pg_sleep(:seconds)", seconds=60)

        async def main() -> list[str]:
            task = asyncio.create_task(unit())
            loop = asyncio.get_running_loop()
            canceller = when_asleep(databases, lambda: loop.call_soon_threadsafe(task.cancel))
            await asyncio.wait([task])
            canceller.join()
            assert task.cancelled()
            async with databases.container.transaction():
                return list(await databases.awaited_session().scalars(NAMED, {"amount": 0}))

        assert databases.run(main) == ["a"]


def test_a_connection_that_is_lost_at_the_first_statement_is_replaced(databases: Databases, postgres: PostgresServer) -> None:
    first = backend(databases)
    postgres.execute(f"SELECT pg_terminate_backend({first})")
    with pytest.raises(DBAPIError) as lost, databases.container.transaction():
        databases.session().execute(BACKEND, ONE)
    assert lost.value.connection_invalidated
    assert read(databases) == ["a"]


def test_a_connection_that_is_lost_during_the_first_statement_is_replaced(databases: Databases, postgres: PostgresServer) -> None:
    first = backend(databases)
    killer = when_asleep(databases, lambda: postgres.execute(f"SELECT pg_terminate_backend({first})"))
    with (
        pytest.raises(DBAPIError, match=r"terminating connection|closed the connection") as lost,
        databases.container.transaction(),
    ):
        databases.session().execute(text("SELECT pg_sleep(:seconds)"), {"seconds": 60})
    killer.join()
    assert lost.value.connection_invalidated
    assert read(databases) == ["a"]


# ---- where it is left to psycopg --------------------------------------------------------------------------------------------


class Shouting(psycopg.Cursor[Any]):
    """A kind of cursor that an application has chosen."""


@pytest.mark.parametrize("arguments", [{"prepare_threshold": None}, {"cursor_factory": Shouting}, {"autocommit": True}])
def test_who_has_other_plans_for_the_connection_gets_them(postgres_url: str, arguments: dict[str, Any]) -> None:
    """Without prepared statements there may be a pooler on the way, which would have to take two commands at once."""
    with opened({"writer": postgres_url}, each={"connect_args": arguments, **ONE_CONNECTION}) as databases:
        databases.put("a")
        with counted_round_trips(pgconn_of(databases)) as count:
            assert read(databases) == ["a"]
            assert count() == (3 if "autocommit" not in arguments else 1)
        with databases.engine().connect() as connection:
            assert isinstance(connection.connection.cursor(), Shouting) == ("cursor_factory" in arguments)


def test_who_opens_a_pipeline_is_not_kept_from_it(databases: Databases) -> None:
    with databases.container.transaction():
        driver_connection: Any = databases.session().connection().connection.driver_connection
        with driver_connection.pipeline():
            found = driver_connection.execute("SELECT name FROM item WHERE amount = %s", (0,))
            driver_connection.execute("INSERT INTO item (name, amount) VALUES (%s, 0)", ("b",))
        assert found.fetchall() == [("a",)]
    assert databases.items() == ["a", "b"]


def test_a_release_that_is_not_known_has_its_own_cursors(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psycopg, "__version__", "3.9.0")
    with opened({"writer": postgres_url}) as databases:
        databases.put("a")
        assert read(databases) == ["a"]
        with databases.engine().connect() as connection:
            driver_connection: Any = connection.connection.driver_connection
            assert driver_connection.cursor_factory is psycopg.Cursor
