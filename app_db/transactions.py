"""Units of work as application code writes them: `with container.transaction():` and `@transactional`."""

from __future__ import annotations

import inspect
import logging
import random
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial, update_wrapper, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, overload
from weakref import WeakKeyDictionary

from dependency_injector import providers
from dependency_injector.wiring import Provide, inject

from app_db.coordinator import Coordinator, Work, build_coordinator
from app_db.errors import AlreadyInUnitOfWork, HookFailed, InvalidUse, NotWired, NoUnitOfWork, UnitOfWorkDoomed
from app_db.hooks import Hook, Hooks
from app_db.manager import current, regain, retryable, suspended

if TYPE_CHECKING:
    from transaction import Transaction as ZopeTransaction
    from transaction.interfaces import ISavepoint

log = logging.getLogger("app_db")

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class Propagation(StrEnum):
    """What a unit of work does where another is under way, and where none is."""

    REQUIRED = "required"
    """Join it; else begin one."""
    REQUIRES_NEW = "requires_new"
    """Begin one of its own, while the other waits."""
    NESTED = "nested"
    """Join it inside a savepoint; else begin one."""
    MANDATORY = "mandatory"
    """Join it; else raise NoUnitOfWork."""
    SUPPORTS = "supports"
    """Join it; else run without."""
    NOT_SUPPORTED = "not_supported"
    """Run without, while it waits."""
    NEVER = "never"
    """Raise AlreadyInUnitOfWork; else run without."""


@dataclass(frozen=True)
class Options:
    """How a unit of work is to run. Impossible combinations are refused here."""

    propagation: Propagation = Propagation.REQUIRED
    read_only: bool = False
    isolation: str | None = None
    timeout: float | None = None
    attempts: int = 1
    backoff: float = 0.05
    commit_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidUse(f"attempts={self.attempts} leaves no attempt", "Give 1 or more")
        if self.timeout is not None and self.timeout <= 0:
            raise InvalidUse(f"timeout={self.timeout} leaves no time", "Give seconds above 0, or None for no limit")
        if self.backoff < 0:
            raise InvalidUse(f"backoff={self.backoff} is negative", "Give the seconds to wait before the second attempt, at most")
        if self.attempts > 1 and self.propagation not in _OWNS_ITS_UNIT:
            raise InvalidUse(
                f"attempts={self.attempts} can't be with propagation={self.propagation.value!r}, which never begins a unit of its own",
                "Put attempts on the outermost unit",
            )


_OWNS_ITS_UNIT = frozenset({Propagation.REQUIRED, Propagation.REQUIRES_NEW, Propagation.NESTED})


def _options(
    propagation: Propagation | str = Propagation.REQUIRED,
    *,
    read_only: bool = False,
    isolation: str | None = None,
    timeout: float | None = None,
    attempts: int = 1,
    backoff: float = 0.05,
    commit_on: type[BaseException] | Iterable[type[BaseException]] = (),
) -> Options:
    try:
        how = Propagation(propagation)
    except ValueError:
        names = ", ".join(known.value for known in Propagation)
        raise InvalidUse(f"There is no propagation {propagation!r}", f"Use one of {names}") from None
    kinds = (commit_on,) if isinstance(commit_on, type) else tuple(commit_on)
    level = None if isolation is None else isolation.upper().replace("_", " ")
    return Options(how, read_only, level, timeout, attempts, backoff, kinds)


class UnitOfWork:
    """The unit of work under way, as application code sees it: hooks, savepoints and dooming."""

    __slots__ = ("_coordinator", "_transaction")

    def __init__(self, coordinator: Coordinator, transaction: ZopeTransaction | None) -> None:
        self._coordinator = coordinator
        self._transaction = transaction

    @property
    def transaction(self) -> ZopeTransaction:
        """The zope transaction, which any other zope data manager may join."""
        if self._transaction is None:
            raise NoUnitOfWork("A block that runs without a unit of work")
        return self._transaction

    def before_commit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `function` inside the unit, before anything is committed. If it raises, the unit aborts."""
        self._hooks().before_commit(_call(function, args, kwargs))

    def on_commit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `function` after the unit has committed and its sessions are closed; it may begin a unit of its own."""
        self._hooks().on_commit(_call(function, args, kwargs))

    def on_abort(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `function` after the unit has aborted, for whatever reason, and its sessions are closed."""
        self._hooks().on_abort(_call(function, args, kwargs))

    def doom(self, reason: str = "unit.doom() was called") -> None:
        """Make sure that this unit is not committed. Ending it without an exception raises UnitOfWorkDoomed."""
        self._coordinator.work_of(self.transaction).doom(reason)

    @property
    def is_doomed(self) -> bool:
        """Whether the unit can't be committed any more."""
        return bool(self.transaction.isDoomed())

    def savepoint(self) -> ISavepoint:
        """Return a savepoint across all the unit's connections; its `rollback()` undoes what was done since, again and again."""
        return self.transaction.savepoint(optimistic=True)

    def _hooks(self) -> Hooks:
        work = self._coordinator.work_of(self.transaction)
        if work.hooks is None:
            work.hooks = Hooks(self.transaction, self._coordinator.manager)
        return work.hooks


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
    return partial(function, *args, **kwargs) if args or kwargs else function


# ---- the part a block plays: its own unit, a part of another's, or none ---------------------------------------------


class _Bare:
    """Run without a unit of work, while one that is under way waits."""

    may_pass = False
    """Whether the block failed for a reason that may pass, and can be run again: asked before the unit is aborted."""

    def __init__(self, coordinator: Coordinator, options: Options, outer: ZopeTransaction | None) -> None:
        self.coordinator = coordinator
        self.options = options
        self.outer = outer
        self._waiting: AbstractContextManager[None] | None = None if outer is None else suspended(coordinator.manager)

    def __enter__(self) -> UnitOfWork:
        if self._waiting is not None:
            self._waiting.__enter__()
        return self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.end(error)
        finally:
            if self._waiting is not None:
                self._waiting.__exit__(None, None, None)

    def begin(self) -> UnitOfWork:
        return UnitOfWork(self.coordinator, None)

    def end(self, error: BaseException | None) -> None:
        """Nothing was begun."""

    def fails_by(self, error: BaseException) -> bool:
        """Return whether an error that leaves the block means that its work is not to be kept."""
        return not isinstance(error, self.options.commit_on)


class _Own(_Bare):
    """Begin a unit of work, and commit or abort it."""

    transaction: ZopeTransaction
    work: Work

    def begin(self) -> UnitOfWork:
        options = self.options
        self.transaction = self.coordinator.manager.begin()
        self.work = self.coordinator.work_of(self.transaction)
        self.work.read_only = options.read_only
        self.work.isolation = options.isolation
        if options.timeout is not None:
            self.work.limit(options.timeout)
        return UnitOfWork(self.coordinator, self.transaction)

    def end(self, error: BaseException | None) -> None:
        try:
            regain(self.coordinator.manager, self.transaction)
        except Exception:
            if error is None:
                raise
            return
        try:
            if error is None or not self.fails_by(error):
                self._commit()
            else:
                self._abort_for(error)
        finally:
            self.work.forget()
        hooks = self.work.hooks
        if hooks is not None and hooks.errors and error is None:
            raise HookFailed(True, hooks.errors) from hooks.errors[0]

    def _commit(self) -> None:
        try:
            self.work.refuse_doomed()
            self.transaction.commit()
        except BaseException as error:
            self._abort_for(error)
            raise

    def _abort_for(self, error: BaseException) -> None:
        # Retryability has to be asked before abort: afterwards the data managers that would know are gone.
        self.may_pass = isinstance(error, Exception) and bool(self.transaction.isRetryableError(error))
        try:
            self.transaction.abort()
        except Exception:
            log.exception("Aborting a unit of work raised an error of its own")


class _Joined(_Bare):
    """Be a part of the unit that is under way; a failure dooms it."""

    outer: ZopeTransaction

    def __enter__(self) -> UnitOfWork:
        work = self.coordinator.work_of(self.outer)
        wanted = self.options.isolation
        if wanted is not None and wanted != work.isolation:
            raise InvalidUse(
                f"isolation={wanted!r} can't be had inside a unit of work that runs with {work.isolation or 'the default isolation'}",
                "Give the outermost unit this isolation, or this one propagation='requires_new'",
            )
        self._limits_before = (work.timeout, work.deadline)
        if self.options.timeout is not None:
            work.limit(self.options.timeout)
        return self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.end(error)
        finally:
            work = self.coordinator.work_of(self.outer)
            work.timeout, work.deadline = self._limits_before
        if error is not None and self.options.attempts > 1 and retryable(error):
            error.add_note(
                "app_db: not tried again here, because this block is a part of an outer unit of work, which has to be repeated as a "
                "whole. Put attempts on the outermost unit."
            )

    def begin(self) -> UnitOfWork:
        return UnitOfWork(self.coordinator, self.outer)

    def end(self, error: BaseException | None) -> None:
        if error is not None and self.fails_by(error):
            self.coordinator.work_of(self.outer).doom(error)


class _Nested(_Joined):
    """Be a part of the unit that is under way, inside a savepoint: a failure undoes this part only."""

    def begin(self) -> UnitOfWork:
        work = self.coordinator.work_of(self.outer)
        before = work.last_savepoint()
        self._savepoint = self.outer.savepoint(optimistic=True)  # optimistic: a data manager without savepoints fails when it matters
        after = work.last_savepoint()
        self._across_databases = None if after is before else after
        return UnitOfWork(self.coordinator, self.outer)

    def end(self, error: BaseException | None) -> None:
        if error is not None and self.fails_by(error):
            self._roll_back()
            return
        try:
            if self._across_databases is not None:
                self._across_databases.release()
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        try:
            self._savepoint.rollback()
            if self._across_databases is not None:
                self._across_databases.release()
        except Exception as failure:
            log.warning("Rolling back to a savepoint failed, so the whole unit of work can't commit", exc_info=True)
            self.coordinator.work_of(self.outer).doom(failure)


class _Refused(_Bare):
    """Raise the error that says why the block can't run here."""

    def __enter__(self) -> UnitOfWork:
        subject = f"A block with propagation={self.options.propagation.value!r}"
        if self.outer is None:
            raise NoUnitOfWork(subject)
        raise AlreadyInUnitOfWork(subject)


_PARTS: dict[Propagation, tuple[type[_Bare], type[_Bare]]] = {
    # propagation: (where a unit is under way, where none is)
    Propagation.REQUIRED: (_Joined, _Own),
    Propagation.REQUIRES_NEW: (_Own, _Own),
    Propagation.NESTED: (_Nested, _Own),
    Propagation.MANDATORY: (_Joined, _Refused),
    Propagation.SUPPORTS: (_Joined, _Bare),
    Propagation.NOT_SUPPORTED: (_Bare, _Bare),
    Propagation.NEVER: (_Refused, _Bare),
}


class Transaction:
    """A unit of work to be: a context manager for `with`, and `run(function)` for one that may take several attempts.

    One object serves one block; ask the container for another for the next.
    """

    __slots__ = ("_coordinator", "_options", "_part")

    def __init__(self, coordinator: Coordinator, options: Options) -> None:
        self._coordinator = coordinator
        self._options = options
        self._part: _Bare | None = None

    def __enter__(self) -> UnitOfWork:
        if self._options.attempts > 1:
            raise InvalidUse(
                "A `with` block can't be run again, so it can't have attempts",
                "Put the block in a function and decorate it with @transactional(attempts=...), or use container.transaction(...).run(function)",
            )
        if self._part is not None:
            raise InvalidUse("This transaction object is in use already", "Call container.transaction() for every block")
        part = self._choose_part()
        unit = part.__enter__()
        self._part = part
        return unit

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        part, self._part = self._part, None
        if part is not None:
            part.__exit__(kind, error, trace)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` in the unit of work, again while attempts are left when it fails for a reason that may pass."""
        attempt = 1
        while True:
            part = self._choose_part()
            try:
                with part:
                    return function(*args, **kwargs)
            except Exception:
                if attempt >= self._options.attempts or not part.may_pass:
                    raise
            time.sleep(random.uniform(0, min(1.0, self._options.backoff * 2 ** (attempt - 1))))  # noqa: S311  # no secret
            attempt += 1

    def _choose_part(self) -> _Bare:
        outer = current(self._coordinator.manager)
        inside, outside = _PARTS[self._options.propagation]
        return (outside if outer is None else inside)(self._coordinator, self._options, outer)


_DEFAULT = Options()


def build_transaction(coordinator: Coordinator, propagation: Propagation | str = Propagation.REQUIRED, **options: Any) -> Transaction:
    """Return a unit of work to be. The options are those of `transactional`."""
    if propagation is Propagation.REQUIRED and not options:
        return Transaction(coordinator, _DEFAULT)
    return Transaction(coordinator, _options(propagation, **options))


def build_unit(coordinator: Coordinator) -> UnitOfWork:
    """Return the unit of work that is under way, or raise NoUnitOfWork."""
    return UnitOfWork(coordinator, coordinator.manager.get())


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

    `propagation` says what happens inside another unit; `read_only`, `isolation` and `timeout` (seconds) are the unit's;
    `attempts` is how often it may be tried when it fails for a reason that may pass, with a random pause that grows from
    `backoff` seconds; exceptions of the kinds in `commit_on` commit the unit and are then raised.
    """
    prepared = _options(**options)

    def decorate(decorated: Callable[..., Any]) -> Callable[..., Any]:
        return _run_in_unit(decorated, prepared, container)

    return decorate if function is None else decorate(function)


def _run_in_unit(function: Callable[..., Any], options: Options, container_id: str) -> Callable[..., Any]:
    name = f"{function.__module__}.{function.__qualname__}"
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise InvalidUse(
            f"@transactional can't decorate {name}, which is a generator or a coroutine function",
            "Decorate a plain function; a generator's body would run after its unit of work had ended",
        )
    injected = _inject_checked(function, name)

    def run(*args: Any, _app_db_container: Any = Provide[container_id], **kwargs: Any) -> Any:
        return Transaction(_coordinator_in(_app_db_container, function, name), options).run(injected, *args, **kwargs)

    # inject() sees `run` alone, so that wiring does not inject the sessions before the unit has begun; dressed up as the
    # decorated function afterwards, it belongs to that function's module, and wiring finds it there.
    return update_wrapper(inject(run), function)


def _is_marker(value: object) -> bool:
    return getattr(type(value), "__IS_MARKER__", False) is True


def _inject_checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `function` with its markers injected, refusing to call it with one that was not replaced."""
    parameters = list(inspect.signature(function).parameters.values())
    markers = {parameter.name: parameter.default for parameter in parameters if _is_marker(parameter.default)}
    if not markers:
        return function

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for parameter, marker in markers.items():
            if _is_marker(kwargs.get(parameter, marker)):
                raise NotWired(name, function.__module__, parameter, repr(marker))
        return function(*args, **kwargs)

    return inject(checked)


_coordinators: WeakKeyDictionary[Any, providers.Provider[Coordinator]] = WeakKeyDictionary()


def _coordinator_in(container: Any, function: Callable[..., Any], name: str) -> Coordinator:
    """Return the coordinator of the database container that `container` is, or that is in it."""
    if _is_marker(container):
        raise NotWired(name, function.__module__)
    provider = _coordinators.get(container)
    if provider is None:
        provider = _coordinators[container] = _find_coordinator(container, name)
    return provider()


def _find_coordinator(container: Any, name: str) -> providers.Provider[Coordinator]:
    found = [provider for provider in container.traverse(types=[providers.BaseSingleton]) if provider.provides is build_coordinator]
    if len(found) == 1:
        return cast("providers.Provider[Coordinator]", found[0])
    count = "no database container" if not found else f"{len(found)} database containers"
    raise InvalidUse(
        f"The container that is wired to the module of {name} has {count} in it",
        "Name the one to use: @transactional(container='NAME')",
    )
