"""Reads database URLs, and masks secrets in URLs and other settings.

No function here raises for a URL that it can't use, because the error would quote the URL. It
returns what is wrong.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeGuard

from pydantic import SecretStr, SerializationInfo
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError

from app_db._compat.asyncio import running_loop
from app_db.errors import InvalidUse

# ---- reading ----------------------------------------------------------------------------------------------------

URL_PARTS = ("driver", "host", "port", "user", "password", "database", "query")
"""The settings that can be given in place of a URL."""

UNREADABLE_URL = (
    "can't be read as a database URL. It has the form postgresql+psycopg://user:password@host/database or sqlite:///file.db; "
    "write '@' in a user name or password as %40, or set DRIVER, HOST, USER, PASSWORD and DATABASE instead of URL."
)

_DEFAULT_DRIVERS = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
_PACKAGES = {  # by driver: its module, and what to pip install
    "psycopg": ("psycopg", "'psycopg[binary]'"),
    "psycopg2": ("psycopg2", "psycopg2-binary"),
    "asyncpg": ("asyncpg", "'app-db[asyncpg]'"),
    "pymysql": ("pymysql", "PyMySQL"),
    "mysqldb": ("MySQLdb", "mysqlclient"),
    "aiomysql": ("aiomysql", "aiomysql"),
    "asyncmy": ("asyncmy", "'app-db[asyncmy]'"),
    "aiosqlite": ("aiosqlite", "'app-db[asyncio]'"),
    "aioodbc": ("aioodbc", "aioodbc"),
    "oracledb": ("oracledb", "oracledb"),
    "pyodbc": ("pyodbc", "pyodbc"),
}


def with_driver(name: str) -> str:
    """Return `dialect+driver` for a dialect that app_db chooses a driver for, and `name` itself for others."""
    return _DEFAULT_DRIVERS.get(name, name)


def parse_url(text: str) -> URL | None:
    """Return the URL with a driver, or None for text that can't be read as a URL, or that is ambiguous."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return None
    if url.password is not None and text.count("@") > 1:  # a part of the password would be read as the host, and shown
        return None
    return url.set(drivername=with_driver(url.drivername))


_FOR_COROUTINES = {  # psycopg and oracledb are for both
    "psycopg2": "asyncpg",
    "pg8000": "asyncpg",
    "pysqlite": "aiosqlite",
    "pymysql": "asyncmy",
    "mysqldb": "asyncmy",
    "pyodbc": "aioodbc",
}
_FOR_THREADS = {
    "asyncpg": "psycopg",
    "aiosqlite": "pysqlite",
    "asyncmy": "pymysql",
    "aiomysql": "pymysql",
    "aioodbc": "pyodbc",
}


def for_coroutines(url: URL) -> URL:
    """Return the URL of the same database with a driver for coroutines."""
    return _with_other_driver(url, _FOR_COROUTINES)


def for_threads(url: URL) -> URL:
    """Return the URL of the same database with a driver for threads."""
    return _with_other_driver(url, _FOR_THREADS)


def _with_other_driver(url: URL, others: dict[str, str]) -> URL:
    other = others.get(url.get_driver_name())
    return url if other is None else url.set(drivername=f"{url.get_backend_name()}+{other}")


def dialect_of(url: URL, *, asynchronous: bool = False) -> type[Dialect] | str:
    """Return the dialect of a URL, or a sentence that says what is wrong and what to install."""
    try:
        dialect = url.get_dialect()
        if asynchronous:
            dialect = dialect.get_async_dialect_cls(url)
    except (ArgumentError, ImportError):  # NoSuchModuleError is an ArgumentError
        return "names a dialect that SQLAlchemy does not have. Check the spelling, or pip install the package of the dialect."
    module, package = _PACKAGES.get(dialect.driver, ("", ""))
    if module and find_spec(module) is None:
        return f"needs a driver that is not installed: pip install {package}"
    if not module:
        try:
            dialect.import_dbapi()
        except ImportError as error:
            return f"needs the driver {dialect.driver}, which can't be imported ({error}). Install its package with pip."
    if asynchronous and not dialect.is_async:
        return f"names the driver {dialect.driver}, which coroutines can't use. Name one that they can."
    return dialect


def require_greenlet() -> None:
    """Raise InvalidUse unless greenlet is installed, by which coroutines run synchronous code."""
    try:
        import_module("greenlet")  # SQLAlchemy 2.1 installs it only when asked to
    except ImportError:
        raise InvalidUse("Coroutines need greenlet, which is not installed", "pip install 'app-db[asyncio]'") from None


def require_asyncio() -> None:
    """Raise InvalidUse in a coroutine of trio, which can't wait for what SQLAlchemy's async engines wait for."""
    trio = sys.modules.get("trio")
    if trio is None or running_loop() is not None:
        return
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:  # trio does not run here
        return
    raise InvalidUse(
        "SQLAlchemy's async engines and sessions need asyncio, and this coroutine runs under trio",
        "Use the sessions for threads, in a function for `await trio.to_thread.run_sync(function)`, or run the coroutine by "
        "asyncio (with anyio, the backend 'asyncio')",
    )


def is_memory(url: URL) -> bool:
    """Return whether a URL is that of an SQLite database in memory."""
    if url.get_backend_name() != "sqlite":
        return False
    return url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"


# ---- showing ----------------------------------------------------------------------------------------------------

MASK = "***"
_SECRET_KEY = re.compile(
    r"pass|pwd|secret|token|credential|authorization|dsn|conninfo|odbc_connect|^options$|^server_settings$|^init_command$"
    r"|(api|access|private|client|server)[-_]?key$",
    re.IGNORECASE,
)


def is_secret(key: str) -> bool:
    """Return whether the value of a setting with this name is a secret."""
    return key != "password_provider" and _SECRET_KEY.search(key) is not None


class SecretiveURL(URL):
    """A URL that shows neither its password nor the secrets in its query. Drivers get them all the same."""

    def render_as_string(self, hide_password: bool = True) -> str:
        """Return the URL as a string, with its secrets masked unless `hide_password` is false."""
        if not hide_password:
            return super().render_as_string(hide_password=False)
        return masked(URL.create(*self))

    def __repr__(self) -> str:
        return self.render_as_string()

    __str__ = __repr__


def is_object(value: object) -> TypeGuard[dict[str, object]]:
    """Return whether a value is a JSON object: a dict whose keys are strings."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_array(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def shown(key: str, value: object) -> object:
    """Return the value of the setting `key` with its secrets masked."""
    if value is None:
        return None
    if key == "url":
        url = parse_url(str(revealed(value)))
        return MASK if url is None else masked(url)
    if is_secret(key) or isinstance(value, SecretStr):
        return MASK
    if is_object(value):
        return {inner: shown(inner, item) for inner, item in value.items()}
    if _is_array(value):
        return [shown(key, item) for item in value]
    return re.sub(r"(://[^:/@\s]*:)\S+@", rf"\1{MASK}@", value) if isinstance(value, str) else value


def masked(url: URL) -> str:
    """Return the text of a URL with the password, and secrets in the query, masked."""
    query = {key: MASK if is_secret(key) else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True).replace("%2A%2A%2A", MASK)


def dumped(value: dict[str, object], info: SerializationInfo) -> object:
    """Serialize a mapping that may hold secrets: masked for JSON, and with SecretStr for Python, which `revealed` undoes."""
    return shown("", value) if info.mode == "json" else _concealed(value)


class Secretive(dict[str, Any]):
    """A mapping that does not show the secrets in it."""

    def __repr__(self) -> str:
        return repr(shown("", dict(self)))


def _concealed(value: object, secret: bool = False) -> object:
    """Return a value with each secret in it wrapped in SecretStr."""
    if is_object(value):
        return {key: _concealed(item, secret or is_secret(key)) for key, item in value.items()}
    if _is_array(value):
        return [_concealed(item, secret) for item in value]
    return SecretStr(str(value)) if secret else value


def revealed(value: object) -> object:
    """Return a value with each SecretStr and URL in it as plain text, secrets included."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, URL):
        return value.render_as_string(hide_password=False)
    if is_object(value):
        return {key: revealed(item) for key, item in value.items()}
    return [revealed(item) for item in value] if _is_array(value) else value
