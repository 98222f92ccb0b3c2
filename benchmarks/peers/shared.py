"""What the programs share: where the databases are, the models, the errors, and the gate at which a request waits.

It is run by the interpreters of all peers, so it imports SQLAlchemy only.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

URL = os.environ["COMPARE_URL"]
"""The database. Its driver is psycopg."""

SECOND_URL = os.environ["COMPARE_SECOND_URL"]
"""Another one, for requests that write to two."""

PLACE = os.environ.get("COMPARE_PLACE", "")
"""Where a BaseHTTPMiddleware stands: "inside" or "outside" of the peer's middleware. Empty: there is none."""

COLLISION = "DO $$ BEGIN RAISE EXCEPTION 'two transactions collided' USING ERRCODE = '40001'; END $$"
"""A serialization failure, as PostgreSQL reports it."""


class Boom(Exception):
    """An error that no handler knows."""


class Handled(Exception):
    """An error that the application has a handler for. The handler reads, and answers 409."""


class Base(DeclarativeBase):
    """The models of the database."""


class Item(Base):
    """An item. A second one of the same name makes COMMIT fail."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class SecondBase(DeclarativeBase):
    """The models of the second database."""


class SecondItem(SecondBase):
    """An item of the second database."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


_tries: Counter[Any] = Counter()


def is_first_try(name: str) -> bool:
    """Return whether this is the first call with a name."""
    _tries[name] += 1
    return _tries[name] == 1
