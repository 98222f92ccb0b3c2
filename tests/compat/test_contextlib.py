"""What app_db relies on of contextlib's exit stacks that is not public: the frames of their methods."""

from __future__ import annotations

import dis
import sys
from contextlib import AsyncExitStack, ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

import pytest

from app_db._compat.contextlib import is_about_to_leave, is_entering, is_leaving, stack_of


class Noting:
    """A context manager that notes the frame that enters it, and the one that leaves it."""

    def __init__(self) -> None:
        self.entered: FrameType | None = None
        self.left: list[tuple[FrameType, Any]] = []

    def __enter__(self) -> None:
        self.entered = sys._getframe(1)

    def __exit__(self, *_: object) -> None:
        self._note(sys._getframe(1))

    async def __aenter__(self) -> None:
        self.entered = sys._getframe(1)

    async def __aexit__(self, *_: object) -> None:
        self._note(sys._getframe(1))

    def _note(self, frame: FrameType | None) -> None:
        while frame is not None:
            self.left.append((frame, stack_of(frame)))
            frame = frame.f_back


@pytest.mark.parametrize("new_stack", [ExitStack, AsyncExitStack])
async def test_a_stack_that_enters_and_leaves_is_recognized(new_stack: Any) -> None:
    """Without it, a block that a stack was interrupted in entering or leaving would keep its unit current."""
    noting, awaited = Noting(), Noting()
    stack = new_stack()
    if isinstance(stack, AsyncExitStack):
        async with stack:
            stack.enter_context(noting)
            await stack.enter_async_context(awaited)
    else:
        with stack:
            stack.enter_context(noting)
    for note in (noting, awaited) if isinstance(stack, AsyncExitStack) else (noting,):
        assert note.entered is not None
        assert is_entering(note.entered)
        assert stack_of(note.entered) is stack
        assert any(is_leaving(frame, stack) for frame, _ in note.left)
        assert not any(is_leaving(frame, new_stack()) for frame, _ in note.left)


def test_other_frames_are_no_stacks() -> None:
    @contextmanager
    def around() -> Any:
        yield

    frame = sys._getframe()
    with around():
        assert not is_entering(frame)
        assert not is_leaving(frame, None)


async def leave(stack: AsyncExitStack) -> None:
    async with stack:
        pass


def test_a_statement_that_has_called_exit_and_awaits_it_next_is_recognized() -> None:
    """Without it, a block in an AsyncExitStack would keep its unit current after a signal that arrives there."""
    stack = AsyncExitStack()
    held: Any = leave(stack)
    steps = list(dis.get_instructions(leave))

    def recognized(of: object) -> list[str]:
        frame = held.cr_frame
        return [step.opname for step in steps if is_about_to_leave(TracebackType(None, frame, step.offset, 1), of)]

    found, of_another = recognized(stack), recognized(AsyncExitStack())
    held.close()
    assert found == ["CALL", "GET_AWAITABLE", "WITH_EXCEPT_START", "GET_AWAITABLE"]
    assert of_another == []
