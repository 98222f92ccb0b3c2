"""How database URLs are read, and how they and whatever else may hold a secret are shown.

Nothing here raises for a URL it can't use: the error would quote it. What is wrong is returned instead.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeGuard

from pydantic import SecretStr, SerializationInfo
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError

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
_PACKAGES = {  # by driver: the module it is, what to pip install for it
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
    """Return `dialect+driver` for a bare dialect that app_db chooses the driver of, else `name` as it is."""
    return _DEFAULT_DRIVERS.get(name, name)


def parse_url(text: str) -> URL | None:
    """Return the URL with its driver settled, or None when it can't be read or can be read in more than one way."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return None
    if url.password is not None and text.count("@") > 1:  # a part of the password would be taken for the host, and shown
        return None
    return url.set(drivername=with_driver(url.drivername))


_FOR_COROUTINES = {  # psycopg and oracledb serve both
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
    """Return the URL with the driver by which coroutines reach the same database."""
    return _with_other_driver(url, _FOR_COROUTINES)


def for_threads(url: URL) -> URL:
    """Return the URL with the driver by which threads reach the same database."""
    return _with_other_driver(url, _FOR_THREADS)


def _with_other_driver(url: URL, others: dict[str, str]) -> URL:
    other = others.get(url.get_driver_name())
    return url if other is None else url.set(drivername=f"{url.get_backend_name()}+{other}")


def dialect_of(url: URL, *, asynchronous: bool = False) -> type[Dialect] | str:
    """Return the dialect of a URL, or a sentence that says what is wrong with its driver, and what to install."""
    try:
        dialect = url.get_dialect()
        if asynchronous:
            dialect = dialect.get_async_dialect_cls(url)
    except (ArgumentError, ImportError):  # NoSuchModuleError is an ArgumentError
        return "names a dialect that SQLAlchemy does not have. Check the spelling, or pip install the package of the dialect."
    module, package = _PACKAGES.get(dialect.driver, ("", ""))
    if module and find_spec(module) is None:
        return f"needs a driver that is not installed: pip install {package}"
    if asynchronous and not dialect.is_async:
        return f"names the driver {dialect.driver}, which coroutines can't use. Name one that they can."
    return dialect


def require_greenlet() -> None:
    """Raise the error that says what to install unless coroutines can drive synchronous code."""
    try:
        import_module("greenlet")  # SQLAlchemy 2.1 installs it only when asked to
    except ImportError:
        raise InvalidUse("Coroutines need greenlet, which is not installed", "pip install 'app-db[asyncio]'") from None


def is_memory(url: URL) -> bool:
    """Return whether a database is SQLite's, and in no file of the application's."""
    if url.get_backend_name() != "sqlite":
        return False
    return url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"


# ---- showing ----------------------------------------------------------------------------------------------------

MASK = "***"
_SECRET_KEY = re.compile(r"pass|pwd|secret|token|credential|dsn|conninfo|odbc_connect", re.IGNORECASE)


def is_secret(key: str) -> bool:
    """Return whether a setting of this name holds a secret."""
    return key != "password_provider" and _SECRET_KEY.search(key) is not None


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Return whether a value is what JSON calls an object."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def shown(key: str, value: Any) -> Any:
    """Return the value of the setting `key` as people may see it: equal to it, or with its secrets masked."""
    if value is None:
        return None
    if key == "url":
        url = parse_url(revealed(value))
        return MASK if url is None else masked(url)
    if is_secret(key) or isinstance(value, SecretStr):
        return MASK
    if is_object(value):
        return {inner: shown(inner, item) for inner, item in value.items()}
    if isinstance(value, list):
        return [shown(key, item) for item in value]
    return re.sub(r"(://[^:/@\s]*:)\S+@", rf"\1{MASK}@", value) if isinstance(value, str) else value


def masked(url: URL) -> str:
    """Return a URL as people may see it: without its password and the secrets of its query."""
    query = {key: MASK if is_secret(key) else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True).replace("%2A%2A%2A", MASK)


def dumped(value: dict[str, Any], info: SerializationInfo) -> Any:
    """Serialize a mapping that may hold secrets: to JSON masked, to Python so that `revealed` gets it back."""
    return shown("", value) if info.mode == "json" else _concealed(value)


def _concealed(value: Any, secret: bool = False) -> Any:
    """Return a value with what is secret in it wrapped in SecretStr."""
    if is_object(value):
        return {key: _concealed(item, secret or is_secret(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_concealed(item, secret) for item in value]
    return SecretStr(str(value)) if secret else value


def revealed(value: Any) -> Any:
    """Return a value with every SecretStr and URL in it as plain text, secrets included."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, URL):
        return value.render_as_string(hide_password=False)
    if is_object(value):
        return {key: revealed(item) for key, item in value.items()}
    return [revealed(item) for item in value] if isinstance(value, list) else value
