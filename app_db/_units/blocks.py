"""The context manager of units of work."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Coroutine
from inspect import CO_COROUTINE
from types import TracebackType
from typing import TYPE_CHECKING, Never

from app_db._compat.frames import frame_at
from app_db._liveness import NOT_ENTERED, ExitMethod, WithBlock, liveness_of
from app_db._units.coordinator import Coordinator
from app_db._units.options import Options
from app_db._units.propagation import role_for
from app_db._units.roles import Role
from app_db._units.unit_of_work import UnitOfWork


class Block(WithBlock):
    """A context manager for `with` and `async with`. It enters the block's role, and leaves it when the block ends."""

    __slots__ = ("_coordinator", "_function", "_options", "may_pass", "role")

    def __init__(self, coordinator: Coordinator, options: Options, function: Callable[..., object] | None = None) -> None:
        self._coordinator = coordinator
        self._options = options
        self._function = function
        self.role: Role | None = None
        self.liveness = NOT_ENTERED
        self.may_pass = False
        """Whether the block failed with a retryable error, and can be run again."""

    def __enter__(self) -> UnitOfWork:
        liveness = self.liveness  # of the `with` statement, which has read `__exit__` already
        if liveness() is None:
            liveness = self.liveness_to_enter()
        role = role_for(self._coordinator, self._options, liveness)
        role.begun_by = self._function
        unit = role.enter()
        self.role = role
        return unit

    async def __aenter__(self) -> UnitOfWork:
        role = role_for(self._coordinator, self._options, self.liveness_to_enter(), asynchronous=True)
        role.begun_by = self._function
        unit = await _entered(role) if role.waits_to_begin() else role.enter()
        self.role = role
        return unit

    def _exit(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        role = self.role
        if role is None:
            return
        self.role = None
        try:
            role.leave(error)
        finally:
            self.may_pass = role.may_pass
        role.liveness.torn = None

    def _exit_by_stack(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        role = self.role
        try:
            if role is not None:
                with _Leaving(role):
                    self._exit(kind, error, trace)
        except BaseException:
            if role is not None:
                role.torn_down()  # does nothing if it has ended
            raise

    def _start_leaving(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Coroutine[object, Never, None]:
        # The `async with` statement calls this, drops its reference to it, and awaits the returned coroutine.
        role, self.role = self.role, None
        if role is None:
            return self._leave_awaited(None, error)
        try:
            if _is_closing(error) and frame_at(1).f_code.co_flags & CO_COROUTINE:
                role.torn_down()  # a coroutine that is being closed can't await; an async generator can
                return self._leave_awaited(None, error)
            leaving = self._leave_awaited(role, error)
            role.held_by(liveness_of(leaving))
            return leaving
        except BaseException:
            role.torn_down()
            raise

    async def _leave_awaited(self, role: Role | None, error: BaseException | None) -> None:
        if role is not None:
            with _Leaving(role):
                try:
                    await _left(role, error)
                finally:
                    self.may_pass = role.may_pass

    if TYPE_CHECKING:

        async def __aexit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
        ) -> None: ...

    else:
        __exit__ = ExitMethod(_exit, _exit_by_stack)
        __aexit__ = ExitMethod(_start_leaving)


class _Leaving(WithBlock):
    """Keeps a role alive while it is left.

    The statement that entered it does not: `async with` and ExitStack have dropped the exit method
    by then.
    """

    __slots__ = ("_role",)

    def __init__(self, role: Role) -> None:
        self._role = role

    def __enter__(self) -> None:
        self._role.held_by(self.liveness_to_enter())

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            self.liveness.torn = None


def _is_closing(error: BaseException | None) -> bool:
    """Return whether the error comes from closing a coroutine, which may have awaited nevertheless (RuntimeError)."""
    return isinstance(error, GeneratorExit) or (isinstance(error, RuntimeError) and "ignored GeneratorExit" in str(error))


async def _entered(role: Role) -> UnitOfWork:
    """Enter a role whose beginning may wait for a database, and return its unit."""
    from app_db._units.to_the_end import to_the_end

    entered: list[UnitOfWork] = []
    try:
        await to_the_end(lambda: entered.append(role.enter()))
    except CancelledError as error:
        if entered:  # the block won't run, so nothing else leaves it
            await to_the_end(role.leave, error)
            role.liveness.torn = None
        raise
    return entered[0]


async def _left(role: Role, error: BaseException | None) -> None:
    if role.waits_to_end():
        from app_db._units.to_the_end import to_the_end

        await to_the_end(role.leave, error)
    else:
        role.leave(error)
