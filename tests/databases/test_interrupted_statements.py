"""A connection is closed if its driver was interrupted while it waited: its next answer may be that to the last statement."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from harness.alarms import Alarm, alarm, ring
from harness.applications import Application, running

SLEEPS = {"postgresql": "SELECT pg_sleep(5)", "mariadb": "SELECT SLEEP(5)"}
BACKENDS = {"postgresql": "SELECT pg_backend_pid()", "mariadb": "SELECT CONNECTION_ID()"}


def by_session(session: Session, statement: str) -> None:
    session.execute(text(statement))


def by_connection(session: Session, statement: str) -> None:
    session.connection().exec_driver_sql(statement)


def by_cursor(session: Session, statement: str) -> None:
    cursor = session.connection().connection.cursor()
    cursor.execute(statement)


WAYS = pytest.mark.parametrize("execute", [by_session, by_connection, by_cursor])


@pytest.fixture(params=["postgresql", "mariadb"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def app(kind: str, request: pytest.FixtureRequest) -> Iterator[Application]:
    url = request.getfixturevalue({"postgresql": "postgres_url", "mariadb": "mariadb_url"}[kind])
    with running(writer={"url": url, "pool": {"size": 1, "max_overflow": 0, "timeout": 2}}) as app:
        yield app


def backend(app: Application, kind: str) -> int:
    return int(app.session().scalar(text(BACKENDS[kind])))


@pytest.mark.representative("postgresql-by_session", "mariadb-by_cursor")
@WAYS
def test_it_is_not_used_by_the_next_unit(app: Application, kind: str, execute: Callable[[Session, str], None]) -> None:
    with app.unit():
        before = backend(app, kind)
    with pytest.raises(Alarm), alarm(0.2), app.unit():
        app.add("interrupted")
        execute(app.session(), SLEEPS[kind])
    for number in range(3):
        with app.unit():
            assert app.session().scalar(text("SELECT 4242")) == 4242
            app.add(f"next {number}")
            assert backend(app, kind) != before
    assert app.names() == ["next 0", "next 1", "next 2"]


@pytest.mark.parametrize("execute", [by_session, by_connection])
def test_a_unit_that_swallows_the_interruption_cannot_commit(
    app: Application, kind: str, execute: Callable[[Session, str], None]
) -> None:
    with pytest.raises(Exception) as caught, app.unit():  # what the driver says of a closed connection
        app.add("before")
        with pytest.raises(Alarm), alarm(0.2):
            execute(app.session(), SLEEPS[kind])
        app.add("after")
    assert not isinstance(caught.value, Alarm)
    assert app.names() == []
    with app.unit():
        app.add("next")
    assert app.names() == ["next"]


class BetweenSendingAndReading:
    """Raises Alarm once, when PyMySQL has sent a statement and is about to read the answer."""

    def __enter__(self) -> Self:
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_name == "_read_query_result":
            sys.settrace(None)
            ring(0, frame)
        return None


@WAYS
def test_no_answer_goes_to_a_later_statement(mariadb_url: str, execute: Callable[[Session, str], None]) -> None:
    with running(writer={"url": mariadb_url, "pool": {"size": 1, "max_overflow": 0, "timeout": 2}}) as app:
        with pytest.raises(Alarm), app.unit():
            app.add("interrupted")
            with BetweenSendingAndReading():
                execute(app.session(), "DO 4711")  # whose answer looks like that to ROLLBACK
        for expected in (4242, 4243):
            with app.unit():
                assert app.session().scalar(text(f"SELECT {expected}")) == expected
                app.add(str(expected))
        assert app.names() == ["4242", "4243"]
