"""What the tests of units of work share: databases with a table of items, a container over them, and a look from outside.

with opened({"writer": url}) as databases:
    with databases.container.transaction():
        databases.add("A-1")
    assert databases.items() == ["A-1"]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dependency_injector import providers
from sqlalchemy import Engine, String, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool, QueuePool

from app_db import DatabaseContainer, DatabaseSettings, container_of

BACKEND_ID = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}


class Base(DeclarativeBase):
    """The tables of the tests."""


class Item(Base):
    __tablename__ = "item"

    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    amount: Mapped[int] = mapped_column(default=0)


class Databases:
    """A container whose connections have a table of items each, and engines of the test's own to look at them from outside."""

    def __init__(
        self,
        urls: Mapping[str, str],
        *,
        manager: Any = None,
        each: Mapping[str, Any] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        **common: Any,
    ) -> None:
        connections = {name: {"url": url, **(each or {}), **(settings or {}).get(name, {})} for name, url in urls.items()}
        self.settings = DatabaseSettings(**{"atomicity": "best_effort", **common, "connections": connections})
        given = {} if manager is None else {"transaction_manager": providers.Object(manager)}
        self.container: DatabaseContainer = container_of(*urls)(settings=self.settings, **given)
        self._outside = {name: create_engine(url, poolclass=NullPool) for name, url in urls.items()}
        for outside in self._outside.values():
            Base.metadata.create_all(outside)

    # -- in a unit of work

    def session(self, connection: str = "writer") -> Session:
        session: Session = getattr(self.container, f"{connection}_session")()
        return session

    def add(self, name: str, connection: str = "writer") -> None:
        """Write an item, which the database then knows of."""
        session = self.session(connection)
        session.add(Item(name=name))
        session.flush()

    def backend_id(self, connection: str = "writer") -> int | None:
        """The number by which the server knows the session's connection; None for a database without a server."""
        session = self.session(connection)
        statement = BACKEND_ID.get(session.get_bind().dialect.name)
        return None if statement is None else int(session.scalar(text(statement)))

    # -- from outside

    def outside(self, connection: str = "writer") -> Engine:
        """An engine the container knows nothing of; its connections are new ones each time."""
        return self._outside[connection]

    def items(self, connection: str = "writer") -> list[str]:
        """The names of the items that are committed."""
        with self.outside(connection).connect() as outside:
            return list(outside.scalars(select(Item.name).order_by(Item.name)))

    def amount(self, name: str, connection: str = "writer") -> int:
        """The committed amount of an item."""
        with self.outside(connection).connect() as outside:
            return outside.scalars(select(Item.amount).where(Item.name == name)).one()

    def put(self, *names: str, connection: str = "writer") -> None:
        """Commit items."""
        with self.outside(connection).begin() as outside:
            for name in names:
                outside.execute(text("INSERT INTO item (name, amount) VALUES (:name, 0)"), {"name": name})

    def rival(self, statement: str, connection: str = "writer") -> None:
        """Execute a statement and commit it, as another application would."""
        with self.outside(connection).begin() as outside:
            outside.execute(text(statement))

    # -- the container's engines

    def engine(self, connection: str = "writer") -> Engine:
        engine: Engine = getattr(self.container, f"{connection}_engine")()
        return engine

    def checked_out(self) -> int:
        """How many connections are in use now."""
        return sum(checked_out([self.engine(name) for name in self._outside]))

    def close(self) -> None:
        self.container.shutdown_resources()
        for outside in self._outside.values():
            outside.dispose()


def checked_out(engines: Sequence[Engine]) -> list[int]:
    """How many connections are in use, of each engine."""
    pools = [engine.pool for engine in engines]
    return [pool.checkedout() for pool in pools if isinstance(pool, QueuePool)]


@contextmanager
def opened(urls: Mapping[str, str], **options: Any) -> Iterator[Databases]:
    """Open databases, and see at the end that no connection is in use any more."""
    databases = Databases(urls, **options)
    try:
        yield databases
        assert databases.checked_out() == 0, "a connection was not returned to its pool"
    finally:
        databases.close()


def database_name(url: str) -> str:
    """The name by which the server knows the database of a URL."""
    return os.path.basename(url)  # noqa: PTH119  # a URL's path, not a file's
