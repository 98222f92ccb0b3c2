"""Who takes part, for coroutines, in one event loop: the same as in `contestants`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

import by_hand
from app_db import DatabaseContainer, transactional
from contestants import (
    BARE,
    BLOCK,
    BY_HAND,
    DECORATED,
    SAME,
    add_first_row,
    autocommit_where_app_db_does,
    compare_tallies,
    set_up_as_app_db,
    shop,
)
from databases import Place
from measuring import WARM_UP, Batch, Effort
from schema import Base, Row, Shop
from workloads import ALL, TALLY, Workload, asking_async

Unit = Callable[[], Awaitable[Any]]
UnitOf = Callable[[Workload], Unit]


@contextmanager
def contestants(place: Place, runner: asyncio.Runner) -> Iterator[dict[str, UnitOf]]:
    """Give all of them, each on a database of its own with one row in it. The first is what the
    others are compared with.
    """
    with ExitStack() as stack:
        yield {
            BARE: stack.enter_context(bare(place.new(), runner)),
            SAME: stack.enter_context(same_work(place, runner)),
            BY_HAND: stack.enter_context(zope_by_hand(place.new(), runner)),
            BLOCK: stack.enter_context(blocks(place.new(), runner)),
            DECORATED: stack.enter_context(decorated(place.new(), runner)),
        }


# ---- bare SQLAlchemy -----------------------------------------------------------------------------


@contextmanager
def bare(url: str, runner: asyncio.Runner) -> Iterator[UnitOf]:
    """SQLAlchemy as its documentation writes it: an engine, a sessionmaker, and `begin()` for each
    session.
    """
    engine = create_async_engine(url)
    runner.run(_add_first_row(engine))
    maker = async_sessionmaker(engine)
    yield _begun({"writer": maker, "reader": maker})
    runner.run(engine.dispose())


@contextmanager
def same_work(place: Place, runner: asyncio.Runner) -> Iterator[UnitOf]:
    """Bare SQLAlchemy that has the database do what app_db has it do."""
    url = place.new_same()
    writer, reader = create_async_engine(url), create_async_engine(url)
    set_up_as_app_db(writer.sync_engine, read_only=False, in_memory=place.in_memory)
    set_up_as_app_db(reader.sync_engine, read_only=True, in_memory=place.in_memory)
    runner.run(_add_first_row(writer))
    used = AsyncEngine(autocommit_where_app_db_does(reader.sync_engine))
    yield _begun({"writer": async_sessionmaker(writer), "reader": async_sessionmaker(used)})
    runner.run(writer.dispose())
    runner.run(reader.dispose())


async def _add_first_row(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session, session.begin():
        session.add(Row(text="first"))


def _begun(makers: Mapping[str, async_sessionmaker[AsyncSession]]) -> UnitOf:
    def unit_of(workload: Workload) -> Unit:
        work = workload.work_async
        if len(workload.uses) == 1:
            maker = makers[workload.uses[0]]

            async def unit() -> Any:
                async with maker.begin() as session:
                    return await work(session)

            return unit
        one, other = (makers[name] for name in workload.uses)

        async def unit_of_two() -> Any:
            async with one.begin() as first, other.begin() as second:
                return await work(first, second)

        return unit_of_two

    return unit_of


# ---- zope.sqlalchemy -----------------------------------------------------------------------------


@contextmanager
def zope_by_hand(url: str, runner: asyncio.Runner) -> Iterator[UnitOf]:
    """zope.sqlalchemy and dependency-injector, without app_db."""
    container = by_hand.AsyncContainer(config={"url": url})
    runner.run(_add_first_row(container.engine()))
    yield by_hand.async_units(container)
    container.unwire()
    runner.run(container.engine().dispose())


# ---- app_db --------------------------------------------------------------------------------------


@contextmanager
def blocks(url: str, runner: asyncio.Runner) -> Iterator[UnitOf]:
    """Give units that are written as `async with container.transaction()`."""
    container = shop(url)
    add_first_row(container.writer_engine())
    yield lambda workload: _block(container, workload)
    runner.run(_shut_down(container))


def _block(container: DatabaseContainer, workload: Workload) -> Unit:
    work = workload.work_async
    if len(workload.uses) == 1:
        session_of = getattr(container, f"{workload.uses[0]}_async_session")

        async def unit() -> Any:
            async with container.transaction():
                return await work(session_of())

        return unit
    first_of, second_of = (getattr(container, f"{name}_async_session") for name in workload.uses)

    async def unit_of_two() -> Any:
        async with container.transaction():
            return await work(first_of(), second_of())

    return unit_of_two


@contextmanager
def decorated(url: str, runner: asyncio.Runner) -> Iterator[UnitOf]:
    """Give units that are coroutine functions decorated with `@transactional`, with their sessions
    injected.
    """
    container = shop(url)
    add_first_row(container.writer_engine())
    units = {workload: asking_async(transactional, Shop, workload, __name__, "async_session") for workload in ALL}
    container.wire(modules=[__name__])
    yield units.__getitem__
    container.unwire()
    runner.run(_shut_down(container))


async def _shut_down(container: DatabaseContainer) -> None:
    await container.shutdown_resources()


# ---- measuring them ------------------------------------------------------------------------------


def repeated(unit: Unit, runner: asyncio.Runner) -> Batch:
    """Return what does a unit again and again in the runner's loop."""

    async def timed(units: int) -> float:
        began = time.perf_counter()
        for _ in range(units):
            await unit()
        return time.perf_counter() - began

    return lambda units: runner.run(timed(units))


def checked_units(contestant: str, unit_of: UnitOf, workload: Workload, effort: Effort, runner: asyncio.Runner) -> Unit:
    """Return a contestant's unit, after some that have left in the database what they should."""
    unit, tally = unit_of(workload), unit_of(TALLY)
    units = 1 if effort.quick else WARM_UP
    before = runner.run(_result(tally))
    repeated(unit, runner)(units)
    compare_tallies(contestant, workload, before, runner.run(_result(tally)), units)
    return unit


async def _result(unit: Unit) -> Any:
    return await unit()
