"""An application whose items have an amount.

with opened({"writer": url}) as databases:
    with databases.container.transaction():
        databases.add("A-1")
    assert databases.items() == ["A-1"]
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, String, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from harness.applications import Application

BACKEND_ID = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}

LONG = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 30000000) SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(3)",
    "mysql": "SELECT SLEEP(3)",
}
"""By dialect: a statement that takes several seconds."""


class Base(DeclarativeBase):
    """The tables of the tests."""


class Item(Base):
    __tablename__ = "item"

    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    amount: Mapped[int] = mapped_column(default=0)


class Databases(Application):
    """An application whose items have an amount, and which commits as far as it can where it can't commit atomically."""

    item = Item

    def __init__(
        self,
        urls: Mapping[str, str],
        *,
        each: Mapping[str, Any] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        **common: Any,
    ) -> None:
        given = {name: {"url": url, **(each or {}), **(settings or {}).get(name, {})} for name, url in urls.items()}
        super().__init__(given, **{"atomicity": "best_effort", **common})

    def backend_id(self, connection: str = "writer") -> int | None:
        """The number by which the server knows the session's connection; None for a database without a server."""
        session = self.session(connection)
        statement = BACKEND_ID.get(session.get_bind().dialect.name)
        return None if statement is None else int(session.scalar(text(statement)))

    def outside(self, connection: str = "writer") -> Engine:
        """An engine the container knows nothing of; its connections are new ones each time."""
        return self.plain_engine(connection)

    def items(self, connection: str = "writer") -> list[str]:
        """The names of the items that are committed."""
        return self.names(connection)

    def amount(self, name: str, connection: str = "writer") -> int:
        """The committed amount of an item."""
        with self.outside(connection).connect() as outside:
            return outside.scalars(select(Item.amount).where(Item.name == name)).one()

    def rival(self, statement: str, connection: str = "writer") -> None:
        """Execute a statement and commit it, as another application would."""
        with self.outside(connection).begin() as outside:
            outside.execute(text(statement))


opened = Databases
"""`with opened(urls, ...) as databases` sees at the end that no connection is in use any more."""


def database_name(url: str) -> str:
    """The name by which the server knows the database of a URL."""
    return os.path.basename(url)  # noqa: PTH119  # a URL's path, not a file's
