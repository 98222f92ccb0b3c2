"""An application of two databases whose models know which is theirs, and a look from outside.

    with routed({"writer": url, "warehouse": another_url}) as app:
        with app.unit():
            app.session.add_all([Item(name="a"), Fact(name="a")])
        assert app.names() == ["a"] and app.names("warehouse") == ["a"]

The reader, where it is not given, is the writer's database.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dependency_injector import providers
from sqlalchemy import Engine, ForeignKey, MetaData, NullPool, String, Table, create_engine, insert, text
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from app_db import DatabaseContainer, DatabaseSettings, RoutingSession, container_of
from harness.applications import Settings
from harness.items import checked_out


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


DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}


def metadata_on(connection: str) -> MetaData:
    """The tables that are in a connection's database."""
    return WarehouseBase.metadata if connection.startswith("warehouse") else Base.metadata


def table_on(connection: str) -> Table:
    """The table that `put` and `names` are about."""
    tables = metadata_on(connection).tables
    return tables["facts"] if "facts" in tables else tables["items"]


def plain_engine(settings: DatabaseSettings, name: str) -> Engine:
    """An engine that app_db knows nothing of, for threads, whatever driver the settings name."""
    url = settings.connection(name).sqlalchemy_url()
    return create_engine(url.set(drivername=DRIVERS[url.get_backend_name()]), poolclass=NullPool)


class RoutedApplication:
    """A container, and plain engines beside it."""

    def __init__(
        self,
        connections: Mapping[str, Settings],
        names: Sequence[str],
        copies: Sequence[str],
        manager: Any = None,
        **common: Any,
    ) -> None:
        given = {name: {"url": what} if isinstance(what, str) else dict(what) for name, what in connections.items()}
        settings = DatabaseSettings(_env_file=None, **{"atomicity": "best_effort", **common, "connections": given})
        self.connections = tuple(dict.fromkeys([*given, *names]))
        given_manager = {} if manager is None else {"transaction_manager": providers.Object(manager)}
        self.container: DatabaseContainer = container_of(*self.connections)(settings=settings, **given_manager)
        self._plain = {name: plain_engine(settings, name) for name, own in given.items() if "mirror" not in own}
        for name in self._plain.keys() - copies:
            metadata_on(name).create_all(self._plain[name])

    @property
    def session(self) -> RoutingSession:
        """The session of the unit that is under way."""
        return self.container.session()

    def unit(self, **options: Any) -> Any:
        """A unit of work."""
        return self.container.transaction(**options)

    def names(self, connection: str = "writer") -> list[str]:
        """The names that are committed, sorted."""
        with self._plain[connection].connect() as plain:
            return sorted(plain.scalars(text(f"SELECT name FROM {table_on(connection)}")))

    def run(self, *statements: str, on: str = "writer") -> None:
        """Run statements beside the application, each committed at once."""
        for statement in statements:
            with self._plain[on].begin() as plain:
                plain.execute(text(statement))

    def put(self, *names: str, on: str = "writer") -> None:
        """Commit rows beside the application."""
        for name in names:
            with self._plain[on].begin() as plain:
                plain.execute(insert(table_on(on)).values(name=name))

    def checked_out(self) -> int:
        """How many connections are in use."""
        return sum(checked_out([getattr(self.container, f"{name}_engine")() for name in self.connections]))

    def close(self) -> None:
        self.container.shutdown_resources()
        for plain in self._plain.values():
            plain.dispose()


@contextmanager
def routed(
    connections: Mapping[str, Settings],
    *,
    names: Sequence[str] = ("reader",),
    copies: Sequence[str] = (),
    **common: Any,
) -> Iterator[RoutedApplication]:
    """An application for the length of the block. At its end no connection may be in use any more.

    `names` are connections without settings; `copies` those whose databases get their tables from elsewhere.
    """
    app = RoutedApplication(connections, names, copies, **common)
    try:
        yield app
        assert app.checked_out() == 0, "a connection was not returned to its pool"
    finally:
        app.close()
