"""How to speak with several databases at once.

`exchange` has several connections say their statements at the same time: what they have to say takes as long as the slowest of
them, and not as long as all of them together.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import inf
from typing import Generic, TypeVar

K = TypeVar("K")

PATIENCE = 2.0
"""Seconds for which an exchange that was interrupted still waits for the answers that are under way."""

_LOOK_AROUND = 0.5
"""Seconds after which a wait looks up: a signal that another thread got, and any on Windows, does not end it."""


# ---- what came back -----------------------------------------------------------------------------------------------------


class Outcome(Enum):
    """What became of the last statement that was said on a channel."""

    DONE = "done"
    REFUSED = "refused"
    """It has not been done: the server said so, or it never left."""
    UNKNOWN = "unknown"
    """It was said and no answer came."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome, and for all but DONE the reason: the driver's own error, or what interrupted the wait."""

    outcome: Outcome
    error: BaseException | None = None


DONE = Answer(Outcome.DONE)


@dataclass(frozen=True, slots=True)
class Exchange(Generic[K]):
    """An answer for every line, whatever happened; and what interrupted the exchange, which is the caller's to raise."""

    answers: Mapping[K, Answer]
    interruption: BaseException | None = None

    def with_outcome(self, *outcomes: Outcome) -> list[K]:
        """Return the keys of the lines that came to one of `outcomes`."""
        return [key for key, answer in self.answers.items() if answer.outcome in outcomes]


# ---- speaking -----------------------------------------------------------------------------------------------------------


class Channel(ABC):
    """A driver's connection on which a statement is said now and answered later. Its methods never wait for an answer."""

    driver_error: type[BaseException]
    """The base of the driver's errors. Whatever else is raised is an interruption."""

    deadline = inf
    """The monotonic time after which the driver would have given up waiting."""

    events = selectors.EVENT_READ
    """What its socket is waited for."""

    @abstractmethod
    def fileno(self) -> int:
        """Return the socket that becomes ready when there is something to collect."""

    @abstractmethod
    def send(self, statement: str) -> None:
        """Say a statement; raises the driver's error where it certainly did not arrive whole."""

    @abstractmethod
    def collect(self, ready: bool) -> Answer | None:
        """Take what has arrived and return the answer once it is complete. `ready`: the socket has something for us."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the connection without a word, so that nobody takes a late answer for that to another question."""


def exchange(
    lines: Mapping[K, tuple[Channel, Sequence[str]]],
    *,
    regardless: bool = False,
    timeout: float = inf,
    patience: float = PATIENCE,
) -> Exchange[K]:
    """Have every line say its statements, all at the same time, and return when every answer is there.

    A line goes on to its next statement when the one before was done, or `regardless` of a refusal, in which case its last
    answer counts. A line whose outcome is unknown has been abandoned: its connection is closed.

    An interruption (Ctrl-C, a time limit's exception) doesn't stop the exchange, for what was said can't be taken back: the
    lines go on for at most `patience` seconds, or until a second interruption, and whoever has not answered by then is
    unknown. So is who has not answered within `timeout` seconds.
    """
    conversations = {key: _Conversation(channel, statements, regardless) for key, (channel, statements) in lines.items()}
    until = time.monotonic() + timeout
    interruption: BaseException | None = None
    waiting = True
    while under_way := [conversation for conversation in conversations.values() if conversation.answer is None]:
        try:
            if waiting:
                _converse(under_way, until)
                waiting = False
            else:
                for conversation in under_way:
                    conversation.give_up(interruption or TimeoutError("no answer came in time"))
        except BaseException as error:  # noqa: BLE001  # handed to the caller, who has to know the answers first
            waiting = waiting and interruption is None
            interruption = interruption or error
            until = min(until, time.monotonic() + patience)
    answers = {key: conversation.answer for key, conversation in conversations.items() if conversation.answer is not None}
    return Exchange(answers, interruption)


class _Conversation:
    """One line's part of an exchange. An interruption at any point leaves it so that going on never claims what isn't so."""

    def __init__(self, channel: Channel, statements: Sequence[str], regardless: bool) -> None:
        self.channel = channel
        self.answer: Answer | None = None if statements else DONE
        self._statements = statements
        self._regardless = regardless
        self._said = 0
        self._heard = 0

    def go_on(self, ready: bool) -> None:
        """Hear what there is to hear and say what there is to say."""
        while self.answer is None:
            if self._said == self._heard:
                # Counted before it is said: after an interruption between the two it is waited for in vain, and not said twice.
                self._said += 1
                try:
                    self.channel.send(self._statements[self._heard])
                except self.channel.driver_error as error:
                    self._end(Answer(Outcome.REFUSED, error))
                    return
                ready = False
            answer = self._collected(ready)
            if answer is None:
                return
            if self._is_last(answer):
                self._end(answer)
            self._heard += 1

    def give_up(self, reason: BaseException) -> None:
        """End it without an answer."""
        if self._said > self._heard:
            self._end(Answer(Outcome.UNKNOWN, reason))
        else:
            self._end(Answer(Outcome.REFUSED, reason))

    def _end(self, answer: Answer) -> None:
        if answer.outcome is Outcome.UNKNOWN:
            self.channel.abandon()
        self.answer = answer

    def _collected(self, ready: bool) -> Answer | None:
        try:
            return self.channel.collect(ready)
        except self.channel.driver_error as error:
            return Answer(Outcome.UNKNOWN, error)

    def _is_last(self, answer: Answer) -> bool:
        if self._heard + 1 == len(self._statements) or answer.outcome is Outcome.UNKNOWN:
            return True
        return answer.outcome is Outcome.REFUSED and not self._regardless


def _converse(conversations: Sequence[_Conversation], until: float) -> None:
    """Go on with all of them until each has its answer or the time is over."""
    for conversation in conversations:
        conversation.go_on(ready=False)
    with selectors.DefaultSelector() as selector:
        for conversation in conversations:
            if conversation.answer is None:
                selector.register(conversation.channel.fileno(), conversation.channel.events, conversation)
        while (waiting := list(selector.get_map().values())) and (now := time.monotonic()) < until:
            first = min(until, *(key.data.channel.deadline for key in waiting))
            ready = [key for key, _ in selector.select(min(max(first - now, 0.0), _LOOK_AROUND))]
            for key in ready or waiting:
                conversation = key.data
                conversation.go_on(ready=bool(ready))
                if conversation.answer is not None:
                    selector.unregister(key.fd)
                elif conversation.channel.events != key.events:
                    selector.modify(key.fd, conversation.channel.events, conversation)


# ---- for coroutines ------------------------------------------------------------------------------------------------------


class AsyncChannel(ABC):
    """A driver's connection on which a statement is said and its answer awaited."""

    @abstractmethod
    async def say(self, statement: str) -> Answer:
        """Say a statement and return the answer. Whatever is raised means that none came."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the connection without a word, so that nobody takes a late answer for that to another question."""


async def exchange_awaited(
    lines: Mapping[K, tuple[Channel | AsyncChannel, Sequence[str]]], threads: Executor, *, regardless: bool = False
) -> Exchange[K]:
    """Do what `exchange` does where some lines have to be awaited; those that block do so in one of `threads`."""
    blocking = {key: (channel, statements) for key, (channel, statements) in lines.items() if isinstance(channel, Channel)}
    awaited = {key: (channel, statements) for key, (channel, statements) in lines.items() if isinstance(channel, AsyncChannel)}
    conversations = asyncio.gather(*(_say_in_turn(channel, statements, regardless) for channel, statements in awaited.values()))
    others: Exchange[K] = Exchange({})
    if blocking:
        loop = asyncio.get_running_loop()
        others = await loop.run_in_executor(threads, partial(exchange, blocking, regardless=regardless))
    answers = dict(zip(awaited, await conversations, strict=True))
    return Exchange({**others.answers, **answers}, others.interruption)


async def _say_in_turn(channel: AsyncChannel, statements: Sequence[str], regardless: bool) -> Answer:
    answer = Answer(Outcome.DONE)
    for statement in statements:
        try:
            answer = await channel.say(statement)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # none may leave the others behind; the loop may end
            answer = Answer(Outcome.UNKNOWN, error)
        if answer.outcome is Outcome.UNKNOWN:
            channel.abandon()
            return answer
        if answer.outcome is Outcome.REFUSED and not regardless:
            return answer
    return answer
