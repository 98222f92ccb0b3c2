"""Tells whether the `with` statement that entered a context manager is still running.

An exception from a signal handler can land between any two instructions, also inside `__enter__`
and `__exit__`. The statement is then gone without having called `__exit__` to its end, and what it
began has to be cleaned up.

A `with` statement reads `__exit__` before it enters, and keeps the result on its frame's stack
until it is done. `WithBlock` returns a new object to each statement, and a `Liveness` is a weak
reference to that object. A weak reference to the context manager itself would live too long:
variables and tracebacks refer to it, and often the next block is in the `except` that caught the
exception.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Protocol
from weakref import ref

from app_db._compat.clocks import monotonic
from app_db._compat.contextlib import is_about_to_leave, is_entering, is_leaving, stack_of
from app_db._compat.frames import frame_at


class TornDown(Protocol):
    """An object to clean up if its `with` statement is gone and `__exit__` did not run to its end."""

    def torn_down(self) -> None:
        """Clean up. It is called as the statement goes, in its thread. An error that it raises is only printed."""


class Liveness(ref[object]):
    """A weak reference to an object that a running `with` statement holds. Called, it returns None if the statement is gone."""

    __slots__ = ("torn",)
    torn: TornDown | None
    """Its `torn_down` is called when the statement goes. Set it to None when the statement was left properly."""


def _tear_down(liveness: Liveness) -> None:
    torn, liveness.torn = getattr(liveness, "torn", None), None
    if torn is not None:
        torn.torn_down()


def liveness_of(token: object) -> Liveness:
    """Return a weak reference to `token`, which calls `torn_down` of its `torn`, if that is set, when `token` goes."""
    liveness = Liveness(token, _tear_down)
    liveness.torn = None
    return liveness


NOT_ENTERED = liveness_of(set())
"""The liveness of a block that no statement has entered."""


def tear_down(liveness: Callable[[], object]) -> None:
    """Call `torn_down` if the statement of this liveness is gone and it has not been called."""
    if isinstance(liveness, Liveness) and liveness() is None:
        _tear_down(liveness)


def gone() -> None:
    """Return None: the liveness of an object that has ended."""


def always() -> bool:
    """Return True: the liveness of an object without a `with` statement, which lasts until a call ends it."""
    return True


class ExitMethod:
    """The descriptor of `__exit__` or `__aexit__`. Each statement gets a new callable, which the block refers to weakly."""

    def __init__(self, leave: Callable[..., object], by_stack: Callable[..., object] | None = None) -> None:
        self._leave = leave
        self._by_stack = by_stack or leave

    def __get__(self, block: WithBlock | None, kind: type[WithBlock]) -> Callable[..., object]:
        if block is None:
            return self._by_stack  # ExitStack reads it from the class, and calls it with the block
        token = partial(self._leave, block)
        block.liveness = liveness = Liveness(token, _tear_down)
        liveness.torn = None
        return token


class _EnteredByStack(type):
    """Returns to ExitStack, which reads `__enter__` from a block's class, an object that lives while the stack enters the block.

    A `with` statement does not see these properties of the metaclass, because it looks up
    `__enter__` in another way.
    """

    @property
    def __enter__(cls) -> Callable[[WithBlock], object]:
        return _EnterByStack("__enter__")

    @property
    def __aenter__(cls) -> Callable[[WithBlock], object]:
        return _EnterByStack("__aenter__")


class _EnterByStack:
    """An object that ExitStack.enter_context() holds until it has pushed the block's `__exit__`."""

    __slots__ = ("__weakref__", "_method")

    def __init__(self, method: str) -> None:
        self._method = method

    def __call__(self, block: WithBlock) -> object:
        caller, enter = frame_at(1), getattr(block, self._method)
        if not is_entering(caller):
            block.liveness = liveness_of(block)  # a direct call, without a stack
            return enter()
        block.liveness = liveness = _LivenessByStack(block, _tear_down)
        liveness.begin(ref(self), stack_of(caller))
        return self._enter_awaited(enter, liveness) if self._method == "__aenter__" else self._enter(enter, liveness)

    def _enter(self, enter: Callable[[], object], liveness: _LivenessByStack) -> object:
        with _Entering(liveness):
            return enter()

    async def _enter_awaited(self, enter: Callable[[], Awaitable[object]], liveness: _LivenessByStack) -> object:
        with _Entering(liveness):
            return await enter()


class _LivenessByStack(Liveness):
    """The liveness of a block that an ExitStack holds: the block lives as long as the stack refers to it.

    Tracebacks refer to it as well. So it is also gone if the stack was interrupted while it entered
    or left the block.
    """

    __slots__ = ("_handled_before", "_in_enter", "_in_enter_context", "_stack", "is_entered")

    def begin(self, in_enter_context: ref[_EnterByStack], stack: object) -> None:
        """Note the stack that holds the block, and the object that lives while the stack enters it."""
        self.torn = None
        self.is_entered = False
        self._in_enter: Callable[[], object] = gone
        self._in_enter_context = in_enter_context
        self._stack = None if stack is None else ref(stack)
        self._handled_before = id(sys.exception())

    def entering(self, in_enter: Liveness) -> None:
        """Note the liveness of the block's own `__enter__`."""
        self._in_enter = in_enter

    def __call__(self) -> object:
        block = super().__call__()
        if block is None or self._in_enter() is not None:
            return block
        if not self.is_entered or self._in_enter_context() is not None or self._is_interrupted_leaving():
            return None
        return block

    def _is_interrupted_leaving(self) -> bool:
        """Return whether the exception that is being handled interrupted the stack's `__exit__`, before it had left the block."""
        error, stack = sys.exception(), None if self._stack is None else self._stack()
        while error is not None and stack is not None and id(error) != self._handled_before:
            trace = error.__traceback__
            while trace is not None:
                if is_leaving(trace.tb_frame, stack) or is_about_to_leave(trace, stack):
                    return True
                trace = trace.tb_next
            error = error.__context__
        return False


class WithBlock(metaclass=_EnteredByStack):
    """A context manager that knows whether its `with` statement still runs."""

    __slots__ = ("__weakref__", "liveness")
    liveness: Liveness
    """The liveness of the last statement that has read `__exit__`."""

    def liveness_to_enter(self) -> Liveness:
        """Return the liveness of the statement that is entering."""
        liveness: Liveness | None = getattr(self, "liveness", None)
        if liveness is None or liveness() is None:
            # `__enter__` was called directly. There is no statement, so the block lives as long as
            # anything refers to it.
            liveness = self.liveness = liveness_of(self)
        return liveness

    def _leave(self, error: BaseException | None) -> None:
        """Do the work of `__exit__`."""
        raise NotImplementedError

    if TYPE_CHECKING:

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
        ) -> None: ...

    else:

        def _exit(self, kind, error, trace):
            self._leave(error)

        __exit__ = ExitMethod(_exit)


class LivingLock:
    """A lock that is free again when the `with` statement of its holder is gone, even if it was never released."""

    def __init__(self) -> None:
        # Written in C. A Condition is written in Python, so that an exception from a signal handler
        # could leave it halfway.
        self._guard = threading.Lock()
        self._user: Callable[[], object] = gone

    def take(self, user: Callable[[], object], patience: float = 0.0) -> bool:
        """Wait for the lock, and hold it until `leave`, or until `user` returns None. Return whether it was taken.

        `patience` is how long to wait, in seconds; 0 is for ever.
        """
        give_up = monotonic() + patience if patience else math.inf
        while not self.try_to_take(user):
            if monotonic() > give_up:
                return False
            self._wait()
        return True

    def try_to_take(self, user: Callable[[], object]) -> bool:
        """Take the lock if it is free, without waiting. Return whether it was taken."""
        with self._guard:
            if self._user() is not None:
                return False
            self._user = user
            return True

    def _wait(self) -> None:
        time.sleep(0.0002)

    def is_held_by(self, user: Callable[[], object]) -> bool:
        """Return whether `user` took the lock last, and has not released it."""
        return self._user is user

    def leave(self, user: Callable[[], object]) -> None:
        """Release the lock, if `user` holds it."""
        if self._user is user:
            self._user = gone


class _Entering(WithBlock):
    """A block around the `__enter__` of a block that an ExitStack enters."""

    __slots__ = ("_liveness",)

    def __init__(self, liveness: _LivenessByStack) -> None:
        self._liveness = liveness

    def __enter__(self) -> None:
        own = self.liveness_to_enter()
        own.torn = self
        self._liveness.entering(own)

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            self._liveness.is_entered = True
            self.liveness.torn = None

    def torn_down(self) -> None:
        """Clean up the block, whose `__enter__` did not end."""
        torn, self._liveness.torn = self._liveness.torn, None
        if torn is not None:
            torn.torn_down()
