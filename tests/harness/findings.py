"""What `find` says about databases, for tests that plant a fault.

    assert matters(found(main=url)) == [("unreachable", "main")]

A connection called `goods` has models: the table `goods`, which `GOODS` creates. One called `stocks` has a table in a schema
of its own. One called `main` or `copy` has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Column, Integer, NullPool, String, Table, create_engine, make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app_db import DatabaseSettings, container_of, metadata_of
from app_db._findings.find import find
from app_db._findings.finding import Finding
from harness.servers import MariaDBServer, PostgresServer, Server

GOODS = "CREATE TABLE goods (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(40) NOT NULL)"


class _Base(DeclarativeBase):
    metadata = metadata_of("goods")


class Good(_Base):
    __tablename__ = "goods"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


STOCK = Table("stock", metadata_of("stocks"), Column("id", Integer, primary_key=True), schema="ware")


def found(
    *,
    declared: Sequence[str] | None = None,
    modules: Sequence[str] = (),
    now: Callable[[], float] = time.time,
    patience: float = 5.0,
    common: dict[str, Any] | None = None,
    **connections: str | dict[str, Any],
) -> list[Finding]:
    """What is found about these connections, each a URL or settings. Their statements have a time limit, unless they say so."""
    given = {name: {"url": what} if isinstance(what, str) else what for name, what in connections.items()}
    given = {name: {"statement_timeout": 60, **what} for name, what in given.items()}
    settings = DatabaseSettings(_env_file=None, connections=given, **(common or {}))
    container = container_of(*(given if declared is None else declared))(settings=settings)
    try:
        findings = find(container, modules, now=now, patience=patience)
    finally:
        container.shutdown_resources()
    passwords = {make_url(str(what["url"])).password for what in given.values() if "url" in what} - {None}
    for finding in findings:
        assert not [password for password in passwords if str(password) in f"{finding.what}{finding.where}{finding.remedy}"]
        assert all(text.strip() == text != "" for text in (finding.what, finding.where, finding.remedy))
        assert all(text.endswith(".") for text in (finding.what, finding.remedy))
    return findings


def matters(findings: Sequence[Finding]) -> list[tuple[str, str | None]]:
    """The names of what was found, each with the connection."""
    return [(finding.matter, finding.connection) for finding in findings]


def run(url: str, *statements: str) -> None:
    """Run statements in a database, each committed at once."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@contextmanager
def user(server: Server, url: str, *grants: str) -> Iterator[str]:
    """The URL of a database for a user of its own, who has these privileges: `SELECT ON goods`."""
    database, name, password = str(make_url(url).database), f"plain_{time.monotonic_ns() % 10**9}", "plain-password"
    address = "" if isinstance(server, PostgresServer) else "@'127.0.0.1'"
    quoted = f"'{name}'{address}" if address else name
    kind, by = ("USER", "IDENTIFIED BY") if address else ("ROLE", "LOGIN PASSWORD")
    run(url, f"CREATE {kind} {quoted} {by} '{password}'", *(f"GRANT {grant} TO {quoted}" for grant in grants))
    try:
        yield server.url(database, user=name, password=password)
    finally:
        if isinstance(server, MariaDBServer):
            run(url, f"DROP USER {quoted}")
        else:
            run(url, f"DROP OWNED BY {quoted}", f"DROP ROLE {quoted}")
