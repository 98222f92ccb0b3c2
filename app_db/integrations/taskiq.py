"""taskiq: a task is a unit of work. It commits before its message is acknowledged.

>>> from sqlalchemy.ext.asyncio import AsyncSession
>>> from taskiq import InMemoryBroker
>>> from app_db import Container
>>> from app_db.integrations.taskiq import UnitOfWorkMiddleware, provided
>>> container = Container()
>>> broker = InMemoryBroker().with_middlewares(UnitOfWorkMiddleware(container))
>>> @broker.task
... async def order(sku: str, session: AsyncSession = provided(container.writer.async_session)) -> None:
...     ...
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from contextvars import Context, ContextVar
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any

from dependency_injector.providers import Provider
from taskiq import AsyncBroker, TaskiqDepends, TaskiqMessage, TaskiqMiddleware, TaskiqResult

from app_db import DatabaseContainer, DeferredUnit
from app_db.errors import CommitUnconfirmed, HookFailed, InvalidUse, OutcomeUnknown, PartialCommit
from app_db.integrations._containers import awaited, require_container

__all__ = ["UnitOfWorkMiddleware", "provided"]

_NOT_TO_BE_REPEATED = (CommitUnconfirmed, HookFailed, OutcomeUnknown, PartialCommit)


def provided(provider: Provider[Any]) -> Any:
    """Return a dependency of a task on what a provider of the container provides. Nothing has to be wired.

    The default `provided(container.writer.async_session)` is the session of the task's unit.
    """

    async def dependency() -> Any:
        return await awaited(provider)

    return TaskiqDepends(dependency)


class UnitOfWorkMiddleware(TaskiqMiddleware):
    """Gives each task a unit of work. It ends when the task's function does. A task that uses no session opens no connection.

    A function that returns commits, and one that raises aborts. A COMMIT that fails is the task's error. `read_only`,
    `isolation` and `timeout` say how units run, as in `container.transaction()`. A worker initializes the container's
    resources, and disposes its engines at its end.
    """

    def __init__(
        self,
        container: DatabaseContainer,
        *,
        read_only: bool = False,
        isolation: str | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__()
        require_container(container)
        self.container = container
        self._unit = container.deferred_unit(read_only=read_only, isolation=isolation, timeout=timeout, awaited=True)

    def set_broker(self, broker: AsyncBroker) -> None:
        """Belong to a broker. It may have one middleware of this class."""
        if any(isinstance(other, UnitOfWorkMiddleware) and other is not self for other in broker.middlewares):
            raise InvalidUse("The broker has a UnitOfWorkMiddleware already", "Add one")
        super().set_broker(broker)

    async def startup(self) -> None:
        """Initialize the container's resources in a worker."""
        if self.broker.is_worker_process:
            await awaited(self.container.init_resources)

    async def shutdown(self) -> None:
        """Dispose the container's engines in a worker."""
        if self.broker.is_worker_process:
            await self.container.shutdown_resources()

    def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Make a unit known to the task and to what it depends on."""
        task = self.broker.find_task(message.task_name)
        if task is not None and not hasattr(task.original_func, "ends_unit"):
            task.original_func = _ending_unit(task.original_func)
        unit = self._unit.anew()
        unit.begun_by = lambda: None if task is None else task.original_func
        _running.set(_Running(unit, message, _running.get()))
        return message

    async def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """Abort the unit of a task whose function was not called, because something that it depends on failed."""
        running = _running.get()
        if running is not None and running.message is message:
            _running.set(running.outer)
            await running.close()


class _Running:
    """A task that runs, and its unit of work."""

    def __init__(self, unit: DeferredUnit, message: TaskiqMessage, outer: _Running | None) -> None:
        self.unit, self.message, self.outer = unit, message, outer
        self.was_called = False
        self.pid = os.getpid()
        self._stack = ExitStack()
        self._stack.enter_context(unit)
        unit.transaction()  # begins it, so that it is not the sender's in the same process; it opens no connection

    async def commit(self, result: Any) -> Any:
        """Commit, and return the result of the task's function."""
        try:
            await self.unit.end_awaited()
        except asyncio.CancelledError:
            if not self.unit.has_committed:  # else the cancellation came during COMMIT, and was too late
                raise
        except _NOT_TO_BE_REPEATED:
            self.message.labels["retry_on_error"] = False  # taskiq's middlewares that retry look at it
            raise
        return result

    async def abort(self, error: BaseException) -> Any:
        """Abort, and raise the error of the task's function."""
        await self.unit.end_awaited(error)
        raise error

    async def close(self) -> None:
        """Leave the unit. Abort it if it has not ended."""
        with self._stack:
            if not self.unit.is_over:
                await self.unit.end_awaited(commit=False)


_running: ContextVar[_Running | None] = ContextVar("app_db.running_task", default=None)


def _ending_unit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a task's function that ends the unit of its task, and does nothing else where it is called as a function.

    The end of the function, unlike `post_execute`, comes before the acknowledgement and before middlewares look at errors.
    """
    if iscoroutinefunction(function):

        @wraps(function)
        async def run(*args: Any, **kwargs: Any) -> Any:
            running = _to_be_ended()
            if running is None:
                return await function(*args, **kwargs)
            try:
                result = await function(*args, **kwargs)
            except GeneratorExit:  # a coroutine that is being closed can't await
                raise
            except BaseException as error:  # noqa: BLE001  # it is raised again
                return await running.abort(error)
            return await running.commit(result)

        ending: Callable[..., Any] = run
    else:

        @wraps(function)
        def run_in_thread(*args: Any, **kwargs: Any) -> Awaitable[Any] | Any:
            if (known := _running.get()) is not None and known.pid != os.getpid():  # a process pool has forked inside of a task
                return Context().run(function, *args, **kwargs)
            running = _to_be_ended()
            if running is None:
                return function(*args, **kwargs)
            try:
                return running.commit(function(*args, **kwargs))  # taskiq awaits it in its event loop
            except BaseException as error:  # noqa: BLE001  # it is raised again
                return running.abort(error)

        ending = run_in_thread
    module = sys.modules.get(function.__module__)
    if module is not None and getattr(module, function.__qualname__, None) is function:
        setattr(module, function.__qualname__, ending)  # taskiq's process pools look for it by its name
    vars(ending)["ends_unit"] = True
    return ending


def _to_be_ended() -> _Running | None:
    """Return the task whose function is called, unless it calls another task as a function."""
    running = _running.get()
    if running is None or running.was_called:
        return None
    running.was_called = True
    return running
