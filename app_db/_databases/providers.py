"""Providers that hold engines, and dispose them."""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from dependency_injector import providers
from sqlalchemy.engine import Engine

from app_db._compat.asyncio import running_loop
from app_db._databases.disposal import begin_to_retire, cut_off, retire_async, wait_outside
from app_db._databases.engines import retire

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    DeclarativeMeta = type
else:
    pass


class Lasting(providers.ThreadSafeSingleton[Any]):
    """A singleton that `reset_singletons()` leaves alone, because units of work that are under way stand on it."""

    def reset(self) -> Any:
        """Do nothing."""


class EngineProvider(providers.ThreadSafeSingleton[Engine]):
    """The engine of a connection; `reset()` retires it, and the next session gets one made from the settings of that time."""

    storage_lock: AbstractContextManager[Any]  # the base class's, not in its stubs
    _built: Engine | None = None

    def _provide(self, args: Any, kwargs: Any) -> Engine:
        engine = self._built
        if engine is None:
            with self.storage_lock:  # or a reset between making it and noting it would never retire it
                base: Any = super()  # the stubs do not have _provide
                engine = self._built = self._built or base._provide(args, kwargs)
        return engine

    def reset(self) -> Any:
        """Retire the engine: its idle connections close now, those in use when their units end."""
        built, context = self._emptied()
        if built is not None:
            retire(built)
        return context

    def taken_away(self) -> Engine | None:
        """Give the engine away, if there is one: to be disposed, or to be given back."""
        return self._emptied()[0]

    def _emptied(self) -> tuple[Engine | None, Any]:
        with self.storage_lock:  # both at once, or an engine that only one of them knows would never be retired
            built, self._built = self._built, None
            return built, super().reset()

    def give_back(self, engine: Engine | None) -> None:
        """Take an engine that was given away, and retire the one of the meantime."""
        with self.storage_lock:
            meanwhile, self._built = self.taken_away(), engine
        if meanwhile is not None:
            retire(meanwhile)

    @property
    def is_built(self) -> bool:
        """Whether there is an engine to dispose."""
        return self._built is not None


class AsyncEngineProvider(providers.ThreadSafeSingleton[Any]):
    """The engine by which coroutines use a connection: one for each event loop, because connections can't change loops."""

    storage_lock: AbstractContextManager[Any]  # the base class's, not in its stubs
    _built: dict[AbstractEventLoop, AsyncEngine] | None = None
    _process = 0
    _homeless: AsyncEngine | None = None
    """What was asked for where no loop runs. The first loop that asks takes it."""

    def _provide(self, args: Any, kwargs: Any) -> AsyncEngine:
        loop = running_loop()
        engine = self._homeless if loop is None else self._engines().get(loop)
        return engine or self._build(loop, args, kwargs)

    def _build(self, loop: AbstractEventLoop | None, args: Any, kwargs: Any) -> AsyncEngine:
        with self.storage_lock:
            engine, self._homeless = self._homeless, None
            if engine is None:
                base: Any = super()  # the stubs do not have _provide
                engine = base._provide(args, kwargs)
                base.reset()  # it is kept here
            if loop is None:
                self._homeless = engine
                return engine
            built = self._engines()
            built[loop] = engine
            abandoned = [built.pop(other) for other in list(built) if other.is_closed()]
        for other_engine in abandoned:  # as asyncio.run() leaves them, time after time
            cut_off(other_engine.sync_engine, quietly=True)
        return engine

    def reset(self) -> Any:
        """Retire the engines: their idle connections close now, in their own loops, and those in use when their units end."""
        for wait in self.begin_to_retire():
            wait_outside(wait)
        return super().reset()

    def begin_to_retire(self) -> list[Callable[[], None]]:
        """Begin to retire the engines; return what waits until their loops have done so."""
        waits = []
        for loop, engine in list(self._engines().items()):
            # Begun before it is forgotten: a loop that is about to end either waits for the disposal, or still finds its engine.
            waits.append(begin_to_retire(engine, loop))
            with self.storage_lock:
                if self._engines().get(loop) is engine:
                    del self._engines()[loop]
        with self.storage_lock:
            homeless, self._homeless = self._homeless, None
        return waits if homeless is None else [*waits, begin_to_retire(homeless, None)]

    def _engines(self) -> dict[AbstractEventLoop, AsyncEngine]:
        if self._built is None or self._process != os.getpid():  # the loops of a forked child's parent don't run here
            self._built, self._process = {}, os.getpid()
        return self._built

    def taken_away(self) -> list[tuple[AsyncEngine, AbstractEventLoop | None]]:
        """Give all engines away, with their loops, to be disposed."""
        with self.storage_lock:
            built, self._built = self._engines(), None
            homeless, self._homeless = self._homeless, None
        return [*((engine, loop) for loop, engine in built.items()), *([] if homeless is None else [(homeless, None)])]

    def give_back(self, engines: Iterable[tuple[AsyncEngine, AbstractEventLoop | None]]) -> None:
        """Take engines that were given away, and retire those of the meantime."""
        with self.storage_lock:
            meanwhile = self.taken_away()
            for engine, loop in engines:
                if loop is None:
                    self._homeless = engine
                else:
                    self._engines()[loop] = engine
        for engine, loop in meanwhile:
            retire_async(engine, loop)

    @property
    def is_built(self) -> bool:
        """Whether there is an engine to dispose."""
        return self._homeless is not None or bool(self._engines())

    @property
    def is_built_here(self) -> bool:
        """Whether there is one of the running event loop, which has to be awaited to dispose it."""
        loop = running_loop()
        return loop is not None and loop in self._engines()
