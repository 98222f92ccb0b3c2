"""How reports tell an error: in one line, without secrets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

from app_db._databases.database import code_of
from app_db._wording import in_one_line
from app_db.errors import AppDbError
from app_db.settings._urls import is_secret

if TYPE_CHECKING:
    from app_db.settings import ConnectionSettings


def described(error: BaseException, secrets: Iterable[str] = ()) -> str:
    """Return an error in one line. Of an error of the application's, whose message may have a secret in it, only the class.

    If the text has one of `secrets` in it, return the class and the code of the error. A mask would show where the secret
    stands, which discloses it if it is short, the name of the user, or a word of the driver's.
    """
    cause = getattr(error, "orig", None) or error
    if not (isinstance(error, DBAPIError | OSError | AppDbError) or _is_of_a_driver(error)):
        return type(error).__name__
    text = in_one_line(error).removesuffix(": ")
    if not any(secret in text for secret in secrets):
        return text
    code = code_of(error)
    return f"{type(cause).__name__}{f' ({code})' if code else ''}"


def _is_of_a_driver(error: BaseException) -> bool:
    """Return whether a driver has raised an error that SQLAlchemy has not wrapped, as 2.0 does where asyncpg can't connect."""
    return type(error).__module__.partition(".")[0] in ("aiosqlite", "asyncmy", "asyncpg", "psycopg", "pymysql")


def secrets_of(connection: ConnectionSettings) -> Iterator[str]:
    """Yield the secrets in the settings of a connection."""
    url = connection.read_url()
    given = dict(connection.connect_args)
    if url is not None:
        given |= url.query | {"password": url.password}
    yield from (str(value) for key, value in given.items() if value and is_secret(key))
