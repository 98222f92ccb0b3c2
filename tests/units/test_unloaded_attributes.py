"""What was not loaded inside a unit can't be read where nothing loads it, and coroutines are told what to write instead."""

from __future__ import annotations

import asyncio
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import ForeignKey, String, create_engine, inspect, select
from sqlalchemy.exc import MissingGreenlet, SQLAlchemyError, StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, defer, mapped_column, relationship, selectinload
from sqlalchemy.orm.exc import DetachedInstanceError

from app_db import DatabaseContainer, DatabaseSettings, container_of
from harness.choosing import mostly
from harness.coroutines import DRIVERS, url_for, with_driver


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(20))
    note: Mapped[str | None] = mapped_column(String(20))
    lines: Mapped[list[Line]] = relationship()
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "order"}  # noqa: RUF012  # SQLAlchemy's annotation


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
    async def main() -> None:
        async with container.transaction():
            order = (await container.writer_async_session().scalars(select(Order))).one()
        assert inspect(order).detached
        assert (order.id, order.note) == (1, None)
        with pytest.raises(DetachedInstanceError, match="lazy load operation of attribute 'lines'") as refused:
            assert order.lines
        (said,) = refused.value.__notes__
        assert said == (
            "app_db: load Order.lines before its unit of work, or its session, ends: "
            "select(Order).options(selectinload(Order.lines))."
        )
        async with container.transaction():
            container.writer_async_session().add(order)
            await container.writer_async_session().refresh(order, ["lines"])
        assert len(order.lines) == 1
        await container.shutdown_resources()

    asyncio.run(main())


class Shipment(Order):
    __mapper_args__ = {"polymorphic_identity": "shipment"}  # noqa: RUF012


def test_the_error_of_any_attribute_says_what_to_do(new_sqlite_url: Callable[[], str]) -> None:
    container: DatabaseContainer = container_of("writer")(
        settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": new_sqlite_url()}})
    )
    Base.metadata.create_all(container.writer_engine())
    with container.transaction():
        session = container.writer_session()
        session.add_all([Order(id=1), Shipment(id=2)])
        session.flush()
        session.expire_all()
        order, shipment = session.get(Order, 1), session.get(Order, 2)
        deferred = session.scalars(select(Order).options(defer(Order.note)).where(Order.id == 1)).one()
        assert order is deferred
        assert order is not None
        assert shipment is not None
        session.expire(order, ["note"])
    missing: list[tuple[Any, str, str]] = [
        (shipment, "lines", "app_db: load Shipment.lines before"),
        (order, "note", "app_db: read what you need of Order before"),
    ]
    for instance, attribute, note in missing:
        with pytest.raises(DetachedInstanceError) as refused:
            getattr(instance, attribute)
        (said,) = refused.value.__notes__
        assert said.startswith(note)
    container.shutdown_resources()


def test_an_attribute_that_is_loaded_late_is_loaded(new_sqlite_url: Callable[[], str]) -> None:
    engine = create_engine(new_sqlite_url())
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Order(id=1, note="said", lines=[Line(id=1)]))
        session.commit()
        order = session.scalars(select(Order)).one()
        assert (order.note, [line.id for line in order.lines]) == ("said", [1])
        copy = pickle.loads(pickle.dumps(order))
    assert (copy.note, [line.id for line in copy.lines]) == ("said", [1])
    engine.dispose()
