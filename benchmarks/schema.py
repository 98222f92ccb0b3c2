"""The table and the container that the benchmarks use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app_db import Connection, DatabaseContainer, DatabaseSettings


class Base(DeclarativeBase):
    """The benchmarks' models."""


class Row(Base):
    """Something to read and write."""

    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Shop(DatabaseContainer):
    """A writer and a reader."""

    writer = Connection()
    reader = Connection()


@contextmanager
def prepared(url: str, *, pool_size: int = 5) -> Iterator[Shop]:
    """A container on a database with one row in it."""
    writer = {"url": url, "pool": {"size": pool_size}}
    container = Shop(settings=DatabaseSettings(_env_file=None, connections={"writer": writer}))
    Base.metadata.create_all(container.writer_engine())
    with container.transaction():
        container.writer_session().add(Row(text="first"))
    yield container
    container.shutdown_resources()


def bare_engine(url: str, *, pool_size: int = 5) -> Engine:
    """A plain engine, with what anybody would set for SQLite: WAL, and transactions that really begin."""
    engine = create_engine(url, pool_size=pool_size)
    _set_up(engine)
    return engine


def bare_async_engine(url: str) -> AsyncEngine:
    """The same for coroutines."""
    engine = create_async_engine(url)
    _set_up(engine.sync_engine)
    return engine


def _set_up(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def set_up(connection: Any, record: Any) -> None:
            connection.isolation_level = None
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.close()

        @event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
