"""The `with` statements of units of work: they enter and leave what a block of code has become."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Coroutine
from inspect import CO_COROUTINE
from types import TracebackType
from typing import TYPE_CHECKING, Any

from app_db._compat.frames import frame_at
from app_db._liveness import ExitMethod, WithBlock, liveness_of
from app_db._units.coordinator import Coordinator
from app_db._units.options import Options
from app_db._units.propagation import Part, part_for
from app_db._units.unit_of_work import UnitOfWork


class Block(WithBlock):
    """One block of code, for `with` or `async with`."""

    __slots__ = ("_coordinator", "_options", "may_pass", "part")

    def __init__(self, coordinator: Coordinator, options: Options) -> None:
        self._coordinator = coordinator
        self._options = options
        self.part: Part | None = None
        self.may_pass = False
        """Whether the block failed for a reason that may pass, and can be run again."""

    def _enter(self, *, asynchronous: bool) -> Part:
        return part_for(self._coordinator, self._options, self.liveness_to_enter(), asynchronous=asynchronous)

    def __enter__(self) -> UnitOfWork:
        part = self._enter(asynchronous=False)
        unit = part.enter()
        self.part = part
        return unit

    def _exit(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        part = self.part
        if part is not None:
            self._leave_part(part, error)
            part.liveness.torn = None

    def _exit_by_stack(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        part = self.part
        try:
            if part is not None:
                with _Leaving(part):
                    self._leave_part(part, error)
        except BaseException:
            if part is not None:
                part.torn_down()  # unless it has ended
            raise

    def _leave_part(self, part: Part, error: BaseException | None) -> None:
        self.part = None
        try:
            part.leave(error)
        finally:
            self.may_pass = part.may_pass

    async def __aenter__(self) -> UnitOfWork:
        part = self._enter(asynchronous=True)
        unit = await _entered(part) if part.waits_to_begin() else part.enter()
        self.part = part
        return unit

    def _start_leaving(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Coroutine[Any, Any, None]:
        # Called by the statement, which then lets go of what it called, and waits for what it was given.
        part, self.part = self.part, None
        if part is None:
            return self._leave_awaited(None, error)
        try:
            if _is_closing(error) and frame_at(1).f_code.co_flags & CO_COROUTINE:
                part.torn_down()  # the coroutine can wait for nothing any more; an asynchronous generator can
                return self._leave_awaited(None, error)
            leaving = self._leave_awaited(part, error)
            part.held_by(liveness_of(leaving))
            return leaving
        except BaseException:
            part.torn_down()
            raise

    async def _leave_awaited(self, part: Part | None, error: BaseException | None) -> None:
        if part is not None:
            with _Leaving(part):
                try:
                    await _left(part, error)
                finally:
                    self.may_pass = part.may_pass

    if TYPE_CHECKING:

        async def __aexit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
        ) -> None: ...

    else:
        __exit__ = ExitMethod(_exit, _exit_by_stack)
        __aexit__ = ExitMethod(_start_leaving)


class _Leaving(WithBlock):
    """Keeps a part alive while it is left, where the statement that entered it does not.

    `async with` has let go of it by then, and an ExitStack has taken it out of what it holds.
    """

    __slots__ = ("_part",)

    def __init__(self, part: Part) -> None:
        self._part = part

    def __enter__(self) -> None:
        self._part.held_by(self.liveness_to_enter())

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            self.liveness.torn = None


def _is_closing(error: BaseException | None) -> bool:
    """Return whether an error comes of a coroutine's being closed, by the second kind because it awaited something inside."""
    return isinstance(error, GeneratorExit) or (isinstance(error, RuntimeError) and "ignored GeneratorExit" in str(error))


async def _entered(part: Part) -> UnitOfWork:
    """Enter a part for which a database has to be waited for, and return what it gives."""
    from app_db._units.to_the_end import to_the_end

    entered: list[UnitOfWork] = []
    try:
        await to_the_end(lambda: entered.append(part.enter()))
    except CancelledError as error:
        if entered:  # the block won't run, and won't be left
            await to_the_end(part.leave, error)
            part.liveness.torn = None
        raise
    return entered[0]


async def _left(part: Part, error: BaseException | None) -> None:
    """Leave a part, for which a database may have to be waited for."""
    if part.waits_to_end():
        from app_db._units.to_the_end import to_the_end

        await to_the_end(part.leave, error)
    else:
        part.leave(error)
