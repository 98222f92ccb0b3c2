"""Processes that die in mid-commit, at any step of it, or have a server die there; and a look at what they left behind.

    with Zygote() as zygote, zygote.application(settings) as application:
        print(application.run("unit 1").steps)              # each protocol call of its commit, before and after
        assert application.run("unit 2", die_at=7).killed

An application is a process of its own, and each unit of work runs in a fork of it: what takes time, importing and first
connecting, is done once. `python -m harness.crashing` is that process; each line of its stdin is a command
in JSON, answered on stdout.

A step is a moment just before or just after something is sent, answered or written that matters to the commit. The steps of a
commit are counted in the process that commits, from the end of the unit's block until the unit's connections are closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from importlib import import_module
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from harness.paths import PYTHONPATH

if TYPE_CHECKING:
    from app_db import DatabaseContainer

COMMITTED_AFTER_ALL = "CommitUnconfirmed"
UNKNOWN = "OutcomeUnknown"

"""Where processes find app_db."""

Settings = Mapping[str, Any]
"""What DatabaseSettings is made of."""


# ---- for tests ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of a unit of work, as far as it could say itself."""

    unit: str
    committed: bool = False
    """Whether its block ended without an error."""
    error: str = ""
    """The error that its block raised."""
    message: str = ""
    killed: bool = False
    asked: bool = False
    steps: list[str] = field(default_factory=list)
    """What it got to, up to where it died."""

    def contradicts(self, rows: Mapping[str, bool]) -> str:
        """Return what is wrong with a unit whose row is, or is not, in each database; nothing if all is well."""
        where = f"{self.unit}, {'killed' if self.killed else self.error} at {self.steps[-1] if self.steps else 'its beginning'}"
        if len(set(rows.values())) > 1:
            return f"{where}: the databases differ, {rows}"
        there = all(rows.values())
        if there and self.error not in ("", COMMITTED_AFTER_ALL, UNKNOWN):
            return f"{where}: it is there, and was told not to be"
        if not there and (self.committed or self.error == COMMITTED_AFTER_ALL):
            return f"{where}: it is not there, and was told to be"
        return ""


class Zygote:
    """A process in which everything is imported, and nothing connected. It has `variables` in its environment."""

    def __init__(self, **variables: str) -> None:
        self._variables = {**variables, "PYTHONPATH": PYTHONPATH}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(("APP_DB_", "DATABASE_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.crashing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, **self._variables},
            start_new_session=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.stdin.close()
            process.stdout.close()
            process.wait(10)

    @contextmanager
    def application(self, settings: Settings, *, warm: bool = True) -> Generator[Application]:
        """An application with these settings. A warm one has used all its connections before."""
        if self._process is None:
            self.__enter__()
        try:
            self.say("open", settings=settings, warm=warm)
            opened = self.hear()
            if "ready" not in opened:
                raise RuntimeError(f"the application did not start:\n{opened.get('trace')}")
            yield Application(self, settings)
            self.say("close")
            while "ended" not in self.hear():
                pass
        except BaseException:
            self.__exit__(None, None, None)  # whatever it is waiting for; the next application begins afresh
            raise

    def say(self, command: str, **options: Any) -> None:
        """Send a line."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **options}).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Return the next line."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the zygote is gone")
        heard: dict[str, Any] = json.loads(line)
        return heard


class Application:
    """A process with a container, which forks for each thing it is to do."""

    def __init__(self, zygote: Zygote, settings: Settings) -> None:
        self._zygote = zygote
        self.settings = settings

    def run(
        self,
        unit: str,
        *,
        die_at: int | None = None,
        ask_at: int | None = None,
        meanwhile: Callable[[], object] = lambda: None,
        way: str = "app_db",
    ) -> Outcome:
        """Run a unit of work that adds an item to each database, and have it die at a step, or wait there for something else."""
        outcome = Outcome(unit)
        self._zygote.say("run", unit=unit, die_at=die_at, ask_at=ask_at, way=way)
        while True:
            heard = self._zygote.hear()
            if "step" in heard:
                outcome.steps.append(heard["step"])
            elif "asks" in heard:
                outcome.asked = True
                meanwhile()
                self._zygote.say("go on")
            elif "trace" in heard:
                raise RuntimeError(heard["trace"])
            elif "ended" in heard:
                outcome.killed = heard["ended"] == -signal.SIGKILL
                return outcome
            else:
                outcome.committed = heard.get("committed", False)
                outcome.error, outcome.message = heard.get("error", ""), heard.get("message", "")

    def die_at_every_step(self, name: str, **options: Any) -> Iterator[Outcome]:
        """Run units that die at the first step, at the second, ..., up to one that gets through."""
        for step in count():
            outcome = self.run(f"{name} {step:03}", die_at=step, **options)
            yield outcome
            if not outcome.killed:
                return

    def ask_at_every_step(self, name: str, meanwhile: Callable[[], object], **options: Any) -> Iterator[Outcome]:
        """Run units that wait at the first step, at the second, ... while something else happens, up to one that needn't."""
        for step in count():
            outcome = self.run(f"{name} {step:03}", ask_at=step, meanwhile=meanwhile, **options)
            yield outcome
            if not outcome.asked:
                return

    def settle(self, *, keep: float | None = None, patience: float | None = None) -> str:
        """Run a recovery, and return its report.

        With `keep`, it forgets decisions that are older than so many seconds; with `patience`, it waits no longer for locks.
        """
        self._zygote.say("settle", keep=keep, patience=patience)
        report = ""
        while True:
            heard = self._zygote.hear()
            if "trace" in heard:
                raise RuntimeError(heard["trace"])
            if "ended" in heard:
                return report
            report = heard["report"]

    def recover(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m app_db recover`, as an operator would."""
        from harness.commands import app_db

        return app_db("recover", "--grace", "0", *arguments, environment=variables(self.settings))


def variables(settings: Settings, prefix: str = "APP_DB") -> dict[str, str]:
    """The settings as an environment gives them."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        variable = f"{prefix}__{name.upper()}" if prefix != "APP_DB" else f"{prefix}_{name.upper()}"
        if isinstance(value, Mapping):
            found |= variables(value, variable)
        else:
            found[variable] = str(value)
    return found


# ---- the process --------------------------------------------------------------------------------------------------------


def _say(**what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _hear() -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(0, 1 << 16)
        if not more:
            os._exit(0)  # the tests are over
        line += more
    heard: dict[str, Any] = json.loads(line)
    return heard


class Steps:
    """Counts the steps of a commit from when it is armed, and dies at one of them, or asks what to do."""

    def __init__(self, die_at: int | None, ask_at: int | None) -> None:
        self.armed = False
        self._die_at = die_at
        self._ask_at = ask_at
        self._number = 0
        self._lock = threading.RLock()

    def reach(self, what: str, before_death: Callable[[], object] = lambda: None) -> None:
        if not self.armed:
            return
        with self._lock:
            number, self._number = self._number, self._number + 1
            _say(step=what)
            if number == self._die_at:
                before_death()
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self._ask_at:
                _say(asks=number)
                _hear()

    def around(self, owner: Any, name: str, describe: Callable[..., str]) -> None:
        """Make a step before and one after each call of a function."""
        function = getattr(owner, name)

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            what = describe(*args, **kwargs) if self.armed else ""
            self.reach(f"before {what}")
            result = function(*args, **kwargs)
            self.reach(f"after {what}")
            return result

        setattr(owner, name, counted)

    def watch(self) -> None:
        """Have everything counted by which a commit talks to databases and files."""
        self._watch_sqlalchemy()
        self._watch_connections()
        self._watch_logs()
        self._watch_files()

    def _watch_sqlalchemy(self) -> None:
        from sqlalchemy import Engine, event
        from sqlalchemy.engine.default import DefaultDialect

        self.around(DefaultDialect, "do_commit", lambda *args: "COMMIT")
        self.around(DefaultDialect, "do_rollback", lambda *args: "ROLLBACK")

        @event.listens_for(Engine, "before_cursor_execute")
        def before(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
            self.reach(f"before {statement} on {connection.engine.url.database}")

        @event.listens_for(Engine, "after_cursor_execute")
        def after(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
            self.reach(f"after {statement} on {connection.engine.url.database}")

    def _watch_connections(self) -> None:
        module = import_module("app_db._databases.concurrent_statements")
        for connection in module.NonBlockingConnection.__subclasses__():
            self.around(connection, "send", _sending)
            self._watch_answers(connection)
        self.around(import_module("app_db._units.branch_connections"), "say", _saying)
        for connection in module.AwaitedConnection.__subclasses__():
            self._around_awaited(connection, "execute", _sending)

    def _around_awaited(self, owner: Any, name: str, describe: Callable[..., str]) -> None:
        """Do what `around` does with a coroutine function."""
        function = getattr(owner, name)

        @wraps(function)
        async def counted(*args: Any, **kwargs: Any) -> Any:
            what = describe(*args, **kwargs) if self.armed else ""
            self.reach(f"before {what}")
            result = await function(*args, **kwargs)
            self.reach(f"after {what}")
            return result

        setattr(owner, name, counted)

    def _watch_answers(self, line: Any) -> None:
        """Make a step before an answer is first looked for, and one when it is there."""
        send, collect = line.send, line.collect
        unanswered: dict[Any, str] = {}

        def note(line: Any, statement: str) -> None:
            send(line, statement)
            unanswered[line] = f"before the answer to {statement}"

        def counted(line: Any, ready: bool) -> Any:
            what = unanswered.get(line, "")
            if what.startswith("before"):
                self.reach(what)
                unanswered[line] = what.replace("before", "after", 1)
            answer = collect(line, ready)
            if answer is not None:
                self.reach(unanswered.pop(line, "after an answer"))
            return answer

        line.send, line.collect = note, counted

    def _watch_logs(self) -> None:
        for log in _logs():
            for method in ("decide", "decide_within", "forget"):
                if hasattr(log, method):
                    self.around(log, method, partial(_calling, method))

    def _watch_files(self) -> None:
        database: Any = import_module("app_db._two_phase.decision_database").DecisionDatabase
        execute = database._execute

        def counted(file: Any, statement: str, give_up: float) -> Any:
            self.reach(f"before {statement} in {file._path}")
            if statement == "COMMIT":
                self.reach("in the middle of COMMIT", lambda: _torn(file._path, lambda: execute(file, statement, give_up)))
            rows = execute(file, statement, give_up)
            self.reach(f"after {statement} in {file._path}")
            return rows

        database._execute = counted


def _torn(path: Path, write: Callable[[], object]) -> None:
    """Have what is written beside a file end in the middle of a page of SQLite's."""
    wal = path.with_name(f"{path.name}-wal")
    resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size + 2_000, resource.RLIM_INFINITY))
    with contextlib.suppress(Exception):
        write()


def _sending(_: object, statement: str) -> str:
    return f"sending {statement}"


def _saying(_: object, statements: Sequence[str]) -> str:
    return "; ".join(statements)


def _calling(method: str, log: Any, *_: object) -> str:
    return f"{method} in {log.place}"


def _commit(container: DatabaseContainer, unit: str, steps: Steps) -> None:
    """Run a unit of work that adds an item to every database."""
    from harness.items import Item

    with container.transaction():
        for name in _written(container):
            getattr(container, f"{name}_session")().add(Item(name=unit))
        steps.armed = True


def _commit_routed(container: DatabaseContainer, unit: str, steps: Steps) -> None:
    """Do the same through the session that finds its database."""
    with container.transaction():
        items = [_item_of(name)(name=unit) for name in _written(container)]
        container.session().add_all(items)
        container.session().flush()
        held = container.core.coordinator().get().sessions
        assert not any(name in held for name in _written(container)), "a database has a session of its own"
        for item in items:
            item.amount = 1
        steps.armed = True


@cache
def _item_of(connection: str) -> Any:
    """A model of the table of items that is in the database of a connection."""
    from sqlalchemy import MetaData
    from sqlalchemy.orm import registry

    from harness.items import Item

    table: Any = Item.__table__
    metadata = MetaData(info={"app_db_connection": connection})
    model = type("Item", (), {})
    registry(metadata=metadata).map_imperatively(model, table.to_metadata(metadata))
    return lambda name: _with(model(), name=name, amount=0)


def _with(instance: Any, **values: Any) -> Any:
    for key, value in values.items():
        setattr(instance, key, value)
    return instance


def _commit_awaited(container: DatabaseContainer, unit: str, steps: Steps) -> None:
    """Do the same in a coroutine."""
    _run_awaited(container, unit, steps, _written(container))


def _commit_mixed(container: DatabaseContainer, unit: str, steps: Steps) -> None:
    """Do the same in a coroutine that has a thread write to every second database."""
    _run_awaited(container, unit, steps, _written(container)[::2])


def _run_awaited(container: DatabaseContainer, unit: str, steps: Steps, awaited: Sequence[str]) -> None:
    import asyncio

    from harness.items import Item

    async def main() -> None:
        try:
            async with container.transaction():
                for name in _written(container):
                    if name in awaited:
                        session = getattr(container, f"{name}_async_session")()
                        session.add(Item(name=unit))
                        await session.flush()
                    else:
                        session = getattr(container, f"{name}_session")()
                        session.add(Item(name=unit))
                        await asyncio.to_thread(session.flush)
                steps.armed = True
        finally:
            disposal: Any = container.shutdown_resources()
            if disposal is not None:
                await disposal

    asyncio.run(main())


def _commit_by_hand(container: DatabaseContainer, unit: str, steps: Steps) -> None:
    """Do the same as people do it who know the statements, and keep no decision."""
    from sqlalchemy import text

    with contextlib.ExitStack() as stack:
        connections = {
            name: stack.enter_context(getattr(container, f"{name}_engine")().connect()) for name in _written(container)
        }
        for connection in connections.values():
            connection.execute(text("INSERT INTO item (name, amount) VALUES (:name, 0)"), {"name": unit})
        steps.armed = True
        for name, connection in connections.items():
            connection.exec_driver_sql(f"PREPARE TRANSACTION '{unit} {name}'")
        for name, connection in connections.items():
            connection.rollback()
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.exec_driver_sql(f"COMMIT PREPARED '{unit} {name}'")


WAYS = {
    "app_db": _commit,
    "routed": _commit_routed,
    "awaited": _commit_awaited,
    "mixed": _commit_mixed,
    "by hand": _commit_by_hand,
}


def _written(container: DatabaseContainer) -> list[str]:
    return [name for name in container.settings().connections if name != "log"]


def _run(container: DatabaseContainer, unit: str, die_at: int | None, ask_at: int | None, way: str) -> None:
    steps = Steps(die_at, ask_at)
    steps.watch()
    try:
        WAYS[way](container, unit, steps)
    except Exception as error:
        _say(error=type(error).__name__, message=str(error))
    else:
        _say(committed=True)
    container.shutdown_resources()


def _logs() -> tuple[Any, ...]:
    return import_module("app_db._two_phase.decision_table").TableLog, import_module("app_db._two_phase.decision_file").FileLog


def _settle(container: DatabaseContainer, keep: float | None, patience: float | None) -> None:
    recovery: Any = import_module("app_db._two_phase.recovery")
    if keep is not None:
        recovery.KEEP_COMMITS = keep
    if patience is not None:
        recovery._HELD_FOR = patience
        for log in _logs():
            log.__init__.__kwdefaults__["lock_wait"] = patience
    _say(report=str(container.recovery().settle(grace=0)))
    container.shutdown_resources()


def _open(settings: dict[str, Any], warm: bool) -> DatabaseContainer:
    from app_db import DatabaseSettings, container_of
    from harness.items import Base

    os.environ.update(variables(settings))
    container = container_of(*settings["connections"])(settings=DatabaseSettings(_env_file=None))
    if warm:
        for name in settings["connections"]:
            engine = getattr(container, f"{name}_engine")()
            Base.metadata.create_all(engine)
            engine.dispose()
    return container


def _in_child(work: Callable[[], object]) -> int:
    """Do something in a fork; return how that ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
    except BaseException:
        _say(trace=traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _serve(settings: dict[str, Any], warm: bool) -> NoReturn:
    """Be an application until it is told to close."""
    container = _open(settings, warm)
    _say(ready=True)
    while True:
        heard = _hear()
        command = heard.pop("command")
        if command == "close":
            os._exit(0)
        elif command == "run":
            ended = _in_child(lambda heard=heard: _run(container, **heard))  # type: ignore[misc]
        else:
            ended = _in_child(lambda heard=heard: _settle(container, **heard))  # type: ignore[misc]
        _say(ended=ended)


def _main() -> None:
    drivers = ("pymysql", "psycopg", "asyncio", "asyncpg", "asyncmy", "aiosqlite", "sqlalchemy.ext.asyncio")
    dialects = (f"sqlalchemy.dialects.{name}" for name in ("mysql", "postgresql", "sqlite"))
    for module in (*drivers, *dialects, "app_db", "harness.items"):
        import_module(module)
    while True:
        heard = _hear()
        heard.pop("command")
        _say(ended=_in_child(lambda heard=heard: _serve(**heard)))  # type: ignore[misc]


if __name__ == "__main__":
    _main()
