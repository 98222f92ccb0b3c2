"""A Celery task is a unit of work: what its result says and what the databases hold agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, current_app, shared_task
from celery import Task as CeleryTask
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.signals import worker_init
from celery.states import READY_STATES
from kombu.exceptions import EncodeError
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from app_db import Container
from app_db.errors import HookFailed, InvalidUse, NoUnitOfWork, ReadOnlyViolation
from app_db.integrations.celery import SoftTimeLimitInCommit, Task, install
from harness.applications import DEFER_UNIQUENESS, Application, Boom, Item, running
from harness.brokers import RedisServer
from harness.requiring import need_fitting
from harness.workers import SLOW_COMMIT, Worker, commits_that_wait, working


def nothing() -> None: ...


# ---- in this process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def app(new_sqlite_url: Callable[[], str]) -> Iterator[Application]:
    with running(writer=new_sqlite_url()) as app:
        yield app


class Alone(Celery):  # type: ignore[misc]  # Celery has no type hints
    """An application whose tasks other applications of the process don't get."""

    def task(self, *args: Any, **options: Any) -> Any:
        return super().task(*args, **{"shared": False, **options})


@pytest.fixture
def celery() -> Iterator[Celery]:
    """A Celery application that runs tasks at once."""
    with eager() as celery:
        yield celery


@contextmanager
def eager(**options: Any) -> Iterator[Celery]:
    before = current_app._get_current_object()
    with Alone("eager", broker="memory://", set_as_current=False, **options) as celery:
        celery.conf.task_always_eager = True
        yield celery
    assert current_app._get_current_object() is before


def test_a_task_that_returns_commits_and_one_that_raises_aborts(app: Application, celery: Celery) -> None:
    install(celery, app.container)

    @celery.task
    def add(name: str, error: type[Exception] | None = None) -> str:
        app.add(name)
        if error is not None:
            raise error
        return name

    assert add.delay("kept").get() == "kept"
    for error, state in ((Boom, "FAILURE"), (Ignore, "IGNORED"), (Reject, "REJECTED")):
        assert add.apply(("lost", error)).state == state
    assert app.names() == ["kept"]


@pytest.mark.parametrize("bind", [False, True])
def test_a_retry_aborts_and_keeps_its_arguments(bind: bool, app: Application, celery: Celery) -> None:
    install(celery, app.container)
    seen: list[tuple[str, int]] = []

    def work(task: Any, name: str, times: int) -> str:
        app.add(name)
        seen.append((name, times))
        if times < 3:
            raise task.retry(args=(f"{name}+",), kwargs={"times": times + 1}, countdown=0)
        return name

    if bind:

        @celery.task(bind=True)
        def add(self: Any, name: str, times: int) -> str:
            return work(self, name, times)
    else:

        @celery.task
        def add(name: str, times: int) -> str:
            return work(add, name, times)

    assert add.delay("a", times=1).get() == "a++"
    assert app.names() == ["a++"]
    assert seen == [("a", 1), ("a+", 2), ("a++", 3)]


def test_autoretry_repeats_a_unit_that_could_not_commit(new_postgres_url: Callable[[], str], celery: Celery) -> None:
    with running(writer=new_postgres_url()) as app:
        app.run(*DEFER_UNIQUENESS)
        install(celery, app.container)

        @celery.task(bind=True, autoretry_for=(IntegrityError,), retry_kwargs={"countdown": 0, "max_retries": 2})
        def add(self: Any, name: str) -> int:
            app.add(name if self.request.retries == 2 else "taken")
            return int(self.request.retries)

        @celery.task
        def add_once(name: str) -> None:
            app.add(name)

        assert add.delay("kept").get() == 2
        failed = add_once.delay("taken")
        assert (failed.state, type(failed.result)) == ("FAILURE", IntegrityError)
        assert app.names() == ["kept", "taken"]


def test_attempts_repeat_a_unit_in_the_same_task(new_postgres_url: Callable[[], str], celery: Celery) -> None:
    with running(writer=new_postgres_url()) as app:
        install(celery, app.container, attempts=2)
        tried: list[int] = []

        def add(name: str) -> None:
            tried.append(1)
            app.add(name)
            if len(tried) < 3:
                app.session().execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

        by_application = celery.task(add, name="by the application's options")
        by_task = celery.task(add, name="by its own", unit={"attempts": 3})
        assert by_application.delay("lost").state == "FAILURE"
        assert len(tried) == 2
        tried.clear()
        assert by_task.delay("kept").state == "SUCCESS"
        assert (app.names(), len(tried)) == (["kept"], 3)


def test_a_task_without_a_unit_has_none(app: Application, celery: Celery) -> None:
    install(celery, app.container)

    @celery.task(unit=False)
    def ask() -> None:
        app.session()

    @celery.task(unit={"read_only": True})
    def write() -> None:
        app.add("lost")

    for task, error in ((ask, NoUnitOfWork), (write, ReadOnlyViolation)):
        assert type(task.delay().result) is error
        with app.unit():
            assert type(task.delay().result) is error
    assert app.names() == []


def test_an_eager_task_has_a_unit_of_its_own_as_in_a_worker(new_postgres_url: Callable[[], str], celery: Celery) -> None:
    with running(writer=new_postgres_url()) as app:
        install(celery, app.container)

        @celery.task
        def add(name: str) -> list[str]:
            names = [item.name for item in app.session().query(Item)]
            app.add(name)
            return names

        with pytest.raises(Boom), app.unit():
            app.add("lost")
            assert add.delay("kept").get() == []
            assert add.apply(("kept, too",)).get() == ["kept"]
            assert add.s("kept as well").delay().get() == ["kept", "kept, too"]
            raise Boom
        assert app.names() == ["kept", "kept as well", "kept, too"]


def test_a_task_that_is_called_as_a_function_takes_part(app: Application, celery: Celery) -> None:
    install(celery, app.container)

    @celery.task
    def add(name: str) -> str:
        app.add(name)
        return name

    with pytest.raises(Boom), app.unit():
        assert (add("lost"), add.run("lost, too")) == ("lost", "lost, too")
        raise Boom
    assert app.names() == []
    add("kept")
    assert app.names() == ["kept"]


def test_a_task_of_a_class_is_a_unit_also_where_it_calls_its_base(app: Application, celery: Celery) -> None:
    install(celery, app.container)

    class Add(celery.Task):  # type: ignore[misc]
        autoretry_for = (KeyError,)
        retry_kwargs = {"countdown": 0}  # noqa: RUF012  # as Celery has it

        def run(self, name: str) -> str:
            app.add(name)
            return name

    class AddTwo(Add):
        name = "add two"

        def run(self, name: str) -> str:
            app.add(f"{name}, {self.request.retries}")
            super().run(name)
            if self.request.retries == 0:
                raise KeyError
            return name

    assert celery.register_task(AddTwo()).delay("a").get() == "a"
    assert app.names() == ["a", "a, 1"]


def test_shared_tasks_and_own_base_classes_are_units(app: Application) -> None:
    class Own(CeleryTask):  # type: ignore[misc]
        told = "own"

    with eager(task_cls=Own) as celery:
        install(celery, app.container)

        @shared_task(name="shared by a test")
        def add(name: str) -> None:
            app.add(name)

        task = celery.tasks["shared by a test"]
        task.delay("kept").get()
        assert (task.told, isinstance(task, Task), app.names()) == ("own", True, ["kept"])


def test_a_task_is_sent_when_the_unit_has_committed(app: Application, celery: Celery) -> None:
    install(celery, app.container)
    ran: list[list[str]] = []

    @celery.task
    def look(*names: str) -> None:
        ran.append([*names, *app.names()])

    with app.unit():
        app.add("kept")
        look.delay_on_commit("a")
        look.apply_async_on_commit(("b",), countdown=0)
        assert ran == []
    assert ran == [["a", "kept"], ["b", "kept"]]
    with pytest.raises(Boom), app.unit():
        look.delay_on_commit("never")
        raise Boom
    with app.unit() as unit:
        savepoint = unit.savepoint()
        look.delay_on_commit("never")
        savepoint.rollback()
    look.delay_on_commit("now")
    assert ran[2:] == [["now", "kept"]]


def test_arguments_that_cannot_be_sent_are_told_before_the_commit(app: Application, celery: Celery) -> None:
    install(celery, app.container)

    @celery.task
    def take(what: object) -> None: ...

    for arguments, error in (((), TypeError), ((object(),), EncodeError)):
        with pytest.raises(error), app.unit():
            app.add("lost")
            take.delay_on_commit(*arguments)
    assert app.names() == []


def test_a_broker_that_is_missing_is_told_after_the_commit(app: Application) -> None:
    with Alone("no broker", broker="redis://127.0.0.1:1", set_as_current=False) as celery:
        celery.conf.task_publish_retry = False
        celery.conf.broker_transport_options = {"max_retries": 0}
        install(celery, app.container)

        @celery.task
        def add(name: str) -> None: ...

        with pytest.raises(HookFailed, match="committed"), app.unit():
            app.add("kept")
            add.delay_on_commit("lost")
        assert app.names() == ["kept"]


def test_isolated_tests_roll_back_what_eager_tasks_commit(new_postgres_url: Callable[[], str], celery: Celery) -> None:
    from app_db.testing import isolated

    with running(writer=new_postgres_url()) as app:
        install(celery, app.container)

        @celery.task
        def add(name: str) -> None:
            app.add(name)

        with isolated(app.container):
            with app.unit():
                app.add("a")
                add.delay_on_commit("b")
            with app.unit():
                add.delay("c")
            with app.unit():
                assert sorted(item.name for item in app.session().query(Item)) == ["a", "b", "c"]
        assert app.names() == []


def test_what_is_wrong_is_told_when_it_is_installed(app: Application, celery: Celery) -> None:
    for wrong in (None, Container, celery):
        with pytest.raises(InvalidUse, match="no database container"):
            install(celery, wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidUse, match="attempts=0"):
        install(celery, app.container, attempts=0)
    install(celery, app.container, attempts=2)
    install(celery, app.container, attempts=2)
    with pytest.raises(InvalidUse, match="'eager' has a container already"):
        install(celery, app.container)
    with pytest.raises(InvalidUse, match="Did you mean 'attempts'"):
        celery.task(name="misspelt", unit={"atempts": 3}, lazy=False)(nothing)
    with pytest.raises(InvalidUse, match="unit=3"):
        celery.task(name="wrong", unit=3, lazy=False)(nothing)


def test_an_application_that_has_tasks_or_no_container_is_refused(app: Application, celery: Celery) -> None:
    with pytest.raises(InvalidUse, match="has no database container"):
        celery.task(name="alone", base=Task, lazy=False)(nothing)
    celery.task(name="early", lazy=False)(nothing)
    with pytest.raises(InvalidUse, match="made already"):
        install(celery, app.container)


class Starting:
    """What Celery sends when a worker has no pool yet."""

    def __init__(self, app: Celery, pool: object) -> None:
        self.app, self.pool_cls = app, pool


@pytest.mark.parametrize("pool", ["gevent", type("TaskPool", (), {"__module__": "celery.concurrency.eventlet"})])
def test_pools_of_greenlets_are_refused(pool: object, app: Application, celery: Celery) -> None:
    install(celery, app.container)
    with pytest.raises(SystemExit, match=r"(gevent|eventlet). Use --pool=prefork or threads"):
        worker_init.send(sender=Starting(celery, pool))


@pytest.fixture
def broker(broker: str) -> str:
    need_fitting("redis", "kombu")
    return broker


# ---- in real workers ---------------------------------------------------------------------------------------------------


def until(found: Callable[[], object]) -> None:
    """Wait until something is so."""
    give_up = time.monotonic() + 60
    while not found():
        assert time.monotonic() < give_up
        time.sleep(0.02)


class Sent:
    """A task that was sent. Unlike Celery's AsyncResult, it subscribes to nothing."""

    def __init__(self, results: Any, number: str) -> None:
        self._results, self._number = results, number

    @property
    def state(self) -> str:
        return str(self._results.get_state(self._number))

    def outcome(self) -> tuple[str, Any]:
        """Wait for the end of the task, and return its state and result."""
        until(lambda: self.state in READY_STATES)
        return self.state, self._results.get_result(self._number)


class Site:
    """An application, a worker, and a client that sends it tasks."""

    def __init__(self, app: Application, worker: Worker, client: Celery, results: Any) -> None:
        self.app, self.worker, self.client, self.results = app, worker, client, results

    def send(self, task: str, *args: object) -> Sent:
        return Sent(self.results, self.client.send_task(f"harness.celery_tasks.{task}", args).id)

    def outcome(self, task: str, *args: object) -> tuple[str, Any]:
        """Send a task, wait for its end, and return its state and result."""
        return self.send(task, *args).outcome()

    def activity(self, state: str) -> int:
        with self.app.plain_engine().connect() as connection:
            found = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            return int(connection.scalar(text(f"{found} AND {state}")) or 0)


def command(pool: str, concurrency: int) -> list[str]:
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=INFO"]
    return ["-m", "celery", "-A", "harness.celery_tasks", "worker", f"--pool={pool}", f"--concurrency={concurrency}", *quiet]


def environment(broker: str, connections: dict[str, str], **others: str) -> dict[str, str]:
    urls = {f"APP_DB_CONNECTIONS__{name.upper()}__URL": url for name, url in connections.items()}
    return {"SHOP_BROKER": broker, "SHOP_CONNECTIONS": ",".join(connections), **urls, **others}


@contextmanager
def at_work(
    broker: str, log: Path, *, pool: str = "prefork", concurrency: int = 2, others: dict[str, str] | None = None, **urls: Any
) -> Iterator[Site]:
    with (
        running(**urls) as app,
        Celery("client", broker=broker, set_as_current=False) as client,
        Celery("results", backend=broker, set_as_current=False) as results,
    ):
        for name in urls:
            app.run(*DEFER_UNIQUENESS, *SLOW_COMMIT, on=name)
        given = environment(broker, urls, **(others or {}))
        with working(command(pool, concurrency), given, log) as worker:
            yield Site(app, worker, client, results.backend)
        results.backend.client.connection_pool.disconnect()


OUTCOMES: dict[str, tuple[str, list[str]]] = {
    "add": ("SUCCESS", ["{}"]),
    "add_shared": ("SUCCESS", ["{}"]),
    "add_by_two": ("SUCCESS", ["{}", "{}, part"]),
    "fail": ("FAILURE", []),
    "retry": ("SUCCESS", ["{}"]),
    "retry_commit": ("SUCCESS", ["{}"]),
    "write_read_only": ("FAILURE", []),
}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
@pytest.mark.representative("solo")
def test_results_and_rows_agree(pool: str, new_postgres_url: Callable[[], str], broker: str, tmp_path: Path) -> None:
    with at_work(broker, tmp_path / "log", pool=pool, writer=new_postgres_url()) as site:
        sent = {task: site.send(task, task) for task in OUTCOMES}
        for task in ("ignore", "reject"):
            site.send(task, task)
        then = site.send("add_then", "first", "second")
        site.send("fail_after", "never", "neither")
        states = {task: result.outcome()[0] for task, result in sent.items()}
        assert then.outcome() == ("SUCCESS", "first")
        assert states == {task: state for task, (state, _) in OUTCOMES.items()}
        assert site.outcome("has_unit") == ("SUCCESS", False)
        assert site.outcome("checked_out") == ("SUCCESS", 0)
        assert site.worker.stop() == 0  # when it has done what it has taken
        rows = [row.format(task) for task, (_, rows) in OUTCOMES.items() for row in rows]
        assert site.app.names() == sorted([*rows, "taken", "first", "second"])
        until(lambda: site.activity("true") == 0)  # the server takes a moment to see that a client has gone


@pytest.mark.exhaustive
def test_a_task_commits_before_its_result_is_stored_and_its_message_acknowledged(
    new_postgres_url: Callable[[], str], broker: str, redis: RedisServer, tmp_path: Path
) -> None:
    with at_work(broker, tmp_path / "log", writer=new_postgres_url()) as site:
        with commits_that_wait(site.app):
            sent = site.send("add", "slow")
            until(lambda: site.activity("wait_event = 'advisory'"))
            assert (sent.state, redis.ask("HLEN", "unacked"), site.app.names()) == ("PENDING", b":1\r\n", ["taken"])
        assert sent.outcome() == ("SUCCESS", "slow")
        assert site.app.names() == ["slow", "taken"]
        until(lambda: redis.ask("HLEN", "unacked") == b":0\r\n")


@pytest.mark.exhaustive
def test_a_soft_time_limit_aborts_a_statement(new_postgres_url: Callable[[], str], broker: str, tmp_path: Path) -> None:
    with at_work(broker, tmp_path / "log", concurrency=1, writer=new_postgres_url()) as site:
        state, error = site.outcome("take_long", "lost")
        assert (state, type(error)) == ("FAILURE", SoftTimeLimitExceeded)
        assert site.outcome("checked_out") == ("SUCCESS", 0)
        assert site.outcome("add", "kept") == ("SUCCESS", "kept")
        assert site.app.names() == ["kept", "taken"]


@pytest.mark.exhaustive
def test_a_soft_time_limit_that_ends_a_commit_says_so_and_repeats_nothing(
    new_postgres_url: Callable[[], str], broker: str, tmp_path: Path
) -> None:
    with at_work(broker, tmp_path / "log", concurrency=1, writer=new_postgres_url()) as site:
        with commits_that_wait(site.app):
            state, error = site.outcome("commit_long", "slow")
            assert (state, type(error)) == ("FAILURE", SoftTimeLimitInCommit)
            assert "either committed or not" in str(error)
        assert site.outcome("checked_out") == ("SUCCESS", 0)
        assert site.outcome("commit_long", "kept") == ("SUCCESS", "kept")
        until(lambda: not site.activity("query ILIKE '%commit%' AND state = 'active'"))
        assert site.app.names() in (["kept", "slow", "taken"], ["kept", "taken"])
        assert site.worker.said().count("commit_long") >= 2
        assert "Retry" not in site.worker.said()


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", ["die_once", "hang_once"])
def test_a_process_that_is_killed_leaves_nothing_and_its_task_is_done_once(
    task: str, new_postgres_url: Callable[[], str], broker: str, tmp_path: Path
) -> None:
    with at_work(broker, tmp_path / "log", writer=new_postgres_url()) as site:
        site.app.put("flag")
        sent = site.send(task, "kept", "flag")
        if task == "hang_once":  # a hard limit acknowledges what it ends, unless `acks_on_timeout` is off
            assert type(sent.outcome()[1]).__name__ == "TimeLimitExceeded"
            assert site.app.names() == ["taken"]
            assert site.outcome(task, "kept", "flag") == ("SUCCESS", "kept")
        else:
            until(lambda: sent.state == "SUCCESS")
        assert site.app.names() == ["kept", "taken"]
        until(lambda: not site.activity("state LIKE 'idle in transaction%'"))


MIXED = ("add", "add_shared", "fail", "retry", "retry_commit", "add_by_two", "add_then", "fail_after", "ignore", "reject")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("databases", "pool", "acks"),
    [(1, "prefork", "late"), (1, "prefork", "early"), (1, "threads", "late"), (2, "prefork", "late")],
)
def test_the_rows_are_those_of_the_tasks_that_succeeded(  # noqa: PLR0917  # fixtures
    databases: int, pool: str, acks: str, new_postgres_url: Callable[[], str], broker: str, tmp_path: Path
) -> None:
    urls = {name: new_postgres_url() for name in ("writer", "warehouse")[:databases]}
    two_phase = {"APP_DB_TWO_PHASE": "true", "APP_DB_DECISION_LOG": "writer"} if databases == 2 else {}
    with at_work(broker, tmp_path / "log", pool=pool, concurrency=4, others={"SHOP_ACKS": acks, **two_phase}, **urls) as site:
        kinds = [MIXED[number % len(MIXED)] for number in range(200)]
        sent = []
        for number, kind in enumerate(kinds):
            more = (f"{number}, then",) if kind in ("add_then", "fail_after") else ()
            sent.append((kind, number, site.send(kind, str(number), *more)))
        expected = ["taken"]
        for kind, number, result in sent:
            if kind in ("ignore", "reject"):
                continue
            state, found = result.outcome()
            assert state == ("FAILURE" if kind.startswith("fail") else "SUCCESS"), (kind, found)
            if state == "SUCCESS":
                part = {"add_by_two": [f"{number}, part"], "add_then": [f"{number}, then"]}.get(kind, [])
                expected += [str(number), *part]
        until(lambda: len(site.app.names()) >= len(expected))  # those of the tasks that other ones have sent
        for _ in range(8):
            assert site.outcome("checked_out") == ("SUCCESS", 0)
        assert site.worker.stop() == 0
        for name in urls:
            assert site.app.names(name) == sorted(expected)
            with site.app.plain_engine(name).connect() as connection:
                prepared = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"
                assert connection.scalar(text(prepared)) == 0
        until(lambda: site.activity("true") == 0)  # the server takes a moment to see that a client has gone


@pytest.mark.exhaustive
def test_a_worker_without_settings_does_not_start_and_says_why(broker: str, tmp_path: Path) -> None:
    with working(command("prefork", 1), environment(broker, {"writer": "nonsense"}), tmp_path / "log") as worker:
        assert worker.process.wait(30) == 1
        said = worker.said()
    assert "APP_DB_CONNECTIONS__WRITER__URL" in said
    assert "Traceback" not in said


@pytest.mark.exhaustive
@pytest.mark.parametrize(("pool", "times"), [("prefork", 2), ("threads", 1), ("solo", 1)])
def test_each_process_that_works_has_the_containers_resources(
    pool: str, times: int, new_postgres_url: Callable[[], str], broker: str, tmp_path: Path
) -> None:
    log = tmp_path / "resources"
    with at_work(broker, tmp_path / "log", pool=pool, others={"SHOP_LOG": str(log)}, writer=new_postgres_url()) as site:
        assert site.outcome("add", "kept") == ("SUCCESS", "kept")
        until(lambda: log.read_text().count("begun") == times)
        site.worker.stop()
    assert sorted(log.read_text().split()) == sorted(["begun", "ended"] * times)
