"""Units of work a second: app_db beside `sessionmaker.begin()`, one process, one thread."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import compare, heading, report
from schema import Row, bare_engine, prepared
from sqlalchemy.orm import Session, sessionmaker

if TYPE_CHECKING:
    from app_db import DatabaseContainer


def run() -> None:
    """Print the table."""
    heading("Units of work", "units/s")
    with tempfile.TemporaryDirectory() as directory:
        _measure("SQLite", f"sqlite:///{Path(directory) / 'shop.db'}")
    with postgres_url() as url:
        _measure("PostgreSQL", url, reader=1.0, writer=1.10)


@contextmanager
def postgres_url() -> Iterator[str]:
    """A database on a server of its own, with the settings a server comes with."""
    from servers import PostgresServer

    server = PostgresServer(settings={"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"})
    server.start()
    try:
        server.create_database("shop")
        yield server.url("shop")
    finally:
        server.close()


def _measure(name: str, url: str, *, reader: float | None = None, writer: float | None = None) -> None:
    with prepared(url) as container:
        engine = bare_engine(url)
        bare = sessionmaker(engine)
        _compare(f"{name}: SELECT by key, reader", *_select(container, bare), at_most=reader)
        _compare(f"{name}: SELECT by key, writer", *_select_for_writing(container, bare), at_most=writer)
        _compare(f"{name}: INSERT, writer", *insert(container, bare), at_most=writer)
        if not url.startswith("sqlite"):  # by hand, the writer's transaction would shut the reader's out
            _compare(f"{name}: reader plus writer", *_both(container, bare), at_most=writer)
        engine.dispose()


Pair = tuple[Callable[[], object], Callable[[], object]]


def _select(container: DatabaseContainer, bare: sessionmaker[Session]) -> Pair:
    def ours() -> None:
        with container.transaction():
            container.reader_session().get(Row, 1)

    def plain() -> None:
        with bare.begin() as session:
            session.get(Row, 1)

    return ours, plain


def _select_for_writing(container: DatabaseContainer, bare: sessionmaker[Session]) -> Pair:
    def ours() -> None:
        with container.transaction():
            container.writer_session().get(Row, 1)

    return ours, _select(container, bare)[1]


def insert(container: DatabaseContainer, bare: sessionmaker[Session]) -> Pair:
    """Return two ways of writing a row in a unit of work."""

    def ours() -> None:
        with container.transaction():
            container.writer_session().add(Row(text="written"))

    def plain() -> None:
        with bare.begin() as session:
            session.add(Row(text="written"))

    return ours, plain


def _both(container: DatabaseContainer, bare: sessionmaker[Session]) -> Pair:
    def ours() -> None:
        with container.transaction():
            container.reader_session().get(Row, 1)
            container.writer_session().add(Row(text="written"))

    def plain() -> None:
        with bare.begin() as reader, bare.begin() as writer:
            reader.get(Row, 1)
            writer.add(Row(text="written"))

    return ours, plain


def _compare(what: str, ours: Callable[[], object], bare: Callable[[], object], *, at_most: float | None) -> None:
    result = compare(ours, bare, calls=200)
    report(what, ours=f"{1 / result.ours:,.0f}", bare=f"{1 / result.bare:,.0f}", ratio=result.ratio, at_most=at_most)
