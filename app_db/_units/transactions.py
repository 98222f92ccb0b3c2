"""Units of work as application code writes them: `with container.transaction():` and `@transactional`."""

from __future__ import annotations

import asyncio
import inspect
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import fields
from functools import update_wrapper
from typing import Any, ParamSpec, TypeVar, cast, overload
from weakref import ReferenceType, WeakKeyDictionary, ref

from dependency_injector import providers
from dependency_injector.containers import Container
from dependency_injector.wiring import Provide, inject
from transaction.interfaces import NoTransaction

from app_db._units.blocks import Block
from app_db._units.coordinator import Coordinator, build_coordinator
from app_db._units.markers import (
    Function,
    callers_signature,
    evaluated_signature,
    inject_checked,
    is_marker,
    markers_in,
)
from app_db._units.options import Options, Propagation, options_from, signature_of_options
from app_db._units.unit_of_work import UnitOfWork
from app_db.errors import InvalidUse, NotWired, NoUnitOfWork

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., object])


class Transaction(Block):
    """A unit of work that has not begun. Use it with `with`, with `async with`, or by `run(function)`.

    When the block ends, everything that was written through the container's sessions is committed.
    When the block raises, all of it is rolled back. Make one for each block:

    >>> from app_db import Container, DatabaseSettings
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> container.transaction(attempts=3).run(lambda: container.writer_session().get_bind().name)
    'sqlite'
    """

    __slots__ = ()

    def __repr__(self) -> str:
        given = [field.name for field in fields(self._options) if getattr(self._options, field.name) != field.default]
        return f"<transaction({', '.join(f'{name}={getattr(self._options, name)!r}' for name in given)})>"

    def __enter__(self) -> UnitOfWork:
        """Begin, and return the unit. Raises InvalidUse if the object has `attempts`, or is in use."""
        self._refuse_misuse()
        return super().__enter__()

    async def __aenter__(self) -> UnitOfWork:
        """Begin, and return the unit. Raises InvalidUse if the object has `attempts`, or is in use."""
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
        """Call `function(*args, **kwargs)` in the unit of work, and return what it returns.

        If it fails with an error that `retryable` accepts, it is called again while attempts are
        left. For a coroutine function, await the result.
        """
        if inspect.iscoroutinefunction(function):
            return cast("R", run_awaited_in_unit(self._coordinator, self._options, function, args, kwargs))
        return run_in_unit(self._coordinator, self._options, function, args, kwargs)


def run_in_unit(
    coordinator: Coordinator, options: Options, function: Callable[..., R], args: tuple[object, ...], kwargs: dict[str, object]
) -> R:
    """Call a function in a unit of work. Call it again after a retryable error, while attempts are left."""
    attempt = 1
    while True:
        block = Block(coordinator, options, function)
        try:
            with block:  # OwnUnit.enter begins the unit, OwnUnit.leave commits or aborts it
                return function(*args, **kwargs)
        except Exception:
            if attempt >= options.attempts or not block.may_pass:
                raise
        time.sleep(pause_after(attempt, options))
        attempt += 1


async def run_awaited_in_unit(
    coordinator: Coordinator,
    options: Options,
    function: Callable[..., Awaitable[R]],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> R:
    """Do the same as `run_in_unit` with a coroutine function."""
    attempt = 1
    while True:
        block = Block(coordinator, options, function)
        try:
            async with block:
                return await function(*args, **kwargs)
        except Exception:
            if attempt >= options.attempts or not block.may_pass:
                raise
        await asyncio.sleep(pause_after(attempt, options))
        attempt += 1


def pause_after(attempt: int, options: Options) -> float:
    """Return how many seconds to wait before another attempt."""
    return random.uniform(0, min(1.0, options.backoff * 2 ** (attempt - 1)))  # noqa: S311  # no secret


_DEFAULT = Options()


def build_transaction(
    coordinator: Coordinator, propagation: Propagation | str = Propagation.REQUIRED, **options: Any
) -> Transaction:
    """Return a Transaction. The options are those of `transactional`, without `container`."""
    if propagation is Propagation.REQUIRED and not options:
        return Transaction(coordinator, _DEFAULT)
    return Transaction(coordinator, options_from(propagation, **options))


build_transaction.__signature__ = signature_of_options(build_transaction)  # type: ignore[attr-defined]  # `inspect` reads it


def build_unit(coordinator: Coordinator) -> UnitOfWork:
    """Return the current unit of work. Raises NoUnitOfWork if there is none."""
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


def transactional(function: Function | None = None, /, *, container: str = "<container>", **options: Any) -> Function:
    """Return a function that runs the decorated function in a unit of work, with its `Provide[...]` markers injected.

    The unit begins before the injection. It commits when the function returns, and aborts when it
    raises. The markers are defaults, or in the metadata of `Annotated`. Their parameters are not in
    the function's signature.

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

    Options:

    - `propagation`: what happens inside another unit, a `Propagation` or its value
    - `read_only`, `isolation`, `timeout` (in seconds): how the unit runs
    - `attempts`: how often the function may be called if it fails with an error that `retryable` accepts
    - `backoff`: the longest pause before the second attempt, in seconds. It doubles with each attempt
    - `commit_on`: classes of exceptions that commit the unit, and are then raised
    - `container`: the name of the database container. Needed if the wired container contains several

    Raises InvalidUse for generators, class methods and static methods, for options that contradict
    each other, and for a marker in an annotation that can't be evaluated. The function raises
    NotWired when it is called before `container.wire()`.
    """
    prepared = options_from(**options)

    def decorate(decorated: Function) -> Function:
        return _run_in_unit(decorated, prepared, container)

    return decorate if function is None else decorate(function)


def _run_in_unit(function: Function, options: Options, container_id: str) -> Function:
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
    signature = evaluated_signature(function, name)
    markers = markers_in(signature)
    injected = inject_checked(function, name, signature, markers) if markers else function
    names = [parameter for parameter, given in signature.parameters.items() if given.kind is given.POSITIONAL_OR_KEYWORD]
    first_injected = min((names.index(marker) for marker in markers if marker in names), default=sys.maxsize)

    def by_keyword(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, ...]:
        # Injection passes keywords. An argument given by position would get a second value.
        if len(args) > len(names):
            raise TypeError(
                f"{name}() takes {len(names)} positional arguments at most, since {names[first_injected]!r} is injected, but "
                f"{len(args)} were given"
            )
        kwargs.update(zip(names[first_injected:], args[first_injected:], strict=False))
        return args[:first_injected]

    def run(*args: object, _app_db_container: Container = Provide[container_id], **kwargs: object) -> object:
        if len(args) > first_injected:
            args = by_keyword(args, kwargs)
        return run_in_unit(_coordinator_in(_app_db_container, function, name), options, injected, args, kwargs)

    async def run_awaited(*args: object, _app_db_container: Container = Provide[container_id], **kwargs: object) -> object:
        if len(args) > first_injected:
            args = by_keyword(args, kwargs)
        return await run_awaited_in_unit(_coordinator_in(_app_db_container, function, name), options, injected, args, kwargs)

    # inject() sees `run` only, so that wiring does not inject the sessions before the unit has begun. update_wrapper comes
    # last: wiring looks for the function in the module of the decorated one.
    decorated: Any = update_wrapper(inject(run_awaited if inspect.iscoroutinefunction(function) else run), function)
    if markers:
        decorated.__signature__ = callers_signature(signature, markers)
    return cast("Function", decorated)


_coordinators: WeakKeyDictionary[Container, ReferenceType[providers.Provider[Coordinator]]] = WeakKeyDictionary()


def _coordinator_in(container: Container, function: Function, name: str) -> Coordinator:
    """Return the coordinator of `container`, or of the database container inside it."""
    reference = _coordinators.get(container)
    provider = None if reference is None else reference()
    if provider is None:
        if is_marker(container):
            raise NotWired(name, function.__module__)
        provider = _find_coordinator(container, name)
        _coordinators[container] = ref(provider)
    return provider()


def _find_coordinator(container: Container, name: str) -> providers.Provider[Coordinator]:
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
