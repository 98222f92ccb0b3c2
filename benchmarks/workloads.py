"""What a unit of work does with the sessions that it is given, for threads and for coroutines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from dependency_injector.wiring import Provide
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from schema import Row

PAIRS_OF_STATEMENTS = 10

_TEXT = select(Row.text).where(Row.id == 1)
_COUNT = update(Row).where(Row.id == 1).values(count=Row.count + 1)
_TALLY = select(func.count(), func.sum(Row.count)).select_from(Row)


@dataclass(frozen=True)
class Workload:
    """One kind of unit. `work` and `work_async` take the sessions of the connections in `uses`, in
    that order.

    Each unit adds so many rows, and adds so much to the counts of rows. `checked_units` holds every
    contestant to that.
    """

    title: str
    uses: tuple[str, ...]
    work: Callable[..., Any]
    work_async: Callable[..., Awaitable[Any]]
    rows: int = 0
    counts: int = 0


def _select(session: Session) -> None:
    session.get_one(Row, 1)


async def _select_async(session: AsyncSession) -> None:
    await session.get_one(Row, 1)


def _selects(session: Session) -> None:
    for _ in range(PAIRS_OF_STATEMENTS):
        session.scalars(_TEXT).one()


async def _selects_async(session: AsyncSession) -> None:
    for _ in range(PAIRS_OF_STATEMENTS):
        (await session.scalars(_TEXT)).one()


def _insert(session: Session) -> None:
    session.add(Row(text="written"))


async def _insert_async(session: AsyncSession) -> None:
    session.add(Row(text="written"))


def _update(session: Session) -> None:
    session.get_one(Row, 1).count += 1


async def _update_async(session: AsyncSession) -> None:
    (await session.get_one(Row, 1)).count += 1


def _both(reader: Session, writer: Session) -> None:
    reader.get_one(Row, 1)
    writer.add(Row(text="written"))


async def _both_async(reader: AsyncSession, writer: AsyncSession) -> None:
    await reader.get_one(Row, 1)
    writer.add(Row(text="written"))


def _statements(session: Session) -> None:
    for _ in range(PAIRS_OF_STATEMENTS):
        session.scalars(_TEXT).one()
        session.execute(_COUNT)


async def _statements_async(session: AsyncSession) -> None:
    for _ in range(PAIRS_OF_STATEMENTS):
        (await session.scalars(_TEXT)).one()
        await session.execute(_COUNT)


def _nothing(session: Session) -> None:
    """Leave the session alone."""


async def _nothing_async(session: AsyncSession) -> None:
    """Leave the session alone."""


def _tally(session: Session) -> tuple[int, int]:
    rows, counts = session.execute(_TALLY).one()
    return int(rows), int(counts or 0)


async def _tally_async(session: AsyncSession) -> tuple[int, int]:
    rows, counts = (await session.execute(_TALLY)).one()
    return int(rows), int(counts or 0)


SELECT = Workload("SELECT by key, writer", ("writer",), _select, _select_async)
SELECT_READER = Workload("SELECT by key, reader", ("reader",), _select, _select_async)
SELECTS_READER = Workload("10 SELECTs, reader", ("reader",), _selects, _selects_async)
INSERT = Workload("INSERT", ("writer",), _insert, _insert_async, rows=1)
UPDATE = Workload("SELECT and UPDATE", ("writer",), _update, _update_async, counts=1)
BOTH = Workload("SELECT by reader, INSERT by writer", ("reader", "writer"), _both, _both_async, rows=1)
STATEMENTS = Workload("20 statements", ("writer",), _statements, _statements_async, counts=PAIRS_OF_STATEMENTS)
UNTOUCHED = Workload("session not used", ("writer",), _nothing, _nothing_async)

MEASURED = (SELECT, SELECT_READER, INSERT, UPDATE, BOTH, STATEMENTS, UNTOUCHED)
TALLY = Workload("rows and counts", ("writer",), _tally, _tally_async)
ALL = (*MEASURED, SELECTS_READER, TALLY)


# ---- with injected sessions ----------------------------------------------------------------------


def asking(decorate: Callable[..., Any], container: Any, workload: Workload, module: str) -> Callable[[], Any]:
    """Return a decorated function that does the work with sessions that it asks a container for. The
    container gives them when it has wired the module.
    """
    work, asked = workload.work, [Provide[getattr(container, f"{name}_session")] for name in workload.uses]

    def unit(session: Session = asked[0]) -> Any:
        return work(session)

    def unit_of_two(first: Session = asked[0], second: Session = asked[-1]) -> Any:
        return work(first, second)

    chosen = unit if len(asked) == 1 else unit_of_two
    chosen.__module__ = module
    return decorate(chosen)


def asking_async(
    decorate: Callable[..., Any], container: Any, workload: Workload, module: str, kind: str = "session"
) -> Callable[[], Awaitable[Any]]:
    """Return the same as a coroutine function. `kind` is what the container calls such sessions."""
    work, asked = workload.work_async, [Provide[getattr(container, f"{name}_{kind}")] for name in workload.uses]

    async def unit(session: AsyncSession = asked[0]) -> Any:
        return await work(session)

    async def unit_of_two(first: AsyncSession = asked[0], second: AsyncSession = asked[-1]) -> Any:
        return await work(first, second)

    chosen = unit if len(asked) == 1 else unit_of_two
    chosen.__module__ = module
    return decorate(chosen)
