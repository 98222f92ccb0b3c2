"""An application of two databases whose models know which is theirs, and a look from outside.

    with routed({"writer": url, "warehouse": another_url}) as app:
        with app.unit():
            app.session.add_all([Item(name="a"), Fact(name="a")])
        assert app.names() == ["a"] and app.names("warehouse") == ["a"]

The reader, where it is not given, is the writer's database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ForeignKey, MetaData, String, Table
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from app_db import RoutingSession
from harness.applications import Application, Settings


class Base(AsyncAttrs, DeclarativeBase):
    metadata = MetaData(info={"app_db_connection": "writer"})


class WarehouseBase(AsyncAttrs, DeclarativeBase):
    metadata = MetaData(info={"app_db_connection": "warehouse"})


class Unnamed(DeclarativeBase):
    """Its models know of no connection."""


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    amount: Mapped[int] = mapped_column(default=0)
    parts: Mapped[list[Part]] = relationship(back_populates="item")


class Part(Base):
    __tablename__ = "parts"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    item_id: Mapped[int | None] = mapped_column(ForeignKey("items.id"))
    item: Mapped[Item | None] = relationship(back_populates="parts")


class Fact(WarehouseBase):
    __tablename__ = "facts"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


class Stray(Unnamed):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


class RoutedApplication(Application):
    """A container with a session that finds its database, and plain engines beside it."""

    def table_on(self, connection: str) -> Table:
        """The table that `put` and `names` are about."""
        tables = (WarehouseBase if connection.startswith("warehouse") else Base).metadata.tables
        return tables["facts"] if "facts" in tables else tables["items"]

    @property
    def session(self) -> RoutingSession:  # type: ignore[override]  # the one that finds its database: it needs no name
        """The session of the unit that is under way."""
        return self.container.session()


def routed(
    connections: Mapping[str, Settings], *, names: Sequence[str] = ("reader",), copies: Sequence[str] = (), **common: Any
) -> RoutedApplication:
    """An application for the length of a block. At its end no connection may be in use any more."""
    return RoutedApplication(connections, names=names, copies=copies, **{"atomicity": "best_effort", **common})
