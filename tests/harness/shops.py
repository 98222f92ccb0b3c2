"""A shop in which packages that stand on SQLAlchemy are used: by itself, and in an isolated test, after which nothing may stay.

A test reads through units of work. What it leaves in the database is counted by engines that app_db knows nothing of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from sqlalchemy import ColumnElement, MetaData, NullPool, create_engine, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app_db import Connection, DatabaseContainer, DatabaseSettings
from app_db.settings._urls import for_threads
from app_db.testing import isolated
from harness.applications import Atomicity, checked_out


class Shop:
    """A container whose databases have the tables of `metadata`, and for each connection an engine beside the container."""

    def __init__(
        self,
        metadata: MetaData,
        urls: dict[str, str],
        connection: Callable[[], Connection],
        *,
        is_isolated: bool,
        atomicity: Atomicity = "strict",
        **settings: Any,
    ) -> None:
        self.metadata = metadata
        self.is_isolated = is_isolated
        self.settings = DatabaseSettings(
            _env_file=None,
            atomicity=atomicity,
            connections={name: {"url": url, **settings} for name, url in urls.items()},
        )
        container_class = type("Container", (DatabaseContainer,), {name: connection() for name in urls})
        self.container = cast("DatabaseContainer", container_class(settings=self.settings))
        plain_urls = {name: for_threads(self.settings.connection(name).sqlalchemy_url()) for name in urls}
        self.plain = {name: create_engine(url, poolclass=NullPool) for name, url in plain_urls.items()}
        for engine in self.plain.values():
            metadata.create_all(engine)

    @contextmanager
    def test(self) -> Iterator[None]:
        """Surround what a test does: after it, connections are back, and there are rows, or none if it was isolated."""
        if self.is_isolated:
            with isolated(self.container):
                yield
        else:
            yield
        assert sum(checked_out([self.engine(name) for name in self.plain])) == 0
        assert bool(self.rows()) is not self.is_isolated

    def engine(self, name: str = "writer") -> Any:
        return getattr(self.container, f"{name}_engine")()

    def session(self, name: str = "writer") -> Session:
        """The session of the unit that is under way."""
        return cast("Session", getattr(self.container, f"{name}_session")())

    def read(self, column: ColumnElement[str] | InstrumentedAttribute[str], connection: str = "writer") -> list[str]:
        """What a unit of work finds in a column, sorted."""
        with self.container.transaction():
            return sorted(self.session(connection).scalars(select(column)))

    def rows(self) -> dict[str, int]:
        """How many rows are committed in the tables that have any."""
        counts = {}
        for name, engine in self.plain.items():
            with engine.connect() as plain:
                for table in self.metadata.sorted_tables:
                    counts[f"{name}.{table.name}"] = plain.scalars(select(func.count()).select_from(table)).one()
        return {name: count for name, count in counts.items() if count}

    def close(self) -> None:
        self.container.shutdown_resources()
        for engine in self.plain.values():
            engine.dispose()


NewShop = Callable[..., Shop]
"""`new_shop(metadata, *names, **settings)`; it has the one connection `writer` if no names are given."""
