"""The application: orders in PostgreSQL, sales in SQLite."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from app_db import Connection, DatabaseContainer, Provide, metadata_of, transactional


class Base(DeclarativeBase):
    metadata = metadata_of("writer")


class Facts(DeclarativeBase):
    metadata = metadata_of("warehouse")


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    placed: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC).replace(tzinfo=None))


class Sale(Facts):
    __tablename__ = "sales"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Container(DatabaseContainer):
    writer = Connection()
    reader = Connection()
    warehouse = Connection()


container = Container()

ORDERS = select(func.count()).select_from(Order)
SALES = select(func.count()).select_from(Sale)


@transactional
def place_order(
    number: int, session: Session = Provide[Container.writer.session], facts: Session = Provide[Container.warehouse.session]
) -> None:
    session.add(Order(number=number))
    facts.add(Sale(number=number))


@transactional
def count_orders(session: Session = Provide[Container.reader.session]) -> int:
    return session.scalar(ORDERS) or 0


@transactional
def count_sales(facts: Session = Provide[Container.warehouse.session]) -> int:
    return facts.scalar(SALES) or 0


@transactional
async def place_order_async(
    number: int,
    session: AsyncSession = Provide[Container.writer.async_session],
    facts: AsyncSession = Provide[Container.warehouse.async_session],
) -> None:
    session.add(Order(number=number))
    facts.add(Sale(number=number))


@transactional
async def count_orders_async(session: AsyncSession = Provide[Container.reader.async_session]) -> int:
    return await session.scalar(ORDERS) or 0


container.wire(modules=[__name__])
