"""The recipes of docs/how-to, to be driven by tests: what the page shows is what runs.

    with executed("quart", url) as recipe:
        with serving(recipe["app"]) as address: ...
        assert recipe.skus() == ["A-1"]

A recipe has the model `Order`, whose table gets a deferred constraint: the COMMIT of a unit that adds an order "TAKEN" fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.orm import Session

from app_db import DatabaseContainer
from harness.applications import checked_out
from harness.pages import blocks_of, module_of
from harness.paths import PYTHONPATH, ROOT

PAGE_URL = "sqlite:///shop.db"
PAGE_BROKER = "redis://localhost:6379"

TABLE = (
    "CREATE TABLE orders (sku VARCHAR PRIMARY KEY)",
    "ALTER TABLE orders ADD EXCLUDE USING btree (lower(sku) WITH =) DEFERRABLE INITIALLY DEFERRED",
    "INSERT INTO orders (sku) VALUES ('taken')",
    "CREATE TABLE outbox (id SERIAL PRIMARY KEY, sku VARCHAR NOT NULL)",
)

FAILS_EVERY_OTHER_TIME = (
    "CREATE SEQUENCE commits",
    """
    CREATE FUNCTION fail_every_other_time() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF mod(nextval('commits'), 2) = 1 THEN RAISE 'again' USING ERRCODE = 'serialization_failure'; END IF; RETURN NULL;
    END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER fails AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION fail_every_other_time()
    """,
)
"""Makes the first COMMIT of a unit that adds an order fail by a serialization failure, and then every other one."""


class Recipe:
    """A page's code, on a PostgreSQL database and a Redis of the test's."""

    def __init__(self, name: str, url: str, broker: str = PAGE_BROKER) -> None:
        self.page = ROOT / "docs" / "how-to" / f"{name}.md"
        self._replaced = {PAGE_URL: url, PAGE_BROKER: broker}
        self.plain = create_engine(url, poolclass=NullPool)
        self.module = ModuleType(name)
        with self.plain.begin() as connection:
            for statement in TABLE:
                connection.exec_driver_sql(statement)

    def __getitem__(self, name: str) -> Any:
        """Return what the page calls by a name."""
        return vars(self.module)[name]

    @property
    def container(self) -> DatabaseContainer:
        """The page's container."""
        found: DatabaseContainer = self["container"]
        return found

    @property
    def cells(self) -> list[str]:
        """The page's Python blocks."""
        return [self._at_home(block.source) for block in blocks_of(self.page.read_text()) if block.language == "python"]

    def _at_home(self, source: str) -> str:
        for shown, real in self._replaced.items():
            source = source.replace(shown, real)
        return source

    def fail_commits(self) -> None:
        """Make the next COMMIT of an order fail by a serialization failure, and then every other one."""
        with self.plain.begin() as connection:
            exists = connection.exec_driver_sql("SELECT to_regclass('commits')").scalar()
            for statement in ["ALTER SEQUENCE commits RESTART"] if exists else FAILS_EVERY_OTHER_TIME:
                connection.exec_driver_sql(statement)

    def skus(self) -> list[str]:
        """The orders that are committed, but for "taken", sorted."""
        with self.plain.connect() as connection:
            return sorted(connection.execute(text("SELECT sku FROM orders WHERE sku <> 'taken'")).scalars())

    def wait_until_something_waits(self) -> None:
        """Wait until a statement waits for a lock."""
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        give_up = time.monotonic() + 30
        while True:
            with self.plain.connect() as connection:
                if connection.exec_driver_sql(waiting).scalar_one():
                    return
            assert time.monotonic() < give_up
            time.sleep(0.05)

    def awaited_in_use(self) -> int:
        """How many connections of the running loop's engine are in use."""
        return sum(checked_out([self.container.connection("writer").async_engine().sync_engine]))

    def in_use(self, *, in_this_process: bool = True) -> int:
        """How many connections are in use, or have a transaction open at the server."""
        here = sum(checked_out([self.container.connection("writer").engine()])) if in_this_process else 0
        with self.plain.connect() as connection:
            open_there = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
                "AND backend_type = 'client backend' AND (xact_start IS NOT NULL OR state LIKE 'idle in transaction%%')"
            )
            return here + int(open_there.scalar_one())


@contextmanager
def executed(name: str, url: str, broker: str = PAGE_BROKER, *, blocks: int | None = None) -> Iterator[Recipe]:
    """Run a page's code in a module of this process, or its first blocks. At the end no connection may be in use any more."""
    recipe = Recipe(name, url, broker)
    with module_of(recipe.page) as recipe.module:
        exec(compile("\n".join(recipe.cells[:blocks]), str(recipe.page), "exec", dont_inherit=True), vars(recipe.module))
        yield recipe
        assert recipe.in_use() == 0


class Refused:
    """How often an order was inserted."""

    tries = 0


@contextmanager
def refusing(sku: str, error: Exception) -> Iterator[Refused]:
    """Raise an error after the first INSERT of an order was sent, in this process."""
    seen = Refused()

    def after_insert(session: Session, context: object) -> None:
        if any(order.sku == sku for order in session.new):
            seen.tries += 1
            if seen.tries == 1:
                raise error

    event.listen(Session, "after_flush", after_insert)
    try:
        yield seen
    finally:
        event.remove(Session, "after_flush", after_insert)


MISCHIEF = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool
import shop
from shop import *

doomed = []

def is_first(sku):
    try:
        os.close(os.open("seen " + sku, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

@event.listens_for(Session, "after_flush")
def after_insert(session, context):
    for order in session.new:
        if order.sku == "killed before the commit" and is_first(order.sku):
            os.kill(os.getpid(), signal.SIGKILL)
        if order.sku == "killed after the commit" and is_first(order.sku):
            doomed.append(order)

@event.listens_for(Pool, "checkin")  # which is after COMMIT
def after_end(connection, record):
    if doomed:
        os.kill(os.getpid(), signal.SIGKILL)
"""
"""Beside a page's code: the first unit with an order "killed before the commit", or "killed after the commit", is killed so."""


class Worker:
    """A page's code in a process of its own. In the working directory its module `worker` has what the page has, and MISCHIEF."""

    def __init__(self, recipe: Recipe, *command: str, more: str = "") -> None:
        place = Path.cwd()
        (place / "shop.py").write_text("\n".join(recipe.cells))
        (place / "worker.py").write_text(MISCHIEF + more)
        self._log = (place / "log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{PYTHONPATH}"},
            start_new_session=True,
        )

    def wait(self) -> int:
        """Wait until it ends by itself; return the exit code."""
        return self._process.wait(20)

    def stop(self) -> int:
        """Ask it to end; return the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """What this one and those before it have said."""
        return Path("log").read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._log:
            if self.is_running:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
