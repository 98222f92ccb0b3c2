"""Celery: a task is a unit of work. It commits before its result is stored and its message is acknowledged.

>>> from celery import Celery
>>> from app_db import Container
>>> from app_db.integrations.celery import install
>>> app = Celery("shop", broker="redis://localhost")
>>> container = Container()
>>> install(app, container, attempts=3)
>>> @app.task
... def order(sku: str) -> None:
...     container.writer.session()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ClassVar

from celery import Celery, current_app, signals
from celery.app.task import Task as CeleryTask
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.imports import symbol_by_name
from kombu.serialization import dumps
from pydantic import BaseModel

from app_db import DatabaseContainer
from app_db.errors import AppDbError, CommitUnconfirmed, HookFailed, InvalidUse, NoUnitOfWork, OutcomeUnknown, PartialCommit
from app_db.integrations._containers import require_container

__all__ = ["SoftTimeLimitInCommit", "Task", "install"]


class SoftTimeLimitInCommit(SoftTimeLimitExceeded):  # type: ignore[misc]  # Celery has no type hints
    """The soft time limit ended a task during its COMMIT. The text says whether the databases have committed."""


class Task(CeleryTask):  # type: ignore[misc]  # as above
    """The base of tasks that are units of work. `install` makes it the base of all tasks of an application.

    `unit` is an option of a task: `@app.task(unit={"attempts": 3})` changes the options of its unit of work, and `unit=False`
    runs it without one. Errors after which the databases have committed, or may have, are not retried by `autoretry_for`.
    """

    unit: Mapping[str, Any] | bool = True
    dont_autoretry_for: ClassVar[tuple[type[BaseException], ...]] = (
        *(CommitUnconfirmed, HookFailed, OutcomeUnknown, PartialCommit, SoftTimeLimitInCommit),
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        run = cls.__dict__.get("run")
        if run is not None:  # before Celery wraps it: what the unit raises is then retried by `autoretry_for`
            cls.run = _in_unit(cls, run)

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Look at the options as soon as the task belongs to an application."""
        super().on_bound(app)
        container, options = _installed(app, cls.name)
        container.transaction(**_options_of(cls.unit, options, cls.name))

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task here, outside of the unit under way: as in a worker, its unit is its own."""
        container, _ = _installed(self.app, self.name)
        with container.transaction(propagation="not_supported"):
            return super().apply(*args, **kwargs)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Send the task when the unit of work under way has committed, and never if it aborts. Without a unit, send it now."""
        self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(self, args: Any = None, kwargs: Any = None, **options: Any) -> None:
        """Do the same with the options of `apply_async`. Arguments that can't be sent raise an error now, before the commit."""
        container, _ = _installed(self.app, self.name)
        check: Callable[..., object] | None = getattr(self, "__header__", None)
        if self.typing and check is not None:
            check(*(args or ()), **(kwargs or {}))
        if not any(isinstance(value, BaseModel) for value in (*(args or ()), *(kwargs or {}).values())):  # Celery dumps models
            dumps((args, kwargs), options.get("serializer") or self.serializer)  # type: ignore[no-untyped-call]
        try:
            unit = container.unit()
        except NoUnitOfWork:
            self.apply_async(args, kwargs, **options)
        else:
            unit.on_commit(self.apply_async, args, kwargs, **options)


def install(app: Celery, container: DatabaseContainer, **options: Any) -> None:
    """Make each task of an application a unit of work, with the options of `container.transaction()`.

    Workers initialize the container's resources, and dispose its engines at their end. Call it before tasks are made. Raises
    InvalidUse if there are some, or if the application has another container already.
    """
    require_container(container)
    container.transaction(**options)  # looks at the options
    if (known := getattr(app, "app_db", None)) is not None:
        if known != (container, options):
            raise InvalidUse(f"The Celery application {app.main!r} has a container already", "Call install() once")
        return
    if app.finalized or "Task" in vars(app):
        raise InvalidUse(
            f"Tasks of the Celery application {app.main!r} have been made already, without units of work",
            "Call install() right after Celery(…). A base class of your own is given there: Celery(…, task_cls=Base)",
        )
    base: Any = symbol_by_name(app.task_cls)
    bases = (base,) if issubclass(base, Task) else (Task,) if issubclass(Task, base) else (Task, base)
    app.task_cls = bases[0] if len(bases) == 1 else type("Task", bases, {})
    vars(app)["app_db"] = (container, options)


def _installed(app: Celery, task: str | None) -> tuple[DatabaseContainer, dict[str, Any]]:
    found: tuple[DatabaseContainer, dict[str, Any]] | None = getattr(app, "app_db", None)
    if found is None:
        raise InvalidUse(
            f"The Celery application {app.main!r} of the task {task!r} has no database container",
            "Call app_db.integrations.celery.install(app, container) right after Celery(…)",
        )
    return found


def _options_of(unit: object, options: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    if not isinstance(unit, (bool, Mapping)):
        raise InvalidUse(
            f"The task {task!r} has unit={unit!r}", 'Give options, unit={"attempts": 3}, or unit=False for a task without a unit'
        )
    return {**options, **unit} if isinstance(unit, Mapping) else {**options}


def _in_unit(cls: type[Task], run: Any) -> Any:
    """Return the method `run` of a class, which may be static, so that it runs in a unit of work."""
    is_static = isinstance(run, staticmethod)
    function: Callable[..., Any] = run.__func__ if is_static else run

    @wraps(function)
    def run_in_unit(*args: Any, **kwargs: Any) -> Any:
        task = cls if is_static else args[0]
        if task.unit is False:
            return function(*args, **kwargs)
        has_returned = False

        @wraps(function)  # the unit is named after it
        def work() -> Any:
            nonlocal has_returned
            has_returned = False
            result = function(*args, **kwargs)
            has_returned = True
            return result

        container, options = _installed(task.app, task.name)
        try:
            return container.transaction(**_options_of(task.unit, options, task.name)).run(work)
        except SoftTimeLimitExceeded as error:
            notes = getattr(error, "__notes__", None)
            if has_returned and notes:  # it came during COMMIT; Celery's results keep arguments, and no notes
                raise SoftTimeLimitInCommit(*notes) from error
            raise

    return staticmethod(run_in_unit) if is_static else run_in_unit


# ---- workers ---------------------------------------------------------------------------------------------------------------


def _start(sender: Any, **_: Any) -> None:
    """Check in a worker, before it has a pool, that it can work. Initialize resources unless its processes do it."""
    container = _container_of(sender.app)
    if container is None:
        return
    pool = sender.pool_cls if isinstance(sender.pool_cls, str) else sender.pool_cls.__module__
    pool = pool.partition(":")[0].rpartition(".")[2]
    if pool in ("gevent", "eventlet"):
        raise SystemExit(f"app_db: units of work don't know the greenlets of the pool {pool}. Use --pool=prefork or threads.")
    try:
        container.settings()
    except AppDbError as error:
        raise SystemExit(f"app_db: {error}") from None
    if pool in ("thread", "threads"):
        container.init_resources()


def _start_process(**_: Any) -> None:
    if (container := _container_of(current_app)) is not None:
        container.init_resources()


def _end(**_: Any) -> None:
    if (container := _container_of(current_app)) is not None:
        container.shutdown_resources()


def _container_of(app: Any) -> DatabaseContainer | None:
    found: tuple[DatabaseContainer, object] | None = getattr(app, "app_db", None)
    return None if found is None else found[0]


signals.worker_init.connect(_start)
signals.worker_process_init.connect(_start_process)
signals.worker_process_shutdown.connect(_end)
signals.worker_shutdown.connect(_end)
