"""How a container and its parts show themselves: `repr()`, `dir()` and `inspect.signature()`."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any, TypeVar

from dependency_injector import providers

from app_db.errors import AppDbError

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from app_db.settings import ConnectionSettings, DatabaseSettings

T = TypeVar("T")

METHODS = frozenset(
    "check_dependencies init_resources override override_providers providers reset_last_overriding reset_override "
    "reset_singletons shutdown_resources unwire wire".split()
)
"""Methods of dependency-injector's containers that applications use. `dir()` shows no others."""

_PLUMBING = frozenset({"__self__", "core", "holder", "name", "session_class", "async_session_class"})
"""Providers that applications don't use."""


def provided(providers_of_container: Iterable[str]) -> list[str]:
    """Return the names of those providers of a container that applications use."""
    return sorted(set(providers_of_container) - _PLUMBING)


def described_connection(name: str, settings: DatabaseSettings | None, own: Engine | AsyncEngine | None = None) -> str:
    """Return `writer (postgresql, shop@db)`; only the name if the settings are not known yet. `own` is an engine of its own."""
    if own is not None:
        return f"{name} ({_place_of(own.url)}, an engine of its own)"
    if settings is None:
        return name
    try:
        return f"{name} ({_database_of(settings.connection(name))})"
    except AppDbError:
        return f"{name} (not configured)"


def _place_of(url: URL) -> str:
    return f"{url.get_backend_name()}, {_where(url)}"


def _where(url: URL) -> str:
    database = str(url.database or "")
    return f"{database}@{url.host}" if url.host else database


def _database_of(connection: ConnectionSettings) -> str:
    url = connection.sqlalchemy_url()
    parts = [f"mirror of {connection.mirror}" if connection.mirror else url.get_backend_name(), _where(url)]
    parts += ["read-only"] if connection.read_only else []
    parts += [f"replica of {connection.replica_of}"] if connection.replica_of else []
    parts += ["two-phase"] if connection.two_phase else []
    parts += [] if connection.transactional else ["autonomous"]
    return ", ".join(part for part in parts if part)


def _signature_of(provider: Any) -> Signature:
    """Return the signature of what a provider calls, without what it injects."""
    whole = signature(provider.provides)
    own = list(whole.parameters.values())[len(provider.args) :]
    return whole.replace(parameters=[each for each in own if each.name not in provider.kwargs])


def _shown(provider: Any) -> str:
    name = provider.provides.__name__.removeprefix("build").lstrip("_")
    return f"<Provider {name}{_signature_of(provider)}>"


class SignedFactory(providers.Factory[T]):
    """A factory whose `inspect.signature()` shows what it is called with."""

    __signature__ = property(_signature_of)

    def __repr__(self) -> str:
        return _shown(self)


class SignedCallable(providers.Callable[T]):
    """A callable whose `inspect.signature()` shows what it is called with."""

    __signature__ = property(_signature_of)

    def __repr__(self) -> str:
        return _shown(self)
