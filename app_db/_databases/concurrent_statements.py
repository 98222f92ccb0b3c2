"""Execute statements on several connections at the same time, in as much time as the slowest of them takes."""

from __future__ import annotations

import asyncio
import selectors
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import inf
from typing import Generic, TypeVar

from app_db._compat.clocks import monotonic

K = TypeVar("K")

PATIENCE = 2.0
"""Seconds to go on waiting for answers after an interruption."""

_LONGEST_SELECT = 0.5
"""Seconds that one `select()` may take: a signal that another thread handles, and any signal on Windows, does not end it."""


# ---- results ------------------------------------------------------------------------------------------------------------


class Outcome(Enum):
    """What is known about the last statement that was sent on a connection."""

    DONE = "done"
    REFUSED = "refused"
    """It was not executed: the server refused it, or it was never sent."""
    UNKNOWN = "unknown"
    """It was sent, and no answer came."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An outcome and, unless it is DONE, the reason: the driver's error, or what interrupted the wait."""

    outcome: Outcome
    error: BaseException | None = None


DONE = Answer(Outcome.DONE)


@dataclass(frozen=True, slots=True)
class Results(Generic[K]):
    """An answer for every connection. The caller has to raise `interruption`, if there is one."""

    answers: Mapping[K, Answer]
    interruption: BaseException | None = None

    def with_outcome(self, outcome: Outcome) -> list[K]:
        """Return the keys of the connections that came to `outcome`."""
        return [key for key, answer in self.answers.items() if answer.outcome is outcome]


# ---- for threads --------------------------------------------------------------------------------------------------------


class NonBlockingConnection(ABC):
    """A driver's connection on which a statement is sent, and its answer read later. No method waits for the server."""

    driver_error: type[BaseException]
    """The base class of the driver's errors. Every other exception is an interruption."""

    deadline = inf
    """The monotonic time after which the driver would stop waiting."""

    events = selectors.EVENT_READ
    """What to wait for on the socket."""

    @abstractmethod
    def fileno(self) -> int:
        """Return the socket that becomes ready when there is something to read."""

    @abstractmethod
    def send(self, statement: str) -> None:
        """Send a statement. The driver's error means that the server can't have received all of it."""

    @abstractmethod
    def collect(self, ready: bool) -> Answer | None:
        """Read what has arrived. Return the answer once it is complete. `ready` says whether the socket is."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the connection without sending anything, so that a late answer can't be taken for that to a later statement."""


def execute_together(
    work: Mapping[K, tuple[NonBlockingConnection, Sequence[str]]],
    *,
    timeout: float = inf,
    patience: float = PATIENCE,
) -> Results[K]:
    """Execute the statements of every connection, on all connections at the same time. Return when all answers are there.

    A connection executes its next statement once the one before is done, and stops at a refusal. A connection whose outcome is
    unknown is closed.

    An interruption (Ctrl-C, the exception of a time limit) does not stop this, because a statement that was sent can't be taken
    back. It goes on for at most `patience` seconds, or until a second interruption. What is not answered then is unknown, and
    so is what is not answered within `timeout` seconds.
    """
    executions = {key: _Execution(connection, statements) for key, (connection, statements) in work.items()}
    until = monotonic() + timeout
    interruption: BaseException | None = None
    waiting = True
    while under_way := [execution for execution in executions.values() if execution.answer is None]:
        try:
            if waiting:
                _wait_for_answers(under_way, until)
                waiting = False
            else:
                for execution in under_way:
                    execution.give_up(interruption or TimeoutError("no answer came in time"))
        except BaseException as error:  # noqa: BLE001  # the caller raises it, and needs the answers first
            waiting = waiting and interruption is None
            interruption = interruption or error
            until = min(until, monotonic() + patience)
    answers = {key: execution.answer for key, execution in executions.items() if execution.answer is not None}
    return Results(answers, interruption)


class _Execution:
    """The statements of one connection. An interruption at any line leaves it in a state from which it can go on."""

    def __init__(self, connection: NonBlockingConnection, statements: Sequence[str]) -> None:
        self.connection = connection
        self.answer: Answer | None = None if statements else DONE
        self._statements = statements
        self._sent = 0
        self._answered = 0

    def go_on(self, ready: bool) -> None:
        """Read what has arrived, and send what can be sent."""
        while self.answer is None:
            if self._sent == self._answered:
                # Count first. If we are interrupted before sending, we wait for an answer that never comes instead of sending
                # twice.
                self._sent += 1
                try:
                    self.connection.send(self._statements[self._answered])
                except self.connection.driver_error as error:
                    self._end(Answer(Outcome.REFUSED, error))
                    return
                ready = False
            answer = self._collected(ready)
            if answer is None:
                return
            if answer.outcome is not Outcome.DONE or self._answered + 1 == len(self._statements):
                self._end(answer)
            self._answered += 1

    def give_up(self, reason: BaseException) -> None:
        """End without an answer."""
        self._end(Answer(Outcome.UNKNOWN if self._sent > self._answered else Outcome.REFUSED, reason))

    def _end(self, answer: Answer) -> None:
        if answer.outcome is Outcome.UNKNOWN:
            self.connection.abandon()
        self.answer = answer

    def _collected(self, ready: bool) -> Answer | None:
        try:
            return self.connection.collect(ready)
        except self.connection.driver_error as error:
            return Answer(Outcome.UNKNOWN, error)


def _wait_for_answers(executions: Sequence[_Execution], until: float) -> None:
    """Go on with all executions until each has its answer or the time is over."""
    for execution in executions:
        execution.go_on(ready=False)
    with selectors.DefaultSelector() as selector:
        for execution in executions:
            if execution.answer is None:
                selector.register(execution.connection.fileno(), execution.connection.events, execution)
        while (waiting := list(selector.get_map().values())) and (now := monotonic()) < until:
            first = min(until, *(key.data.connection.deadline for key in waiting))
            ready = [key for key, _ in selector.select(min(max(first - now, 0.0), _LONGEST_SELECT))]
            for key in ready or waiting:
                execution = key.data
                execution.go_on(ready=bool(ready))
                if execution.answer is not None:
                    selector.unregister(key.fd)
                elif execution.connection.events != key.events:
                    selector.modify(key.fd, execution.connection.events, execution)


# ---- for coroutines -----------------------------------------------------------------------------------------------------


class AwaitedConnection(ABC):
    """An async driver's connection."""

    @abstractmethod
    async def execute(self, statement: str) -> Answer:
        """Execute a statement and return the answer. An exception means that none came."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the connection without sending anything, so that a late answer can't be taken for that to a later statement."""


async def execute_together_async(
    work: Mapping[K, tuple[NonBlockingConnection | AwaitedConnection, Sequence[str]]], threads: Executor
) -> Results[K]:
    """Do what `execute_together` does where some connections are awaited. The others are used in one of `threads`."""
    blocking = {key: (each, statements) for key, (each, statements) in work.items() if isinstance(each, NonBlockingConnection)}
    awaited = {key: (each, statements) for key, (each, statements) in work.items() if isinstance(each, AwaitedConnection)}
    executions = asyncio.gather(*(_execute_in_turn(each, statements) for each, statements in awaited.values()))
    others: Results[K] = Results({})
    if blocking:
        others = await asyncio.get_running_loop().run_in_executor(threads, partial(execute_together, blocking))
    answers = dict(zip(awaited, await executions, strict=True))
    return Results({**others.answers, **answers}, others.interruption)


async def _execute_in_turn(connection: AwaitedConnection, statements: Sequence[str]) -> Answer:
    answer = DONE
    for statement in statements:
        try:
            answer = await connection.execute(statement)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # the other connections go on; the loop may end
            answer = Answer(Outcome.UNKNOWN, error)
        if answer.outcome is Outcome.UNKNOWN:
            connection.abandon()
        if answer.outcome is not Outcome.DONE:
            break
    return answer
