"""What the shop stores. Each database has a declarative base of its own, which knows the name of its connection."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app_db import metadata_of


class ShopBase(DeclarativeBase):
    """What is in the database of the connections `writer` and `reader`."""

    metadata = metadata_of("writer")


class WarehouseBase(DeclarativeBase):
    """What is in the database of the connection `warehouse`."""

    metadata = metadata_of("warehouse")


class LogBase(DeclarativeBase):
    """What is in the database of the connection `log`."""

    metadata = metadata_of("log")


class Order(ShopBase):
    """An order of a customer."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(String(40))
    quantity: Mapped[int]


class Movement(WarehouseBase):
    """Goods that come into the warehouse, or leave it."""

    __tablename__ = "movements"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(String(40))
    quantity: Mapped[int]


class Entry(LogBase):
    """A line of the log."""

    __tablename__ = "entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(200))
