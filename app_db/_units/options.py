"""The options of a unit of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from inspect import Parameter, Signature, signature
from typing import Any

from app_db._wording import did_you_mean
from app_db.errors import InvalidUse


class Propagation(StrEnum):
    """What a block does inside a unit of work, and outside one. The string values work too: `propagation="nested"`."""

    REQUIRED = "required"
    """Inside a unit: take part in it. Outside: begin one."""
    REQUIRES_NEW = "requires_new"
    """Inside a unit: begin another one, while the outer one waits. Outside: begin one."""
    NESTED = "nested"
    """Inside a unit: take part in it, in a savepoint. Outside: begin one."""
    MANDATORY = "mandatory"
    """Inside a unit: take part in it. Outside: raise NoUnitOfWork."""
    SUPPORTS = "supports"
    """Inside a unit: take part in it. Outside: run without a unit."""
    NOT_SUPPORTED = "not_supported"
    """Inside a unit: run without it, while it waits. Outside: run without a unit."""
    NEVER = "never"
    """Inside a unit: raise AlreadyInUnitOfWork. Outside: run without a unit."""


@dataclass(frozen=True)
class Options:
    """The options of a block. Raises InvalidUse for values and combinations that are impossible."""

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
        if self.timeout is not None and not _is_time(self.timeout):
            raise InvalidUse(
                f"timeout={self.timeout} is no time limit", f"Give seconds above 0 and up to {_LONGEST:,}, or None for no limit"
            )
        if self.isolation is not None and self.isolation not in _ISOLATION_LEVELS:
            raise InvalidUse(f"There is no isolation level {self.isolation!r}", f"Use one of {', '.join(_ISOLATION_LEVELS)}")
        if self.backoff < 0:
            raise InvalidUse(f"backoff={self.backoff} is negative", "Give the longest wait before the second attempt, in seconds")
        if self.attempts > 1 and self.propagation not in _MAY_BEGIN_A_UNIT:
            raise InvalidUse(
                f"attempts={self.attempts} can't be combined with propagation={self.propagation.value!r}, "
                "which never begins a unit of its own",
                "Put attempts on the outermost unit",
            )


def _is_time(given: object) -> bool:
    return isinstance(given, (int, float)) and 0 < given <= _LONGEST


_LONGEST = 2_000_000
"""23 days. PostgreSQL counts milliseconds in 31 bits."""

_ISOLATION_LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
_MAY_BEGIN_A_UNIT = frozenset({Propagation.REQUIRED, Propagation.REQUIRES_NEW, Propagation.NESTED})


def signature_of_options(function: Callable[..., object]) -> Signature:
    """Return the signature of a function that takes options as `**options`, with each of them."""
    whole = signature(function)
    *first, _ = whole.parameters.values()
    named = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Options)
        if field.name not in whole.parameters
    ]
    return whole.replace(parameters=[*first, *named])


def options_from(
    propagation: Propagation | str = Propagation.REQUIRED,
    *,
    isolation: str | None = None,
    commit_on: type[BaseException] | Iterable[type[BaseException]] = (),
    **others: Any,
) -> Options:
    """Return Options from what an application gave. Raises InvalidUse for unknown options and values."""
    known = [field.name for field in fields(Options)]
    for name in others:
        if name not in known:
            advice = f"{did_you_mean(name, known)} The options are {', '.join(known)}".lstrip()
            raise InvalidUse(f"There is no option {name!r}", advice)
    try:
        how = Propagation(propagation)
    except ValueError:
        names = ", ".join(mode.value for mode in Propagation)
        raise InvalidUse(f"There is no propagation {propagation!r}", f"Use one of {names}") from None
    return Options(
        how,
        isolation=None if isolation is None else isolation.upper().replace("_", " "),
        commit_on=(commit_on,) if isinstance(commit_on, type) else tuple(commit_on),
        **others,
    )
