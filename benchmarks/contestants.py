"""Who takes part, for threads: each is a context manager that gives a function from a workload to a
unit of work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import PoolProxiedConnection

import by_hand
from app_db import DatabaseContainer, DatabaseSettings, transactional
from databases import Place
from measuring import WARM_UP, Effort
from schema import Base, Row, Shop
from workloads import ALL, BOTH, TALLY, Workload, asking

BARE = "bare"
SAME = "same work"
BY_HAND = "zope by hand"
BLOCK = "`with` block"
DECORATED = "`@transactional`"
OURS = (BLOCK, DECORATED)
CONTESTANTS = (BARE, SAME, BY_HAND, *OURS)

Unit = Callable[[], Any]
UnitOf = Callable[[Workload], Unit]


@contextmanager
def contestants(place: Place, *, pool_size: int = 5) -> Iterator[dict[str, UnitOf]]:
    """Give all of them, each on a database of its own with one row in it. The first is what the
    others are compared with.
    """
    with ExitStack() as stack:
        yield {
            BARE: stack.enter_context(bare(place.new(), pool_size=pool_size)),
            SAME: stack.enter_context(same_work(place, pool_size=pool_size)),
            BY_HAND: stack.enter_context(zope_by_hand(place.new(), pool_size=pool_size)),
            BLOCK: stack.enter_context(blocks(place.new(), pool_size=pool_size)),
            DECORATED: stack.enter_context(decorated(place.new(), pool_size=pool_size)),
        }


def can_do(contestant: str, workload: Workload, place: Place) -> bool:
    """Return whether a contestant can do a workload.

    The sessions of a thread share one connection to SQLite's own in-memory database. zope rolls the
    reader's session back before it commits the writer's, which loses the row.
    """
    return not (contestant == BY_HAND and workload is BOTH and place.in_memory)


# ---- bare SQLAlchemy -----------------------------------------------------------------------------


@contextmanager
def bare(url: str, *, pool_size: int = 5) -> Iterator[UnitOf]:
    """SQLAlchemy as its documentation writes it: an engine, a sessionmaker, and `begin()` for each
    session.
    """
    engine = create_engine(url, pool_size=pool_size)
    add_first_row(engine)
    maker = sessionmaker(engine)
    yield begun({"writer": maker, "reader": maker})
    engine.dispose()


@contextmanager
def same_work(place: Place, *, pool_size: int = 5) -> Iterator[UnitOf]:
    """Bare SQLAlchemy that has the database do what app_db has it do."""
    url = place.new_same()
    writer, reader = create_engine(url, pool_size=pool_size), create_engine(url, pool_size=pool_size)
    set_up_as_app_db(writer, read_only=False, in_memory=place.in_memory)
    set_up_as_app_db(reader, read_only=True, in_memory=place.in_memory)
    add_first_row(writer)
    yield begun({"writer": sessionmaker(writer), "reader": sessionmaker(autocommit_where_app_db_does(reader))})
    writer.dispose()
    reader.dispose()


def add_first_row(engine: Engine) -> None:
    """Make the table, and the row that is read."""
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Row(text="first"))


def begun(makers: Mapping[str, sessionmaker[Session]]) -> UnitOf:
    """Give units that begin a session by each maker that a workload uses."""

    def unit_of(workload: Workload) -> Unit:
        work = workload.work
        if len(workload.uses) == 1:
            maker = makers[workload.uses[0]]

            def unit() -> Any:
                with maker.begin() as session:
                    return work(session)

            return unit
        one, other = (makers[name] for name in workload.uses)

        def unit_of_two() -> Any:
            with one.begin() as first, other.begin() as second:
                return work(first, second)

        return unit_of_two

    return unit_of


def set_up_as_app_db(engine: Engine, *, read_only: bool, in_memory: bool) -> None:
    """Configure an engine as app_db does, as far as the database sees it."""
    statements: list[str] = []
    if engine.dialect.name == "sqlite":
        _begin_by(engine, "BEGIN" if read_only else "BEGIN IMMEDIATE")
        statements += ["PRAGMA journal_mode = WAL", "PRAGMA foreign_keys = ON"]
        statements += ["PRAGMA synchronous = OFF"] if in_memory else []
        statements += ["PRAGMA query_only = ON"] if read_only else []
    elif engine.dialect.name == "postgresql":
        statements += ["SET default_transaction_read_only = on"] if read_only else []
    else:
        statements += ["SET SESSION TRANSACTION READ ONLY"] if read_only else []
    if not statements:
        return

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()
        connection.commit()


def _begin_by(engine: Engine, statement: str) -> None:
    """Begin transactions as app_db does. A listener to "begin" would make each use of the engine
    dearer.
    """

    def begin(dbapi_connection: PoolProxiedConnection) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute(statement)
        cursor.close()

    engine.dialect.do_begin = begin  # type: ignore[method-assign]


def autocommit_where_app_db_does(reader: Engine) -> Engine:
    """A reader of app_db on PostgreSQL is in autocommit."""
    return reader.execution_options(isolation_level="AUTOCOMMIT") if reader.dialect.name == "postgresql" else reader


# ---- zope.sqlalchemy -----------------------------------------------------------------------------


@contextmanager
def zope_by_hand(url: str, *, pool_size: int = 5) -> Iterator[UnitOf]:
    """zope.sqlalchemy and dependency-injector, without app_db."""
    container = by_hand.Container(config={"url": url, "pool_size": pool_size})
    add_first_row(container.engine())
    yield by_hand.units(container)
    container.unwire()
    container.engine().dispose()


# ---- app_db --------------------------------------------------------------------------------------


@contextmanager
def blocks(url: str, *, pool_size: int = 5) -> Iterator[UnitOf]:
    """Give units that are written as `with container.transaction()`."""
    container = shop(url, pool_size)
    add_first_row(container.writer_engine())
    yield lambda workload: _block(container, workload)
    container.shutdown_resources()


def _block(container: DatabaseContainer, workload: Workload) -> Unit:
    work = workload.work
    if len(workload.uses) == 1:
        session_of = getattr(container, f"{workload.uses[0]}_session")

        def unit() -> Any:
            with container.transaction():
                return work(session_of())

        return unit
    first_of, second_of = (getattr(container, f"{name}_session") for name in workload.uses)

    def unit_of_two() -> Any:
        with container.transaction():
            return work(first_of(), second_of())

    return unit_of_two


@contextmanager
def decorated(url: str, *, pool_size: int = 5, settings: Mapping[str, object] | None = None) -> Iterator[UnitOf]:
    """Give units that are functions decorated with `@transactional`, with their sessions
    injected. `settings` are more settings of the writer.
    """
    container = shop(url, pool_size, settings)
    add_first_row(container.writer_engine())
    # A module of their own: the last container that wires a module gives the sessions of all its functions.
    module = sys.modules[f"shop_{id(container)}"] = ModuleType(f"shop_{id(container)}")
    units = {workload: asking(transactional, Shop, workload, module.__name__) for workload in ALL}
    container.wire(modules=[module])
    yield units.__getitem__
    container.unwire()
    del sys.modules[module.__name__]
    container.shutdown_resources()


def shop(url: str, pool_size: int = 5, settings: Mapping[str, object] | None = None) -> Shop:
    """Return a container whose writer is at `url`, and whose reader is the same database."""
    writer = {"url": url, "pool": {"size": pool_size}, **(settings or {})}
    return Shop(settings=DatabaseSettings(_env_file=None, connections={"writer": writer}))


# ---- whether they do what they should ------------------------------------------------------------


def checked_units(contestant: str, unit_of: UnitOf, workload: Workload, effort: Effort) -> Unit:
    """Return a contestant's unit, after some that have left in the database what they should."""
    unit, tally = unit_of(workload), unit_of(TALLY)
    units = 1 if effort.quick else WARM_UP
    before = tally()
    for _ in range(units):
        unit()
    compare_tallies(contestant, workload, before, tally(), units)
    return unit


def compare_tallies(contestant: str, workload: Workload, before: tuple[int, int], after: tuple[int, int], units: int) -> None:
    """Raise if so many units have not added what they should."""
    added = tuple(one - other for one, other in zip(after, before, strict=True))
    expected = (units * workload.rows, units * workload.counts)
    if added != expected:
        raise AssertionError(f"{workload.title}, {contestant}: {units} units added {added} (rows, counts), not {expected}")
