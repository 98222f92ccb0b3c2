"""Units of work in the forms in which applications write them, for programs that interrupt them.

    units = BlockingUnits(plan)
    for form in units.forms:
        form(Unit("nested-1", journal))

Each form adds a row with the unit's name to every database of the plan, and says in the journal what it knows for certain:
which rows must be there, and which never may be. `Bare…` are the same forms in plain SQLAlchemy.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from dependency_injector.wiring import Provide
from sqlalchemy import create_engine, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from app_db import DatabaseContainer, DatabaseSettings, container_of, transactional
from harness.items import Item

POOL = {"size": 5, "max_overflow": 10, "timeout": 1.0}
"""Small, so that what leaks shows. Nothing waits for a connection: there is one unit at a time."""


class Alarm(Exception):
    """An interruption that `except Exception` catches, like Celery's SoftTimeLimitExceeded."""


class Bell(BaseException):
    """An interruption that `except Exception` lets through, like KeyboardInterrupt."""


INTERRUPTIONS = (Alarm, Bell)


class Undo(Exception):
    """Raised in a block whose work is to be undone."""


class Journal(Protocol):
    def note(self, kind: str, name: str) -> None: ...


@dataclass(slots=True)
class Unit:
    """One unit of work: its name, which is that of its row, and what is known of it."""

    name: str
    journal: Journal

    def part(self, name: str) -> str:
        return f"{self.name}/{name}"

    def acknowledge(self, name: str | None = None) -> None:
        """A unit's outermost block has returned: its row must be there."""
        self.journal.note("acknowledged", name or self.name)

    def never(self, name: str | None = None) -> None:
        """A block is left by an exception before its end: its row may not be there."""
        self.journal.note("never", name or self.name)

    def hooks_ran(self, told: list[str]) -> None:
        """The block has returned, so these are the hooks that have run."""
        if told != ["committed"]:
            self.journal.note("hooks", f"{self.name}: {told}")


@dataclass
class Plan:
    """What a run works on."""

    connections: dict[str, dict[str, Any]]
    written: list[str]
    """The connections to which each unit writes."""
    decision_log: str | None
    kind: str
    commit: str
    bare: bool
    seconds: float
    directory: str
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = list(self.connections)

    @property
    def on_sqlite(self) -> bool:
        return any(make_url(self.connections[name]["url"]).get_backend_name() == "sqlite" for name in self.written)

    def shuffled(self) -> list[str]:
        return random.sample(self.written, len(self.written))

    def container(self) -> DatabaseContainer:
        connections = {name: {**given, "pool": POOL} for name, given in self.connections.items()}
        settings = DatabaseSettings(_env_file=None, connections=connections, decision_log=self.decision_log)
        return container_of(*connections)(settings=settings)


def sometimes() -> bool:
    return random.random() < 0.5


# ---- app_db, blocking ------------------------------------------------------------------------------------------------


@transactional
def add_decorated(name: str, add_others: Callable[[str], None], session: Session = Provide["writer_session"]) -> None:
    session.add(Item(name=name))
    add_others(name)


@transactional(propagation="requires_new")
def add_separately(name: str, add: Callable[[str], None], session: Session = Provide["writer_session"]) -> None:
    assert session is not None
    add(name)


class ContainerUnits:
    """What blocking and awaited units of app_db have in common."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.container: DatabaseContainer = plan.container()
        self.container.wire(modules=[sys.modules[__name__]])
        self.manager: Any = self.container.transaction_manager()

    def current(self) -> object | None:
        found: object | None = self.manager.current()
        return found

    def abort_current(self) -> None:
        self.manager.abort()

    def recover(self) -> None:
        self.container.recovery().settle(grace=0)


class BlockingUnits(ContainerUnits):
    """Units of a thread."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.forms: list[Callable[[Unit], None]] = [
            *(self.block, self.block, self.decorated, self.decorated, self.run, self.kept, self.exit_stack, self.generator),
            *(self.nested, self.nested_undone, self.nested_survived, self.joined, self.joined_survived),
            *(self.separate, self.separate_undone, self.suspended, self.savepoint, self.session_savepoint),
            *(self.hooks, self.undone, self.read_only, self.options),
        ]

    def session(self, connection: str) -> Session:
        session: Session = getattr(self.container, f"{connection}_session")()
        return session

    def add(self, name: str) -> None:
        self.add_to(self.plan.shuffled(), name)

    def add_to(self, connections: list[str], name: str) -> None:
        for connection in connections:
            session = self.session(connection)
            session.add(Item(name=name))
            if sometimes():
                session.flush()

    def add_others(self, name: str) -> None:
        self.add_to([connection for connection in self.plan.shuffled() if connection != "writer"], name)

    def pools(self) -> list[Any]:
        return [getattr(self.container, f"{name}_engine")().pool for name in self.plan.names]

    def forget_connections(self) -> None:
        for name in self.plan.names:
            getattr(self.container, f"{name}_engine")().dispose()

    def close(self) -> None:
        self.container.unwire()
        self.container.shutdown_resources()

    # -- forms

    def block(self, unit: Unit) -> None:
        with self.container.transaction():
            self.add(unit.name)
        unit.acknowledge()

    def decorated(self, unit: Unit) -> None:
        add_decorated(unit.name, self.add_others)
        unit.acknowledge()

    def run(self, unit: Unit) -> None:
        self.container.transaction().run(self.add, unit.name)
        unit.acknowledge()

    def kept(self, unit: Unit) -> None:
        block = self.container.transaction()
        with block as work:
            assert work is not None
            self.add(unit.name)
        unit.acknowledge()

    def exit_stack(self, unit: Unit) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.container.transaction())
            self.add(unit.name)
        unit.acknowledge()

    @contextmanager
    def _unit_of_work(self) -> Iterator[None]:
        with self.container.transaction():
            yield

    def generator(self, unit: Unit) -> None:
        with self._unit_of_work():
            self.add(unit.name)
        unit.acknowledge()

    def nested(self, unit: Unit) -> None:
        with self.container.transaction():
            self.add(unit.name)
            with self.container.transaction(propagation="nested"):
                self.add(unit.part("nested"))
        unit.acknowledge()
        unit.acknowledge(unit.part("nested"))

    def nested_undone(self, unit: Unit) -> None:
        unit.never(unit.part("undone"))
        with self.container.transaction():
            self.add(unit.name)
            with suppress(Undo), self.container.transaction(propagation="nested"):
                self.add(unit.part("undone"))
                raise Undo
        unit.acknowledge()

    def nested_survived(self, unit: Unit) -> None:
        inside = False
        with self.container.transaction():
            self.add(unit.name)
            try:
                with self.container.transaction(propagation="nested"):
                    inside = True
                    self.add(unit.part("inner"))
                    inside = False
            except INTERRUPTIONS:
                if inside:
                    unit.never(unit.part("inner"))
        unit.acknowledge()

    def joined(self, unit: Unit) -> None:
        with self.container.transaction():
            self.add(unit.name)
            add_decorated(unit.part("joined"), self.add_others)
        unit.acknowledge()
        unit.acknowledge(unit.part("joined"))

    def joined_survived(self, unit: Unit) -> None:
        inside = False
        with self.container.transaction():
            self.add(unit.name)
            try:
                with self.container.transaction():
                    inside = True
                    self.add(unit.part("inner"))
                    inside = False
            except INTERRUPTIONS:
                if inside:  # it dooms the whole
                    unit.never(unit.part("inner"))
                    unit.never()
        unit.acknowledge()

    def separate(self, unit: Unit) -> None:
        with self.container.transaction():
            if not self.plan.on_sqlite:  # which has one writer at a time
                self.add(unit.name)
            add_separately(unit.part("separate"), self.add)
            unit.acknowledge(unit.part("separate"))
            if self.plan.on_sqlite:
                self.add(unit.name)
        unit.acknowledge()

    def separate_undone(self, unit: Unit) -> None:
        unit.never(unit.part("undone"))
        with self.container.transaction():
            with suppress(Undo), self.container.transaction(propagation="requires_new"):
                self.add(unit.part("undone"))
                raise Undo
            self.add(unit.name)
        unit.acknowledge()

    def suspended(self, unit: Unit) -> None:
        with self.container.transaction():
            self.add(unit.name)
            with self.container.transaction(propagation="not_supported"):
                pass
            self.add(unit.part("after"))
        unit.acknowledge()
        unit.acknowledge(unit.part("after"))

    def savepoint(self, unit: Unit) -> None:
        unit.never(unit.part("undone"))
        with self.container.transaction() as work:
            self.add(unit.name)
            savepoint = work.savepoint()
            self.add(unit.part("undone"))
            savepoint.rollback()
        unit.acknowledge()

    def session_savepoint(self, unit: Unit) -> None:
        unit.never(unit.part("undone"))
        with self.container.transaction():
            self.add(unit.name)
            for connection in self.plan.shuffled():
                session = self.session(connection)
                with suppress(Undo), session.begin_nested():
                    session.add(Item(name=unit.part("undone")))
                    raise Undo
        unit.acknowledge()

    def hooks(self, unit: Unit) -> None:
        told: list[str] = []
        with self.container.transaction() as work:
            self.add(unit.name)
            work.on_commit(told.append, "committed")
            work.on_abort(told.append, "aborted")
        unit.acknowledge()
        unit.hooks_ran(told)

    def undone(self, unit: Unit) -> None:
        unit.never()
        with suppress(Undo), self.container.transaction():
            self.add(unit.name)
            raise Undo

    def read_only(self, unit: Unit) -> None:
        with self.container.transaction(read_only=True):
            self.session("writer").scalar(select(func.count()).where(Item.name == unit.name))

    def options(self, unit: Unit) -> None:
        with self.container.transaction(timeout=5, isolation="SERIALIZABLE"):
            self.add(unit.name)
        unit.acknowledge()


# ---- app_db, awaited -------------------------------------------------------------------------------------------------


@transactional
async def add_decorated_awaited(
    name: str, add_others: Callable[[str], Awaitable[None]], session: AsyncSession = Provide["writer_async_session"]
) -> None:
    session.add(Item(name=name))
    await add_others(name)


@transactional(propagation="requires_new")
async def add_separately_awaited(
    name: str, add: Callable[[str], Awaitable[None]], session: AsyncSession = Provide["writer_async_session"]
) -> None:
    assert session is not None
    await add(name)


class AwaitedUnits(ContainerUnits):
    """Units of a task."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.forms: list[Callable[[Unit], Awaitable[None]]] = [
            *(self.block, self.block, self.decorated, self.decorated, self.run, self.exit_stack, self.generator),
            *(self.nested, self.nested_undone, self.nested_survived, self.joined, self.joined_survived),
            *(self.separate, self.separate_undone, self.suspended, self.session_savepoint),
            *(self.hooks, self.undone, self.read_only, self.options),
        ]

    def session(self, connection: str) -> AsyncSession:
        session: AsyncSession = getattr(self.container, f"{connection}_async_session")()
        return session

    async def add(self, name: str) -> None:
        await self.add_to(self.plan.shuffled(), name)

    async def add_to(self, connections: list[str], name: str) -> None:
        for connection in connections:
            session = self.session(connection)
            session.add(Item(name=name))
            if sometimes():
                await session.flush()

    async def add_others(self, name: str) -> None:
        await self.add_to([connection for connection in self.plan.shuffled() if connection != "writer"], name)

    def pools(self) -> list[Any]:
        return [getattr(self.container, f"{name}_async_engine")().pool for name in self.plan.written]

    async def leave_loop(self) -> None:
        await self.container.shutdown_resources()

    def close(self) -> None:
        self.container.unwire()
        self.container.shutdown_resources()

    # -- forms

    async def block(self, unit: Unit) -> None:
        async with self.container.transaction():
            await self.add(unit.name)
        unit.acknowledge()

    async def decorated(self, unit: Unit) -> None:
        await add_decorated_awaited(unit.name, self.add_others)
        unit.acknowledge()

    async def run(self, unit: Unit) -> None:
        await self.container.transaction().run(self.add, unit.name)
        unit.acknowledge()

    async def exit_stack(self, unit: Unit) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.container.transaction())
            await self.add(unit.name)
        unit.acknowledge()

    @asynccontextmanager
    async def _unit_of_work(self) -> AsyncIterator[None]:
        async with self.container.transaction():
            yield

    async def generator(self, unit: Unit) -> None:
        async with self._unit_of_work():
            await self.add(unit.name)
        unit.acknowledge()

    async def nested(self, unit: Unit) -> None:
        async with self.container.transaction():
            await self.add(unit.name)
            async with self.container.transaction(propagation="nested"):
                await self.add(unit.part("nested"))
        unit.acknowledge()
        unit.acknowledge(unit.part("nested"))

    async def nested_undone(self, unit: Unit) -> None:
        unit.never(unit.part("undone"))
        async with self.container.transaction():
            await self.add(unit.name)
            with suppress(Undo):
                async with self.container.transaction(propagation="nested"):
                    await self.add(unit.part("undone"))
                    raise Undo
        unit.acknowledge()

    async def nested_survived(self, unit: Unit) -> None:
        inside = False
        async with self.container.transaction():
            await self.add(unit.name)
            try:
                async with self.container.transaction(propagation="nested"):
                    inside = True
                    await self.add(unit.part("inner"))
                    inside = False
            except INTERRUPTIONS:
                if inside:
                    unit.never(unit.part("inner"))
        unit.acknowledge()

    async def joined(self, unit: Unit) -> None:
        async with self.container.transaction():
            await self.add(unit.name)
            await add_decorated_awaited(unit.part("joined"), self.add_others)
        unit.acknowledge()
        unit.acknowledge(unit.part("joined"))

    async def joined_survived(self, unit: Unit) -> None:
        inside = False
        async with self.container.transaction():
            await self.add(unit.name)
            try:
                async with self.container.transaction():
                    inside = True
                    await self.add(unit.part("inner"))
                    inside = False
            except INTERRUPTIONS:
                if inside:  # it dooms the whole
                    unit.never(unit.part("inner"))
                    unit.never()
        unit.acknowledge()

    async def separate(self, unit: Unit) -> None:
        async with self.container.transaction():
            if not self.plan.on_sqlite:  # which has one writer at a time
                await self.add(unit.name)
            await add_separately_awaited(unit.part("separate"), self.add)
            unit.acknowledge(unit.part("separate"))
            if self.plan.on_sqlite:
                await self.add(unit.name)
        unit.acknowledge()

    async def separate_undone(self, unit: Unit) -> None:
        unit.never(unit.part("undone"))
        async with self.container.transaction():
            with suppress(Undo):
                async with self.container.transaction(propagation="requires_new"):
                    await self.add(unit.part("undone"))
                    raise Undo
            await self.add(unit.name)
        unit.acknowledge()

    async def suspended(self, unit: Unit) -> None:
        async with self.container.transaction():
            await self.add(unit.name)
            async with self.container.transaction(propagation="not_supported"):
                await asyncio.sleep(0)
            await self.add(unit.part("after"))
        unit.acknowledge()
        unit.acknowledge(unit.part("after"))

    async def session_savepoint(self, unit: Unit) -> None:
        unit.never(unit.part("undone"))
        async with self.container.transaction():
            await self.add(unit.name)
            for connection in self.plan.shuffled():
                session = self.session(connection)
                with suppress(Undo):
                    async with session.begin_nested():
                        session.add(Item(name=unit.part("undone")))
                        raise Undo
        unit.acknowledge()

    async def hooks(self, unit: Unit) -> None:
        told: list[str] = []

        async def tell(what: str) -> None:
            await asyncio.sleep(0)
            told.append(what)

        async with self.container.transaction() as work:
            await self.add(unit.name)
            work.on_commit(tell, "committed")
            work.on_abort(tell, "aborted")
        unit.acknowledge()
        unit.hooks_ran(told)

    async def undone(self, unit: Unit) -> None:
        unit.never()
        with suppress(Undo):
            async with self.container.transaction():
                await self.add(unit.name)
                raise Undo

    async def read_only(self, unit: Unit) -> None:
        async with self.container.transaction(read_only=True):
            await self.session("writer").scalar(select(func.count()).where(Item.name == unit.name))

    async def options(self, unit: Unit) -> None:
        async with self.container.transaction(timeout=5, isolation="SERIALIZABLE"):
            await self.add(unit.name)
        unit.acknowledge()


# ---- plain SQLAlchemy ------------------------------------------------------------------------------------------------


class BareUnits:
    """What plain units have in common: a sessionmaker for each connection, and nothing that knows of units."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def current(self) -> object | None:
        return None

    def abort_current(self) -> None: ...

    def recover(self) -> None: ...


def engine_options(given: dict[str, Any]) -> dict[str, Any]:
    pool = {"pool_size": POOL["size"], "max_overflow": POOL["max_overflow"], "pool_timeout": POOL["timeout"]}
    return {"connect_args": given.get("connect_args", {}), **pool}


class BareBlockingUnits(BareUnits):
    """Units of a thread by `sessionmaker.begin()`; over several databases, one block in another.

    `nested_survived` loses rows here: if the flush with which `begin_nested()` begins fails, and the error is caught in the block
    of `sessionmaker.begin()`, that block returns normally and commits nothing.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        given = {name: plan.connections[name] for name in plan.written}
        self.engines = {name: create_engine(it["url"], **engine_options(it)) for name, it in given.items()}
        self.makers = {name: sessionmaker(engine) for name, engine in self.engines.items()}
        self.forms: list[Callable[[Unit], None]] = [
            *(self.block, self.block, self.exit_stack, self.nested, self.nested_undone, self.nested_survived, self.undone),
        ]

    def pools(self) -> list[Any]:
        return [engine.pool for engine in self.engines.values()]

    def forget_connections(self) -> None:
        for engine in self.engines.values():
            engine.dispose()

    close = forget_connections

    def add(self, sessions: list[Session], name: str) -> None:
        for session in sessions:
            session.add(Item(name=name))
            if sometimes():
                session.flush()

    def blocks(self) -> list[Any]:
        return [self.makers[name].begin() for name in self.plan.shuffled()]

    def in_blocks(self, do: Callable[[list[Session]], None]) -> None:
        """Call a function in the blocks' sessions, without anything of contextlib's around them."""
        if len(self.plan.written) == 1:
            with self.makers["writer"].begin() as session:
                do([session])
            return
        first, second = self.blocks()
        with first as session, second as other:
            do([session, other])

    def block(self, unit: Unit) -> None:
        self.in_blocks(lambda sessions: self.add(sessions, unit.name))
        unit.acknowledge()

    def exit_stack(self, unit: Unit) -> None:
        with ExitStack() as stack:
            self.add([stack.enter_context(block) for block in self.blocks()], unit.name)
        unit.acknowledge()

    def nested(self, unit: Unit) -> None:
        def do(sessions: list[Session]) -> None:
            self.add(sessions, unit.name)
            for session in sessions:
                with session.begin_nested():
                    self.add([session], unit.part("nested"))

        self.in_blocks(do)
        unit.acknowledge()
        unit.acknowledge(unit.part("nested"))

    def nested_undone(self, unit: Unit) -> None:
        def do(sessions: list[Session]) -> None:
            self.add(sessions, unit.name)
            for session in sessions:
                with suppress(Undo), session.begin_nested():
                    self.add([session], unit.part("undone"))
                    raise Undo

        unit.never(unit.part("undone"))
        self.in_blocks(do)
        unit.acknowledge()

    def nested_survived(self, unit: Unit) -> None:
        def do(sessions: list[Session]) -> None:
            self.add(sessions, unit.name)
            inside = False
            try:
                with sessions[0].begin_nested(), sessions[-1].begin_nested():
                    inside = True
                    self.add(sessions, unit.part("inner"))
                    inside = False
            except INTERRUPTIONS:
                if inside:
                    unit.never(unit.part("inner"))

        self.in_blocks(do)
        unit.acknowledge()

    def undone(self, unit: Unit) -> None:
        def do(sessions: list[Session]) -> None:
            self.add(sessions, unit.name)
            raise Undo

        unit.never()
        with suppress(Undo):
            self.in_blocks(do)


class BareAwaitedUnits(BareUnits):
    """Units of a task by `async_sessionmaker.begin()`; each event loop has its own engines."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.engines: dict[str, Any] = {}
        self.makers: dict[str, async_sessionmaker[AsyncSession]] = {}
        self.forms: list[Callable[[Unit], Awaitable[None]]] = [
            *(self.block, self.block, self.exit_stack, self.nested, self.nested_undone, self.nested_survived, self.undone),
        ]

    def pools(self) -> list[Any]:
        return [engine.pool for engine in self.engines.values()]

    async def leave_loop(self) -> None:
        engines, self.engines, self.makers = self.engines, {}, {}
        for engine in engines.values():
            await engine.dispose()

    def close(self) -> None: ...

    def blocks(self) -> list[Any]:
        if not self.makers:
            given = {name: self.plan.connections[name] for name in self.plan.written}
            self.engines = {name: create_async_engine(it["url"], **engine_options(it)) for name, it in given.items()}
            self.makers = {name: async_sessionmaker(engine) for name, engine in self.engines.items()}
        return [self.makers[name].begin() for name in self.plan.shuffled()]

    async def add(self, sessions: list[AsyncSession], name: str) -> None:
        for session in sessions:
            session.add(Item(name=name))
            if sometimes():
                await session.flush()

    async def in_blocks(self, do: Callable[[list[AsyncSession]], Awaitable[None]]) -> None:
        blocks = self.blocks()
        if len(blocks) == 1:
            async with blocks[0] as session:
                await do([session])
            return
        first, second = blocks
        async with first as session, second as other:
            await do([session, other])

    async def block(self, unit: Unit) -> None:
        await self.in_blocks(lambda sessions: self.add(sessions, unit.name))
        unit.acknowledge()

    async def exit_stack(self, unit: Unit) -> None:
        async with AsyncExitStack() as stack:
            await self.add([await stack.enter_async_context(block) for block in self.blocks()], unit.name)
        unit.acknowledge()

    async def nested(self, unit: Unit) -> None:
        async def do(sessions: list[AsyncSession]) -> None:
            await self.add(sessions, unit.name)
            for session in sessions:
                async with session.begin_nested():
                    await self.add([session], unit.part("nested"))

        await self.in_blocks(do)
        unit.acknowledge()
        unit.acknowledge(unit.part("nested"))

    async def nested_undone(self, unit: Unit) -> None:
        async def do(sessions: list[AsyncSession]) -> None:
            await self.add(sessions, unit.name)
            for session in sessions:
                with suppress(Undo):
                    async with session.begin_nested():
                        await self.add([session], unit.part("undone"))
                        raise Undo

        unit.never(unit.part("undone"))
        await self.in_blocks(do)
        unit.acknowledge()

    async def nested_survived(self, unit: Unit) -> None:
        async def do(sessions: list[AsyncSession]) -> None:
            await self.add(sessions, unit.name)
            inside = False
            try:
                async with sessions[0].begin_nested(), sessions[-1].begin_nested():
                    inside = True
                    await self.add(sessions, unit.part("inner"))
                    inside = False
            except INTERRUPTIONS:
                if inside:
                    unit.never(unit.part("inner"))

        await self.in_blocks(do)
        unit.acknowledge()

    async def undone(self, unit: Unit) -> None:
        async def do(sessions: list[AsyncSession]) -> None:
            await self.add(sessions, unit.name)
            raise Undo

        unit.never()
        with suppress(Undo):
            await self.in_blocks(do)
