"""Tests that make time stand still or jump, by freezegun and time-machine: limits of time go by the real clock."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import time_machine
from freezegun import freeze_time
from sqlalchemy import text

from app_db import Container, DatabaseSettings
from app_db.errors import IsolationTimeout
from app_db.testing import isolated

PATIENCE = 0.1
LATER = datetime(2044, 2, 3, tzinfo=UTC)

Freeze = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(
    params=[lambda: freeze_time(LATER), lambda: time_machine.travel(LATER, tick=False)], ids=["freezegun", "time-machine"]
)
def freeze(request: pytest.FixtureRequest) -> Freeze:
    made: Freeze = request.param
    return made


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    made = Container(settings=DatabaseSettings(connections={"writer": {"url": f"sqlite:///{tmp_path}/shop.db"}}))
    yield made
    made.shutdown_resources()


def in_a_thread(function: Callable[[], object]) -> object:
    """The result of a function, or its error, which must be there in time: a thread can be left behind."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it waits without end"
    return found[0]


def test_a_unit_waits_for_another_one_no_longer_than_it_may(container: Container, freeze: Freeze) -> None:
    def work() -> None:
        with freeze(), container.transaction():
            container.writer_session().execute(text("SELECT 1"))

    with isolated(container, patience=PATIENCE), container.transaction():
        container.writer_session().execute(text("SELECT 1"))
        assert isinstance(in_a_thread(work), IsolationTimeout)


def test_a_unit_of_a_coroutine_waits_no_longer_either(container: Container, freeze: Freeze) -> None:
    async def wait() -> None:
        async with container.transaction():
            await container.writer_async_session().execute(text("SELECT 1"))

    async def hold(held: asyncio.Event, done: asyncio.Event) -> None:
        async with container.transaction():
            await container.writer_async_session().execute(text("SELECT 1"))
            held.set()
            await done.wait()

    async def both() -> object:
        held, done = asyncio.Event(), asyncio.Event()
        async with isolated(container, patience=PATIENCE):
            holding = asyncio.create_task(hold(held, done))
            await held.wait()
            with freeze():
                error = (await asyncio.gather(asyncio.create_task(wait()), return_exceptions=True))[0]
            done.set()
            await holding
        await container.shutdown_resources()
        return error

    assert isinstance(in_a_thread(lambda: asyncio.run(both())), IsolationTimeout)


def test_a_jump_of_the_clock_makes_no_unit_late(container: Container, freeze: Freeze) -> None:
    with container.transaction(timeout=60) as unit:
        with freeze():
            assert container.writer_session().scalar(text("SELECT 1")) == 1
        assert unit.number
    with freeze(), container.transaction(timeout=60):
        assert container.writer_session().scalar(text("SELECT 1")) == 1
