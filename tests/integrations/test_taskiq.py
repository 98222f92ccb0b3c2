"""A taskiq task is a unit of work: what its result says and what the database holds agree."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import providers
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from taskiq import InMemoryBroker, SimpleRetryMiddleware, TaskiqDepends, TaskiqMiddleware
from taskiq.kicker import AsyncKicker

from app_db import Container
from app_db.errors import HookFailed, InvalidUse, NoUnitOfWork, ReadOnlyViolation
from app_db.integrations.taskiq import UnitOfWorkMiddleware, provided
from harness.applications import DEFER_UNIQUENESS, Application, Boom, Item, running
from harness.brokers import RedisServer
from harness.requiring import need_working
from harness.workers import SLOW_COMMIT, commits_that_wait, working


@pytest.fixture
def app(new_postgres_url: Callable[[], str]) -> Iterator[Application]:
    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)
        yield app


def broker_of(app: Application, *others: TaskiqMiddleware, inplace: bool = True, **options: Any) -> InMemoryBroker:
    """A broker that runs tasks at once, with the middleware before the other ones."""
    return InMemoryBroker(await_inplace=inplace).with_middlewares(UnitOfWorkMiddleware(app.container, **options), *others)


async def outcome(sent: Any) -> Any:
    return await sent.wait_result(timeout=20)


async def close(app: Application) -> None:
    """Leave the event loop as a worker does."""
    await app.container.shutdown_resources()


async def until(found: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(30):
        while not found():  # noqa: ASYNC110  # a database or another process works
            await asyncio.sleep(0.02)


def waits(app: Application) -> bool:
    """Whether a COMMIT waits."""
    with app.plain_engine().connect() as connection:
        found = "datname = current_database() AND wait_event = 'advisory'"
        return bool(connection.scalar(text(f"SELECT count(*) FROM pg_stat_activity WHERE {found}")))


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_task_that_returns_commits_and_one_that_raises_aborts(kind: str, app: Application) -> None:
    broker = broker_of(app)

    async def add_async(name: str, fails: bool = False) -> str:
        app.container.writer_async_session().add(Item(name=name))
        if fails:
            raise Boom(name)
        return name

    def add_sync(name: str, fails: bool = False) -> str:
        app.add(name)
        if fails:
            raise Boom(name)
        return name

    add: Any = broker.task(add_async if kind == "async" else add_sync)
    assert (await outcome(await add.kiq("kept"))).return_value == "kept"
    assert type((await outcome(await add.kiq("lost", fails=True))).error) is Boom
    refused = await outcome(await add.kiq("taken"))
    assert (refused.is_err, type(refused.error), refused.return_value) == (True, IntegrityError, None)
    assert app.names() == ["kept", "taken"]
    await close(app)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_task_is_given_the_session_of_its_unit(kind: str, app: Application) -> None:
    broker = broker_of(app)
    writer: Any = app.container.connection("writer")

    @broker.task
    async def add_async(name: str, session: Any = provided(writer.async_session)) -> bool:
        session.add(Item(name=name))
        return session is app.container.writer_async_session()

    @broker.task
    def add_sync(name: str, session: Any = provided(writer.session)) -> bool:
        session.add(Item(name=name))
        return session is app.container.writer_session()

    add: Any = add_async if kind == "async" else add_sync
    sent = await add.kiq("kept")
    assert (await outcome(sent)).return_value is True
    assert app.names() == ["kept", "taken"]
    await close(app)


async def test_a_dependency_that_fails_aborts_and_the_function_is_not_called(
    app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    broker = broker_of(app)

    async def fail(session: Any = provided(app.container.connection("writer").async_session)) -> None:
        session.add(Item(name="lost"))
        await session.flush()
        raise Boom

    @broker.task
    async def never(failed: Any = TaskiqDepends(fail)) -> None:
        raise KeyError

    assert type((await outcome(await never.kiq())).error) is Boom
    assert app.names() == ["taken"]
    assert app.checked_out() == 0
    assert "never left" not in caplog.text
    await close(app)


@pytest.mark.parametrize("order", ["first", "last"])
async def test_a_retry_repeats_a_unit_that_could_not_commit_in_any_order_of_middlewares(order: str, app: Application) -> None:
    ours, retrying = UnitOfWorkMiddleware(app.container), SimpleRetryMiddleware(default_retry_label=True)
    broker = InMemoryBroker(await_inplace=True).with_middlewares(*((ours, retrying) if order == "first" else (retrying, ours)))
    tried: list[int] = []

    @broker.task
    async def add() -> str:
        tried.append(1)
        app.container.writer_async_session().add(Item(name="kept" if len(tried) == 2 else "taken"))
        return "done"

    assert (await outcome(await add.kiq())).return_value == "done"
    assert (app.names(), len(tried)) == (["kept", "taken"], 2)
    await close(app)


async def test_a_unit_that_has_committed_is_not_retried(app: Application) -> None:
    broker = broker_of(app, SimpleRetryMiddleware(default_retry_label=True))

    async def fail() -> None:
        raise Boom

    @broker.task
    async def add() -> None:
        app.container.writer_async_session().add(Item(name="kept"))
        app.container.unit().on_commit(fail)

    assert type((await outcome(await add.kiq())).error) is HookFailed
    assert app.names() == ["kept", "taken"]
    await close(app)


@pytest.mark.parametrize("inplace", [True, False])
async def test_a_task_has_a_unit_of_its_own_whatever_its_sender_has(inplace: bool, app: Application) -> None:
    broker = broker_of(app, inplace=inplace)

    @broker.task
    async def add(name: str) -> None:
        app.container.writer_async_session().add(Item(name=name))

    @broker.task
    async def send(name: str) -> None:
        await outcome(await add.kiq(f"{name}, sent"))
        await add(f"{name}, called")
        app.container.unit().on_commit(add.kiq, f"{name}, then")

    with pytest.raises(Boom):
        async with app.unit():
            app.container.writer_async_session().add(Item(name="lost"))
            await outcome(await add.kiq("kept"))
            await add("lost, too")
            raise Boom
    with pytest.raises(Boom), app.container.deferred_unit(awaited=True) as unit:
        await outcome(await add.kiq("kept, too"))
        assert not unit.has_begun
        raise Boom
    async with app.unit():
        await outcome(await send.kiq("x"))
        app.container.writer_async_session().add(Item(name="y"))
    await broker.wait_all()
    assert app.names() == ["kept", "kept, too", "taken", "x, called", "x, sent", "x, then", "y"]
    await close(app)


async def test_a_time_limit_aborts_a_task_but_not_a_commit(app: Application) -> None:
    app.run(*SLOW_COMMIT)
    broker = broker_of(app)

    @broker.task(timeout=0.2)
    async def add(name: str, waits: bool) -> str:
        session = app.container.writer_async_session()
        session.add(Item(name=name))
        await session.flush()
        if waits:
            await asyncio.Event().wait()
        return name

    assert type((await outcome(await add.kiq("lost", True))).error) is TimeoutError
    with commits_that_wait(app):
        sending = asyncio.create_task(add.kiq("slow", False))
        await asyncio.sleep(0.5)  # the limit, and more
        assert app.names() == ["taken"]
    assert (await outcome(await sending)).return_value == "slow"
    assert app.names() == ["slow", "taken"]
    await close(app)


async def test_a_task_that_is_cancelled_during_commit_has_succeeded(app: Application) -> None:
    app.run(*SLOW_COMMIT)
    broker = broker_of(app, inplace=False)
    began: list[asyncio.Task[Any]] = []

    @broker.task
    async def add(name: str) -> str:
        app.container.writer_async_session().add(Item(name=name))
        task = asyncio.current_task()
        assert task is not None
        began.append(task)
        return name

    with commits_that_wait(app):
        sent = await add.kiq("slow")
        await until(lambda: waits(app))
        began[0].cancel()
        await asyncio.sleep(0)
    assert (await outcome(sent)).return_value == "slow"
    assert app.names() == ["slow", "taken"]
    await close(app)


async def test_after_a_task_there_is_no_unit(app: Application) -> None:
    seen: list[object] = []

    class Look(TaskiqMiddleware):
        def post_execute(self, message: Any, result: Any) -> None:
            try:
                app.container.writer_session()
            except NoUnitOfWork as error:
                seen.append(error)

    broker = broker_of(app, Look(), read_only=True)

    @broker.task
    def write() -> None:
        app.add("lost")

    assert type((await outcome(await write.kiq())).error) is ReadOnlyViolation
    assert len(seen) == 1
    with pytest.raises(NoUnitOfWork):
        app.container.writer_session()
    await close(app)


@pytest.mark.parametrize("works", [True, False])
async def test_a_worker_has_the_containers_resources(works: bool, app: Application) -> None:
    seen: list[str] = []

    def resource() -> Iterator[None]:
        seen.append("begun")
        yield
        seen.append("ended")

    app.container.set_provider("resource", providers.Resource(resource))
    broker = broker_of(app)
    broker.is_worker_process = works
    await broker.startup()
    await broker.shutdown()
    assert seen == (["begun", "ended"] if works else [])


def test_what_is_wrong_is_told_when_it_is_added(new_sqlite_url: Callable[[], str]) -> None:
    with running(writer=new_sqlite_url()) as app:
        for wrong in (Container, None):
            with pytest.raises(InvalidUse, match="no database container"):
                UnitOfWorkMiddleware(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidUse, match="no isolation level"):
            UnitOfWorkMiddleware(app.container, isolation="none")
        with pytest.raises(InvalidUse, match="already"):
            broker_of(app, UnitOfWorkMiddleware(app.container))


@pytest.fixture
def broker(broker: str) -> str:
    need_working("taskiq_redis")
    return broker


# ---- in real workers ---------------------------------------------------------------------------------------------------


def command(*others: str) -> list[str]:
    return ["-m", "taskiq", "worker", "harness.taskiq_tasks:broker", "--workers=1", *others]


class Site:
    """A client of the worker."""

    def __init__(self, app: Application, url: str) -> None:
        from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

        self.client = RedisStreamBroker(url).with_result_backend(RedisAsyncResultBackend(url))
        writer = app.plain_engine().url.render_as_string(hide_password=False)
        self.environment = {"SHOP_BROKER": url, "APP_DB_CONNECTIONS__WRITER__URL": writer}

    async def send(self, task: str, *args: object) -> Any:
        kicker: AsyncKicker[Any, Any] = AsyncKicker(f"harness.taskiq_tasks:{task}", self.client, {})
        return await kicker.kiq(*args)


@pytest.mark.exhaustive
@pytest.mark.parametrize("ack_type", ["when_executed", "when_saved"])
async def test_a_task_commits_before_its_message_is_acknowledged(
    ack_type: str, app: Application, broker: str, redis: RedisServer, tmp_path: Path
) -> None:
    app.run(*SLOW_COMMIT)
    site = Site(app, broker)
    await site.client.startup()

    def unacknowledged() -> bytes:
        return redis.ask("XPENDING", "taskiq", "taskiq").split()[1]

    with working(command(f"--ack-type={ack_type}"), site.environment, tmp_path / "log"):
        with commits_that_wait(app):
            sent = await site.send("add", "slow")
            await until(lambda: waits(app))
            assert (unacknowledged(), await sent.is_ready(), app.names()) == (b":1", False, ["taken"])
        assert (await sent.wait_result(timeout=30)).return_value == "slow"
        await until(lambda: unacknowledged() == b":0")
    assert app.names() == ["slow", "taken"]
    await site.client.shutdown()
    await close(app)


@pytest.mark.exhaustive
@pytest.mark.parametrize("others", [(), ("--ack-type=when_executed",), ("--use-process-pool", "--max-process-pool-processes=2")])
async def test_a_real_worker_commits_what_succeeds(
    others: tuple[str, ...], app: Application, broker: str, tmp_path: Path
) -> None:
    site = Site(app, broker)
    send = site.send
    await site.client.startup()
    with working(command(*others), site.environment, tmp_path / "log"):
        kinds = ["add", "add_given", "fail", "then"]
        if "--use-process-pool" not in others:
            kinds += ["add_sync", "fail_sync"]
        sent = [(kind, number, await send(kind, f"{kind} {number}")) for number in range(20) for kind in kinds]
        sent.append(("taken", 0, await send("add", "taken")))
        expected = ["taken"]
        for kind, number, task in sent:
            result = await task.wait_result(timeout=60)
            assert result.is_err == (kind.startswith("fail") or kind == "taken"), (kind, result)
            if not result.is_err:
                expected += [f"{kind} {number}", *([f"{kind} {number}, then"] if kind == "then" else [])]
        await until(lambda: len(app.names()) >= len(expected))
        if "--use-process-pool" in others:
            assert (await (await send("without", "in a process")).wait_result(timeout=60)).return_value == "NoUnitOfWork"
            expected.append("in a process")
        assert app.names() == sorted(expected)
        with app.plain_engine().connect() as connection:
            in_transactions = "datname = current_database() AND state LIKE 'idle in transaction%'"
            assert connection.scalar(text(f"SELECT count(*) FROM pg_stat_activity WHERE {in_transactions}")) == 0
    await site.client.shutdown()
    await close(app)
