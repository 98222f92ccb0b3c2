"""Counts the statements that a block sends by the connections of a container."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import ExecuteStyle

from app_db._compat.frames import frame_at
from app_db._databases.holders import LineAbove
from app_db._databases.registry import database_of
from app_db._databases.slow_statements import LONGEST_TEXT
from app_db._databases.statements import bare_texts, savepoint_verb, transaction_verb, without_names
from app_db._wording import did_you_mean
from app_db.container import DatabaseContainer
from app_db.errors import InvalidUse, UnexpectedStatements
from app_db.testing._isolation import Isolation
from app_db.testing._overrides import connections_of
from app_db.testing._shared_connection import shared_by

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from app_db._databases.readings import Syntax

Kind = Literal["select", "insert", "update", "delete", "other"]
Count = int | Mapping[str, int]

KINDS: Sequence[Kind] = ("select", "insert", "update", "delete", "other")

LONGEST_LIST = 50
"""How many lines an error lists."""


# ---- what was sent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SentStatement:
    """A statement that was sent. Its parameters are not kept: they may be secret."""

    connection: str
    """The name of the connection in the container."""
    kind: Kind
    statement: str
    """The SQL."""
    executions: int
    """How many sets of parameters it was sent with: more than 1 for the driver's `executemany`."""
    line: str | None
    """The line of the application that sent it, such as `shop.py:31 in total`; None if no code of the application did."""


def _kind(statement: str, syntax: Syntax) -> Kind | None:
    """Return the kind of a statement; None for one that begins or ends a transaction or a savepoint."""
    if transaction_verb(statement, syntax) or savepoint_verb(statement, syntax):
        return None
    bare = bare_texts(statement, syntax)[0]
    word = _FIRST_WORD.match(bare)
    if word is not None and word[0].upper() == "WITH":
        word = _MAIN_WORD.search(_outside_parentheses(without_names(bare)))
    return _KINDS.get(word[0].upper(), "other") if word is not None else "other"


_FIRST_WORD = re.compile(r"\w+")
_MAIN_WORD = re.compile(r"\b(?:SELECT|TABLE|VALUES|INSERT|REPLACE|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)
_IN_PARENTHESES = re.compile(r"\([^()]*\)")
_KINDS: Mapping[str, Kind] = {
    "SELECT": "select",
    "TABLE": "select",
    "VALUES": "select",
    "INSERT": "insert",
    "REPLACE": "insert",
    "UPDATE": "update",
    "DELETE": "delete",
}


@lru_cache(maxsize=256)
def _outside_parentheses(text: str) -> str:
    shorter = _IN_PARENTHESES.sub(" ", text)
    return text if shorter == text else _outside_parentheses(shorter)


# ---- what is expected ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatementCounts:
    """How many statements a test expects. It takes the arguments of `expecting`. Raises InvalidUse if they make no sense."""

    statements: Count | None = None
    _: KW_ONLY
    at_most: Count | None = None
    select: int | None = None
    insert: int | None = None
    update: int | None = None
    delete: int | None = None
    other: int | None = None

    def __post_init__(self) -> None:
        if self.statements is not None and self.at_most is not None:
            raise InvalidUse("statements= and at_most= exclude each other", "Give the exact number or the limit")
        for name, given in vars(self).items():
            by_connection = isinstance(given, Mapping) and name in ("statements", "at_most")
            if given is None or (by_connection and all(isinstance(key, str) and _is_number(each) for key, each in given.items())):
                continue
            if by_connection or not _is_number(given):
                numbers = "a number, or numbers by connection" if name in ("statements", "at_most") else "a number"
                raise InvalidUse(f"{name}={given!r} is no number of statements", f"Give {numbers}, from 0 on")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is expected, so that statements are recorded only."""
        return all(given is None for given in vars(self).values())

    @property
    def connections(self) -> Sequence[str]:
        """The connections that are named."""
        return [name for given in (self.statements, self.at_most) if isinstance(given, Mapping) for name in given]

    def problems(self, sent: Sequence[SentStatement]) -> Iterator[str]:
        """Yield a sentence for each number that differs."""
        limit = self.at_most is not None
        given = self.at_most if limit else self.statements
        if isinstance(given, Mapping):
            found = Counter(statement.connection for statement in sent)
            for name in sorted({*given, *found}):
                yield from _compared(found[name], given.get(name, 0), "statement", f" on {name!r}", limit=limit)
        elif given is not None:
            yield from _compared(len(sent), given, "statement", limit=limit)
        kinds = Counter(statement.kind for statement in sent)
        for kind in KINDS:
            expected: int | None = getattr(self, kind)
            if expected is not None:
                yield from _compared(kinds[kind], expected, "other statement" if kind == "other" else f"{kind.upper()} statement")


def _is_number(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


def _compared(found: int, expected: int, what: str, where: str = "", *, limit: bool = False) -> Iterator[str]:
    if found > expected or (found < expected and not limit):
        sent = f"{found} {what} was" if found == 1 else f"{found or 'no'} {what}s were"
        wanted = f"{'at most ' if limit else ''}{expected or 'none'} {'was' if expected in (0, 1) else 'were'}"
        yield f"{sent[0].upper()}{sent[1:]} sent{where}, and {wanted} expected."


def _listed(sent: Sequence[SentStatement]) -> Iterator[str]:
    """Yield a line for each statement. Those that one line of the application sent repeatedly have one line."""
    repeated = Counter((each.connection, each.statement, each.line) for each in sent)
    for number, ((connection, statement, line), times) in enumerate(repeated.items()):
        if number == LONGEST_LIST:
            yield f"(and {len(repeated) - LONGEST_LIST} more)"
            return
        place = f" from {line}" if line else ""
        text = " ".join(statement.split())
        shown = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
        yield f"{connection!r}{place}: {shown}" if times == 1 else f"{connection!r}, sent {times} times{place}: N+1? {shown}"


# ---- the block ----------------------------------------------------------------------------------------------------------


class expecting:  # noqa: N801  # used like a function
    """Count the statements that a `with` or `async with` block sends, and raise UnexpectedStatements if they are not as many.

    `statements` is the exact number and `at_most` the highest, each for all connections, or by
    connection: `statements={"writer": 2}`. Connections that are not named there must send none.
    `select`, `insert`, `update`, `delete` and `other` are exact numbers of one kind. Without numbers,
    the block is a recorder. It gives itself; `statements` is the list of what was sent so far.

    What counts is what the connections of the container send while the block lasts, in any thread
    and task, isolated or not, also if it fails. BEGIN, COMMIT, ROLLBACK, savepoints, and what app_db
    asks and sets by itself don't count. One `executemany` counts as one statement. If the block
    raises an error, nothing is compared.

    >>> from app_db import Container, DatabaseSettings
    >>> from app_db.testing._expecting import expecting
    >>> from sqlalchemy import text
    >>> container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    >>> with expecting(container, select=1) as counted, container.transaction():
    ...     _ = container.writer_session().execute(text("SELECT 42"))
    >>> [(sent.connection, sent.statement) for sent in counted.statements]
    [('writer', 'SELECT 42')]
    """

    def __init__(
        self,
        container: DatabaseContainer,
        statements: Count | None = None,
        *,
        at_most: Count | None = None,
        select: int | None = None,
        insert: int | None = None,
        update: int | None = None,
        delete: int | None = None,
        other: int | None = None,
    ) -> None:
        self._container = container
        self._expected = StatementCounts(
            statements, at_most=at_most, select=select, insert=insert, update=update, delete=delete, other=other
        )
        known = connections_of(container)
        for name in self._expected.connections:
            if name not in known:
                advice = f"{did_you_mean(name, known)} The connections are {', '.join(known)}".lstrip()
                raise InvalidUse(f"There is no connection {name!r} to count statements of", advice)
        self.statements: list[SentStatement] = []
        """What was sent so far in the block that was entered last."""

    def __enter__(self) -> Self:
        self.statements = []  # the block may be entered again
        _begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        __tracebackhide__ = True  # pytest shows the test's line then
        _end(self)
        if error is None:
            self._compare()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        __tracebackhide__ = True
        self.__exit__(kind, error, trace)

    def _compare(self) -> None:
        __tracebackhide__ = True
        problems = [*self._expected.problems(self.statements)]
        if problems:
            raise UnexpectedStatements(problems, [*_listed(self.statements)])

    def name_of(self, engine: Engine) -> str | None:
        """Return the name of the connection that an engine belongs to; None if it is not the container's."""
        return next((name for name in connections_of(self._container) if self._has(name, engine)), None)

    def _has(self, name: str, engine: Engine) -> bool:
        # By dialect, which an engine shares with those that its `execution_options()` returns. No engine is made here.
        isolation, shared = self._container.core.coordinator().rehearsal, shared_by(engine)
        if shared is not None:
            theirs = shared.engines.get(name), shared.async_engines.get(name)
            is_ours = isinstance(isolation, Isolation) and isolation.has(shared)
            return is_ours and any(each is not None and each.dialect is engine.dialect for each in theirs)
        made = self._container.core.holder().state.engines(name)
        return any(each.dialect is engine.dialect for each in [*made, *self._of_application(name, isolation)])

    def _of_application(self, name: str, isolation: object) -> Iterator[Engine]:
        """Yield the engines that the application or the test uses instead of the engines of a connection."""
        if isinstance(isolation, Isolation) and name in isolation.names:
            return  # the isolation overrides them
        connection = connections_of(self._container)[name].container
        for provider in (connection.engine, connection.async_engine):
            if provider.overridden:
                engine = provider.overridden[-1]()
                yield getattr(engine, "sync_engine", engine)


# ---- listening ----------------------------------------------------------------------------------------------------------

_guard = threading.Lock()
_blocks: tuple[expecting, ...] = ()
"""The blocks that count. A new tuple for each change, because other threads read it at any time."""

_line_above = LineAbove()


def _begin(block: expecting) -> None:
    global _blocks  # noqa: PLW0603
    with _guard:
        # The listener stays: another thread may be calling listeners, and their list must not change meanwhile.
        if not event.contains(Engine, "before_cursor_execute", _note):
            event.listen(Engine, "before_cursor_execute", _note)
        _blocks = (*_blocks, block)


def _end(block: expecting) -> None:
    global _blocks  # noqa: PLW0603
    with _guard:
        _blocks = tuple(other for other in _blocks if other is not block)


def _note(connection: Connection, cursor: object, statement: str, *sent: Any) -> None:
    """Note a statement in the blocks to whose containers its engine belongs."""
    parameters, context, _ = sent
    blocks = _blocks
    if not blocks or _is_initializing(connection) or _is_own(frame_at(1)):
        return
    names = [(block, name) for block in blocks if (name := block.name_of(connection.engine)) is not None]
    kind = _kind(statement, database_of(connection.dialect.name).syntax) if names else None
    if kind is None:
        return
    executions = len(parameters) if context.execute_style is ExecuteStyle.EXECUTEMANY else 1
    line = _line_above()
    for block, name in names:
        block.statements.append(SentStatement(name, kind, statement, executions, None if line is None else str(line)))


def _is_initializing(connection: Connection) -> bool:
    """Return whether the dialect asks about the server, on a connection that is not the pool's yet."""
    try:
        _ = connection.info
    except NotImplementedError:
        return True
    return False


def _is_own(frame: FrameType | None) -> bool:
    """Return whether app_db has sent a statement by itself: not for a session, whose flushes are the application's."""
    called = ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        library = module.partition(".")[0]
        if library != "sqlalchemy":
            return library == "app_db" and not called.startswith("sqlalchemy.orm")
        called, frame = module, frame.f_back
    return False
