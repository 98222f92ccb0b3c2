"""Refuses each use of a container's databases that is not isolated."""

from __future__ import annotations

import sysconfig
import threading
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from app_db._compat.frames import frame_at, frames_from
from app_db._databases.engines import next_checkout
from app_db._databases.holders import Line, is_inside
from app_db._databases.pools import guards
from app_db._sessions.own_engines import own_engine
from app_db.errors import AppDbError, NotIsolated
from app_db.testing._overrides import connections_of
from app_db.testing._plans import plan_for
from app_db.testing._row_counts import RowCounts

if TYPE_CHECKING:
    from sqlalchemy import Pool
    from sqlalchemy.pool import PoolProxiedConnection

    from app_db.container import DatabaseContainer

_ISOLATE = (
    "Isolate the test: mark it with @pytest.mark.app_db, or put `isolated(container)` around it. If it has to commit, mark it "
    "with @pytest.mark.app_db(isolation=False)"
)

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


class only_isolated:  # noqa: N801  # used like a function
    """Refuse, in the block, each use of a container's databases that is not isolated.

    A connection that is taken from a pool of the container, by whatever thread or coroutine, raises
    NotIsolated in the place that takes it. If that error does not reach the end of the block,
    because the application caught it, the end of the block raises it. Put the block around
    `isolated(container)`.

    Not refused are: what `app_db.testing` itself does, such as `made_tables`; connections to
    databases without a writable connection, which have nothing to roll back; and other settings,
    `overridden(container, ...)` and `sqlite(container)`, if their block begins inside this one.

    `connections` names the connections that are guarded; without it, all are. With `refuse=False`
    nothing is refused, and only noted in `uses`. `told` returns who uses a connection at the
    moment, and advice, if a runner of tests knows.

    >>> from app_db import Container, DatabaseSettings
    >>> from app_db.testing import isolated, only_isolated
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> with only_isolated(container):
    ...     with isolated(container):
    ...         container.writer_engine().connect().close()
    ...     container.writer_engine().connect()
    Traceback (most recent call last):
    ...
    app_db.errors.NotIsolated: The connection 'writer' was used without isolation...
    """

    def __init__(
        self,
        container: DatabaseContainer,
        connections: Collection[str] | None = None,
        *,
        refuse: bool = True,
        told: Callable[[], tuple[str, str]] = lambda: ("", ""),
    ) -> None:
        self.uses: list[NotIsolated] = []
        """What was refused or noted, until `settle` was called."""
        self.rows: RowCounts | None = None
        """The rows before the first use, if nothing is refused."""
        self._container = container
        self._connections = connections
        self._refuse = refuse
        self._told = told
        self._paused = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._state = self._container.core.state()
        self._names = self._guarded()
        guards.append(self._check)
        self._stack.callback(guards.remove, self._check)
        self._own: dict[int, str] = {}
        for name in self._names:
            connection = self._container.connection(name)
            own = own_engine(connection.engine, connection.async_engine)
            if own is not None:
                self._guard(own.pool, name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()
        self.settle(error)

    def end(self) -> None:
        """Refuse and note nothing more."""
        self._stack.close()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Let other code use the databases for the length of the block: it prepares what tests share."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def settle(self, error: BaseException | None = None) -> None:
        """Raise what was refused and then caught. If `error` is about to be raised anyway, it gets notes instead."""
        if not self._refuse:
            return
        uses, self.uses = self.uses, []
        seen = set(map(id, _errors_in(error)))
        caught = list({use.message: use for use in uses if id(use) not in seen}.values())
        if error is None and not caught:
            return
        raised = caught.pop(0) if error is None else error
        for use in caught:
            raised.add_note(f"app_db: {use.message}")
        if error is None:
            raise raised

    def _guarded(self) -> list[str]:
        """Return the connections to databases that the container can write to."""
        names = list(connections_of(self._container))
        with suppress(AppDbError):  # the settings are wrong, which the first use will say
            configured = self._container.settings().connections
            written = plan_for(self._container, None).places
            names = [name for name in names if name not in configured or name in written]
        return [name for name in names if self._connections is None or name in self._connections]

    def _guard(self, pool: Pool, name: str) -> None:
        """Guard the pool of an engine of the application's own, which does not ask the guards by itself."""
        before, connect = vars(pool).get("connect"), pool.connect
        self._own[id(pool)] = name

        def guarded() -> PoolProxiedConnection:
            self._check(pool)
            return connect()

        def restore() -> None:
            del self._own[id(pool)]
            if before is None:
                del vars(pool)["connect"]
            else:
                vars(pool)["connect"] = before

        vars(pool)["connect"] = guarded
        self._stack.callback(restore)

    def _check(self, pool: Pool) -> None:
        name = None if self._paused else self._name_of(pool)
        if name is None:
            return
        frames = [frame for frame in frames_from(frame_at(1)) if frame.f_globals.get("__name__") != __name__]
        if any(map(_is_ours, _until_outside(frames))):
            return
        by, advice = self._told()
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            by = " in ".join(filter(None, [by, f"the thread {thread.name!r}"]))
        use = NotIsolated(name, _place_in(frames), by, self._advice_about(name) or advice or _ISOLATE)
        if not self._refuse and self.rows is None:
            self.rows = RowCounts(self._container, self._connections)
        self.uses.append(use)
        if self._refuse:
            next_checkout.set(None)  # it was noted for this connection
            raise use

    def _name_of(self, pool: Pool) -> str | None:
        own = self._own.get(id(pool))
        if own is not None:
            return own
        return next((name for name in self._names for engine in self._state.engines(name) if engine.pool is pool), None)

    def _advice_about(self, name: str) -> str | None:
        isolation = self._container.core.coordinator().rehearsal
        if isolation is None:
            return None
        if name in getattr(isolation, "names", ()):
            return (
                f"The test is isolated, but this engine or session was taken from the container before. Ask the container for it "
                f"in the test: `container.{name}.engine()`"
            )
        return f"The test is isolated, but {name!r} is not among the connections that were given. Add {name!r} to them"


def _errors_in(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those in it, that caused it, or that were being handled when it was raised."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


def _until_outside(frames: list[FrameType]) -> Iterator[FrameType]:
    for frame in frames:
        if not is_inside(frame):
            return
        yield frame


def _is_ours(frame: FrameType) -> bool:
    """Return whether `app_db.testing` does it: isolates, counts rows, or makes tables."""
    return str(frame.f_globals.get("__name__", "")).startswith("app_db.testing.")


def _place_in(frames: list[FrameType]) -> str | None:
    """Return the line that used the connection, and where its unit of work was begun, if another function did that.

    Often that is the line that has called the function of a unit: the session writes when that function has returned.
    """
    line, noted = _line_in(frames), next_checkout.get()
    begun = None if noted is None else noted.begun_at
    if line is None or begun is None or begun.code is line.code:
        return str(line or begun or "") or None
    return f"{line}, in a unit of work of {begun}"


def _line_in(frames: list[FrameType]) -> Line | None:
    """Return the line of the application or the test; if there is none, the line of the library that used the connection."""
    outside = [frame for frame in frames if not is_inside(frame) and not frame.f_code.co_filename.startswith("<")]
    own = (frame for frame in outside if not _is_installed(Path(frame.f_code.co_filename)))
    found = next(own, outside[0] if outside else None)
    return None if found is None else Line(found.f_code, found.f_lasti)


def _is_installed(path: Path) -> bool:
    return path.is_relative_to(_STANDARD_LIBRARY) or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
