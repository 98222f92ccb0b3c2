"""Other settings for a while: the container gets another state, and its own back afterwards."""

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
from app_db.settings._sources import variable_for
from app_db.settings._urls import UNREADABLE_URL, URL_PARTS, parse_url


class Override:
    """A block, for `with` or `async with`, in which a container has other settings. It gives those settings."""

    def __init__(self, container: DatabaseContainer, settings: DatabaseSettings | Mapping[str, str]) -> None:
        self.container = container
        self._settings = settings
        self._own: State | None = None
        """The container's own state, while the block lasts."""
        self._overridden: list[tuple[providers.Provider[Any], Sequence[providers.Provider[Any]]]] = []
        self._rehearsal: Rehearsal | None = None

    def __enter__(self) -> DatabaseSettings:
        if self._own is not None:
            raise InvalidUse("The same override was entered twice", "Make another one for each block")
        settings = self.other_settings()
        holder, coordinator = self.container.core.holder(), self.container.core.coordinator()
        with MAKING:  # or a thread could make an engine from these settings for the other state
            self._overridden = [(provider, provider.overridden) for provider in _providers(self.container)]
            for provider, _ in self._overridden:
                provider.reset_override()
            self.container.settings.override(providers.Object(settings))
            self._own, holder.state = holder.state, holder.new_state()
            self._rehearsal, coordinator.rehearsal = coordinator.rehearsal, None  # other databases are not isolated
        return settings

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        state = self._put_back()
        try:
            state.close()
        finally:
            self.clean_up()

    async def __aenter__(self) -> DatabaseSettings:
        return self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        state = self._put_back()
        try:
            await state.close_awaited()
        finally:
            self.clean_up()

    def other_settings(self) -> DatabaseSettings:
        """Return what the container is to have. Nothing was changed yet."""
        given = self._settings
        return given if isinstance(given, DatabaseSettings) else settings_with_urls(self.container, given)

    def clean_up(self) -> None:
        """Do what is left to do when the container has everything back."""

    def _put_back(self) -> State:
        """Give the container its own state and overrides back, and return the state of the block."""
        holder, coordinator = self.container.core.holder(), self.container.core.coordinator()
        holder.state.decision_places.forget_acknowledged()  # while engines are still the block's
        with MAKING:
            for provider, overriding in self._overridden:
                provider.reset_override()
                for each in overriding:
                    provider.override(each)
            coordinator.rehearsal = self._rehearsal
            state, holder.state, self._own = holder.state, cast("State", self._own), None
        return state


def _providers(container: DatabaseContainer) -> Iterator[providers.Provider[Any]]:
    """Yield the providers whose overrides belong to the settings."""
    yield container.settings
    for connection in connections_of(container).values():
        for kind in KINDS:
            yield getattr(connection, kind)


def connections_of(container: DatabaseContainer) -> dict[str, Connection]:
    """Return the connections that a container declares, by name."""
    return {name: provider for name, provider in container.providers.items() if isinstance(provider, Connection)}


# ---- settings from settings ----------------------------------------------------------------------------------------


def settings_of(container: DatabaseContainer) -> DatabaseSettings | None:
    """Return the settings of a container, or None where nothing is configured yet."""
    try:
        return container.settings()
    except NothingConfigured:
        return None


def names_of(container: DatabaseContainer, settings: DatabaseSettings | None) -> list[str]:
    """Return all connections there can be: those of the settings, and those that the container declares."""
    return sorted({*connections_of(container), *(settings.connections if settings is not None else ())})


def declared(settings: DatabaseSettings | None, name: str) -> ConnectionSettings | None:
    """Return a connection as the settings have it, its mirror not resolved."""
    return None if settings is None else settings._declared(name)


def settings_with_urls(container: DatabaseContainer, urls: Mapping[str, str]) -> DatabaseSettings:
    """Return a container's settings with other databases for some connections, or raise a SettingsError that lists all wrongs."""
    settings = settings_of(container)
    known = names_of(container, settings)
    problems = [problem for name, url in urls.items() if (problem := _problem_of(name, url, known)) is not None]
    if problems:
        raise SettingsError(problems)
    replaced = {name: with_url(declared(settings, name), str(url)) for name, url in urls.items()}
    if settings is None:
        return DatabaseSettings(connections=replaced)
    return settings.with_connections({**settings.connections, **replaced})


def _problem_of(name: str, url: object, known: list[str]) -> Problem | None:
    variable = variable_for(("connections", name, "url"))
    if name not in known:
        listed = ", ".join(repr(one) for one in known)
        return Problem(variable, f"is for no connection of the container.{did_you_mean(name, known)} There are: {listed}.")
    if not isinstance(url, str) or parse_url(url) is None:
        return Problem(variable, UNREADABLE_URL)
    return None


def with_url(connection: ConnectionSettings | None, url: str) -> ConnectionSettings:
    """Return settings that say the same of how a connection is used, and `url` of which database it is."""
    if connection is None:
        return ConnectionSettings(url=url)
    replaced = {"url", "mirror", *URL_PARTS}
    before, after = connection.read_url(), parse_url(url)
    if after is not None and after.password is not None:
        replaced.add("password_provider")
    if before is None or after is None or before.get_backend_name() != after.get_backend_name():
        replaced |= {"connect_args", "password_provider"}  # meant for another kind of database
    kept = {field: getattr(connection, field) for field in connection.model_fields_set if field not in replaced}
    return ConnectionSettings(**kept, url=url)
