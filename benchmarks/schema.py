"""The table and the container that the benchmarks use."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app_db import Connection, DatabaseContainer


class Base(DeclarativeBase):
    """The benchmarks' models."""


class Row(Base):
    """Something to read and write."""

    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(40))
    count: Mapped[int] = mapped_column(default=0)


class Shop(DatabaseContainer):
    """A writer and a reader."""

    writer = Connection()
    reader = Connection()
