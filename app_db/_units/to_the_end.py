"""Run the synchronous core from coroutines, over SQLAlchemy's greenlet bridge, and complete it despite cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import Generic, ParamSpec, TypeVar

from sqlalchemy.util.concurrency import greenlet_spawn

from app_db._compat.asyncio import begin_unseen, outlast
from app_db._units.owned_transactions import acting_for

P = ParamSpec("P")
R = TypeVar("R")


async def to_the_end(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a synchronous function that may await coroutines, on behalf of the calling task, and return its result.

    If the task is cancelled meanwhile, CancelledError is raised after the function is done: a
    commit must not stop halfway. The same holds for an exception from a signal handler.
    """
    action = _Action(partial(function, *args, **kwargs), asyncio.current_task())
    context = copy_context()
    task = cancelled = interruption = None
    try:
        try:
            task = begin_unseen(action.run(), context=context)
            cancelled = await outlast(task)
        except BaseException as error:
            if task is None or not action.has_begun or isinstance(error, GeneratorExit):
                # A coroutine that is being closed can't await.
                action.is_wanted = False
                if task is not None:
                    task.cancel()
                raise
            interruption = error
            cancelled = await outlast(task)
        _take_over(context)
        if not task.cancelled() and task.exception() is not None:
            action.error = task.exception()  # interrupted before or after it called the function
        stopped_by = interruption or cancelled
        if stopped_by is not None:
            if action.error is None:
                raise stopped_by
            try:
                raise action.error
            except BaseException:  # noqa: BLE001  # both happened; the task must end by the interruption
                raise stopped_by  # noqa: B904  # its context is the error
        return action.result()
    finally:
        del task, cancelled, interruption, action  # breaks the cycle between the error and this frame


class _Action(Generic[R]):
    """A function that runs in a task of its own, and its result or error."""

    is_wanted = True
    has_begun = False
    error: BaseException | None = None
    _result: R

    def __init__(self, function: Callable[[], R], owner: asyncio.Task[object] | None) -> None:
        self._function = function
        self._owner = owner

    async def run(self) -> None:
        """Call the function, and keep its error: the waiting task may be interrupted and never read it from this task."""
        if not self.is_wanted:
            return
        self.has_begun = True
        try:
            with acting_for(self._owner):
                self._result = await greenlet_spawn(self._function)
        except BaseException as error:  # noqa: BLE001  # raised by `result`
            self.error = error

    def result(self) -> R:
        error, self.error = self.error, None
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error


def _take_over(context: Context) -> None:
    """Copy the variables that the other task has set into the current context."""
    for variable, value in context.items():
        if variable.get(None) is not value:
            variable.set(value)
