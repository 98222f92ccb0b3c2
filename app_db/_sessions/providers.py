"""The providers of a container: views on its state, and what resets and closes the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dependency_injector import providers

from app_db._sessions.state import State, StateHolder

T = TypeVar("T")
R = TypeVar("R")


class Lasting(providers.ThreadSafeSingleton[Any]):
    """A singleton that `reset_singletons()` leaves alone, because units under way stand on it."""

    def reset(self) -> Any:
        """Do nothing."""


class HolderProvider(providers.ThreadSafeSingleton[StateHolder]):
    """The holder of a container instance's state.

    `reset_singletons()`, of that container or of one around it, resets the state.
    """

    def reset(self) -> Any:
        """Reset the state, not the holder."""
        self().state.reset()
        return providers.SingletonResetContext(self)


class Held(providers.Callable[T]):
    """A view on the state: it calls a method of the holder with a kind, a name and `build`."""

    def reset(self) -> Any:
        """Forget the object: the next one is made from the settings of that time.

        An engine is retired: idle connections close now, those in use when their units end.
        """
        self._ask(State.forget)
        return providers.SingletonResetContext(self)

    @property
    def is_built(self) -> bool:
        """Whether the object was made."""
        return self._ask(State.has)

    def own(self) -> T:
        """Return what it gives when nothing overrides it."""
        own: T = providers.Callable(self.provides, *self.args)()
        return own

    def _ask(self, method: Callable[..., R]) -> R:
        """Call a method of the state with what this provider is given."""
        given: Sequence[Any] = self.args
        answer: R = providers.Callable(method, given[0].provided.state, *given[1:])()
        return answer


class Lifecycle(providers.Resource[None]):
    """What `init_resources()` and `shutdown_resources()` do, of the container or one around it.

    The first checks two-phase commit, where a connection wants it, and recovers and reflects models,
    where the settings say so; it makes no engine otherwise. The second disposes all engines.
    """

    @property
    def initialized(self) -> bool:
        return self._holder.state.in_use

    def init(self) -> None:
        """Check, and do what `recover_at_start` and `reflect_at_start` say."""
        container = self._holder.container
        container.check()
        if container.settings().recover_at_start:
            container.recovery().settle()
        if container.settings().reflect_at_start:
            container.reflect()

    def is_async_mode_enabled(self) -> bool:
        """Whether `shutdown_resources()` has to be awaited: where a running loop has engines."""
        return self._holder.state.in_use_here

    def shutdown(self) -> Any:
        state = self._holder.state
        return state.close_awaited() if state.in_use_here else state.close()

    @property
    def _holder(self) -> StateHolder:
        holder: StateHolder = self.args[0]()
        return holder
