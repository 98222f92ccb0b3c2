"""One connection of a unit is ended alone: by an autonomous session's commit and rollback, and by `unit.rollback("writer")`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from app_db.errors import InvalidUse, SessionIsManaged, UnitOfWorkEnded, UnknownConnection
from app_db.testing import isolated
from harness.applications import DEFER_UNIQUENESS, Application, Boom, Item, running
from harness.two_phasing import two_phasing

SERVERS = ["sqlite", "postgresql", "mariadb"]


@pytest.fixture(params=SERVERS)
def new_url(request: pytest.FixtureRequest) -> Callable[[], str]:
    kind = {"sqlite": "new_sqlite_url", "postgresql": "new_postgres_url", "mariadb": "new_mariadb_url"}[request.param]
    made: Callable[[], str] = request.getfixturevalue(kind)
    return made


@pytest.fixture
def app(new_url: Callable[[], str]) -> Iterator[Application]:
    log = {"url": new_url(), "transactional": False}
    with running("best_effort", writer=new_url(), log=log, warehouse=new_url()) as app:
        yield app


# ---- autonomous sessions -----------------------------------------------------------------------------------------------


def test_an_autonomous_session_commits_by_itself_in_a_unit_that_aborts(app: Application) -> None:
    with pytest.raises(Boom), app.unit():
        app.add("in the unit")
        log = app.session("log")
        log.add(Item(name="tried"))
        log.commit()
        assert app.names("log") == ["tried"], "it is committed before the unit ends"
        raise Boom
    assert app.names() == []
    assert app.names("log") == ["tried"]


def test_objects_stay_in_an_autonomous_session_that_commits(app: Application) -> None:
    with app.unit():
        log = app.session("log")
        line = Item(name="first")
        log.add(line)
        log.commit()
        line.name = "changed"
        log.commit()
        assert app.names("log") == ["changed"]
        line.name = "changed again"  # by the end of the unit
    assert app.names("log") == ["changed again"]


def test_an_autonomous_session_rolls_back_by_itself(app: Application) -> None:
    with app.unit():
        app.add("in the unit")
        log = app.session("log")
        log.add(Item(name="kept"))
        log.commit()
        log.add(Item(name="undone"))
        log.flush()
        log.rollback()
        assert log.scalars(select(Item.name)).all() == ["kept"]
        log.add(Item(name="later"))
    assert app.names() == ["in the unit"]
    assert app.names("log") == ["kept", "later"]


def test_an_autonomous_session_whose_commit_failed_goes_on_after_a_rollback(app: Application) -> None:
    with app.unit():
        app.add("in the unit")
        log = app.session("log")
        log.add(Item(name="a"))
        log.commit()
        log.add(Item(name="a"))
        with pytest.raises(IntegrityError):
            log.commit()
        log.rollback()
        log.add(Item(name="b"))
        log.commit()
    assert app.names() == ["in the unit"]
    assert app.names("log") == ["a", "b"]


def test_an_isolated_test_rolls_back_what_an_autonomous_session_committed(app: Application) -> None:
    with isolated(app.container), app.unit():
        log = app.session("log")
        log.add(Item(name="a"))
        log.commit()
        log.add(Item(name="b"))
        log.rollback()
        assert log.scalars(select(Item.name)).all() == ["a"]
    assert app.names("log") == []


def test_an_async_autonomous_session_commits_and_rolls_back_by_itself(app: Application) -> None:
    async def work() -> None:
        try:
            async with app.unit():
                log = app.container.log_async_session()
                log.add(Item(name="kept"))
                await log.commit()
                log.add(Item(name="undone"))
                await log.flush()
                await log.rollback()
                raise Boom
        finally:
            await app.container.shutdown_resources()

    with pytest.raises(Boom):
        asyncio.run(work())
    assert app.names("log") == ["kept"]


def test_other_sessions_still_refuse_to_commit_alone(app: Application) -> None:
    with app.unit():
        app.add("a")
        for end in (app.session().commit, app.session().rollback):
            with pytest.raises(SessionIsManaged):
                end()


# ---- unit.rollback -----------------------------------------------------------------------------------------------------


def test_a_unit_rolls_back_one_connection_and_commits_the_others(app: Application) -> None:
    with app.unit() as unit:
        app.add("kept")
        app.add("undone", "warehouse")
        unit.rollback("warehouse")
        assert app.session("warehouse").scalars(select(Item.name)).all() == []
    assert app.names() == ["kept"]
    assert app.names("warehouse") == []


def test_the_connection_can_be_used_again(app: Application) -> None:
    with app.unit() as unit:
        app.add("undone")
        unit.rollback("writer")
        app.add("later")
        unit.rollback("writer")
        app.add("last")
    assert app.names() == ["last"]


def test_what_was_not_flushed_is_undone_too(app: Application) -> None:
    with app.unit() as unit:
        app.session().add(Item(name="pending"))
        unit.rollback("writer")
    assert app.names() == []


def test_a_unit_goes_on_after_a_statement_that_failed_on_the_connection(app: Application) -> None:
    app.run("INSERT INTO items (name) VALUES ('taken')")
    with app.unit() as unit:
        app.add("kept", "warehouse")
        with pytest.raises(IntegrityError):
            app.add("taken")
        unit.rollback("writer")
    assert app.names("warehouse") == ["kept"]
    assert app.names() == ["taken"]


def test_what_a_routing_session_wrote_on_the_connection_is_undone(app: Application) -> None:
    with app.unit() as unit:
        app.add("kept", "warehouse")
        app.container.session().add(Item(name="undone"))
        app.container.session().flush()
        unit.rollback("writer")
        assert app.container.session().scalars(select(Item.name)).all() == []
        app.container.session().add(Item(name="later"))
    assert app.names() == ["later"]
    assert app.names("warehouse") == ["kept"]


def test_a_connection_that_was_not_used_has_nothing_to_undo(app: Application) -> None:
    with app.unit() as unit:
        unit.rollback("warehouse")
        app.add("kept")
    assert app.names() == ["kept"]


def test_an_unknown_name_is_refused_with_those_that_are_known(app: Application) -> None:
    with app.unit() as unit, pytest.raises(UnknownConnection, match=r"'writr'.*Did you mean 'writer'"):
        unit.rollback("writr")


def test_a_connection_that_shares_a_transaction_is_refused_by_name(new_url: Callable[[], str]) -> None:
    url = new_url()
    with running(writer=url, copy={"mirror": "writer"}) as app, app.unit() as unit:
        app.add("kept", "writer")
        with pytest.raises(InvalidUse, match="shares the transaction of 'writer'"):
            unit.rollback("copy")


def test_a_nested_unit_refuses_to_undo_what_is_before_it(app: Application) -> None:
    with app.unit() as unit:
        app.add("before")
        with app.unit(propagation="nested"), pytest.raises(InvalidUse, match="Roll back to the savepoint"):
            unit.rollback("writer")
        app.add("after")
    assert app.names() == ["after", "before"]


def test_a_unit_that_has_ended_refuses(app: Application) -> None:
    with app.unit() as unit:
        pass
    with pytest.raises(UnitOfWorkEnded):
        unit.rollback("writer")


def test_a_coroutine_awaits_it(app: Application) -> None:
    async def work() -> None:
        try:
            async with app.unit() as unit:
                for name in ("writer", "warehouse"):
                    session = getattr(app.container, f"{name}_async_session")()
                    session.add(Item(name=name))
                    await session.flush()
                await unit.rollback("warehouse")
                app.container.warehouse_async_session().add(Item(name="later"))
        finally:
            await app.container.shutdown_resources()

    asyncio.run(work())
    assert app.names() == ["writer"]
    assert app.names("warehouse") == ["later"]


def test_awaiting_it_is_optional_in_a_plain_unit(app: Application) -> None:
    async def work() -> None:
        with app.unit() as unit:
            app.add("undone")
            await unit.rollback("writer")

    asyncio.run(work())
    assert app.names() == []


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_the_rest_is_committed_in_two_phases(kind: str, request: pytest.FixtureRequest) -> None:
    new: Callable[[], str] = request.getfixturevalue("new_postgres_url" if kind == "postgresql" else "new_mariadb_url")
    with two_phasing(
        "ledger", writer=new(), warehouse=new(), other=new(), ledger=request.getfixturevalue("new_postgres_url")()
    ) as app:
        with app.unit() as unit:
            app.add_to_each("a", "writer", "warehouse", "other")
            unit.rollback("warehouse")
            app.add("b", "warehouse")
            unit.rollback("other")
        assert (app.names("writer"), app.names("warehouse"), app.names("other")) == (["a"], ["b"], [])


def test_a_refused_commit_of_the_rest_leaves_nothing(new_postgres_url: Callable[[], str]) -> None:
    with running("best_effort", writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)
        with pytest.raises(IntegrityError), app.unit() as unit:
            app.add("undone", "warehouse")
            unit.rollback("warehouse")
            app.add("taken")
            app.session("warehouse").execute(text("SELECT 1"))
        assert app.names() == ["taken"]
        assert app.names("warehouse") == []
