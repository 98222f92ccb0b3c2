"""What app_db's uses of SQLAlchemy's private names rest on. Each test uses SQLAlchemy alone, and says what breaks without it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NoReturn

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, func, lambda_stmt, select, text, update
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.ext.declarative import DeferredReflection
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, SessionTransaction, mapped_column
from sqlalchemy.pool import QueuePool, StaticPool
from sqlalchemy.sql.elements import ColumnElement

from app_db._compat.sqlalchemy import (
    OWN_TIMEOUT,
    cache_key_of,
    hand_over,
    is_executing,
    is_flushing,
    lend,
    listeners_to,
    mapped_classes,
    prepare_to_commit,
    take_away,
    when_unmapped,
    with_timeout,
)


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A database in memory, on one DBAPI connection that begins transactions as SQLAlchemy's documentation says."""
    engine = create_engine("sqlite://", poolclass=StaticPool)

    @event.listens_for(engine, "connect")
    def leave_begin_to_sqlalchemy(dbapi_connection: Any, _: object) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def sent(engine: Engine) -> list[str]:
    """The first words of what is sent, in lower case."""
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: sent.append(arguments[2].split()[0].lower()))
    for name in ("commit", "rollback"):
        event.listen(engine, name, lambda _, name=name: sent.append(name))
    return sent


# ---- Session._flushing ----------------------------------------------------------------------------------------------------


def add_and_flush(session: Session) -> None:
    session.add(Item(id=1, name="a"))
    session.flush()


FLUSHES: dict[str, Callable[[Session], None]] = {
    "flush": add_and_flush,
    "bulk_save_objects": lambda session: session.bulk_save_objects([Item(id=1, name="a")]),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Item.__mapper__, [{"id": 1, "name": "a"}]),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("flush", FLUSHES)
def test_a_session_says_whether_it_is_flushing(engine: Engine, flush: str, fails: bool) -> None:
    """A unit that ends while another thread flushes waits for it; and what a flush writes never goes to a replica.

    Without this, the session's connection is rolled back below the flush, which goes on with another one.
    """
    said: list[bool] = []
    event.listen(engine, "before_cursor_execute", lambda *_: said.append(is_flushing(session)))
    with Session(engine) as session:
        session.execute(text("INSERT INTO items (id, name) VALUES (:id, 'b')"), {"id": 1 if fails else 2})
        with pytest.raises(IntegrityError) if fails else nullcontext():
            FLUSHES[flush](session)
        assert said == [False, False, True], "BEGIN, the first INSERT, and that of the flush"
        assert not is_flushing(session)


# ---- SessionTransaction._prepare_impl -------------------------------------------------------------------------------------


def test_a_transaction_can_do_all_that_precedes_commit_and_then_commit(engine: Engine, sent: list[str]) -> None:
    """A unit with several databases flushes all of them before it commits the first.

    Without this, a flush that fails in the second database comes after COMMIT in the first. Calling the listeners to
    `before_commit` and `flush()` instead calls the listeners a second time at COMMIT, when they may write again.
    """
    told: list[str] = []
    with Session(engine) as session:
        event.listen(session, "before_commit", lambda session: told.append("before_commit"))
        session.begin_nested()
        session.add(Item(name="a"))
        transaction = session.get_transaction()
        assert transaction is not None
        prepare_to_commit(transaction)
        assert sent == ["begin", "savepoint", "insert", "release"]
        told_before = list(told)
        with pytest.raises(InvalidRequestError):
            session.execute(text("SELECT 1"))
        transaction.commit()
        assert sent[4:] == ["commit"]
        assert told == told_before
        assert "before_commit" in told


# ---- SessionTransaction._connections --------------------------------------------------------------------------------------


def transaction_of(session: Session) -> SessionTransaction:
    return session.get_transaction() or session.begin()


ENDINGS: dict[str, Callable[[Session], None]] = {
    "commit": Session.commit,
    "rollback": Session.rollback,
    "close": Session.close,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_connection_that_is_lent_is_used_and_left_as_it_is(engine: Engine, sent: list[str], ending: str) -> None:
    """The session that finds its database, and one that borrows another's connection, use connections of other sessions.

    Without this, the end of such a session, or a flush that fails in it, ends the transactions of its unit.
    """
    with engine.connect() as connection, Session(connection) as session:
        outer = connection.begin()
        lend(connection, transaction_of(session))
        session.add(Item(name="a"))
        session.flush()
        ENDINGS[ending](session)
        assert sent == ["begin", "insert"]
        assert outer.is_active
        assert not connection.closed
        assert connection.scalar(select(func.count()).select_from(Item)) == 1


def test_a_savepoint_is_taken_on_a_connection_that_is_lent_to_the_whole_transaction(engine: Engine, sent: list[str]) -> None:
    """What an application does in `session.begin_nested()` can be undone. Of units' savepoints the branches take their own."""
    with engine.connect() as connection, Session(connection) as session:
        connection.begin()
        lend(connection, transaction_of(session))
        for lent in (False, True):
            savepoint = session.begin_nested()
            if lent:
                lend(connection, savepoint)
            session.execute(text("SELECT 1"))
            savepoint.rollback()
        assert sent == ["begin", "savepoint", "select", "rollback", "select"]


HANDED_OVER = {"commit": (["commit"], 1), "rollback": (["rollback"], 0), "close": (["rollback"], 0)}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("in_savepoint", [False, True])
def test_a_connection_that_is_handed_over_is_used_and_ended(
    engine: Engine, sent: list[str], ending: str, in_savepoint: bool
) -> None:
    """A session that a unit asks for late goes on where the session that finds its database has begun on its connection.

    Without this, the unit uses a second connection of that database, which on SQLite waits for the first.
    """
    connection = engine.connect()
    begun = connection.begin()
    savepoint = connection.begin_nested() if in_savepoint else None
    session = Session(engine)
    hand_over(connection, begun, transaction_of(session))
    session.add(Item(name="a"))
    session.flush()
    assert session.connection() is connection
    if savepoint is not None:
        savepoint.commit()
    before = len(sent)
    ENDINGS[ending](session)
    expected, kept = HANDED_OVER[ending]
    assert sent[before:] == expected
    assert connection.closed
    with engine.connect() as outside:
        assert outside.scalar(select(func.count()).select_from(Item)) == kept


@pytest.mark.parametrize("which", ["all", "one"])
def test_a_connection_that_is_taken_away_is_left_as_it_is(engine: Engine, sent: list[str], which: str) -> None:
    """A unit that is rolled back ends the sessions that use its branches' connections, and then rolls its branches back.

    Without this, such a session sends ROLLBACK TO SAVEPOINT first, also where the connection is lost or awaited by a coroutine.
    """
    with engine.connect() as connection, Session(connection) as session:
        outer = connection.begin()
        lend(connection, transaction_of(session))
        savepoint = session.begin_nested()
        session.execute(text("SELECT 1"))
        for transaction in (savepoint, transaction_of(session)):
            take_away(transaction, None if which == "all" else [connection])
        session.close()
        assert sent == ["begin", "savepoint", "select"]
        assert outer.is_active


# ---- HasCacheKey._generate_cache_key --------------------------------------------------------------------------------------


class Uncached(ColumnElement[int]):
    """An element whose author has not said whether it can be cached."""

    inherit_cache = False


def test_statements_that_differ_in_their_parameters_alone_have_one_key() -> None:
    """What a statement says about its database is looked up by this key. Without it each statement is searched each time."""
    first = select(Item).where(Item.name == "a")
    assert cache_key_of(first) == cache_key_of(select(Item).where(Item.name == "b"))
    assert hash(cache_key_of(first)) == hash(cache_key_of(select(Item).where(Item.name == "b")))
    others = [select(Item), select(Item.name).where(Item.name == "a"), update(Item).where(Item.name == "a"), Item.__table__]
    keys = {cache_key_of(first), *map(cache_key_of, others)}
    assert len(keys) == 5
    assert None not in keys


def test_statements_from_a_function_have_the_key_of_what_it_returns() -> None:
    made = [lambda_stmt(lambda: select(Item).where(Item.name == "a")), lambda_stmt(lambda: select(Item))]
    assert None not in map(cache_key_of, made)
    assert cache_key_of(made[0]) != cache_key_of(made[1])


@pytest.mark.parametrize("uncached", [Uncached(), select(Uncached()), "SELECT 1", object()])
def test_what_cannot_be_cached_has_no_key(uncached: object) -> None:
    assert cache_key_of(uncached) is None


# ---- _sa_raise_deferred_config ----------------------------------------------------------------------------------------------


def test_a_model_that_is_used_before_it_is_mapped_is_refused_in_app_dbs_words() -> None:
    """Without this, SQLAlchemy raises UnmappedClassError for a reflected model, and names a method of its own to call."""

    class Refused(Exception):
        pass

    class Own(DeclarativeBase):
        pass

    class Deferred(DeferredReflection):
        pass

    class Customer(Deferred, Own):
        __tablename__ = "customers"

    def refuse(model: type[Any]) -> NoReturn:
        raise Refused(model.__name__)

    when_unmapped(Deferred, refuse)
    with Session() as session, pytest.raises(Refused, match="Customer"):
        session.get(Customer, 1)


# ---- connections of coroutines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "mysql+asyncmy"])
async def test_a_statement_that_has_not_ended_can_be_seen(driver: str, request: pytest.FixtureRequest) -> None:
    """Without `_execute_mutex`, a connection that was interrupted in a statement would go back to its pool, and the next unit
    would wait for ever.
    """
    url = request.getfixturevalue("postgres_url" if "postgresql" in driver else "mariadb_url")
    sleeping = "SELECT pg_sleep(0.3)" if "postgresql" in driver else "SELECT SLEEP(0.3)"
    engine = create_async_engine(f"{driver}:{url.partition(':')[2]}")
    async with engine.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).dbapi_connection
        seen = [is_executing(raw)]
        statement = asyncio.create_task(connection.execute(text(sleeping)))
        await asyncio.sleep(0.1)
        seen.append(is_executing(raw))
        await statement
        seen.append(is_executing(raw))
    await engine.dispose()
    assert seen == [False, True, False]


# ---- pools --------------------------------------------------------------------------------------------------------------


def test_the_timeout_of_a_pool_is_read_by_the_thread_that_waits() -> None:
    """Without `_timeout`, a unit of work would wait for a full pool beyond its time limit."""
    asked: list[float] = []

    def limited(pool: Any) -> float:
        asked.append(vars(pool)[OWN_TIMEOUT])
        return 0.01

    engine = create_engine("sqlite://", poolclass=with_timeout(QueuePool, limited), pool_size=1, max_overflow=0, pool_timeout=30)
    with engine.connect(), pytest.raises(PoolTimeout):
        engine.connect()
    assert asked[-1] == 30
    assert engine.pool.recreate().timeout() == 0.01  # type: ignore[attr-defined]  # of a QueuePool
    engine.dispose()


def test_all_mapped_classes_are_listed_also_those_of_another_registry() -> None:
    """Without it, `app-db shell` has no models at hand."""

    class OtherBase(DeclarativeBase):
        pass

    class Other(OtherBase):
        __tablename__ = "others"
        id: Mapped[int] = mapped_column(primary_key=True)

    assert {Item, Other} <= set(mapped_classes())
    assert OtherBase not in mapped_classes()


def test_listeners_to_one_engine_are_told_from_those_to_all() -> None:
    def to_all(connection: Connection) -> None: ...

    def to_one(connection: Connection) -> None: ...

    engine = create_engine("sqlite://")
    event.listen(Engine, "begin", to_all)
    try:
        assert list(listeners_to(engine, "begin")) == []
        event.listen(engine, "begin", to_one)
        assert list(listeners_to(engine, "begin")) == [to_one]
    finally:
        event.remove(Engine, "begin", to_all)
    engine.dispose()
