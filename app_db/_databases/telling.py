"""How reports tell an error: in one line, without secrets."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from app_db._wording import in_one_line
from app_db.errors import AppDbError


def described(error: BaseException) -> str:
    """Return an error in one line. Of an error of the application's, whose message may have a secret in it, only the class."""
    if isinstance(error, DBAPIError | OSError | AppDbError):
        return in_one_line(error)
    return type(error).__name__
