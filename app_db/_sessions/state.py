"""The objects of one container instance: its engines, sessionmakers and decision logs.

The container's providers read them from a `State`. To use other settings temporarily, replace the
`State` temporarily.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from dependency_injector import providers

from app_db._compat.asyncio import running_loop
from app_db._compat.os import after_fork_in_child
from app_db._databases.disposal import begin_to_retire, cut_off, dispose_here, wait_outside
from app_db._databases.engines import retire
from app_db._two_phase.decision_logs import DecisionLogs, build_decision_logs
from app_db.settings._urls import require_asyncio

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

T = TypeVar("T")
Key = tuple[str, str, AbstractEventLoop | None]
"""The kind of an object, its connection, and its event loop.

Only async engines have a loop, because their connections can't change loops. An async engine with
None was made where no loop ran; the first loop that asks takes it.
"""

ENGINES = "engine", "async_engine"

# `storage_lock` is public, but not in the stubs.
MAKING: AbstractContextManager[object] = vars(providers.ThreadSafeSingleton)["storage_lock"]
"""dependency-injector's lock, under which objects are made.

A second lock could deadlock with it: one thread makes an application's singleton that asks for an
engine, while another thread makes an engine whose settings are an application's singleton.
"""


class State:
    """The objects of one container instance, and its decision logs."""

    def __init__(self, decision_logs: DecisionLogs) -> None:
        self.decision_logs = decision_logs
        self.objects: dict[Key, Any] = {}
        _states.add(self)

    @property
    def in_use(self) -> bool:
        """Whether anything has to be closed."""
        return self.decision_logs.in_use or any(key[0] in ENGINES for key in list(self.objects))

    @property
    def in_use_here(self) -> bool:
        """Whether the running event loop has engines, so that closing has to be awaited."""
        here = running_loop()
        return here is not None and any(loop is here for _, _, loop in list(self.objects))

    def has(self, kind: str, name: str, *_: object) -> bool:
        """Return whether the object was made. It takes the arguments of `StateHolder.get`."""
        return any(key[:2] == (kind, name) for key in list(self.objects))

    def engines(self, name: str) -> list[Engine]:
        """Return the engines of a connection that were made, those of event loops included."""
        made = [(key[0], engine) for key, engine in list(self.objects.items()) if key[0] in ENGINES and key[1] == name]
        return [engine if kind == "engine" else engine.sync_engine for kind, engine in made]

    def forget(self, kind: str, name: str, *_: object) -> None:
        """Forget the object, and retire it if it is an engine. It takes the arguments of `StateHolder.get`."""
        self._retire(lambda key: key[:2] == (kind, name))

    def forget_closed_loops(self) -> None:
        """Retire the engines of event loops that are closed. Each `asyncio.run()` may leave some."""
        for _, engine in self._take(lambda key: key[2] is not None and key[2].is_closed()):
            cut_off(engine.sync_engine, quietly=True)

    def forget_loops(self) -> None:
        """Forget the engines of all loops, in a forked child. The loops only run in its parent."""
        # No lock here: a thread of the parent may have held it during the fork.
        self.objects = {key: made for key, made in self.objects.items() if key[2] is None}

    def reset(self) -> None:
        """Forget all objects, and retire the engines. Keep the decision logs, which open units use."""
        self._retire(lambda _: True)

    def close(self) -> None:
        """Forget acknowledged decisions, and retire the engines. Later use makes new ones."""
        self.decision_logs.close()
        self._retire(lambda key: key[0] in ENGINES)

    async def close_awaited(self) -> None:
        here = running_loop()
        own = self._take(lambda key: key[0] == "async_engine" and key[2] is here)
        waits = self._begin_to_retire(lambda key: key[0] == "async_engine")
        try:
            self.close()
        finally:
            await dispose_here((engine for _, engine in own), waits)

    def _retire(self, is_meant: Callable[[Key], bool]) -> None:
        """Forget objects. Close idle connections of engines now, and those in use when their units end."""
        for wait in self._begin_to_retire(is_meant):
            wait_outside(wait)
        for (kind, _, _), made in self._take(is_meant):
            if kind == "engine":
                retire(made)

    def _begin_to_retire(self, is_meant: Callable[[Key], bool]) -> list[Callable[[], None]]:
        """Begin to retire async engines. Return functions that wait until their loops have disposed them."""
        waits = []
        for key, engine in list(self.objects.items()):
            if key[0] == "async_engine" and is_meant(key):
                # Begin before forgetting: a loop that is about to end either waits for the disposal or finds its engine.
                waits.append(begin_to_retire(engine, key[2]))
                with MAKING:
                    if self.objects.get(key) is engine:
                        del self.objects[key]
        return waits

    def _take(self, is_meant: Callable[[Key], bool]) -> list[tuple[Key, Any]]:
        with MAKING:
            return [(key, self.objects.pop(key)) for key in list(self.objects) if is_meant(key)]


class StateHolder:
    """Holds the state of one container instance, and makes each object at first use, once for all threads."""

    def __init__(self, container: Any) -> None:
        self.container = container
        """The container, or None for the providers of a container class."""
        self.state = self.new_state()
        self.plans: dict[object, object] = {}
        """What isolations of the container have found out about it."""

    def new_state(self) -> State:
        return State(build_decision_logs(self.container))

    def get(self, kind: str, name: str, build: Callable[..., T], *arguments: object) -> T:
        """Return a connection's object of a kind. At first use, `build(container, name, *arguments)` makes it."""
        made: T | None = self.state.objects.get((kind, name, None))
        return self._make((kind, name, None), build, *arguments) if made is None else made

    def get_for_loop(self, kind: str, name: str, build: Callable[[Any, str], T]) -> T:
        """Return a connection's object for the running event loop."""
        require_asyncio()
        loop = running_loop()
        made: T | None = self.state.objects.get((kind, name, loop))
        if made is not None:
            return made

        def take_or_build(container: Any, name: str) -> T:
            waiting: T | None = self.state.objects.pop((kind, name, None), None)
            return build(container, name) if waiting is None else waiting

        new = self._make((kind, name, loop), take_or_build)
        self.state.forget_closed_loops()
        return new

    def _make(self, key: Key, build: Callable[..., T], *arguments: object) -> T:
        # Read the state under the lock: it may have been swapped before. Hold the lock until the object is stored: otherwise a
        # reset in between would never retire the engine.
        with MAKING:
            made: T | None = self.state.objects.get(key)
            if made is None:
                made = self.state.objects[key] = build(self.container, key[1], *arguments)
            return made


_states: WeakSet[State] = WeakSet()


def _forget_loops() -> None:
    for state in list(_states):
        state.forget_loops()


after_fork_in_child(_forget_loops)
