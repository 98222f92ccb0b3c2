"""What was not loaded inside a unit can't be read where nothing loads it, and coroutines are told what to write instead."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest
from sqlalchemy import ForeignKey, String, inspect, select
from sqlalchemy.exc import MissingGreenlet, SQLAlchemyError, StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload
from sqlalchemy.orm.exc import DetachedInstanceError

from app_db import DatabaseContainer, DatabaseSettings, container_of
from harness.choosing import mostly
from harness.coroutines import DRIVERS, url_for, with_driver


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    note: Mapped[str | None] = mapped_column(String(20))
    lines: Mapped[list[Line]] = relationship()


class Line(Base):
    __tablename__ = "lines"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    order: Mapped[int] = mapped_column(ForeignKey("orders.id"))


@pytest.fixture(params=[*mostly(DRIVERS, exhaustive="psycopg"), *mostly(["asyncmy"], exhaustive="asyncmy")])
def container(request: pytest.FixtureRequest) -> Iterator[DatabaseContainer]:
    """A container whose writer has an order with one line, for coroutines."""
    kind = "mariadb" if request.param == "asyncmy" else request.param
    url = with_driver(url_for(kind, request), request.param)
    container: DatabaseContainer = container_of("writer")(
        settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": url}})
    )

    async def make() -> None:
        async with container.writer_async_engine().begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with container.transaction():
            container.writer_async_session().add(Order(id=1, lines=[Line(id=1)]))
        await container.shutdown_resources()

    asyncio.run(make())
    yield container
    container.shutdown_resources()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("attribute", ["lines", "note"])
def test_coroutines_are_told_how_to_load_what_is_not_loaded(container: DatabaseContainer, attribute: str) -> None:
    async def main() -> None:
        async with container.transaction():
            session = container.writer_async_session()
            order = (await session.scalars(select(Order))).one()
            session.expire(order, [attribute])
            with pytest.raises(SQLAlchemyError) as refused:
                getattr(order, attribute)
            error = refused.value.orig if isinstance(refused.value, StatementError) else refused.value
            assert isinstance(error, MissingGreenlet)
            (note,) = getattr(refused.value, "__notes__", [""])
            assert note.startswith("app_db: the connection 'writer' ")
            assert "options(selectinload(Order.lines))" in note
            assert 'await session.refresh(order, ["lines"])' in note
            del refused, error
            await session.refresh(order, [attribute])
            assert getattr(order, attribute) is not order.id
            order.note = "written"
        async with container.transaction():
            session = container.writer_async_session()
            found = (await session.scalars(select(Order).options(selectinload(Order.lines)))).one()
        assert (found.note, len(found.lines)) == ("written", 1)
        assert container.writer_async_engine().pool.checkedout() == 0
        await container.shutdown_resources()

    asyncio.run(main())
    gc.collect()  # here aiosqlite's coroutine warns that it was never awaited


def test_after_the_unit_only_what_was_loaded_can_be_read(container: DatabaseContainer) -> None:
    """The fact guarded: SQLAlchemy raises DetachedInstanceError, and app_db has no public place to add to it."""

    async def main() -> None:
        async with container.transaction():
            order = (await container.writer_async_session().scalars(select(Order))).one()
        assert inspect(order).detached
        assert (order.id, order.note) == (1, None)
        with pytest.raises(DetachedInstanceError, match="lazy load operation of attribute 'lines'"):
            assert order.lines
        async with container.transaction():
            container.writer_async_session().add(order)
            await container.writer_async_session().refresh(order, ["lines"])
        assert len(order.lines) == 1
        await container.shutdown_resources()

    asyncio.run(main())
