"""The names under which databases keep the prepared branches of a unit of work.

An xid says whose branch it is, of which unit and on which connection, in at most 64 bytes, which is what MySQL takes. It begins
with a letter: psycopg reads meaning into names that begin with a digit.
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
"""The digits of base 62, in ASCII's order: what is begun later sorts later, within one log."""

_LOG_LENGTH = 6
_TIME_LENGTH = 6
_RANDOM_LENGTH = 10

_APPLICATION = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,15}")
_LOG = re.compile(rf"[A-Za-z0-9]{{{_LOG_LENGTH}}}")
_UNIT = re.compile(rf"[A-Za-z0-9]{{{_LOG_LENGTH + _TIME_LENGTH + _RANDOM_LENGTH}}}")
_CONNECTION = re.compile(r"[a-z][a-z0-9_]{0,21}(\.[1-9])?")


@dataclass(frozen=True, slots=True)
class Xid:
    """The name under which a database keeps one prepared branch. What has the wrong form raises ValueError."""

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
        """Return the xid that `text` spells, or None if it is not one of app_db's. Databases keep other people's too."""
        try:
            spelled = text if isinstance(text, str) else text.decode("ascii")
            application, unit, connection = spelled.split(":")
            return cls(application, unit, connection)
        except ValueError:  # UnicodeDecodeError is one
            return None

    @property
    def log(self) -> str:
        """The id of the log that keeps the unit's decision."""
        return log_of(self.unit)

    @property
    def begun_at(self) -> float:
        """When the unit began, in seconds since the epoch, by the clock of the host that it ran on."""
        return float(_number(self.unit[_LOG_LENGTH : _LOG_LENGTH + _TIME_LENGTH]))


def new_unit_id(log: str) -> str:
    """Return a new id for a unit whose decision the log with the id `log` will keep."""
    _check(log, _LOG, "log")
    return log + _spelled(int(time.time()), _TIME_LENGTH) + _spelled(secrets.randbelow(62**_RANDOM_LENGTH), _RANDOM_LENGTH)


def new_log_id() -> str:
    """Return a new id for a decision log."""
    return _spelled(secrets.randbelow(62**_LOG_LENGTH), _LOG_LENGTH)


def log_of(unit: str) -> str:
    """Return the id of the log with which a unit's id begins: there its decision is, or where to look for it."""
    return unit[:_LOG_LENGTH]


@lru_cache
def log_id_for(application: str, log: str) -> str:
    """Return an application's own id of a log: several may share it, and must tell their units apart there."""
    return b32encode(hashlib.sha256(f"{log} {application}".encode()).digest()).decode()[:_LOG_LENGTH]


def check_log_id(log: object) -> str:
    """Return `log`; raise ValueError if it is no log's id."""
    return _check(log, _LOG, "log")


def check_unit_id(unit: object) -> str:
    """Return `unit`; raise ValueError if it is no unit's id."""
    return _check(unit, _UNIT, "unit")


def check_connection_name(name: object) -> str:
    """Return `name`; raise ValueError if no branch can be on a connection of that name."""
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
