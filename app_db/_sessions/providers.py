"""The providers that read, reset and close the state of a container."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

from dependency_injector import providers

from app_db._sessions.state import State, StateHolder

T = TypeVar("T")
R = TypeVar("R")


class Lasting(providers.ThreadSafeSingleton[Any]):
    """A singleton that `reset_singletons()` does not reset, because open units use it."""

    def reset(self) -> Any:
        """Do nothing."""


class HolderProvider(providers.ThreadSafeSingleton[StateHolder]):
    """The holder of a container instance's state. `reset_singletons()` resets the state, not the holder."""

    def reset(self) -> providers.SingletonResetContext:
        """Reset the state."""
        self().state.reset()
        return providers.SingletonResetContext(self)


class Held(providers.Callable[T]):
    """A provider of an object in the state. It calls a method of the holder with a kind, a name and `build`."""

    def reset(self) -> providers.SingletonResetContext:
        """Forget the object. The next call makes a new one from the current settings.

        An engine is retired: its idle connections are closed now, the others when their units end.
        """
        self._ask(State.forget)
        return providers.SingletonResetContext(self)

    def __repr__(self) -> str:
        _, kind, name, *_ = cast("tuple[Any, ...]", self.args)
        of = name() if isinstance(name, providers.Object) else name
        return f"<Provider of the {kind}{f' of {of!r}' if of else ''}>"

    @property
    def is_built(self) -> bool:
        return self._ask(State.has)

    def own(self) -> T:
        """Return its object, ignoring overrides."""
        own: T = providers.Callable(self.provides, *self.args)()
        return own

    def _ask(self, method: Callable[..., R]) -> R:
        """Call a method of the state with the arguments of this provider."""
        given: Sequence[providers.Provider[StateHolder]] = self.args
        answer: R = providers.Callable(method, given[0].provided.state, *given[1:])()
        return answer


class Current(providers.Callable[T]):
    """A provider of the current unit's session, from the provider of its scoped session."""

    def __repr__(self) -> str:
        (scoped,) = cast("tuple[Held[Any]]", self.args)
        return repr(scoped).replace("the scoped_session", "the session").replace("the async_scoped_session", "the async session")


class Lifecycle(providers.Resource[None]):
    """The resource behind `init_resources()` and `shutdown_resources()`.

    The first checks two-phase commit if a connection uses it, and recovers and reflects if the
    settings say so. Without these it makes no engine. The second disposes all engines.
    """

    @property
    def initialized(self) -> bool:
        return self._holder.state.in_use

    def init(self) -> None:
        """Check two-phase commit, then recover and reflect if the settings say so."""
        container = self._holder.container
        container.check()
        if container.settings().recover_at_start:
            container.recovery().settle()
        if container.settings().reflect_at_start:
            container.reflect()

    def is_async_mode_enabled(self) -> bool:
        """Return whether `shutdown_resources()` must be awaited, because the running loop has engines."""
        return self._holder.state.in_use_here

    def shutdown(self) -> Awaitable[None] | None:
        state = self._holder.state
        if state.in_use_here:
            return state.close_awaited()
        state.close()
        return None

    @property
    def _holder(self) -> StateHolder:
        holder: StateHolder = self.args[0]()
        return holder


def resources_in_circle(resources: Iterable[providers.BaseResource[Any]]) -> list[providers.BaseResource[Any]]:
    """Return the initialized resources that depend on each other. None of them can be shut down before the others."""
    left = [resource for resource in resources if resource.initialized]
    while True:
        needed = {id(provider) for resource in left for provider in resource.related}
        waiting = [resource for resource in left if id(resource) in needed]
        if len(waiting) == len(left):
            return left
        left = waiting
