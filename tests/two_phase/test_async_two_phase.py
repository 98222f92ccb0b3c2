"""Coroutines commit over several databases as threads do: all or nothing, prepared and told at once, and the loop goes on."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from app_db._databases.concurrent_statements import execute_together_async
from app_db._units.manager import retryable
from app_db.errors import AbortedByRecovery, CommitUnconfirmed, OutcomeUnknown
from harness.applications import DEFER_UNIQUENESS, Boom, Item, Settings
from harness.choosing import mostly
from harness.coroutines import PATIENCE, Awaited, Lag, with_driver
from harness.proxies import Loss, Proxy
from harness.servers import PostgresServer
from harness.two_phasing import TwoPhaseApplication, kill_backend, listening_to_postgres, without
from harness.versions import waits_in_tasks

T = TypeVar("T")

NewUrl = Callable[[], str]

NAMES = ("writer", "warehouse", "archive")

SLOW = (
    "CREATE FUNCTION doze() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep({}); RETURN NULL; END $$",
    "CREATE CONSTRAINT TRIGGER dozing AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION doze()",
)
"""On PostgreSQL: makes PREPARE, or COMMIT, take so many seconds for each item."""


class AwaitedApplication(Awaited, TwoPhaseApplication):
    """An application whose coroutines write to databases that can prepare."""

    async def write(self, item: str, *names: str) -> None:
        """Add an item on each of these connections, or on all, and send it."""
        for name in names or self.connections:
            session = self.awaited_session(name)
            session.add(Item(name=item))
            await session.flush()

    async def unit_of(self, item: str, *names: str) -> None:
        async with self.container.transaction():
            await self.write(item, *names)

    async def backend(self, name: str) -> int:
        return int(await self.awaited_session(name).scalar(text("SELECT pg_backend_pid()")) or 0)

    def slow_down(self, seconds: float, *names: str) -> None:
        """Make PREPARE and COMMIT take so many seconds, for each item."""
        for name in names:
            self.run(*(statement.format(seconds) for statement in SLOW), on=name)


def awaiting(driver: str, decision_log: str | None = None, **connections: Settings) -> AwaitedApplication:
    """An application whose PostgreSQL is reached by way of a driver."""
    given: dict[str, Any] = {}
    for name, what in connections.items():
        own = {"url": what} if isinstance(what, str) else dict(what)
        own["url"] = with_driver(own["url"], "aiosqlite" if own["url"].startswith("sqlite") else driver)
        given[name] = own
    return AwaitedApplication(given, decision_log, "strict")


@pytest.fixture(params=mostly(["psycopg", "asyncpg"], exhaustive="psycopg"))
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["file"])
def app(request: pytest.FixtureRequest, driver: str, new_postgres_url: NewUrl, tmp_path: Path) -> Iterator[AwaitedApplication]:
    """Three databases, and decisions in a file, or in one of them."""
    log = f"file:{tmp_path}/decisions" if request.param == "file" else str(request.param)
    with awaiting(driver, log, **{name: new_postgres_url() for name in NAMES}) as app:
        assert app.container.core.decision_logs().configured.id
        yield app


both_logs = pytest.mark.parametrize("app", ["file", "writer"], indirect=True)


def each(*items: str) -> dict[str, list[str]]:
    return {name: sorted(items) for name in NAMES}


def between(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object], *, after: bool = False) -> None:
    """Run `act` in a thread, before (or after) the commit's exchange of that number: 1 prepares, 2 tells how it ends."""
    seen: list[int] = []

    async def interrupted(*args: Any, **options: Any) -> Any:
        seen.append(len(seen) + 1)
        if seen[-1] == number and not after:
            await asyncio.to_thread(act)
        answers = await execute_together_async(*args, **options)
        if seen[-1] == number and after:
            await asyncio.to_thread(act)
        return answers

    monkeypatch.setattr("app_db._units.commit.execute_together_async", interrupted)


# ---- all at once, beside a loop that goes on ---------------------------------------------------------------------------


@pytest.mark.representative("asyncpg")
async def test_branches_are_prepared_at_once_and_the_loop_goes_on(driver: str, new_postgres_url: NewUrl, tmp_path: Path) -> None:
    names = ("alpha", "beta", "gamma", "delta")
    async with awaiting(driver, f"file:{tmp_path}/decisions", **{name: new_postgres_url() for name in names}) as app:
        app.slow_down(0.5, *names)
        await app.unit_of("before")
        async with Lag() as lag:
            async with app.container.transaction():
                await app.write("a")
                began = time.monotonic()
            took = time.monotonic() - began
        assert 0.5 <= took < 1.5, "and not 2 s"
        assert lag.worst < PATIENCE
        assert app.everywhere() == {name: ["a", "before"] for name in names}


@pytest.mark.representative("asyncpg")
async def test_sessions_of_both_kinds_are_prepared_at_once(driver: str, new_postgres_url: NewUrl, tmp_path: Path) -> None:
    names = ("alpha", "beta", "gamma", "delta")
    async with awaiting(driver, f"file:{tmp_path}/decisions", **{name: new_postgres_url() for name in names}) as app:
        app.slow_down(0.5, *names)

        async def unit(item: str) -> tuple[float, float]:
            async with Lag() as lag:
                async with app.container.transaction():
                    await app.write(item, "alpha", "beta")
                    await asyncio.to_thread(app.add_to_each, item, "gamma", "delta")
                    began = time.monotonic()
                return time.monotonic() - began, lag.worst

        await unit("before")
        took, lag = await unit("a")
        assert 0.5 <= took < 1.5, "and not 2 s"
        assert lag < PATIENCE
        assert app.everywhere() == {name: ["a", "before"] for name in names}


@pytest.mark.representative("asyncpg")
async def test_a_slow_decision_log_does_not_hold_the_loop_up(driver: str, new_postgres_url: NewUrl) -> None:
    urls: dict[str, Any] = {"writer": new_postgres_url(), "warehouse": new_postgres_url(), "journal": without(new_postgres_url())}
    async with awaiting(driver, "journal", **urls) as app:
        app.container.core.decision_logs().of("journal").ensure()
        await app.unit_of("before", "writer", "warehouse")
        with app.plain_engine("journal").connect() as rival:
            rival.execute(text("LOCK TABLE app_db_decisions IN EXCLUSIVE MODE"))
            asyncio.get_running_loop().call_later(0.5, rival.rollback)
            began = time.monotonic()
            async with Lag() as lag:
                await app.unit_of("a", "writer", "warehouse")
            took = time.monotonic() - began
        assert took > 0.4, "the log was not locked"
        assert lag.worst < PATIENCE
        assert app.names("warehouse") == ["a", "before"]


def test_blocking_branches_do_not_wait_for_threads_that_wait_for_them(
    driver: str, new_postgres_url: NewUrl, tmp_path: Path
) -> None:
    """All threads of the loop may be waiting for a lock that the unit holds which is about to end."""
    with awaiting(driver, f"file:{tmp_path}/decisions", writer=new_postgres_url(), warehouse=new_postgres_url()) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')")

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1))
            await asyncio.to_thread(time.sleep, 0)
            async with app.container.transaction():
                await app.write("a", "warehouse")
                await asyncio.to_thread(app.add, "a", "writer")
                rival = "SET LOCAL lock_timeout = '5s'; INSERT INTO items (name) VALUES ('a') ON CONFLICT DO NOTHING"
                waiting = loop.run_in_executor(None, app.run, rival)
                await asyncio.sleep(0.2)  # until it does
                assert not waiting.done()
            await waiting

        app.in_a_loop(lambda: asyncio.wait_for(main(), 10))
        assert app.names() == ["a", "seed"]
        assert app.names("warehouse") == ["a"]


# ---- what the servers hear ---------------------------------------------------------------------------------------------


async def test_one_written_database_commits_plainly(postgres: PostgresServer, app: AwaitedApplication) -> None:
    with listening_to_postgres(postgres, app) as heard:
        async with app.container.transaction():
            await app.write("a", "warehouse")
            await app.awaited_session("writer").scalar(select(Item.name))
        words = [pair for pair in heard() if pair[1].startswith(("COMMIT", "PREPARE"))]
        assert words == [("writer", "COMMIT"), ("warehouse", "COMMIT")]


def test_the_next_unit_on_a_connection_begins_a_transaction_after_a_two_phase_commit(
    postgres: PostgresServer, app: AwaitedApplication
) -> None:
    """Guards why the adapter of asyncpg is told: to it the transaction goes on, and the next unit would commit at once."""

    async def unit_that_fails() -> None:
        async with app.container.transaction():
            await app.write("b")
            raise Boom

    async def main() -> None:
        backends: list[int] = []
        for ends_well in (True, False, True):
            if ends_well:
                async with app.container.transaction():
                    await app.write(f"a {len(backends)}")
                    backends.append(await app.backend("writer"))
            else:
                with pytest.raises(Boom):
                    await unit_that_fails()
        assert len(set(backends)) == 1

    with listening_to_postgres(postgres, app) as heard:
        before = len(postgres.log_lines())
        app.in_a_loop(main)
        assert not [line for line in postgres.log_lines()[before:] if "no transaction in progress" in line]
        said = [word for name, word in heard() if name == "archive" and word.startswith(("BEGIN", "PREPARE", "COMMIT", "ROLL"))]
        assert [word.strip(";") for word in said][-7:] == [
            *("BEGIN", "PREPARE TRANSACTION", "COMMIT PREPARED"),
            *("BEGIN", "ROLLBACK"),
            *("BEGIN", "PREPARE TRANSACTION", "COMMIT PREPARED"),
        ][-7:]
    assert app.everywhere() == each("a 0", "a 1")


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.representative("asyncpg-file-archive")
@pytest.mark.parametrize(("app", "failing"), [("file", "archive"), ("writer", "archive"), ("writer", "writer")], indirect=["app"])
async def test_a_deferred_constraint_leaves_nothing_anywhere(failing: str, app: AwaitedApplication) -> None:
    app.run(*DEFER_UNIQUENESS, on=failing)
    calls: list[int] = []

    async def work() -> None:
        calls.append(1)
        await app.write("a")
        await app.write("taken", failing)

    with pytest.raises(IntegrityError, match="one_of_each") as caught:
        await app.unit(attempts=3, backoff=0).run(work)
    assert len(calls) == 1
    assert getattr(caught.value.orig, "sqlstate", None) == "23505"
    assert app.in_use() == 0
    await app.unit_of("b")  # the connections are in order
    assert app.everywhere() == {**each("b"), failing: ["b", "taken"]}


async def test_a_serialization_failure_at_prepare_is_tried_again(app: AwaitedApplication) -> None:
    for name in NAMES:
        app.run("INSERT INTO items (name) VALUES ('seed')", on=name)
    calls: list[int] = []

    async def work() -> None:
        calls.append(1)
        count = len((await app.awaited_session("warehouse").scalars(select(Item))).all())
        if len(calls) == 1:
            async with app.unit("requires_new", isolation="SERIALIZABLE"):
                other = app.awaited_session("warehouse")
                assert len((await other.scalars(select(Item))).all()) == 1
                other.add(Item(name="beside"))
        await app.write(f"after {count}")

    await cast("Awaitable[None]", app.unit(isolation="SERIALIZABLE", attempts=3, backoff=0).run(work))
    assert len(calls) == 2
    assert app.names("warehouse") == ["after 2", "beside", "seed"]
    assert app.names("archive") == ["after 2", "seed"]


async def test_a_branch_whose_transaction_had_failed_unseen_is_not_taken_for_prepared(app: AwaitedApplication) -> None:
    """PREPARE TRANSACTION is answered with ROLLBACK then, and with no error."""
    with pytest.raises(Exception, match=r"ROLLBACK|lost"):
        async with app.container.transaction():
            await app.write("a")
            driver_connection: Any = await (await app.awaited_session("archive").connection()).get_raw_connection()
            with pytest.raises(Exception, match="zero"):
                await driver_connection.driver_connection.execute("SELECT 1/0")
    assert app.everywhere() == each()


async def test_a_unit_that_recovery_has_aborted_says_so_and_can_be_repeated(
    app: AwaitedApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    between(monkeypatch, 1, app.recover, after=True)
    calls: list[int] = []

    async def work() -> None:
        calls.append(1)
        await app.write("a")

    with pytest.raises(AbortedByRecovery) as caught:
        await app.unit_of("a")
    assert retryable(caught.value)
    assert app.everywhere() == each()
    await cast("Awaitable[None]", app.unit(attempts=2, backoff=0).run(work))
    assert app.everywhere() == each("a")


async def test_a_last_resource_that_refuses_leaves_nothing(driver: str, new_postgres_url: NewUrl) -> None:
    async with awaiting(driver, writer=new_postgres_url(), warehouse=new_postgres_url(), old=without(new_postgres_url())) as app:
        app.run(*DEFER_UNIQUENESS, on="old")
        with pytest.raises(IntegrityError, match="one_of_each"):
            async with app.container.transaction():
                await app.write("a")
                await app.write("taken", "old")
        await app.unit_of("b")
        assert app.everywhere() == {"writer": ["b"], "warehouse": ["b"], "old": ["b", "taken"]}


async def test_a_sqlite_file_that_is_busy_leaves_nothing(driver: str, new_postgres_url: NewUrl, sqlite_url: str) -> None:
    lite = {"url": sqlite_url, "connect_args": {"timeout": 0.1}}
    async with awaiting(driver, writer=new_postgres_url(), warehouse=new_postgres_url(), lite=lite) as app:
        await app.unit_of("before")
        with app.plain_engine("lite").connect() as rival:
            rival.exec_driver_sql("BEGIN IMMEDIATE")
            with pytest.raises(OperationalError, match="locked"):
                await app.unit_of("a", "writer", "warehouse", "lite")
        await app.unit_of("b")
        assert app.everywhere() == {name: ["b", "before"] for name in ("writer", "warehouse", "lite")}


async def test_a_decision_log_that_is_away_leaves_the_outcome_to_recovery(driver: str, new_postgres_url: NewUrl) -> None:
    urls: dict[str, Any] = {"writer": new_postgres_url(), "warehouse": new_postgres_url(), "journal": without(new_postgres_url())}
    async with awaiting(driver, "journal", **urls) as app:
        app.container.core.decision_logs().of("journal").ensure()
        await app.unit_of("before", "writer", "warehouse")
        app.run("ALTER TABLE app_db_decisions RENAME TO elsewhere", on="journal")
        with pytest.raises(OutcomeUnknown):
            await app.unit_of("a", "writer", "warehouse")
        app.run("ALTER TABLE elsewhere RENAME TO app_db_decisions", on="journal")
        assert len(app.prepared()) == 2
        assert not (await asyncio.to_thread(app.recover)).left
        await app.unit_of("b", "writer", "warehouse")
        assert app.names() == app.names("warehouse") == ["b", "before"]


# ---- whoever is cancelled ------------------------------------------------------------------------------------------------


@pytest.mark.representative("asyncpg-file-timeout")
@pytest.mark.parametrize("by", ["cancel", "timeout"])
@both_logs
async def test_a_unit_that_is_cancelled_at_any_moment_is_in_all_databases_or_in_none(
    by: str, driver: str, app: AwaitedApplication
) -> None:
    committed: set[str] = set()

    async def unit(item: str) -> None:
        async with app.container.transaction() as unit:
            unit.on_commit(committed.add, item)
            await app.write(item)

    async def cancelled(item: str, after: float) -> bool:
        if by == "timeout":
            try:
                async with asyncio.timeout(after):
                    await unit(item)
            except TimeoutError:
                return True
            return False
        task = asyncio.create_task(unit(item))
        await asyncio.sleep(after)
        was_under_way = task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled() == was_under_way or waits_in_tasks(driver)  # which may lose the cancellation, and commits
        return task.cancelled()

    found = 0
    for number in range(25):
        await unit(f"0 {number}")  # connects again, where that is needed
        began = time.monotonic()
        await unit(f"1 {number}")
        usual = time.monotonic() - began
        if await cancelled(f"2 {number}", random.uniform(0, 1.1 * usual)):
            found += f"2 {number}" in committed
        assert app.in_use() == 0
        assert app.prepared() == []
    both = found
    assert both > 0, "nobody was cancelled in the middle of a commit that went on"
    assert app.everywhere() == each(*committed)


async def test_a_commit_that_is_cancelled_while_it_prepares_is_finished_first(app: AwaitedApplication) -> None:
    app.slow_down(0.4, *NAMES)
    at_its_end = asyncio.Event()

    async def unit() -> None:
        async with app.container.transaction():
            await app.write("a")
            at_its_end.set()

    task = asyncio.create_task(unit())
    await at_its_end.wait()
    await asyncio.sleep(0.1)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert app.everywhere() == each("a")


# ---- connections that are lost -----------------------------------------------------------------------------------------


@pytest.mark.representative(
    "asyncpg-writer-writer-in PREPARE", "asyncpg-writer-archive-before PREPARE", "asyncpg-file-archive-after COMMIT PREPARED"
)
@pytest.mark.parametrize("moment", ["before PREPARE", "in PREPARE", "after PREPARE", "after COMMIT PREPARED"])
@pytest.mark.parametrize(("app", "victim"), [("file", "archive"), ("writer", "archive"), ("writer", "writer")], indirect=["app"])
async def test_a_connection_that_is_lost_leaves_all_or_nothing(
    victim: str, moment: str, app: AwaitedApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends: list[int] = []

    def kill() -> None:
        kill_backend(app, victim, backends[0])

    if moment == "in PREPARE":
        app.slow_down(0.3, *NAMES)
    else:
        number = 2 if moment == "after COMMIT PREPARED" else 1
        between(monkeypatch, number, kill, after=moment.startswith("after"))

    caught: BaseException | None = None
    try:
        async with app.container.transaction():
            await app.write("a")
            backends.append(await app.backend(victim))
            if moment == "in PREPARE":
                asyncio.get_running_loop().call_later(0.15, threading.Thread(target=kill).start)
    except DBAPIError as error:
        caught = error
    assert app.in_use() == 0
    assert caught is None or retryable(caught)
    assert await asyncio.to_thread(app.leftovers) == [], "without recovery"
    await cast("Awaitable[None]", app.unit(attempts=3, backoff=0).run(app.write, "b"))
    if moment.endswith("COMMIT PREPARED"):
        assert caught is None
    if moment in ("before PREPARE", "in PREPARE"):
        assert caught is not None
    assert app.everywhere() == each("b", *([] if caught else ["a"]))


async def test_a_database_that_does_not_confirm_is_told_once(app: AwaitedApplication, monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[int] = []
    between(monkeypatch, 2, lambda: kill_backend(app, "archive", backends[0]))

    def in_vain(branch: object, *, commit: bool) -> bool:
        return False

    monkeypatch.setattr("app_db._units.branches.Branch.settle_elsewhere", in_vain)
    with pytest.raises(CommitUnconfirmed) as caught:
        async with app.container.transaction():
            await app.write("a")
            backends.append(await app.backend("archive"))
    assert caught.value.connections == ("archive",)
    assert app.everywhere() == {**each("a"), "archive": []}
    assert not app.recover().left
    assert app.everywhere() == each("a")


@pytest.mark.representative("asyncpg-PREPARE TRANSACTION-answer-stall", "asyncpg-COMMIT PREPARED-answer-close")
@pytest.mark.parametrize(("lost", "then"), [("answer", "close"), ("answer", "stall"), ("request", "close")])
@pytest.mark.parametrize("word", ["PREPARE TRANSACTION", "COMMIT PREPARED"])
def test_a_word_or_an_answer_that_is_lost_leaves_all_or_nothing_and_a_true_error(  # noqa: PLR0917
    word: str, lost: Loss, then: Any, driver: str, postgres: PostgresServer, new_postgres_url: NewUrl, tmp_path: Path
) -> None:
    with Proxy(postgres) as network:
        urls = {"hit": network.url(new_postgres_url()), "other": new_postgres_url()}
        with awaiting(driver, f"file:{tmp_path}/decisions", **urls) as app:

            async def main() -> float:
                await app.unit_of("before")
                fault = network.lose(lost, to=word.encode(), then=then)
                if then == "stall":
                    asyncio.get_running_loop().call_later(0.5, network.cut)
                async with Lag() as lag:
                    if word == "COMMIT PREPARED":
                        await app.unit_of("a")
                    else:
                        with pytest.raises(DBAPIError) as caught:
                            await app.unit_of("a")
                        assert retryable(caught.value)
                assert fault.happened
                await cast("Awaitable[None]", app.unit(attempts=3, backoff=0).run(app.write, "b"))
                return lag.worst

            assert app.in_a_loop(main) < PATIENCE
            network.cut()
            assert not app.recover().left
            expected = ["a", "b", "before"] if word == "COMMIT PREPARED" else ["b", "before"]
            assert app.everywhere() == {"hit": expected, "other": expected}


# ---- many at once --------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_200_units_over_two_clusters_half_of_which_raise(
    driver: str, postgres: PostgresServer, new_postgres: Callable[..., PostgresServer], tmp_path: Path
) -> None:
    other = new_postgres()
    pool = {"pool": {"size": 10, "max_overflow": 0, "timeout": 60}}
    with ExitStack() as stack:
        urls = [server.url(stack.enter_context(server.lend_database())) for server in (postgres, other)]
        app = stack.enter_context(
            awaiting(
                driver, f"file:{tmp_path}/log", **{name: {"url": url, **pool} for name, url in zip(NAMES, urls, strict=False)}
            )
        )

        async def unit(number: int) -> None:
            async with app.container.transaction():
                await app.write(f"{number:03}")
                if number % 3 == 0:  # sessions of threads take part
                    await asyncio.to_thread(app.add_to_each, f"{number:03}s")
                if number % 2:
                    raise Boom

        async def main() -> list[Any]:
            return await asyncio.gather(*map(unit, range(200)), return_exceptions=True)

        outcomes = app.in_a_loop(main)
        assert {type(outcome) for outcome in outcomes} == {type(None), Boom}
        expected = sorted(
            name for number in range(0, 200, 2) for name in (f"{number:03}", *([f"{number:03}s"] if number % 3 == 0 else []))
        )
        assert app.everywhere() == {"writer": expected, "warehouse": expected}
        assert app.leftovers() == []
