"""Units of work as application code writes them: `with container.transaction():` and `@transactional`."""

from __future__ import annotations

import asyncio
import inspect
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import update_wrapper, wraps
from typing import Any, ParamSpec, TypeVar, cast, overload
from weakref import ReferenceType, WeakKeyDictionary, ref

from dependency_injector import providers
from dependency_injector.wiring import Provide, inject
from transaction.interfaces import NoTransaction

from app_db._units.blocks import Block
from app_db._units.coordinator import Coordinator, build_coordinator
from app_db._units.options import Options, Propagation, options_from
from app_db._units.unit_of_work import UnitOfWork
from app_db.errors import InvalidUse, NotWired, NoUnitOfWork

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class Transaction(Block):
    """A unit of work to be: for `with`, for `async with`, and `run(function)` for one that may take several attempts.

    It commits what was written through the container's sessions when the block ends, and rolls all of it back when the block
    raises. One object serves one block at a time; `container.transaction()` makes them.
    """

    __slots__ = ()

    def __enter__(self) -> UnitOfWork:
        self._refuse_misuse()
        return super().__enter__()

    async def __aenter__(self) -> UnitOfWork:
        self._refuse_misuse()
        return await super().__aenter__()

    def _refuse_misuse(self) -> None:
        if self._options.attempts > 1:
            raise InvalidUse(
                "A `with` block can't be run again, so it can't have attempts",
                "Put the block in a function and decorate it with @transactional(attempts=...), or use "
                "container.transaction(...).run(function)",
            )
        if self.role is not None:
            raise InvalidUse("This transaction object is in use already", "Call container.transaction() for every block")

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` in the unit of work, again while attempts are left when it fails for a reason that may pass.

        What it returns for a coroutine function has to be awaited.
        """
        run: Any = run_awaited_in_unit if inspect.iscoroutinefunction(function) else run_in_unit
        return cast("R", run(self._coordinator, self._options, function, args, kwargs))


def run_in_unit(
    coordinator: Coordinator, options: Options, function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> R:
    """Call a function in a unit of work, again while attempts are left when it fails for a reason that may pass."""
    attempt = 1
    while True:
        block = Block(coordinator, options)
        try:
            with block:  # OwnUnit.enter begins the unit, OwnUnit.leave commits or aborts it
                return function(*args, **kwargs)
        except Exception:
            if attempt >= options.attempts or not block.may_pass:
                raise
        time.sleep(_pause_after(attempt, options))
        attempt += 1


async def run_awaited_in_unit(
    coordinator: Coordinator,
    options: Options,
    function: Callable[..., Awaitable[R]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> R:
    """Do the same with a coroutine function."""
    attempt = 1
    while True:
        block = Block(coordinator, options)
        try:
            async with block:
                return await function(*args, **kwargs)
        except Exception:
            if attempt >= options.attempts or not block.may_pass:
                raise
        await asyncio.sleep(_pause_after(attempt, options))
        attempt += 1


def _pause_after(attempt: int, options: Options) -> float:
    return random.uniform(0, min(1.0, options.backoff * 2 ** (attempt - 1)))  # noqa: S311  # no secret


_DEFAULT = Options()


def build_transaction(
    coordinator: Coordinator, propagation: Propagation | str = Propagation.REQUIRED, **options: Any
) -> Transaction:
    """Return a unit of work to be. The options are those of `transactional` that a unit has: all but `container`."""
    if propagation is Propagation.REQUIRED and not options:
        return Transaction(coordinator, _DEFAULT)
    return Transaction(coordinator, options_from(propagation, **options))


def build_unit(coordinator: Coordinator) -> UnitOfWork:
    """Return the unit of work that is under way, or raise NoUnitOfWork."""
    try:
        return UnitOfWork(coordinator.get())
    except NoTransaction:
        raise NoUnitOfWork("container.unit()") from None


# ---- the decorator ---------------------------------------------------------------------------------------------------


@overload
def transactional(function: F, /) -> F: ...


@overload
def transactional(
    *,
    propagation: Propagation | str = ...,
    read_only: bool = ...,
    isolation: str | None = ...,
    timeout: float | None = ...,
    attempts: int = ...,
    backoff: float = ...,
    commit_on: type[BaseException] | Iterable[type[BaseException]] = ...,
    container: str = ...,
) -> Callable[[F], F]: ...


def transactional(function: Any = None, /, *, container: str = "<container>", **options: Any) -> Any:
    """Run a function in a unit of work, with its `Provide[...]` defaults injected inside it.

    The unit begins before the injection and ends after the function: it commits when the function returns and aborts when it
    raises. The container is the one that is wired to the function's module; where that is an application's own container
    with several database containers in it, `container` names which.

    >>> from app_db import Container, DatabaseSettings, transactional
    >>> from dependency_injector.wiring import Provide
    >>> from sqlalchemy import text
    >>> from sqlalchemy.orm import Session
    >>> @transactional
    ... def answer(session: Session = Provide[Container.writer_session]) -> int:
    ...     return session.execute(text("SELECT 42")).scalar_one()
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> container.wire(modules=[__name__])
    >>> answer()
    42

    `propagation` says what happens inside another unit; `read_only`, `isolation` and `timeout` (seconds) are the unit's;
    `attempts` is how often it may be tried when it fails for a reason that may pass, with a random pause that grows from
    `backoff` seconds; exceptions of the kinds in `commit_on` commit the unit and are then raised.
    """
    prepared = options_from(**options)

    def decorate(decorated: Callable[..., Any]) -> Callable[..., Any]:
        return _run_in_unit(decorated, prepared, container)

    return decorate if function is None else decorate(function)


def _run_in_unit(function: Callable[..., Any], options: Options, container_id: str) -> Callable[..., Any]:
    name = f"{function.__module__}.{function.__qualname__}"
    if isinstance(function, (classmethod, staticmethod)):
        kind = type(function).__name__
        raise InvalidUse(
            f"@transactional can't decorate the {kind} {name}", f"Write @{kind} above it, and @transactional next to the function"
        )
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise InvalidUse(
            f"@transactional can't decorate {name}, which is a generator function",
            "Decorate a function or a coroutine function; a generator's body would run after its unit of work had ended",
        )
    parameters = inspect.signature(function).parameters
    markers = {parameter: given.default for parameter, given in parameters.items() if _is_marker(given.default)}
    injected = _inject_checked(function, name, markers) if markers else function
    names = [parameter for parameter, given in parameters.items() if given.kind is given.POSITIONAL_OR_KEYWORD]
    first_injected = min((names.index(marker) for marker in markers if marker in names), default=sys.maxsize)

    def by_keyword(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        # Injection goes by keyword, and would give a second value to an argument that is given by position.
        kwargs.update(zip(names[first_injected:], args[first_injected:], strict=False))
        return args[:first_injected]

    def run(*args: Any, _app_db_container: Any = Provide[container_id], **kwargs: Any) -> Any:
        if len(args) > first_injected:
            args = by_keyword(args, kwargs)
        return run_in_unit(_coordinator_in(_app_db_container, function, name), options, injected, args, kwargs)

    async def run_awaited(*args: Any, _app_db_container: Any = Provide[container_id], **kwargs: Any) -> Any:
        if len(args) > first_injected:
            args = by_keyword(args, kwargs)
        return await run_awaited_in_unit(_coordinator_in(_app_db_container, function, name), options, injected, args, kwargs)

    # inject() sees `run` alone, so that wiring does not inject the sessions before the unit has begun; dressed up as the
    # decorated function afterwards, it belongs to that function's module, and wiring finds it there.
    return update_wrapper(inject(run_awaited if inspect.iscoroutinefunction(function) else run), function)


def _is_marker(value: object) -> bool:
    return getattr(type(value), "__IS_MARKER__", False) is True


def _inject_checked(function: Callable[..., Any], name: str, markers: dict[str, Any]) -> Callable[..., Any]:
    """Return `function` with its markers injected, refusing to call it with one that was not replaced."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for parameter, marker in markers.items():
            if getattr(type(kwargs.get(parameter, marker)), "__IS_MARKER__", False) is True:
                raise NotWired(name, function.__module__, parameter, f"{type(marker).__name__}[{marker.provider!r}]")
        return function(*args, **kwargs)

    return inject(checked)


_coordinators: WeakKeyDictionary[Any, ReferenceType[providers.Provider[Coordinator]]] = WeakKeyDictionary()


def _coordinator_in(container: Any, function: Callable[..., Any], name: str) -> Coordinator:
    """Return the coordinator of the database container that `container` is, or that is in it."""
    reference = _coordinators.get(container)
    provider = None if reference is None else reference()
    if provider is None:
        if _is_marker(container):
            raise NotWired(name, function.__module__)
        provider = _find_coordinator(container, name)
        _coordinators[container] = ref(provider)
    return provider()


def _find_coordinator(container: Any, name: str) -> providers.Provider[Coordinator]:
    found = [
        provider for provider in container.traverse(types=[providers.BaseSingleton]) if provider.provides is build_coordinator
    ]
    if len(found) == 1:
        return cast("providers.Provider[Coordinator]", found[0])
    count = "no database container" if not found else f"{len(found)} database containers"
    raise InvalidUse(
        f"The container that is wired to the module of {name} has {count} in it",
        "Name the one to use: @transactional(container='NAME')",
    )
