"""Xids: the names under which databases keep the prepared branches of a unit of work.

An xid names the application, the unit and the connection in at most 64 bytes, the limit of MySQL. It begins with a letter,
because psycopg parses names that begin with a digit.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from base64 import b32encode
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_lowercase, ascii_uppercase, digits

_LETTERS = digits + ascii_uppercase + ascii_lowercase
"""The digits of base 62, in the order of ASCII: within one log, a later unit sorts later."""

_LOG_LENGTH = 6
_TIME_LENGTH = 6
_RANDOM_LENGTH = 10

_APPLICATION = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,15}")
_LOG = re.compile(rf"[A-Za-z0-9]{{{_LOG_LENGTH}}}")
_UNIT = re.compile(rf"[A-Za-z0-9]{{{_LOG_LENGTH + _TIME_LENGTH + _RANDOM_LENGTH}}}")
_CONNECTION = re.compile(r"[a-z][a-z0-9_]{0,21}(\.[1-9])?")


@dataclass(frozen=True, slots=True)
class Xid:
    """The name under which a database keeps one prepared branch. Values of the wrong form raise ValueError."""

    application: str
    unit: str
    connection: str

    def __post_init__(self) -> None:
        for part, form in (("application", _APPLICATION), ("unit", _UNIT), ("connection", _CONNECTION)):
            _check(getattr(self, part), form, part)

    def __str__(self) -> str:
        return f"{self.application}:{self.unit}:{self.connection}"

    @classmethod
    def parse(cls, text: str | bytes) -> Xid | None:
        """Return the xid in `text`, or None if app_db has not made it. Other programs prepare transactions too."""
        try:
            spelled = text if isinstance(text, str) else text.decode("ascii")
            application, unit, connection = spelled.split(":")
            return cls(application, unit, connection)
        except ValueError:  # UnicodeDecodeError is one
            return None

    @property
    def connection_name(self) -> str:
        """The connection of the branch. The second branch of a unit on the connection `writer` is called `writer.2`."""
        return self.connection.partition(".")[0]

    @property
    def log(self) -> str:
        """The id of the log with which the unit's id begins."""
        return log_of(self.unit)

    @property
    def begun_at(self) -> float:
        """When the unit began, in seconds since the epoch, by the clock of the host that it ran on."""
        return float(_number(self.unit[_LOG_LENGTH : _LOG_LENGTH + _TIME_LENGTH]))


def new_unit_id(log: str) -> str:
    """Return a new id for a unit that is decided in the log with the id `log`."""
    _check(log, _LOG, "log")
    return log + _spelled(int(time.time()), _TIME_LENGTH) + _spelled(secrets.randbelow(62**_RANDOM_LENGTH), _RANDOM_LENGTH)


def new_log_id() -> str:
    """Return a new id for a decision log."""
    return _spelled(secrets.randbelow(62**_LOG_LENGTH), _LOG_LENGTH)


def log_of(unit: str) -> str:
    """Return the id of the log with which a unit's id begins. That log has the decision, or the id of the log that has it."""
    return unit[:_LOG_LENGTH]


@lru_cache
def log_id_for(application: str, log: str) -> str:
    """Return the id of a log for one application. Applications that share a log tell their units apart by it."""
    return b32encode(hashlib.sha256(f"{log} {application}".encode()).digest()).decode()[:_LOG_LENGTH]


def check_log_id(log: object) -> str:
    """Return `log`; raise ValueError if it is not the id of a log."""
    return _check(log, _LOG, "log")


def check_unit_id(unit: object) -> str:
    """Return `unit`; raise ValueError if it is not the id of a unit."""
    return _check(unit, _UNIT, "unit")


def check_connection_name(name: object) -> str:
    """Return `name`; raise ValueError if it can't be the connection of an xid."""
    return _check(name, _CONNECTION, "connection")


def _check(value: object, form: re.Pattern[str], part: str) -> str:
    if not isinstance(value, str) or form.fullmatch(value) is None:
        raise ValueError(f"{value!r} can't be the {part} of an xid: it has to match {form.pattern}")
    return value


def _spelled(number: int, length: int) -> str:
    letters: list[str] = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        letters.append(_LETTERS[digit])
    return "".join(reversed(letters))


def _number(spelled: str) -> int:
    number = 0
    for letter in spelled:
        number = number * 62 + _LETTERS.index(letter)
    return number
