"""Whether the `with` statement that entered a context manager is still running.

An exception from a signal handler can land between any two instructions, also inside `__enter__` and `__exit__`. The statement is
gone then, although nobody left it properly, and what it began must not be taken for something that goes on.

A `with` statement asks for `__exit__` before it enters, and keeps the answer on its frame's stack until it is done. `WithBlock`
gives each statement a new object, and a `Liveness` is a weak reference to that. A weak reference to the context manager itself
says less: variables and tracebacks keep it, and the next block often stands in the very `except` that caught the exception.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

from app_db._compat.contextlib import is_entering, is_leaving, stack_of
from app_db._compat.frames import frame_at


class Torn(Protocol):
    """What has to be cleaned up when its `with` statement is gone without having left it."""

    def torn_down(self) -> None:
        """Clean up. Called at the moment at which the statement goes, in its thread; what it raises is only printed."""


class Liveness(ref[Any]):
    """A weak reference to what a running `with` statement has: called, it returns None when the statement is gone."""

    __slots__ = ("torn",)
    torn: Torn | None
    """What is told when the statement goes. Unset it when the statement has been left properly."""


def _tell(liveness: Liveness) -> None:
    torn, liveness.torn = getattr(liveness, "torn", None), None
    if torn is not None:
        torn.torn_down()


def liveness_of(token: object) -> Liveness:
    """Return a weak reference that tells when `token` goes, if its `torn` has been set."""
    liveness = Liveness(token, _tell)
    liveness.torn = None
    return liveness


NOT_ENTERED = liveness_of(set())
"""The liveness of a block that no statement has entered."""


def tear_down(liveness: Callable[[], object]) -> None:
    """Clean up what is to be cleaned up when this liveness is gone, if it is gone and that has not been done."""
    if isinstance(liveness, Liveness) and liveness() is None:
        _tell(liveness)


def gone() -> None:
    """Return None: the liveness of what has ended."""


def always() -> bool:
    """Return True: the liveness of what lasts until it is ended by hand."""
    return True


class ExitMethod:
    """`__exit__` or `__aexit__`: a new callable for each statement that asks, to which the block keeps a weak reference."""

    def __init__(self, leave: Callable[..., Any], by_stack: Callable[..., Any] | None = None) -> None:
        self._leave = leave
        self._by_stack = by_stack or leave

    def __get__(self, block: WithBlock | None, kind: type[WithBlock]) -> Callable[..., Any]:
        if block is None:
            return self._by_stack  # ExitStack asks the class, and calls it with the block
        token = partial(self._leave, block)
        block.liveness = liveness = Liveness(token, _tell)
        liveness.torn = None
        return token


class _AsksItsClass(type):
    """Gives ExitStack, which asks a block's class for `__enter__`, an answer that lives as long as it is entering.

    These are data descriptors of the class of the class: a `with` statement, which asks differently, does not see them.
    """

    @property
    def __enter__(cls) -> Callable[[Any], Any]:
        return _EnteringByStack("__enter__")

    @property
    def __aenter__(cls) -> Callable[[Any], Any]:
        return _EnteringByStack("__aenter__")


class _EnteringByStack:
    """What ExitStack.enter_context() holds until it has noted that the block is to be left."""

    __slots__ = ("__weakref__", "_method")

    def __init__(self, method: str) -> None:
        self._method = method

    def __call__(self, block: WithBlock) -> Any:
        caller = frame_at(1)
        if not is_entering(caller):
            block.liveness = liveness_of(block)  # by hand
            return getattr(block, self._method)()
        block.liveness = liveness = _LivenessByStack(block, _tell)
        liveness.begin(ref(self), stack_of(caller))
        return self._enter_awaited(block, liveness) if self._method == "__aenter__" else self._enter(block, liveness)

    def _enter(self, block: Any, liveness: _LivenessByStack) -> Any:
        with _Entering(liveness):
            return block.__enter__()

    async def _enter_awaited(self, block: Any, liveness: _LivenessByStack) -> Any:
        with _Entering(liveness):
            return await block.__aenter__()


class _LivenessByStack(Liveness):
    """The liveness of a block that an ExitStack holds: as long as the block is referenced, which only the stack does by then.

    Tracebacks reference it as well. So it is gone, too, when the stack was interrupted while it entered, or while it left.
    """

    __slots__ = ("_handled_before", "_in_enter", "_in_enter_context", "_stack", "is_entered")

    def begin(self, in_enter_context: ref[_EnteringByStack], stack: object) -> None:
        """Note which stack holds the block, and what that has while it enters."""
        self.torn = None
        self.is_entered = False
        self._in_enter: Callable[[], object] = gone
        self._in_enter_context = in_enter_context
        self._stack = None if stack is None else ref(stack)
        self._handled_before = id(sys.exception())

    def entering(self, in_enter: Liveness) -> None:
        """Note what runs as long as the block's own `__enter__` does."""
        self._in_enter = in_enter

    def __call__(self) -> Any:
        block = super().__call__()
        if block is None or self._in_enter() is not None:
            return block
        if not self.is_entered or self._in_enter_context() is not None or self._is_interrupted_leaving():
            return None
        return block

    def _is_interrupted_leaving(self) -> bool:
        """Return whether an exception is being handled that came out of the stack's `__exit__`, which had not left the block."""
        error, stack = sys.exception(), None if self._stack is None else self._stack()
        while error is not None and stack is not None and id(error) != self._handled_before:
            trace = error.__traceback__
            while trace is not None:
                if is_leaving(trace.tb_frame, stack):
                    return True
                trace = trace.tb_next
            error = error.__context__
        return False


class WithBlock(metaclass=_AsksItsClass):
    """A context manager that knows whether its `with` statement still runs."""

    __slots__ = ("__weakref__", "liveness")
    liveness: Liveness
    """That of the statement that has asked for `__exit__` last."""

    def liveness_to_enter(self) -> Liveness:
        """Return the liveness of the statement that is entering."""
        liveness: Liveness | None = getattr(self, "liveness", None)
        if liveness is None or liveness() is None:
            # `__enter__` was called by hand: there is no statement, and it is alive as long as anything refers to it.
            liveness = self.liveness = liveness_of(self)
        return liveness

    def _leave(self, error: BaseException | None) -> None:
        """Do what `__exit__` has to do."""
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
    """A lock that is free again when the `with` statement is gone that has it, however that came."""

    def __init__(self) -> None:
        # A lock of C, which no exception from a signal handler can come out of halfway; a Condition is written in Python.
        self._guard = threading.Lock()
        self._user: Callable[[], object] = gone

    def take(self, user: Callable[[], object], patience: float = 0.0) -> bool:
        """Have the lock as long as `user` does not return None. Return False if that takes longer than `patience` seconds.

        Without patience, wait without an end.
        """
        give_up = time.monotonic() + patience if patience else math.inf
        while not self.try_to_take(user):
            if time.monotonic() > give_up:
                return False
            self._wait()
        return True

    def try_to_take(self, user: Callable[[], object]) -> bool:
        """Have the lock if nobody has it, without waiting."""
        with self._guard:
            if self._user() is not None:
                return False
            self._user = user
            return True

    def _wait(self) -> None:
        time.sleep(0.0002)

    def is_held_by(self, user: Callable[[], object]) -> bool:
        """Return whether `user` was the last one to take the lock, and has not left it."""
        return self._user is user

    def leave(self, user: Callable[[], object]) -> None:
        """Let others have the lock."""
        if self._user is user:
            self._user = gone


class _Entering(WithBlock):
    """Runs as long as the `__enter__` of a block that an ExitStack enters."""

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
        """Have the block cleaned up, which was not entered."""
        torn, self._liveness.torn = self._liveness.torn, None
        if torn is not None:
            torn.torn_down()
