"""With `begin_with_statement`, psycopg sends BEGIN along with the first statement over TCP. Nothing else differs from SQLAlchemy.

One thing differs, which is why it is a setting: see `test_a_connection_lost_during_the_first_statement_is_replaced`.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, ProgrammingError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import sessionmaker

from app_db._databases.drivers import begin_along
from app_db.errors import TransactionLost
from harness.alarms import Alarm, alarm
from harness.applications import Boom
from harness.coroutines import AwaitedDatabases, opened_awaited, with_driver
from harness.items import Databases, Item, opened
from harness.requiring import started
from harness.servers import PostgresServer, PostgresStandby
from harness.two_phasing import two_phasing

ALONG = {"begin_with_statement": True, "pool": {"size": 1, "max_overflow": 0}}
NAMED = text("SELECT name FROM item WHERE amount = :amount ORDER BY name")
BACKEND = text("SELECT pg_backend_pid() WHERE 1 = :one")
ONE = {"one": 1}
ADD = "INSERT INTO item (name, amount) VALUES (%s, 0)"


@pytest.fixture
def databases(postgres_url: str) -> Iterator[Databases]:
    with opened({"writer": postgres_url}, each=ALONG) as databases:
        databases.put("a")
        yield databases
        assert raw_of(databases).autocommit is False
        assert not raw_of(databases).is_left_in_autocommit


@pytest.fixture
def awaited(postgres_url: str) -> Iterator[AwaitedDatabases]:
    with opened_awaited(postgres_url, "psycopg", each=ALONG) as databases:
        databases.put("a")
        yield databases


def raw_of(databases: Databases) -> Any:
    """The driver's connection, of which there is one, in its pool."""
    with databases.engine().connect() as connection:
        return connection.connection.driver_connection


@contextmanager
def traced(pgconn: Any) -> Iterator[Callable[[], str]]:
    """Return what libpq says that it has sent and received."""
    with tempfile.TemporaryFile("w+") as trace:
        pgconn.trace(trace.fileno())

        def read() -> str:
            pgconn.untrace()
            trace.seek(0)
            return trace.read()

        try:
            yield read
        finally:
            pgconn.untrace()


@contextmanager
def counted_round_trips(pgconn: Any) -> Iterator[Callable[[], int]]:
    """Count how often the server was waited for: each time ends with its saying that it is ready for more."""
    with traced(pgconn) as read:
        yield lambda: read().count("ReadyForQuery")


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
    pgconn = raw_of(databases).pgconn
    with counted_round_trips(pgconn) as count:
        assert read(databases) == ["a"]
        assert count() == 2
    with counted_round_trips(pgconn) as count:
        with databases.container.transaction():
            databases.session().add(Item(name="b"))
        assert count() == 2
    assert databases.items() == ["a", "b"]


def test_psycopg_alone_takes_three_and_so_does_a_connection_without_the_setting(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with opened({"writer": postgres_url}, each={"pool": ALONG["pool"]}) as databases:
        databases.put("a")
        with engine.connect() as connection:
            pgconn: Any = connection.connection.driver_connection.pgconn  # type: ignore[union-attr]
        with counted_round_trips(pgconn) as count:
            with sessionmaker(engine).begin() as session:
                assert session.scalars(NAMED, {"amount": 0}).all() == ["a"]
            assert count() == 3
        assert type(raw_of(databases)) is psycopg.Connection
        with counted_round_trips(raw_of(databases).pgconn) as count:
            assert read(databases) == ["a"]
            assert count() == 3
    engine.dispose()


def test_each_further_statement_is_one_more(databases: Databases) -> None:
    with counted_round_trips(raw_of(databases).pgconn) as count:
        with databases.container.transaction():
            for _ in range(3):
                assert databases.session().scalars(NAMED, {"amount": 0}).all() == ["a"]
        assert count() == 4


async def test_coroutines_save_it_too(awaited: AwaitedDatabases) -> None:
    async with awaited.container.transaction():
        connection = await (await awaited.awaited_session().connection()).get_raw_connection()
        pgconn: Any = connection.driver_connection.pgconn  # type: ignore[union-attr]
    with counted_round_trips(pgconn) as count:
        async with awaited.container.transaction():
            assert (await awaited.awaited_session().scalars(NAMED, {"amount": 0})).all() == ["a"]
        assert count() == 2


# ---- what is as it was --------------------------------------------------------------------------------------------------


def by_cursor(connection: Connection) -> object:
    cursor = connection.connection.cursor()
    cursor.execute(ADD, ("b",))
    return cursor.rowcount, cursor.description


def by_cursor_without_parameters(connection: Connection) -> object:
    cursor = connection.connection.cursor()
    cursor.execute("INSERT INTO item (name, amount) VALUES ('b', 0) RETURNING name")
    return cursor.fetchall()


def by_client_side_parameters(connection: Connection) -> object:
    return psycopg.ClientCursor(driver(connection)).execute(ADD, ("b",)).rowcount


def by_copy(connection: Connection) -> None:
    with driver(connection).cursor().copy("COPY item (name, amount) FROM STDIN") as copy:
        copy.write_row(("b", 0))


def by_copy_with_parameters(connection: Connection) -> object:
    with driver(connection).cursor().copy("COPY (SELECT %s::text) TO STDOUT", ("b",)) as copy:
        return list(copy)


def by_stream_results(connection: Connection) -> object:
    return connection.execution_options(stream_results=True).execute(NAMED, {"amount": 0}).all()


def by_yield_per(connection: Connection) -> object:
    return connection.execute(select(Item.name).where(Item.amount == 0).execution_options(yield_per=1)).all()


def by_named_cursor(connection: Connection) -> object:
    with driver(connection).cursor("named") as cursor:
        return cursor.execute("SELECT name FROM item WHERE amount = %s", (0,)).fetchall()


def by_rows_as_they_come(connection: Connection) -> object:
    return list(driver(connection).cursor().stream("SELECT name FROM item WHERE amount = %s", (0,)))


def by_several_statements(connection: Connection) -> object:
    several = "INSERT INTO item (name, amount) VALUES ('b', 0); INSERT INTO item (name, amount) VALUES ('c', 0)"
    return connection.exec_driver_sql(several).rowcount


def by_several_statements_with_parameters_that_they_do_not_use(connection: Connection) -> object:
    several = "INSERT INTO item (name, amount) VALUES ('b%%', 0); INSERT INTO item (name, amount) VALUES ('c', 0)"
    return connection.exec_driver_sql(several, {"unused": 1}).rowcount


def by_several_statements_with_parameters(connection: Connection) -> None:
    connection.exec_driver_sql(f"{ADD}; {ADD}", ("b", "c"))


def by_many_rows(connection: Connection) -> object:
    return connection.exec_driver_sql(ADD, [("b",), ("c",)]).rowcount


def by_many_rows_that_return_their_keys(connection: Connection) -> object:
    rows = [{"name": f"n{number}", "amount": 0} for number in range(2500)]
    return sorted(connection.execute(insert(Item).returning(Item.name), rows).scalars())


def by_savepoint(connection: Connection) -> None:
    with suppress(Boom), connection.begin_nested():
        connection.exec_driver_sql(ADD, ("undone",))
        raise Boom
    with connection.begin_nested():
        connection.exec_driver_sql(ADD, ("b",))


def by_the_drivers_transaction(connection: Connection) -> None:
    with driver(connection).transaction():
        driver(connection).execute(ADD, ("b",))
    with suppress(Boom), driver(connection).transaction():
        driver(connection).execute(ADD, ("undone",))
        raise Boom
    driver(connection).execute(ADD, ("c",))


def by_the_drivers_transaction_inside_ours(connection: Connection) -> None:
    connection.exec_driver_sql(ADD, ("b",))
    with suppress(Boom), driver(connection).transaction():
        driver(connection).execute(ADD, ("undone",))
        raise Boom


def by_pipeline(connection: Connection) -> object:
    with driver(connection).pipeline():
        found = driver(connection).execute("SELECT name FROM item WHERE amount = %s", (0,))
        driver(connection).execute(ADD, ("b",))
    return found.fetchall()


def by_prepared_statement(connection: Connection) -> object:
    return driver(connection).execute(ADD, ("b",), prepare=True).statusmessage


def by_binary_results(connection: Connection) -> object:
    return driver(connection).execute("SELECT %s::int4, %s::text", (1, "b"), binary=True).fetchall()


def by_bytes(connection: Connection) -> object:
    return driver(connection).execute(ADD.encode(), ("b",)).rowcount


def by_commit_of_the_driver_and_more(connection: Connection) -> None:
    connection.exec_driver_sql(ADD, ("b",))
    driver(connection).commit()
    by_copy_of_another_row(connection)


def by_rollback_of_the_driver_and_more(connection: Connection) -> None:
    connection.exec_driver_sql(ADD, ("b",))
    driver(connection).rollback()
    by_copy_of_another_row(connection)


def by_commit_in_a_text_and_more(connection: Connection) -> None:
    connection.exec_driver_sql(ADD, ("b",))
    connection.exec_driver_sql("COMMIT")
    by_copy_of_another_row(connection)


def by_rollback_in_a_text_of_another_cursor_and_more(connection: Connection) -> None:
    connection.exec_driver_sql(ADD, ("b",))
    psycopg.ClientCursor(driver(connection)).execute("ROLLBACK")
    connection.exec_driver_sql(ADD, ("c",))


def by_commit_below_the_driver_and_more(connection: Connection) -> None:
    connection.exec_driver_sql(ADD, ("b",))
    driver(connection).pgconn.exec_(b"COMMIT")
    connection.exec_driver_sql("INSERT INTO item (name, amount) VALUES ('c', 0)")


def by_copy_of_another_row(connection: Connection) -> None:
    with driver(connection).cursor().copy("COPY item (name, amount) FROM STDIN") as copy:
        copy.write_row(("c", 0))


def by_a_look_at_autocommit(connection: Connection) -> object:
    before = driver(connection).autocommit
    connection.exec_driver_sql(ADD, ("b",))
    return before, driver(connection).autocommit


def by_autocommit_in_the_middle(connection: Connection) -> None:
    connection.exec_driver_sql(ADD, ("b",))
    driver(connection).autocommit = False


def by_a_statement_that_fails(connection: Connection) -> object:
    with pytest.raises(IntegrityError):
        connection.exec_driver_sql(ADD, ("a",))
    return driver(connection).info.transaction_status


def by_a_syntax_error(connection: Connection) -> object:
    with pytest.raises(ProgrammingError):
        connection.exec_driver_sql("SELEC %s", (1,))
    return driver(connection).info.transaction_status


def by_a_parameter_that_can_not_be_sent(connection: Connection) -> object:
    with pytest.raises(ProgrammingError, match="cannot adapt type"):
        connection.exec_driver_sql("SELECT %s", (object(),))
    return driver(connection).info.transaction_status


def by_too_few_parameters(connection: Connection) -> object:
    with pytest.raises(ProgrammingError, match="2 placeholders but 1 parameters"):
        connection.exec_driver_sql("SELECT %s, %s", (1,))
    return driver(connection).info.transaction_status


def by_vacuum(connection: Connection) -> None:
    connection.exec_driver_sql("VACUUM")


def by_prepare_transaction(connection: Connection) -> None:
    connection.exec_driver_sql(ADD, ("b",))
    connection.exec_driver_sql("PREPARE TRANSACTION 'by hand'")
    connection.exec_driver_sql(ADD, ("c",))


def driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


FIRST_ACTIONS = [
    action for name, action in list(globals().items()) if name.startswith("by_") and name != "by_copy_of_another_row"
]


def outcome(engine: Engine, databases: Databases, action: Callable[[Connection], object], *, fails: bool) -> object:
    """Perform an action as the first of a transaction, and return all that can be seen of it."""
    result: object = None
    try:
        with engine.begin() as connection:
            result = action(connection)
            if fails:
                raise Boom
    except (Boom, DBAPIError, psycopg.Error) as error:
        original = getattr(error, "orig", error)
        result = result, type(original), re.sub(r"0x\w+|\d{4,}", "", str(original))
    kept = databases.items()
    with suppress(DBAPIError), databases.outside().connect() as outside:
        outside.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("ROLLBACK PREPARED 'by hand'")
    databases.rival("DELETE FROM item WHERE name <> 'a'")
    return result, kept


@pytest.mark.parametrize("action", FIRST_ACTIONS, ids=lambda action: action.__name__.removeprefix("by_"))
def test_whatever_comes_first_does_what_it_does_with_bare_sqlalchemy(
    databases: Databases, action: Callable[[Connection], object]
) -> None:
    bare = create_engine(databases.outside().url)
    assert isinstance(raw_of(databases), begin_along.BeginAlongConnection)
    for fails in (False, True):
        expected = outcome(bare, databases, action, fails=fails)
        assert outcome(databases.engine(), databases, action, fails=fails) == expected
        assert_works(databases)
    bare.dispose()


def assert_works(databases: Databases) -> None:
    """See that the connection is as a new one: nothing stays of what is rolled back, and two round trips are enough."""
    for action in (by_copy, by_cursor, by_many_rows):
        with suppress(Boom), databases.engine().begin() as connection:
            assert driver(connection).autocommit is False
            action(connection)
            raise Boom
    assert databases.items() == ["a"]
    assert read(databases) == ["a"]
    with counted_round_trips(raw_of(databases).pgconn) as count:
        assert read(databases) == ["a"]
        assert count() == 2


async def a_cursor(connection: AsyncConnection) -> object:
    cursor = (await awaited_driver(connection)).cursor()
    await cursor.execute(ADD, ("b",))
    return cursor.rowcount


async def a_copy(connection: AsyncConnection) -> None:
    async with (await awaited_driver(connection)).cursor().copy("COPY item (name, amount) FROM STDIN") as copy:
        await copy.write_row(("b", 0))


async def a_stream(connection: AsyncConnection) -> object:
    return [row async for row in await connection.stream(NAMED, {"amount": 0})]


async def a_named_cursor(connection: AsyncConnection) -> object:
    async with (await awaited_driver(connection)).cursor("named") as cursor:
        await cursor.execute("SELECT name FROM item WHERE amount = %s", (0,))
        return await cursor.fetchall()


async def several_statements(connection: AsyncConnection) -> None:
    await connection.exec_driver_sql(f"{ADD.replace('%s', repr('b'))}; {ADD.replace('%s', repr('c'))}")


async def many_rows(connection: AsyncConnection) -> object:
    return (await connection.exec_driver_sql(ADD, [("b",), ("c",)])).rowcount


async def a_savepoint(connection: AsyncConnection) -> None:
    with suppress(Boom):
        async with connection.begin_nested():
            await connection.exec_driver_sql(ADD, ("undone",))
            raise Boom
    await connection.exec_driver_sql(ADD, ("b",))


async def commit_in_a_text_and_more(connection: AsyncConnection) -> None:
    await connection.exec_driver_sql(ADD, ("b",))
    await connection.exec_driver_sql("COMMIT")
    await a_copy_of_another_row(connection)


async def commit_of_the_driver_and_more(connection: AsyncConnection) -> None:
    await connection.exec_driver_sql(ADD, ("b",))
    await (await awaited_driver(connection)).commit()
    await a_copy_of_another_row(connection)


async def a_look_at_autocommit(connection: AsyncConnection) -> object:
    raw = await awaited_driver(connection)
    before = raw.autocommit
    await connection.exec_driver_sql(ADD, ("b",))
    with pytest.raises(AttributeError):
        raw.autocommit = False
    with pytest.raises(psycopg.ProgrammingError):
        await raw.set_autocommit(False)
    return before, raw.autocommit


async def a_statement_that_fails(connection: AsyncConnection) -> object:
    with pytest.raises(IntegrityError):
        await connection.exec_driver_sql(ADD, ("a",))
    return (await awaited_driver(connection)).info.transaction_status


async def a_parameter_that_can_not_be_sent(connection: AsyncConnection) -> object:
    with pytest.raises(ProgrammingError, match="cannot adapt type"):
        await connection.exec_driver_sql("SELECT %s", (object(),))
    return (await awaited_driver(connection)).info.transaction_status


async def a_copy_of_another_row(connection: AsyncConnection) -> None:
    async with (await awaited_driver(connection)).cursor().copy("COPY item (name, amount) FROM STDIN") as copy:
        await copy.write_row(("c", 0))


async def awaited_driver(connection: AsyncConnection) -> Any:
    return (await connection.get_raw_connection()).driver_connection


AWAITED_ACTIONS = [
    a_cursor,
    a_copy,
    a_stream,
    a_named_cursor,
    several_statements,
    many_rows,
    a_savepoint,
    commit_in_a_text_and_more,
    commit_of_the_driver_and_more,
    a_look_at_autocommit,
    a_statement_that_fails,
    a_parameter_that_can_not_be_sent,
]


@pytest.mark.parametrize("action", AWAITED_ACTIONS, ids=lambda action: action.__name__)
async def test_whatever_coroutines_do_first_does_what_it_does_with_bare_sqlalchemy(
    awaited: AwaitedDatabases, postgres_url: str, action: Callable[[AsyncConnection], Any]
) -> None:
    async def perform(engine: AsyncEngine, fails: bool) -> object:
        result: object = None
        with suppress(Boom):
            async with engine.begin() as connection:
                result = await action(connection)
                if fails:
                    raise Boom
        async with engine.connect() as connection:
            raw = await awaited_driver(connection)
            after = raw.autocommit, raw.info.transaction_status
        kept = awaited.items()
        awaited.rival("DELETE FROM item WHERE name <> 'a'")
        return result, after, kept

    bare = create_async_engine(with_driver(postgres_url, "psycopg"))
    for fails in (False, True):
        assert await perform(awaited.awaited_engine(), fails) == await perform(bare, fails)
    await bare.dispose()


def test_a_connection_in_autocommit_stays_in_autocommit(databases: Databases) -> None:
    read(databases)
    with databases.engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(ADD, ("b",))
        assert driver(connection).info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        connection.exec_driver_sql("VACUUM item")
        assert driver(connection).autocommit is True
    assert databases.items() == ["a", "b"]
    databases.rival("DELETE FROM item WHERE name = 'b'")
    assert_works(databases)


def test_an_isolation_level_holds_for_a_connection_and_is_gone_afterwards(databases: Databases) -> None:
    shown = text("SELECT current_setting(:what)")
    for level in ("SERIALIZABLE", "REPEATABLE READ"):
        with databases.engine().connect().execution_options(isolation_level=level) as connection:
            for _ in range(2):
                assert connection.scalar(shown, {"what": "transaction_isolation"}) == level.lower()
                connection.exec_driver_sql(ADD, ("undone",))
                connection.rollback()
        with databases.container.transaction():
            assert databases.session().scalar(shown, {"what": "transaction_isolation"}) == "read committed"
    assert_works(databases)


def test_a_dialect_that_skips_rollback_in_autocommit_rolls_back(databases: Databases) -> None:
    databases.engine().dialect.skip_autocommit_rollback = True
    with suppress(Boom), databases.engine().begin() as connection:
        connection.exec_driver_sql(ADD, ("b",))
        raise Boom
    assert raw_of(databases).info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert_works(databases)


CHARACTERISTICS = list(
    itertools.product([None, *psycopg.IsolationLevel], [None, True, False], [None, True, False]),
)


def test_the_same_begin_is_sent_that_psycopg_sends(postgres_url: str) -> None:
    url = make_url(postgres_url)
    login: dict[str, Any] = {
        "host": url.host, "port": url.port, "user": url.username, "password": url.password, "dbname": url.database
    }  # fmt: skip

    def begins(connection: Any) -> list[str]:
        with traced(connection.pgconn) as read_trace:
            for characteristics in CHARACTERISTICS:
                connection.isolation_level, connection.read_only, connection.deferrable = characteristics
                connection.execute("SELECT %s::int", (1,))
                connection.rollback()
            return re.findall(r'F\t\d+\t(?:Query|Parse)\t.*"(BEGIN[^"]*)"', read_trace())

    with psycopg.connect(**login) as bare, begin_along.connect(**login) as along:
        expected = begins(bare)
        assert len(expected) == len(CHARACTERISTICS)
        assert begins(along) == expected


def test_a_server_that_refuses_begin_refuses_it_as_ever(
    new_postgres: Callable[..., PostgresServer], new_standby: Callable[[PostgresServer], PostgresStandby]
) -> None:
    primary = new_postgres()
    standby = new_standby(primary)
    found = []
    url = make_url(standby.url("postgres"))
    for connect in (psycopg.connect, begin_along.connect):
        with connect(host=url.host, port=url.port, user=url.username, password=url.password, dbname=url.database) as connection:
            connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            with pytest.raises(psycopg.Error) as refused:
                connection.execute("SELECT %s::int", (1,))
            connection.rollback()
            connection.isolation_level = None
            answer = connection.execute("SELECT %s::int", (1,)).fetchall()
            status = connection.info.transaction_status
            found.append((type(refused.value), str(refused.value), answer, status, connection.autocommit))
    assert found[0] == found[1]


def test_statements_are_prepared_as_ever(databases: Databases) -> None:
    """psycopg prepares what it has executed five times, here by a statement that goes along with BEGIN."""
    for _ in range(8):
        assert read(databases) == ["a"]
    with databases.engine().connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar() == 1
    databases.put("b")
    assert read(databases) == ["a", "b"]


def test_no_more_statements_stay_prepared_than_psycopg_is_told(postgres_url: str) -> None:
    """In a pipeline psycopg notes a prepared statement only when its answer comes, and makes room with the next one."""
    with opened({"writer": postgres_url}, each={"connect_args": {"prepare_threshold": 0}, **ALONG}) as databases:
        raw = raw_of(databases)
        raw.prepared_max = 2
        for number in range(6):
            with databases.container.transaction():
                databases.session().execute(text(f"SELECT :what + {number}"), {"what": 1})
        raw.prepare_threshold = None  # or the question would be one of them
        with databases.engine().connect() as connection:
            assert int(connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar() or 0) <= 3


@pytest.mark.parametrize("times", [1, 5, 6, 9])
def test_a_first_statement_that_fails_says_why(databases: Databases, times: int) -> None:
    """Prepared or not, or about to be: preparing a wrong statement fails first."""
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


def test_a_commit_that_is_refused_leaves_a_connection_as_new(databases: Databases) -> None:
    databases.rival("CREATE TABLE late (id int PRIMARY KEY, other int REFERENCES late DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(IntegrityError), databases.container.transaction():
        databases.session().execute(text("INSERT INTO late VALUES (1, :other)"), {"other": 2})
    assert_works(databases)


def test_a_parameter_that_can_not_be_sent_is_refused_and_nothing_stays_open(databases: Databases) -> None:
    before = backend(databases)
    with pytest.raises(ProgrammingError, match="cannot adapt type"), databases.container.transaction():
        databases.session().execute(text("SELECT :what"), {"what": object()})
    assert_works(databases)
    assert backend(databases) == before


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
    raw_of(databases).add_notice_handler(lambda notice: heard.append(notice.message_primary))
    with databases.container.transaction():
        assert databases.session().scalar(text("SELECT say(:what)"), {"what": "hello"}) == "hello"
    assert heard == ["hello"]


def test_a_notification_that_came_meanwhile_is_heard(databases: Databases) -> None:
    heard: list[str] = []
    raw = raw_of(databases)
    raw.add_notify_handler(lambda notification: heard.append(notification.payload))
    with databases.engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("LISTEN news")
    databases.rival("NOTIFY news, 'hello'")
    time.sleep(0.1)
    assert read(databases) == ["a"]
    assert heard == ["hello"]


def test_branches_of_two_phase_units_are_prepared_and_leave_connections_as_new(new_postgres_url: Callable[[], str]) -> None:
    names = ("writer", "warehouse")
    with two_phasing(**{name: {"url": new_postgres_url(), **ALONG} for name in names}) as app:
        for number in range(3):
            with app.unit():
                for name in names:
                    app.add(f"kept {number}", name)
            with suppress(Boom), app.unit():
                for name in names:
                    connection = app.session(name).connection()
                    assert driver(connection).autocommit is False
                    assert isinstance(driver(connection), begin_along.BeginAlongConnection)
                    driver(connection).cursor().executemany("INSERT INTO items (name) VALUES (%s)", [("undone",)])
                raise Boom
        for name in names:
            assert app.names(name) == ["kept 0", "kept 1", "kept 2"]


# ---- what goes wrong on the way -----------------------------------------------------------------------------------------


def test_an_interrupted_first_statement_ends_on_the_server_too(databases: Databases) -> None:
    interrupter = when_asleep(databases, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), databases.container.transaction():
        databases.session().execute(text("SELECT pg_sleep(:seconds)"), {"seconds": 60})
    interrupter.join()
    assert sleepers(databases) == []
    assert read(databases) == ["a"]


def test_a_first_statement_that_a_signal_handler_ends_is_not_waited_for_and_its_connection_is_closed(
    databases: Databases,
) -> None:
    first = backend(databases)
    started = time.monotonic()
    with pytest.raises(Alarm), alarm(0.2), databases.container.transaction():
        databases.session().execute(text("SELECT pg_sleep(:seconds)"), {"seconds": 5})
    assert time.monotonic() - started < 2
    assert backend(databases) != first
    assert_works(databases)


def test_the_drivers_own_connection_is_closed_then_too(databases: Databases) -> None:
    with databases.engine().connect() as connection:
        raw = driver(connection)
        with pytest.raises(Alarm), alarm(0.2):
            raw.execute("SELECT pg_sleep(%s)", (5,))
        assert raw.closed
        with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
            raw.execute("SELECT %s::int", (1,))
        connection.invalidate()
    assert_works(databases)


class AtLine:
    """Raises Boom at the n-th line of app_db._databases.drivers.begin_along that is executed in the block."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __enter__(self) -> None:
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename == begin_along.__file__ else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise Boom
        return self._line


@pytest.mark.exhaustive
def test_an_interruption_at_any_line_harms_no_later_unit(databases: Databases) -> None:
    points = 0
    for number in itertools.count(1):
        interruption = AtLine(number)
        with suppress(Boom, DBAPIError), databases.container.transaction(), interruption:
            databases.session().execute(text("INSERT INTO item (name, amount) VALUES (:name, 0)"), {"name": "undone"})
            sys.settrace(None)
            raise Boom
        gc.collect()
        assert_works(databases)
        if interruption.left > 0:
            break
        points = number
    assert points > 25


@pytest.mark.exhaustive
def test_an_interruption_at_any_line_harms_no_later_user_of_the_pool(databases: Databases) -> None:
    """SQLAlchemy, which has begun no transaction, does not roll back what is done on the driver's connection."""
    for number in itertools.count(1):
        interruption = AtLine(number)
        with databases.engine().connect() as connection, suppress(Boom), interruption:
            driver(connection).execute("SELECT %s::int", (number,))
        assert_works(databases)
        if interruption.left > 0:
            break


@pytest.mark.exhaustive
def test_an_interruption_at_any_line_harms_no_later_statement_of_the_drivers_connection(databases: Databases) -> None:
    """A raw connection, which nobody closes after an interruption, either works or is closed."""
    for number in itertools.count(1):
        interruption = AtLine(number)
        with databases.engine().connect() as connection:
            raw = driver(connection)
            with suppress(Boom), interruption:
                raw.execute("SELECT %s::int", (number,))
            if not raw.closed:
                try:
                    assert raw.execute("SELECT %s::int", (-1,)).fetchall() == [(-1,)]
                    raw.rollback()
                    assert raw.autocommit is False
                    assert not raw.is_left_in_autocommit
                except psycopg.OperationalError:
                    assert raw.closed
            connection.invalidate()
        if interruption.left > 0:
            break


def ring_outside_pools(number: int, frame: FrameType | None) -> None:
    """Raise, but not inside SQLAlchemy's pool: there an exception costs a connection its place, whoever uses it."""
    while frame is not None:
        if f"{os.sep}sqlalchemy{os.sep}pool{os.sep}" in frame.f_code.co_filename:
            signal.setitimer(signal.ITIMER_REAL, 0.0002)
            return
        frame = frame.f_back
    raise Boom


@pytest.mark.exhaustive
# A signal may come in a weak reference's callback, whose errors Python only reports.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interruptions_at_random_times_harm_no_later_unit(databases: Databases) -> None:
    with suppress(KeyError), databases.container.transaction():
        databases.add("undone")  # with which SQLAlchemy configures the mappers
        raise KeyError
    dice = random.Random(4711)
    interrupted = 0
    for number in range(60):
        try:
            with alarm(0.0001 + dice.random() * 0.006, ring_outside_pools), databases.container.transaction():
                sleep = text("SELECT pg_sleep(:seconds), :number")
                assert databases.session().execute(sleep, {"seconds": 0.004, "number": number}).one()[1] == number
                databases.add("undone")
                raise KeyError
        except Boom:
            interrupted += 1
        except StatementError as error:  # SQLAlchemy wraps what is raised while it makes a cursor
            assert isinstance(error.orig, Boom)  # noqa: PT017
            interrupted += 1
        except InvalidRequestError as error:  # in a flush that is interrupted while it begins, it can't undo what has not begun
            assert isinstance(error.__context__, Boom)  # noqa: PT017
            interrupted += 1
        except KeyError:
            pass
        with databases.container.transaction():
            assert databases.session().scalar(text("SELECT CAST(:number AS int)"), {"number": -number}) == -number
    assert interrupted > 10
    assert_works(databases)


async def test_a_cancelled_first_statement_leaves_a_connection_that_works(awaited: AwaitedDatabases) -> None:
    async def unit() -> None:
        async with awaited.container.transaction():
            await awaited.say("SELECT pg_sleep(:seconds)", seconds=60)

    task = asyncio.create_task(unit())
    loop = asyncio.get_running_loop()
    canceller = when_asleep(awaited, lambda: loop.call_soon_threadsafe(task.cancel))
    await asyncio.wait([task])
    canceller.join()
    assert task.cancelled()
    async with awaited.container.transaction():
        assert list(await awaited.awaited_session().scalars(NAMED, {"amount": 0})) == ["a"]


@pytest.mark.exhaustive
async def test_cancellations_at_random_times_harm_no_later_unit(awaited: AwaitedDatabases) -> None:
    dice = random.Random(4711)

    async def unit(number: int) -> None:
        async with awaited.container.transaction():
            await awaited.say("SELECT pg_sleep(:seconds), :number", seconds=0.004, number=number)
            await awaited.write("undone")
            raise Boom

    cancelled = 0
    for number in range(60):
        task = asyncio.create_task(unit(number))
        await asyncio.sleep(dice.random() * 0.006)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        cancelled += task.cancelled()
        async with awaited.container.transaction():
            assert await awaited.say("SELECT CAST(:number AS int)", number=-number) == -number
        with suppress(Boom):
            async with awaited.container.transaction():
                await a_copy(await awaited.awaited_session().connection())
                raise Boom
    assert cancelled > 5
    assert awaited.items() == ["a"]


def killed(pid: int, postgres: PostgresServer) -> None:
    """End a connection on the server, and wait until the client's host knows."""
    postgres.execute(f"SELECT pg_terminate_backend({pid})")
    deadline = time.monotonic() + 5
    while postgres.execute(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}") != [(0,)] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)


def reason_given_to(engine: Engine) -> str | None:
    with pytest.raises(DBAPIError) as lost, engine.begin() as connection:
        connection.execute(BACKEND, ONE)
    assert lost.value.connection_invalidated
    return getattr(lost.value.orig, "sqlstate", None)


TELLS_WHY = tuple(map(int, psycopg.__version__.split(".")[:2])) >= (3, 3)
"""Older releases of psycopg tell nobody why an idle connection was closed."""


def test_why_the_server_has_closed_an_idle_connection_reaches_the_application(
    databases: Databases, postgres: PostgresServer
) -> None:
    bare = create_engine(databases.outside().url)
    reasons = []
    for engine in (bare, databases.engine()):
        with engine.connect() as connection:
            pid = int(connection.scalar(BACKEND, ONE) or 0)
        killed(pid, postgres)
        reasons.append(reason_given_to(engine))
    bare.dispose()
    assert reasons[1] == reasons[0]
    assert reasons[0] == "57P01" or not TELLS_WHY
    assert_works(databases)


def test_a_session_that_was_idle_for_too_long_says_so(databases: Databases) -> None:
    bare = create_engine(databases.outside().url)
    reasons = []
    for engine in (bare, databases.engine()):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("SET idle_session_timeout = 100")
        time.sleep(0.5)
        reasons.append(reason_given_to(engine))
    bare.dispose()
    assert reasons[1] == reasons[0]
    assert reasons[0] == "57P05" or not TELLS_WHY
    assert_works(databases)


def test_coroutines_learn_why_the_server_has_closed_an_idle_connection(
    awaited: AwaitedDatabases, postgres: PostgresServer, postgres_url: str
) -> None:
    async def reason(engine: AsyncEngine) -> object:
        async with engine.begin() as connection:
            pid = await connection.scalar(BACKEND, ONE)
        await asyncio.to_thread(killed, pid, postgres)
        with pytest.raises(DBAPIError) as lost:
            async with engine.begin() as connection:
                await connection.execute(BACKEND, ONE)
        return getattr(lost.value.orig, "sqlstate", None)

    async def main() -> list[object]:
        bare = create_async_engine(with_driver(postgres_url, "psycopg"))
        reasons = [await reason(bare), await reason(awaited.awaited_engine())]
        await bare.dispose()
        return reasons

    reasons = awaited.in_a_loop(main)
    assert reasons[1] == reasons[0]
    assert reasons[0] == "57P01" or not TELLS_WHY


def test_a_connection_lost_during_the_first_statement_is_replaced(databases: Databases, postgres: PostgresServer) -> None:
    """What is lost: psycopg's pipeline forgets the error of the statement when the server closes the connection after it.

    Bare SQLAlchemy raises AdminShutdown, 57P01. When psycopg keeps it, `begin_with_statement` can become the default.
    """
    first = backend(databases)
    killer = when_asleep(databases, lambda: postgres.execute(f"SELECT pg_terminate_backend({first})"))
    with pytest.raises(DBAPIError, match="closed the connection") as lost, databases.container.transaction():
        databases.session().execute(text("SELECT pg_sleep(:seconds)"), {"seconds": 60})
    killer.join()
    assert getattr(lost.value.orig, "sqlstate", None) is None
    assert lost.value.connection_invalidated
    assert_works(databases)


# ---- where it is left to psycopg ----------------------------------------------------------------------------------------


class Shouting(psycopg.Cursor[Any]):
    """A kind of cursor that an application has chosen."""


@pytest.mark.parametrize("arguments", [{"prepare_threshold": None}, {"cursor_factory": Shouting}, {"autocommit": True}])
def test_an_application_with_other_plans_for_the_connection_gets_them(postgres_url: str, arguments: dict[str, Any]) -> None:
    """Without prepared statements there may be a pooler on the way."""
    with opened({"writer": postgres_url}, each={"connect_args": arguments, **ALONG}) as databases:
        databases.put("a")
        with counted_round_trips(raw_of(databases).pgconn) as count:
            assert read(databases) == ["a"]
            assert count() == (3 if "autocommit" not in arguments else 1)
        with databases.engine().connect() as connection:
            assert isinstance(connection.connection.cursor(), Shouting) == ("cursor_factory" in arguments)


class OnSocket(PostgresServer):
    """A server that listens on a Unix socket as well."""

    def _command(self) -> list[str]:
        return [*super()._command(), "-c", f"unix_socket_directories={self.directory}"]


def test_over_a_socket_psycopg_begins_as_ever() -> None:
    server = started(OnSocket)
    try:
        server.create_database("shop")
        url = make_url(server.url("shop")).set(host=None, query={"host": str(server.directory)})
        with opened({"writer": url.render_as_string(hide_password=False)}, each=ALONG) as databases:
            databases.put("a")
            raw = raw_of(databases)
            assert raw.cursor_factory is psycopg.Cursor
            with counted_round_trips(raw.pgconn) as count:
                assert read(databases) == ["a"]
                assert count() == 3
    finally:
        server.close()


def test_a_read_only_connection_reads_in_one_round_trip_as_ever(postgres_url: str) -> None:
    with opened({"reader": postgres_url}, each={**ALONG, "read_only": True}) as databases:
        databases.put("a", on="reader")
        with databases.engine("reader").connect() as connection:
            pgconn = driver(connection).pgconn
        with counted_round_trips(pgconn) as count:
            with databases.container.transaction():
                assert databases.session("reader").scalars(NAMED, {"amount": 0}).all() == ["a"]
            assert count() == 1


# ---- what it stands on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "psycopgs"),
    [
        (begin_along.BeginAlongConnection, psycopg.Connection),
        (begin_along.AsyncBeginAlongConnection, psycopg.AsyncConnection),
    ],
)
def test_no_name_of_ours_is_one_of_psycopgs(databases: Databases, kind: type[Any], psycopgs: type[Any]) -> None:
    """What is derived from psycopg's classes would change them if it used a name that they use, a private one as well."""
    with databases.engine().connect() as connection:
        theirs = {*dir(psycopgs), *vars(driver(connection))} - {"_is_switched_on", "is_left_in_the_middle"}
    ours = {name for each in kind.__mro__ if each.__module__ == begin_along.__name__ for name in vars(each)}
    shared = {name for name in ours & theirs if not name.startswith("__")}
    assert shared == {"autocommit", "set_autocommit", "commit", "rollback"}
