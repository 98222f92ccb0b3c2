"""Replaces the settings of a container for the length of a block: it gets another state, and its own back at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

from dependency_injector import providers

from app_db._sessions.state import MAKING, State
from app_db._units.interfaces import Rehearsal
from app_db._wording import did_you_mean
from app_db.container import KINDS, Connection, DatabaseContainer
from app_db.errors import InvalidUse, NothingConfigured, Problem, SettingsError
from app_db.settings import ConnectionSettings, DatabaseSettings
from app_db.settings._spelling import Spelling
from app_db.settings._urls import UNREADABLE_URL, URL_PARTS, parse_url

_Provider = providers.Provider[Any]


_open: list[Override] = []
"""The blocks that have been entered and not left."""


def is_overridden(container: DatabaseContainer) -> bool:
    """Return whether a container has other settings for the length of a block, or is isolated."""
    return any(block.container is container for block in _open) or container.core.coordinator().rehearsal is not None


class Override:
    """A block, for `with` or `async with`, in which a container has other settings. It gives those settings.

    Raises SettingsError for settings that are wrong, and InvalidUse if the same object is entered
    twice, or if it ends before a block of the container that began inside it.
    """

    def __init__(self, container: DatabaseContainer, settings: DatabaseSettings | Mapping[str, str]) -> None:
        self.container = container
        self._settings = settings
        self._own: State | None = None
        """The container's own state, while the block lasts."""
        self._overridden: list[tuple[_Provider, Sequence[_Provider]]] = []
        """The providers, and what overrides each outside the block."""
        self._rehearsal: Rehearsal | None = None

    def __enter__(self) -> DatabaseSettings:
        if self._own is not None:
            raise InvalidUse("The same override was entered twice", "Make another one for each block")
        settings = self.other_settings()
        holder, coordinator = self.container.core.holder(), self.container.core.coordinator()
        with MAKING:  # another thread could make an engine from the new settings and store it in the old state
            self._overridden = [(provider, provider.overridden) for provider in _providers(self.container)]
            for provider, _ in self._overridden:
                provider.reset_override()
            self.container.settings.override(providers.Object(settings))
            self._own, holder.state = holder.state, holder.new_state()
            self._rehearsal, coordinator.rehearsal = coordinator.rehearsal, None  # other databases are not isolated
        _open.append(self)
        return settings

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        inner = self._inner()
        state = self._put_back(inner)
        try:
            state.close()
        finally:
            self.clean_up()
        _refuse(inner, error)

    async def __aenter__(self) -> DatabaseSettings:
        return self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        inner = self._inner()
        state = self._put_back(inner)
        try:
            await state.close_awaited()
        finally:
            self.clean_up()
        _refuse(inner, error)

    def other_settings(self) -> DatabaseSettings:
        """Return the settings of the block. It is called before anything is changed."""
        given = self._settings
        return given if isinstance(given, DatabaseSettings) else settings_with_urls(self.container, given)

    def clean_up(self) -> None:
        """Remove what `other_settings` made. It is called when the container has its own settings back."""

    def _inner(self) -> Override | None:
        """Return the block of the container that began inside this one, if it has not ended."""
        later = _open[_open.index(self) + 1 :]
        return next((block for block in later if block.container is self.container), None)

    def _put_back(self, inner: Override | None) -> State:
        """Restore the container's own state and overrides, and return the state of the block."""
        if inner is not None:
            return self._leave_to(inner)
        holder, coordinator = self.container.core.holder(), self.container.core.coordinator()
        holder.state.decision_logs.forget_acknowledged()  # while engines are still the block's
        with MAKING:
            for provider, overriding in self._overridden:
                provider.reset_override()
                for each in overriding:
                    provider.override(each)
            coordinator.rehearsal = self._rehearsal
            state, holder.state, self._own = holder.state, cast("State", self._own), None
        _open[:] = [block for block in _open if block is not self]
        return state

    def _leave_to(self, inner: Override) -> State:
        """Let a block that has not ended restore what this one would, and return the state of this one."""
        with MAKING:
            state, inner._own, self._own = cast("State", inner._own), self._own, None
            inner._overridden, inner._rehearsal = self._overridden, self._rehearsal
            _open[:] = [block for block in _open if block is not self]
        return state


def _refuse(inner: Override | None, error: BaseException | None) -> None:
    """Raise an error for a block that ended before one inside it, unless the block has raised another one."""
    if inner is not None and error is None:
        raise InvalidUse(
            "A block with other settings ended before a block inside it. The container keeps the settings of the inner one until "
            "that ends",
            "End the inner block first, and don't give a container other settings in two threads at a time",
        )


def _providers(container: DatabaseContainer) -> Iterator[_Provider]:
    """Yield the providers whose overrides the block removes."""
    yield container.settings
    for connection in connections_of(container).values():
        for kind in KINDS:
            yield getattr(connection, kind)


def connections_of(container: DatabaseContainer) -> dict[str, Connection]:
    """Return the connections that a container declares, by name."""
    return {name: provider for name, provider in container.providers.items() if isinstance(provider, Connection)}


# ---- settings from settings ----------------------------------------------------------------------------------------


def settings_of(container: DatabaseContainer) -> DatabaseSettings | None:
    """Return the settings of a container, or None where no connection is configured."""
    try:
        return container.settings()
    except NothingConfigured:
        return None


def names_of(container: DatabaseContainer, settings: DatabaseSettings | None) -> list[str]:
    """Return the names of all connections in the settings and in the container, sorted."""
    return sorted({*connections_of(container), *(settings.connections if settings is not None else ())})


def declared(settings: DatabaseSettings | None, name: str) -> ConnectionSettings | None:
    """Return the settings of a connection without resolving its mirror."""
    return None if settings is None else settings._declared(name)


def settings_with_urls(container: DatabaseContainer, urls: Mapping[str, str]) -> DatabaseSettings:
    """Return the settings of a container with other URLs for some connections. Raises SettingsError, which lists all problems."""
    settings = settings_of(container)
    known = names_of(container, settings)

    def variable(name: str) -> str:
        path = ("connections", name, "url")
        return Spelling().variable(path) if settings is None else settings.variable(*path)

    problems = [problem for name, url in urls.items() if (problem := _problem_of(variable(name), name, url, known)) is not None]
    if problems:
        raise SettingsError(problems)
    replaced = {name: with_url(declared(settings, name), str(url)) for name, url in urls.items()}
    if settings is None:
        return DatabaseSettings(connections=replaced)
    return settings.with_connections({**settings.connections, **replaced})


def _problem_of(variable: str, name: str, url: object, known: list[str]) -> Problem | None:
    if name not in known:
        listed = ", ".join(map(repr, known))
        return Problem(variable, f"is for no connection of the container.{did_you_mean(name, known)} There are: {listed}.")
    if not isinstance(url, str) or parse_url(url) is None:
        return Problem(variable, UNREADABLE_URL)
    return None


def with_url(connection: ConnectionSettings | None, url: str) -> ConnectionSettings:
    """Return the settings of a connection with another URL, and with all that says how it is used."""
    if connection is None:
        return ConnectionSettings(url=url)
    replaced = {"url", "mirror", *URL_PARTS}
    before, after = connection.read_url(), parse_url(url)
    if after is not None and after.password is not None:
        replaced.add("password_provider")
    if before is None or after is None or before.get_backend_name() != after.get_backend_name():
        replaced |= {"connect_args", "password_provider"}  # they are for the other kind of database
    kept = {field: getattr(connection, field) for field in connection.model_fields_set if field not in replaced}
    return ConnectionSettings(**kept, url=url)
