"""How to speak with several databases at once.

`exchange` has several connections say their statements at the same time: what they have to say takes as long as the slowest of
them, and not as long as all of them together.
"""

from __future__ import annotations

import selectors
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import psycopg
    from psycopg.pq.abc import PGresult

K = TypeVar("K")

PATIENCE = 2.0
"""Seconds for which an exchange that was interrupted still waits for the answers that are under way."""

_LOOK_AROUND = 0.5
"""Seconds after which a wait looks up: a signal that another thread got, and any on Windows, does not end it."""


# ---- what came back -----------------------------------------------------------------------------------------------------


class Outcome(Enum):
    """What became of the last statement that was said on a line."""

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


_DONE = Answer(Outcome.DONE)


@dataclass(frozen=True, slots=True)
class Exchange(Generic[K]):
    """An answer for every line, whatever happened; and what interrupted the exchange, which is the caller's to raise."""

    answers: Mapping[K, Answer]
    interruption: BaseException | None = None

    @property
    def all_done(self) -> bool:
        """Whether every line has done all it was told, even if the exchange was interrupted."""
        return all(answer.outcome is Outcome.DONE for answer in self.answers.values())

    def with_outcome(self, *outcomes: Outcome) -> list[K]:
        """Return the keys of the lines that came to one of `outcomes`."""
        return [key for key, answer in self.answers.items() if answer.outcome in outcomes]


# ---- speaking -----------------------------------------------------------------------------------------------------------


class Line(ABC):
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
    lines: Mapping[K, tuple[Line, Sequence[str]]],
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
    conversations = {key: _Conversation(line, statements, regardless) for key, (line, statements) in lines.items()}
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

    def __init__(self, line: Line, statements: Sequence[str], regardless: bool) -> None:
        self.line = line
        self.answer: Answer | None = None if statements else _DONE
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
                    self.line.send(self._statements[self._heard])
                except self.line.driver_error as error:
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
            self.line.abandon()
        self.answer = answer

    def _collected(self, ready: bool) -> Answer | None:
        try:
            return self.line.collect(ready)
        except self.line.driver_error as error:
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
                selector.register(conversation.line.fileno(), conversation.line.events, conversation)
        while (waiting := list(selector.get_map().values())) and (now := time.monotonic()) < until:
            first = min(until, *(key.data.line.deadline for key in waiting))
            ready = [key for key, _ in selector.select(min(max(first - now, 0.0), _LOOK_AROUND))]
            for key in ready or waiting:
                conversation = key.data
                conversation.go_on(ready=bool(ready))
                if conversation.answer is not None:
                    selector.unregister(key.fd)
                elif conversation.line.events != key.events:
                    selector.modify(key.fd, conversation.line.events, conversation)


class PostgreSQLLine(Line):
    """psycopg's connection, spoken to by way of libpq.

    psycopg's cursor would begin a transaction, and its two-phase methods replace the reason why PREPARE failed by their own
    confusion. Its commit() and rollback() do nothing where libpq knows that the transaction has ended.
    """

    _done = (1, 2)  # libpq's PGRES_COMMAND_OK and PGRES_TUPLES_OK

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        import psycopg

        self.driver_error = psycopg.Error
        self._connection = connection
        self._libpq = connection.pgconn
        self._statement = ""
        self._result: PGresult | None = None

    def fileno(self) -> int:
        return self._libpq.socket

    def send(self, statement: str) -> None:
        self._statement = statement
        self._result = None
        self._libpq.send_query(statement.encode())

    def collect(self, ready: bool) -> Answer | None:
        if self._libpq.flush():
            self.events = selectors.EVENT_READ | selectors.EVENT_WRITE
        else:
            self.events = selectors.EVENT_READ
        try:
            if ready:
                self._libpq.consume_input()
                self._hand_on_notifications()
            while not self._libpq.is_busy():
                result = self._libpq.get_result()
                if result is None:
                    return self._answer()
                self._result = result
        except self.driver_error:
            if self._result is None:
                raise
            return self._answer()
        return None

    def _hand_on_notifications(self) -> None:
        # psycopg does so wherever it reads; what stays with libpq is seen late or, by Connection.notifies(), never.
        while notification := self._libpq.notifies():
            if self._libpq.notify_handler is not None:
                self._libpq.notify_handler(notification)

    def _answer(self) -> Answer:
        result, self._result = self._result, None  # no interruption shall take it for the answer to the next statement
        if result is None or result.status not in self._done:
            return self._bad_answer(result)
        if result.command_status == b"ROLLBACK" and not self._statement.startswith("ROLLBACK"):
            from psycopg.errors import InFailedSqlTransaction

            # How the server answers COMMIT and PREPARE TRANSACTION where a statement had failed, or nothing had begun.
            return Answer(Outcome.REFUSED, InFailedSqlTransaction(f"the server answered {self._statement} with ROLLBACK"))
        return _DONE

    def _bad_answer(self, result: PGresult | None) -> Answer:
        from psycopg import errors
        from psycopg.pq import DiagnosticField

        if result is None:
            return Answer(Outcome.UNKNOWN, errors.OperationalError("the answer got lost"))
        # Whoever is being shut down says FATAL, and may have done by then what was asked.
        refused = result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED) == b"ERROR"
        error = errors.error_from_result(result, encoding=self._connection.info.encoding)
        return Answer(Outcome.REFUSED if refused else Outcome.UNKNOWN, error)

    def abandon(self) -> None:
        self._connection.close()


class MySQLLine(Line):
    """PyMySQL's connection, whose query() is taken apart into its two halves."""

    unclear = frozenset({1053, 1180, 1317, 1401, 1927})
    """Shut down, failed or interrupted in the middle: with these errors the server leaves open what it has done."""

    def __init__(self, connection: Any) -> None:
        from pymysql.err import MySQLError

        self.driver_error = MySQLError
        self._connection = connection

    def fileno(self) -> int:
        number: int = self._connection._sock.fileno()
        return number

    def send(self, statement: str) -> None:
        from pymysql.constants import COMMAND

        self.deadline = time.monotonic() + (self._connection._read_timeout or inf)
        self._connection._execute_command(COMMAND.COM_QUERY, statement)

    def collect(self, ready: bool) -> Answer | None:
        # Only what has arrived is read, because the driver waits in its own way: an interruption would make it hang up.
        if not ready and not self._has_decrypted():
            return self._too_late() if time.monotonic() >= self.deadline else None
        try:
            self._connection._read_query_result()
        except self.driver_error as error:
            unclear = not self._connection.open or (error.args[:1] and error.args[0] in self.unclear)
            return Answer(Outcome.UNKNOWN if unclear else Outcome.REFUSED, error)
        return _DONE

    def _has_decrypted(self) -> bool:
        pending = getattr(self._connection._sock, "pending", None)
        return pending is not None and pending() > 0

    def _too_late(self) -> Answer:
        from pymysql.constants import CR
        from pymysql.err import OperationalError

        return Answer(Outcome.UNKNOWN, OperationalError(CR.CR_SERVER_LOST, "No answer came within the connection's read_timeout"))

    def abandon(self) -> None:
        self._connection._force_close()
