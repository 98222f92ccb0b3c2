"""The session with which a test prepares and checks: it commits and rolls back as a session outside of tests does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app_db import Connection, DatabaseContainer, DatabaseSettings
from app_db.errors import IsolationBroken
from app_db.testing import isolated
from harness.applications import Application, Boom, Item, running

NAMES = select(Item.name).order_by(Item.name)


@pytest.fixture
def app(new_database_url: Callable[[], str]) -> Iterator[Application]:
    with running(writer=new_database_url(), reader={"mirror": "writer", "read_only": True}) as application:
        yield application
        assert application.names() == []


def seen(app: Application) -> list[str]:
    """What a unit of work reads."""
    with app.unit():
        return list(app.session("reader").scalars(NAMES))


# ---- its class and its arguments -----------------------------------------------------------------------------------------


class OwnSession(Session):
    """A session of the application's own, such as SQLModel's."""

    def names(self) -> list[str]:
        return list(self.scalars(NAMES))


def names_in(session: Session) -> list[str]:
    assert isinstance(session, OwnSession)
    return session.names()


class OwnAsyncSession(AsyncSession):
    """Such a session for coroutines."""


@pytest.fixture
def own_sessions(sqlite_url: str) -> Iterator[Any]:
    class Container(DatabaseContainer):
        writer = Connection(session_class=OwnSession, async_session_class=OwnAsyncSession)

    connections = {"writer": {"url": sqlite_url, "session": {"autoflush": False, "expire_on_commit": True}}}
    container = Container(settings=DatabaseSettings(connections=connections, _env_file=None))
    Item.metadata.create_all(container.writer_engine())
    yield container
    container.shutdown_resources()


def test_it_is_made_as_the_sessions_of_units_are(own_sessions: Any) -> None:
    began: list[object] = []

    def note(session: Session, *_: object) -> None:
        began.append(session)

    own_sessions.writer_sessionmaker().configure(info={"tenant": "north"})
    event.listen(own_sessions.writer_sessionmaker(), "after_begin", note)
    with isolated(own_sessions) as isolation, isolation.session() as session:
        assert isinstance(session, OwnSession)
        item = Item(name="one")
        session.add(item)
        assert session.names() == [], "autoflush is off"
        session.commit()
        with own_sessions.transaction():
            own_sessions.writer_session().execute(update(Item).values(name="two"))
        assert item.name == "two", "it was expired by the commit"
        assert session.info == {"tenant": "north"}
        assert session in began
    with isolated(own_sessions), own_sessions.transaction():
        assert own_sessions.writer_session().names() == []


async def test_a_session_for_coroutines_is_made_as_those_of_units_are(own_sessions: Any) -> None:
    async with isolated(own_sessions) as isolation, isolation.async_session() as session:
        assert isinstance(session, OwnAsyncSession)
        session.add(Item(name="one"))
        assert await session.run_sync(names_in) == [], "autoflush is off"
        await session.commit()
        assert await session.run_sync(names_in) == ["one"]
    await own_sessions.shutdown_resources()


# ---- what it undoes ------------------------------------------------------------------------------------------------------


def test_rollback_undoes_what_was_flushed_and_keeps_what_was_committed(app: Application) -> None:
    with isolated(app.container) as isolation, isolation.session() as session:
        session.add(Item(name="committed"))
        session.commit()
        session.add(Item(name="flushed"))
        session.flush()
        assert seen(app) == ["committed", "flushed"]
        session.rollback()
        assert seen(app) == ["committed"] == list(session.scalars(NAMES))


def test_a_savepoint_that_fails_undoes_its_own_part(app: Application) -> None:
    with isolated(app.container) as isolation, isolation.session() as session:
        session.add(Item(name="before"))
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(Item(name="inside"))
            session.flush()
            session.execute(insert(Item).values(name="before"))
        session.add(Item(name="after"))
        session.commit()
        assert seen(app) == ["after", "before"]


def test_a_block_that_raises_undoes_itself(app: Application) -> None:
    with isolated(app.container) as isolation, isolation.session() as session:
        with pytest.raises(Boom), session.begin():
            session.add(Item(name="inside"))
            session.flush()
            raise Boom
        assert seen(app) == []


def test_closing_it_undoes_what_was_not_committed(app: Application) -> None:
    with isolated(app.container) as isolation:
        with isolation.session() as session:
            session.add(Item(name="flushed"))
            session.flush()
        assert seen(app) == []


def steps(seed: int) -> list[str]:
    """A program for a session, whose steps are drawn by chance."""
    chance = random.Random(seed)
    return chance.choices(["add", "execute", "commit", "rollback", "nested", "nested fails", "twice", "unit"], k=12)


def take(step: str, name: str, session: Session, unit: Callable[[], object]) -> None:
    """Do one step of a program."""
    if step == "add":
        session.add(Item(name=name))
    elif step == "execute":
        session.execute(insert(Item).values(name=name))
    elif step == "commit":
        session.commit()
    elif step == "rollback":
        session.rollback()
    elif step == "unit":
        if not session.in_transaction():  # outside of tests SQLite would wait for the session
            unit()
    else:
        with suppress(Boom, IntegrityError), session.begin_nested():
            session.execute(insert(Item).values(name=name))
            if step == "twice":
                session.execute(insert(Item).values(name=name))
            if step == "nested fails":
                raise Boom


def outcome(session: Session, program: list[str], unit: Callable[[], object]) -> list[list[str]]:
    """What the session sees after each step of a program."""
    found = []
    for number, step in enumerate([*program, "rollback"]):
        take(step, f"{number:02}", session, unit)
        session.flush()
        found.append(list(session.scalars(NAMES)))
    session.rollback()
    return found


@pytest.mark.parametrize("seed", range(12))
def test_any_program_has_the_outcome_that_it_has_outside_of_tests(app: Application, seed: int) -> None:
    program = steps(seed)

    def unit() -> None:
        with app.unit():
            app.add(f"unit {len(app.session().scalars(NAMES).all())}")

    with isolated(app.container) as isolation:
        inside = outcome(isolation.session(), program, unit)
    with app.container.writer_sessionmaker()() as session:
        outside = outcome(session, program, unit)
    app.run("DELETE FROM items")
    assert inside == outside, program


# ---- beside units of work ------------------------------------------------------------------------------------------------


def test_what_units_commit_is_kept_when_the_session_that_only_reads_rolls_back(app: Application) -> None:
    with isolated(app.container) as isolation, isolation.session() as session:
        assert list(session.scalars(NAMES)) == []
        with app.unit():
            app.add("made")
        session.rollback()
        assert list(session.scalars(NAMES)) == ["made"] == seen(app)


def test_a_session_that_has_read_inside_a_unit_does_not_keep_it_from_aborting(app: Application) -> None:
    with isolated(app.container) as isolation, isolation.session() as session:
        with pytest.raises(Boom), app.unit():
            app.add("made")
            app.session().flush()
            assert list(session.scalars(NAMES)) == ["made"]
            raise Boom
        assert list(session.scalars(NAMES)) == []
        session.add(Item(name="later"))
        session.commit()
        assert seen(app) == ["later"]


def test_a_session_that_has_written_inside_a_unit_keeps_it_neither_from_committing(app: Application) -> None:
    with isolated(app.container) as isolation, isolation.session() as session:
        with app.unit():
            app.add("made")
            app.session().flush()
            session.add(Item(name="prepared"))
            session.flush()
        assert list(session.scalars(NAMES)) == ["made", "prepared"]
        session.rollback()
        assert list(session.scalars(NAMES)) == ["made"] == seen(app)


def test_a_session_goes_on_after_a_unit_inside_its_transaction(app: Application) -> None:
    with isolated(app.container) as isolation, isolation.session() as session:
        session.add(Item(name="prepared"))
        session.flush()
        with app.unit():
            app.add("made")
        session.add(Item(name="later"))
        session.commit()
        session.add(Item(name="undone"))
        session.flush()
        session.rollback()
        assert seen(app) == ["later", "made", "prepared"]


def test_units_that_its_rollback_undoes_are_told_if_the_test_goes_on(app: Application) -> None:
    with pytest.raises(IsolationBroken, match="Commit what the session has prepared"), isolated(app.container) as isolation:
        session = isolation.session()
        session.add(Item(name="prepared"))
        session.flush()
        with app.unit():
            app.add("made")
        session.rollback()
        assert seen(app) == []


def test_they_are_not_told_where_nothing_is_looked_at_any_more(app: Application) -> None:
    with isolated(app.container) as isolation:
        session = isolation.session()
        session.add(Item(name="prepared"))
        session.flush()
        with app.unit():
            app.add("made")
        assert seen(app) == ["made", "prepared"]
        session.rollback()


def test_what_it_writes_inside_a_unit_that_aborts_is_undone_and_told(app: Application) -> None:
    with pytest.raises(IsolationBroken, match="undone with that"), isolated(app.container) as isolation:
        session = isolation.session()
        assert list(session.scalars(NAMES)) == []
        with pytest.raises(Boom), app.unit():
            app.add("made")
            app.session().flush()
            session.add(Item(name="prepared"))
            session.commit()
            raise Boom


def test_two_sessions_roll_back_each_their_own(app: Application) -> None:
    with isolated(app.container) as isolation, isolation.session() as first, isolation.session() as second:
        first.add(Item(name="first"))
        first.flush()
        second.add(Item(name="second"))
        second.flush()
        second.rollback()
        assert list(first.scalars(NAMES)) == ["first"]
        first.rollback()
        assert list(second.scalars(NAMES)) == []


def test_what_another_session_commits_inside_its_transaction_is_undone_and_told(app: Application) -> None:
    with pytest.raises(IsolationBroken, match="Commit what the session has prepared"), isolated(app.container) as isolation:
        first, second = isolation.session(), isolation.session()
        first.add(Item(name="first"))
        first.flush()
        second.add(Item(name="second"))
        second.commit()
        first.rollback()
        assert list(second.scalars(NAMES)) == []


def test_a_session_waits_for_the_unit_of_another_thread(app: Application) -> None:
    with isolated(app.container) as isolation, ThreadPoolExecutor(1) as pool:
        session = isolation.session()

        def work() -> list[str]:
            session.add(Item(name="prepared"))
            session.commit()
            return list(session.scalars(NAMES))

        with app.unit():
            app.add("made")
            app.session().flush()
            prepared = pool.submit(work)
            with pytest.raises(TimeoutError):
                prepared.result(0.1)
        assert prepared.result(10) == ["made", "prepared"]


def test_a_session_that_is_left_open_is_closed_with_the_isolation(app: Application) -> None:
    with isolated(app.container) as isolation:
        session = isolation.session()
        session.add(Item(name="prepared"))
        session.flush()
    assert not session.in_transaction()


def test_after_an_error_postgresql_refuses_all_else_until_the_rollback(new_postgres_url: Callable[[], str]) -> None:
    with (
        running(writer=new_postgres_url(), reader={"mirror": "writer", "read_only": True}) as app,
        isolated(app.container) as isolation,
        isolation.session() as session,
    ):
        session.add(Item(name="committed"))
        session.commit()
        session.execute(insert(Item).values(name="lost"))
        with pytest.raises(DBAPIError, match="nowhere"):
            session.execute(text("SELECT * FROM nowhere"))
        with pytest.raises(DBAPIError, match="aborted"):
            session.scalars(NAMES)
        assert seen(app) == ["committed", "lost"], "units have connections of their own"
        session.commit()  # the server rolls back
        assert list(session.scalars(NAMES)) == ["committed"]


def test_locks_of_a_session_that_is_left_open_are_free_after_the_test(new_postgres_url: Callable[[], str]) -> None:
    free = text("SELECT pg_try_advisory_lock(5)")
    with running(writer=new_postgres_url(), reader={"mirror": "writer", "read_only": True}) as app:
        with isolated(app.container) as isolation:
            isolation.session().execute(text("SELECT pg_advisory_xact_lock(5)"))
            with app.plain_engine().connect() as other:
                assert not other.scalar(free)
        with app.plain_engine().connect() as other:
            assert other.scalar(free)


# ---- coroutines ----------------------------------------------------------------------------------------------------------


async def test_sessions_for_coroutines_undo_the_same(new_database_url: Callable[[], str]) -> None:
    with running(writer=new_database_url(), reader={"mirror": "writer", "read_only": True}) as app:

        async def names(session: AsyncSession) -> list[str]:
            return list(await session.scalars(NAMES))

        async with isolated(app.container) as isolation:
            session = isolation.async_session()
            session.add(Item(name="committed"))
            await session.commit()
            session.add(Item(name="flushed"))
            await session.flush()
            await session.rollback()
            assert await names(session) == ["committed"]
            with pytest.raises(Boom):
                async with session.begin_nested():
                    session.add(Item(name="inside"))
                    await session.flush()
                    raise Boom
            assert await names(session) == ["committed"]
            await session.rollback()
            with pytest.raises(Boom):
                async with session.begin():
                    session.add(Item(name="inside"))
                    raise Boom
            assert await names(session) == ["committed"]
        await app.container.shutdown_resources()
