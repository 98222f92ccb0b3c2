"""Threads and tasks that all work at once through a pooler, beside a plain program, and what they and the server see.

seen = Load("asyncpg", "transaction", server, pooler).run(seconds=3)
assert seen.wrong == []
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any

from sqlalchemy import select, text

from app_db.errors import ReadOnlyViolation, UnitOfWorkTimeout
from harness.applications import Application, Item
from harness.poolers import PgBouncer
from harness.servers import PostgresServer

THREADS = 8
TASKS = 50

USES = {"write": 8, "read": 8, "denied": 4, "limited": 4, "both": 8, "too long": 1}
"""What is done, and how often. What takes too long keeps a server connection from the others for a while."""

HIDDEN_WRITE = "DO $$ BEGIN INSERT INTO items (name) VALUES ('denied'); END $$"

TRACKED = "'application_name', 'client_encoding', 'DateStyle', 'TimeZone', 'standard_conforming_strings'"
"""Settings that PgBouncer itself keeps apart for each client."""

SESSION_SETTINGS = f"SELECT name, setting FROM pg_settings WHERE source = 'session' AND name NOT IN ({TRACKED}) ORDER BY name"

BACKENDS = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' "
    "AND pid <> pg_backend_pid()"
)


@dataclass
class Seen:
    """What was done, and what went wrong."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Asked:
    """What to do once, under a name of its own."""

    what: str
    name: str


class Load:
    """An application of writers, readers and two-phase units over a pooler that has few connections."""

    def __init__(self, driver: str, mode: str, server: PostgresServer, pooler: PgBouncer) -> None:
        self.driver = driver
        self.mode = mode
        self.server = server
        self.pooler = pooler
        self.seen = Seen()
        self._acknowledged: dict[str, list[str]] = {"one": [], "both": []}
        self._first = cycle(USES)  # so that each is done by somebody
        self._stop = threading.Event()

    def run(self, seconds: float) -> Seen:
        """Work for a while, and compare what is there with what was acknowledged."""
        with self._databases() as databases, Application(self._settings(databases), decision_log="journal") as app:
            self._ended = time.monotonic() + seconds
            beside = [
                threading.Thread(target=self._noted, args=(what, given))
                for what, given in ((self._be_a_plain_program, databases["writer"]), (self._recover, app))
            ]
            for thread in beside:
                thread.start()
            with ThreadPoolExecutor(THREADS) as pool:
                for number in range(THREADS):
                    pool.submit(self._noted, self._work, (app, f"thread {number}"))
                asyncio.run(self._tasks(app))
            self._stop.set()
            for thread in beside:
                thread.join()
            self._compare(app)
            app.container.shutdown_resources()
            for database in databases.values():
                self._look_at_server_connections(database)
        return self.seen

    @contextmanager
    def _databases(self) -> Iterator[dict[str, str]]:
        with (
            self.server.lend_database() as one,
            self.server.lend_database() as two,
            self.server.lend_database() as three,
        ):
            self.server.execute("CREATE TABLE plain (id serial)", database=one)
            yield {"writer": one, "warehouse": two, "journal": three}

    def _settings(self, databases: dict[str, str]) -> dict[str, dict[str, Any]]:
        # A client of session pooling keeps its server connection as long as it is connected. All would wait for two of them.
        pooling = {"pooler": "transaction"} if self.mode == "transaction" else {"pooler": "none", "pool": {"class": "null"}}
        driver = f"postgresql+{self.driver}"
        urls = {name: {"url": self.pooler.url(database, driver), **pooling} for name, database in databases.items()}
        return {
            "writer": {**urls["writer"], "two_phase": True},
            "warehouse": {**urls["warehouse"], "two_phase": True},
            "reader": {**urls["writer"], "read_only": True},
            "journal": urls["journal"],
        }

    # ---- who works

    def _noted(self, do: Callable[..., None], given: Any) -> None:
        """Do something in a thread, and note what it raises."""
        try:
            do(*given) if isinstance(given, tuple) else do(given)
        except BaseException as error:  # shown at the end
            self._note_wrong(do.__name__.strip("_"), error)

    def _note_wrong(self, who: str, error: BaseException) -> None:
        self.seen.wrong.append(f"{who}: {type(error).__name__} {' '.join(str(error).split())[:300]}")

    def _be_a_plain_program(self, database: str) -> None:
        """Write, and see that no session is other than it should be."""
        while not self._stop.is_set():
            with self.pooler.plain(database) as plain:
                plain.execute("INSERT INTO plain DEFAULT VALUES")
                found = plain.execute(SESSION_SETTINGS).fetchall()
                if found:
                    self.seen.wrong.append(f"a plain program's session has {found}")
            self.seen.done["plain program"] += 1

    def _recover(self, app: Application) -> None:
        while not self._stop.is_set():
            settled = app.container.recovery().settle()
            if settled.unreachable:
                self.seen.wrong.append(f"recovery did not reach {settled.unreachable}")
            self.seen.done["recovery"] += 1
            self._stop.wait(0.05)

    def _asked(self, who: str) -> Iterator[Asked]:
        """Return what a thread or task is to do, one after the other, until the time is over."""
        for step in count(1):
            if time.monotonic() >= self._ended:
                return
            (what,) = [next(self._first)] if step == 1 else random.choices(list(USES), weights=list(USES.values()))
            yield Asked(what, f"{who} step {step}")

    def _acknowledge(self, asked: Asked) -> None:
        if asked.what in ("write", "limited", "both"):
            self._acknowledged["both" if asked.what == "both" else "one"].append(asked.name)
        if asked.what in ("denied", "too long"):
            self.seen.wrong.append(f"{asked.name}: {asked.what}, and it returned")
        self.seen.done[asked.what] += 1

    def _refuse(self, asked: Asked, error: BaseException) -> None:
        expected = {"denied": ReadOnlyViolation, "too long": UnitOfWorkTimeout}.get(asked.what)
        if expected is None or not isinstance(error, expected):
            self._note_wrong(f"{asked.name}, {asked.what}", error)
        self.seen.done[asked.what] += 1

    def _work(self, app: Application, who: str) -> None:
        for asked in self._asked(who):
            try:
                self._do(app, asked)
            except Exception as error:
                self._refuse(asked, error)
            else:
                self._acknowledge(asked)

    def _do(self, app: Application, asked: Asked) -> None:
        with app.unit(**_options(asked)):
            match asked.what:
                case "read":
                    app.session("reader").scalars(select(Item).limit(1)).all()
                case "denied":
                    app.session("reader").execute(text(HIDDEN_WRITE))
                case "too long":
                    app.add(asked.name, "writer")
                    app.session("writer").execute(text("SELECT pg_sleep(60)"))
                case what:
                    app.add(asked.name, "writer")
                    if what == "both":
                        app.add(asked.name, "warehouse")

    async def _tasks(self, app: Application) -> None:
        await asyncio.gather(*(self._work_awaited(app, f"task {number}") for number in range(TASKS)))
        await app.container.shutdown_resources()

    async def _work_awaited(self, app: Application, who: str) -> None:
        for asked in self._asked(who):
            try:
                await self._do_awaited(app, asked)
            except Exception as error:
                self._refuse(asked, error)
            else:
                self._acknowledge(asked)

    async def _do_awaited(self, app: Application, asked: Asked) -> None:
        container: Any = app.container
        async with app.unit(**_options(asked)):
            match asked.what:
                case "read":
                    (await container.reader_async_session().scalars(select(Item).limit(1))).all()
                case "denied":
                    await container.reader_async_session().execute(text(HIDDEN_WRITE))
                case "too long":
                    await self._add_awaited(container.writer_async_session(), asked.name)
                    await container.writer_async_session().execute(text("SELECT pg_sleep(60)"))
                case what:
                    await self._add_awaited(container.writer_async_session(), asked.name)
                    if what == "both":
                        await self._add_awaited(container.warehouse_async_session(), asked.name)

    async def _add_awaited(self, session: Any, name: str) -> None:
        session.add(Item(name=name))
        await session.flush()

    # ---- what is left

    def _compare(self, app: Application) -> None:
        app.container.recovery().settle(grace=0)
        one, both = self._acknowledged["one"], self._acknowledged["both"]
        for name, acknowledged in (("writer", one + both), ("warehouse", both)):
            if apart := set(app.names(name)) ^ set(acknowledged):
                self.seen.wrong.append(f"acknowledged or in the {name}, and not both: {sorted(apart)[:5]}")

    def _look_at_server_connections(self, database: str) -> None:
        """See that each connection which the pooler has to a database is as it was when it was made."""
        with self.pooler.plain(database) as one, self.pooler.plain(database) as other:
            asked = {}
            for connection in (one, other):  # each keeps its own until the end of its transaction
                (pid,) = connection.execute("SELECT pg_backend_pid()").fetchone() or (0,)
                asked[pid] = connection.execute(SESSION_SETTINGS).fetchall()
            there = {pid for (pid,) in self.server.execute(BACKENDS, database=database)}
        prepared = self.server.prepared_transactions(database)
        if there != set(asked):
            self.seen.wrong.append(f"{database}: the server has connections {there}, and {set(asked)} were looked at")
        if any(asked.values()):
            self.seen.wrong.append(f"{database}: a server connection keeps {asked}")
        if prepared:
            self.seen.wrong.append(f"{database}: prepared and left: {prepared}")


def _options(asked: Asked) -> dict[str, Any]:
    return {"timeout": {"limited": 60, "too long": 0.5}[asked.what]} if asked.what in ("limited", "too long") else {}
