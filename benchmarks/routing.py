"""Units of work a second: the session that finds its database, beside the writer's session and beside `sessionmaker.begin()`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from measuring import compare, heading, report
from schema import Base, Row, Shop, bare_engine, prepared
from sqlalchemy.orm import Session, sessionmaker
from units import postgres_url

FLOOR = 1.10


def run() -> None:
    """Print the tables."""
    Base.metadata.info["app_db_connection"] = "writer"
    with tempfile.TemporaryDirectory() as directory:
        _measure("SQLite", f"sqlite:///{Path(directory) / 'shop.db'}")
    with postgres_url() as url:
        _measure("PostgreSQL", url)


def _measure(name: str, url: str) -> None:
    with prepared(url) as container:
        engine = bare_engine(url)
        bare = sessionmaker(engine)
        heading(f"{name}: the session that finds its database", "units/s")
        _compare(
            "SELECT by key, beside the writer's session",
            lambda: _read(container, container.session),
            lambda: _read(container, container.writer_session),
            at_most=FLOOR,
        )
        _compare("SELECT by key, beside bare", lambda: _read(container, container.session), lambda: _read_bare(bare))
        _compare(
            "INSERT, beside the writer's session",
            lambda: _write(container, container.session),
            lambda: _write(container, container.writer_session),
            at_most=FLOOR,
        )
        _compare("INSERT, beside bare", lambda: _write(container, container.session), lambda: _write_bare(bare))
        engine.dispose()


def _read(container: Shop, session: Callable[[], Session]) -> None:
    with container.transaction():
        session().get(Row, 1)


def _read_bare(bare: sessionmaker[Session]) -> None:
    with bare.begin() as session:
        session.get(Row, 1)


def _write(container: Shop, session: Callable[[], Session]) -> None:
    with container.transaction():
        session().add(Row(text="written"))


def _write_bare(bare: sessionmaker[Session]) -> None:
    with bare.begin() as session:
        session.add(Row(text="written"))


def _compare(what: str, ours: Callable[[], object], beside: Callable[[], object], *, at_most: float | None = None) -> None:
    result = compare(ours, beside, calls=200)
    report(what, ours=f"{1 / result.ours:,.0f}", bare=f"{1 / result.bare:,.0f}", ratio=result.ratio, at_most=at_most)
